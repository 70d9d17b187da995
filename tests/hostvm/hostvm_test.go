package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// What the devices' ports say decides what the kernel makes of them.
func TestEachGPUHasAPortOfItsOwnAndTwoDevicesShareOne(t *testing.T) {
	t.Parallel()
	args := arguments("/image", "/run")
	on := map[string][]string{} // devices by bus
	for i, a := range args {
		if a != "-device" || !strings.HasPrefix(args[i+1], "{") {
			continue
		}
		var d struct{ Driver, ID, Bus, Addr string }
		if err := json.Unmarshal([]byte(args[i+1]), &d); err != nil {
			t.Fatal(err)
		}
		on[d.Bus] = append(on[d.Bus], d.ID+" "+d.Driver)
	}
	want := map[string]string{
		"port-10.0": "h100a vfio-user-pci", "port-11.0": "h100b vfio-user-pci", "port-12.0": "b200 vfio-user-pci",
		"bridge-13.0": "mixed vfio-user-pci,card e1000",
	}
	for bus, devices := range want {
		if got := strings.Join(on[bus], ","); got != devices {
			t.Errorf("on %s: %q, want %q", bus, got, devices)
		}
		port := strings.TrimPrefix(strings.TrimPrefix(bus, "bridge-"), "port-")
		if n := strings.Count(strings.Join(args, " "), "pcie-root-port,id=port-"+port+","); n != 1 {
			t.Errorf("%d root ports at %s", n, port)
		}
	}
	if len(on) != len(want) {
		t.Errorf("buses %v", on)
	}
}

func TestTheIOMMUComesBeforeEveryDevice(t *testing.T) {
	t.Parallel()
	args := arguments("/image", "/run")
	if first := slices.Index(args, "-device"); first < 0 || args[first+1] != "amd-iommu,dma-remap=on" {
		t.Errorf("the first device is %q: what comes before the IOMMU is not behind it", args[first+1])
	}
}

func TestStepsNobodyAskedForAreLeftOutAndFailuresCount(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	err := report(&out, []outcome{
		{name: "boots", ran: true, took: 1500 * time.Millisecond}, {name: "not asked for"}, {name: "breaks", ran: true, err: errors.New("no")},
	}, 3*time.Second)
	if err == nil || err.Error() != "1 steps failed" {
		t.Errorf("error is %v", err)
	}
	for _, want := range []string{"ok        1.5      boots\n", "left out  -        not asked for\n", "FAILED    0.0      breaks\n", "2 of 3 steps ran in 3 s, 1 failed\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if err := report(&out, []outcome{{name: "boots", ran: true}}, 0); err != nil {
		t.Error(err)
	}
}

func TestAnOrderIsAnsweredWhateverItsScriptDoes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		script string
		limit  time.Duration
		want   result
	}{
		{"echo out; echo err >&2", time.Minute, result{Out: "out\n", Err: "err\n"}},
		{"exit 7", time.Minute, result{Code: 7}},
		{"sleep 60", 50 * time.Millisecond, result{Code: -1, Err: " (not done after 50ms)"}},
		{"sleep 60 & echo left", time.Minute, result{Out: "left\n", Code: -1, Err: "exec: WaitDelay expired before I/O complete"}},
	} {
		if got := carryOut(t.Context(), order{Script: c.script, Limit: c.limit}); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.script, got, c.want)
		}
	}
	if got := tail(strings.Repeat("a", outputLimit) + "end"); len(got) != outputLimit || !strings.HasSuffix(got, "aend") {
		t.Errorf("%d bytes, which end in %q", len(got), got[len(got)-4:])
	}
}

// monitor answers as QEMU does: events come between a command and its reply.
func monitor(t *testing.T, replies ...string) *qmp {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp")
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close() //nolint:errcheck // the test is over
		in := json.NewDecoder(conn)
		for _, reply := range append([]string{`{"QMP": {"version": {}}} {"return": {}}`}, replies...) {
			var command json.RawMessage
			if in.Decode(&command) != nil {
				return
			}
			if _, err := conn.Write([]byte(reply + "\r\n")); err != nil {
				return
			}
		}
	}()
	q, err := dialQMP(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close() })
	return q
}

func TestUnpluggingWaitsForTheDeviceItself(t *testing.T) {
	t.Parallel()
	const deleted = `{"event": "DEVICE_DELETED", "data": {"device": %q}}`
	q := monitor(t, `{"return": {}} `+strings.Replace(deleted, "%q", `"b200"`, 1))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := q.unplug(ctx, "h100a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("another device went, and unplugging ended with %v", err)
	}
	q = monitor(t, strings.Replace(deleted, "%q", `"h100a"`, 1)+` {"return": {}}`, `{"error": {"class": "DeviceNotFound", "desc": "no such device"}}`)
	if err := q.unplug(t.Context(), "h100a"); err != nil {
		t.Error(err)
	}
	if err := q.unplug(t.Context(), "h100a"); err == nil || err.Error() != "device_del: DeviceNotFound: no such device" {
		t.Errorf("error is %v", err)
	}
	if err := q.unplug(t.Context(), "h100a"); err == nil {
		t.Error("a monitor that has ended answers")
	}
}
