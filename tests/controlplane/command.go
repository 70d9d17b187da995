package controlplane

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

// Codes of the API's refusals.
const (
	codeBadRequest   = "control.bad-request"
	codeUnauthorised = "control.unauthorised"
	codeNodeNotFound = "control.node-not-found"
	codeNodeNotReady = "control.node-not-ready"
	codeNoNode       = "control.no-node"
	codeGuestUnknown = "control.guest-unknown"
	codeGuestExists  = "control.guest-exists"
)

// How long each verb may wait in the queue.
const (
	launchWindow   = time.Hour
	evidenceWindow = 10 * time.Minute
	otherWindow    = api.MaxWindow
)

func errBadRequest(format string, args ...any) *contract.Refusal {
	return contract.Refuse(codeBadRequest, "correct the request", format, args...)
}

func errNodeNotFound(hostID string) *contract.Refusal {
	return contract.Refuse(codeNodeNotFound, "list the nodes, or enrol this one", "no node %q is enrolled", hostID)
}

// NewCommand makes a command to a host with the next sequence of its epoch,
// which is used up on disk when this returns. The window begins now.
func (s *Server) NewCommand(hostID string, verb api.CommandVerb) (*api.Command, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newCommandLocked(hostID, verb)
}

func (s *Server) newCommandLocked(hostID string, verb api.CommandVerb) (*api.Command, error) {
	h := s.state.Hosts[hostID]
	if h == nil {
		return nil, errNodeNotFound(hostID)
	}
	if h.Epoch == 0 {
		return nil, contract.Refuse(codeNodeNotReady, "wait for its first heartbeat; if it does not come, look at the agent's status there",
			"node %q has not reported its store yet", hostID)
	}
	now := s.cfg.Clock()
	h.Sequence++
	cmd := &api.Command{
		CommandId: api.NewID(), Audience: hostID, IssuerEpoch: h.Epoch, Sequence: h.Sequence,
		NotBefore: timestamppb.New(now), Verb: verb,
	}
	issued, window := &issuedCommand{Node: hostID, At: now}, otherWindow
	switch v := verb.(type) {
	case *api.Command_LaunchGuest:
		window, issued.Verb, issued.Guest = launchWindow, "launch", v.LaunchGuest.GetGuestId()
	case *api.Command_RequestEvidence:
		window, issued.Verb, issued.Guest = evidenceWindow, "evidence", v.RequestEvidence.GetGuestId()
		issued.Nonce = hex.EncodeToString(v.RequestEvidence.GetNonce())
	case *api.Command_StopGuest:
		issued.Verb, issued.Guest = "stop", v.StopGuest.GetGuestId()
	case *api.Command_GrantUpload:
		issued.Verb, issued.Guest = "grant-upload", v.GrantUpload.GetGuestId()
	case *api.Command_SettleUpload:
		issued.Verb, issued.Guest = "settle-upload", v.SettleUpload.GetGuestId()
	case *api.Command_Cordon:
		issued.Verb = "cordon"
	case *api.Command_Uncordon:
		issued.Verb = "uncordon"
	case *api.Command_BeginEpoch:
		issued.Verb = "begin-epoch"
	}
	cmd.ExpiresAt = timestamppb.New(now.Add(window))
	s.state.Commands[cmd.GetCommandId()] = issued
	return cmd, s.state.save(s.cfg.Dir, now)
}

// Sign seals a command whatever it says, so that tests can send nonsense.
func (s *Server) Sign(cmd *api.Command) ([]byte, error) { return api.SealUnchecked(cmd, s.id.issuer) }

// Publish queues raw bytes for a host and returns when they are on disk.
func (s *Server) Publish(ctx context.Context, hostID string, raw []byte) error {
	if _, err := s.broker.js.Publish(ctx, api.CommandSubject(hostID), raw); err != nil {
		return fmt.Errorf("queueing command for host %s: %w", hostID, err)
	}
	return nil
}

// sendLocked numbers, signs and queues one command; prepare may change the
// state that is saved with it.
func (s *Server) sendLocked(ctx context.Context, hostID string, verb api.CommandVerb, features []string, prepare func(cmd *api.Command)) (*api.Command, error) {
	cmd, err := s.newCommandLocked(hostID, verb)
	if err != nil {
		return nil, err
	}
	cmd.RequiredFeatures = features
	if err := cmd.Check(); err != nil {
		delete(s.state.Commands, cmd.GetCommandId())
		refused := contract.AsRefusal(err)
		return nil, errBadRequest("%s", refused.Message)
	}
	if prepare != nil {
		prepare(cmd)
		if err := s.state.save(s.cfg.Dir, s.cfg.Clock()); err != nil {
			return nil, err
		}
	}
	raw, err := api.SealCommand(cmd, s.id.issuer)
	if err != nil {
		return nil, err
	}
	return cmd, s.Publish(ctx, hostID, raw)
}

// launch sends a launch to a node, or to the first that fits.
func (s *Server) launch(ctx context.Context, node string, l *api.LaunchGuest, features []string) (*client.Sent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if node == "" {
		if node = s.view.pick(l.GetImage(), s.state.Hosts); node == "" {
			return nil, contract.Refuse(codeNoNode, "wait, uncordon a node, or give one the image", "no open node has that boot image")
		}
	}
	if h := s.state.Hosts[node]; h != nil {
		if r := h.alarmed(node); r != nil {
			return nil, r
		}
	}
	if l.GetGuestId() == "" {
		l.GuestId = newUUID()
	}
	if l.GetGeneration() == 0 {
		l.Generation = 1
	}
	if known := s.state.Guests[l.GetGuestId()]; known != nil {
		return nil, contract.Refuse(codeGuestExists, "leave guest_id empty", "guest %s exists", l.GetGuestId())
	}
	cmd, err := s.sendLocked(ctx, node, &api.Command_LaunchGuest{LaunchGuest: l}, features, func(cmd *api.Command) {
		s.state.Guests[l.GetGuestId()] = &guestState{Node: node, Generation: l.GetGeneration(), CommandID: cmd.GetCommandId()}
	})
	if err != nil {
		return nil, err
	}
	return &client.Sent{CommandID: cmd.GetCommandId(), GuestID: l.GetGuestId(), Node: node}, nil
}

// guestCommand sends a command about a guest to the guest's node.
func (s *Server) guestCommand(ctx context.Context, guestID string, verb func(generation uint64) api.CommandVerb) (*client.Sent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.state.Guests[guestID]
	if g == nil {
		return nil, errGuestUnknown(guestID)
	}
	cmd, err := s.sendLocked(ctx, g.Node, verb(g.Generation), nil, nil)
	if err != nil {
		return nil, err
	}
	return &client.Sent{CommandID: cmd.GetCommandId(), GuestID: guestID, Node: g.Node}, nil
}

func errGuestUnknown(guestID string) *contract.Refusal {
	return contract.Refuse(codeGuestUnknown, "check the guest id", "no guest %q was asked for here", guestID)
}

func (s *Server) stopGuest(ctx context.Context, guestID string, in client.Stop) (*client.Sent, error) {
	const maxGrace = 24 * 60 * 60
	if !(in.GraceSeconds >= 0 && in.GraceSeconds <= maxGrace) {
		return nil, errBadRequest("grace_seconds is not 0 to %d", maxGrace)
	}
	return s.guestCommand(ctx, guestID, func(generation uint64) api.CommandVerb {
		if in.Generation != 0 {
			generation = in.Generation
		}
		return &api.Command_StopGuest{StopGuest: &api.StopGuest{
			GuestId: guestID, Generation: generation, Grace: durationpb.New(time.Duration(in.GraceSeconds * float64(time.Second))),
		}}
	})
}

func (s *Server) requestEvidence(ctx context.Context, guestID string, in client.Challenge) (*client.Sent, error) {
	nonce, err := hex.DecodeString(strings.ToLower(in.Nonce))
	if err != nil {
		return nil, errBadRequest("nonce is not hex")
	}
	return s.guestCommand(ctx, guestID, func(uint64) api.CommandVerb {
		return &api.Command_RequestEvidence{RequestEvidence: &api.RequestEvidence{GuestId: guestID, Nonce: nonce}}
	})
}

// cordon closes or opens a node.
func (s *Server) cordon(ctx context.Context, hostID string, closed bool, reason string) (*client.Sent, error) {
	var verb api.CommandVerb = &api.Command_Uncordon{Uncordon: &api.Uncordon{}}
	if closed {
		verb = &api.Command_Cordon{Cordon: &api.Cordon{Reason: reason}}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	cmd, err := s.sendLocked(ctx, hostID, verb, nil, func(*api.Command) { s.state.Hosts[hostID].Cordoning = closed })
	if err != nil {
		return nil, err
	}
	return &client.Sent{CommandID: cmd.GetCommandId(), Node: hostID}, nil
}

// keepEpoch begins an epoch on a node that reports a store which is in none,
// or in another than ours. It is called with live reports only.
func (s *Server) keepEpoch(ctx context.Context, hostID string, epoch uint64, storeID []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.state.Hosts[hostID]
	const storeIDLen = 16
	if h == nil || len(storeID) != storeIDLen || (epoch == h.Epoch && epoch != 0) {
		return
	}
	store, now := hex.EncodeToString(storeID), s.cfg.Clock()
	if h.StoreID == store && h.BeginID != "" && now.Sub(h.BegunAt) < s.cfg.BeginRetry {
		return // on its way
	}
	h.Epoch, h.Sequence, h.StoreID, h.BegunAt = max(h.Epoch, epoch)+1, 0, store, now
	begin := &api.Command_BeginEpoch{BeginEpoch: &api.BeginEpoch{Epoch: h.Epoch, StoreId: storeID}}
	_, err := s.sendLocked(ctx, hostID, begin, nil, func(cmd *api.Command) { h.BeginID = cmd.GetCommandId() })
	if err != nil {
		s.cfg.Logger.Error("beginning epoch", "host_id", hostID, "err", err)
		return
	}
	s.cfg.Logger.Info("epoch begun", "host_id", hostID, "epoch", h.Epoch)
}

// epochRefused lets the next report begin another epoch at once.
func (s *Server) epochRefused(hostID, commandID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.state.Hosts[hostID]; h != nil && h.BeginID == commandID {
		h.BeginID = ""
	}
}
