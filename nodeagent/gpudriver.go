package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/gpu/nvidia"
	"github.com/confidential-node/agent/vfio"
)

// driver asks the nvidia driver for a GPU that it has now; nil for any other.
// The verb asks and not the agent: whoever asks has every GPU open meanwhile,
// and the agent would find itself to be using what it is to take.
func (f *gpuFlags) driver(address string) *nvidia.GPU {
	function, err := pciHost("/").Function(vfio.Address(address))
	if err != nil {
		return nil
	}
	gpus := askDriver([]vfio.Function{function}, xidWatch, hclog.NewNullLogger()).GPUs
	at := slices.IndexFunc(gpus, func(g nvidia.GPU) bool { return string(g.Address) == address })
	if at < 0 {
		return nil
	}
	return &gpus[at]
}

// driverText leaves out what is not told.
func driverText(g *nvidia.GPU) string {
	facts := []string{g.Name, g.UUID}
	if g.VBIOS != "" {
		facts = append(facts, "VBIOS "+g.VBIOS)
	}
	if g.ECC != nil {
		facts = append(facts, map[bool]string{true: "ECC on", false: "ECC off"}[*g.ECC])
	}
	if g.TemperatureC != nil {
		facts = append(facts, fmt.Sprintf("%d °C", *g.TemperatureC))
	}
	if r := g.Rows; r != nil {
		text := fmt.Sprintf("%d remapped rows (%d uncorrectable)", r.Correctable+r.Uncorrectable, r.Uncorrectable)
		if r.Pending {
			text += ", more at the next reset"
		}
		if r.Failed {
			text += ", no spare row left: have it replaced"
		}
		facts = append(facts, text)
	}
	if len(g.Xids) > 0 {
		facts = append(facts, fmt.Sprintf("Xid %d", g.Xids))
	}
	return strings.Join(slices.DeleteFunc(facts, func(s string) bool { return s == "" }), ", ")
}
