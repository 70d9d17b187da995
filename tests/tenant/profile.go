package tenant

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/confidential-node/agent/firmware/snp"
)

// maxProfileBytes bounds the profile and each file it names.
const maxProfileBytes = 1 << 20

// Profile says where the tenant's own things and the platform are. File names
// are relative to the profile's folder. Secrets stand in files of their own.
type Profile struct {
	// StateDir is made 0700. Required.
	StateDir string `toml:"state_dir"`
	// ImageDir holds the tenant's copy of the guest image, with image.json.
	ImageDir string `toml:"image_dir"`
	// RIMDir is a folder with NVIDIA's reference manifests of GPUs.
	RIMDir string `toml:"rim_dir"`
	// Node is the host to deploy to; empty lets the control plane choose.
	Node string `toml:"node"`
	// GuestHost is the address under which the node publishes ports, for
	// `confidential call`.
	GuestHost string `toml:"guest_host"`
	// PresignHours is how long the node may fetch inputs and put results;
	// 1 to 168, 0 means 24.
	PresignHours int `toml:"presign_hours"`
	// Hosts are static names handed to the guest as hints, name to IPv4.
	Hosts map[string]string `toml:"hosts"`

	ControlPlane ControlPlaneProfile `toml:"control_plane"`
	Broker       BrokerProfile       `toml:"broker"`
	Registry     EndpointProfile     `toml:"registry"`
	Store        StoreProfile        `toml:"store"`
	Verify       VerifyProfile       `toml:"verify"`
}

// ControlPlaneProfile is the platform's API.
type ControlPlaneProfile struct {
	URL       string `toml:"url"`
	CAFile    string `toml:"ca_file"`
	TokenFile string `toml:"token_file"`
}

// BrokerProfile is the tenant's key broker.
type BrokerProfile struct {
	// URL as guests reach it; it goes into the manifest with the CA.
	URL    string `toml:"url"`
	CAFile string `toml:"ca_file"`
	// AdminURL as the tenant reaches it; empty means URL.
	AdminURL       string `toml:"admin_url"`
	AdminTokenFile string `toml:"admin_token_file"`
}

// EndpointProfile is a TLS server with a pinned CA.
type EndpointProfile struct {
	URL    string `toml:"url"`
	CAFile string `toml:"ca_file"`
}

// StoreProfile is the S3 object store for ciphertext.
type StoreProfile struct {
	// Endpoint is https://host[:port].
	Endpoint      string `toml:"endpoint"`
	CAFile        string `toml:"ca_file"`
	Region        string `toml:"region"`
	Bucket        string `toml:"bucket"`
	AccessKey     string `toml:"access_key"`
	SecretKeyFile string `toml:"secret_key_file"`
}

// VerifyProfile loosens verification. For trials without secrets.
type VerifyProfile struct {
	AllowEmulatedRoots    []string `toml:"allow_emulated_roots"`
	AllowDevelopmentImage bool     `toml:"allow_development_image"`
	AllowProducts         []string `toml:"allow_products"`
	AllowUnmeasuredGPUs   bool     `toml:"allow_unmeasured_gpus"`
}

// LoadProfile reads a profile. Unknown keys are errors.
func LoadProfile(path string) (*Profile, error) {
	data, err := readSmall(path)
	if err != nil {
		return nil, fmt.Errorf("reading profile: %w", err)
	}
	p, err := parseProfile(data)
	if err != nil {
		return nil, Usage("profile %s: %v", path, err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("reading profile: %w", err)
	}
	p.resolve(dir)
	return p, nil
}

func parseProfile(data []byte) (*Profile, error) {
	var p Profile
	dec := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := dec.Decode(&p); err != nil {
		if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok && len(strict.Errors) > 0 {
			row, _ := strict.Errors[0].Position()
			return nil, fmt.Errorf("line %d: unknown key %q", row, strings.Join(strict.Errors[0].Key(), "."))
		}
		if decode, ok := errors.AsType[*toml.DecodeError](err); ok {
			row, _ := decode.Position()
			return nil, fmt.Errorf("line %d: %w", row, err)
		}
		return nil, err
	}
	if p.StateDir == "" {
		return nil, errors.New("state_dir is required")
	}
	if p.PresignHours < 0 || p.PresignHours > 168 {
		return nil, errors.New("presign_hours is not within 1..168")
	}
	for name, raw := range map[string]string{
		"control_plane.url": p.ControlPlane.URL, "broker.url": p.Broker.URL, "broker.admin_url": p.Broker.AdminURL,
		"registry.url": p.Registry.URL, "store.endpoint": p.Store.Endpoint,
	} {
		u, err := url.Parse(raw)
		if raw != "" && (err != nil || u.Scheme != "https" || u.Host == "") {
			return nil, fmt.Errorf("%s: %q is not https://host[:port]", name, raw)
		}
	}
	return &p, nil
}

// resolve makes file names absolute.
func (p *Profile) resolve(dir string) {
	names := []*string{
		&p.StateDir, &p.ImageDir, &p.RIMDir, &p.ControlPlane.CAFile, &p.ControlPlane.TokenFile, &p.Broker.CAFile,
		&p.Broker.AdminTokenFile, &p.Registry.CAFile, &p.Store.CAFile, &p.Store.SecretKeyFile,
	}
	for i := range p.Verify.AllowEmulatedRoots {
		names = append(names, &p.Verify.AllowEmulatedRoots[i])
	}
	for _, n := range names {
		if *n != "" && !filepath.IsAbs(*n) {
			*n = filepath.Join(dir, *n)
		}
	}
}

func (p *Profile) presignFor() time.Duration {
	if p.PresignHours == 0 {
		return 24 * time.Hour
	}
	return time.Duration(p.PresignHours) * time.Hour
}

// need refuses a verb whose part of the profile is empty.
func need(fields map[string]string) error {
	for name, value := range fields {
		if value == "" {
			return Usage("the profile lacks %s", name)
		}
	}
	return nil
}

// readSmall reads a file that must be small.
func readSmall(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxProfileBytes {
		return nil, fmt.Errorf("%s has %d bytes, limit is %d", path, info.Size(), maxProfileBytes)
	}
	return os.ReadFile(path)
}

func readSecret(path string) (string, error) {
	data, err := readSmall(path)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(data)), nil
}

// readRoots reads the emulated roots that a profile or flag allows.
func readRoots(paths []string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for _, path := range paths {
		data, err := readSmall(path)
		if err != nil {
			return nil, fmt.Errorf("reading emulated root: %w", err)
		}
		root, err := snp.ParseEmulatedRoot(data)
		if err != nil {
			return nil, Usage("%s: %v", path, err)
		}
		out = append(out, root)
	}
	return out, nil
}
