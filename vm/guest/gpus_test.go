package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/spdm"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
	"github.com/confidential-node/agent/vm/guest/gpu"
)

// helperEnv makes this test's binary the GPUs' helper: how many GPUs the driver
// has, how many give evidence, the file that says it was made ready, and what
// is wrong with it, if anything.
const helperEnv = "GUEST_TEST_HELPER"

func TestMain(m *testing.M) {
	if how := os.Getenv(helperEnv); how != "" {
		if err := helper(how); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func helper(how string) error {
	d := &emulatedDriver{}
	var made int
	if _, err := fmt.Sscanf(how, "%d %d %s %s", &d.count, &made, &d.ready, &d.wrong); err != nil {
		return err
	}
	authority, err := spdmtest.NewAuthority(time.Now())
	if err != nil {
		return err
	}
	for i := range made {
		g, err := authority.NewGPU(spdmtest.Config{PDI: spdm.PDI(i + 1)})
		if err != nil {
			return err
		}
		d.gpus = append(d.gpus, g)
	}
	return gpu.Serve(os.Stdin, os.Stdout, d)
}

// emulatedDriver has EMULATED GPUs, which sign as real ones do.
type emulatedDriver struct {
	count int
	gpus  []*spdmtest.GPU
	ready string
	wrong string
}

// Faults of the driver and the helper, once the state was told.
const (
	nothing     = "nothing"
	otherNonce  = "other-nonce"
	duplicate   = "duplicate"
	dies        = "dies"
	floods      = "floods"
	garbage     = "garbage"
	notReady    = "not-ready"
	onlyPretend = "only-pretends"
)

func (d *emulatedDriver) State() (gpu.State, error) {
	_, err := os.Stat(d.ready)
	return gpu.State{GPUs: d.count, ConfidentialComputing: true, Ready: err == nil}, nil
}

func (d *emulatedDriver) Evidence(nonce [contract.GPUNonceBytes]byte) (out []contract.GPUEvidence, _ error) {
	switch d.wrong {
	case dies:
		os.Exit(0)
	case garbage:
		fmt.Println("NVRM: Xid 79")
	case floods:
		for {
			if _, err := os.Stdout.WriteString(strings.Repeat("x", 1<<16)); err != nil {
				os.Exit(1)
			}
		}
	case otherNonce:
		nonce[0]++
	}
	for _, g := range d.gpus {
		if d.wrong == duplicate && len(out) > 0 {
			out = append(out, out[0])
			continue
		}
		e, err := g.Evidence(nonce)
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, nil
}

func (d *emulatedDriver) Ready() error {
	switch d.wrong {
	case notReady:
		return errors.New("NVML error 3")
	case onlyPretend:
		return nil
	}
	return os.WriteFile(d.ready, nil, 0o600)
}

// withGPUs gives the guest a bus with so many GPUs, and a driver that has and
// vouches for so many.
func (s *stage) withGPUs(wanted, bus, driver, evidence int, wrong string) (ready string) {
	s.t.Helper()
	s.manifest.GPU = &contract.GPU{Model: "H100", Count: wanted}
	dir := s.t.TempDir()
	ready = filepath.Join(dir, "ready")
	for _, name := range []string{"proc", "dev", "sys/bus/pci/devices"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
	files := map[string]string{"proc/devices": "Character devices:\n195 nvidia\n510 nvidia-uvm\n", "dev/nvidiactl": "", "dev/nvidia-uvm": ""}
	for i := range wanted {
		files[fmt.Sprintf("dev/nvidia%d", i)] = ""
	}
	for i := range bus {
		function := fmt.Sprintf("sys/bus/pci/devices/0000:%02x:00.0/", i)
		files[function+"vendor"], files[function+"class"] = "0x10de\n", "0x030200\n"
		if err := os.MkdirAll(filepath.Join(dir, function), 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	s.g.driverFolder = "/gpu"
	s.g.openGPUs = gpu.Machine{
		Sysfs: filepath.Join(dir, "sys"), Proc: filepath.Join(dir, "proc"), Dev: filepath.Join(dir, "dev"),
		Helper: []string{os.Args[0]}, Env: []string{fmt.Sprintf("%s=%d %d %s %s", helperEnv, driver, evidence, ready, wrong)},
	}.Open
	return ready
}

func TestAGuestWithGPUsProvesThemBeforeItsSecretsCome(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	ctx := deadline(t)
	ready := s.withGPUs(2, 2, 2, 2, nothing)
	s.g.linger = 30 * time.Second
	s.run(ctx)
	s.await(ctx, "the workload", func() bool { return s.status(contract.PhaseRunning) != nil })
	if _, err := os.Stat(ready); err != nil {
		t.Errorf("the GPUs take no work: %v", err)
	}
	nonce := bytes.Repeat([]byte{9}, 32)
	s.challenges <- contract.Challenge{ID: "c1", Nonce: nonce}
	s.await(ctx, "evidence", func() bool { return s.evidence["c1"] != nil })
	e := s.verify(s.evidence["c1"], nonce) // REPORT_DATA covers the GPUs' evidence
	gpus, err := contract.ParseGPUEvidence(e.GPUEvidence)
	if err != nil || len(gpus) != 2 {
		t.Fatalf("%d GPUs, %v", len(gpus), err)
	}
	want := contract.GPUNonce(contract.EvidenceReportData(nonce, e.TLSSPKI, e.ResultKey, nil))
	if gpus[0].Nonce != hex.EncodeToString(want[:]) {
		t.Error("the GPUs answer another nonce than the verifier's and the guest's keys lead to")
	}
	var devices []string
	for _, d := range s.fake.spec.Devices {
		devices = append(devices, filepath.Base(d))
	}
	if got := strings.Join(devices, " "); got != "nvidiactl nvidia-uvm nvidia0 nvidia1" || s.fake.spec.Driver != "/gpu" {
		t.Errorf("the workload gets the devices %s, the driver %q", got, s.fake.spec.Driver)
	}
	s.fake.end(0)
	if err := <-s.err; err != nil {
		t.Fatal(err)
	}
}

func TestAGuestWhoseGPUsAreNotItsManifestsEndsWithoutSecrets(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name                          string
		wanted, bus, driver, evidence int
		wrong                         string
		refuse                        bool
		code                          string
	}{
		{"none on the bus", 1, 0, 1, 1, nothing, false, "guest.gpu-count"},
		{"one more on the bus", 1, 2, 2, 2, nothing, false, "guest.gpu-count"},
		{"one less in the driver", 2, 2, 1, 1, nothing, false, "guest.gpu-count"},
		{"one more in the driver", 1, 1, 2, 2, nothing, false, "guest.gpu-count"},
		{"one less gives evidence", 2, 2, 2, 1, nothing, false, "guest.gpu-count"},
		{"one more gives evidence", 1, 1, 1, 2, nothing, false, "guest.gpu-count"},
		{"nothing gives evidence", 1, 1, 1, 0, nothing, false, "guest.gpu-helper"},
		{"they answer another nonce", 1, 1, 1, 1, otherNonce, false, "guest.gpu-evidence"},
		{"one answers for two", 2, 2, 2, 2, duplicate, false, "guest.gpu-evidence"},
		{"the helper dies", 1, 1, 1, 1, dies, false, "guest.gpu-helper"},
		{"the helper floods", 1, 1, 1, 1, floods, false, "guest.gpu-helper"},
		{"the helper prints what is no answer", 1, 1, 1, 1, garbage, false, "guest.gpu-helper"},
		{"the broker does not believe them", 1, 1, 1, 1, nothing, true, "guest.broker-refused"},
		{"they refuse to take work", 1, 1, 1, 1, notReady, false, "guest.gpu-helper"},
		{"they only pretend to take work", 1, 1, 1, 1, onlyPretend, false, "guest.gpu-not-ready"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t)
			ready := s.withGPUs(c.wanted, c.bus, c.driver, c.evidence, c.wrong)
			if c.refuse {
				s.refuse = contract.Refuse("broker.gpus", "r", "not believed")
			}
			s.fake.end(0)
			s.run(deadline(t))
			err := <-s.err
			if err == nil || contract.AsRefusal(err).Code != c.code {
				t.Errorf("%v, want %s", err, c.code)
			}
			if _, err := os.Stat(ready); !errors.Is(err, os.ErrNotExist) {
				t.Error("the GPUs were told to take work")
			}
			if len(s.g.secrets) > 0 {
				t.Error("secrets came")
			}
		})
	}
}

func TestAGuestThatIsStoppedLetsItsHelperGo(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.withGPUs(1, 1, 1, 1, nothing)
	s.g.stop()
	s.run(deadline(t))
	if err := <-s.err; err == nil || contract.AsRefusal(err).Code != "guest.stopped" {
		t.Error(err)
	}
	if _, err := s.g.gpus.Evidence(context.Background(), [contract.ReportDataSize]byte{}); s.g.gpus != nil && err == nil {
		t.Error("the helper still answers")
	}
}
