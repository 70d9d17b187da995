package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
)

// qmp is QEMU's monitor (docs/interop/qmp-spec.rst).
type qmp struct {
	net.Conn
	replies chan message

	mu      sync.Mutex
	events  map[string]int // DEVICE_DELETED by device
	changed chan struct{}
}

type message struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Device string `json:"device"`
	} `json:"data"`
}

func dialQMP(ctx context.Context, path string) (*qmp, error) {
	conn, err := dial(ctx, path)
	if err != nil {
		return nil, err
	}
	q := &qmp{Conn: conn, replies: make(chan message, 1), events: map[string]int{}, changed: make(chan struct{}, 1)}
	go q.read()
	return q, q.do(ctx, "qmp_capabilities", nil)
}

func (q *qmp) read() {
	defer close(q.replies)
	for in := json.NewDecoder(q.Conn); ; {
		var m message
		if err := in.Decode(&m); err != nil {
			return
		}
		switch {
		case m.Event == "DEVICE_DELETED":
			q.mu.Lock()
			q.events[m.Data.Device]++
			q.mu.Unlock()
			select {
			case q.changed <- struct{}{}:
			default:
			}
		case m.Return != nil || m.Error != nil:
			q.replies <- m
		}
	}
}

// do executes a command. Not safe for concurrent use.
func (q *qmp) do(ctx context.Context, command string, arguments json.RawMessage) error {
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(q.Conn).Encode(request); err != nil {
		return err
	}
	select {
	case m, ok := <-q.replies:
		switch {
		case !ok:
			return errors.New("QEMU has ended")
		case m.Error != nil:
			return fmt.Errorf("%s: %s: %s", command, m.Error.Class, m.Error.Desc)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", command, context.Cause(ctx))
	}
}

// unplug asks for a device's removal and waits until it is gone.
func (q *qmp) unplug(ctx context.Context, id string) error {
	gone := func() int { q.mu.Lock(); defer q.mu.Unlock(); return q.events[id] }
	before := gone()
	if err := q.do(ctx, "device_del", json.RawMessage(fmt.Sprintf(`{"id":%q}`, id))); err != nil {
		return err
	}
	for gone() == before {
		select {
		case <-q.changed:
		case <-ctx.Done():
			return fmt.Errorf("unplugging %s: %w", id, context.Cause(ctx))
		}
	}
	return nil
}
