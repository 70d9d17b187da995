package snp

import (
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

func TestProcessorsMapToTheirProductLine(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name          string
		family, model uint8
		want          string
	}{
		{"Milan", 0x19, 0x01, ProductMilan},
		{"Milan, last model", 0x19, 0x0F, ProductMilan},
		{"Genoa", 0x19, 0x11, ProductGenoa},
		{"Bergamo and Siena", 0x19, 0xA0, ProductGenoa},
		{"Turin", 0x1A, 0x02, ProductTurin},
		{"Turin Dense", 0x1A, 0x11, ProductTurin},
		{"client Zen 3", 0x19, 0x21, ""},
		{"client Zen 4", 0x19, 0x61, ""},
		{"client Zen 5", 0x1A, 0x44, ""},
		{"not stated", 0, 0, ""},
		{"Rome", 0x17, 0x31, ""},
	} {
		p, err := productByCPUID(c.family, c.model)
		if (err != nil) != (c.want == "") || p.Name != c.want {
			t.Errorf("%s: %q (%v), want %q", c.name, p.Name, err, c.want)
		}
	}
}

func TestTCBVersionsDecodeInTheLayoutOfTheirProcessor(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		product string
		raw     uint64
		want    contract.TCB
	}{
		// From reports captured on hardware.
		{ProductMilan, 0xdb18000000000004, contract.TCB{BootLoader: 4, SNP: 0x18, Microcode: 0xdb}},
		{ProductGenoa, 0x541700000000000a, contract.TCB{BootLoader: 0x0a, SNP: 0x17, Microcode: 0x54}},
		{ProductTurin, 0x5100000004010101, contract.TCB{FMC: 1, BootLoader: 1, TEE: 1, SNP: 4, Microcode: 0x51}},
	} {
		p, err := ProductByName(c.product)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.TCB(c.raw); got != c.want || p.EncodeTCB(got) != c.raw {
			t.Errorf("%s %#x: %+v, encodes to %#x", c.product, c.raw, got, p.EncodeTCB(got))
		}
	}
	if _, err := ProductByName("Naples"); err == nil {
		t.Error("an unknown product has a layout")
	}
}

// One large component never makes up for a small one.
func TestFloorsAreComparedComponentByComponent(t *testing.T) {
	t.Parallel()
	floor := contract.TCB{FMC: 1, BootLoader: 10, TEE: 1, SNP: 27, Microcode: 86}
	if !atLeast(floor, floor) || !atLeast(contract.TCB{FMC: 255, BootLoader: 255, TEE: 255, SNP: 255, Microcode: 255}, floor) {
		t.Error("a TCB that reaches the floor is refused")
	}
	for name, low := range map[string]func(*contract.TCB){
		"fmc":         func(c *contract.TCB) { c.FMC = 0 },
		"boot loader": func(c *contract.TCB) { c.BootLoader = 9 },
		"tee":         func(c *contract.TCB) { c.TEE = 0 },
		"snp":         func(c *contract.TCB) { c.SNP = 26 },
		"microcode":   func(c *contract.TCB) { c.Microcode = 85 },
	} {
		have := contract.TCB{FMC: 255, BootLoader: 255, TEE: 255, SNP: 255, Microcode: 255}
		low(&have)
		if atLeast(have, floor) {
			t.Errorf("%s below the floor is accepted", name)
		}
	}
}
