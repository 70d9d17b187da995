package libvirt

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/vm"
)

func TestAHungDaemonHoldsABoundedNumberOfCallsAndNoCaller(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := New("", hclog.NewNullLogger())
		hang := make(chan struct{})
		var callers sync.WaitGroup
		ask := func() error {
			_, err := bounded(t.Context(), d, time.Second, func() (int, error) { <-hang; return 1, nil }, func(int) {})
			return err
		}
		for range maxStuck {
			callers.Go(func() {
				if err := ask(); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrStuck) {
					t.Errorf("a call that hangs ends with %v", err)
				}
			})
		}
		callers.Wait()
		if err := ask(); !errors.Is(err, ErrStuck) {
			t.Errorf("call %d: %v", maxStuck+1, err)
		}
		close(hang)
		synctest.Wait()
		if err := ask(); err != nil {
			t.Errorf("after the daemon answers again: %v", err)
		}
	})
}

func TestAValueThatComesTooLateIsGivenBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := New("", hclog.NewNullLogger())
		hang, late := make(chan struct{}), make(chan int, 1)
		if _, err := bounded(t.Context(), d, time.Second, func() (int, error) { <-hang; return 7, nil }, func(v int) { late <- v }); err == nil {
			t.Error("no error after the deadline")
		}
		close(hang)
		if v := <-late; v != 7 {
			t.Errorf("given back: %d", v)
		}
	})
}

func TestASlowReaderLearnsThatItMissedEvents(t *testing.T) {
	t.Parallel()
	d := New("", hclog.NewNullLogger())
	events, cancel := d.Subscribe()
	defer cancel()
	const sent = eventBuffer * 3
	for range sent {
		d.publish(vm.Event{GuestID: "g"})
	}
	for i := range eventBuffer {
		e := <-events
		if last := i == eventBuffer-1; last != (e.GuestID == "") {
			t.Fatalf("event %d of %d is %+v", i, eventBuffer, e)
		}
	}
	d.publish(vm.Event{GuestID: "after"})
	if e := <-events; e.GuestID != "after" {
		t.Errorf("after catching up: %+v", e)
	}
	cancel()
	d.publish(vm.Event{GuestID: "cancelled"})
	select {
	case e := <-events:
		t.Errorf("an event after cancel: %+v", e)
	default:
	}
}
