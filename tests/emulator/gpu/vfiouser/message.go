package vfiouser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
)

// Commands, vfio-user.rst "Message Commands".
const (
	commandVersion     = 1
	commandDMAMap      = 2
	commandDMAUnmap    = 3
	commandInfo        = 4
	commandRegionInfo  = 5
	commandIRQInfo     = 7
	commandSetIRQs     = 8
	commandRegionRead  = 9
	commandRegionWrite = 10
	commandReset       = 13
)

// Flags of a header.
const (
	flagReply   = 1
	flagType    = 0xf
	flagNoReply = 1 << 4
	flagError   = 1 << 5
)

const (
	headerSize = 16
	// MaxData is the largest access to a region, as the server tells its
	// clients; MaxMessage bounds what is taken from the wire.
	MaxData    = 1 << 20
	maxMessage = headerSize + 16 + MaxData
)

// header begins every message. Size counts it too.
type header struct {
	id, command        uint16
	size, flags, error uint32
}

// errMalformed ends a connection: what follows cannot be found any more.
var errMalformed = errors.New("vfiouser: malformed message")

func parseHeader(b []byte) (header, error) {
	h := header{
		id: binary.LittleEndian.Uint16(b), command: binary.LittleEndian.Uint16(b[2:]),
		size: binary.LittleEndian.Uint32(b[4:]), flags: binary.LittleEndian.Uint32(b[8:]),
		error: binary.LittleEndian.Uint32(b[12:]),
	}
	switch {
	case h.size < headerSize || h.size > maxMessage:
		return h, fmt.Errorf("%w: %d bytes", errMalformed, h.size)
	case h.flags&flagType != 0:
		return h, fmt.Errorf("%w: type %d where a command is due", errMalformed, h.flags&flagType)
	}
	return h, nil
}

// answer is a reply to h: its payload, or the error number.
func answer(h header, payload []byte, err error) []byte {
	flags, number := uint32(flagReply), uint32(0)
	if err != nil {
		errno := syscall.EIO
		errors.As(err, &errno)
		flags, number, payload = flags|flagError, uint32(errno), nil
	}
	out := make([]byte, headerSize, headerSize+len(payload))
	binary.LittleEndian.PutUint16(out, h.id)
	binary.LittleEndian.PutUint16(out[2:], h.command)
	binary.LittleEndian.PutUint32(out[4:], uint32(headerSize+len(payload)))
	binary.LittleEndian.PutUint32(out[8:], flags)
	binary.LittleEndian.PutUint32(out[12:], number)
	return append(out, payload...)
}

// words lays out 32-bit fields.
func words(values ...uint32) []byte {
	var out []byte
	for _, v := range values {
		out = binary.LittleEndian.AppendUint32(out, v)
	}
	return out
}
