package controlplane

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/confidential-node/agent/nodeagent/api"
)

// Names of the streams. Hosts know them too.
const (
	CommandStream = "CMD"
	EventStream   = "EVT"
)

const (
	startTimeout = 20 * time.Second
	// ackWait is how long a node may take to store a command before it is
	// delivered again.
	ackWait = 10 * time.Second
	// maxMessage leaves room above the largest command, so that a node gets
	// to refuse one that is too large.
	maxMessage = 1 << 20
	// Commands end after a day at the latest; events wait for a control
	// plane that was away for a long weekend.
	commandAge, eventAge = 25 * time.Hour, 96 * time.Hour
)

// broker is the embedded message server and our own connection to it.
type broker struct {
	server *server.Server
	nc     *nats.Conn
	js     jetstream.JetStream
}

func startBroker(ctx context.Context, dir, listen string, cert tls.Certificate, id *identities, revoked map[string]time.Time, logger hclog.Logger) (b *broker, err error) {
	options, err := serverOptions(dir, listen, cert)
	if err != nil {
		return nil, fmt.Errorf("starting message server: %w", err)
	}
	operator, err := id.operatorClaims()
	if err != nil {
		return nil, fmt.Errorf("making operator: %w", err)
	}
	system, systemJWT, err := id.accountJWT(id.system, false, nil)
	if err != nil {
		return nil, fmt.Errorf("making system account: %w", err)
	}
	account, accountJWT, err := id.accountJWT(id.account, true, revoked)
	if err != nil {
		return nil, fmt.Errorf("making account: %w", err)
	}
	resolver := &server.MemAccResolver{}
	if err := errors.Join(resolver.Store(system, systemJWT), resolver.Store(account, accountJWT)); err != nil {
		return nil, fmt.Errorf("storing accounts: %w", err)
	}
	options.TrustedOperators, options.AccountResolver, options.SystemAccount = []*jwt.OperatorClaims{operator}, resolver, system
	s, err := server.NewServer(options)
	if err != nil {
		return nil, fmt.Errorf("making message server: %w", err)
	}
	s.SetLogger(serverLog{logger.Named("nats")}, false, false)
	started := &broker{server: s}
	b = started
	defer func() {
		if err != nil {
			started.close()
		}
	}()
	s.Start()
	if !s.ReadyForConnections(startTimeout) {
		return nil, errors.New("starting message server: not ready in time; is the address in use?")
	}
	creds, err := id.credentials("control plane", jwt.Permissions{}, time.Time{}, jwt.ConnectionTypeInProcess)
	if err != nil {
		return nil, fmt.Errorf("making own identity: %w", err)
	}
	if b.nc, err = connectTo(s, creds); err != nil {
		return nil, fmt.Errorf("connecting to own message server: %w", err)
	}
	if b.js, err = jetstream.New(b.nc); err != nil {
		return nil, fmt.Errorf("opening JetStream: %w", err)
	}
	return b, b.streams(ctx)
}

// connectTo makes our own connection. A server that is short of CPU time pings
// a client before it has answered the client's ping, which the client takes for
// an error; so this is tried again.
func connectTo(s *server.Server, creds []byte) (nc *nats.Conn, err error) {
	for range 3 {
		nc, err = nats.Connect("", nats.InProcessServer(s), nats.UserCredentialBytes(creds), nats.Name("control plane"), nats.MaxReconnects(-1),
			nats.Timeout(startTimeout))
		if err == nil {
			return nc, nil
		}
	}
	return nil, err
}

// serverOptions is how the message server stores and what it speaks; whom it
// trusts is for the caller to add. Its answer to a publish makes the sender
// forget the message, so every write is synced first.
func serverOptions(dir, listen string, cert tls.Certificate) (*server.Options, error) {
	host, portText, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, fmt.Errorf("reading address: %w", err)
	}
	number, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("reading port of %s: %w", listen, err)
	}
	port := int(number)
	if port == 0 {
		port = server.RANDOM_PORT
	}
	return &server.Options{
		ServerName: "reference-control-plane", Host: host, Port: port, NoSigs: true,
		JetStream: true, StoreDir: filepath.Join(dir, "jetstream"), SyncAlways: true,
		MaxPayload: maxMessage, MaxControlLine: 4096, TLSTimeout: 5, AuthTimeout: 5,
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13},
		TLSHandshakeFirst: true,
	}, nil
}

func (b *broker) streams(ctx context.Context) error {
	for _, c := range []jetstream.StreamConfig{
		{Name: CommandStream, Subjects: []string{"cmd.*"}, Retention: jetstream.WorkQueuePolicy, MaxAge: commandAge, MaxMsgSize: maxMessage},
		{Name: EventStream, Subjects: []string{"evt.>"}, MaxAge: eventAge, MaxMsgSize: maxMessage},
	} {
		if _, err := b.js.CreateOrUpdateStream(ctx, c); err != nil {
			return fmt.Errorf("making stream %s: %w", c.Name, err)
		}
	}
	return nil
}

// consumer makes a host's queue. The host can neither make nor change it.
func (b *broker) consumer(ctx context.Context, hostID string) error {
	_, err := b.js.CreateOrUpdateConsumer(ctx, CommandStream, jetstream.ConsumerConfig{
		Durable: hostID, FilterSubject: api.CommandSubject(hostID), AckPolicy: jetstream.AckExplicitPolicy,
		AckWait: ackWait, MaxDeliver: -1, MaxAckPending: 256,
	})
	if err != nil {
		return fmt.Errorf("making queue of host %s: %w", hostID, err)
	}
	return nil
}

// revoke makes the server refuse identities from now on, and ends their
// connections.
func (b *broker) revoke(id *identities, revoked map[string]time.Time) error {
	pub, token, err := id.accountJWT(id.account, true, revoked)
	if err != nil {
		return fmt.Errorf("revoking: %w", err)
	}
	claims, err := jwt.DecodeAccountClaims(token)
	if err != nil {
		return fmt.Errorf("revoking: %w", err)
	}
	account, err := b.server.LookupAccount(pub)
	if err != nil {
		return fmt.Errorf("revoking: %w", err)
	}
	b.server.UpdateAccountClaims(account, claims)
	return nil
}

// unsettled counts a host's commands that are not acknowledged yet.
func (b *broker) unsettled(ctx context.Context, hostID string) (int, error) {
	c, err := b.js.Consumer(ctx, CommandStream, hostID)
	if err != nil {
		return 0, fmt.Errorf("looking at queue of host %s: %w", hostID, err)
	}
	info, err := c.Info(ctx)
	if err != nil {
		return 0, fmt.Errorf("looking at queue of host %s: %w", hostID, err)
	}
	return info.NumAckPending + int(info.NumPending), nil
}

// disconnect breaks a host's connections.
func (b *broker) disconnect(hostID string) error {
	found, err := b.server.Connz(&server.ConnzOptions{Limit: 10000})
	if err != nil {
		return fmt.Errorf("listing connections: %w", err)
	}
	for _, c := range found.Conns {
		if c.Name != "nodeagent "+hostID {
			continue
		}
		if err := b.server.DisconnectClientByID(c.Cid); err != nil && c.Cid != 0 {
			return fmt.Errorf("breaking connection %d: %w", c.Cid, err)
		}
	}
	return nil
}

func (b *broker) url() string { return "tls://" + b.server.Addr().String() }

func (b *broker) close() {
	if b.nc != nil {
		b.nc.Close()
	}
	b.server.Shutdown()
	b.server.WaitForShutdown()
}

// serverLog gives the embedded server our log. It formats before we see it.
type serverLog struct{ l hclog.Logger }

func (s serverLog) Noticef(f string, v ...any) { s.l.Debug("server", "text", fmt.Sprintf(f, v...)) }
func (s serverLog) Warnf(f string, v ...any)   { s.l.Warn("server", "text", fmt.Sprintf(f, v...)) }
func (s serverLog) Fatalf(f string, v ...any)  { s.l.Error("server", "text", fmt.Sprintf(f, v...)) }
func (s serverLog) Errorf(f string, v ...any)  { s.l.Debug("server", "text", fmt.Sprintf(f, v...)) }
func (s serverLog) Debugf(f string, v ...any)  { s.l.Debug("server", "text", fmt.Sprintf(f, v...)) }
func (s serverLog) Tracef(f string, v ...any)  { s.l.Trace("server", "text", fmt.Sprintf(f, v...)) }
