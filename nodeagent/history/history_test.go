package history

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

func entry(command, outcome string) Entry {
	return Entry{At: time.Unix(1, 0).UTC(), Command: command, Before: json.RawMessage(`{}`), Outcome: outcome}
}

func TestAnIntentWithoutOutcomeStaysInDoubt(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "history.jsonl")
	l, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); contract.AsRefusal(err).Code != "history.busy" {
		t.Errorf("a second command: %v", err)
	}
	for _, e := range []Entry{entry("A", Unknown), entry("A", Done), entry("B", Unknown), entry("C", Unknown), entry("C", Failed)} {
		if err := l.Append(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	// A crash in the middle of a line, and the next command after it.
	torn, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := torn.WriteString(`{"at":"2026`); err != nil {
		t.Fatal(err)
	}
	_ = torn.Close()
	if l, err = Open(path); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(entry("D", Done)); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	got, damaged, err := Read(path)
	if err != nil || damaged != 1 || len(got) != 4 {
		t.Fatalf("%d entries, %d damaged, %v", len(got), damaged, err)
	}
	for i, want := range []string{Done, Unknown, Failed, Done} {
		if got[i].Outcome != want {
			t.Errorf("entry %d: %s, want %s", i, got[i].Outcome, want)
		}
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
}

func TestWithoutAFileThereIsNoHistoryAndWithoutAFolderNoChange(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "missing", "history.jsonl")
	if got, damaged, err := Read(path); len(got) != 0 || damaged != 0 || err != nil {
		t.Errorf("%v %d %v", got, damaged, err)
	}
	if _, err := Open(path); contract.AsRefusal(err).Code != "history.no-folder" {
		t.Error(err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"command":"A","outcome":"unknown"}` + "\n" + `{"command":"A","outcome":"done"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		path := filepath.Join(t.TempDir(), "h")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		entries, _, _ := Read(path)
		for _, e := range entries {
			if e.Command == "" {
				t.Errorf("%q became %+v", raw, e)
			}
		}
	})
}
