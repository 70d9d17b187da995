package libvirt_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/domain"
	"github.com/confidential-node/agent/vm/libvirt"
	"github.com/confidential-node/agent/vm/libvirt/libvirttest"
)

// run starts a driver and ends it with the test.
func run(t *testing.T, uri string) *libvirt.Driver {
	t.Helper()
	d := libvirt.New(uri, hclog.NewNullLogger())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("driver: %v", err)
		}
	})
	return d
}

// testURI is libvirt's own driver for tests.
const testURI = "test:///default"

func connected(t *testing.T) *libvirt.Driver {
	t.Helper()
	d := run(t, testURI)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := d.WaitConnected(ctx); err != nil {
		if strings.Contains(err.Error(), "libvirt.so") {
			skip.Missing(t, "libvirt's client library")
		}
		t.Fatal(err)
	}
	return d
}

func testDomain(name, id, metadata string) string {
	return fmt.Sprintf(`<domain type='test'><name>%s</name><uuid>%s</uuid><metadata>%s</metadata><memory>1024</memory><os><type>hvm</type></os></domain>`, name, id, metadata)
}

func mark(id string, generation uint64) string {
	return fmt.Sprintf(`<guest xmlns='%s' id='%s' generation='%d'/>`, domain.MetadataNamespace, id, generation)
}

func TestConformanceOnLibvirtsTestDriver(t *testing.T) {
	d := connected(t)
	libvirttest.Conformance(t, libvirttest.World{
		Driver: d,
		Start: func(ctx context.Context, id string, generation uint64) error {
			return d.StartXML(ctx, id, generation, testDomain(vm.NamePrefix+id, id, mark(id, generation)))
		},
		Foreign: func(ctx context.Context, name, id string) (func() bool, error) {
			return func() bool { return d.Runs(t.Context(), id) }, d.CreateForeign(ctx, testDomain(name, id, ""))
		},
	})
}

func TestAMarkOfAnotherGuestIsNoMark(t *testing.T) {
	d := connected(t)
	const id, other = "11111111-2222-4333-8444-555555555511", "11111111-2222-4333-8444-555555555512"
	for name, metadata := range map[string]string{
		"another guest's": mark(other, 1), "no number": strings.Replace(mark(id, 1), "'1'", "'x'", 1), "empty": "",
	} {
		if err := d.CreateForeign(t.Context(), testDomain(vm.NamePrefix+id, id, metadata)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := d.Destroy(t.Context(), id); err == nil {
			t.Errorf("a domain whose mark is %s was destroyed", name)
		}
		d.DestroyForeign(t, id)
	}
}

func TestWhatLibvirtRefusesIsARefusalWithARemedy(t *testing.T) {
	d := connected(t)
	const id = "11111111-2222-4333-8444-555555555521"
	for name, text := range map[string]string{
		"no domain": "<domain/>",
		"an element that would be silently ignored": strings.Replace(testDomain(vm.NamePrefix+id, id, ""), "<os>", "<launchSecret/><os>", 1),
	} {
		err := d.StartXML(t.Context(), id, 1, text)
		if err == nil || !strings.Contains(err.Error(), "vm.start-failed") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestACallThatWasCalledOffStartsNothing(t *testing.T) {
	d := connected(t)
	const id = "11111111-2222-4333-8444-555555555541"
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 {
		if err := d.StartXML(ctx, id, 1, testDomain(vm.NamePrefix+id, id, mark(id, 1))); !errors.Is(err, context.Canceled) || errors.Is(err, libvirt.ErrStuck) {
			t.Fatalf("error is %v", err)
		}
	}
	if d.Runs(t.Context(), id) {
		t.Error("the domain was started all the same")
	}
}

func TestWithoutADaemonEveryCallSaysSo(t *testing.T) {
	t.Parallel()
	d := run(t, "qemu+unix:///system?socket="+filepath.Join(t.TempDir(), "none"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := d.WaitConnected(ctx); !errors.Is(err, libvirt.ErrNoConnection) {
		t.Errorf("waiting: %v", err)
	}
	found, err := d.List(t.Context())
	if !errors.Is(err, libvirt.ErrNoConnection) || found != nil {
		t.Errorf("listing: %+v, %v", found, err)
	}
	if err := d.Destroy(t.Context(), "11111111-2222-4333-8444-555555555531"); !errors.Is(err, libvirt.ErrNoConnection) {
		t.Errorf("silence is taken for a guest's end: %v", err)
	}
}

func TestOneQuestionNeedsNoDriver(t *testing.T) {
	t.Parallel()
	connected(t) // or the library is missing
	lib, hypervisor, err := libvirt.Probe(t.Context(), testURI, hclog.NewNullLogger())
	if err != nil || strings.Count(lib, ".") != 2 || strings.Count(hypervisor, ".") != 2 {
		t.Errorf("%q %q %v", lib, hypervisor, err)
	}
	if _, _, err := libvirt.Probe(t.Context(), "test:///none-of-that-name", hclog.NewNullLogger()); err == nil {
		t.Error("a driver that is not there has a version")
	}
}

func TestADomainIsReadBackWithTheDevicesAskedFor(t *testing.T) {
	d := connected(t)
	const id = "11111111-2222-4333-8444-555555555551"
	gpu := vm.PCIDevice{Address: "0000:18:00.0", Kind: vm.KindGPU}
	text := strings.Replace(testDomain(vm.NamePrefix+id, id, mark(id, 1)), "</domain>",
		`<devices><hostdev mode="subsystem" type="pci" managed="no"><source><address domain="0x0000" bus="0x18" slot="0x00" function="0x0"/></source></hostdev></devices></domain>`, 1)
	if err := d.StartXML(t.Context(), id, 1, text); err == nil || !strings.Contains(err.Error(), "vm.devices-differ") {
		t.Errorf("a device nobody asked for: %v", err)
	}
	if d.Runs(t.Context(), id) {
		t.Error("a refused guest runs")
	}
	if err := d.StartXML(t.Context(), id, 1, text, gpu); err != nil {
		t.Fatal(err)
	}
	if err := d.StartXML(t.Context(), id, 1, text); err == nil || !strings.Contains(err.Error(), "vm.devices-differ") {
		t.Errorf("a running guest with an unexpected device: %v", err)
	}
	if !d.Runs(t.Context(), id) {
		t.Error("a running guest was ended")
	}
	// What an agent that starts anew asks of a guest it adopts.
	if err := d.CheckDevices(t.Context(), id, []vm.PCIDevice{gpu}); err != nil {
		t.Errorf("the device it was given: %v", err)
	}
	if err := d.CheckDevices(t.Context(), id, nil); err == nil || !strings.Contains(err.Error(), "vm.devices-differ") {
		t.Errorf("an adopted guest with an unexpected device: %v", err)
	}
	d.DestroyForeign(t, id)
	if err := d.CheckDevices(t.Context(), id, nil); err == nil || strings.Contains(err.Error(), "vm.devices-differ") {
		t.Errorf("a guest that is gone has no other devices: %v", err)
	}
}

func TestTheCauseOfAnEndIsTold(t *testing.T) {
	d := connected(t)
	const id = "11111111-2222-4333-8444-555555555561"
	events, cancel := d.Subscribe()
	defer cancel()
	if err := d.StartXML(t.Context(), id, 1, testDomain(vm.NamePrefix+id, id, mark(id, 1))); err != nil {
		t.Fatal(err)
	}
	d.DestroyForeign(t, id)
	limit := time.After(10 * time.Second)
	for {
		select {
		case e := <-events:
			if e.GuestID != id || e.State != vm.StateGone {
				continue
			}
			if e.Cause != vm.CauseDestroyed {
				t.Errorf("%+v", e)
			}
			return
		case <-limit:
			t.Fatal("its end was not told")
		}
	}
}
