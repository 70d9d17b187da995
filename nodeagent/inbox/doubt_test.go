package inbox_test

import (
	"crypto/ed25519"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/inbox/inboxtest"
)

// lastSync stores commands and fails all the same, as bbolt does when the disk
// fails at the last sync of a change.
type lastSync struct {
	*inboxtest.Journal
	failures int
}

func (j *lastSync) AddCommand(c inbox.Command) (bool, error) {
	fresh, err := j.Journal.AddCommand(c)
	if j.failures--; j.failures >= 0 && err == nil {
		return false, syscall.EIO
	}
	return fresh, err
}

func TestACommandStoredByAWriteThatFailedIsCarriedOutOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, 1)
		journal := &lastSync{n.journal, 2}
		x, err := inbox.New(inbox.Deps{
			Journal: journal, Executor: n.executor, Keys: []ed25519.PublicKey{ed25519.PublicKey(n.key[32:])},
			Clock: clocktest.Wall, HostID: host, Logger: hclog.NewNullLogger(),
		})
		if err != nil {
			t.Fatal(err)
		}
		n.Inbox = x
		raw := n.seal(command(1))
		for try := range 2 {
			if err := n.Receive(t.Context(), raw); err == nil {
				t.Fatalf("try %d: acknowledged although it was not stored", try)
			}
		}
		n.receive(raw)
		n.receive(raw)
		n.run()
		if done := len(n.executor.executed()); done != 1 {
			t.Errorf("executed %d times", done)
		}
		if waiting := n.events(); len(waiting) != 1 {
			t.Errorf("%d outcomes", len(waiting))
		}
	})
}
