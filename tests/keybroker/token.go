package keybroker

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/renameio/v2"

	"github.com/confidential-node/agent/firmware/contract"
)

// claims of an attestation token. tee-pubkey is the key resources are
// encrypted to, launch_id the only launch they come from.
type claims struct {
	jwt.Claims
	JWK       jose.JSONWebKey `json:"jwk"`
	TEEPubKey json.RawMessage `json:"tee-pubkey"`
	LaunchID  string          `json:"launch_id"`
}

// loadTokenKey reads the signing key, or makes one on first use. It is kept so
// that a guest that has spent its release can still fetch its resources with
// its token after a restart of the broker.
func loadTokenKey(dir string) (*ecdsa.PrivateKey, error) {
	path := filepath.Join(dir, "token.key")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeTokenKey(path)
	}
	if err != nil {
		return nil, fmt.Errorf("reading token key: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("reading token key: %s is not PEM", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading token key: %w", err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, fmt.Errorf("reading token key: %s is not an EC P-256 key", path)
	}
	return ec, nil
}

func makeTokenKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making token key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding token key: %w", err)
	}
	data := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := renameio.WriteFile(path, data, 0o600, renameio.WithTempDir(filepath.Dir(path))); err != nil {
		return nil, fmt.Errorf("writing token key: %w", err)
	}
	return key, nil
}

// signToken issues the token of one attestation.
func (s *Server) signToken(launchID string, teePubKey json.RawMessage, now time.Time) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: s.tokenKey}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("preparing token signer: %w", err)
	}
	token, err := jwt.Signed(signer).Claims(claims{
		Claims: jwt.Claims{
			Issuer: s.cfg.Issuer, IssuedAt: jwt.NewNumericDate(now),
			NotBefore: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(s.cfg.TokenTTL)),
		},
		JWK:       jose.JSONWebKey{Key: s.tokenKey.Public(), Algorithm: string(jose.ES256), Use: "sig"},
		TEEPubKey: teePubKey, LaunchID: launchID,
	}).Serialize()
	if err != nil {
		return "", fmt.Errorf("signing token: %w", err)
	}
	return token, nil
}

// openToken verifies a bearer token under the broker's own key; the key inside
// the token is information for others.
func (s *Server) openToken(token string, now time.Time) (*grant, *contract.Refusal) {
	bad := func(err error) *contract.Refusal {
		return contract.Refuse("broker.token-invalid", sessionRemedy, "the bearer token is not a valid token of this broker").Because(err)
	}
	if len(token) > 8<<10 {
		return nil, bad(nil)
	}
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, bad(err)
	}
	var c claims
	if err := parsed.Claims(s.tokenKey.Public(), &c); err != nil {
		return nil, bad(err)
	}
	if err := c.ValidateWithLeeway(jwt.Expected{Issuer: s.cfg.Issuer, Time: now}, 0); err != nil {
		return nil, contract.Refuse("broker.token-expired", sessionRemedy, "the bearer token is not valid now").Because(err)
	}
	key, err := parseKey(c.TEEPubKey)
	if err != nil || c.Expiry == nil {
		return nil, bad(err)
	}
	return &grant{launchID: c.LaunchID, key: key}, nil
}
