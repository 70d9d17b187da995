package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vfio"
)

func TestGPUsOnRecordAreShownWhileTheAgentDoesNotRun(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, socket := filepath.Join(dir, "agent.toml"), filepath.Join(dir, "none")
	if err := os.WriteFile(file, []byte("state_dir = \""+dir+"\"\n"+soundConfig(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	show := func(want int, args ...string) (out, stderr string) {
		t.Helper()
		code, out, stderr := run(t, append(args, "--socket", socket, "--config", file)...)
		if code != want {
			t.Fatalf("%q: exit %d, %s%s", args, code, out, stderr)
		}
		return out, stderr
	}
	if out, _ := show(exitOK, "gpu", "list"); !strings.Contains(out, "AGENT NOT RUNNING") || !strings.Contains(out, "no GPU is managed") {
		t.Errorf("nothing on record:\n%s", out)
	}
	s, err := store.Open(filepath.Join(dir, "state.db"), time.Now, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.PutGPUs(pool.Record{
		Address: gpuAddress, Model: gpu.Model{Name: "H100", Board: "SXM"}, State: pool.Quarantined, Since: time.Now(), Duty: true, Mode: ccmode.On,
		Bindings:   []vfio.Binding{{Address: gpuAddress, Driver: "nvidia"}},
		Quarantine: &pool.Quarantine{Reason: contract.Refuse("gpu.lost", "reseat it", "gone"), At: time.Now(), From: pool.Dirty, Step: pool.StepVerify, Evidence: []string{"all ones"}},
	}); err != nil {
		t.Fatal(err)
	}
	if _, stderr := show(exitConflict, "gpu", "list"); !strings.Contains(stderr, "--socket") {
		t.Errorf("an agent runs that is not asked: %s", stderr)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	out, _ := show(exitOK, "gpu", "list", "-o", "json")
	matchesSchema(t, out)
	var list admin.GPUList
	if err := json.Unmarshal([]byte(out), &list); err != nil || list.AgentRunning || len(list.GPUs) != 1 || list.GPUs[0].Quarantine.Code != "gpu.lost" || list.GPUs[0].OriginalDriver != "nvidia" {
		t.Errorf("%v in %s", err, out)
	}
	out, _ = show(exitOK, "gpu", "show", gpuAddress, "-o", "json")
	matchesSchema(t, out)
	if !strings.Contains(out, `"agent_running": false`) {
		t.Error(out)
	}
	out, _ = show(exitOK, "gpu", "show", gpuAddress)
	for _, want := range []string{"AGENT NOT RUNNING", "systemctl start nodeagent", "quarantined", "all ones", "reseat it"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing:\n%s", want, out)
		}
	}
	if _, stderr := show(exitUnreachable, "gpu", "reset", gpuAddress); !strings.Contains(stderr, "is nodeagent running") {
		t.Errorf("an order without agent: %s", stderr)
	}
}
