package ccmode

import (
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
)

// tape is a device whose mailbox registers read as whatever comes next on it.
// At its end they read as zero for a while, then the device is gone: waiting
// out every limit would cost thousands of looks for each input. It notes what
// was read from the data registers since the last doorbell.
type tape struct {
	space
	words    []byte
	doorbell uint32
	data     uint32
	answer   []uint32
	reads    int
	idle     int
}

const idleReads = 64

func (f *tape) Read32(offset uint32) (value uint32, err error) {
	f.reads++
	if offset == 0 {
		return 0x180000a1, nil
	}
	switch {
	case len(f.words) >= 4:
		value, f.words = binary.LittleEndian.Uint32(f.words), f.words[4:]
	case f.idle == idleReads:
		return 0, errors.New("end of tape")
	default:
		f.idle++
	}
	if offset == f.data {
		f.answer = append(f.answer, value)
	}
	return value, nil
}

func (f *tape) Write32(offset, _ uint32) error {
	if offset == f.doorbell {
		f.answer = nil
	}
	return nil
}

func (f *tape) Reset(context.Context) error { return nil }

// dwords is a tape of these values.
func dwords(values ...uint32) (b []byte) {
	for _, v := range values {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// answers checks that a knob is believed only when a whole, well-formed answer
// was read, and that all else is a refusal of this package, after few accesses.
func answers(t *testing.T, chip Chip, doorbell, data uint32, words []byte) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := &tape{words: words, doorbell: doorbell, data: data}
		value, err := New("fuzz", chip, f).readKnob(t.Context(), CCM)
		// What is on the tape, its end, and what refusals look at.
		if limit := 2*idleReads + len(words); f.reads > limit {
			t.Errorf("%d reads for %d bytes", f.reads, len(words))
		}
		if err != nil {
			if _, absent := errors.AsType[noKnobError](err); !absent && !strings.HasPrefix(code(err), "gpu.") {
				t.Errorf("no refusal of ours: %v", err)
			}
			return
		}
		a := f.answer
		if len(a) != 6 || a[0]>>30 != 3 || a[1] != 0x1510de7e || a[3] != 0x13 || a[4] != 0 || uint32(value) != a[5]&0xffff {
			t.Errorf("%#x was believed, of the answer %08x", value, a)
		}
	})
}

// FuzzEMEM gives arbitrary pointers and answers of a Hopper FSP.
func FuzzEMEM(f *testing.F) {
	idle := []uint32{0x800, 0x800, 0x800, 0x800}
	good := []uint32{0xc0000000, 0x1510de7e, 1, 0x13, 0, 0xdead0001}
	pointers := []uint32{0x800, 0x814, 0x800, 0x814}
	f.Add(dwords(append(append(append(append([]uint32{}, idle...), idle...), pointers...), good...)...))
	f.Add(dwords(append(append(append([]uint32{}, idle...), 0x800, 0x814, 0x800, 0x814), good...)...)) // stale
	f.Add(dwords(append(append([]uint32{}, idle...), 0x800, 0x800, 0x800, 0x800, 0xfffffffc, 4, 0xfffffffc, 4)...))
	f.Add(dwords(0xbadf4100))
	f.Fuzz(func(t *testing.T, words []byte) { answers(t, Hopper, 0x8f2c10, 0x8f2ad4, words) })
}

// FuzzMNOC gives arbitrary states and answers of a Blackwell mailbox.
func FuzzMNOC(f *testing.F) {
	const ready, failed, credit = 1 << 24, 1 << 25, 1 << 26
	good := []uint32{0, ready, credit, 0, ready | 24, 0xc0000000, 0x1510de7e, 1, 0x13, 0, 0xdead0001, 0}
	f.Add(dwords(good...))
	f.Add(dwords(append([]uint32{ready | 8, 1, 2}, good...)...)) // stale
	f.Add(dwords(0, ready, credit, 0, ready|0xfffff))
	f.Add(dwords(0, ready, credit, failed))
	f.Add(dwords(0, ready, credit, 0, ready|failed|24))
	f.Add(dwords(0, 0xbadf4100))
	f.Fuzz(func(t *testing.T, words []byte) { answers(t, Blackwell, 0x8f1f88, 0x8f1f08, words) })
}
