package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/tests/emulator/gpu"
)

// rented are the slots that the agent manages.
func rented() []string { return []string{"h100a", "h100b", "b200"} }

// driver is what a device is bound to, "" for nothing.
func (w *world) driver(ctx context.Context, id string) (string, error) {
	return w.sh(ctx, quick, fmt.Sprintf("basename $(readlink /sys/bus/pci/devices/%s/driver) 2>/dev/null || true", w.address[id]))
}

// sight is a device as the agent, the device itself and the kernel see it.
type sight struct {
	mode   string
	device gputest.State
	driver string
}

// sighted waits until the agent has a device in a state, and looks at it.
func (w *world) sighted(ctx context.Context, id, state string) (s sight, err error) {
	if err := w.becomes(ctx, id, state); err != nil {
		return s, err
	}
	g, err := w.gpu(ctx, id)
	if err != nil {
		return s, err
	}
	s.mode = g.Mode
	if s.device, err = w.inside(ctx, id); err != nil {
		return s, err
	}
	s.driver, err = w.driver(ctx, id)
	return s, err
}

// onDuty demands that a device is the agent's, clean, with CC on, as the agent
// says and as the device itself and the kernel do.
func (w *world) onDuty(ctx context.Context, id string) error {
	s, err := w.sighted(ctx, id, "clean")
	if err == nil && (s.mode != "on" || !s.device.CC || s.device.Devtools || s.device.PPCIe || s.driver != "vfio-pci") {
		err = fmt.Errorf("%s is not on duty: %+v", id, s)
	}
	return err
}

// offDuty demands that a device is its driver's again, with CC off.
func (w *world) offDuty(ctx context.Context, id, want string) error {
	s, err := w.sighted(ctx, id, "unmanaged")
	if err == nil && (s.device.CC || s.device.Knobs[8] != 0 || s.driver != want) {
		err = fmt.Errorf("%s is not off duty, on driver %q: %+v", id, want, s)
	}
	return err
}

// reset orders a reset, which must bring a device back on duty.
func (w *world) reset(ctx context.Context, id string) error {
	if _, err := w.sh(ctx, slow, "nodeagent gpu reset "+w.address[id]); err != nil {
		return err
	}
	return w.onDuty(ctx, id)
}

// originalDriver is what the first Hopper is bound to before the agent comes.
const originalDriver = "pci-stub"

func takeAll(ctx context.Context, w *world) error {
	if _, err := w.sh(ctx, quick, fmt.Sprintf("modprobe pci-stub && echo %s >/sys/bus/pci/devices/%[2]s/driver_override && echo %[2]s >/sys/bus/pci/drivers_probe", originalDriver, w.address["h100a"])); err != nil {
		return err
	}
	var addresses []string
	for _, id := range rented() {
		addresses = append(addresses, w.address[id])
	}
	if err := w.manage(ctx, addresses...); err != nil {
		return err
	}
	// A fresh kernel has not loaded the driver; the package's file has it loaded.
	if err := w.finds(ctx, "h100a", "vfio.no-driver"); err != nil {
		return err
	}
	if _, err := w.sh(ctx, quick, "cp /opt/rig/modules-load.conf /etc/modules-load.d/nodeagent.conf && systemctl restart systemd-modules-load"); err != nil {
		return err
	}
	// QEMU's IOMMU remaps no interrupts as far as this kernel is concerned. The
	// emulated GPUs send none, so that it may be told to let that pass.
	if err := w.becomes(ctx, "b200", "quarantined"); err != nil {
		return err
	}
	for _, id := range rented() {
		g, err := w.gpu(ctx, id)
		if err != nil {
			return err
		}
		if g.Quarantine == nil || g.Quarantine.Code != "vfio.interrupts-not-isolated" {
			return fmt.Errorf("%s: want vfio.interrupts-not-isolated, the agent says %s, %+v", id, g.State, g.Quarantine)
		}
	}
	if _, err := w.sh(ctx, quick, "echo 1 >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"); err != nil {
		return err
	}
	for _, id := range rented() {
		if err := w.reset(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// resets resets each device behind the agent's back and reads its mode.
func resets(ctx context.Context, w *world) error {
	for _, id := range rented() {
		for _, method := range []string{"flr", "bus"} {
			before, err := w.inside(ctx, id)
			if err != nil {
				return err
			}
			mode, err := w.sh(ctx, slow, fmt.Sprintf("cd /sys/bus/pci/devices/%[1]s && cp reset_method /tmp/method && echo %[2]s >reset_method && echo 1 >reset && cat /tmp/method >reset_method && /opt/rig/hostvm mode vfio %[1]s query", w.address[id], method))
			if err != nil {
				return err
			}
			after, err := w.inside(ctx, id)
			if err != nil {
				return err
			}
			if mode != "on" || after.Resets == before.Resets {
				return fmt.Errorf("%s after %s: mode %s, %d resets", id, method, mode, after.Resets-before.Resets)
			}
		}
	}
	return nil
}

func switchModes(ctx context.Context, w *world) error {
	if _, err := w.sh(ctx, quick, "systemctl stop nodeagent"); err != nil {
		return err
	}
	for _, id := range rented() {
		for _, want := range []string{"off", "devtools", "on"} {
			got, err := w.sh(ctx, slow, fmt.Sprintf("/opt/rig/hostvm mode vfio %s %s", w.address[id], want))
			if err != nil {
				return err
			}
			state, err := w.inside(ctx, id)
			if err != nil {
				return err
			}
			if got != want || state.CC != (want != "off") || state.Devtools != (want == "devtools") {
				return fmt.Errorf("%s: want %s, read %s, the device is %+v", id, want, got, state)
			}
		}
	}
	_, err := w.sh(ctx, quick, "systemctl start nodeagent")
	return err
}

// stagedDevtools is somebody at the BMC.
func stagedDevtools(ctx context.Context, w *world) error {
	const id, devtools = "h100b", 6
	if err := w.onDuty(ctx, id); err != nil {
		return err
	}
	if _, err := gpu.Command(ctx, w.control(id), gpu.Order{Do: "knob", Knob: devtools, Value: 1}); err != nil {
		return err
	}
	return w.reset(ctx, id)
}

// killEverywhere has the agent killed at every point of a device's release and
// of its way back on duty; the restarted one brings each to its end.
func killEverywhere(ctx context.Context, w *world) error {
	const id = "b200"
	if err := w.onDuty(ctx, id); err != nil {
		return err
	}
	ways := []struct {
		order string
		steps []string
		there func() error
	}{
		{"release --accept-consequences", []string{"off", "return"}, func() error { return w.offDuty(ctx, id, "") }},
		{"reset", []string{"bind", "verify"}, func() error { return w.onDuty(ctx, id) }},
	}
	var errs []error
	for i := range 2 {
		for _, at := range []string{"begun", "inside", "did", "done"} {
			for _, way := range ways {
				point := at + ":" + way.steps[i]
				if err := w.settled(ctx); err != nil {
					return fmt.Errorf("before %s: %w", point, err)
				}
				if err := w.killedAt(ctx, point, fmt.Sprintf("nodeagent gpu %s %s", way.order, w.address[id])); err != nil {
					return err
				}
				if err := way.there(); err != nil {
					return fmt.Errorf("killed at %s: %w", point, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// killedAt gives an order during which the agent dies at a point, and waits
// until systemd has started the next one.
func (w *world) killedAt(ctx context.Context, point, order string) error {
	_, err := w.sh(ctx, slow, fmt.Sprintf(`
pid() { systemctl show -P MainPID nodeagent; }
old=$(pid)
echo '%s=kill' >/run/failpoints
%s >/tmp/order 2>&1 &
for i in $(seq 300); do
	[ -d /proc/$old ] || { : >/run/failpoints; break; }
	sleep 0.2
done
[ -d /proc/$old ] && { : >/run/failpoints; echo "not killed" >&2; cat /tmp/order >&2; exit 1; }
for i in $(seq 300); do
	nodeagent gpu list >/dev/null 2>&1 && exit 0
	sleep 0.2
done
journalctl -u nodeagent -n 20 --no-pager >&2
exit 1`, point, order))
	if err != nil {
		return fmt.Errorf("%s: %w", point, err)
	}
	return nil
}

func hangFSP(ctx context.Context, w *world) error {
	for _, id := range []string{"h100b", "b200"} {
		if err := w.broken(ctx, id, gputest.Faults{FSPSilent: true}); err != nil {
			return err
		}
		if err := w.refused(ctx, "gpu.fsp-silent", "nodeagent gpu reset "+w.address[id]); err != nil {
			return err
		}
		if err := w.becomes(ctx, id, "quarantined"); err != nil {
			return err
		}
		if err := w.broken(ctx, id, gputest.Faults{}); err != nil {
			return err
		}
		if err := w.reset(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

func unplug(ctx context.Context, w *world) error {
	const id = "h100b"
	limited, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	if err := w.qmp.unplug(limited, id); err != nil {
		return err
	}
	if err := w.refused(ctx, "vfio.no-device", "nodeagent gpu reset "+w.address[id]); err != nil {
		return err
	}
	for _, s := range slots() {
		if s.id == id {
			if err := w.qmp.do(limited, "device_add", json.RawMessage(s.json(w.dir))); err != nil {
				return err
			}
		}
	}
	back := fmt.Sprintf("for i in $(seq 150); do [ -e /sys/bus/pci/devices/%s ] && exit 0; sleep 0.2; done; exit 1", w.address[id])
	if _, err := w.sh(ctx, quick, back); err != nil {
		return err
	}
	return w.reset(ctx, id)
}

func held(ctx context.Context, w *world) error {
	const id = "h100a"
	if err := w.onDuty(ctx, id); err != nil {
		return err
	}
	const wait = `for i in $(seq 150); do journalctl -u holder --no-pager -o cat | grep -q held && exit 0; sleep 0.2; done; exit 1`
	if _, err := w.sh(ctx, slow, fmt.Sprintf("systemd-run -q --unit=holder /opt/rig/hostvm hold %s; %s", w.address[id], wait)); err != nil {
		return err
	}
	before, err := w.inside(ctx, id)
	if err != nil {
		return err
	}
	if err := w.refused(ctx, "vfio.busy", "/opt/rig/hostvm mode vfio "+w.address[id]+" query"); err != nil {
		return err
	}
	// The agent gives the holder two minutes, then names it.
	if err := w.refused(ctx, "holder: hostvm", "nodeagent gpu reset "+w.address[id]); err != nil {
		return err
	}
	after, err := w.inside(ctx, id)
	if err != nil {
		return err
	}
	if before.Resets != after.Resets {
		return fmt.Errorf("reset %d times while somebody has it", after.Resets-before.Resets)
	}
	if _, err := w.sh(ctx, slow, "systemctl stop holder; nodeagent gpu reset "+w.address[id]); err != nil {
		return err
	}
	return w.onDuty(ctx, id)
}

const guestScript = `set -e
mkdir -p /run/guest/root && cd /run/guest/root
cp /opt/rig/hostvm init
echo init | cpio --quiet -o -H newc >../initrd
cp /opt/rig/vmlinuz ..
for name in guest second; do
	cat >../$name.xml <<XML
<domain type='qemu'>
  <name>$name</name>
  <memory unit='MiB'>512</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><kernel>/run/guest/vmlinuz</kernel><initrd>/run/guest/initrd</initrd><cmdline>console=ttyS0 quiet</cmdline></os>
  <features><acpi/></features>
  <cpu mode='custom'><model>qemu64</model></cpu>
  <on_reboot>destroy</on_reboot>
  <devices>
    <controller type='usb' model='none'/>
    <hostdev mode='subsystem' type='pci' managed='no'><source><address domain='0x$1' bus='0x$2' slot='0x$3' function='0x$4'/></source></hostdev>
    <serial type='file'><source path='/run/guest/$name.log'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
XML
done
chmod -R a+rX /run/guest
virsh -q create ../guest.xml`

// guestEnds waits until the guest has ended, and demands what it saw.
const guestEnds = `for i in $(seq 800); do virsh -q domstate guest >/dev/null 2>&1 || break; sleep 1; done
grep -q 'guest sees 0x10de 0x2330 class 0x030200' /run/guest/guest.log && exit 0
virsh list --all >&2; tail -n 20 /run/guest/guest.log >&2; exit 1`

func nestedGuest(ctx context.Context, w *world) error {
	const id = "h100a"
	if err := w.onDuty(ctx, id); err != nil {
		return err
	}
	parts := strings.FieldsFunc(w.address[id], func(r rune) bool { return r == ':' || r == '.' })
	if _, err := w.sh(ctx, slow, "set -- "+strings.Join(parts, " ")+"\n"+guestScript); err != nil {
		return err
	}
	if err := w.refused(ctx, "in use", "virsh -q create /run/guest/second.xml"); err != nil {
		return err
	}
	if err := w.refused(ctx, "vfio.busy", "/opt/rig/hostvm mode vfio "+w.address[id]+" query"); err != nil {
		return err
	}
	if _, err := w.sh(ctx, nested, guestEnds); err != nil {
		return err
	}
	return w.reset(ctx, id)
}

func release(ctx context.Context, w *world) error {
	for _, id := range rented() {
		if _, err := w.sh(ctx, slow, "nodeagent gpu release --accept-consequences "+w.address[id]); err != nil {
			return err
		}
		want := ""
		if id == "h100a" {
			want = originalDriver
		}
		if err := w.offDuty(ctx, id, want); err != nil {
			return err
		}
	}
	return nil
}
