package gpu

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// fakeDriver stands for NVIDIA's, with its rules: no evidence without CC, and
// no way back from ready.
type fakeDriver struct {
	count, evidence int
	state           State
	nonce, report   string // override what evidence says
	gate            string // the first evidence waits until this FIFO was opened and closed
	neverReady      string // "refuses" or "pretends"
}

func (d *fakeDriver) State() (State, error) {
	s := d.state
	s.GPUs = d.count
	return s, nil
}

func (d *fakeDriver) Evidence(nonce [contract.GPUNonceBytes]byte) (out []contract.GPUEvidence, err error) {
	if !d.state.ConfidentialComputing {
		return nil, errors.New("Not Supported")
	}
	if d.gate != "" {
		if _, err := os.ReadFile(d.gate); err != nil {
			return nil, err
		}
		d.gate = ""
	}
	for i := range d.evidence {
		g := contract.GPUEvidence{Arch: contract.ArchHopper, Nonce: hex.EncodeToString(nonce[:]), Report: fmt.Appendf(nil, "report %d", i), Certificates: []byte("chain")}
		if d.nonce != "" {
			g.Nonce = d.nonce
		}
		if d.report != "" {
			g.Report = []byte(d.report)
		}
		out = append(out, g)
	}
	return out, nil
}

func (d *fakeDriver) Ready() error {
	if d.state.Ready || d.neverReady == "refuses" {
		return errors.New("Invalid State")
	}
	d.state.Ready = d.neverReady == ""
	return nil
}

// TestMain is also the helper, in the way the environment says.
func TestMain(m *testing.M) {
	how := os.Getenv("GPU_TEST_HELPER")
	if how == "" {
		os.Exit(m.Run())
	}
	var d fakeDriver
	if _, err := fmt.Sscanf(how, "%d/%d", &d.count, &d.evidence); err == nil {
		d.state.ConfidentialComputing = true
		rest := strings.Split(how, " ")[1:]
		d.state.ConfidentialComputing = !slices.Contains(rest, "off")
		d.state.Devtools = slices.Contains(rest, "devtools")
		d.state.Ready = slices.Contains(rest, "ready")
		for _, r := range rest {
			if v, ok := strings.CutPrefix(r, "nonce="); ok {
				d.nonce = v
			}
			if v, ok := strings.CutPrefix(r, "report="); ok {
				d.report = v
			}
			if v, ok := strings.CutPrefix(r, "gate="); ok {
				d.gate = v
			}
			if v, ok := strings.CutPrefix(r, "ready-"); ok {
				d.neverReady = v
			}
		}
		if err := Serve(os.Stdin, os.Stdout, &d); err != nil {
			os.Exit(1)
		}
		return
	}
	switch how {
	case "dies":
	case "hangs":
		io.Copy(io.Discard, os.Stdin) //nolint:errcheck // until it is killed
	case "floods":
		for {
			if _, err := os.Stdout.WriteString(strings.Repeat("x", 1<<16)); err != nil {
				return
			}
		}
	case "babbles":
		fmt.Println(`{"state":{"gpus":1,"confidential_computing":true,"devtools":false,"ready":false},"evidence":[]}`)
	case "garbage":
		fmt.Println("NVRM: version")
	}
}

// machine is a PCI bus with these functions, "vendor class" each, and a helper.
func machine(t *testing.T, how string, functions ...string) Machine {
	t.Helper()
	sysfs := t.TempDir()
	for i, f := range functions {
		dir := filepath.Join(sysfs, "bus/pci/devices", fmt.Sprintf("0000:%02x:00.0", i))
		vendor, class, _ := strings.Cut(f, " ")
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "vendor"), []byte(vendor+"\n"), 0o600), os.WriteFile(filepath.Join(dir, "class"), []byte(class+"\n"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	proc, dev := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(proc, "devices"), []byte("Character devices:\n  1 mem\n195 nvidia\n195 nvidiactl\n510 nvidia-uvm\n\nBlock devices:\n  8 sd\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Made before, as only root may make them.
	for _, name := range []string{"nvidiactl", "nvidia-uvm", "nvidia0", "nvidia1"} {
		if err := os.WriteFile(filepath.Join(dev, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Machine{Sysfs: sysfs, Proc: proc, Dev: dev, Helper: []string{os.Args[0]}, Env: []string{"GPU_TEST_HELPER=" + how}}
}

const (
	hopper   = "0x10de 0x030200"
	nvswitch = "0x10de 0x068000"
	network  = "0x1af4 0x020000"
)

func code(err error) string {
	if err == nil {
		return ""
	}
	return contract.AsRefusal(err).Code
}

func TestGPUsProveThemselvesBeforeTheyTakeWork(t *testing.T) {
	t.Parallel()
	m := machine(t, "2/2", network, hopper, hopper, nvswitch)
	s, err := m.Open(t.Context(), 2)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, n := range s.Nodes() {
		names = append(names, filepath.Base(n))
	}
	if !slices.Equal(names, []string{"nvidiactl", "nvidia-uvm", "nvidia0", "nvidia1"}) {
		t.Errorf("device files %v", names)
	}
	without := [contract.ReportDataSize]byte{1}
	data, err := s.Evidence(t.Context(), without)
	if err != nil {
		t.Fatal(err)
	}
	nonce := contract.GPUNonce(without)
	gpus, err := contract.ParseGPUEvidence(data)
	if err != nil || len(gpus) != 2 || gpus[1].Nonce != hex.EncodeToString(nonce[:]) {
		t.Errorf("%s, %v", data, err)
	}
	if err := s.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	// Once more, for a verifier that asks later.
	if _, err := s.Evidence(t.Context(), without); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Evidence(t.Context(), without); code(err) != "guest.gpu-helper" {
		t.Errorf("after the end: %v", err)
	}
}

func TestAGuestWithoutGPUsHasNoEvidenceOfAny(t *testing.T) {
	t.Parallel()
	var none *Set
	if data, err := none.Evidence(t.Context(), [contract.ReportDataSize]byte{}); data != nil || err != nil {
		t.Errorf("%s, %v", data, err)
	}
	if err := errors.Join(none.Ready(t.Context()), none.Close()); err != nil {
		t.Error(err)
	}
}

func TestWhateverDiffersEndsTheGuest(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, helper string
		functions    []string
		want         string
	}{
		{"none on the bus", "1/1", nil, "guest.gpu-count"},
		{"one more on the bus", "1/1", []string{hopper, hopper}, "guest.gpu-count"},
		{"another's display device", "1/1", []string{hopper, "0x1234 0x030000"}, "guest.gpu-foreign"},
		{"the driver has none", "0/0", []string{hopper}, "guest.gpu-count"},
		{"the driver has one more", "2/2", []string{hopper}, "guest.gpu-count"},
		{"evidence of none", "1/0", []string{hopper}, "guest.gpu-helper"},
		{"evidence of one more", "1/2", []string{hopper}, "guest.gpu-count"},
		{"CC is off", "1/1 off", []string{hopper}, "guest.gpu-mode"},
		{"devtools", "1/1 devtools", []string{hopper}, "guest.gpu-mode"},
		{"ready before anybody looked", "1/1 ready", []string{hopper}, "guest.gpu-ready-early"},
		{"another nonce", "1/1 nonce=" + strings.Repeat("00", 32), []string{hopper}, "guest.gpu-evidence"},
		{"no nonce", "1/1 nonce=x", []string{hopper}, "guest.gpu-evidence"},
		{"one GPU's report twice", "2/2 report=x", []string{hopper, hopper}, "guest.gpu-evidence"},
		{"the helper dies", "dies", []string{hopper}, "guest.gpu-helper"},
		{"the helper floods", "floods", []string{hopper}, "guest.gpu-helper"},
		{"the helper says more than asked", "babbles", []string{hopper}, "guest.gpu-helper"},
		{"the helper prints what is no answer", "garbage", []string{hopper}, "guest.gpu-helper"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := machine(t, c.helper, append(c.functions, network)...)
			want := 1
			if strings.HasPrefix(c.helper, "2/2 ") {
				want = 2
			}
			s, err := m.Open(t.Context(), want)
			if err == nil {
				_, err = s.Evidence(t.Context(), [contract.ReportDataSize]byte{})
				err = errors.Join(err, s.Close())
			}
			if code(err) != c.want {
				t.Errorf("%v, want %s", err, c.want)
			}
		})
	}
}

func TestDeviceFilesHaveTheDriversNumbers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		devices string
		want    []node
	}{
		{"Character devices:\n195 nvidia-frontend\n511 nvidia-uvm\n", []node{{"nvidiactl", 195, 255}, {"nvidia-uvm", 511, 0}, {"nvidia0", 195, 0}}},
		{"Character devices:\n 195 nvidia\n 510 nvidia-uvm\n\nBlock devices:\n 9 nvidia\n", []node{{"nvidiactl", 195, 255}, {"nvidia-uvm", 510, 0}, {"nvidia0", 195, 0}}},
		{"Character devices:\n195 nvidia\n", nil},
		{"Character devices:\n511 nvidia-uvm\n", nil},
		{"Character devices:\n99999 nvidia\n1 nvidia-uvm\n", nil},
		{"Block devices:\n195 nvidia\n511 nvidia-uvm\n", nil},
	} {
		if got := planNodes(c.devices, 1); !slices.Equal(got, c.want) {
			t.Errorf("%q: %v", c.devices, got)
		}
	}
}

func TestADriverThatDidNotComeUpIsToldWithItsReason(t *testing.T) {
	t.Parallel()
	m := machine(t, "1/1", hopper)
	m.Driver = errors.New("required key not available")
	if err := os.WriteFile(filepath.Join(m.Proc, "devices"), []byte("Character devices:\n  1 mem\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Open(t.Context(), 1); code(err) != "guest.gpu-driver" || !errors.Is(err, m.Driver) {
		t.Error(err)
	}
}

func TestAHelperThatHangsIsEndedAndNotAskedAgain(t *testing.T) {
	t.Parallel()
	m := machine(t, "hangs", hopper)
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("too slow"))
	defer cancel()
	if _, err := m.Open(ctx, 1); code(err) != "guest.gpu-helper" || !strings.Contains(fmt.Sprint(errors.Unwrap(contract.AsRefusal(err)), err), "too slow") {
		t.Error(err)
	}
}

func TestAnOrderThatTakesTooLongEndsTheHelper(t *testing.T) {
	t.Parallel()
	m := machine(t, "hangs", hopper)
	s, err := m.start(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.order(50*time.Millisecond, request{Order: orderState}); code(err) != "guest.gpu-helper" || !strings.Contains(fmt.Sprint(s.broken), "after 50ms") {
		t.Error(err, s.broken)
	}
	if _, err := s.ask(t.Context(), time.Minute, request{Order: orderState}); code(err) != "guest.gpu-helper" {
		t.Errorf("asked again: %v", err)
	}
}

// Whoever asks for evidence from afar must not be able to end the session with
// the GPUs by hanging up.
func TestAVerifierThatHangsUpDoesNotEndTheHelper(t *testing.T) {
	t.Parallel()
	gate := filepath.Join(t.TempDir(), "gate")
	if err := unix.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := machine(t, "1/1 gate="+gate, hopper).Open(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close() //nolint:errcheck // asserted elsewhere
	ctx, hangUp := context.WithCancelCause(t.Context())
	gone := make(chan error, 1)
	go func() {
		_, err := s.Evidence(ctx, [contract.ReportDataSize]byte{1})
		gone <- err
	}()
	// Opens once the helper is at it.
	open, err := os.OpenFile(gate, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	hangUp(errors.New("hung up"))
	if err := <-gone; code(err) != "guest.gpu-helper" {
		t.Errorf("the caller that gave up got %v", err)
	}
	// While that order lasts, others wait, and may give up as well.
	if _, err := s.Evidence(ctx, [contract.ReportDataSize]byte{2}); err == nil {
		t.Error("an answer before the order was carried out")
	}
	if err := open.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := s.Evidence(t.Context(), [contract.ReportDataSize]byte{3})
	if err != nil {
		t.Fatal(err)
	}
	want := contract.GPUNonce([contract.ReportDataSize]byte{3})
	if gpus, err := contract.ParseGPUEvidence(data); err != nil || gpus[0].Nonce != hex.EncodeToString(want[:]) {
		t.Errorf("the next caller got %s, %v", data, err)
	}
}

func TestGPUsThatDoNotBecomeReadyAreRefused(t *testing.T) {
	t.Parallel()
	for helper, want := range map[string]string{"1/1 ready-refuses": "guest.gpu-helper", "1/1 ready-pretends": "guest.gpu-not-ready"} {
		s, err := machine(t, helper, hopper).Open(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Ready(t.Context()); code(err) != want {
			t.Errorf("%s: %v, want %s", helper, err, want)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestAGPUThatCameLaterIsNotMadeReady(t *testing.T) {
	t.Parallel()
	m := machine(t, "1/1", hopper, network)
	s, err := m.Open(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close() //nolint:errcheck // asserted elsewhere
	if err := os.WriteFile(filepath.Join(m.Sysfs, "bus/pci/devices/0000:01:00.0/class"), []byte("0x030200"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.Sysfs, "bus/pci/devices/0000:01:00.0/vendor"), []byte("0x10de"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Ready(t.Context()); code(err) != "guest.gpu-count" {
		t.Error(err)
	}
}

func TestTheHelperAnswersWhatItIsAskedOnly(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	orders := `{"order":"state"}
{"order":"evidence","nonce":"zz"}
{"order":"dance"}
not json
{"order":"ready"}
{"order":"ready"}
`
	d := &fakeDriver{count: 1, evidence: 1, state: State{ConfidentialComputing: true}}
	if err := Serve(strings.NewReader(orders), &out, d); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 6 || !d.state.Ready {
		t.Fatalf("%q", lines)
	}
	for i, failed := range []bool{false, true, true, true, false, true} {
		if strings.Contains(lines[i], "error") != failed {
			t.Errorf("answer %d is %s", i, lines[i])
		}
	}
	if err := Serve(strings.NewReader(strings.Repeat("x", maxLine+1)), &out, d); err == nil {
		t.Error("a line without end is read")
	}
}

func FuzzParseResponse(f *testing.F) {
	f.Add("state", []byte(`{"state":{"gpus":1,"confidential_computing":true,"devtools":false,"ready":false}}`))
	f.Add("evidence", []byte(`{"evidence":[{"arch":"HOPPER","nonce":"00","evidence":"AA==","certificate":"AA=="}]}`))
	f.Add("ready", []byte(`{}`))
	f.Add("ready", []byte(`{"error":"Invalid State"}`))
	f.Fuzz(func(t *testing.T, order string, line []byte) {
		r, err := parseResponse(order, line)
		if err == nil && r.Error == "" && (r.State != nil) != (order == orderState) {
			t.Errorf("%q: %+v", order, r)
		}
	})
}
