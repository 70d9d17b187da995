// Package metadata is the guest's side of the host's metadata service. What it
// fetches are hints from a party that is not trusted; what it sends is public
// or sealed. A Client is safe for concurrent use.
package metadata

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Limits of what the host may send.
const (
	maxNetwork   = 64 << 10
	maxChallenge = 4 << 10
	maxHints     = 256 << 10
)

// pollSlack is what a challenge poll may take beyond its time.
const pollSlack = 20 * time.Second

// ErrRefused means that the service said no, and would say it again.
var ErrRefused = errors.New("metadata service refused")

// Client of one service.
type Client struct {
	base string
	http *http.Client
}

// New returns a client of the service on the host's end of the interface.
func New(device string) *Client {
	host := net.JoinHostPort(contract.MetadataAddr+"%25"+device, fmt.Sprint(contract.MetadataPort))
	return At("http://" + host)
}

// At returns a client of a service elsewhere.
func At(base string) *Client {
	return &Client{base: base, http: &http.Client{
		Transport: &http.Transport{
			DialContext:            (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
			MaxResponseHeaderBytes: 16 << 10,
			IdleConnTimeout:        30 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Manifest fetches the manifest's bytes. The caller compares them with
// HOST_DATA.
func (c *Client) Manifest(ctx context.Context) ([]byte, error) {
	_, data, err := c.do(ctx, http.MethodGet, contract.PathManifest, nil, contract.MaxManifestBytes)
	return data, err
}

// Network fetches the addresses the host suggests.
func (c *Client) Network(ctx context.Context) (contract.NetworkFacts, error) {
	return hint[contract.NetworkFacts](ctx, c, contract.PathNetwork, maxNetwork)
}

// Endorsements fetches the certificates behind the guest's reports.
func (c *Client) Endorsements(ctx context.Context) (contract.Endorsements, error) {
	return hint[contract.Endorsements](ctx, c, contract.PathEndorsements, maxHints)
}

// Boot fetches what the host says it started.
func (c *Client) Boot(ctx context.Context) (contract.BootComponents, error) {
	return hint[contract.BootComponents](ctx, c, contract.PathBoot, contract.MaxEvidenceBytes)
}

// hint decodes leniently: a newer node may say more, and nothing depends on it.
func hint[T any](ctx context.Context, c *Client, path string, limit int64) (T, error) {
	var v T
	_, data, err := c.do(ctx, http.MethodGet, path, nil, limit)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return v, fmt.Errorf("decoding %s: %w", path, err)
	}
	return v, nil
}

// Challenge waits for a verifier's challenge; false when none came in time.
func (c *Client) Challenge(ctx context.Context) (contract.Challenge, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, contract.ChallengePollSeconds*time.Second+pollSlack)
	defer cancel()
	var ch contract.Challenge
	status, data, err := c.do(ctx, http.MethodGet, contract.PathChallenge, nil, maxChallenge)
	if err != nil || status == http.StatusNoContent {
		return ch, false, err
	}
	if err := json.Unmarshal(data, &ch); err != nil {
		return ch, false, fmt.Errorf("decoding challenge: %w", err)
	}
	if len(ch.Nonce) < contract.MinNonceBytes || len(ch.Nonce) > contract.MaxNonceBytes {
		return ch, false, fmt.Errorf("decoding challenge: nonce has %d bytes", len(ch.Nonce))
	}
	return ch, true, nil
}

// Evidence answers a challenge.
func (c *Client) Evidence(ctx context.Context, id string, evidence []byte) error {
	_, _, err := c.do(ctx, http.MethodPost, contract.PathEvidence+"?id="+url.QueryEscape(id), bytes.NewReader(evidence), maxChallenge)
	return err
}

// Status tells the host how far the guest is.
func (c *Client) Status(ctx context.Context, s contract.GuestStatus) error {
	text, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encoding status: %w", err)
	}
	_, _, err = c.do(ctx, http.MethodPost, contract.PathStatus, bytes.NewReader(text), maxChallenge)
	return err
}

// PutResult streams one sealed result.
func (c *Client) PutResult(ctx context.Context, name string, r io.Reader) error {
	_, _, err := c.do(ctx, http.MethodPut, contract.PathResults+url.PathEscape(name), r, maxChallenge)
	return err
}

// PutResultManifest sends the signed list, which ends the results.
func (c *Client) PutResultManifest(ctx context.Context, signed []byte) error {
	_, _, err := c.do(ctx, http.MethodPut, contract.PathResultManifest, bytes.NewReader(signed), maxChallenge)
	return err
}

func (c *Client) do(ctx context.Context, method, path string, body io.Reader, limit int64) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return 0, nil, fmt.Errorf("asking metadata: %w", err)
	}
	req.Header.Set(contract.MetadataHeader, contract.MetadataToken)
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil, fmt.Errorf("asking metadata for %s: %w", path, err)
	}
	defer resp.Body.Close() //nolint:errcheck // only read from
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return 0, nil, fmt.Errorf("reading metadata's %s: %w", path, err)
	}
	if int64(len(data)) > limit {
		return 0, nil, fmt.Errorf("reading metadata's %s: more than %d bytes", path, limit)
	}
	switch class := resp.StatusCode / 100; {
	case class == 2:
		return resp.StatusCode, data, nil
	case class == 5 || resp.StatusCode == http.StatusTooManyRequests:
		return resp.StatusCode, nil, fmt.Errorf("metadata service is not ready: %s %s: %s", method, path, resp.Status)
	}
	return resp.StatusCode, nil, &refusedError{fmt.Sprintf("%s %s: %s", method, path, resp.Status), reason(data)}
}

// refusedError is an ErrRefused with the host's own reason, which is shown and
// never branched on.
type refusedError struct{ what, why string }

func (e *refusedError) Error() string {
	return fmt.Sprintf("%v: %s: %s", ErrRefused, e.what, e.why)
}

func (*refusedError) Is(target error) bool { return target == ErrRefused }

// Reason is what the host says, or empty.
func (e *refusedError) Reason() string { return e.why }

// maxReason bounds what is told of the host's reason.
const maxReason = 512

func reason(data []byte) string {
	var r contract.Refusal
	if json.Unmarshal(data, &r) != nil || r.Code == "" {
		return ""
	}
	text := r.Code + ": " + r.Message
	return strings.ToValidUTF8(text[:min(len(text), maxReason)], "")
}
