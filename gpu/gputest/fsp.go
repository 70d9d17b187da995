package gputest

import (
	"slices"
	"time"
)

// fsp is the boot processor's mailbox: the same messages through shared
// memory (Hopper, NVSwitch) or through a FIFO (Blackwell).
type fsp struct {
	// Shared memory: one channel of 256 dwords, and the pointers of both queues.
	memory                   [256]uint32
	cursor                   uint32 // byte address, with increment on access
	incWrite, incRead        bool
	head, tail, mHead, mTail uint32

	// FIFO.
	expect  int // dwords of the request still to come
	inbound []uint32

	reply   []uint32 // not yet visible
	replyAt time.Time
	visible []uint32 // FIFO: to be read
}

const (
	channel     = 0x800
	maxRequests = 1000 // kept for comparison
)

func (f *fsp) clear() {
	*f = fsp{head: channel, tail: channel, mHead: channel, mTail: channel}
}

// answer makes a reply visible at once.
func (f *fsp) answer(reply []uint32) {
	copy(f.memory[:], reply)
	f.mHead, f.mTail = channel, channel+4*uint32(len(reply)-1)
	f.visible = reply
}

// settle lets time pass.
func (f *fsp) settle(now time.Time) {
	if f.reply != nil && !now.Before(f.replyAt) {
		f.answer(f.reply)
		f.reply = nil
	}
}

func (e *Emulator) fspRead(offset uint32) (uint32, bool) {
	if offset < 0x8f1f00 && offset != 0x8f2ad0 && offset != 0x8f2ad4 && (offset < 0x8f2c00 || offset > 0x8f2cff) {
		return 0, false
	}
	if time.Since(e.reset) < e.model.Timing.Boot {
		return 0xbadf4100, true
	}
	e.fsp.settle(time.Now())
	f := &e.fsp
	if e.model.chip.blackwell {
		return e.fifoRead(offset)
	}
	switch offset {
	case 0x8f2ad0:
		return f.cursor, true
	case 0x8f2ad4:
		value := f.memory[f.cursor%1024/4]
		if f.incRead {
			f.cursor += 4
		}
		return value, true
	case 0x8f2c10:
		return f.head, true
	case 0x8f2c14:
		return f.tail, true
	case 0x8f2c90:
		return f.mHead, true
	case 0x8f2c94:
		return f.mTail, true
	}
	return 0, false
}

func (e *Emulator) fifoRead(offset uint32) (uint32, bool) {
	f := &e.fsp
	switch offset {
	case 0x8f1f84:
		if e.faults.MailboxError {
			return 1 << 25, true
		}
		if e.faults.FSPStuck {
			return 0, true
		}
		if e.faults.RequestError && f.expect == 0 && len(f.inbound) > 0 {
			return 1<<25 | 1<<24 | 1<<26, true
		}
		return 1<<24 | 1<<26, true
	case 0x8f1f04:
		if len(f.visible) == 0 {
			if e.faults.AnswerError && len(f.inbound) > 0 && f.reply == nil {
				return 1 << 25, true
			}
			return 0, true
		}
		return 1<<24 | uint32(4*len(f.visible)), true
	case 0x8f1f08:
		if len(f.visible) == 0 {
			return 0xbadf5040, true
		}
		value := f.visible[0]
		f.visible = f.visible[1:]
		return value, true
	}
	return 0, false
}

// fspWrite takes a write to the mailbox and tells whether it was one.
func (e *Emulator) fspWrite(offset, value uint32) bool {
	f := &e.fsp
	if e.model.chip.blackwell {
		switch offset {
		case 0x8f1f84:
			f.expect, f.inbound = 0, nil
			if size := value & 0xfffff; value&(1<<20) != 0 && size <= 4160 {
				f.expect = int(size) / 4
			}
		case 0x8f1f88:
			if f.expect == 0 { // nothing is due
				break
			}
			f.inbound = append(f.inbound, value)
			if f.expect--; f.expect == 0 {
				e.take(f.inbound)
			}
		default:
			return false
		}
		return true
	}
	switch offset {
	case 0x8f2ad0:
		f.cursor, f.incWrite, f.incRead = value&0xffff, value&(1<<24) != 0, value&(1<<25) != 0
	case 0x8f2ad4:
		f.memory[f.cursor%1024/4] = value
		if f.incWrite {
			f.cursor += 4
		}
	case 0x8f2c14:
		f.tail = value
	case 0x8f2c10:
		f.head = value
		if f.head != f.tail && !e.faults.FSPStuck {
			var request []uint32 // none where the pointers leave the channel
			if f.head >= channel && f.tail > f.head && f.tail < channel+4*uint32(len(f.memory)) {
				request = slices.Clone(f.memory[:(f.tail-f.head)/4+1])
			}
			f.head, f.tail = channel, channel
			e.take(request)
		}
	case 0x8f2c90:
		f.mHead = value
	case 0x8f2c94:
		f.mTail = value
	default:
		return false
	}
	return true
}

// take executes a request and prepares the answer.
func (e *Emulator) take(request []uint32) {
	if len(e.requests) < maxRequests {
		e.requests = append(e.requests, request)
	}
	if e.faults.FSPSilent {
		return
	}
	e.fsp.reply = e.execute(request)
	e.fsp.replyAt = time.Now().Add(e.faults.ReplyDelay)
	e.fsp.settle(time.Now())
}

func (e *Emulator) execute(request []uint32) []uint32 {
	reply := func(code uint32, payload ...uint32) []uint32 {
		nvdm := uint32(0x13)
		if e.faults.WrongType {
			nvdm = 0x14
		}
		packet := append([]uint32{0xc0000000, 0x1510de7e, 1, nvdm, code}, payload...)
		switch {
		case e.faults.ShortReply:
			// EMEM cannot carry one dword; both transports can carry two.
			return packet[:2]
		case e.faults.LongReply:
			return append(packet, 0)
		}
		return packet
	}
	if len(request) < 3 || request[0] != 0xc0000000 || request[1] != 0x1310de7e {
		return reply(0xa1)
	}
	if e.faults.ReplyCode != 0 {
		return reply(e.faults.ReplyCode)
	}
	verb, knob := request[2]&0xffff, uint16(request[2]>>16)
	value, known := e.knobs[knob]
	switch {
	case !known, slices.Contains(e.faults.NoKnobs, knob):
		return reply(0x1e3)
	case verb == 0x020c && len(request) == 3:
		return reply(0, 0xdead0000|uint32(value)) // the upper half is dirt
	case verb == 0x020d && len(request) == 4:
		if e.faults.WriteCode != 0 {
			return reply(e.faults.WriteCode)
		}
		if !e.allowed(knob) {
			return reply(0xa2) // which code silicon gives is not published
		}
		if !e.faults.LosesKnobWrites {
			e.setKnob(knob, uint16(request[3]))
		}
		return reply(0)
	}
	return reply(0xa1)
}

// allowed tells whether the host may write a knob: the knob that says so is
// the one before it.
func (e *Emulator) allowed(knob uint16) bool {
	switch knob {
	case 6, 8, 10, 45:
		allow, exists := e.knobs[knob-1]
		return !exists || allow == 1
	}
	return true
}
