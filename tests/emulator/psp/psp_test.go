package psp

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/measure"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/tests/skip"
)

func amdSev(t *testing.T) []byte {
	t.Helper()
	image, err := os.ReadFile(filepath.Join("..", "..", "..", "..", "shared", "data", "firmware", "OVMF.amdsev.fd"))
	if err != nil {
		skip.Missing(t, "a real AmdSev OVMF in ../shared/data")
	}
	return image
}

// process lays out /proc as of a QEMU with these arguments.
func process(t *testing.T, firmware, table []byte, argv ...string) (root string) {
	t.Helper()
	root = t.TempDir()
	files := map[string][]byte{
		"proc/7/cmdline": []byte(strings.Join(argv, "\x00") + "\x00"), "proc/7/root/fw": firmware, "proc/7/root/table": table,
	}
	for name, data := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func qemu(hostData string) []string {
	return []string{
		"/usr/bin/qemu-system-x86_64", "-cpu", "EPYC-v4,x2apic=on", "-smp", "2,sockets=2", "-bios", "/fw", "-kernel", "/k", "-initrd", "/i",
		"-device", "virtio-net-pci", "-device", "loader,file=/table,addr=0x810c00,force-raw=on",
		"-fw_cfg", "name=opt/org.confidential-node/emulated-launch,string=policy=0x30000;host-data=" + hostData,
	}
}

func TestMeasuresWhatQEMUWasGivenAsTheNodePredictsIt(t *testing.T) {
	t.Parallel()
	firmware := amdSev(t)
	kernel := measure.KernelDigests{Kernel: sha256.Sum256([]byte("k")), Initrd: sha256.Sum256([]byte("i")), Cmdline: "quiet"}
	table := measure.HashTable(kernel.Kernel, kernel.Initrd, kernel.Cmdline)
	want, err := measure.Digest(measure.Input{Firmware: firmware, Kernel: &kernel, VCPUs: 2, CPUModel: "EPYC-v4", GuestFeatures: 1})
	if err != nil {
		t.Fatal(err)
	}
	l, err := measureProcess(process(t, firmware, table[:], qemu(strings.Repeat("ab", 32))...), 7)
	if err != nil {
		t.Fatal(err)
	}
	if l.digest != want || l.policy != 0x30000 || l.hostData[31] != 0xab {
		t.Errorf("measured %x, predicted %x", l.digest, want)
	}
	table[100] ^= 1
	if l, err := measureProcess(process(t, firmware, table[:], qemu(strings.Repeat("ab", 32))...), 7); err != nil || l.digest == want {
		t.Errorf("another table measures alike: %v", err)
	}
	for name, argv := range map[string][]string{
		"no launch item":  qemu("")[:16],
		"short HOST_DATA": qemu("ab"),
		"no arguments":    {"sleep", "60"},
	} {
		if _, err := measureProcess(process(t, firmware, table[:], argv...), 7); err == nil {
			t.Errorf("%s is measured", name)
		}
	}
}

func TestFaultsShowInTheReport(t *testing.T) {
	t.Parallel()
	l := &launch{policy: 0x30000, hostData: [32]byte{5}, digest: [measure.Size]byte{6}}
	var data [contract.ReportDataSize]byte
	for fault, check := range map[Fault]string{
		FaultNone: "", FaultWrongMeasurement: "launch-digest", FaultWrongHostData: "host-data", FaultBadSignature: "signature",
	} {
		p, err := New(Config{TCB: contract.TCB{SNP: 27}, Fault: fault, Logger: hclog.NewNullLogger()})
		if err != nil {
			t.Fatal(err)
		}
		report, err := p.Report(l, data[:])
		if err != nil {
			t.Fatal(err)
		}
		res := snp.Verify(report, p.chain.Endorsements, snp.Expect{
			ReportData: data[:], HostData: l.hostData[:],
			AppraisalPolicy: snp.AppraisalPolicy{Measurements: [][]byte{l.digest[:]}, EmulatedRoots: roots(p), Now: time.Now()},
		})
		got := ""
		if failed := res.Failed(); failed != nil {
			got = failed.Name
		}
		if got != check {
			t.Errorf("fault %q fails check %q, want %q (report %s)", fault, got, check, hex.EncodeToString(report[:16]))
		}
	}
}

func TestTheReportSaysTheTCBAndPolicyThatWereSet(t *testing.T) {
	t.Parallel()
	tcb := contract.TCB{BootLoader: 9, TEE: 1, SNP: 22, Microcode: 70}
	p, err := New(Config{TCB: tcb, PolicyOverride: 0xb0000, Logger: hclog.NewNullLogger()})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := p.Report(&launch{policy: 0x30000}, make([]byte, contract.ReportDataSize))
	if err != nil {
		t.Fatal(err)
	}
	r, err := snp.ParseReport(raw)
	if err != nil {
		t.Fatal(err)
	}
	want := snp.GenoaTCB(tcb)
	if r.Policy != 0xb0000 || r.CurrentTCB != want || r.ReportedTCB != want || r.CommittedTCB != want || r.LaunchTCB != want {
		t.Errorf("policy %#x, TCB %#x %#x %#x %#x, want %#x", r.Policy, r.CurrentTCB, r.ReportedTCB, r.CommittedTCB, r.LaunchTCB, want)
	}
	for _, der := range [][]byte{p.chain.VCEK, p.chain.ASK, p.chain.ARK} {
		if cert, err := x509.ParseCertificate(der); err != nil || !strings.Contains(cert.Subject.CommonName, "EMULATED") {
			t.Errorf("a certificate is named %s (%v)", cert.Subject, err)
		}
	}
	if _, err := New(Config{Fault: "wrong-mesurement", Logger: hclog.NewNullLogger()}); err == nil {
		t.Error("an unknown fault is no fault")
	}
}

// A process that is no QEMU gets no report, however it asks.
func TestWhoIsNoGuestGetsNoReport(t *testing.T) {
	t.Parallel()
	p, err := New(Config{Logger: hclog.NewNullLogger()})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "psp.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- p.Serve(ctx, listener) }()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_, _ = conn.Write(frame(`{"report_data":"` + strings.Repeat("A", 86) + `=="}`)) // it may have hung up already
	if got, err := io.ReadAll(conn); len(got) > 0 {
		t.Errorf("got %q, %v", got, err)
	}
	cancel()
	if err := errors.Join(<-served, conn.Close()); err != nil {
		t.Error(err)
	}
}

func frame(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

func FuzzAnswer(f *testing.F) {
	f.Add(frame(`{"report_data":"`+strings.Repeat("A", 86)+`=="}`), false)
	f.Add(frame(`{"report_data":"AA=="}`), false)
	f.Add(frame(`{}`), true)
	f.Add([]byte{255, 255, 255, 255, 1}, false)
	p, err := New(Config{Logger: hclog.NewNullLogger()})
	if err != nil {
		f.Fatal(err)
	}
	silent := *p
	silent.cfg.Fault = FaultSilent
	f.Fuzz(func(t *testing.T, raw []byte, mute bool) {
		chip := p
		if mute {
			chip = &silent
		}
		var out bytes.Buffer
		err := chip.answer(bytes.NewReader(raw), &out, &launch{})
		answered := out.Len() > 0
		if answered != (err == nil && !mute) {
			t.Errorf("answered %v, %v", answered, err)
		}
		if answered && int(binary.BigEndian.Uint32(out.Bytes())) != out.Len()-4 {
			t.Errorf("the answer's frame is %x", out.Bytes()[:4])
		}
	})
}

func FuzzParseArguments(f *testing.F) {
	f.Add(strings.Join(qemu("ab"), "\x00"))
	f.Fuzz(func(_ *testing.T, cmdline string) {
		if a, err := parseArguments(strings.Split(cmdline, "\x00")); err == nil {
			_ = new(launch).parseItem(a.launch)
		}
	})
}

func roots(p *PSP) []*x509.Certificate { return []*x509.Certificate{p.chain.Root} }
