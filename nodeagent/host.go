package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/image"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/admit"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/headroom"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/nodeagent/store"
)

func socketFile(cfg config.Config) string { return filepath.Join(cfg.RunDir, admin.SocketName) }
func guestsDir(cfg config.Config) string  { return filepath.Join(cfg.RunDir, "guests") }
func storeFile(cfg config.Config) string  { return filepath.Join(cfg.StateDir, "state.db") }
func spoolDir(cfg config.Config) string   { return filepath.Join(cfg.StateDir, "spool") }

// writtenFolders are those that launches write to, with what is kept free for
// guests that run: their records and results in state_dir, what they fetch in
// cache_dir, and boot copies in run_dir, which hold an image each.
func writtenFolders(cfg config.Config) []headroom.Folder {
	const mib = 1 << 20
	return []headroom.Folder{
		{Name: "state_dir", Path: cfg.StateDir, KeepBytes: 64 * mib},
		{Name: "cache_dir", Path: cfg.CacheDir, KeepBytes: 64 * mib},
		{Name: "run_dir", Path: guestsDir(cfg), KeepBytes: 128 * mib},
	}
}

// makeDirs makes the agent's folders, with these modes whatever the umask is
// and whatever they were before. QEMU runs as another user and must pass
// through to boot copies and ciphertext, but list neither.
func makeDirs(cfg config.Config) error {
	for dir, mode := range map[string]os.FileMode{cfg.RunDir: 0o711, guestsDir(cfg): 0o711, cfg.CacheDir: 0o711, cfg.StateDir: 0o700} {
		if err := errors.Join(os.MkdirAll(dir, mode), os.Chmod(dir, mode)); err != nil {
			return fmt.Errorf("making the agent's folders: %w", err)
		}
	}
	return nil
}

// hostFacts are what the agent needs to know of its host once.
type hostFacts struct {
	cpuBrand, kernel string
	capacity         admit.Capacity
	qemuUID, qemuGID uint32
}

// readHost reads the facts below root.
func readHost(root string, cfg config.Config) (hostFacts, error) {
	read := func(name string) (string, error) {
		text, err := os.ReadFile(filepath.Join(root, name))
		return strings.TrimSpace(string(text)), err
	}
	var h hostFacts
	var errs [3]error
	var meminfo, cpuinfo string
	h.kernel, errs[0] = read("proc/sys/kernel/osrelease")
	meminfo, errs[1] = read("proc/meminfo")
	cpuinfo, errs[2] = read("proc/cpuinfo")
	if err := errors.Join(errs[:]...); err != nil {
		return h, fmt.Errorf("reading host facts: %w", err)
	}
	total, err := strconv.ParseUint(field(meminfo, "MemTotal", " kB"), 10, 64)
	if err != nil {
		return h, fmt.Errorf("reading host facts: MemTotal: %w", err)
	}
	h.cpuBrand = field(cpuinfo, "model name", "")
	mib := total / 1024
	if mib <= cfg.Policy.ReserveMemoryMiB {
		return h, contract.Refuse("config.reserve-too-large", "lower policy.reserve_memory_mib", "the host has %d MiB of memory and keeps %d", mib, cfg.Policy.ReserveMemoryMiB)
	}
	h.capacity = admit.Capacity{VCPUs: runtime.NumCPU(), MemoryMiB: mib - cfg.Policy.ReserveMemoryMiB}
	account, err := user.Lookup(cfg.Libvirt.QEMUUser)
	if err != nil {
		return h, contract.Refuse("config.no-qemu-user", "install libvirt, or set libvirt.qemu_user", "there is no user %q", cfg.Libvirt.QEMUUser).Because(err)
	}
	uid, errUID := strconv.ParseUint(account.Uid, 10, 32)
	gid, errGID := strconv.ParseUint(account.Gid, 10, 32)
	h.qemuUID, h.qemuGID = uint32(uid), uint32(gid)
	return h, errors.Join(errUID, errGID)
}

// field returns the first value of "name : value" lines, without a suffix.
func field(text, name, suffix string) string {
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSuffix(strings.TrimSpace(value), suffix)
		}
	}
	return ""
}

func dnsOf(cfg config.Config) []string {
	out := make([]string, 0, len(cfg.Network.DNS))
	for _, addr := range cfg.Network.DNS {
		out = append(out, addr.String())
	}
	return out
}

// objectStoreClient trusts the system's roots and one CA more, at the time
// that now tells.
func objectStoreClient(caFile string, now func() time.Time) (*http.Client, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("reading the system's roots: %w", err)
	}
	if caFile != "" {
		text, err := readLimited(caFile, 1<<20)
		if err != nil {
			return nil, err
		}
		if !pool.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("blob.ca_file %s holds no certificate", caFile)
		}
	}
	return blob.Client(&http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12, Time: now},
		MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute,
	}), nil
}

// images is the catalogue at the moment.
func (a *agent) images() ([]admit.Image, error) {
	entries, err := image.LoadCatalogue(a.cfg.ImageDirs)
	if err != nil {
		return nil, err
	}
	out := make([]admit.Image, 0, len(entries))
	for _, e := range entries {
		out = append(out, admit.Image{Dir: e.Dir, Description: *e.Description})
	}
	return out, nil
}

// blobs and spoolsOf give package blob the shapes that lifecycle wants.
type blobs struct{ *blob.Cache }

func (b blobs) Fetch(ctx context.Context, ref lifecycle.Blob, owner string) (string, error) {
	return b.Cache.Fetch(ctx, blob.Ref(ref), owner, nil)
}

type spoolsOf struct{ *blob.Spools }

func (s spoolsOf) Open(guestID string, most map[string]int64, quota int64) (lifecycle.Spool, error) {
	spool, err := s.Spools.Open(guestID, most, quota)
	return spoolOf{spool}, err
}

func (s spoolsOf) Upload(ctx context.Context, guestID string, e lifecycle.Entry, putURL string) error {
	return s.Spools.Upload(ctx, guestID, blob.Entry(e), putURL)
}

func (s spoolsOf) UploadParts(ctx context.Context, guestID string, e lifecycle.Entry, g blob.Grant) ([]string, error) {
	return s.Spools.UploadParts(ctx, guestID, blob.Entry(e), g)
}

type spoolOf struct{ *blob.Spool }

func (s spoolOf) Entries() ([]lifecycle.Entry, error) {
	found, err := s.Spool.Entries()
	out := make([]lifecycle.Entry, 0, len(found))
	for _, e := range found {
		out = append(out, lifecycle.Entry(e))
	}
	return out, err
}

func (s spoolOf) Receive(ctx context.Context, name string, r io.Reader) (lifecycle.Entry, error) {
	e, err := s.Spool.Receive(ctx, name, r)
	return lifecycle.Entry(e), err
}

// heartbeat is what the control plane is told again and again.
func (a *agent) heartbeat() *api.Heartbeat {
	h := &api.Heartbeat{UptimeSeconds: uint64(a.clock.Now().Sub(a.started).Seconds()), Guests: uint32(len(a.guests.Snapshot()))}
	if doubt := a.clock.Doubt(); doubt != nil {
		h.ClockDoubt = doubt.Code
	}
	for _, r := range slices.Concat(a.attention(), a.headroom.Last().Shortages) {
		h.Warnings = append(h.Warnings, api.RefusalToWire(r))
	}
	epoch, epochErr := a.store.Epoch()
	_, cordoned, cordonErr := a.store.Cordon()
	waiting, outboxErr := a.store.OutboxLen()
	if err := errors.Join(epochErr, cordonErr, outboxErr); err != nil {
		a.log.Error("reading the store for a heartbeat", "err", err)
		return h
	}
	h.IssuerEpoch, h.StoreId, h.Cordoned, h.Outbox = epoch.Number, epoch.StoreID[:], cordoned, uint64(waiting)
	h.BootId = a.started.BootID
	a.offerAudit(h)
	return h
}

// status is a snapshot. What does not answer is a finding, not an error: the
// rest is still worth seeing.
func (a *agent) status(ctx context.Context) (admin.Status, error) {
	version, link := buildVersion(), a.link.Status()
	s := admin.Status{
		Header: output.NewHeader("Status"), HostID: a.cfg.HostID, Version: version.Version, Emulated: version.Emulated, TEE: a.cfg.TEE,
		StartedAt: a.started.Wall, Clock: admin.Clock{Trusted: true, Now: a.clock.Wall()}, Guests: []admin.Guest{}, Warnings: []string{},
		Control: admin.Control{Connected: link.Connected, State: string(link.State), Server: link.Server, LastRoundTrip: link.LastRoundTrip, LastError: link.LastError},
	}
	warn := func(format string, args ...any) {
		s.Warnings = append(s.Warnings, strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "; "))
	}
	for _, aside := range store.SetAside(storeFile(a.cfg)) {
		warn("a damaged state file was set aside as %s: see whether the disk is sound (dmesg), end domains that no record accounts for, then remove the file", aside)
	}
	if doubt := a.clock.Doubt(); doubt != nil {
		s.Clock.Trusted, s.Clock.Reason = false, doubt.Error()
		warn("%s: %s; %s", doubt.Code, doubt.Message, doubt.Remedy)
	}
	epoch, epochErr := a.store.Epoch()
	reason, cordoned, cordonErr := a.store.Cordon()
	waiting, outboxErr := a.store.OutboxLen()
	if err := errors.Join(epochErr, cordonErr, outboxErr); err != nil {
		warn("store: %v; look at the agent's log", err)
	}
	s.IssuerEpoch, s.Cordoned, s.CordonReason, s.Outbox = epoch.Number, cordoned, reason, waiting
	if lib, qemu, err := a.driver.Versions(ctx); err != nil {
		s.Hypervisor = "not reachable"
		warn("libvirt at %s: %v; check that libvirtd (or virtqemud) runs", a.cfg.Libvirt.URI, err)
	} else {
		s.Hypervisor = fmt.Sprintf("libvirt %s, hypervisor %s", lib, qemu)
	}
	findings, err := a.network.Findings(ctx)
	if err != nil {
		warn("network: %v", err)
	}
	for _, f := range findings {
		warn("%s: %s; %s", f.Code, f.Message, f.Remedy)
	}
	if err := a.relay.Trouble(); err != nil {
		warn("%v", err)
	}
	for _, r := range a.attention() {
		warn("%s: %s; %s", r.Code, r.Message, r.Remedy)
	}
	log := a.audit.State()
	s.Audit = admin.Audit{Name: log.Name, Entries: log.Size, Signed: log.Checkpoint, Witnessed: log.Witnessed}
	for _, f := range a.endorsements.Findings() {
		warn("%s: %s; %s", f.Code, f.Message, f.Remedy)
	}
	for _, r := range a.headroom.Left(ctx).Shortages {
		s.Shortages = append(s.Shortages, fmt.Sprintf("%s: %s; %s", r.Code, r.Message, r.Remedy))
	}
	counts := a.relay.Counts()
	s.Relay = admin.Relay{Open: counts.Open, Routed: counts.Routed, Refused: counts.Refused}
	gpuWarnings(gpuDoor{a.gpus}.List(), warn)
	for _, g := range a.guests.Snapshot() {
		guest := admin.Guest{
			ID: g.ID, Generation: g.Generation, Status: g.Status.Word(), GuestPhase: string(g.Phase),
			Step: g.Step, Ending: g.Undoing, Since: g.Since, VCPUs: g.VCPUs, MemoryMiB: g.MemoryMiB,
			Relayed: counts.PerGuest[g.ID],
		}
		for _, p := range g.Ports {
			guest.Ports = append(guest.Ports, admin.Port(p))
		}
		if g.Refusal != nil {
			guest.Reason = g.Refusal.Error()
		}
		if g.Finding != "" {
			warn("guest %s: %s", g.ID, g.Finding)
		}
		s.Guests = append(s.Guests, guest)
	}
	return s, nil
}

// unhex decodes what the catalogue has already checked.
func unhex(s string) []byte {
	out, err := hex.DecodeString(s)
	if err != nil {
		return nil
	}
	return out
}
