// Package config reads the agent's TOML configuration: one file plus the
// drop-ins in conf.d beside it, later files overriding earlier ones key by
// key. It is strict: an unknown key, a wrong type or a value out of range is
// an error that names file, line and key, and nothing is started.
//
// The package only reads files; it starts and creates nothing. A Config is a
// plain value, read once at start and not changed afterwards.
package config

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/confidential-node/agent/nodeagent/api"
)

const (
	// maxFileBytes bounds one configuration file.
	maxFileBytes = 1 << 20
	// maxResultsQuota is the largest upload: parts as large as a single PUT.
	maxResultsQuota = api.MaxParts * api.MaxPutBytes
)

// TEEs a configuration may name.
const (
	TEESNP      = "sev-snp"
	TEEEmulated = "emulated" // builds with the tag "emulated" only
)

// Config is the agent's whole configuration. Defaults stand at the fields.
type Config struct {
	// HostID names this host to the control plane: 1 to 64 of [a-z0-9-].
	// Required.
	HostID string `toml:"host_id"`
	// TEE is "sev-snp" (default) or "emulated".
	TEE string `toml:"tee"`
	// StateDir holds the agent's store, 0700. Default /var/lib/nodeagent.
	StateDir string `toml:"state_dir"`
	// RunDir holds sockets and the guests' boot copies, 0711. Default
	// /run/nodeagent.
	RunDir string `toml:"run_dir"`
	// CacheDir holds ciphertext, 0711. Default /var/cache/nodeagent.
	CacheDir string `toml:"cache_dir"`
	// ImageDirs are folders of guest images, each with an image.json.
	// Default ["/usr/share/nodeagent/images"].
	ImageDirs []string `toml:"image_dirs"`
	// EndorsementsDir may hold vcek.der, ask.der, ark.der and crl.der, handed
	// to guests as hints instead of what the agent fetched. Default
	// /var/lib/nodeagent/endorsements.
	EndorsementsDir string `toml:"endorsements_dir"`
	// KeyService is the https URL of AMD's key distribution service or of a
	// mirror; "" never asks it. Default https://kdsintf.amd.com.
	KeyService string `toml:"key_service"`

	Control  Control  `toml:"control"`
	Libvirt  Libvirt  `toml:"libvirt"`
	Network  Network  `toml:"network"`
	Policy   Policy   `toml:"policy"`
	Blob     Blob     `toml:"blob"`
	GPU      GPU      `toml:"gpu"`
	Emulated Emulated `toml:"emulated"`
}

// Control is the link to the control plane.
type Control struct {
	// Servers are NATS URLs, tls://host:port, tried in turn. Required.
	Servers []string `toml:"servers"`
	// CAFile is the PEM of the CA that issued the servers' certificates; the
	// system's roots are not used. Required.
	CAFile string `toml:"ca_file"`
	// CredsFile holds the host's JWT and nkey seed, mode 0600. Required.
	CredsFile string `toml:"creds_file"`
	// IssuerKeys are the Ed25519 keys (standard base64 of 32 bytes) whose
	// commands are carried out. Required.
	IssuerKeys []string `toml:"issuer_keys"`
	// Heartbeat is the interval between heartbeats, 1s to 10m. Default 30s.
	Heartbeat Duration `toml:"heartbeat"`
	// DeadMan is how long without a confirmed round trip before the
	// connection is dropped and dialled anew, 5s to 1h. Default 5m.
	DeadMan Duration `toml:"dead_man"`
}

// Libvirt is the hypervisor.
type Libvirt struct {
	// URI of the driver. Default qemu:///system.
	URI string `toml:"uri"`
	// QEMUUser owns the taps and may open the guests' files. Default
	// libvirt-qemu.
	QEMUUser string `toml:"qemu_user"`
}

// Network is what guests may reach.
type Network struct {
	// GuestCIDR is cut into one /30 per guest. Default 10.213.0.0/16.
	GuestCIDR netip.Prefix `toml:"guest_cidr"`
	// AllowPrivateEgress are private ranges guests may reach all the same.
	// Default none.
	AllowPrivateEgress []netip.Prefix `toml:"allow_private_egress"`
	// PublishedPorts is the range of host ports guests' ports are published
	// on, "first-last". Default 20000-29999.
	PublishedPorts PortRange `toml:"published_ports"`
	// DNS servers handed to guests. Default none.
	DNS []netip.Addr `toml:"dns"`
	// MaxPortConnections bounds the connections to one published port, or to
	// one guest by server name, 1 to 65536. Default 1024.
	MaxPortConnections int `toml:"max_port_connections"`
	// MaxSourceConnections bounds those of one client, an IPv4 address or an
	// IPv6 /64, to all published ports, 1 to 65536. Default 128.
	MaxSourceConnections int `toml:"max_source_connections"`
	// MaxGuestPackets bounds the packets that one guest sends in a second, 1000
	// to 10000000. Default 250000.
	MaxGuestPackets int `toml:"max_guest_packets"`
	// MaxRelayedConnections bounds those that pass through the agent: by
	// server name, and by IPv6. Each takes up to six descriptors, of which the
	// unit allows 65536. 1 to 8192. Default 2048.
	MaxRelayedConnections int `toml:"max_relayed_connections"`
	// RelayIdle is how long one of them may carry nothing, 10s to 24h. Default
	// 10m.
	RelayIdle Duration `toml:"relay_idle"`
	// TLS is the port that guests share by server name. Default none.
	TLS SharedTLS `toml:"tls"`
}

// SharedTLS is one port on which clients name the guest they want (SNI). TLS
// ends in the guest.
type SharedTLS struct {
	// Listen is "address:port" or ":port"; "" for no shared port.
	Listen string `toml:"listen"`
	// Domain is what guests' names are one label below of. Its DNS wildcard
	// leads to this host.
	Domain string `toml:"domain"`
}

// Port is the shared port's number, 0 when there is none.
func (t SharedTLS) Port() uint16 {
	_, text, err := net.SplitHostPort(t.Listen)
	if err != nil {
		return 0
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0
	}
	return uint16(port)
}

// Policy bounds what the control plane may ask for. It can never exceed it.
type Policy struct {
	// MaxGuests at a time, 1 to 1000. Default 16.
	MaxGuests int `toml:"max_guests"`
	// MaxVCPUs of one guest, 1 to 512. Default 64.
	MaxVCPUs int `toml:"max_vcpus"`
	// MaxMemoryMiB of one guest. Default 1048576 (1 TiB).
	MaxMemoryMiB uint64 `toml:"max_memory_mib"`
	// ReserveMemoryMiB is kept for the host. Default 4096.
	ReserveMemoryMiB uint64 `toml:"reserve_memory_mib"`
	// CPUModels guests may ask for. Default ["EPYC-v4"].
	CPUModels []string `toml:"cpu_models"`
	// StartTimeout bounds acceptance to "running". Default 15m.
	StartTimeout Duration `toml:"start_timeout"`
	// RunTimeout bounds "running" to the end. Default 720h.
	RunTimeout Duration `toml:"run_timeout"`
	// ResultsQuota bounds the bytes of one guest's results, 1 to 50,000 GiB:
	// 5 GiB of each result by one presigned PUT, or 10,000 parts of 5 MiB to
	// 5 GiB by an upload grant. Default 5 GiB.
	ResultsQuota int64 `toml:"results_quota"`
}

// Blob is how ciphertext is fetched and kept.
type Blob struct {
	// MaxBytes bounds the cache. Default 1 TiB.
	MaxBytes int64 `toml:"max_bytes"`
	// SpoolMaxBytes bounds the results of all guests that wait for their
	// object stores. Default 100 GiB.
	SpoolMaxBytes int64 `toml:"spool_max_bytes"`
	// Parts fetched at a time for one blob, or sent at a time for one guest, 1
	// to 64. Default 8.
	Parts int `toml:"parts"`
	// CAFile adds a CA for object stores to the system's roots. Default none.
	CAFile string `toml:"ca_file"`
}

// GPU is which devices the agent takes from the host.
type GPU struct {
	// Manage are PCI addresses ("0000:41:00.0") and UUIDs ("GPU-..", the nvidia
	// driver's name) of GPUs and NVSwitches, or ["all-capable"] for every one
	// that has Confidential Computing and was not on vfio-pci before. Devices
	// it does not name are never touched; one that is taken out of it stays the
	// agent's until `nodeagent gpu release`. Default none.
	Manage []string `toml:"manage"`
}

// AllCapable stands alone in gpu.manage.
const AllCapable = "all-capable"

// Emulated configures the emulated TEE.
type Emulated struct {
	// PSPSocket is the unix socket of the process that plays the PSP.
	PSPSocket string `toml:"psp_socket"`
}

// Duration is a time.Duration written as in Go: "90s", "5m".
type Duration time.Duration

// UnmarshalText parses a duration.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}

// PortRange is an inclusive range of TCP ports.
type PortRange struct{ First, Last uint16 }

// UnmarshalText parses "first-last".
func (r *PortRange) UnmarshalText(text []byte) error {
	first, last, ok := strings.Cut(string(text), "-")
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if !ok || errA != nil || errB != nil || a == 0 || a > b {
		return fmt.Errorf("port range %q is not first-last", text)
	}
	r.First, r.Last = uint16(a), uint16(b)
	return nil
}

// Default is the configuration before any file.
func Default() Config {
	return Config{
		TEE:             TEESNP,
		StateDir:        "/var/lib/nodeagent",
		RunDir:          "/run/nodeagent",
		CacheDir:        "/var/cache/nodeagent",
		ImageDirs:       []string{"/usr/share/nodeagent/images"},
		EndorsementsDir: "/var/lib/nodeagent/endorsements",
		KeyService:      "https://kdsintf.amd.com",
		Control:         Control{Heartbeat: Duration(30 * time.Second), DeadMan: Duration(5 * time.Minute)},
		Libvirt:         Libvirt{URI: "qemu:///system", QEMUUser: "libvirt-qemu"},
		Network: Network{
			GuestCIDR:      netip.MustParsePrefix("10.213.0.0/16"),
			PublishedPorts: PortRange{20000, 29999}, MaxPortConnections: 1024, MaxSourceConnections: 128, MaxGuestPackets: 250_000,
			MaxRelayedConnections: 2048, RelayIdle: Duration(10 * time.Minute),
		},
		Policy: Policy{
			MaxGuests: 16, MaxVCPUs: 64, MaxMemoryMiB: 1 << 20, ReserveMemoryMiB: 4096,
			CPUModels:    []string{"EPYC-v4"},
			StartTimeout: Duration(15 * time.Minute), RunTimeout: Duration(720 * time.Hour),
			ResultsQuota: api.MaxPutBytes,
		},
		Blob: Blob{MaxBytes: 1 << 40, SpoolMaxBytes: 100 << 30, Parts: 8},
	}
}

// Load reads path and the *.toml files of conf.d beside it in name order,
// and validates the result.
func Load(path string) (Config, error) {
	cfg, at := Default(), map[string]string{}
	files := []string{path}
	dropIns, err := filepath.Glob(filepath.Join(filepath.Dir(path), "conf.d", "*.toml"))
	if err != nil {
		return Config{}, fmt.Errorf("listing drop-ins of %s: %w", path, err)
	}
	slices.Sort(dropIns)
	for _, name := range append(files, dropIns...) {
		if err := loadFile(name, &cfg, at); err != nil {
			return Config{}, err
		}
	}
	if err := cfg.validate(path, at); err != nil {
		return Config{}, err
	}
	return cfg, nil
}

func loadFile(name string, cfg *Config, at map[string]string) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading configuration: %w; make it from the annotated sample packaging/agent.toml, or name another with --config", err)
	}
	if err != nil {
		return fmt.Errorf("reading configuration: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return fmt.Errorf("reading configuration: %w", err)
	}
	if len(data) > maxFileBytes {
		return fmt.Errorf("reading configuration: %s is larger than %d bytes", name, maxFileBytes)
	}
	places(name, data, at)
	return parse(name, data, cfg)
}

// places notes where each key of a file stands: to a structure that has none,
// all are unknown.
func places(name string, data []byte, at map[string]string) {
	var none struct {
		Control, Libvirt, Policy, Blob, GPU, Emulated struct{}
		Network                                       struct{ TLS struct{} }
	}
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&none)
	if all, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		for _, e := range all.Errors {
			line, _ := e.Position()
			at[strings.Join(e.Key(), ".")] = fmt.Sprintf("%s:%d", name, line)
		}
	}
}

// parse decodes one file over cfg.
func parse(name string, data []byte, cfg *Config) error {
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(cfg)
	if missing, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var errs []error
		for _, e := range missing.Errors {
			line, _ := e.Position()
			errs = append(errs, fmt.Errorf("%s:%d: unknown key %q", name, line, strings.Join(e.Key(), ".")))
		}
		return errors.Join(errs...)
	}
	if decode, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, column := decode.Position()
		return fmt.Errorf("%s:%d:%d: key %q: %w", name, line, column, strings.Join(decode.Key(), "."), err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// validate checks every range stated at the fields. at is where keys stand;
// one that stands nowhere is missing from the file at path.
func (c *Config) validate(path string, at map[string]string) error {
	var errs []error
	check := func(ok bool, key, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s: key %q: %s", cmp.Or(at[key], path), key, fmt.Sprintf(format, args...)))
		}
	}
	within := func(key string, d Duration, lo, hi time.Duration) {
		check(time.Duration(d) >= lo && time.Duration(d) <= hi, key, "%s is not within %s..%s", time.Duration(d), lo, hi)
	}
	absolute := func(key string, names ...string) {
		for _, name := range names {
			check(filepath.IsAbs(name), key, "%q is not an absolute path", name)
		}
	}
	check(regexp.MustCompile(`^[a-z0-9-]{1,64}$`).MatchString(c.HostID), "host_id", "%q is not 1 to 64 of [a-z0-9-]", c.HostID)
	check(c.TEE == TEESNP || c.TEE == TEEEmulated, "tee", "%q is neither %q nor %q", c.TEE, TEESNP, TEEEmulated)
	check((c.TEE == TEEEmulated) == (c.Emulated.PSPSocket != ""), "emulated.psp_socket", "belongs to tee = %q, and is required there", TEEEmulated)
	absolute("state_dir", c.StateDir)
	absolute("run_dir", c.RunDir)
	absolute("cache_dir", c.CacheDir)
	absolute("endorsements_dir", c.EndorsementsDir)
	check(c.KeyService == "" || strings.HasPrefix(c.KeyService, "https://"), "key_service", "%q is neither https://host nor empty", c.KeyService)
	check(len(c.ImageDirs) > 0, "image_dirs", "is empty")
	absolute("image_dirs", c.ImageDirs...)
	if c.Emulated.PSPSocket != "" {
		absolute("emulated.psp_socket", c.Emulated.PSPSocket)
	}
	check(len(c.Control.Servers) > 0, "control.servers", "is empty: name the control plane's servers, tls://host:port")
	for _, s := range c.Control.Servers {
		u, err := url.Parse(s)
		check(err == nil && u.Scheme == "tls" && u.Port() != "" && u.User == nil && u.Path == "", "control.servers", "%q is not tls://host:port", s)
	}
	absolute("control.ca_file", c.Control.CAFile)
	absolute("control.creds_file", c.Control.CredsFile)
	if c.Blob.CAFile != "" {
		absolute("blob.ca_file", c.Blob.CAFile)
	}
	if _, err := c.Issuers(); err != nil {
		check(false, "control.issuer_keys", "%v", err)
	}
	within("control.heartbeat", c.Control.Heartbeat, time.Second, 10*time.Minute)
	within("control.dead_man", c.Control.DeadMan, 5*time.Second, time.Hour)
	check(c.Libvirt.URI != "", "libvirt.uri", "is empty")
	check(c.Libvirt.QEMUUser != "", "libvirt.qemu_user", "is empty")
	check(c.Network.GuestCIDR.Addr().Is4() && c.Network.GuestCIDR.Bits() <= 28, "network.guest_cidr", "%s is not IPv4 of /28 or wider", c.Network.GuestCIDR)
	check(c.Network.MaxGuestPackets >= 1000 && c.Network.MaxGuestPackets <= 10_000_000, "network.max_guest_packets", "%d is not within 1000..10000000", c.Network.MaxGuestPackets)
	check(c.Network.MaxPortConnections >= 1 && c.Network.MaxPortConnections <= 1<<16, "network.max_port_connections", "%d is not within 1..65536", c.Network.MaxPortConnections)
	check(c.Network.MaxRelayedConnections >= 1 && c.Network.MaxRelayedConnections <= 8192, "network.max_relayed_connections", "%d is not within 1..8192", c.Network.MaxRelayedConnections)
	within("network.relay_idle", c.Network.RelayIdle, 10*time.Second, 24*time.Hour)
	check(c.Network.MaxSourceConnections >= 1 && c.Network.MaxSourceConnections <= 1<<16, "network.max_source_connections", "%d is not within 1..65536", c.Network.MaxSourceConnections)
	tls, ports := c.Network.TLS, c.Network.PublishedPorts
	check((tls.Listen == "") == (tls.Domain == ""), "network.tls", "listen and domain belong together")
	check(tls.Listen == "" || tls.Port() != 0, "network.tls.listen", "%q is not address:port or :port", tls.Listen)
	check(tls.Port() == 0 || tls.Port() < ports.First || tls.Port() > ports.Last, "network.tls.listen", "port %d is one of published_ports", tls.Port())
	check(tls.Domain == "" || regexp.MustCompile(`^[a-z0-9-]+(\.[a-z0-9-]+)*$`).MatchString(tls.Domain), "network.tls.domain", "%q is not a domain in lower case", tls.Domain)
	check(c.Policy.MaxGuests >= 1 && c.Policy.MaxGuests <= 1000, "policy.max_guests", "%d is not within 1..1000", c.Policy.MaxGuests)
	check(c.Policy.MaxVCPUs >= 1 && c.Policy.MaxVCPUs <= 512, "policy.max_vcpus", "%d is not within 1..512", c.Policy.MaxVCPUs)
	check(c.Policy.MaxMemoryMiB >= 256, "policy.max_memory_mib", "%d is below 256", c.Policy.MaxMemoryMiB)
	check(len(c.Policy.CPUModels) > 0, "policy.cpu_models", "is empty: no guest could be launched")
	within("policy.start_timeout", c.Policy.StartTimeout, time.Second, 24*time.Hour)
	within("policy.run_timeout", c.Policy.RunTimeout, time.Second, 365*24*time.Hour)
	check(c.Policy.ResultsQuota > 0 && c.Policy.ResultsQuota <= maxResultsQuota, "policy.results_quota", "%d is not within 1..%d: %d parts of 5 GiB are the most an upload can carry", c.Policy.ResultsQuota, int64(maxResultsQuota), api.MaxParts)
	check(c.Blob.MaxBytes > 0, "blob.max_bytes", "%d is not positive", c.Blob.MaxBytes)
	check(c.Blob.SpoolMaxBytes > 0, "blob.spool_max_bytes", "%d is not positive", c.Blob.SpoolMaxBytes)
	check(c.Blob.Parts >= 1 && c.Blob.Parts <= 64, "blob.parts", "%d is not within 1..64", c.Blob.Parts)
	for i, name := range c.GPU.Manage {
		check(regexp.MustCompile(`^([0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]|GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|`+AllCapable+`)$`).MatchString(name), "gpu.manage",
			"%q is no PCI address (0000:41:00.0), no UUID (GPU-..) and not %q", name, AllCapable)
		check(!slices.Contains(c.GPU.Manage[:i], name), "gpu.manage", "%q is there twice", name)
		check(name != AllCapable || len(c.GPU.Manage) == 1, "gpu.manage", "%q stands alone: it names every device already", name)
	}
	return errors.Join(errs...)
}

// Issuers decodes control.issuer_keys.
func (c *Config) Issuers() ([]ed25519.PublicKey, error) {
	var keys []ed25519.PublicKey
	for _, s := range c.Control.IssuerKeys {
		raw, err := base64.StdEncoding.DecodeString(s)
		if err != nil || len(raw) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("%q is not base64 of 32 bytes", s)
		}
		// A point of small order: one signature fits every fourth message.
		if bytes.Equal(raw, make([]byte, ed25519.PublicKeySize)) {
			return nil, errors.New("it is the sample's placeholder, for which anybody can sign: put the key given at enrolment there")
		}
		keys = append(keys, raw)
	}
	if len(keys) == 0 {
		return nil, errors.New("there is none: no command could ever be believed")
	}
	return keys, nil
}
