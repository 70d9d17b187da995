package control

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// maxCredsBytes bounds the credentials and CA files.
const maxCredsBytes = 64 << 10

// credentials are the host's identity. The seed leaves this package only as
// signatures.
type credentials struct {
	jwt     string
	seed    nkeys.KeyPair
	expires time.Time // zero: never
}

// readCreds reads a NATS credentials file. It holds a private key, so that
// anything beyond its owner's permission is refused, not repaired: whoever
// could read it may have done so already.
func readCreds(path string) (*credentials, error) {
	bad := func(remedy string, err error) error {
		return &LinkError{StateCredentials, remedy, fmt.Errorf("reading credentials file %s: %w", path, err)}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, bad("put the credentials of the enrolment there, owned by the agent's user, mode 0600", err)
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	if err != nil {
		return nil, bad("check the file system", err)
	}
	if !info.Mode().IsRegular() {
		return nil, bad("put the credentials of the enrolment there", errors.New("not a regular file"))
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return nil, bad(fmt.Sprintf("run chmod 0600 %s, and enrol the host again if others may have read it", path),
			fmt.Errorf("mode %04o lets others at the host's private key", perm))
	}
	const again = "enrol the host again and replace the file"
	data, err := io.ReadAll(io.LimitReader(f, maxCredsBytes))
	if err != nil {
		return nil, bad("check the file system", err)
	}
	token, err := jwt.ParseDecoratedJWT(data)
	if err != nil {
		return nil, bad(again, errors.New("no NATS user JWT in it"))
	}
	claims, err := jwt.DecodeUserClaims(token)
	if err != nil {
		return nil, bad(again, errors.New("the NATS user JWT does not verify"))
	}
	// The parser's error may quote the seed.
	seed, err := jwt.ParseDecoratedUserNKey(data)
	if err != nil {
		return nil, bad(again, errors.New("no NATS user seed in it"))
	}
	if pub, err := seed.PublicKey(); err != nil || pub != claims.Subject {
		return nil, bad(again, errors.New("JWT and seed are of different users"))
	}
	c := &credentials{jwt: token, seed: seed}
	if claims.Expires > 0 {
		c.expires = time.Unix(claims.Expires, 0)
	}
	return c, nil
}

// readCA reads the only roots the link believes.
func readCA(path string) (*x509.CertPool, error) {
	const remedy = "put the PEM of the CA given at enrolment there"
	info, err := os.Stat(path)
	if err == nil && info.Size() > maxCredsBytes {
		err = fmt.Errorf("it has %d bytes, limit is %d", info.Size(), maxCredsBytes)
	}
	if err != nil {
		return nil, &LinkError{StateCredentials, remedy, fmt.Errorf("reading CA file %s: %w", path, err)}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, &LinkError{StateCredentials, remedy, fmt.Errorf("reading CA file %s: %w", path, err)}
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, &LinkError{StateCredentials, remedy, fmt.Errorf("reading CA file %s: no certificate in it", path)}
	}
	return pool, nil
}
