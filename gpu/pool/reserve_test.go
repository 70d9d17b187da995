package pool

import (
	"fmt"
	"slices"
	"testing"

	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/vfio"
)

func TestASetIsOfOneNUMANodeWhereOneHasEnough(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		nodes []int // of each device, by address
		gone  []int // places of those that are not free
		count int
		want  []int // places
	}{
		"one node":                         {[]int{0, 0, 0, 0}, nil, 2, []int{0, 1}},
		"the first addresses cross nodes":  {[]int{0, 1, 1, 0}, nil, 2, []int{0, 3}},
		"best fit":                         {[]int{0, 0, 0, 1, 1}, nil, 1, []int{3}},
		"best fit of what is free":         {[]int{0, 0, 0, 1, 1}, []int{0, 1}, 1, []int{2}},
		"the small node has too few":       {[]int{0, 1, 1, 1}, nil, 2, []int{1, 2}},
		"no node has enough":               {[]int{0, 1, 2, 1}, []int{3}, 2, []int{0, 1}},
		"all nodes together":               {[]int{0, 0, 0, 0, 1, 1, 1, 1}, nil, 8, []int{0, 1, 2, 3, 4, 5, 6, 7}},
		"the platform tells no node":       {[]int{-1, -1, -1}, nil, 2, []int{0, 1}},
		"some nodes unknown, one has one":  {[]int{-1, -1, 1}, nil, 1, []int{2}},
		"some nodes unknown, none has two": {[]int{-1, -1, 1}, nil, 2, []int{0, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			at := func(i int) vfio.Address { return vfio.Address(fmt.Sprintf("0000:5%d:00.0", i)) }
			var all []candidate
			for i, node := range slices.Backward(c.nodes) {
				r := Record{Address: at(i), Model: gpu.Model{Name: "B200"}, State: Clean}
				if slices.Contains(c.gone, i) {
					r.State = Attached
				}
				all = append(all, candidate{r, node})
			}
			var want []vfio.Address
			for _, i := range c.want {
				want = append(want, at(i))
			}
			if got, refusal := pick(all, "B200", c.count); refusal != nil || !slices.Equal(got, want) {
				t.Errorf("%v, %v; want %v", got, refusal, want)
			}
		})
	}
}
