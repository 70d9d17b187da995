package snp

import (
	"fmt"
	"slices"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// Product is a processor line as AMD's key service names it, with the layout
// of its TCB_VERSION and chip id.
type Product struct {
	// Name is "Milan", "Genoa" (also Bergamo and Siena) or "Turin".
	Name string
	// hasFMC selects the TCB layout of Turin and later.
	hasFMC bool
	// hwidSize is how many bytes of CHIP_ID mean something.
	hwidSize int
}

// Product lines.
const (
	ProductMilan = "Milan"
	ProductGenoa = "Genoa"
	ProductTurin = "Turin"
)

// productByCPUID maps family and model (combined, as CPUID gives them).
func productByCPUID(family, model uint8) (Product, error) {
	switch {
	case family == 0x19 && model <= 0x0F:
		return ProductByName(ProductMilan)
	case family == 0x19 && (model >= 0x10 && model <= 0x1F || model >= 0xA0 && model <= 0xAF):
		return ProductByName(ProductGenoa)
	case family == 0x1A && model <= 0x11:
		return ProductByName(ProductTurin)
	}
	return Product{}, fmt.Errorf("processor family %#x model %#x is not known", family, model)
}

// ProductByName returns the line AMD's key service calls so.
func ProductByName(name string) (Product, error) {
	switch name {
	case ProductMilan, ProductGenoa:
		return Product{Name: name, hwidSize: 64}, nil
	case ProductTurin:
		return Product{Name: name, hasFMC: true, hwidSize: 8}, nil
	}
	return Product{}, fmt.Errorf("product %q is not known", name)
}

// ParseProducts reads the names of lines, in upper or lower case.
func ParseProducts(names []string) ([]Product, error) {
	lines := []string{ProductMilan, ProductGenoa, ProductTurin}
	var products []Product
	for _, name := range names {
		i := slices.IndexFunc(lines, func(line string) bool { return strings.EqualFold(line, name) })
		if i < 0 {
			return nil, fmt.Errorf("product %q is none of milan, genoa (also Bergamo and Siena), turin", name)
		}
		p, err := ProductByName(lines[i])
		if err != nil {
			return nil, err
		}
		products = append(products, p)
	}
	return products, nil
}

// TCB decodes a TCB_VERSION (AMD 56860, table TCB_VERSION: one layout up to
// Genoa, another from Turin on).
func (p Product) TCB(v uint64) contract.TCB {
	b := func(i int) uint8 { return uint8(v >> (8 * i)) }
	if p.hasFMC {
		return contract.TCB{FMC: b(0), BootLoader: b(1), TEE: b(2), SNP: b(3), Microcode: b(7)}
	}
	return contract.TCB{BootLoader: b(0), TEE: b(1), SNP: b(6), Microcode: b(7)}
}

// EncodeTCB is the inverse of TCB.
func (p Product) EncodeTCB(t contract.TCB) uint64 {
	at := func(i int, c uint8) uint64 { return uint64(c) << (8 * i) }
	if p.hasFMC {
		return at(0, t.FMC) | at(1, t.BootLoader) | at(2, t.TEE) | at(3, t.SNP) | at(7, t.Microcode)
	}
	return at(0, t.BootLoader) | at(1, t.TEE) | at(6, t.SNP) | at(7, t.Microcode)
}

// atLeast compares component by component.
func atLeast(have, floor contract.TCB) bool {
	return have.FMC >= floor.FMC && have.BootLoader >= floor.BootLoader && have.TEE >= floor.TEE &&
		have.SNP >= floor.SNP && have.Microcode >= floor.Microcode
}

// GenoaTCB encodes a TCB in the layout up to Genoa.
func GenoaTCB(t contract.TCB) uint64 { return Product{Name: ProductGenoa, hwidSize: 64}.EncodeTCB(t) }
