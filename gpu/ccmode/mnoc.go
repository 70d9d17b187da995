package ccmode

import (
	"context"
	"errors"
	"fmt"
)

// mnoc is the mailbox of Blackwell GPUs: two FIFOs of dwords, one each way.
// Port 0 is the host tools'.
type mnoc struct{ port }

const (
	toHostInfo = 0x8f1f04
	toHostData = 0x8f1f08
	toFSPInfo  = 0x8f1f84
	toFSPData  = 0x8f1f88

	mnocSize    = 1<<20 - 1
	mnocTrigger = 1 << 20
	mnocReady   = 1 << 24
	mnocError   = 1 << 25
	mnocCredit  = 1 << 26

	mnocMaxBytes   = 4160
	mnocCreditStep = 16 // dwords that one credit allows
	mnocMaxStale   = 16 // messages thrown away before the first request
)

// open throws away what nobody fetched before us: the FIFO has no reset.
func (m mnoc) open(context.Context) error {
	for range mnocMaxStale {
		info, err := m.read(toHostInfo)
		if err != nil || info&mnocReady == 0 {
			return err
		}
		if _, err := m.fetch(info); err != nil {
			return err
		}
	}
	return m.garbled(errors.New("a mailbox that does not run empty"))
}

func (m mnoc) exchange(ctx context.Context, packet []uint32) ([]uint32, error) {
	if err := m.send(ctx, packet); err != nil {
		return nil, err
	}
	info, err := m.await(ctx, toHostInfo, mnocReady, "no answer")
	if err != nil {
		return nil, err
	}
	answer, err := m.fetch(info)
	if err != nil {
		return nil, err
	}
	return answer, m.sound(toHostInfo)
}

// sound looks whether the message that has just passed a mailbox passed whole.
func (m mnoc) sound(register uint32) error {
	info, err := m.read(register)
	if err == nil && info&mnocError != 0 {
		return m.garbled(fmt.Errorf("a mailbox error after the message (%#08x)", info))
	}
	return err
}

func (m mnoc) send(ctx context.Context, packet []uint32) error {
	if _, err := m.await(ctx, toFSPInfo, mnocReady, "the mailbox is not ready for a request"); err != nil {
		return err
	}
	if err := m.write(toFSPInfo, uint32(4*len(packet))|mnocTrigger); err != nil {
		return err
	}
	for i, dword := range packet {
		if i%mnocCreditStep == 0 {
			if _, err := m.await(ctx, toFSPInfo, mnocCredit, "no credit to send"); err != nil {
				return err
			}
		}
		if err := m.write(toFSPData, dword); err != nil {
			return err
		}
	}
	return m.sound(toFSPInfo)
}

// await polls an info register for a bit and returns the register.
func (m mnoc) await(ctx context.Context, register, bit uint32, what string) (info uint32, err error) {
	limit := answerLimit
	if bit == mnocCredit {
		limit = creditLimit
	}
	ok, err := poll(ctx, fastPoll, limit, func() (bool, error) {
		info, err = m.read(register)
		return info&bit != 0 || info&mnocError != 0, err
	})
	switch {
	case err != nil:
		return 0, err
	case info&mnocError != 0:
		return 0, m.garbled(fmt.Errorf("a mailbox error (%#08x)", info))
	case !ok:
		return 0, silentError{fmt.Sprintf("%s within %s", what, limit)}
	}
	return info, nil
}

func (m mnoc) fetch(info uint32) ([]uint32, error) {
	size := info & mnocSize
	if size == 0 || size > mnocMaxBytes || size%4 != 0 {
		return nil, m.garbled(fmt.Errorf("a message of %d bytes", size))
	}
	packet := make([]uint32, size/4)
	for i := range packet {
		var err error
		if packet[i], err = m.readRaw(toHostData); err != nil {
			return nil, err
		}
	}
	return packet, nil
}
