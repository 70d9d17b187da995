package pool

import (
	"cmp"
	"slices"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/vfio"
)

// AllCapable is the selector of every device that can be rented out
// confidentially and that nobody prepared for another use.
const AllCapable = "all-capable"

// Problem is why a device is not managed, or not now.
type Problem struct {
	// Selector or address it is about.
	About string
	Why   *contract.Refusal
}

// selection is what the configuration comes to on this host.
type selection struct {
	chosen   map[vfio.Address]gpu.Model
	problems []Problem
}

// choose finds the devices that selectors name: addresses, UUIDs, or
// AllCapable. uuids are those that are known, managed the devices that are the
// agent's already. Pure.
func choose(selectors []string, functions []vfio.Function, uuids map[string]vfio.Address, managed func(vfio.Address) bool) selection {
	s := selection{chosen: map[vfio.Address]gpu.Model{}}
	refuse := func(about string, why *contract.Refusal) { s.problems = append(s.problems, Problem{about, why}) }
	capable, refused := gpu.Capable(functions)
	for _, selector := range selectors {
		if selector == AllCapable {
			for a, why := range refused {
				refuse(string(a), why)
			}
			for _, f := range functions {
				if model, ok := capable[f.Address]; ok {
					s.take(f, model, functions, f.Bound() && !managed(f.Address))
				}
			}
			continue
		}
		a := vfio.Address(selector)
		if strings.HasPrefix(selector, "GPU-") {
			var known bool
			if a, known = uuids[selector]; !known {
				refuse(selector, contract.Refuse("gpu.unknown-uuid", "name it by its PCI address (`lspci -Dnn -d 10de:`), or load the nvidia driver once: UUIDs are that driver's",
					"no device of this host is known to be %s", selector))
				continue
			}
		}
		at := slices.IndexFunc(functions, func(f vfio.Function) bool { return f.Address == a })
		switch model, ok := capable[a]; {
		case at < 0:
			refuse(selector, contract.Refuse("vfio.no-device", "list the devices with `lspci -Dnn`; correct gpu.manage, or reseat the device",
				"there is no PCI device at %s", a))
		case refused[a] != nil:
			refuse(selector, refused[a])
		case !ok:
			_, err := gpu.Identify(functions[at])
			refuse(selector, contract.AsRefusal(err))
		case s.chosen[a] != gpu.Model{}:
			refuse(selector, contract.Refuse("gpu.named-twice", "name each device once in gpu.manage", "%s and another entry of gpu.manage are one device, %s", selector, a))
		default:
			s.take(functions[at], model, functions, false)
		}
	}
	slices.SortFunc(s.problems, func(a, b Problem) int { return cmp.Compare(a.About, b.About) })
	return s
}

// take chooses a device unless its group or its owner forbids it.
func (s *selection) take(f vfio.Function, model gpu.Model, all []vfio.Function, operators bool) {
	_, err := vfio.Companions(f, all)
	switch {
	case err != nil:
		s.problems = append(s.problems, Problem{string(f.Address), contract.AsRefusal(err)})
	case operators:
		s.problems = append(s.problems, Problem{string(f.Address), contract.Refuse("gpu.operators-own",
			"name its address in gpu.manage if the agent is to have it",
			"%s was on vfio-pci before the agent came: somebody passes it through", f.Address)})
	default:
		s.chosen[f.Address] = model
	}
}
