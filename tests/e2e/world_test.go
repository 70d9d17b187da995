package e2e_test

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/tests/tenant"
	"github.com/confidential-node/agent/tests/trial"
)

func TestMain(m *testing.M) {
	if rig.Capable() {
		rig.Enter()
	}
	os.Exit(m.Run())
}

// limit bounds one test on a busy machine.
const limit = 3 * time.Minute

// programs are built once per run.
var programs = sync.OnceValues(func() (*trial.Programs, error) { return trial.Build(context.Background()) })

// world is a platform that ends with its test.
type world struct {
	*trial.Platform
	t   *testing.T
	ctx context.Context // of the test, bounded

	mu       sync.Mutex // guards commands
	commands [][]byte   // every command envelope that was sent
}

// built returns the programs; it skips where they cannot run.
func built(t *testing.T) *trial.Programs {
	t.Helper()
	if !rig.Capable() {
		skip.Missing(t, "root")
	}
	p, err := programs()
	if errors.Is(err, trial.ErrNoPackages) {
		skip.Missing(t, "the guest's kernel and firmware in .cache/debs (make setup)")
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// newWorld starts the outside and one host per option.
func newWorld(t *testing.T, hosts ...trial.HostOptions) (*world, []*trial.Host) {
	t.Helper()
	programs := built(t)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	p, err := trial.New(ctx, programs)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Platform: p, t: t, ctx: ctx}
	t.Cleanup(func() {
		if t.Failed() {
			for name, text := range p.LogTails(60) {
				t.Logf("%s:\n%s", name, text)
			}
		}
		if err := p.Close(); err != nil {
			t.Errorf("closing the platform: %v", err)
		}
	})
	stop, err := p.Control.Sniff(func(subject string, _ map[string][]string, data []byte) {
		if strings.HasPrefix(subject, api.CommandSubject("")) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.commands = append(w.commands, append([]byte(nil), data...))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stop() })
	var all []*trial.Host
	for _, o := range hosts {
		h, err := p.AddHost(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, h)
	}
	return w, all
}

// user is a tenant with a few files.
type user struct {
	*trial.Tenant
	w *world
}

func (w *world) tenant(name string, o trial.TenantOptions) *user {
	w.t.Helper()
	t, err := w.AddTenant(w.ctx, name, o)
	if err != nil {
		w.t.Fatal(err)
	}
	return &user{t, w}
}

func (u *user) write(name, text string) {
	u.w.t.Helper()
	if err := os.WriteFile(filepath.Join(u.Dir, name), []byte(text), 0o600); err != nil {
		u.w.t.Fatal(err)
	}
}

// run runs a verb of the tenant's tool; its exit code must be the wanted one.
func (u *user) run(wanted int, args ...string) trial.Answer {
	u.w.t.Helper()
	a, err := u.Run(u.w.ctx, args...)
	if err != nil {
		u.w.t.Fatal(err)
	}
	if a.Code != wanted {
		u.w.t.Fatalf("tenant %s: wanted exit code %d: %s", strings.Join(args, " "), wanted, a)
	}
	return a
}

// deploy deploys and returns the tenant's record.
func (u *user) deploy(name string, args ...string) *tenant.Deployment {
	u.w.t.Helper()
	u.run(0, append([]string{"deploy", "confidential", "--name", name, "--image", trial.Repository + ":1", "--memory", "1024", "--vcpus", "1"}, args...)...)
	return u.deployment(name)
}

func (u *user) deployment(name string) *tenant.Deployment {
	u.w.t.Helper()
	var doc struct {
		Data struct {
			Deployment *tenant.Deployment `json:"deployment"`
		} `json:"data"`
	}
	if err := json.Unmarshal([]byte(u.run(0, "status", name, "-o", "json").Stdout), &doc); err != nil {
		u.w.t.Fatal(err)
	}
	return doc.Data.Deployment
}

// summary is what the workload wrote down.
type summary struct {
	Args   []string
	Inputs map[string]string
	Env    map[string]string
	Served int
	Text   string
}

// results opens a deployment's results.
func (u *user) results(name string) summary {
	u.w.t.Helper()
	out := filepath.Join(u.Dir, "opened-"+name)
	u.run(0, "results", name, "--out", out)
	text, err := os.ReadFile(filepath.Join(out, "summary.json"))
	if err != nil {
		u.w.t.Fatal(err)
	}
	var s summary
	if err := json.Unmarshal(text, &s); err != nil {
		u.w.t.Fatal(err)
	}
	return s
}

// ended waits for a guest's last state.
func (w *world) ended(guestID string) *api.GuestState {
	w.t.Helper()
	g, err := w.API.WaitGuest(w.ctx, guestID, (*client.Guest).Ended)
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := g.GuestState()
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// phase waits until a guest has said that it is in a phase.
func (w *world) phase(guestID string, phase contract.GuestPhase) {
	w.t.Helper()
	g, err := w.API.WaitGuest(w.ctx, guestID, func(g *client.Guest) bool {
		s, err := g.GuestState()
		return err == nil && (s.GetGuestPhase() == string(phase) || g.Ended())
	})
	if err != nil {
		w.t.Fatal(err)
	}
	if g.Ended() {
		w.t.Fatalf("guest %s has ended: %+v %s", guestID, g.Refusal, g.State)
	}
}

// launchOf is the launch of a guest as it was sent.
func (w *world) launchOf(guestID string) *api.LaunchGuest {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, raw := range w.commands {
		cmd, err := api.OpenCommand(raw, []ed25519.PublicKey{w.Control.IssuerKey()})
		if err == nil && cmd.GetLaunchGuest().GetGuestId() == guestID {
			return cmd.GetLaunchGuest()
		}
	}
	w.t.Fatalf("no launch of guest %s was sent", guestID)
	return nil
}

// says fails unless an answer holds every one of texts.
func says(t *testing.T, a trial.Answer, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(a.Stdout+a.Stderr, text) {
			t.Errorf("no %q in: %s", text, a)
		}
	}
}

// clean waits until guests have left nothing on a host.
func (w *world) clean(h *trial.Host) {
	w.t.Helper()
	if err := h.WaitClean(w.ctx); err != nil {
		w.t.Error(err)
	}
}
