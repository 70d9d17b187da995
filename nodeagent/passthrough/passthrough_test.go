package passthrough

import (
	"slices"
	"testing"

	"github.com/confidential-node/agent/vfio"
)

func TestVCPUsStayNearTheirGPUs(t *testing.T) {
	t.Parallel()
	nodes := map[int][]int{0: {0, 1, 8, 9}, 1: {2, 3, 10, 11}, 2: {4, 5, 12, 13}}
	for name, c := range map[string]struct {
		gpus  []int // nodes
		nodes map[int][]int
		vcpus int
		want  []int
	}{
		"one GPU":                        {[]int{1}, nodes, 4, []int{2, 3, 10, 11}},
		"two nodes of three":             {[]int{2, 0, 2}, nodes, 8, []int{0, 1, 4, 5, 8, 9, 12, 13}},
		"more vCPUs than CPUs are near":  {[]int{1}, nodes, 5, nil},
		"all nodes":                      {[]int{0, 1, 2}, nodes, 4, nil},
		"one node is not known":          {[]int{1, -1}, nodes, 2, nil},
		"on a node without CPUs":         {[]int{3}, nodes, 2, nil},
		"the host has one node":          {[]int{0}, map[int][]int{0: {0, 1}}, 1, nil},
		"the host tells nothing of NUMA": {[]int{-1}, nil, 1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var functions []vfio.Function
			for _, node := range c.gpus {
				functions = append(functions, vfio.Function{NUMANode: node})
			}
			if got := near(functions, c.nodes, c.vcpus); !slices.Equal(got, c.want) {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}
