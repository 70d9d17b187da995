package ccmode

import (
	"context"
	"fmt"
)

// emem is the mailbox of Hopper GPUs and NVSwitches: shared memory in eight
// channels of 1 KiB, with head and tail pointers of a queue each way. Pointers
// are byte offsets in the shared memory; a tail points at the last dword, and
// equal pointers mean empty.
type emem struct{ port }

// Channel 2 is the host tools'; a guest's driver uses channel 0.
const (
	ememChannel = 2
	ememBase    = ememChannel * ememSize
	ememSize    = 1024

	ememControl  = 0x8f2ac0 + 8*ememChannel
	ememData     = 0x8f2ac4 + 8*ememChannel
	queueHead    = 0x8f2c00 + 8*ememChannel
	queueTail    = 0x8f2c04 + 8*ememChannel
	messageHead  = 0x8f2c80 + 8*ememChannel
	messageTail  = 0x8f2c84 + 8*ememChannel
	ememSequence = ememBase | 1<<24 | 1<<25 // address, with increment on write and on read
)

func (e emem) open(ctx context.Context) error {
	requests, err := e.pending(queueHead, queueTail)
	if err != nil {
		return err
	}
	replies, err := e.pending(messageHead, messageTail)
	if err != nil || (!requests && !replies) {
		return err
	}
	if _, err := poll(ctx, slowPoll, staleLimit, func() (bool, error) { return e.pending(messageHead, messageTail) }); err != nil {
		return err
	}
	for _, pointer := range []uint32{queueTail, queueHead, messageTail, messageHead} {
		if err := e.write(pointer, ememBase); err != nil {
			return err
		}
	}
	return nil
}

// pending tells whether a queue holds a message.
func (e emem) pending(head, tail uint32) (bool, error) {
	h, err := e.read(head)
	if err != nil {
		return false, err
	}
	t, err := e.read(tail)
	return h != t, err
}

func (e emem) exchange(ctx context.Context, packet []uint32) ([]uint32, error) {
	if err := e.send(ctx, packet); err != nil {
		return nil, err
	}
	answered, err := poll(ctx, slowPoll, answerLimit, func() (bool, error) { return e.pending(messageHead, messageTail) })
	if err != nil {
		return nil, err
	}
	if !answered {
		return nil, silentError{fmt.Sprintf("no answer within %s", answerLimit)}
	}
	return e.receive()
}

func (e emem) send(ctx context.Context, packet []uint32) error {
	idle, err := poll(ctx, fastPoll, idleLimit, func() (bool, error) {
		stale, err := e.pending(messageHead, messageTail)
		if err != nil {
			return false, err
		}
		if stale {
			if _, err := e.receive(); err != nil {
				return false, err
			}
		}
		busy, err := e.pending(queueHead, queueTail)
		return !busy, err
	})
	if err != nil {
		return err
	}
	if !idle {
		return silentError{fmt.Sprintf("the request before was not taken within %s", idleLimit)}
	}
	if err := e.write(ememControl, ememSequence); err != nil {
		return err
	}
	for _, dword := range packet {
		if err := e.write(ememData, dword); err != nil {
			return err
		}
	}
	if err := e.write(queueTail, ememBase+4*uint32(len(packet)-1)); err != nil {
		return err
	}
	return e.write(queueHead, ememBase) // the doorbell
}

func (e emem) receive() ([]uint32, error) {
	head, err := e.read(messageHead)
	if err != nil {
		return nil, err
	}
	tail, err := e.read(messageTail)
	if err != nil {
		return nil, err
	}
	size := int64(tail) - int64(head) + 4
	if size < 4*minReply || size > ememSize || size%4 != 0 {
		return nil, e.garbled(fmt.Errorf("a message of %d bytes (head %#x, tail %#x)", size, head, tail))
	}
	if err := e.write(ememControl, ememSequence); err != nil {
		return nil, err
	}
	packet := make([]uint32, size/4)
	for i := range packet {
		if packet[i], err = e.readRaw(ememData); err != nil {
			return nil, err
		}
	}
	return packet, e.write(messageTail, head)
}
