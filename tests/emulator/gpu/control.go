package gpu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"

	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/tests/emulator/gpu/vfiouser"
)

// Order is one line on the control socket. Each is answered by one line: the
// device's State after it, or an Error.
type Order struct {
	// Do is "state", "break" (Faults replace what is broken so far), "vanish"
	// (the device falls off the bus) or "knob" (Knob gets Value, as by a BMC).
	Do     string          `json:"do"`
	Faults *gputest.Faults `json:"faults,omitempty"`
	Knob   uint16          `json:"knob,omitempty"`
	Value  uint16          `json:"value,omitempty"`
}

// Error is the answer to an order that cannot be carried out.
type Error struct {
	Error string `json:"error"`
}

const maxOrder = 1 << 16 // bytes of a line

// Control carries out orders from listener until ctx ends. It closes listener.
func Control(ctx context.Context, listener *net.UnixListener, e *gputest.Emulator) error {
	return vfiouser.Accept(ctx, listener, func(conn *net.UnixConn) error {
		go obey(ctx, conn, e)
		return nil
	})
}

func obey(ctx context.Context, conn net.Conn, e *gputest.Emulator) {
	stop := context.AfterFunc(ctx, func() { conn.Close() }) //nolint:errcheck // reading ends
	defer stop()
	defer conn.Close() //nolint:errcheck // each answer was written
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxOrder)
	for lines.Scan() {
		var out any
		if err := Obey(lines.Bytes(), e); err != nil {
			out = Error{Error: err.Error()}
		} else {
			out = e.State()
		}
		if err := json.NewEncoder(conn).Encode(out); err != nil {
			return
		}
	}
}

// Obey carries out one line.
func Obey(line []byte, e *gputest.Emulator) error {
	var order Order
	strict := json.NewDecoder(bytes.NewReader(line))
	strict.DisallowUnknownFields()
	if err := strict.Decode(&order); err != nil {
		return err
	}
	switch order.Do {
	case "state":
	case "break":
		if order.Faults == nil {
			return errors.New("break needs faults")
		}
		e.Break(func(f *gputest.Faults) { *f = *order.Faults })
	case "vanish":
		e.Vanish()
	case "knob":
		if _, ok := e.State().Knobs[order.Knob]; !ok {
			return fmt.Errorf("%s has no knob %d", e.Model().Name, order.Knob)
		}
		e.SetKnob(order.Knob, order.Value)
	default:
		return fmt.Errorf("unknown order %q", order.Do)
	}
	return nil
}

// Command gives one order through the control socket at path.
func Command(ctx context.Context, path string, order Order) (gputest.State, error) {
	var answer struct {
		gputest.State
		Error
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return answer.State, err
	}
	defer conn.Close()                                      //nolint:errcheck // the answer was read
	stop := context.AfterFunc(ctx, func() { conn.Close() }) //nolint:errcheck // reading ends
	defer stop()
	if err := json.NewEncoder(conn).Encode(order); err != nil {
		return answer.State, err
	}
	if err := json.NewDecoder(conn).Decode(&answer); err != nil {
		return answer.State, err
	}
	if answer.Error.Error != "" {
		return answer.State, errors.New(answer.Error.Error)
	}
	return answer.State, nil
}
