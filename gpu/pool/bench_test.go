package pool_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/vfio"
	"github.com/confidential-node/agent/vfio/vfiotest"
)

// machine has devices that need no time for anything, so that what is measured
// is what the agent adds.
func machine(b *testing.B, models ...gputest.Model) *vfiotest.Kernel {
	b.Helper()
	k, err := vfiotest.New(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	for i, model := range models {
		model.Timing = gputest.Timing{}
		if err := k.Add(device(vfio.Address(fmt.Sprintf("0000:%02x:00.0", 0x40+i)), model, "")); err != nil {
			b.Fatal(err)
		}
	}
	return k
}

// BenchmarkInventory reads sixteen devices from sysfs and identifies them.
func BenchmarkInventory(b *testing.B) {
	var models []gputest.Model
	for range 8 {
		models = append(models, gputest.H100(), gputest.B200())
	}
	host := machine(b, models...).Host()
	for b.Loop() {
		functions, err := host.Functions()
		if err != nil {
			b.Fatal(err)
		}
		if capable, refused := gpu.Capable(functions); len(capable) != 16 || len(refused) != 0 {
			b.Fatal(capable, refused)
		}
	}
}

// BenchmarkLife takes a device from clean to a guest and back: reserve, check,
// return, and a reset with its verification, four transitions.
func BenchmarkLife(b *testing.B) {
	for _, model := range []gputest.Model{gputest.H100(), gputest.B200()} {
		b.Run(model.Name, func(b *testing.B) {
			k := machine(b, model)
			p, err := pool.New(pool.Deps{Records: &disk{text: map[vfio.Address][]byte{}}, Host: k.Host(), System: k, Logger: hclog.NewNullLogger()},
				pool.Config{Manage: []string{pool.AllCapable}, BootID: "b"})
			if err != nil {
				b.Fatal(err)
			}
			if err := p.Settle(func(string) bool { return false }); err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan struct{})
			go func() { defer close(done); _ = p.Run(ctx) }()
			for {
				changed := p.Changed()
				if states(p)["0000:40:00.0"] == pool.Clean {
					break
				}
				<-changed
			}
			rounds := 0
			for b.Loop() {
				if err := p.Reserve(guest, model.Name, 1); err != nil {
					b.Fatal(err)
				}
				if err := p.Attach(ctx, guest); err != nil {
					b.Fatal(err)
				}
				if err := p.Return(ctx, guest); err != nil {
					b.Fatal(err)
				}
				rounds++
			}
			b.ReportMetric(float64(4*rounds)/b.Elapsed().Seconds(), "transitions/s")
			cancel()
			<-done
		})
	}
}
