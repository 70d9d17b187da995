package capability

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/nodeagent/api"
)

// Journal keeps the last report, and events until they are confirmed.
type Journal interface {
	// LastReport is false before the first.
	LastReport() (*api.Capability, bool, error)
	// SaveReport replaces it and appends events, both or neither.
	SaveReport(report *api.Capability, events ...*api.Event) error
}

// Tell sends now as an event that names what changed since the last report,
// if anything did. The first report of a store has nothing to be compared
// with: the link sends one with every connect anyway.
func Tell(j Journal, hostID string, at time.Time, now *api.Capability) (changed []string, err error) {
	last, told, err := j.LastReport()
	if err != nil {
		return nil, fmt.Errorf("comparing capability: %w", err)
	}
	if !told {
		return nil, j.SaveReport(now)
	}
	kept := Keep(last, now)
	if changed = Changed(last, kept); len(changed) == 0 {
		return nil, nil
	}
	event := proto.CloneOf(kept)
	event.Changed = changed
	return changed, j.SaveReport(kept, api.NewEvent(hostID, "", at, &api.Event_Capability{Capability: event}))
}
