// Package broker is the guest's side of the tenant's key broker: CoCo KBS RCAR
// (protocol 0.4.0; auth, attest, resource) over TLS pinned by the manifest.
// The key that resources are encrypted to is made here and never leaves. A
// Client is for one goroutine.
package broker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/confidential-node/agent/firmware/contract"
)

// The protocol, as the broker checks it.
const (
	protocolVersion = "0.4.0"
	teeSNP          = "snp"
	keyAlgorithm    = jose.ECDH_ES_A256KW
	contentCipher   = jose.A256GCM
)

// Limits of what the broker may send.
const (
	maxAnswer   = 64 << 10
	maxResource = 1 << 20
	// A status has 4 KiB, and JSON may take six bytes for one.
	maxMessage = 300
	maxCode    = 100
	maxRemedy  = 200
)

// retryPause is waited before a broker that cannot be reached is tried again.
const retryPause = time.Second

// CodeRefused is the code of every refusal by the broker; its own code and
// words are in the message.
const CodeRefused = "guest.broker-refused"

// Client of one broker, for one launch.
type Client struct {
	base  string
	http  *http.Client
	key   *ecdsa.PrivateKey
	token string
}

// New makes a client with a fresh key.
func New(url string, transport http.RoundTripper) (*Client, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making broker key: %w", err)
	}
	jar, err := cookiejar.New(nil)
	if err != nil {
		return nil, fmt.Errorf("making cookie jar: %w", err)
	}
	return &Client{base: strings.TrimSuffix(url, "/") + "/kbs/v0/", key: key, http: &http.Client{
		Transport: transport, Jar: jar, Timeout: time.Minute,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// jwk is the public key as the broker reads it, no field more.
func (c *Client) jwk() (json.RawMessage, error) {
	point, err := c.key.PublicKey.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encoding broker key: %w", err)
	}
	const coordinate = 32
	encode := base64.RawURLEncoding.EncodeToString
	return contract.Canonical(map[string]string{
		"kty": "EC", "crv": "P-256", "alg": string(keyAlgorithm),
		"x": encode(point[1 : 1+coordinate]), "y": encode(point[1+coordinate:]),
	})
}

// Attest proves the guest to the broker: its challenge is answered with what
// evidence makes of the report data. A broker that cannot be reached is tried
// until ctx ends; but the answer is sent once, because the broker counts.
func (c *Client) Attest(ctx context.Context, evidence func(context.Context, [contract.ReportDataSize]byte) (contract.BrokerEvidence, error)) error {
	key, err := c.jwk()
	if err != nil {
		return err
	}
	var challenge struct {
		Nonce string `json:"nonce"`
	}
	if err := c.retry(ctx, func() error {
		answer, err := c.post(ctx, "auth", map[string]any{"version": protocolVersion, "tee": teeSNP, "extra-params": ""})
		if err != nil {
			return err
		}
		return json.Unmarshal(answer, &challenge)
	}); err != nil {
		return fmt.Errorf("asking for a challenge: %w", err)
	}
	data, err := contract.BrokerReportData("", challenge.Nonce, key)
	if err != nil {
		return err
	}
	e, err := evidence(ctx, data)
	if err != nil {
		return err
	}
	answer, err := c.post(ctx, "attest", map[string]any{
		"init-data":    nil,
		"runtime-data": map[string]any{"nonce": challenge.Nonce, "tee-pubkey": key},
		"tee-evidence": map[string]any{"primary_evidence": e, "additional_evidence": ""},
	})
	if err != nil {
		return fmt.Errorf("attesting: %w", err)
	}
	var token struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(answer, &token); err != nil || token.Token == "" {
		return errors.New("attesting: the broker's answer holds no token")
	}
	c.token = token.Token
	return nil
}

// Resource fetches and opens one secret. The caller wipes it.
func (c *Client) Resource(ctx context.Context, r contract.Resource) ([]byte, error) {
	var sealed []byte
	if err := c.retry(ctx, func() (err error) {
		sealed, err = c.do(ctx, http.MethodGet, "resource/"+r.Path(), nil, maxResource)
		return err
	}); err != nil {
		return nil, fmt.Errorf("fetching resource %s: %w", r, err)
	}
	obj, err := jose.ParseEncryptedJSON(string(sealed), []jose.KeyAlgorithm{keyAlgorithm}, []jose.ContentEncryption{contentCipher})
	if err != nil {
		return nil, fmt.Errorf("reading resource %s: %w", r, err)
	}
	secret, err := obj.Decrypt(c.key)
	if err != nil {
		return nil, fmt.Errorf("opening resource %s: %w", r, err)
	}
	return secret, nil
}

// retry repeats what failed because nobody answered.
func (c *Client) retry(ctx context.Context, do func() error) error {
	for {
		err := do()
		var dial *net.OpError
		if err == nil || !errors.As(err, &dial) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryPause):
		}
	}
}

func (c *Client) post(ctx context.Context, path string, body any) ([]byte, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encoding request: %w", err)
	}
	return c.do(ctx, http.MethodPost, path, text, maxAnswer)
}

func (c *Client) do(ctx context.Context, method, path string, body []byte, limit int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("asking broker: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking broker: %w", err)
	}
	defer resp.Body.Close() //nolint:errcheck // only read from
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("reading broker's answer: %w", err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("reading broker's answer: more than %d bytes", limit)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, refusal(resp.StatusCode, data)
	}
	return data, nil
}

// refusal carries the broker's own reason, which is the tenant's own word.
func refusal(status int, data []byte) error {
	var r struct {
		Type    string `json:"type"`
		Detail  string `json:"detail"`
		Code    string `json:"code"`
		Message string `json:"message"`
		Remedy  string `json:"remedy"`
	}
	if err := json.Unmarshal(data, &r); err != nil || (r.Message == "" && r.Detail == "") {
		return contract.Refuse(CodeRefused, "look at the key broker's log", "the key broker refused with status %d", status)
	}
	if r.Message == "" { // another implementation's error body
		r.Message, r.Code = r.Detail, r.Type
	}
	if r.Remedy == "" {
		r.Remedy = "look at the key broker's log"
	}
	return contract.Refuse(CodeRefused, shorten(r.Remedy, maxRemedy), "the key broker refused: %s (%s)", shorten(r.Message, maxMessage), shorten(r.Code, maxCode))
}

func shorten(s string, limit int) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) > limit {
		return strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}
