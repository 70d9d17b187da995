package ccmode

import (
	"testing"

	"github.com/confidential-node/agent/gpu/gputest"
)

// BenchmarkSwitch is what switching a mode costs beyond the device's own
// waits: the device needs no time here.
func BenchmarkSwitch(b *testing.B) {
	for _, model := range []gputest.Model{gputest.H100(), gputest.B200()} {
		b.Run(model.Name, func(b *testing.B) {
			model.Timing = gputest.Timing{}
			chip, err := ChipOf(0x10de, model.Device)
			if err != nil {
				b.Fatal(err)
			}
			d := New(model.Name, chip, gputest.New(model))
			modes := []Mode{On, Off}
			for i := 0; b.Loop(); i++ {
				if _, err := Apply(b.Context(), modes[i%2], d); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
