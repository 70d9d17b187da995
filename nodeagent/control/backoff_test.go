package control

import (
	"strconv"
	"testing"
	"time"
)

func TestDelaysDoubleToACapAndAreSpread(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		attempt int
		full    time.Duration
	}{
		{0, time.Second},
		{1, 2 * time.Second},
		{2, 4 * time.Second},
		{3, 8 * time.Second},
		{4, 16 * time.Second},
		{5, 32 * time.Second},
		{6, time.Minute},
		{7, time.Minute},
		{63, time.Minute},
		{64, time.Minute},
		{1 << 30, time.Minute},
	} {
		t.Run(strconv.Itoa(tc.attempt), func(t *testing.T) {
			t.Parallel()
			const hosts = 1000
			seen := map[time.Duration]bool{}
			early, late := 0, 0
			for range hosts {
				d := backoff(tc.attempt)
				if d < tc.full/2 || d >= tc.full {
					t.Fatalf("%s is not in the second half of %s", d, tc.full)
				}
				seen[d] = true
				if d < tc.full*5/8 {
					early++
				}
				if d >= tc.full*7/8 {
					late++
				}
			}
			if len(seen) < hosts*9/10 {
				t.Errorf("%d hosts wait %d different times", hosts, len(seen))
			}
			// A quarter of the range each; less than half of that by chance
			// happens never.
			if early < hosts/8 || late < hosts/8 {
				t.Errorf("%d early and %d late of %d hosts", early, late, hosts)
			}
		})
	}
}
