package vfio_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/confidential-node/agent/vfio/vfiotest"
)

func TestNodesHaveTheCPUsThreadsMayHave(t *testing.T) {
	for name, c := range map[string]struct {
		lists    map[int]string
		isolated string
		want     string // "" for an error
	}{
		"no NUMA":           {nil, "", "map[]"},
		"one node":          {map[int]string{0: "0-3\n"}, "", "map[0:[0 1 2 3]]"},
		"with siblings":     {map[int]string{0: "0-1,4-5", 1: "2-3,6,7"}, "", "map[0:[0 1 4 5] 1:[2 3 6 7]]"},
		"memory only":       {map[int]string{0: "0-1", 2: "\n"}, "", "map[0:[0 1]]"},
		"isolated":          {map[int]string{0: "0-3", 1: "4-5"}, "2-4,5\n", "map[0:[0 1]]"},
		"no list":           {map[int]string{0: "0-x"}, "", ""},
		"backwards":         {map[int]string{0: "3-1"}, "", ""},
		"twice":             {map[int]string{0: "1,1"}, "", ""},
		"negative":          {map[int]string{0: "-1"}, "", ""},
		"more than can be":  {map[int]string{0: "0-8192"}, "", ""},
		"isolated unclear":  {map[int]string{0: "0-3"}, "managed_irq", ""},
		"the kernel's most": {map[int]string{0: "8191"}, "", "map[0:[8191]]"},
	} {
		t.Run(name, func(t *testing.T) {
			k := must[*vfiotest.Kernel](t)(vfiotest.New(t.TempDir()))
			for node, list := range c.lists {
				if err := k.AddNode(node, list); err != nil {
					t.Fatal(err)
				}
			}
			if c.isolated != "" {
				dir := filepath.Join(k.Host().Sysfs, "devices/system/cpu")
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, "isolated"), []byte(c.isolated), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := k.Host().NodeCPUs()
			if (err != nil) != (c.want == "") || (err == nil && fmt.Sprint(got) != c.want) {
				t.Errorf("%v, %v; want %s", got, err, c.want)
			}
		})
	}
}

func FuzzNodeCPUs(f *testing.F) {
	f.Add("0-3,8")
	f.Add("0-99999999999")
	k, err := vfiotest.New(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, list string) {
		if err := k.AddNode(0, list); err != nil {
			t.Skip(err)
		}
		nodes, err := k.Host().NodeCPUs()
		cpus := nodes[0]
		if err == nil && (!slices.IsSorted(cpus) || len(slices.Compact(slices.Clone(cpus))) != len(cpus) || (len(cpus) > 0 && (cpus[0] < 0 || cpus[len(cpus)-1] > 8191))) {
			t.Errorf("%q became %v", list, cpus)
		}
	})
}
