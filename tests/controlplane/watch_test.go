package controlplane

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// look returns the one host, and the codes of its alarms.
func (w *world) look() (client.Node, []string) {
	w.t.Helper()
	nodes, err := w.Client.Nodes(w.t.Context())
	if err != nil || len(nodes) != 1 {
		w.t.Fatalf("%d nodes, %v", len(nodes), err)
	}
	var codes []string
	for _, a := range nodes[0].Alarms {
		codes = append(codes, a.Code)
	}
	return nodes[0], codes
}

func (w *world) launched() string {
	w.t.Helper()
	_, err := w.Client.Launch(w.t.Context(), host, launch())
	return code(err)
}

func TestTwoHostsWithOneIdentityAreBothToldAndGetNoWork(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.node(host)
	w.ready(host)
	b := w.node(host) // a clone of the disk has another store after its first loss, or the same
	controltest.Eventually(t, "both told", func() bool { return a.link.Status().Cloned && b.link.Status().Cloned })
	controltest.Eventually(t, "the alarm", func() bool { _, codes := w.look(); return slices.Equal(codes, []string{codeCloned}) })
	if got := w.launched(); got != codeNodeAlarmed {
		t.Errorf("launched on a clone: %q", got)
	}
	if _, err := w.Client.Launch(t.Context(), "", launch()); code(err) != codeNoNode {
		t.Errorf("a clone was picked: %v", err)
	}
	b.stop()
	if err := w.Client.Resolve(t.Context(), host); err != nil {
		t.Fatal(err)
	}
	controltest.Eventually(t, "the one left at ease", func() bool { return !a.link.Status().Cloned })
	if _, codes := w.look(); len(codes) != 0 {
		t.Errorf("alarms %v after they were resolved", codes)
	}
	if got := w.launched(); got == codeNodeAlarmed {
		t.Error("still alarmed")
	}
	if err := w.Client.Resolve(t.Context(), "nobody"); code(err) != codeNodeNotFound {
		t.Errorf("resolved: %v", err)
	}
}

func TestAnAgentThatStartsAgainIsNoClone(t *testing.T) {
	t.Parallel()
	var w watched
	beat := func(instance byte) bool {
		_, raised := w.observe(&api.Heartbeat{Instance: []byte{instance}}, time.Now())
		return len(raised) > 0
	}
	// Three processes in a row; a heartbeat of the first arrives late.
	for _, instance := range []byte{1, 1, 2, 1, 2, 2, 3, 3, 4} {
		if beat(instance) {
			t.Fatalf("alarm at instance %d", instance)
		}
	}
	for _, instance := range []byte{5, 4, 5} {
		if beat(instance) {
			t.Fatalf("alarm at instance %d", instance)
		}
	}
	if !beat(4) {
		t.Error("two in turns are no clone")
	}
	if beat(5) {
		t.Error("the same alarm again")
	}
}

func TestARolledBackHostIsSeenByTheControlPlane(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node(host)
	dir := filepath.Join(t.TempDir(), "audit")
	use := func(from string) {
		t.Helper()
		l, err := audit.Open(from, host, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		n.audit = l
	}
	grow := func() {
		t.Helper()
		if err := n.audit.Append(audit.Entry{Kind: audit.KindAccepted}); err != nil {
			t.Fatal(err)
		}
	}
	witnessed := func(want int64) {
		t.Helper()
		controltest.Eventually(t, "the witness", func() bool { node, _ := w.look(); return node.AuditEntries == want })
	}
	use(dir)
	grow()
	witnessed(2)
	n.stop()
	backup := filepath.Join(t.TempDir(), "backup")
	if err := os.CopyFS(backup, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	n.start()
	for range 5 {
		grow()
	}
	witnessed(7)
	// Neither a restart of either side nor an outage is a rollback.
	w.stop()
	n.stop()
	w.start()
	n.start()
	grow()
	witnessed(8)
	if node, codes := w.look(); len(codes) != 0 || len(node.Warnings) != 1 {
		t.Errorf("alarms %v, warnings %v", codes, node.Warnings)
	}
	n.stop()
	use(backup)
	n.start()
	controltest.Eventually(t, "the alarm", func() bool { _, codes := w.look(); return slices.Equal(codes, []string{audit.CodeRolledBack}) })
	if got := w.launched(); got != codeNodeAlarmed {
		t.Errorf("launched: %q", got)
	}
	w.stop()
	w.start()
	if _, codes := w.look(); !slices.Equal(codes, []string{audit.CodeRolledBack}) {
		t.Errorf("alarms %v after a restart", codes)
	}
	if err := w.Client.Resolve(t.Context(), host); err != nil {
		t.Fatal(err)
	}
	witnessed(2)
	grow()
	witnessed(3)
	if _, codes := w.look(); len(codes) != 0 {
		t.Errorf("alarms %v", codes)
	}
}
