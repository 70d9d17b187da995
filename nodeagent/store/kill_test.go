package store

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/inbox"
)

// writerEnv is the file that this process writes until it is killed.
const writerEnv = "STORE_WRITER"

// writes commits for ever, with a byte to standard output for each.
func writes(t *testing.T, path string) {
	t.Helper()
	s := reopen(t, path)
	known, err := s.commands(func(inbox.Command) bool { return true })
	done(t, err)
	for i := len(known); ; i++ {
		id := fmt.Sprintf("command-%06d", i)
		_, err := s.AddCommand(inbox.Command{ID: id, Sequence: uint64(i + 1), Payload: make([]byte, rand.IntN(6000))})
		done(t, err)
		done(t, s.FinishCommand(id, &api.Event{EventId: id}))
		if i%5 == 4 {
			done(t, s.DropEvents(uint64(i-1)))
		}
		_, err = os.Stdout.Write([]byte{'.'})
		done(t, err)
	}
}

// A process that is killed between any two of its writes leaves no damage:
// what looks for flipped bits must not take a transaction cut short for them.
// What was committed is there.
func TestAKilledWritersStoreIsIntact(t *testing.T) {
	if path := os.Getenv(writerEnv); path != "" {
		writes(t, path)
	}
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	total := 0
	for range 25 {
		writer := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$")
		writer.Env = append(os.Environ(), writerEnv+"="+path)
		out, err := writer.StdoutPipe()
		done(t, err)
		done(t, writer.Start())
		commits := 1 + rand.IntN(8)
		_, err = io.ReadFull(out, make([]byte, commits))
		done(t, err)
		done(t, writer.Process.Kill())
		rest, _ := io.ReadAll(out)
		_ = writer.Wait() // killed
		total += commits + len(rest)
		s := reopen(t, path)
		if aside := SetAside(path); len(aside) > 0 {
			t.Fatalf("a store that was not damaged is set aside: %v", aside)
		}
		known, err := s.commands(func(c inbox.Command) bool { return c.Done })
		done(t, err)
		if len(known) < total || len(known) > total+1 {
			t.Fatalf("%d commands are there, %d were committed", len(known), total)
		}
		total = len(known)
		done(t, s.Close())
	}
	t.Logf("%d commits over 25 deaths", total)
}
