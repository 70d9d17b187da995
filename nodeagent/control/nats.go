package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/confidential-node/agent/nodeagent/api"
)

// Names the control plane and its hosts agree on.
const (
	CommandStream = "CMD"
	EventStream   = "EVT"
)

const (
	// One server gets this long before the next is tried.
	connectTimeout = 10 * time.Second
	// TCP alone notices a vanished peer after many minutes.
	pingInterval = 20 * time.Second
	pullBatch    = 16
	// A pull request ends by itself, so that one lost by a server that was
	// restarted does not count for ever.
	pullExpires = 30 * time.Second
	minPull     = 100 * time.Millisecond
)

// NATSConfig says where the control plane is and who we are.
type NATSConfig struct {
	// Servers are tls://host:port, tried in random order.
	Servers []string
	// CAFile and CredsFile are read at every dial, so that they can be
	// replaced while the agent runs.
	CAFile, CredsFile string
	HostID            string
	// Clock judges the server's certificate and the end of the identity;
	// time.Now when nil.
	Clock func() time.Time
}

// NATS dials NATS JetStream over TLS 1.3. The TLS handshake comes before the
// first byte of the protocol, so that nobody on the way learns who connects.
type NATS struct{ cfg NATSConfig }

// NewNATS checks the configuration; it opens nothing.
func NewNATS(cfg NATSConfig) (*NATS, error) {
	if !api.ValidHostID(cfg.HostID) || len(cfg.Servers) == 0 {
		return nil, errors.New("configuring control link: host id and servers are required")
	}
	for _, s := range cfg.Servers {
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "tls" || u.Port() == "" || u.User != nil || u.Path != "" {
			return nil, errors.New("configuring control link: a server is not tls://host:port")
		}
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	return &NATS{cfg: cfg}, nil
}

// Check reads the files that Dial will read, for an early error.
func (n *NATS) Check() error {
	if _, err := readCA(n.cfg.CAFile); err != nil {
		return err
	}
	c, err := readCreds(n.cfg.CredsFile)
	if err != nil {
		return err
	}
	c.seed.Wipe()
	return nil
}

// Dial implements Transport.
func (n *NATS) Dial(ctx context.Context) (Conn, error) {
	roots, err := readCA(n.cfg.CAFile)
	if err != nil {
		return nil, err
	}
	creds, err := readCreds(n.cfg.CredsFile)
	if err != nil {
		return nil, err
	}
	defer creds.seed.Wipe() // needed until the connection is up, and never again
	var errs []error
	for _, i := range rand.Perm(len(n.cfg.Servers)) {
		c, err := n.connect(ctx, n.cfg.Servers[i], roots, creds)
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func (n *NATS) connect(ctx context.Context, server string, roots *x509.CertPool, creds *credentials) (*natsConn, error) {
	c := &natsConn{host: n.cfg.HostID, clock: n.cfg.Clock, expires: creds.expires, failed: make(chan struct{})}
	d := &dialer{ctx: ctx}
	nc, err := nats.Connect(server,
		nats.Name("nodeagent "+n.cfg.HostID),
		nats.Secure(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13, Time: n.cfg.Clock}), nats.TLSHandshakeFirst(),
		nats.UserJWT(func() (string, error) { return creds.jwt, nil }, creds.seed.Sign),
		nats.CustomInboxPrefix("_INBOX."+n.cfg.HostID),
		nats.NoReconnect(), nats.Timeout(connectTimeout), nats.SetCustomDialer(d),
		nats.PingInterval(pingInterval), nats.MaxPingsOutstanding(2),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { c.asyncError(err) }),
		nats.ClosedHandler(func(nc *nats.Conn) { c.fail(c.explain(nc.LastError())) }),
	)
	if errors.Is(err, nats.ErrNoServers) && d.err != nil {
		err = d.err
	}
	if err != nil {
		return nil, c.explain(fmt.Errorf("connecting to %s: %w", server, err))
	}
	c.nc = nc
	if c.inbox, err = nc.SubscribeSync(nc.NewInbox()); err != nil {
		nc.Close()
		return nil, c.explain(fmt.Errorf("subscribing to own inbox at %s: %w", server, err))
	}
	return c, nil
}

// dialer ends with the context of Dial, and keeps the error that the library
// replaces by a general one. The library uses it from one goroutine.
type dialer struct {
	ctx context.Context
	err error
}

func (d *dialer) Dial(network, address string) (net.Conn, error) {
	nd := net.Dialer{Timeout: connectTimeout}
	conn, err := nd.DialContext(d.ctx, network, address)
	d.err = err
	return conn, err
}

type natsConn struct {
	host    string
	clock   func() time.Time
	expires time.Time // of the identity; zero: never
	nc      *nats.Conn
	inbox   *nats.Subscription

	pending int       // commands asked for and not yet here; Next only
	asked   time.Time // of the last pull request; Next only

	once   sync.Once
	failed chan struct{}
	err    error // set before failed is closed
}

func (c *natsConn) Server() string { return c.nc.ConnectedUrlRedacted() }

func (c *natsConn) Failed() <-chan struct{} { return c.failed }

func (c *natsConn) Err() error {
	select {
	case <-c.failed:
		return c.err
	default:
		return nil
	}
}

func (c *natsConn) Close() {
	c.fail(errors.New("connection closed"))
	c.nc.Close()
}

func (c *natsConn) fail(err error) {
	c.once.Do(func() {
		c.err = err
		close(c.failed)
	})
}

// asyncError hears what the server says outside of any answer. A refused
// publish gets no other answer at all.
func (c *natsConn) asyncError(err error) {
	if errors.Is(err, nats.ErrPermissionViolation) || errors.Is(err, nats.ErrAuthExpired) ||
		errors.Is(err, nats.ErrAuthRevoked) || errors.Is(err, nats.ErrAuthorization) {
		c.fail(c.explain(err))
	}
}

// explain turns an error of the client library into a LinkError where there is
// a remedy.
func (c *natsConn) explain(err error) error {
	const enrol = "enrol the host again and replace its credentials file"
	var untrusted *tls.CertificateVerificationError
	var invalid x509.CertificateInvalidError
	switch {
	case err == nil:
		return errors.New("connection closed by the server")
	case errors.Is(err, nats.ErrPermissionViolation):
		return &LinkError{StatePermission, enrol + "; it must allow the subjects of host " + c.host, err}
	case errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAccountAuthExpired):
		return &LinkError{StateAuthExpired, enrol, err}
	case errors.Is(err, nats.ErrAuthorization):
		if !c.expires.IsZero() && c.clock().After(c.expires) {
			return &LinkError{StateAuthExpired, enrol, err}
		}
		return &LinkError{StateAuthRefused, enrol, err}
	case errors.Is(err, nats.ErrAuthRevoked):
		return &LinkError{StateAuthRefused, enrol, err}
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return &LinkError{StateCertificateExpired, fmt.Sprintf(
			"by the agent's time it is %s: if that is wrong, set the host's clock (nodeagent status shows whether it is believed); if it is right, renew the server's certificate",
			c.clock().UTC().Format(time.RFC3339)), err}
	case errors.As(err, &untrusted):
		return &LinkError{StateUntrusted, "check the server's address and the CA file; somebody may be in between", err}
	}
	return err
}

// Next implements Conn. The pull protocol is spoken by hand, because the
// library's consumers ask for information that the host's identity may not
// have.
func (c *natsConn) Next(ctx context.Context, idle time.Duration) (Message, error) {
	for {
		if c.pending <= 0 || time.Since(c.asked) > pullExpires+idle {
			if err := c.pull(idle); err != nil {
				return nil, err
			}
		}
		wait, cancel := context.WithTimeout(ctx, 2*idle)
		msg, err := c.inbox.NextMsgWithContext(wait)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, context.DeadlineExceeded):
			// A queue that exists confirms every idle time. For one that does
			// not, a server in operator mode says nothing at all.
			c.pending = 0
			return nil, c.consumerMissing(fmt.Sprintf("the host's queue did not answer for %s", 2*idle))
		case err != nil:
			if failed := c.Err(); failed != nil {
				err = failed
			}
			return nil, fmt.Errorf("waiting for commands: %w", err)
		}
		status := msg.Header.Get("Status")
		if status == "" {
			c.pending--
			return &natsMessage{c, msg}, nil
		}
		if err := c.status(status, msg.Header.Get("Description")); err != nil {
			return nil, err
		}
	}
}

func (c *natsConn) pull(idle time.Duration) error {
	request, err := json.Marshal(struct {
		Batch     int           `json:"batch"`
		Expires   time.Duration `json:"expires"`
		Heartbeat time.Duration `json:"idle_heartbeat"`
	}{pullBatch, pullExpires, min(idle, pullExpires/2)})
	if err != nil {
		return fmt.Errorf("encoding pull request: %w", err)
	}
	subject := "$JS.API.CONSUMER.MSG.NEXT." + CommandStream + "." + c.host
	if err := c.nc.PublishRequest(subject, c.inbox.Subject, request); err != nil {
		return fmt.Errorf("asking for commands: %w", err)
	}
	c.pending, c.asked = pullBatch, time.Now()
	return nil
}

// status judges a message without a command (NATS ADR-13 and ADR-37).
func (c *natsConn) status(status, description string) error {
	switch status {
	case "100": // the request is alive
		return ErrIdle
	case "404", "408": // none; the request is over
		c.pending = 0
		if time.Since(c.asked) < minPull {
			break // a server that ends every request at once must not make us spin
		}
		return ErrIdle
	case "503":
		c.pending = 0
		return c.consumerMissing("nobody answers for the host's queue")
	case "409":
		c.pending = 0
		if description == "Consumer Deleted" {
			return c.consumerMissing("the host's queue was deleted")
		}
	}
	return fmt.Errorf("asking for commands: server says %.20q %.200q", status, description)
}

func (c *natsConn) consumerMissing(text string) error {
	return &LinkError{
		StateConsumerMissing, "let the control plane enrol host " + c.host + "; consumer " + c.host + " on stream " + CommandStream + " is its own to make",
		errors.New("asking for commands: " + text),
	}
}

// Publish implements Conn.
func (c *natsConn) Publish(ctx context.Context, o Outgoing) (uint64, error) {
	msg := nats.NewMsg(o.Subject)
	msg.Header.Set(nats.MsgIdHdr, o.ID)
	if o.After > 0 {
		msg.Header.Set(nats.ExpectedLastSubjSeqHdr, strconv.FormatUint(o.After, 10))
	}
	msg.Data = o.Data
	answer, err := c.nc.RequestMsgWithContext(ctx, msg)
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return 0, &LinkError{StateStreamMissing, "let the control plane make stream " + EventStream, errors.New("publishing event: nobody stores it")}
	case errors.Is(err, nats.ErrMaxPayload):
		return 0, fmt.Errorf("publishing event: %w", ErrTooLarge)
	case err != nil:
		return 0, fmt.Errorf("publishing event: %w", err)
	}
	return parseStored(answer.Data)
}

// Error codes of a server that holds another last event than expected
// (nats-server, server/errors.json); the second is a cluster's.
const (
	codeWrongLast        = 10071
	codeWrongLastCluster = 10164
)

// parseStored judges a stream's answer to a publish.
func parseStored(data []byte) (uint64, error) {
	var ack struct {
		Stream   string `json:"stream"`
		Sequence uint64 `json:"seq"`
		Error    *struct {
			Code        int    `json:"err_code"`
			Description string `json:"description"`
		} `json:"error"`
	}
	if err := json.Unmarshal(data, &ack); err != nil {
		return 0, fmt.Errorf("publishing event: reading the answer: %w", err)
	}
	switch {
	case ack.Error != nil && (ack.Error.Code == codeWrongLast || ack.Error.Code == codeWrongLastCluster):
		return 0, fmt.Errorf("publishing event: %w", ErrOvertaken)
	case ack.Error != nil:
		return 0, fmt.Errorf("publishing event: not stored: %.200q", ack.Error.Description)
	case ack.Stream == "":
		return 0, errors.New("publishing event: not stored: no stream answered")
	}
	return ack.Sequence, nil
}

type natsMessage struct {
	c   *natsConn
	msg *nats.Msg
}

func (m *natsMessage) Data() []byte { return m.msg.Data }

func (m *natsMessage) Attempt() uint64 {
	if meta, err := m.msg.Metadata(); err == nil {
		return meta.NumDelivered
	}
	return 1
}

func (m *natsMessage) Ack(ctx context.Context) error {
	if _, err := m.c.nc.RequestWithContext(ctx, m.msg.Reply, []byte("+ACK")); err != nil {
		return fmt.Errorf("acknowledging command: %w", err)
	}
	return nil
}

func (m *natsMessage) Nak(_ context.Context, delay time.Duration) error {
	if err := m.c.nc.Publish(m.msg.Reply, fmt.Appendf(nil, `-NAK {"delay": %d}`, delay.Nanoseconds())); err != nil {
		return fmt.Errorf("refusing delivery of command: %w", err)
	}
	return nil
}
