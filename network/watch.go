package network

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

const (
	// checkEvery is how often the table is compared although nothing was
	// heard; retryEvery, while it is not in force.
	checkEvery = 30 * time.Second
	retryEvery = time.Second
)

// Run keeps the table in force until ctx ends: it compares the table whenever
// anything in nftables changes, puts it back when it differs, and takes the
// taps down while it cannot. It returns an error only when it can no longer
// hear of changes.
func (h *Host) Run(ctx context.Context) error {
	events, err := h.links.changes()
	if err != nil {
		return err
	}
	heard, ended := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		for {
			if err := events.wait(); err != nil {
				ended <- err
				return
			}
			select {
			case heard <- struct{}{}:
			default: // one pending check sees everything
			}
		}
	}()
	for {
		wait := checkEvery
		if err := h.check(ctx); err != nil && ctx.Err() == nil {
			wait = retryEvery
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			err := events.Close()
			if heardLast := <-ended; heardLast != nil {
				h.log.Debug("nft events ended", "err", heardLast)
			}
			return err
		case err := <-ended:
			timer.Stop()
			return errors.Join(err, events.Close())
		case <-heard:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// check compares and, if need be, restores. Its error is also kept as lost.
func (h *Host) check(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.written == "" {
		// The tool that an agent was killed under may write its table when the
		// next one has already found none.
		return h.eraseUnusedLocked(ctx)
	}
	text, err := h.filter.read(ctx)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil && text == h.written && h.lost == nil:
		return nil
	}
	if !h.restores.Allow() {
		return h.loseLocked(contract.Refuse(FindingRulesLost, "find the program that keeps changing nftables and make it leave the agent's table alone",
			"nft table %s was changed again and again", h.cfg.table()))
	}
	if err := h.writeLocked(ctx); err != nil {
		return h.loseLocked(err)
	}
	h.log.Warn("nft table was changed by somebody else; restored", "table", h.cfg.table())
	return h.regainLocked()
}

// loseLocked takes every tap of ours down, known guests' or not: without rules
// a guest would reach the host's network.
func (h *Host) loseLocked(cause error) error {
	first := h.lost == nil
	h.lost = cause
	taps, err := h.links.list()
	if err != nil {
		h.lost = errors.Join(h.lost, err)
		for id, m := range h.guests {
			taps = append(taps, Tap{Name: m.link.Tap, GuestID: id, Up: true})
		}
	}
	for _, t := range taps {
		if err := h.links.down(t.Name); err != nil {
			h.lost = errors.Join(h.lost, err)
			continue
		}
		if first && t.Up {
			h.log.Error("nft table is not in force; tap taken down", "guest_id", t.GuestID, "tap", t.Name, "err", cause)
		}
	}
	return h.lost
}

// regainLocked brings the taps up again.
func (h *Host) regainLocked() error {
	if h.lost == nil {
		return nil
	}
	taps, err := h.links.list()
	if err != nil {
		return err
	}
	present := map[string]bool{}
	for _, t := range taps {
		present[t.GuestID] = true
	}
	var errs []error
	for id, m := range h.guests {
		if present[id] {
			errs = append(errs, h.links.up(m.link))
		}
	}
	if err := errors.Join(errs...); err != nil {
		h.lost = err
		return err
	}
	h.lost = nil
	h.log.Info("nft table is in force again; taps are up")
	return nil
}

// Finding codes.
const (
	FindingForwardDrop   = "network.foreign-forward-drop"
	FindingInputDrop     = "network.foreign-input-drop"
	FindingLegacyUnread  = "network.foreign-legacy-unread"
	FindingForwardingOff = "network.forwarding-off"
	FindingRulesLost     = "network.rules-lost"
	FindingTapMissing    = "network.tap-missing"
	// FindingPortsEphemeral: published ports that the kernel gives to processes.
	FindingPortsEphemeral = "network.ports-ephemeral"
)

// Finding is something on the host that keeps guests from what they may do,
// and that the agent does not change by itself.
type Finding struct {
	// Code is one of the Finding… constants.
	Code string
	// Object names what was found: a chain, a setting, a tap.
	Object string
	// Message says what it does; Remedy what an operator can do.
	Message, Remedy string
}

// Findings looks at the host. An empty list means that nothing known stands in
// the way; rules with conditions of somebody else's are not judged.
func (h *Host) Findings(ctx context.Context) ([]Finding, error) {
	ruleset, err := h.filter.ruleset(ctx)
	if err != nil {
		return nil, err
	}
	foreign, err := parseForeign(ruleset, h.cfg.table())
	if err != nil {
		return nil, err
	}
	var out []Finding
	for _, c := range foreign {
		f := Finding{
			Code: FindingForwardDrop, Object: c.String(),
			Message: fmt.Sprintf("chain %s can drop what guests send and receive: %s", c, c.how),
			Remedy:  fmt.Sprintf("accept interfaces na* there before the drop, for instance: nft insert rule %s iifname \"na*\" accept; nft insert rule %s oifname \"na*\" accept", c, c),
		}
		if c.hook == "input" {
			f.Code = FindingInputDrop
			f.Message = fmt.Sprintf("chain %s can drop guests' requests to the metadata service: %s", c, c.how)
			f.Remedy = fmt.Sprintf("accept interfaces na* there before the drop, for instance: nft insert rule %s iifname \"na*\" accept", c)
		}
		out = append(out, f)
	}
	legacy, err := h.filter.legacyFindings(ctx)
	if err != nil {
		return out, err
	}
	out = append(out, legacy...)
	overlap, err := h.ephemeralFinding()
	if err != nil {
		return out, err
	}
	out = append(out, overlap...)
	forwarding, err := h.links.forwarding()
	if err != nil {
		return out, err
	}
	taps, err := h.links.list()
	if err != nil {
		return out, err
	}
	present := map[string]bool{}
	for _, t := range taps {
		present[t.GuestID] = true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !forwarding && len(h.guests) > 0 {
		out = append(out, Finding{
			FindingForwardingOff, "net.ipv4.ip_forward", "the host does not forward IPv4, so guests reach nothing outside",
			"set net.ipv4.ip_forward=1 and find what turned it off",
		})
	}
	if h.lost != nil {
		out = append(out, Finding{
			FindingRulesLost, "inet " + h.cfg.table(), "the agent's nft table is not in force, so guests' taps are down",
			"see the agent's log for the cause; it tries again every second",
		})
	}
	for id, m := range h.guests {
		if !present[id] {
			out = append(out, Finding{
				FindingTapMissing, m.link.Tap, fmt.Sprintf("the tap of guest %s is gone, so it has no network", id),
				"stop the guest and launch it again",
			})
		}
	}
	return out, nil
}
