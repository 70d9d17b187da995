// Package gpu knows which NVIDIA GPUs can be rented out confidentially and in
// what sets. It is the rule table of admission and of the life cycle (package
// gpu/pool). Pure, no I/O.
package gpu

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// product is one row of the rule table.
type product struct {
	// names are upper-case marketing names without vendor.
	names []string
	// counts are the set sizes one guest may have; empty means none, and
	// reason says why in words.
	counts []int
	reason string
	remedy string
	// board is how many make a whole board, which runs in another mode and
	// with its switches; 0 where there is no such thing.
	board int
	// chip is what its certificates call it; boards of one chip cannot be told
	// apart by them.
	chip string
}

const useOther = "ask for H100, H200, B200, B300 or RTX PRO 6000"

// products is the matrix of NVIDIA's confidential computing support: Hopper
// single or as a whole HGX board under Protected PCIe, Blackwell HGX with
// NVLink encryption, everything before Hopper and everything with a Grace CPU
// not at all.
func products() []product {
	const encrypted = "Blackwell HGX encrypts NVLink between 1, 2, 4 or 8 GPUs"
	return []product{
		{names: []string{"H100", "H200", "H800", "H20"}, counts: []int{1, 8}, reason: "Hopper runs one GPU in CC mode, or all eight of an HGX board with their NVSwitches under PPCIe", remedy: "ask for 1, or for 8 under PPCIe", board: 8, chip: "GH100"},
		{names: []string{"B200"}, counts: []int{1, 2, 4, 8}, reason: encrypted, remedy: "ask for 1, 2, 4 or 8", chip: "GB100"},
		{names: []string{"B300"}, counts: []int{1, 2, 4, 8}, reason: encrypted, remedy: "ask for 1, 2, 4 or 8", chip: "GB110"},
		{names: []string{"RTX PRO 6000"}, counts: []int{1}, reason: "RTX PRO 6000 Server Edition runs one GPU in CC mode", remedy: "ask for 1", chip: "GB202"},
		{names: []string{"A100", "A30", "A10"}, reason: "Ampere has no CC mode a host can set", remedy: useOther},
		{names: []string{"L40S", "L40", "L4", "RTX 4090"}, reason: "Ada has no CC mode; its driver refuses to load in a confidential guest", remedy: useOther},
		{names: []string{"GH200", "GB200", "GB300"}, reason: "its Grace CPU has no TEE", remedy: useOther},
	}
}

// Rule says whether one guest may have count GPUs of a model. It returns nil
// when it may, otherwise gpu.unsupported-model, gpu.unsupported-count or
// gpu.unknown-model with the reason in words. Case and a leading "NVIDIA" do
// not matter.
func Rule(model string, count int) *contract.Refusal {
	name := Canonical(model)
	for _, p := range products() {
		switch {
		case !slices.Contains(p.names, name):
			continue
		case len(p.counts) == 0:
			return contract.Refuse("gpu.unsupported-model", p.remedy, "%s cannot be used confidentially: %s", model, p.reason)
		case !slices.Contains(p.counts, count):
			return contract.Refuse("gpu.unsupported-count", p.remedy, "%d × %s cannot be one guest's: %s", count, model, p.reason)
		}
		return nil
	}
	return contract.Refuse("gpu.unknown-model", useOther, "GPU model %q is not known to this build", model)
}

// ParseDemand reads MODEL[:COUNT], one where no count is given, and refuses
// what Rule refuses.
func ParseDemand(text string) (contract.GPU, error) {
	demand := contract.GPU{Model: text, Count: 1}
	if model, count, counted := strings.Cut(text, ":"); counted {
		var err error
		demand.Model = model
		if demand.Count, err = strconv.Atoi(count); err != nil {
			return demand, fmt.Errorf("parsing GPUs: %.100q is not MODEL[:COUNT]", text)
		}
	}
	if refused := Rule(demand.Model, demand.Count); refused != nil {
		return demand, refused
	}
	return demand, nil
}

// WholeBoard says whether so many of a model are an HGX Hopper board, which
// goes to a guest with its NVSwitches and under Protected PCIe.
func WholeBoard(model string, count int) bool {
	return slices.ContainsFunc(products(), func(p product) bool {
		return p.board > 0 && count == p.board && slices.Contains(p.names, Canonical(model))
	})
}

// Chip is what certificates of a model's GPUs call it, "GH100", and which
// models have the same chip; "" for a model that cannot be rented out.
func Chip(model string) (chip string, models []string) {
	for _, p := range products() {
		if slices.Contains(p.names, Canonical(model)) {
			return p.chip, p.names
		}
	}
	return "", nil
}

// Canonical is a model's name as the tables have it: upper case, without
// vendor, and without the edition that is the only one with CC.
func Canonical(model string) string {
	name := strings.TrimPrefix(strings.ToUpper(strings.TrimSpace(model)), "NVIDIA ")
	return strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(name), " SERVER EDITION"))
}
