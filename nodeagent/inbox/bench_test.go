package inbox_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock/clocktest"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/store"
)

// BenchmarkDrain carries out 10,000 stored commands of 16 KiB from the real
// store and reports the most heap in use while it does.
func BenchmarkDrain(b *testing.B) {
	const commands, size = 10_000, 16 << 10
	for b.Loop() {
		b.StopTimer()
		s := filled(b, commands, size)
		ctx, cancel := context.WithCancel(b.Context())
		executor := &counter{left: commands, done: cancel}
		x, err := inbox.New(inbox.Deps{
			Journal: s, Executor: executor, Keys: []ed25519.PublicKey{bytes.Repeat([]byte{1}, ed25519.PublicKeySize)},
			HostID: host, Logger: hclog.NewNullLogger(), Clock: clocktest.Wall,
		})
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := x.Run(ctx); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(executor.most)/(1<<20), "heap-MiB")
		b.ReportMetric(commands/b.Elapsed().Seconds(), "commands/s")
		if executor.most > 64<<20 { // the payloads alone are 160 MiB
			b.Errorf("%d MiB of heap in use", executor.most>>20)
		}
		b.StopTimer()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

func filled(b *testing.B, commands, size int) *store.Store {
	b.Helper()
	s, err := store.Open(filepath.Join(b.TempDir(), "state.db"), time.Now, hclog.NewNullLogger())
	if err != nil {
		b.Fatal(err)
	}
	if err := s.BeginEpoch(1, time.Time{}); err != nil {
		b.Fatal(err)
	}
	cmd := command(1)
	cmd.RequiredFeatures = []string{string(bytes.Repeat([]byte{'x'}, size))}
	for i := range commands {
		cmd.CommandId, cmd.Sequence = api.NewID(), uint64(i+1)
		payload, err := proto.Marshal(cmd)
		if err != nil {
			b.Fatal(err)
		}
		c := inbox.Command{ID: cmd.GetCommandId(), Epoch: 1, Sequence: cmd.GetSequence(), Verb: "cordon", ExpiresAt: cmd.GetExpiresAt().AsTime(), Payload: payload}
		if _, err := s.AddCommand(c); err != nil {
			b.Fatal(err)
		}
	}
	return s
}

// counter watches the heap while commands are carried out.
type counter struct {
	left int
	most uint64
	done func()
}

func (c *counter) Execute(context.Context, *api.Command) ([]*api.Event, error) {
	if c.left%100 == 0 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		c.most = max(c.most, m.HeapInuse)
	}
	if c.left--; c.left == 0 {
		c.done()
	}
	return nil, nil
}
