package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/trial"
)

// tamper is what a hostile host does after its agent has checked the boot
// files and before QEMU opens them: whatever is in the file /run/tamper, with
// the guest's folder as $1.
const tamper = `[ -e /run/tamper ] && . /run/tamper; exit 0`

func (w *world) tamper(h *trial.Host, script string) {
	w.t.Helper()
	if err := os.WriteFile(h.Path("/run/tamper"), []byte(script), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// Whatever a host swaps between its agent's check and the boot is found by the
// party that must find it.
func TestAHostThatSwapsFilesIsCaught(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{Hook: tamper})
	h, u := hosts[0], w.tenant("alice", trial.TenantOptions{})
	u.write("data.csv", canaryRecords)
	for _, c := range []struct {
		name, script, code string
		says               []string
	}{
		// The firmware compares the kernel with the measured hash and stops.
		{"swapped-kernel", `printf x | dd of="$1/kernel" bs=1 seek=4000000 conv=notrunc status=none`, "guest.start-timeout", []string{"OVMF"}},
		// Another firmware measures differently: the broker sees it.
		{"swapped-firmware", `printf x | dd of="$1/firmware" bs=1 seek=16 conv=notrunc status=none`, "guest.broker-refused", []string{"broker.launch-digest"}},
		// Another ciphertext of the same size: the guest sees it.
		{
			"resealed-input", `for f in $(find ` + trial.CacheDir + ` -type f); do printf xxxx | dd of="$f" bs=1 seek=150 conv=notrunc status=none; done`,
			"guest.input-digest-mismatch", nil,
		},
	} {
		w.tamper(h, c.script)
		d := u.deploy(c.name, "--start-timeout", "30s", "--dataset", "file://data.csv", "--result", "summary.json", "--command", "/workload", "--command", "batch")
		s := w.ended(d.GuestID)
		if s.GetStatus() != api.GuestStatus_GUEST_STATUS_FAILED || s.GetRefusal().GetCode() != c.code || s.GetRefusal().GetRemedy() == "" {
			t.Errorf("%s: the guest ended as %v", c.name, s)
		}
		says(t, u.run(0, "status", c.name), append(c.says, c.code, "remedy:")...)
		w.clean(h)
	}
	// The same host, honest: it was the swapping that was refused.
	w.tamper(h, "")
	u.deploy("honest", "--start-timeout", "60s", "--dataset", "file://data.csv", "--result", "summary.json", "--command", "/workload", "--command", "batch", "--wait")
}

// A security processor whose HOST_DATA is not the served manifest's digest,
// as when the host serves another manifest than it launched with.
func TestAManifestThatIsNotHostDatasIsRefusedByTheGuest(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{PSP: []string{"--fault", "wrong-host-data"}})
	u := w.tenant("alice", trial.TenantOptions{})
	a := u.run(5, "deploy", "confidential", "--name", "job", "--image", trial.Repository+":1", "--memory", "1024", "--vcpus", "1", "--start-timeout", "60s",
		"--result", "summary.json", "--wait")
	says(t, a, "guest.host-data-mismatch", "remedy:")
	w.clean(hosts[0])
}

func TestAnImageWithoutAMLDefenceIsRefusedByTheBroker(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{})
	u := w.tenant("alice", trial.TenantOptions{Strict: true})
	a := u.run(5, "deploy", "confidential", "--name", "job", "--image", trial.Repository+":1", "--memory", "1024", "--vcpus", "1", "--start-timeout", "60s",
		"--result", "summary.json", "--wait")
	says(t, a, "aml-defence", "remedy:")
	w.clean(hosts[0])
}

// One launch by the tenant; then a control plane and hosts that try to get
// more out of it, and a store that replaces its results.
func TestALaunchIsWorthOneBootAndOneAnswer(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{}, trial.HostOptions{})
	u := w.tenant("alice", trial.TenantOptions{})
	d := u.deploy("job", "--node", hosts[0].ID, "--result", "summary.json", "--command", "/workload", "--command", "batch", "--wait")
	launch := w.launchOf(d.GuestID)
	again := func(node string, change func(*api.LaunchGuest)) *contract.Refusal {
		t.Helper()
		l, ok := proto.Clone(launch).(*api.LaunchGuest)
		if !ok {
			t.Fatal("a clone is of another type")
		}
		l.GuestId = ""
		change(l)
		sent, err := w.API.Launch(w.ctx, node, l)
		if err != nil {
			t.Fatal(err)
		}
		state := w.ended(sent.GuestID)
		if r := state.GetRefusal(); r != nil {
			return api.RefusalFromWire(r)
		}
		g, err := w.API.Guest(w.ctx, sent.GuestID)
		if err != nil || g.Refusal == nil {
			t.Fatalf("not refused: %v %v", state, err)
		}
		return g.Refusal
	}
	nothing := func(*api.LaunchGuest) {}
	for _, c := range []struct {
		name   string
		got    *contract.Refusal
		code   string
		reason string
	}{
		{"the same host", again(hosts[0].ID, nothing), "launch.launch-id-used", "launch_id"},
		// A host that knows nothing of the first boot starts the guest; the
		// broker has counted.
		{"another host", again(hosts[1].ID, nothing), "guest.broker-refused", "release"},
		{"a wrong digest", again(hosts[1].ID, func(l *api.LaunchGuest) {
			l.LaunchDigest[0] ^= 1
			l.Manifest = []byte(strings.Replace(string(l.GetManifest()), d.LaunchID, strings.Repeat("ab", 16), 1))
		}), "launch.digest-mismatch", "commanded is"},
	} {
		if c.got.Code != c.code || !strings.Contains(c.got.Message, c.reason) || c.got.Remedy == "" {
			t.Errorf("%s: %+v", c.name, c.got)
		}
	}
	says(t, u.run(0, "status", "job"), "1 of 1 releases", "refused")
	w.forgedResults(u, d.Results[0].Key)
	for _, h := range hosts {
		w.clean(h)
	}
}

// forgedResults lets the host replace what the guest delivered. It knows the
// tenant's recipient, which is in the manifest, and everything else but the
// key that only the guest has.
func (w *world) forgedResults(u *user, key string) {
	w.t.Helper()
	objects, err := w.Store.Objects()
	if err != nil {
		w.t.Fatal(err)
	}
	list := filepath.Dir(key) + "/" + contract.ResultsManifestName
	genuine := map[string][]byte{key: objects[trial.Bucket+"/"+key], list: objects[trial.Bucket+"/"+list]}
	forged := append([]byte(nil), genuine[key]...)
	forged[len(forged)-1] ^= 1
	for name, c := range map[string]struct {
		key  string
		data []byte
		says string
	}{
		"another result": {key, forged, "result"},
		"another list":   {list, []byte(strings.Replace(string(genuine[list]), `"sig":"`, `"sig":"AAAA`, 1)), "sign"},
		"no list":        {list, nil, "result"},
	} {
		if err := w.Store.Replace(trial.Bucket, c.key, c.data); err != nil {
			w.t.Fatal(err)
		}
		out := filepath.Join(u.Dir, "forged")
		says(w.t, u.run(5, "results", "job", "--out", out), c.says, "remedy:")
		if left, err := os.ReadDir(out); err == nil && len(left) > 0 {
			w.t.Errorf("%s: %v was opened all the same", name, left)
		}
		if err := w.Store.Replace(trial.Bucket, c.key, genuine[c.key]); err != nil {
			w.t.Fatal(err)
		}
	}
	u.results("job")
}
