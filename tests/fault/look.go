package fault

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/trial"
)

// leftScript lists what the platform's own look does not: claims on blobs,
// temporary files, mounts under the agent's folders, and
// open ends of the security processor, one per guest.
const leftScript = `set -e
find ` + trial.CacheDir + `/owners -mindepth 1 2>/dev/null | sed 's/^/claim /'
find /run/nodeagent ` + trial.StateDir + ` ` + trial.CacheDir + ` \( -name '*.tmp' -o -name '.*' -o -name '*.new' \) -type f 2>/dev/null | sed 's/^/temporary /'
awk '$2 ~ "^/(run|var/lib|var/cache)/nodeagent/" {print "mount " $2}' /proc/self/mounts
ip -o link show type tun 2>/dev/null | sed 's/^/tap /'
find /run/nodeagent/guests -mindepth 1 2>/dev/null | sed 's/^/file /'`

// Left lists everything guests left on the host but blobs, whole or in part:
// they are a cache with a limit, and the next fetch goes on where one stopped.
func (f *Field) Left(ctx context.Context) ([]string, error) {
	all, err := f.Host.Leftovers(ctx)
	all = slices.DeleteFunc(all, func(l string) bool { return strings.HasPrefix(l, "cached ") })
	out, moreErr := f.Host.Output(ctx, "bash", "-c", leftScript)
	for line := range strings.Lines(out) {
		all = append(all, strings.TrimSpace(line))
	}
	return all, errors.Join(err, moreErr)
}

// Clean waits until nothing is left.
func (f *Field) Clean(ctx context.Context) error {
	var left []string
	err := trial.Await(ctx, "the host to be clean", func() (bool, error) {
		now, err := f.Left(ctx)
		if err == nil {
			left = now
		}
		return len(now) == 0, err
	})
	if err != nil {
		return fmt.Errorf("%w; left over: %v", err, left)
	}
	return nil
}

// Intact makes sure that no death damaged the audit log, or made it look rolled
// back to the control plane.
func (f *Field) Intact(ctx context.Context) error {
	a, err := trial.Ask(f.Host.AgentCommand(ctx, "audit", "verify", "--state-dir", trial.StateDir), nil)
	if err != nil {
		return err
	}
	if a.Code != 0 {
		return fmt.Errorf("the audit log does not verify: %s", a)
	}
	nodes, err := f.API.Nodes(ctx)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if len(n.Alarms) > 0 || len(n.Warnings) > 0 {
			return fmt.Errorf("node %s has alarms %+v and warnings %+v", n.ID, n.Alarms, n.Warnings)
		}
	}
	return nil
}

// Once makes sure that a guest had at most one machine and one end.
func (f *Field) Once(ctx context.Context, id string) error {
	machines, ends, err := f.lives(ctx, id)
	switch {
	case err != nil:
		return err
	case machines > 1:
		return fmt.Errorf("guest %s was started %d times", id, machines)
	case len(ends) != 1:
		return fmt.Errorf("guest %s was reported to end as %v", id, ends)
	}
	return nil
}

// Never makes sure that a guest whose launch was refused had neither machine
// nor end.
func (f *Field) Never(ctx context.Context, id string) error {
	machines, ends, err := f.lives(ctx, id)
	if err == nil && (machines > 0 || len(ends) > 0) {
		return fmt.Errorf("guest %s, whose launch was refused, was started %d times and reported to end as %v", id, machines, ends)
	}
	return err
}

// lives are how often a guest's machine was started, and how its end was told.
func (f *Field) lives(ctx context.Context, id string) (machines int, ends map[string]bool, err error) {
	out, err := f.Host.Output(ctx, "bash", "-c", "cat /var/log/libvirt/qemu/nodeagent-"+id+".log 2>/dev/null | grep -c 'starting up libvirt' || true")
	if err != nil {
		return 0, nil, err
	}
	if machines, err = strconv.Atoi(strings.TrimSpace(out)); err != nil {
		return 0, nil, fmt.Errorf("counting the starts of guest %s: %w", id, err)
	}
	ends = map[string]bool{}
	err = f.everyEvent(ctx, func(e *api.Event) {
		if s := e.GetGuestState(); s.GetGuestId() == id && s.GetStatus() >= api.GuestStatus_GUEST_STATUS_FINISHED {
			ends[s.GetStatus().String()+" "+s.GetRefusal().GetCode()] = true
		}
	})
	return machines, ends, err
}

// Delivered makes sure that each file of a Delivery was told once to be there.
func (f *Field) Delivered(ctx context.Context, id string) error {
	told := map[string]map[string]bool{ResultName: {}, contract.ResultsManifestName: {}} // event ids by file: one may come twice
	err := f.everyEvent(ctx, func(e *api.Event) {
		if r := e.GetResultUploaded(); r.GetGuestId() == id && told[r.GetName()] != nil {
			told[r.GetName()][e.GetEventId()] = true
		}
	})
	for name, by := range told {
		if err == nil && len(by) != 1 {
			err = fmt.Errorf("result %s was told %d times to be there", name, len(by))
		}
	}
	return err
}

// everyEvent shows all events so far, without heartbeats.
func (f *Field) everyEvent(ctx context.Context, show func(*api.Event)) error {
	for since := uint64(0); ; {
		events, err := f.API.Events(ctx, since, 1000, false)
		if err != nil {
			return err
		}
		for _, e := range events {
			since = e.Seq
			event, err := e.Decode()
			if err != nil {
				return err
			}
			show(event)
		}
		if len(events) < 1000 {
			return nil
		}
	}
}
