package contract

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Limits of a manifest. They are far above what jobs need and far below what
// would hurt a guest that parses one before it trusts anybody.
const (
	ManifestVersion  = 1
	MaxManifestBytes = 64 << 10
	MaxInputs        = 16 // virtio-blk devices per guest, see design section 5
	MaxResults       = 16
	MaxPorts         = 16
	MaxEnv           = 256
	MaxArgs          = 256
	// MaxInputBytes bounds one sealed input. Larger ones do not fit the
	// memory of any guest the node can start.
	MaxInputBytes = 8 << 40
)

// FormatAge is the only sealed format: age v1 (age-encryption.org/v1).
const FormatAge = "age"

// Manifest is written by the tenant and names everything a guest may do. Its
// canonical bytes' SHA-256 is HOST_DATA of the launch, so the host can swap
// nothing in it. Public values only: whoever hosts the guest reads it.
type Manifest struct {
	// Version is ManifestVersion.
	Version int `json:"version"`
	// LaunchID is 32 lower-case hex digits, random per launch. The broker
	// counts key releases by it.
	LaunchID string `json:"launch_id"`
	// Image is the workload, host[:port]/repository@sha256:digest. Never a tag.
	Image string `json:"image"`
	// Command replaces the image's entrypoint and arguments; empty keeps them.
	Command []string `json:"command,omitempty"`
	// Env is added to the image's environment. Not secret.
	Env map[string]string `json:"env,omitempty"`
	// SecretEnv maps a variable to the broker resource that holds its value.
	SecretEnv map[string]string `json:"secret_env,omitempty"`
	// Inputs are the sealed files the workload finds under /inputs.
	Inputs []Input `json:"inputs,omitempty"`
	// Results are the files the workload may leave under /results. Anything
	// else there is lost.
	Results []Result `json:"results,omitempty"`
	// Ports are served by the guest behind attested TLS 1.3 and forwarded to
	// the same TCP port of the workload's loopback.
	Ports []int `json:"ports,omitempty"`
	// Broker is the tenant's key broker.
	Broker Endpoint `json:"broker"`
	// Registry serves Image; its URL's host must be the reference's.
	Registry Endpoint `json:"registry"`
	// GPU is absent when the job needs none.
	GPU *GPU `json:"gpu,omitempty"`
	// TCBFloor is the lowest platform TCB the tenant accepts; absent leaves
	// the choice to the broker's policy.
	TCBFloor *TCB `json:"tcb_floor,omitempty"`
	// Compliance names a profile ("hipaa"); empty means none.
	Compliance string `json:"compliance,omitempty"`
}

// Input is one sealed file.
type Input struct {
	// Name is the file's name under /inputs: letters, digits, dot, dash,
	// underscore; not starting with a dot.
	Name string `json:"name"`
	// SHA256 is the digest of the ciphertext, 64 lower-case hex digits.
	SHA256 string `json:"sha256"`
	// Size is the exact size of the ciphertext in bytes. The block device that
	// carries it is padded to sectors; the guest reads only Size.
	Size int64 `json:"size"`
	// Format is FormatAge.
	Format string `json:"format"`
	// Key is the broker resource holding the age identity (or 32 raw key
	// bytes) that opens it: kbs:///repository/type/tag.
	Key string `json:"key"`
}

// Result is one file the workload may produce.
type Result struct {
	// Name is the file's name under /results, same alphabet as Input.Name.
	Name string `json:"name"`
	// Recipients are the age recipients the guest seals it to; at least one.
	Recipients []string `json:"recipients"`
}

// Endpoint is a TLS server the guest talks to. Exactly one of CAPEM and
// SPKISHA256 pins it; the system's roots are never used.
type Endpoint struct {
	// URL is https://host[:port] without path, query or user.
	URL string `json:"url"`
	// CAPEM is the PEM of the CA certificate that must have issued the server's.
	CAPEM string `json:"ca_pem,omitempty"`
	// SPKISHA256 is the hex SHA-256 of the server's SubjectPublicKeyInfo.
	SPKISHA256 string `json:"spki_sha256,omitempty"`
}

// GPU says what the job needs. The guest starts the workload only when
// evidence for exactly this many GPUs in CC mode "on" was gathered.
type GPU struct {
	// Model is the marketing name without vendor: "H100", "B200".
	Model string `json:"model"`
	// Count is 1 to 8.
	Count int `json:"count"`
}

// Encode returns the canonical bytes of a valid manifest.
func (m *Manifest) Encode() ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return Canonical(m)
}

// HostData is the SHA-256 of a manifest's canonical bytes: the value the
// launch carries as HOST_DATA (AMD 56860, SNP_LAUNCH_FINISH).
func HostData(manifest []byte) [32]byte { return sha256.Sum256(manifest) }

// ParseManifest decodes canonical manifest bytes and validates them.
func ParseManifest(data []byte) (*Manifest, error) {
	var m Manifest
	if err := unmarshalCanonical(data, MaxManifestBytes, &m); err != nil {
		return nil, fmt.Errorf("parsing manifest: %w", err)
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return &m, nil
}

// Validate checks every rule stated at the fields.
func (m *Manifest) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("manifest: "+format, args...)) }
	if m.Version != ManifestVersion {
		bad("version %d is not supported, this build knows %d", m.Version, ManifestVersion)
	}
	if !isHex(m.LaunchID, 16) {
		bad("launch_id %q is not 32 lower-case hex digits", m.LaunchID)
	}
	host, _, _, err := SplitImage(m.Image)
	if err != nil {
		errs = append(errs, err)
	}
	if len(m.Command) > MaxArgs {
		bad("command has %d words, limit is %d", len(m.Command), MaxArgs)
	}
	errs = append(errs, m.validateEnv()...)
	errs = append(errs, m.validateFiles()...)
	if len(m.Ports) > MaxPorts {
		bad("%d ports, limit is %d", len(m.Ports), MaxPorts)
	}
	for i, p := range m.Ports {
		if p < 1 || p > 65535 || slices.Contains(m.Ports[:i], p) {
			bad("port %d is out of range or listed twice", p)
		}
	}
	if err := m.Broker.validate("broker"); err != nil {
		errs = append(errs, err)
	}
	if err := m.Registry.validate("registry"); err != nil {
		errs = append(errs, err)
	} else if u, _ := url.Parse(m.Registry.URL); u != nil && host != "" && u.Host != host {
		bad("registry %q does not serve image host %q", u.Host, host)
	}
	if m.GPU != nil && (m.GPU.Model == "" || m.GPU.Count < 1 || m.GPU.Count > 8) {
		bad("gpu needs a model and a count from 1 to 8")
	}
	return errors.Join(errs...)
}

func (m *Manifest) validateEnv() (errs []error) {
	if len(m.Env)+len(m.SecretEnv) > MaxEnv {
		errs = append(errs, fmt.Errorf("manifest: more than %d environment variables", MaxEnv))
	}
	name := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	for k, v := range m.Env {
		if !name.MatchString(k) || strings.ContainsRune(v, 0) {
			errs = append(errs, fmt.Errorf("manifest: environment variable %q is malformed", k))
		}
	}
	for k, v := range m.SecretEnv {
		if _, both := m.Env[k]; both || !name.MatchString(k) {
			errs = append(errs, fmt.Errorf("manifest: secret variable %q is malformed or also plain", k))
		}
		if _, err := ParseResource(v); err != nil {
			errs = append(errs, fmt.Errorf("manifest: secret variable %q: %w", k, err))
		}
	}
	return errs
}

func (m *Manifest) validateFiles() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("manifest: "+format, args...)) }
	if len(m.Inputs) > MaxInputs || len(m.Results) > MaxResults {
		bad("%d inputs and %d results, limits are %d and %d", len(m.Inputs), len(m.Results), MaxInputs, MaxResults)
	}
	seen := map[string]bool{}
	for _, in := range m.Inputs {
		switch _, err := ParseResource(in.Key); {
		case !ValidFileName(in.Name) || seen[in.Name]:
			bad("input name %q is malformed or used twice", in.Name)
		case !isHex(in.SHA256, sha256.Size):
			bad("input %s: sha256 is not 64 lower-case hex digits", in.Name)
		case in.Size < 1 || in.Size > MaxInputBytes:
			bad("input %s: size %d is not within 1..%d", in.Name, in.Size, int64(MaxInputBytes))
		case in.Format != FormatAge:
			bad("input %s: format %q is not supported; re-seal it with age", in.Name, in.Format)
		case err != nil:
			bad("input %s: %v", in.Name, err)
		}
		seen[in.Name] = true
	}
	seen = map[string]bool{}
	for _, r := range m.Results {
		if !ValidFileName(r.Name) || seen[r.Name] {
			bad("result name %q is malformed or used twice", r.Name)
		}
		if len(r.Recipients) == 0 || len(r.Recipients) > 16 {
			bad("result %s needs 1 to 16 age recipients", r.Name)
		}
		seen[r.Name] = true
	}
	return errs
}

func (e Endpoint) validate(what string) error {
	u, err := url.Parse(e.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("manifest: %s url %q is not https://host[:port]", what, e.URL)
	}
	if (e.CAPEM == "") == (e.SPKISHA256 == "") {
		return fmt.Errorf("manifest: %s needs exactly one of ca_pem and spki_sha256", what)
	}
	if e.SPKISHA256 != "" && !isHex(e.SPKISHA256, sha256.Size) {
		return fmt.Errorf("manifest: %s spki_sha256 is not 64 lower-case hex digits", what)
	}
	return nil
}

// SplitImage takes host[:port]/repository@sha256:digest apart. The digest is
// returned with its "sha256:" prefix. A tag, or no digest, is an error.
func SplitImage(ref string) (host, repository, digest string, err error) {
	name, digest, ok := strings.Cut(ref, "@")
	hexDigest, isSHA := strings.CutPrefix(digest, "sha256:")
	if !ok || !isSHA || !isHex(hexDigest, sha256.Size) {
		return "", "", "", fmt.Errorf("manifest: image %q is not pinned as host/repository@sha256:digest", ref)
	}
	host, repository, ok = strings.Cut(name, "/")
	if !ok || host == "" || !regexp.MustCompile(`^[a-z0-9]+([._/-]+[a-z0-9]+)*$`).MatchString(repository) ||
		!regexp.MustCompile(`^[A-Za-z0-9.-]+(:[0-9]{1,5})?$|^\[[0-9a-fA-F:]+\](:[0-9]{1,5})?$`).MatchString(host) {
		return "", "", "", fmt.Errorf("manifest: image %q is not host/repository@sha256:digest", ref)
	}
	return host, repository, digest, nil
}

// Resource is a broker resource, kbs:///repository/type/tag (CoCo KBS 0.4.0).
type Resource struct{ Repository, Type, Tag string }

func (r Resource) String() string { return "kbs:///" + r.Path() }

// Path is repository/type/tag, as in the broker's URL.
func (r Resource) Path() string { return r.Repository + "/" + r.Type + "/" + r.Tag }

// ParseResource decodes kbs:///repository/type/tag.
func ParseResource(uri string) (Resource, error) {
	rest, ok := strings.CutPrefix(uri, "kbs:///")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 3 || slices.ContainsFunc(parts, func(p string) bool { return !ValidFileName(p) }) {
		return Resource{}, fmt.Errorf("resource %q is not kbs:///repository/type/tag", uri)
	}
	return Resource{parts[0], parts[1], parts[2]}, nil
}

// ValidFileName reports whether s is 1 to 128 of [A-Za-z0-9._-] and does not
// start with a dot: safe as a file name, URL segment and object key.
func ValidFileName(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' {
		return false
	}
	for _, c := range s {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

func isHex(s string, size int) bool {
	raw, err := hex.DecodeString(s)
	return err == nil && len(raw) == size && strings.ToLower(s) == s
}
