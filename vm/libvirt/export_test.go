package libvirt

import (
	"context"
	"testing"

	"libvirt.org/go/libvirt"

	"github.com/confidential-node/agent/vm"
)

// StartXML starts a domain from text, for hypervisors Render knows nothing of.
func (d *Driver) StartXML(ctx context.Context, guestID string, generation uint64, text string, devices ...vm.PCIDevice) error {
	return d.start(ctx, guestID, generation, text, devices)
}

// CreateForeign starts any domain.
func (d *Driver) CreateForeign(ctx context.Context, text string) error {
	_, err := call(ctx, d, callTimeout, func(conn *libvirt.Connect) (struct{}, error) {
		dom, err := conn.DomainCreateXML(text, 0)
		if err == nil {
			free(dom)
		}
		return struct{}{}, err
	})
	return err
}

// Runs says whether a domain runs.
func (d *Driver) Runs(ctx context.Context, id string) bool {
	running, err := call(ctx, d, callTimeout, func(conn *libvirt.Connect) (bool, error) {
		dom, err := conn.LookupDomainByUUIDString(id)
		if err != nil {
			return false, err
		}
		defer free(dom)
		return dom.IsActive()
	})
	return err == nil && running
}

// DestroyForeign ends any domain.
func (d *Driver) DestroyForeign(tb testing.TB, id string) {
	tb.Helper()
	_, err := call(tb.Context(), d, callTimeout, func(conn *libvirt.Connect) (struct{}, error) {
		dom, err := conn.LookupDomainByUUIDString(id)
		if err != nil {
			return struct{}{}, err
		}
		defer free(dom)
		return struct{}{}, dom.Destroy()
	})
	if err != nil {
		tb.Error(err)
	}
}
