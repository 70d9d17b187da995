package snp_test

import (
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/snp"
)

func TestChipsHaveTheNamesThatOperatorsKnow(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		family, model             uint8
		name, generation, product string
	}{
		{0x19, 0x01, "Milan", "Zen 3", snp.ProductMilan},
		{0x19, 0x0F, "Milan", "Zen 3", snp.ProductMilan},
		{0x19, 0x11, "Genoa", "Zen 4", snp.ProductGenoa},
		{0x19, 0x1F, "Genoa", "Zen 4", snp.ProductGenoa},
		{0x19, 0xA0, "Bergamo/Siena", "Zen 4c", snp.ProductGenoa},
		{0x19, 0xAF, "Bergamo/Siena", "Zen 4c", snp.ProductGenoa},
		{0x1A, 0x00, "Turin", "Zen 5", snp.ProductTurin},
		{0x1A, 0x02, "Turin", "Zen 5", snp.ProductTurin},
		{0x1A, 0x10, "Turin Dense", "Zen 5c", snp.ProductTurin},
		{0x1A, 0x11, "Turin Dense", "Zen 5c", snp.ProductTurin},
	} {
		p, err := snp.ProcessorByCPUID(c.family, c.model)
		if err != nil || p.Name != c.name || p.Generation != c.generation || p.Product.Name != c.product {
			t.Errorf("%#x/%#x: %+v (%v), want %s, %s, %s", c.family, c.model, p, err, c.name, c.generation, c.product)
		}
	}
}

func TestUnknownChipsAreRefusedByName(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ family, model uint8 }{{0x17, 0x31}, {0x19, 0x21}, {0x19, 0x61}, {0x19, 0xB0}, {0x1A, 0x12}, {0x1A, 0x44}, {0x1B, 0}} {
		_, err := snp.ProcessorByCPUID(c.family, c.model)
		if err == nil || !strings.Contains(err.Error(), "family") {
			t.Errorf("%#x/%#x: %v", c.family, c.model, err)
		}
	}
}
