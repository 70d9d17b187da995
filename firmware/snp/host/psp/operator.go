package psp

import (
	"runtime"

	"github.com/confidential-node/agent/firmware/contract"
)

// Operator changes the platform. It exists for explicit commands of the
// host's operator, given by hand after a warning, and for nothing else: the
// agent never makes one on its own, whatever a control plane asks.
type Operator struct{ device *Device }

// OpenOperator opens the device below root for changing it. Call it only on
// the explicit command of the host's operator.
func OpenOperator(root string, kernel Ioctler) (*Operator, error) {
	device, err := Open(root, kernel)
	if err != nil {
		return nil, err
	}
	return &Operator{device}, nil
}

// Close closes the device.
func (o *Operator) Close() error { return o.device.Close() }

// Commit makes the running firmware the oldest one that this chip will ever
// run again. IRREVERSIBLE; only on explicit operator command.
func (o *Operator) Commit() error { return o.device.issue(SNPCommitCommand, nil) }

// SetConfig sets the reported TCB and the two masks. VCEKs and a loaded VLEK
// of another TCB stop fitting; only on explicit operator command.
func (o *Operator) SetConfig(c Config) error {
	data := c.Encode()
	return o.device.issue(SNPSetConfigCommand, data[:])
}

// LoadVLEK loads a hashstick that AMD's key service wrapped for this chip and
// its reported TCB. Only on explicit operator command.
func (o *Operator) LoadVLEK(hashstick []byte) error {
	if len(hashstick) != HashstickSize {
		return contract.Refuse("psp.bad-hashstick", "use the file exactly as AMD's key service returned it",
			"a wrapped VLEK hashstick has %d bytes, this one %d", HashstickSize, len(hashstick))
	}
	var pins runtime.Pinner
	defer pins.Unpin()
	pins.Pin(&hashstick[0])
	data := VLEKLoad{Address: addressOf(hashstick)}.Encode()
	return o.device.issue(SNPVLEKLoadCommand, data[:])
}
