package capability

import (
	"slices"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/nvidia"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/vfio"
)

// GPU is one device, GPU or NVSwitch, and whether it is rented out.
type GPU struct {
	// Address is the PCI address, or what the configuration calls it.
	Address string `json:"address"`
	Model   string `json:"model,omitempty"`
	Board   string `json:"board,omitempty"`
	// State is one of the life cycle's, "refused" for what cannot be managed,
	// "unmanaged" too for what could be.
	State string `json:"state"`
	// Mode is the CC mode that was read back last.
	Mode string `json:"mode"`
	// Offered says that it is on duty: free, a guest's, or on its way between.
	Offered bool `json:"offered"`
	// Driver is what the nvidia driver knows of it; nil unless it is on that
	// driver and the driver answers.
	Driver *nvidia.GPU `json:"nvidia,omitempty"`
	// Why it is not offered: quarantine, refusal, or what it waits for.
	Why *contract.Refusal `json:"why,omitempty"`
}

// Inventory tells NVIDIA's devices of a host from outside: what could be
// managed, and why the rest cannot.
func Inventory(functions []vfio.Function) []GPU {
	gpus := []GPU{}
	capable, refused := gpu.Capable(functions)
	for _, f := range functions {
		g := GPU{Address: string(f.Address), State: "unmanaged", Mode: "unknown"}
		if model, ok := capable[f.Address]; ok {
			g.Model, g.Board = model.Name, model.Board
			if _, err := vfio.Companions(f, functions); err != nil {
				g.State, g.Why = "refused", contract.AsRefusal(err)
			}
			gpus = append(gpus, g)
		} else if why := refused[f.Address]; why != nil {
			g.State, g.Why = "refused", why
			gpus = append(gpus, g)
		}
	}
	return gpus
}

// AddDriver puts what the nvidia driver knows beside the devices it has.
func AddDriver(gpus []GPU, r nvidia.Report) {
	for i := range gpus {
		at := slices.IndexFunc(r.GPUs, func(g nvidia.GPU) bool { return string(g.Address) == gpus[i].Address })
		if at >= 0 {
			gpus[i].Driver = &r.GPUs[at]
		}
	}
}

func wireGPUs(gpus []GPU) (out []*api.GPU) {
	for _, g := range gpus {
		w := &api.GPU{Name: g.Address, Model: g.Model, Board: g.Board, State: g.State, Mode: g.Mode, Offered: g.Offered}
		if g.Why != nil {
			w.Why = api.RefusalToWire(g.Why)
		}
		out = append(out, w)
	}
	return out
}
