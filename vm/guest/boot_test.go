package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/image"
	"github.com/confidential-node/agent/firmware/measure"
	"github.com/confidential-node/agent/firmware/ovmf"
	"github.com/confidential-node/agent/tests/skip"
)

// The boot tests start real guests under QEMU. They run in a network namespace
// of their own: the test starts itself again there.
const (
	namespaceEnv = "GUEST_TEST_NAMESPACE"
	debFolder    = "../../.cache/debs"
	tapName      = "guest0"
	hostAddr     = "10.213.0.1"
	guestAddr    = "10.213.0.2"
	emulatedTag  = "emulated"
	bootLimit    = 4 * time.Minute
)

func inNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(namespaceEnv) != "" {
		return true
	}
	if os.Geteuid() != 0 {
		skip.Missing(t, "root")
	}
	for _, tool := range []string{"qemu-system-x86_64", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			skip.Missing(t, tool)
		}
	}
	for _, deb := range []string{"kernel.deb", "ovmf-amdsev.deb"} {
		if _, err := os.Stat(filepath.Join(debFolder, deb)); err != nil {
			skip.Missing(t, ".cache/debs/"+deb+" (make setup)")
		}
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		skip.Missing(t, "/dev/net/tun")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.v", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), namespaceEnv+"=1")
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	return false
}

// wire makes the host's end of the guest's network.
func wire(t *testing.T) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: tapName}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := errors.Join(netlink.LinkSetUp(lo), netlink.LinkAdd(tap)); err != nil {
		t.Fatal(err)
	}
	for _, cidr := range []string{contract.MetadataAddr + "/64", hostAddr + "/30"} {
		addr, err := netlink.ParseAddr(cidr)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(tap, addr); err != nil {
			t.Fatal(err)
		}
	}
	if err := netlink.LinkSetUp(tap); err != nil {
		t.Fatal(err)
	}
}

// goBuild builds a program of this module, statically.
func goBuild(t *testing.T, out, tags, pkg string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-tags", tags, "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
}

// bootable is an image with its hash table.
type bootable struct {
	dir, table string
	gpa        uint32
	d          *contract.ImageDescription
}

func buildImage(t *testing.T, variant, tags string) bootable {
	t.Helper()
	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	goBuild(t, init, tags, ".")
	for _, deb := range []string{"kernel", "ovmf-amdsev"} {
		if out, err := exec.CommandContext(t.Context(), "dpkg-deb", "-x", filepath.Join(debFolder, deb+".deb"), filepath.Join(dir, deb)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	only := func(pattern string) string {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: %v %v", pattern, found, err)
		}
		return found[0]
	}
	b := bootable{dir: filepath.Join(dir, "image")}
	var err error
	b.d, err = image.Build(t.Context(), image.Options{
		Init: init, Kernel: only("kernel/boot/vmlinuz-*"), ModulesDir: only("kernel/*lib/modules/*"), KernelSource: "test",
		Firmware: filepath.Join(dir, "ovmf-amdsev/usr/share/ovmf/OVMF.amdsev.fd"), FirmwareSource: "test",
		Variant: variant, Emulated: tags == emulatedTag, Name: "test", OutDir: b.dir,
	})
	if err != nil {
		t.Fatal(err)
	}
	digest := func(f contract.ImageFile) [32]byte {
		raw, err := hex.DecodeString(f.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		return [32]byte(raw)
	}
	table := measure.HashTable(digest(b.d.Kernel), digest(b.d.Initrd), b.d.Cmdline)
	b.table = filepath.Join(dir, "table")
	fw, err := os.ReadFile(filepath.Join(b.dir, b.d.Firmware.File))
	if err := errors.Join(err, os.WriteFile(b.table, table[:], 0o600)); err != nil {
		t.Fatal(err)
	}
	parsed, err := ovmf.Parse(fw)
	if err != nil {
		t.Fatal(err)
	}
	b.gpa = parsed.HashTable.Base
	return b
}

// startProcessor answers report requests as the emulated processor does.
func startProcessor(t *testing.T, hostData [sha256.Size]byte) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "psp")
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	answer := func(conn net.Conn) error {
		var size [4]byte
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return err
		}
		body := make([]byte, binary.BigEndian.Uint32(size[:]))
		if _, err := io.ReadFull(conn, body); err != nil {
			return err
		}
		var req struct {
			ReportData []byte `json:"report_data"`
		}
		if err := json.Unmarshal(body, &req); err != nil {
			return err
		}
		text, err := json.Marshal(map[string][]byte{"report": report([64]byte(req.ReportData), hostData)})
		if err != nil {
			return err
		}
		binary.BigEndian.PutUint32(size[:], uint32(len(text)))
		_, err = conn.Write(append(size[:], text...))
		return err
	}
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		for answer(conn) == nil {
		}
	}()
	return socket
}

// machine is a running QEMU.
type machine struct {
	console, monitor string
	ended            chan struct{}
	err              error
}

func (w *world) boot(ctx context.Context, b bootable, cmdline string, disks map[string]string) *machine {
	t := w.t
	t.Helper()
	m := &machine{console: filepath.Join(t.TempDir(), "console"), monitor: filepath.Join(t.TempDir(), "monitor"), ended: make(chan struct{})}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35,usb=off", "-accel", "tcg", "-cpu", "EPYC-v4", "-m", "512",
		"-bios", filepath.Join(b.dir, b.d.Firmware.File), "-kernel", filepath.Join(b.dir, b.d.Kernel.File), "-initrd", filepath.Join(b.dir, b.d.Initrd.File), "-append", cmdline,
		"-device", fmt.Sprintf("loader,file=%s,addr=%#x,force-raw=on", b.table, b.gpa),
		"-netdev", "tap,id=n,script=no,downscript=no,ifname=" + tapName, "-device", "virtio-net-pci,netdev=n,romfile=",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=psp,path=" + startProcessor(t, contract.HostData(w.served)), "-device", "virtserialport,chardev=psp,name=org.confidential-node.psp",
		"-serial", "file:" + m.console, "-monitor", "unix:" + m.monitor + ",server,nowait",
	}
	for serial, file := range disks {
		args = append(args, "-drive", "if=none,readonly=on,format=raw,id=d"+serial+",file="+file, "-device", "virtio-blk-pci,drive=d"+serial+",serial="+serial)
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.Stderr = io.Discard // warnings about features TCG lacks
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		m.err = cmd.Wait()
		close(m.ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-m.ended
		if text, err := os.ReadFile(m.console); err == nil && t.Failed() {
			t.Logf("console:\n%s", text)
		}
	})
	return m
}

// awaitEnd waits until the guest has powered itself off.
func (m *machine) awaitEnd(ctx context.Context, t *testing.T) {
	t.Helper()
	select {
	case <-m.ended:
		if m.err != nil {
			t.Errorf("QEMU: %v", m.err)
		}
	case <-ctx.Done():
		t.Fatal("the guest does not power off")
	}
}

// bootWorld is a world a real guest can reach.
func bootWorld(t *testing.T) *world {
	t.Helper()
	wire(t)
	probe := filepath.Join(t.TempDir(), "probe")
	goBuild(t, probe, "", "./testdata/probe")
	program, err := os.ReadFile(probe)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, "example.com", program)
	w.facts = contract.NetworkFacts{Address: guestAddr + "/30", Gateway: hostAddr, Hosts: map[string]string{"example.com": hostAddr}, UnixTime: time.Now().Unix()}
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "["+contract.MetadataAddr+"%"+tapName+"]:80")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: w.metadataHandler(), ReadHeaderTimeout: time.Second}
	go func() { _ = server.Serve(ln) }()
	t.Cleanup(func() { _ = server.Close() })
	return w
}

func TestARealGuestGoesItsWholeWay(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	w := bootWorld(t)
	b := buildImage(t, contract.VariantProduction, emulatedTag)
	w.served = w.manifestBytes()
	begin := time.Now()
	m := w.boot(ctx, b, b.d.Cmdline, w.writeDisks(t.TempDir()))
	w.await(ctx, "the workload", func() bool { return w.status(contract.PhaseRunning) != nil || w.status(contract.PhaseFailed) != nil })
	t.Logf("running after %v", time.Since(begin))
	if s := w.status(contract.PhaseFailed); s != nil {
		t.Fatalf("%+v", s.Refusal)
	}
	w.converse(ctx, guestAddr+":8080")
	nonce := bytes.Repeat([]byte{9}, 32)
	w.challenges <- contract.Challenge{ID: "c1", Nonce: nonce}
	w.await(ctx, "evidence", func() bool { return w.evidence["c1"] != nil })
	e := w.verify(w.evidence["c1"], nonce)
	w.get(ctx, w.attestedClient(guestAddr+":8080"), http.MethodGet, "https://guest/quit", nil)
	m.awaitEnd(ctx, t)
	t.Logf("ended after %v", time.Since(begin))
	for _, s := range w.statuses {
		t.Logf("%6d ms  %s", s.UptimeMS, s.Phase)
	}
	if done := w.status(contract.PhaseDone); done == nil || done.ExitCode != 7 {
		t.Errorf("the guest said %+v", w.statuses)
	}
	w.checkDelivered(e.ResultKey)
	if text, err := os.ReadFile(m.console); err != nil || len(strings.TrimSpace(removeFirmware(string(text)))) != 0 {
		t.Errorf("a production guest writes to the console: %q %v", text, err)
	}
}

// removeFirmware cuts the terminal codes OVMF writes before the kernel starts.
func removeFirmware(console string) string {
	if i := strings.LastIndex(console, "\x1b"); i >= 0 {
		_, console, _ = strings.Cut(console[i:], "H")
	}
	return console
}

// checkDelivered opens the report of the probe that ran in the real guest.
func (w *world) checkDelivered(key ed25519.PublicKey) {
	w.t.Helper()
	if _, err := contract.OpenResults(w.results[contract.ResultsManifestName], key); err != nil {
		w.t.Fatal(err)
	}
	var got map[string]string
	if err := json.Unmarshal(w.openResult("report.json"), &got); err != nil {
		w.t.Fatal(err)
	}
	for key, want := range map[string]string{
		"args": "probe one", "secret": "s3cret", "input": "plaintext", "dir": "/bin", "uid": "12 34", "pid": "1", "links": "lo", "env": "2", "sys": "",
		"root": "/bin /dev /inputs /proc /results /tmp",
	} {
		if got[key] != want {
			w.t.Errorf("%s is %q, want %q", key, got[key], want)
		}
	}
	if strings.Contains(got["dev"], "vport") || strings.Contains(got["dev"], "vd") || strings.Contains(got["dev"], "console") {
		w.t.Errorf("the workload sees the guest's devices: %s", got["dev"])
	}
	if !strings.HasPrefix(got["host"], "error: ") || !strings.Contains(got["status"], "CapBnd:\t0000000000000000") {
		w.t.Errorf("the workload has too much: %s", got["status"])
	}
}

func TestARealGuestEndsByItsPowerButton(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	w := bootWorld(t)
	b := buildImage(t, contract.VariantDebug, emulatedTag)
	w.served = w.manifestBytes()
	m := w.boot(ctx, b, b.d.Cmdline, w.writeDisks(t.TempDir()))
	w.await(ctx, "the workload", func() bool { return w.status(contract.PhaseRunning) != nil || w.status(contract.PhaseFailed) != nil })
	if s := w.status(contract.PhaseFailed); s != nil {
		t.Fatalf("%+v", s.Refusal)
	}
	w.converse(ctx, guestAddr+":8080")
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", m.monitor)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.WriteString(conn, "system_powerdown\n")
	if err := errors.Join(err, conn.Close()); err != nil {
		t.Fatal(err)
	}
	m.awaitEnd(ctx, t)
	if w.status(contract.PhaseDone) == nil || w.results["report.json"] == nil {
		t.Errorf("the guest did not end in order: %+v", w.statuses)
	}
	console, err := os.ReadFile(m.console)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(console, []byte("phase done: phase=attest")) {
		t.Errorf("a debug guest says nothing:\n%s", console)
	}
	for _, secret := range []string{"s3cret", w.identity.String(), "plaintext"} {
		if bytes.Contains(console, []byte(secret)) {
			t.Errorf("the console shows %q", secret)
		}
	}
}

// TestTheShippedImageRefusesToRunWithoutSilicon boots the image that has no
// emulated channel: its modules load, and it says why it does not go on.
func TestTheShippedImageRefusesToRunWithoutSilicon(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	w := bootWorld(t)
	b := buildImage(t, contract.VariantProduction, "")
	w.served = w.manifestBytes()
	m := w.boot(ctx, b, b.d.Cmdline, w.writeDisks(t.TempDir()))
	m.awaitEnd(ctx, t)
	if s := w.status(contract.PhaseFailed); s == nil || s.Refusal.Code != "guest.no-report" || w.attested != 0 {
		t.Errorf("the guest said %+v", w.statuses)
	}
}
