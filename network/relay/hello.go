package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// maxHello bounds what is read of a client before it has named a guest:
// one ClientHello of 16 KiB (RFC 8446 section 5.1: a record), and the records'
// heads when a client cuts it small.
const maxHello = 16<<10 + 1024

// TLS alerts (RFC 8446 section 6) as whole records, sent where a client is
// told why it is refused.
var (
	alertUnrecognizedName = []byte{21, 3, 3, 0, 2, 2, 112}
	alertInternalError    = []byte{21, 3, 3, 0, 2, 2, 80}
)

// errNoTLS is a client that sent something else than a ClientHello.
var errNoTLS = errors.New("no TLS ClientHello")

// hello reads a ClientHello of at most maxHello bytes and returns the server
// name in lower case, "" when there is none, and every byte that was read. It
// answers nothing.
func hello(ctx context.Context, client io.Reader) (name string, read []byte, err error) {
	recorder := &recorder{from: client, left: maxHello}
	named := errors.New("the name is known")
	server := tls.Server(recorder, &tls.Config{GetConfigForClient: func(info *tls.ClientHelloInfo) (*tls.Config, error) {
		name = strings.ToLower(info.ServerName)
		return nil, named
	}})
	switch err := server.HandshakeContext(ctx); {
	case errors.Is(err, named):
		return name, recorder.read.Bytes(), nil
	case recorder.err != nil:
		return "", nil, recorder.err
	default:
		return "", nil, fmt.Errorf("%w: %w", errNoTLS, err)
	}
}

// recorder is a connection that only reads, and remembers what.
type recorder struct {
	from io.Reader
	left int
	read bytes.Buffer
	err  error
}

// Read stops at the limit. crypto/tls reads no further than the ClientHello
// but may read ahead within what has arrived, so all of it is remembered.
func (r *recorder) Read(p []byte) (int, error) {
	if r.left == 0 {
		r.err = fmt.Errorf("%w: more than %d bytes", errNoTLS, maxHello)
		return 0, r.err
	}
	n, err := r.from.Read(p[:min(len(p), r.left)])
	r.left -= n
	r.read.Write(p[:n])
	if err != nil {
		r.err = err
	}
	return n, err
}

// Write swallows the alert that crypto/tls would send.
func (r *recorder) Write(p []byte) (int, error) { return len(p), nil }

// The rest of net.Conn; deadlines are set on the client itself.
func (*recorder) Close() error                     { return nil }
func (*recorder) LocalAddr() net.Addr              { return nil }
func (*recorder) RemoteAddr() net.Addr             { return nil }
func (*recorder) SetDeadline(time.Time) error      { return nil }
func (*recorder) SetReadDeadline(time.Time) error  { return nil }
func (*recorder) SetWriteDeadline(time.Time) error { return nil }
