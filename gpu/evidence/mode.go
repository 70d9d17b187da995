package evidence

import (
	"fmt"
	"slices"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/spdm"
)

// Modes of a GPU as facts name them. DevTools is none of them: a transcript
// has no field for it, only the measurements differ.
const (
	modeOn            = "on"
	modeMulti         = "multi-gpu"
	modeProtectedPCIe = "ppcie"
)

// switches is how many NVSwitches an HGX board of Hopper has.
const switches = 4

// modeOf is the mode a transcript states. Firmware that states none is in the
// only mode that it has evidence in.
func modeOf(o spdm.Opaque) string {
	switch {
	case o.ProtectedPCIe:
		return modeProtectedPCIe
	case o.Feature != nil && *o.Feature == spdm.MultiPassthrough:
		return modeMulti
	}
	return modeOn
}

// mode judges how the GPUs protect what goes between them and the guest. A
// GPU that is not confidential at all has no evidence.
func mode(a *contract.GPUAppraisal, gpus []*member, model string, count int) {
	allowed, why := allowedModes(gpus, model, count)
	each(a, "gpu-mode", gpus, "in a mode that encrypts: "+modeOf(gpus[0].report.Opaque), func(g *member) (string, string, string) {
		if got := modeOf(g.report.Opaque); !slices.Contains(allowed, got) {
			return fmt.Sprint(allowed), got, why
		}
		return "", "", ""
	})
	if !slices.Contains(allowed, modeProtectedPCIe) {
		return
	}
	first := board(gpus[0])
	each(a, "gpu-switches", gpus, "all see the same four NVSwitches", func(g *member) (string, string, string) {
		switch got := board(g); {
		case len(got) != switches:
			return fmt.Sprintf("%d NVSwitches", switches), fmt.Sprint(got), "sees another number of NVSwitches than its board has"
		case !slices.Equal(got, first):
			return fmt.Sprint(first), fmt.Sprint(got), "sees other NVSwitches than the first: they are not on one board"
		}
		return "", "", ""
	})
	a.Warnings = append(a.Warnings, contract.Warning{Name: "gpu-switches", Why: "the NVSwitches were not asked for evidence of their own; GPUs name them, and links between GPUs are not encrypted in this mode"})
}

func allowedModes(gpus []*member, model string, count int) (modes []string, why string) {
	switch blackwell := gpus[0].Arch == contract.ArchBlackwell; {
	case gpu.WholeBoard(model, count):
		return []string{modeProtectedPCIe}, "eight GPUs of Hopper are one guest's in Protected PCIe only"
	case blackwell && count > 1:
		return []string{modeMulti}, "several GPUs of Blackwell have to encrypt the links between them"
	case blackwell:
		return []string{modeOn, modeMulti}, "Protected PCIe is no mode of Blackwell"
	}
	return []string{modeOn}, "a single GPU has to be in CC mode, which encrypts what goes to and from it alone"
}

// board are the NVSwitches that a GPU sees, each once however many links lead
// to it.
func board(g *member) []spdm.PDI {
	seen := slices.Clone(g.report.Opaque.Switches)
	slices.Sort(seen)
	return slices.Compact(seen)
}
