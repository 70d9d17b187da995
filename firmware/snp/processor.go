package snp

import "fmt"

// Processor is a chip as operators know it. AMD's key service knows only its
// Product: Bergamo and Siena are "Genoa" there, Turin Dense is "Turin".
type Processor struct {
	// Name is "Milan", "Genoa", "Bergamo/Siena", "Turin" or "Turin Dense".
	Name string
	// Generation is the core: "Zen 3", "Zen 4", "Zen 4c", "Zen 5", "Zen 5c".
	Generation string
	Product    Product
}

// ProcessorByCPUID names the chip of a combined family and model, and refuses
// those that are no server chip this code knows.
func ProcessorByCPUID(family, model uint8) (Processor, error) {
	product, err := productByCPUID(family, model)
	if err != nil {
		return Processor{}, err
	}
	switch {
	case product.Name == ProductMilan:
		return Processor{"Milan", "Zen 3", product}, nil
	case product.Name == ProductGenoa && model >= 0xA0:
		return Processor{"Bergamo/Siena", "Zen 4c", product}, nil
	case product.Name == ProductGenoa:
		return Processor{"Genoa", "Zen 4", product}, nil
	case product.Name == ProductTurin && model >= 0x10:
		return Processor{"Turin Dense", "Zen 5c", product}, nil
	case product.Name == ProductTurin:
		return Processor{"Turin", "Zen 5", product}, nil
	}
	return Processor{}, fmt.Errorf("processor family %#x model %#x is of product %s, which has no name here", family, model, product.Name)
}
