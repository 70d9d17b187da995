package rim

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/confidential-node/agent/gpu/spdm"
)

// nvdec0 is the measurement that means nothing while NVDEC0 is disabled.
const nvdec0 = 35

// Compare says in which way a report is not what NVIDIA's manifests for its
// driver and its VBIOS demand; nil when it is. Exactly one manifest for each
// must be among those given; others are passed over.
//
// What a GPU in devtools mode measures differs from production firmware: a
// report that fits is one of a GPU that cannot be debugged.
func Compare(r *spdm.Report, product string, manifests []*Manifest) error {
	driver, err := find("driver", r.Opaque.Driver, product, manifests)
	if err != nil {
		return err
	}
	vbios, err := find("VBIOS", r.Opaque.VBIOS, product, manifests)
	if err != nil {
		return err
	}
	golden := maps.Clone(driver.Golden)
	for index, digests := range vbios.Golden {
		if _, both := golden[index]; both {
			return fmt.Errorf("the manifests for driver %s and VBIOS %s both speak of measurement %d", driver.Version, vbios.Version, index)
		}
		golden[index] = digests
	}
	for _, index := range slices.Sorted(maps.Keys(golden)) {
		switch {
		case index == nvdec0 && r.Opaque.NVDEC0Disabled:
		case index >= len(r.Measurements):
			return fmt.Errorf("the report has no measurement %d", index)
		case !slices.Contains(golden[index], r.Measurements[index]):
			return fmt.Errorf("measurement %d is %x, none that NVIDIA's manifests name", index, r.Measurements[index])
		}
	}
	return nil
}

func find(what, version, product string, manifests []*Manifest) (*Manifest, error) {
	if version == "" {
		return nil, fmt.Errorf("the report does not state its %s", what)
	}
	var found *Manifest
	for _, m := range manifests {
		if !strings.EqualFold(m.Version, version) || m.Product != product {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("two manifests for %s %s of %s", what, version, product)
		}
		found = m
	}
	if found == nil {
		return nil, fmt.Errorf("no manifest for %s %s of %s is at hand; get it from NVIDIA's RIM service", what, version, product)
	}
	return found, nil
}
