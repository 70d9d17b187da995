package tenant

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// evidencePath is answered by the guest itself on every port of a workload.
const evidencePath = "/.well-known/evidence"

// attestTimeout bounds connection, handshake and evidence. An emulated guest
// needs seconds for a report.
const attestTimeout = time.Minute

// maxEvidenceHead bounds what a server may send around its evidence.
const maxEvidenceHead = 64 << 10

// HTTPClient returns a client whose every connection ends, verifiably, inside
// the deployment's guest at addr (host:port). After the TLS 1.3 handshake, and
// before the request, the guest must give evidence over a fresh nonce that
// holds and that binds this connection's key. The first verdict that fails is
// the error of the request.
func (t *Tenant) HTTPClient(name, addr string, o VerifyOptions) (*http.Client, error) {
	d, err := t.state.load(name)
	if err != nil {
		return nil, err
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, attestTimeout)
		defer cancel()
		return t.dialAttested(ctx, d, addr, o)
	}
	return &http.Client{Transport: &http.Transport{DialTLSContext: dial, IdleConnTimeout: 30 * time.Second}}, nil
}

// dialAttested connects and does not return before evidence was verified on
// the same connection. The certificate is the guest's own and proves nothing
// by itself; the comparison of its key with REPORT_DATA does.
func (t *Tenant) dialAttested(ctx context.Context, d *Deployment, addr string, o VerifyOptions) (_ net.Conn, err error) {
	dialer := tls.Dialer{Config: &tls.Config{
		ServerName: o.ServerName, MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"},
		InsecureSkipVerify: true, //nolint:gosec // the key is compared with the evidence below, which is stronger
	}}
	raw, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("connecting to the guest: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, raw.Close())
		}
	}()
	conn, ok := raw.(*tls.Conn)
	if !ok || len(conn.ConnectionState().PeerCertificates) == 0 {
		return nil, errors.New("connecting to the guest: no certificate")
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, fmt.Errorf("connecting to the guest: %w", err)
		}
	}
	nonce := make([]byte, 32)
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("making nonce: %w", err)
	}
	bundle, err := fetchEvidence(ctx, conn, addr, nonce)
	if err != nil {
		return nil, err
	}
	o.Nonce = hex.EncodeToString(nonce)
	o.spki = conn.ConnectionState().PeerCertificates[0].RawSubjectPublicKeyInfo
	v, err := t.judge(bundle, d, o)
	if err != nil {
		return nil, err
	}
	if err := v.refusal(); err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Time{})
}

// fetchEvidence asks for evidence and leaves the connection ready for the
// next request.
func fetchEvidence(ctx context.Context, conn net.Conn, host string, nonce []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+host+evidencePath+"?nonce="+hex.EncodeToString(nonce), nil)
	if err != nil {
		return nil, fmt.Errorf("requesting evidence: %w", err)
	}
	if err := req.Write(conn); err != nil {
		return nil, fmt.Errorf("requesting evidence: %w", err)
	}
	return readEvidence(conn, req)
}

// readEvidence reads the answer to req. The server may be anybody.
func readEvidence(r io.Reader, req *http.Request) ([]byte, error) {
	// http.ReadResponse has no limit of its own for what stands before a body.
	in := bufio.NewReader(io.LimitReader(r, contract.MaxEvidenceBytes+maxEvidenceHead))
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return nil, fmt.Errorf("reading evidence: %w", err)
	}
	defer resp.Body.Close() //nolint:errcheck // it is read to its end
	body, err := io.ReadAll(io.LimitReader(resp.Body, contract.MaxEvidenceBytes+1))
	if err != nil {
		return nil, fmt.Errorf("reading evidence: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, contract.Refuse(codeUnverified, "connect to a port of an attested guest", "the server gives no evidence, it answers %s", resp.Status)
	}
	if len(body) > contract.MaxEvidenceBytes || in.Buffered() > 0 || resp.Close {
		return nil, contract.Refuse(codeUnverified, "report this guest image", "the server's evidence is oversize, or it does not keep the connection")
	}
	return body, nil
}

// Address finds where the node publishes a port of the deployment: the
// profile's guest_host with the port from the platform, and the server name to
// ask for there, if it has one. Without guest_host a server name is where to
// connect to. port 0 means the only one. A wrong answer costs the connection
// and no more.
func (t *Tenant) Address(ctx context.Context, name string, port int) (addr, serverName string, err error) {
	if err := t.needControl(); err != nil {
		return "", "", err
	}
	d, err := t.launched(name)
	if err != nil {
		return "", "", err
	}
	if port == 0 {
		if len(d.Ports) != 1 {
			return "", "", Usage("deployment %q has %d ports; say which with --port", name, len(d.Ports))
		}
		port = d.Ports[0]
	}
	g, err := t.control.Guest(ctx, d.GuestID)
	if err != nil {
		return "", "", fmt.Errorf("asking for the guest: %w", err)
	}
	published, ok := g.Ports[uint32(port)]
	if !ok {
		return "", "", contract.Refuse("tenant.port-not-found", "wait until the guest has started, and use one of its --port values",
			"port %d of %q is not published", port, name)
	}
	serverName = g.ServerNames[uint32(port)]
	host := cmp.Or(t.profile.GuestHost, serverName)
	if host == "" {
		return "", "", Usage("the profile lacks guest_host; or give --address HOST:PORT")
	}
	return net.JoinHostPort(host, fmt.Sprint(published)), serverName, nil
}
