package libvirt

import (
	"time"

	"libvirt.org/go/libvirt"

	"github.com/confidential-node/agent/vm"
	"github.com/confidential-node/agent/vm/domain"
)

// eventBuffer is how many events a slow subscriber may be behind.
const eventBuffer = 256

// observe reads a domain. Ours are those with our name; the generation is
// known only when the mark in the metadata is whole and of this very domain.
func observe(dom *libvirt.Domain) (o vm.Observed, ours bool, err error) {
	name, err := dom.GetName()
	if err != nil {
		return o, false, err
	}
	id, err := dom.GetUUIDString()
	if err != nil {
		return o, false, err
	}
	if name != vm.NamePrefix+id {
		return o, false, nil
	}
	o.GuestID = id
	text, err := dom.GetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, domain.MetadataNamespace, 0)
	switch {
	case isCode(err, libvirt.ERR_NO_DOMAIN_METADATA):
	case err != nil:
		return o, false, err
	default:
		if marked, generation, err := domain.ParseMark(text); err == nil && marked == id {
			o.Generation = generation
		}
	}
	info, err := dom.GetInfo()
	if err != nil {
		return o, false, err
	}
	o.State, o.VCPUs, o.MemoryMiB = stateOf(info.State), int(info.NrVirtCpu), info.MaxMem/1024
	return o, true, nil
}

func stateOf(s libvirt.DomainState) vm.State {
	switch s { //nolint:exhaustive // every other state is "other"
	case libvirt.DOMAIN_RUNNING, libvirt.DOMAIN_BLOCKED:
		return vm.StateRunning
	case libvirt.DOMAIN_PAUSED, libvirt.DOMAIN_PMSUSPENDED:
		return vm.StatePaused
	case libvirt.DOMAIN_CRASHED:
		return vm.StateCrashed
	case libvirt.DOMAIN_SHUTOFF:
		return vm.StateGone
	default:
		return vm.StateOther
	}
}

// causeOf an end. libvirt says "failed" when QEMU's monitor closed without the
// word that the guest shut down.
func causeOf(d libvirt.DomainEventStoppedDetailType) vm.Cause {
	switch d { //nolint:exhaustive // the guest's own, or a migration's
	case libvirt.DOMAIN_EVENT_STOPPED_FAILED, libvirt.DOMAIN_EVENT_STOPPED_CRASHED:
		return vm.CauseDied
	case libvirt.DOMAIN_EVENT_STOPPED_DESTROYED:
		return vm.CauseDestroyed
	}
	return ""
}

// subscriber is one reader of events.
type subscriber struct{ events chan vm.Event }

// deliver never blocks. The last place is kept for the notice that events are
// missing: whatever does not fit behind it happened before it is read.
func (s *subscriber) deliver(e vm.Event) {
	switch len(s.events) {
	case cap(s.events):
	case cap(s.events) - 1:
		s.events <- vm.Event{Reason: "events were missed", At: e.At}
	default:
		s.events <- e
	}
}

// Subscribe returns events of our domains until cancel is called. An event
// without guest id means that others may be missing: list. Subscribers get
// one after every connect.
func (d *Driver) Subscribe() (events <-chan vm.Event, cancel func()) {
	s := &subscriber{events: make(chan vm.Event, eventBuffer)}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.subscribers[s] = struct{}{}
	return s.events, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.subscribers, s)
	}
}

// resync tells all subscribers to list.
func (d *Driver) resync() { d.publish(vm.Event{Reason: "connected", At: time.Now()}) }

func (d *Driver) publish(e vm.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.subscribers {
		s.deliver(e)
	}
}

// onLifecycle runs on libvirt's event loop and must not call libvirtd.
func (d *Driver) onLifecycle(_ *libvirt.Connect, dom *libvirt.Domain, e *libvirt.DomainEventLifecycle) {
	name, nameErr := dom.GetName()
	id, idErr := dom.GetUUIDString()
	if nameErr != nil || idErr != nil || name != vm.NamePrefix+id {
		return
	}
	event := vm.Event{GuestID: id, State: vm.StateOther, Reason: e.String(), At: time.Now()}
	switch e.Event { //nolint:exhaustive // every other event is "other"
	case libvirt.DOMAIN_EVENT_STARTED, libvirt.DOMAIN_EVENT_RESUMED:
		event.State = vm.StateRunning
	case libvirt.DOMAIN_EVENT_SUSPENDED:
		event.State = vm.StatePaused
	case libvirt.DOMAIN_EVENT_STOPPED:
		event.State, event.Cause = vm.StateGone, causeOf(libvirt.DomainEventStoppedDetailType(e.Detail))
	case libvirt.DOMAIN_EVENT_CRASHED:
		event.State = vm.StateCrashed
	}
	d.publish(event)
}
