// Package brokeradmin is how a tenant drives its key broker: the wire types
// of the broker's admin API and a small client for it.
//
// It owns no state. What passes through here are the tenant's own keys, so
// nothing in it is ever logged, and errors never carry a resource's value.
// A Client is safe for concurrent use.
//
// # Wire
//
// All paths are below /admin/v1, need "Authorization: Bearer TOKEN" and answer
// refusals with a JSON body that holds contract.Refusal's code, message and
// remedy.
//
//	PUT    /launches/{launch_id}                           Launch       -> 204
//	GET    /launches/{launch_id}                           -> Status
//	DELETE /launches/{launch_id}                           -> 204
//	PUT    /launches/{launch_id}/resources/{r}/{type}/{tag} raw bytes   -> 204
//	DELETE /launches/{launch_id}/resources/{r}/{type}/{tag}             -> 204
//
// Registering a launch again replaces policy and resources and keeps the
// count of releases; its manifest may not change.
package brokeradmin

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Limits of the admin API.
const (
	// PathPrefix is where the API lives.
	PathPrefix = "/admin/v1/"
	// MaxLaunchBytes bounds a registration, its resources included.
	MaxLaunchBytes = 4 << 20
	// MaxResourceBytes bounds one resource.
	MaxResourceBytes = 64 << 10
	// MaxResources bounds the resources of one launch.
	MaxResources = 256
	// MaxReleases bounds how often one launch may get its keys.
	MaxReleases = 1000
)

// ErrUnreachable means no answer came from the broker.
var ErrUnreachable = errors.New("key broker is not reachable")

// Launch is what the tenant demands of the guest that may have its keys.
type Launch struct {
	// LaunchDigests are the accepted MEASUREMENTs, 96 hex digits each, 1 to 16.
	LaunchDigests []string `json:"launch_digests"`
	// Manifest is the canonical manifest; its SHA-256 is the HOST_DATA
	// demanded and its launch_id must be the one in the path.
	Manifest []byte `json:"manifest"`
	// Image is the tenant's own copy of the guest image's description.
	Image *contract.ImageDescription `json:"image"`
	// Releases is how often the keys may be released; 0 means 1.
	Releases int `json:"releases,omitempty"`
	// TCBFloor is combined with the manifest's, the higher component wins.
	TCBFloor *contract.TCB `json:"tcb_floor,omitempty"`
	// ChipIDs, 128 hex digits each, limit the launch to these processors;
	// empty means any.
	ChipIDs []string `json:"chip_ids,omitempty"`
	// GPUPDIs, 16 hex digits each, limit the launch to these GPUs; empty means
	// any of the model and count that the manifest asks for.
	GPUPDIs []string `json:"gpu_pdis,omitempty"`
	// AppraisalPolicy is what else platform and launch have to be.
	AppraisalPolicy *AppraisalPolicy `json:"appraisal_policy,omitempty"`
	// Resources maps repository/type/tag to the secret.
	Resources map[string][]byte `json:"resources,omitempty"`
}

// Status is what the broker knows of a launch.
type Status struct {
	LaunchID string `json:"launch_id"`
	HostData string `json:"host_data"`
	// Releases were made, MaxReleases are allowed.
	Releases    []Release `json:"releases"`
	MaxReleases int       `json:"max_releases"`
	// Refusals are the latest 32, oldest first; RefusalCount is of all.
	Refusals     []RefusalEntry `json:"refusals"`
	RefusalCount int            `json:"refusal_count"`
	// Resources are the names of what is registered.
	Resources []string `json:"resources"`
}

// Release is one successful attestation.
type Release struct {
	At          time.Time `json:"at"`
	ChipID      string    `json:"chip_id"`
	Measurement string    `json:"measurement"`
	// GPUs are those whose evidence was judged.
	GPUs []contract.AttestedGPU `json:"gpus,omitempty"`
	// Emulated is true when the report, or that of a GPU, chained to an
	// emulated root.
	Emulated bool `json:"emulated"`
}

// RefusalEntry is one refused request. Who sent it is not known: a host may
// cause any number of them.
type RefusalEntry struct {
	At      time.Time        `json:"at"`
	Refusal contract.Refusal `json:"refusal"`
}

// ErrorBody is the body of every refusal, of the admin API and of the guest's.
// Type and Detail are what the CoCo protocol names; the rest is ours.
type ErrorBody struct {
	Type    string `json:"type"`
	Detail  string `json:"detail"`
	Code    string `json:"code"`
	Message string `json:"message"`
	Remedy  string `json:"remedy"`
}

// Client talks to one broker.
type Client struct {
	base  string
	token string
	http  *http.Client
}

// NewClient returns a client for the broker at rawURL, pinned to the CA in
// caPEM, TLS 1.3 only.
func NewClient(rawURL string, caPEM []byte, token string) (*Client, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("key broker url %q is not https://host[:port]", rawURL)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(caPEM) {
		return nil, errors.New("key broker CA holds no PEM certificate")
	}
	transport := &http.Transport{
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool},
		ForceAttemptHTTP2:     false,
		ResponseHeaderTimeout: 30 * time.Second,
		IdleConnTimeout:       30 * time.Second,
	}
	return &Client{strings.TrimSuffix(rawURL, "/") + PathPrefix, token, &http.Client{
		Transport: transport, Timeout: time.Minute,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// PutLaunch registers or updates a launch.
func (c *Client) PutLaunch(ctx context.Context, launchID string, l *Launch) error {
	body, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("encoding launch registration: %w", err)
	}
	_, err = c.do(ctx, http.MethodPut, "launches/"+url.PathEscape(launchID), body)
	return err
}

// Launch returns what the broker knows of a launch.
func (c *Client) Launch(ctx context.Context, launchID string) (*Status, error) {
	body, err := c.do(ctx, http.MethodGet, "launches/"+url.PathEscape(launchID), nil)
	if err != nil {
		return nil, err
	}
	var s Status
	if err := json.Unmarshal(body, &s); err != nil {
		return nil, fmt.Errorf("decoding launch status: %w", err)
	}
	return &s, nil
}

// DeleteLaunch forgets a launch and its resources; nothing is released to it
// any more.
func (c *Client) DeleteLaunch(ctx context.Context, launchID string) error {
	_, err := c.do(ctx, http.MethodDelete, "launches/"+url.PathEscape(launchID), nil)
	return err
}

// PutResource sets one resource of a launch.
func (c *Client) PutResource(ctx context.Context, launchID string, r contract.Resource, value []byte) error {
	_, err := c.do(ctx, http.MethodPut, "launches/"+url.PathEscape(launchID)+"/resources/"+r.Path(), value)
	return err
}

// DeleteResource withdraws one resource of a launch.
func (c *Client) DeleteResource(ctx context.Context, launchID string, r contract.Resource) error {
	_, err := c.do(ctx, http.MethodDelete, "launches/"+url.PathEscape(launchID)+"/resources/"+r.Path(), nil)
	return err
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("building key broker request: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer resp.Body.Close() //nolint:errcheck // the body was read or is of no use
	out, err := io.ReadAll(io.LimitReader(resp.Body, MaxLaunchBytes+1))
	if err != nil {
		return nil, fmt.Errorf("%w: reading answer: %w", ErrUnreachable, err)
	}
	if len(out) > MaxLaunchBytes {
		return nil, fmt.Errorf("reading the key broker's answer: it has more than %d bytes", MaxLaunchBytes)
	}
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		return out, nil
	}
	var refused ErrorBody
	if err := json.Unmarshal(out, &refused); err != nil || refused.Code == "" {
		switch resp.StatusCode {
		case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout: // of what stands before it
			return nil, fmt.Errorf("%w: %s", ErrUnreachable, resp.Status)
		}
		return nil, fmt.Errorf("key broker answered %s", resp.Status)
	}
	return nil, &contract.Refusal{Code: refused.Code, Message: refused.Message, Remedy: refused.Remedy}
}
