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

// CodeAnswer is the code of an answer that no key broker gives.
const CodeAnswer = "guest.broker-answer"

var (
	// errLater: the broker, or what stands before it, does not answer now.
	errLater = errors.New("the broker may answer later")
	// errUncounted: an answer to the challenge that cost no release, so that
	// a new challenge may be asked for.
	errUncounted = errors.New("the broker has counted nothing")
)

// Client of one broker, for one launch.
type Client struct {
	base  string
	http  *http.Client
	key   *ecdsa.PrivateKey
	token string
	pause time.Duration // before another try
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
	return &Client{base: strings.TrimSuffix(url, "/") + "/kbs/v0/", key: key, pause: retryPause, http: &http.Client{
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
// until ctx ends. But an answer is sent once, because the broker counts: there
// is a second challenge only when it is certain that the first counted nothing,
// for instance because the broker was restarted between the two.
func (c *Client) Attest(ctx context.Context, gpus GPUs, evidence Evidence) error {
	for {
		err := c.exchange(ctx, gpus, evidence)
		if !errors.Is(err, errUncounted) || !c.rest(ctx) {
			return err
		}
	}
}

// GPUs makes the evidence of the guest's GPUs, given what the report data were
// without it; nothing when the guest has none.
type GPUs = func(context.Context, [contract.ReportDataSize]byte) ([]byte, error)

// NoGPUs is that of a guest without any.
func NoGPUs(context.Context, [contract.ReportDataSize]byte) ([]byte, error) { return nil, nil }

// Evidence makes evidence over report data.
type Evidence = func(context.Context, [contract.ReportDataSize]byte) (contract.BrokerEvidence, error)

func (c *Client) exchange(ctx context.Context, gpus GPUs, evidence Evidence) error {
	key, err := c.jwk()
	if err != nil {
		return err
	}
	var challenge struct {
		Nonce string `json:"nonce"`
	}
	var answer []byte
	if err := c.retry(ctx, func() (err error) {
		answer, err = c.post(ctx, "auth", map[string]any{"version": protocolVersion, "tee": teeSNP, "extra-params": ""})
		return err
	}); err != nil {
		return fmt.Errorf("asking for a challenge: %w", err)
	}
	if err := json.Unmarshal(answer, &challenge); err != nil {
		return noAnswer("its challenge cannot be read", err)
	}
	data, err := contract.BrokerReportData("", challenge.Nonce, key)
	if err != nil {
		return noAnswer("its challenge cannot be read", err)
	}
	additional, err := gpus(ctx, data)
	if err != nil {
		return err
	}
	if data, err = contract.BrokerReportData(string(additional), challenge.Nonce, key); err != nil {
		return err
	}
	e, err := evidence(ctx, data)
	if err != nil {
		return err
	}
	answer, err = c.post(ctx, "attest", map[string]any{
		"init-data":    nil,
		"runtime-data": map[string]any{"nonce": challenge.Nonce, "tee-pubkey": key},
		"tee-evidence": map[string]any{"primary_evidence": e, "additional_evidence": string(additional)},
	})
	if err != nil {
		return fmt.Errorf("attesting: %w", err)
	}
	var token struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(answer, &token); err != nil || token.Token == "" {
		return noAnswer("it holds no token", err)
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
		return nil, noAnswer("it is no encrypted resource", fmt.Errorf("reading resource %s: %w", r, err))
	}
	secret, err := obj.Decrypt(c.key)
	if err != nil {
		return nil, noAnswer("its resource is not encrypted to this guest", fmt.Errorf("opening resource %s: %w", r, err))
	}
	return secret, nil
}

// noAnswer refuses an answer that no key broker gives.
func noAnswer(what string, cause error) error {
	return contract.Refuse(CodeAnswer, "check that the manifest's broker URL is the key broker's own", "the key broker's answer is none: %s", what).Because(cause)
}

// retry repeats what may be asked twice and failed because nobody answered.
func (c *Client) retry(ctx context.Context, do func() error) error {
	for {
		err := do()
		if err == nil || !mayPass(err) || !c.rest(ctx) {
			return err
		}
	}
}

// mayPass tells a broker that is down, slow or restarted from one that says no
// and from one that is another's.
func mayPass(err error) bool {
	var op *net.OpError
	var timeout net.Error
	return errors.Is(err, errLater) || errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		(errors.As(err, &timeout) && timeout.Timeout())
}

// rest waits, and reports whether it is worth another try.
func (c *Client) rest(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(c.pause):
		return true
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
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return nil, fmt.Errorf("asking broker: %w: %w", errUncounted, err)
	}
	if err != nil {
		return nil, fmt.Errorf("asking broker: %w", err)
	}
	defer resp.Body.Close() //nolint:errcheck // only read from
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("reading broker's answer: %w", err)
	}
	if int64(len(data)) > limit {
		return nil, noAnswer(fmt.Sprintf("it has more than %d bytes", limit), nil)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, refusal(resp.StatusCode, data)
	}
	return data, nil
}

// refusal carries the broker's own reason, which is the tenant's own word, and
// why it may be worth another try, if it is.
func refusal(status int, data []byte) error {
	refused, code := brokersWords(status, data)
	switch {
	case code == "broker.session-unknown", code == "broker.session-expired":
		return refused.Because(errUncounted)
	case code == "broker.rate-limited", status == http.StatusServiceUnavailable && strings.HasPrefix(code, "broker."):
		return refused.Because(errors.Join(errUncounted, errLater))
	case status == http.StatusTooManyRequests, status == http.StatusBadGateway, status == http.StatusServiceUnavailable, status == http.StatusGatewayTimeout:
		return refused.Because(errLater)
	}
	return refused
}

func brokersWords(status int, data []byte) (_ *contract.Refusal, code string) {
	var r struct {
		Type    string `json:"type"`
		Detail  string `json:"detail"`
		Code    string `json:"code"`
		Message string `json:"message"`
		Remedy  string `json:"remedy"`
	}
	if err := json.Unmarshal(data, &r); err != nil || (r.Message == "" && r.Detail == "") {
		return contract.Refuse(CodeRefused, "look at the key broker's log", "the key broker refused with status %d", status), ""
	}
	if r.Message == "" { // another implementation's error body
		r.Message, r.Code = r.Detail, r.Type
	}
	if r.Remedy == "" {
		r.Remedy = "look at the key broker's log"
	}
	return contract.Refuse(CodeRefused, shorten(r.Remedy, maxRemedy), "the key broker refused: %s (%s)", shorten(r.Message, maxMessage), shorten(r.Code, maxCode)), r.Code
}

func shorten(s string, limit int) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) > limit {
		return strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}
