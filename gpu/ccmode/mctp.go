package ccmode

import (
	"errors"
	"fmt"
)

// Framing of one message to or from the FSP: an MCTP packet (DMTF DSP0236)
// that holds one vendor-defined message, in NVIDIA's words an NVDM.
const (
	mctpSinglePacket = 0xc0000000 // start and end of message, tag and sequence 0
	mctpStartEnd     = 0xc0000000
	mctpVendorPCI    = 0x7e
	nvdmPRC          = 0x13 // product reconfiguration: knobs
	nvdmResponse     = 0x15
	minReply         = 5 // dwords
)

func vendorHeader(nvdm uint32) uint32 { return nvdm<<24 | vendorNVIDIA<<8 | mctpVendorPCI }

// request frames a message of the given type.
func request(nvdm uint32, body ...uint32) []uint32 {
	return append([]uint32{mctpSinglePacket, vendorHeader(nvdm)}, body...)
}

// reply is the FSP's answer.
type reply struct {
	code    fspCode
	payload []uint32
}

// parseReply checks a packet against the type of its request. The FSP's error
// code is a value, not an error: what it means depends on the request.
func parseReply(nvdm uint32, packet []uint32) (reply, error) {
	switch {
	case len(packet) < minReply:
		return reply{}, fmt.Errorf("reply of %d dwords, want at least %d", len(packet), minReply)
	case packet[0]&mctpStartEnd != mctpStartEnd:
		return reply{}, fmt.Errorf("reply is a part of a longer message (MCTP header %#08x)", packet[0])
	case packet[1] != vendorHeader(nvdmResponse):
		return reply{}, fmt.Errorf("reply is no FSP response (message header %#08x)", packet[1])
	case packet[3] != nvdm:
		return reply{}, fmt.Errorf("reply answers a message of type %#x, want %#x", packet[3], nvdm)
	case packet[4] == allOnes:
		return reply{}, errors.New("reply breaks off before its error code")
	}
	return reply{code: fspCode(packet[4]), payload: packet[minReply:]}, nil
}

// fspCode is the FSP's verdict over a request; 0 is success.
type fspCode uint32

const fspInvalidKnob fspCode = 0x1e3

// String gives the code and its meaning, where one is published.
func (c fspCode) String() string {
	meaning := map[fspCode]string{
		0: "success", 0x9e: "invalid state", 0x9f: "IFR file not found", 0xa0: "not supported",
		0xa1: "invalid data", fspInvalidKnob: "invalid knob",
	}[c]
	if meaning == "" {
		meaning = "meaning not published"
	}
	return fmt.Sprintf("%#x, %s", uint32(c), meaning)
}

func (c fspCode) remedy() string {
	switch c {
	case 0x9e:
		return "reset the device and try again"
	case 0x9f:
		return "update the device's firmware"
	case 0xa0, fspInvalidKnob:
		return "this firmware lacks the feature: update it, or use another mode"
	}
	return "look whether the BMC forbids in-band control; if not, report the code with the firmware's version"
}
