package main

import (
	"context"
	"fmt"
	"strings"
)

// step is one thing that a host lives through.
type step struct {
	name   string
	always bool // the others need it
	do     func(context.Context, *world) error
}

func steps() []step {
	return []step{
		{"agent and control plane are installed as a package would", true, install},
		{"the kernel gives each GPU a group of its own, and two devices one together", true, findGroups},
		{"the agent finds the GPUs and takes none", false, discover},
		{"a GPU that shares its group is refused in words", false, sharedGroup},
		{"GPUs are bound to vfio-pci, CC is on and read back", true, takeAll},
		{"CC survives a function reset and a bus reset", false, resets},
		{"modes are switched through VFIO: off, devtools, on", false, switchModes},
		{"a staged devtools mode does not pass", false, stagedDevtools},
		{"the agent dies at every point of a GPU's way out and back", false, killEverywhere},
		{"an FSP that hangs ends in quarantine, and the way back works", false, hangFSP},
		{"a GPU is pulled out and put back", false, unplug},
		{"a device that somebody holds is refused, and not reset", false, held},
		{"a guest in the host gets the GPU and sees its ids; a second is refused", false, nestedGuest},
		{"GPUs go back to their driver with CC off", false, release},
	}
}

const installScript = `set -e
ip link set lo up
install -m 755 /opt/rig/nodeagent /usr/bin/nodeagent
install -m 644 /opt/rig/nodeagent.service /etc/systemd/system/
mkdir -p /etc/nodeagent/conf.d /usr/share/nodeagent/images /etc/systemd/system/nodeagent.service.d
printf '[Unit]\nStartLimitIntervalSec=0\n[Service]\nEnvironment=NODEAGENT_FAILPOINTS=/run/failpoints\n' >/etc/systemd/system/nodeagent.service.d/rig.conf
touch /run/failpoints
printf '[policy]\nreserve_memory_mib = 1024\n' >/etc/nodeagent/conf.d/host.toml
systemd-run -q --unit=controlplane /opt/rig/controlplane --dir /var/lib/cp serve
for i in $(seq 60); do
	/opt/rig/controlplane --dir /var/lib/cp enrol provider --out /etc/nodeagent >/etc/nodeagent/agent.toml 2>/tmp/enrol && break
	sleep 1
done
chmod 600 /etc/nodeagent/agent.toml
cat /tmp/enrol >&2
systemctl daemon-reload

`

func install(ctx context.Context, w *world) error {
	_, err := w.sh(ctx, slow, installScript)
	return err
}

// findGroups notes where each slot's device is in the host.
func findGroups(ctx context.Context, w *world) error {
	groups := map[string]string{}
	for _, s := range slots() {
		text, err := w.sh(ctx, quick, fmt.Sprintf("cd /sys/bus/pci/devices && basename %[1]s && basename $(readlink %[1]s/iommu_group)", s.sysfs()))
		if err != nil {
			return err
		}
		lines := strings.Fields(text)
		if len(lines) != 2 {
			return fmt.Errorf("where %s is plugged in: %q", s.id, lines)
		}
		w.address[s.id], groups[s.id] = lines[0], lines[1]
	}
	for a := range groups {
		for b := range groups {
			if together := a == b || a == "mixed" && b == "card" || a == "card" && b == "mixed"; (groups[a] == groups[b]) != together {
				return fmt.Errorf("groups %v", groups)
			}
		}
	}
	return nil
}

// manage has the agent started with these devices.
func (w *world) manage(ctx context.Context, devices ...string) error {
	for i, d := range devices {
		devices[i] = fmt.Sprintf("%q", d)
	}
	_, err := w.sh(ctx, slow, fmt.Sprintf("printf '[gpu]\\nmanage = [%s]\\n' >/etc/nodeagent/conf.d/gpu.toml && systemctl restart nodeagent || { journalctl -u nodeagent -n 20 --no-pager >&2; false; }",
		strings.Join(devices, ", ")))
	return err
}

func discover(ctx context.Context, w *world) error {
	if err := w.manage(ctx); err != nil {
		return err
	}
	list, err := w.gpus(ctx)
	if err != nil || len(list.GPUs) > 0 {
		return fmt.Errorf("the agent took %v, %w", list.GPUs, err)
	}
	text, err := w.sh(ctx, slow, "nodeagent capability")
	if err != nil && !strings.Contains(err.Error(), "exit code 5") {
		return err
	}
	if err != nil {
		text = err.Error()
	}
	for _, want := range []string{w.address["h100a"], w.address["h100b"], w.address["b200"], "H100", "B200"} {
		if !strings.Contains(text, want) {
			return fmt.Errorf("capability says nothing of %s:\n%s", want, text)
		}
	}
	return nil
}

func sharedGroup(ctx context.Context, w *world) error {
	if err := w.manage(ctx, w.address["mixed"]); err != nil {
		return err
	}
	list, err := w.gpus(ctx)
	if err != nil {
		return err
	}
	for _, p := range list.Problems {
		if strings.HasPrefix(p.About, w.address["mixed"]) && p.Code == "vfio.group-shared" {
			return nil
		}
	}
	return fmt.Errorf("no refusal: %+v", list)
}
