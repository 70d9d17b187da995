package pool

import (
	"slices"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/vfio"
)

// Record is what must be remembered of one device.
type Record struct {
	Address vfio.Address `json:"address"`
	Model   gpu.Model    `json:"model"`
	State   State        `json:"state"`
	// Since is when it came into the state.
	Since time.Time `json:"since"`
	// Duty says that it is to be offered; false once it was released.
	Duty bool `json:"duty"`
	// Leaving says that an operator had it released, Anyway that it goes back
	// even when CC cannot be switched off.
	Leaving bool `json:"leaving,omitempty"`
	Anyway  bool `json:"anyway,omitempty"`
	// Step was begun at StepAt and is not known to be done.
	Step   Step      `json:"step,omitempty"`
	StepAt time.Time `json:"step_at,omitzero"`
	// Bindings are what the device and its companions were before: theirs is
	// the way back. The device comes first.
	Bindings []vfio.Binding `json:"bindings,omitempty"`
	// Guest has it, or is promised it.
	Guest string `json:"guest,omitempty"`
	// Mode was read back at last, PDI (16 hex digits) whenever it could be read.
	Mode ccmode.Mode `json:"mode"`
	PDI  string      `json:"pdi,omitempty"`
	// UUID is the nvidia driver's name for it, if it was ever on that driver.
	UUID string `json:"uuid,omitempty"`
	// FSP is the version of its boot processor's firmware.
	FSP        string      `json:"fsp,omitempty"`
	Quarantine *Quarantine `json:"quarantine,omitempty"`
	// BootID is the kernel's under which the record was written.
	BootID string `json:"boot_id"`
}

// Quarantine is why a device is not offered.
type Quarantine struct {
	Reason *contract.Refusal `json:"reason"`
	At     time.Time         `json:"at"`
	// From and Step are where in its life it happened.
	From State `json:"from"`
	Step Step  `json:"step,omitempty"`
	// Guest had it last.
	Guest string `json:"guest,omitempty"`
	// Evidence are raw observations, in their order.
	Evidence []string `json:"evidence,omitempty"`
}

func (r Record) clone() Record {
	r.Bindings = slices.Clone(r.Bindings)
	return r
}

// chip tells the family; a record exists only of devices that have one.
func (r Record) chip() (ccmode.Chip, error) {
	if len(r.Bindings) == 0 {
		return 0, contract.Refuse("gpu.not-bound", "let the agent bind it first", "%s was never bound", r.Address)
	}
	return ccmode.ChipOf(r.Bindings[0].Vendor, r.Bindings[0].Device)
}

// idle is the mode in which a device waits for a guest: switches know no other
// than PPCIe, which only a whole board is in.
func idle(chip ccmode.Chip) ccmode.Mode {
	if chip == ccmode.NVSwitch3 {
		return ccmode.Off
	}
	return ccmode.On
}
