package e2e_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/trial"
)

// Plaintext and secrets that only the tenant and the guest may know.
const (
	canaryModel   = "CANARY-MODEL-WEIGHTS-5f1c90"
	canaryRecords = "CANARY-PATIENT-RECORD-0b77"
	canaryToken   = "CANARY-API-TOKEN-77aa21"
)

// A batch job: two inputs (one sealed before, one by deploy), a secret
// variable, a public one and arguments go in, one result comes out.
func TestASealedJobGoesItsWholeWay(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{})
	h, u := hosts[0], w.tenant("alice", trial.TenantOptions{})
	open := descriptors(t, h.Agent().PID())
	model := canaryModel + strings.Repeat("x", 3<<20)
	u.write("model.bin", model)
	u.write("records.csv", canaryRecords)
	u.write("token", canaryToken)
	u.run(0, "keygen", "data.key", "--raw")
	u.run(0, "seal", "model.bin", "--encryption-key", "file://data.key")
	u.run(0, "upload", "model.bin.age", "--to", trial.Bucket+"/models/model.age")
	d := u.deploy("job", "--model", "encrypted://"+trial.Bucket+"/models/model.age", "--encryption-key", "file://data.key",
		"--dataset", "file://records.csv", "--secret-env", "API_TOKEN=token", "--env", "MODE=fast", "--result", "summary.json",
		"--command", "/workload", "--command", "batch", "--command", "one", "--wait")
	if !strings.HasPrefix(d.Image, trial.Repository+"@sha256:") || d.RequestedImage != trial.Repository+":1" {
		t.Errorf("the tag was not resolved and kept: %q %q", d.RequestedImage, d.Image)
	}
	s := u.results("job")
	if s.Env["API_TOKEN"] != canaryToken || s.Env["MODE"] != "fast" || !slices.Equal(s.Args, []string{"batch", "one"}) {
		t.Errorf("the workload got %+v", s)
	}
	for name, text := range map[string]string{"model": model, "records.csv": canaryRecords} {
		if sum := sha256.Sum256([]byte(text)); s.Inputs[name] != hex.EncodeToString(sum[:]) {
			t.Errorf("input %s was %q; all are %v", name, s.Inputs[name], s.Inputs)
		}
	}
	says(t, u.run(0, "confidential", "verify", "job", "--expected-image", trial.Repository+":1"), "the evidence holds", "✓ workload-image")
	w.noCanaries(u, d.LaunchID)
	state := w.ended(d.GuestID)
	for _, step := range []string{"spool", "blobs", "boot-copies", "measure", "tap", "metadata", "domain"} {
		if _, timed := state.GetStepMs()[step]; !timed {
			t.Errorf("step %s has no time in %v", step, state.GetStepMs())
		}
	}
	w.clean(h)
	// One connection to the object store is kept for the next guest.
	now := descriptors(t, h.Agent().PID())
	if now["socket"] > open["socket"]+1 {
		t.Errorf("the agent had %d sockets and has %d", open["socket"], now["socket"])
	}
	open["socket"], now["socket"] = 0, 0
	if !maps.Equal(now, open) {
		t.Errorf("the agent had open %v and has %v", open, now)
	}
	w.noGoroutinesLeft(h)
}

// noCanaries searches everything outside guest and tenant.
func (w *world) noCanaries(u *user, launchID string) {
	w.t.Helper()
	key, err := os.ReadFile(filepath.Join(u.Dir, "data.key"))
	if err != nil {
		w.t.Fatal(err)
	}
	found, err := w.Search(w.ctx, [][]byte{[]byte(canaryModel), []byte(canaryRecords), []byte(canaryToken), key})
	if err != nil {
		w.t.Fatal(err)
	}
	if len(found.Hits) > 0 {
		w.t.Errorf("plaintext or a key is in %v", found.Hits)
	}
	// The search finds what is there: the launch's id, which is in the
	// manifest, and how every sealed file begins.
	found, err = w.Search(w.ctx, [][]byte{[]byte(launchID), []byte("age-encryption.org/v1")})
	if err != nil {
		w.t.Fatal(err)
	}
	all := strings.Join(found.Hits, "\n")
	for _, place := range []string{"agent's memory", trial.StateDir, trial.CacheDir, "broker.log", "nats-traffic", "jetstream", "object "} {
		if !strings.Contains(all, place) {
			w.t.Errorf("the search misses what is in %s; it found %s", place, all)
		}
	}
}

// descriptors counts what a process has open, sockets by kind and all else by
// name.
func descriptors(t *testing.T, pid int) map[string]int {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			kind, _, _ := strings.Cut(to, ":")
			out[kind]++
		}
	}
	return out
}

// noGoroutinesLeft compares where the goroutines of an agent that has had
// guests began with those of one that has just been started. It ends the agent.
func (w *world) noGoroutinesLeft(h *trial.Host) {
	w.t.Helper()
	used := w.goroutines(h)
	if err := h.StartAgent(w.ctx); err != nil {
		w.t.Fatal(err)
	}
	fresh := w.goroutines(h)
	// A connection has one subscription for answers, from its first question on:
	// a fresh agent may not have asked yet.
	const answers = "github.com/nats-io/nats%2ego.(*Conn).subscribeLocked"
	fresh[answers] = max(fresh[answers], 1)
	for origin, n := range used {
		if n > fresh[origin] {
			w.t.Errorf("%d goroutines created by %s, %d in a fresh agent", n, origin, fresh[origin])
		}
	}
	if err := h.StartAgent(w.ctx); err != nil {
		w.t.Fatal(err)
	}
}

// goroutines makes the agent die with its stacks, and counts them by origin.
func (w *world) goroutines(h *trial.Host) map[string]int {
	w.t.Helper()
	agent := h.Agent()
	if err := agent.Signal(syscall.SIGQUIT); err != nil {
		w.t.Fatal(err)
	}
	if err := trial.Await(w.ctx, "the agent's end", func() (bool, error) { return !agent.Running(), nil }); err != nil {
		w.t.Fatal(err)
	}
	text, err := os.ReadFile(agent.Log)
	if err != nil {
		w.t.Fatal(err)
	}
	_, dump, _ := strings.Cut(string(text[bytes.LastIndex(text, []byte("SIGQUIT: quit")):]), "\n")
	out := map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^created by (\S+)`).FindAllStringSubmatch(dump, -1) {
		// Connections of the command line and the link come and go.
		if !strings.HasPrefix(m[1], "net/http.") && !strings.HasPrefix(m[1], "net.") {
			out[m[1]]++
		}
	}
	if len(out) < 5 {
		w.t.Fatalf("only %d origins of goroutines in the agent's last words", len(out))
	}
	return out
}

// An inference service: clients check the evidence of the very connection.
// Its agent is killed meanwhile, which the guest does not notice.
// Agent, control plane and tenant's tool as they are: parts are granted, put,
// completed by the tenant, and told as uploaded then.
func TestResultsInPartsGoTheirWholeWay(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{})
	u := w.tenant("alice", trial.TenantOptions{})
	u.write("model.bin", canaryModel)
	d := u.deploy("parts", "--model", "file://model.bin", "--result", "summary.json", "--part-size", "5242880",
		"--command", "/workload", "--command", "batch", "--wait")
	if d.Results[0].Upload == nil {
		t.Fatalf("the result went up whole: %+v", d.Results)
	}
	u.results("parts")
	w.clean(hosts[0])
}

func TestAnAttestedServiceOutlivesItsAgent(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{})
	h, u := hosts[0], w.tenant("alice", trial.TenantOptions{})
	u.write("model.bin", canaryModel)
	d := u.deploy("llm", "--model", "file://model.bin", "--result", "summary.json", "--port", "8000", "--port", "8001", "--server-name", "8001=llm.guests.example",
		"--command", "/workload", "--command", "serve", "--wait-running")
	infer := func() trial.Answer {
		return u.run(0, "confidential", "call", "llm", "/v1/infer", "--port", "8000", "-X", "POST", "-d", "prompt")
	}
	// By name, on the port that all guests share: evidence is verified over the
	// connection, and then the workload, which serves 8000 alone, is not there.
	byName := func() {
		says(t, u.run(1, "confidential", "call", "llm", "/v1/infer", "--port", "8001"), "the workload answered 502")
	}
	byName()
	says(t, u.run(0, "status", "llm"), "8001 published as llm.guests.example:443")
	says(t, u.run(3, "confidential", "call", "llm", "/v1/infer", "--port", "8001", "--server-name", "other.guests.example"), "unrecognized name")
	first := infer()
	says(t, first, `"answer"`)
	// A client that expects another image sends nothing.
	says(t, u.run(5, "confidential", "call", "llm", "/v1/infer", "-X", "POST", "-d", "prompt", "--port", "8000", "--expected-image", trial.Repository+"@sha256:"+strings.Repeat("0", 64)),
		"workload-image")
	w.everythingIsSeen(h)
	found, err := w.Search(w.ctx, [][]byte{[]byte(canaryModel)})
	if err != nil || len(found.Hits) > 0 {
		t.Errorf("while the guest runs its model is in %v, %v", found.Hits, err)
	}
	qemu := w.qemu(h)
	h.Agent().Kill()
	if again := infer(); again.Stdout != first.Stdout {
		t.Errorf("without the agent the service answers %s, before %s", again, first)
	}
	if err := h.StartAgent(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.adopted(h, d.GuestID)
	if now := w.qemu(h); now != qemu {
		t.Errorf("the guest's process was %s and is %s", qemu, now)
	}
	says(t, u.run(0, "confidential", "attest", "llm"), "the evidence holds")
	byName() // its way is there again
	// Asked to end, as by an upgrade, it leaves the guest alone too.
	if err := h.Agent().Stop(); err != nil {
		t.Fatal(err)
	}
	infer()
	if err := h.StartAgent(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.adopted(h, d.GuestID)
	u.run(0, "confidential", "call", "llm", "/quit", "--port", "8000", "-X", "POST")
	u.run(0, "wait", "llm")
	if s := u.results("llm"); s.Served != 3 {
		t.Errorf("the workload served %d prompts, want 3: the one of the distrustful client was sent", s.Served)
	}
	if s := w.ended(d.GuestID); s.GetStatus() != api.GuestStatus_GUEST_STATUS_FINISHED {
		t.Errorf("the guest ended as %v", s)
	}
	w.clean(h)
}

// everythingIsSeen makes sure that the look for leftovers finds what a running
// guest has.
func (w *world) everythingIsSeen(h *trial.Host) {
	w.t.Helper()
	left, err := h.Leftovers(w.ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, kind := range []string{"domain ", "link ", "rules for ", "boot copies ", "spool ", "cached ", "process ", "forwarding"} {
		if !slices.ContainsFunc(left, func(l string) bool { return strings.HasPrefix(l, kind) }) {
			w.t.Errorf("of a running guest no %s is seen in %v", kind, left)
		}
	}
}

// qemu is the process id of the host's only guest.
func (w *world) qemu(h *trial.Host) string {
	w.t.Helper()
	out, err := h.Output(w.ctx, "bash", "-c", "cat /run/libvirt/qemu/*.pid")
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// adopted waits until an agent knows a guest again.
func (w *world) adopted(h *trial.Host, guestID string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, limit)
	defer cancel()
	err := trial.Await(ctx, "the guest to be adopted", func() (bool, error) {
		s, err := h.Status(ctx)
		if err != nil {
			return false, err
		}
		for _, g := range s.Guests {
			if g.ID == guestID {
				return g.Status == "running", nil
			}
		}
		return false, nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
}
