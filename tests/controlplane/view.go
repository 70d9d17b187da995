package controlplane

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
)

const (
	// maxEvents and maxEvidence bound what is held in memory.
	maxEvents   = 50_000
	maxEvidence = 64 // challenges per guest
)

// view is what the events say. It is rebuilt from the stream at every start.
type view struct {
	s *Server

	mu       sync.Mutex
	seen     map[string]bool // event ids
	nodes    map[string]*nodeView
	guests   map[string]*guestView
	outcomes map[string]*outcome // by command id
	events   []client.Event
}

type nodeView struct {
	lastSeen   time.Time
	capability *api.Capability
	// capabilityAt is when the node said so.
	capabilityAt time.Time
	heartbeat    *api.Heartbeat
}

type guestView struct {
	state    *api.GuestState
	results  []*api.ResultUploaded
	uploads  map[string]waitingUpload // by name
	evidence map[string][]byte        // by hex nonce
	order    []string                 // of evidence
}

type outcome struct {
	refusal *contract.Refusal // nil: done
}

func newView(s *Server) *view {
	return &view{s: s, seen: map[string]bool{}, nodes: map[string]*nodeView{}, guests: map[string]*guestView{}, outcomes: map[string]*outcome{}}
}

// follow reads the event stream from its beginning and goes on for ever. It
// returns when what was stored before is applied.
func (s *Server) follow(ctx, running context.Context) error {
	stream, err := s.broker.js.Stream(ctx, EventStream)
	if err != nil {
		return fmt.Errorf("opening event stream: %w", err)
	}
	last := stream.CachedInfo().State.LastSeq
	s.rewound(last)
	consumer, err := s.broker.js.OrderedConsumer(ctx, EventStream, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return fmt.Errorf("reading event stream: %w", err)
	}
	messages, err := consumer.Messages()
	if err != nil {
		return fmt.Errorf("reading event stream: %w", err)
	}
	stop := context.AfterFunc(running, messages.Stop)
	caughtUp := make(chan struct{})
	var once sync.Once
	if stream.CachedInfo().State.Msgs == 0 {
		once.Do(func() { close(caughtUp) })
	}
	s.tasks.Go(func() {
		defer stop()
		for {
			msg, err := messages.Next()
			if errors.Is(err, jetstream.ErrMsgIteratorClosed) {
				return
			}
			if err != nil {
				s.cfg.Logger.Warn("reading event stream", "err", err)
				if running.Err() != nil {
					return
				}
				continue
			}
			meta, err := msg.Metadata()
			if err != nil {
				s.cfg.Logger.Warn("reading event stream", "err", err)
				continue
			}
			s.apply(running, msg.Subject(), msg.Data(), meta, meta.Sequence.Stream > last)
			if meta.Sequence.Stream >= last {
				once.Do(func() { close(caughtUp) })
			}
		}
	})
	select {
	case <-caughtUp:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("reading stored events: %w", ctx.Err())
	}
}

// apply takes one event. A host may speak only for itself: the subject is
// enforced by the server, the rest must agree with it.
func (s *Server) apply(ctx context.Context, subject string, data []byte, meta *jetstream.MsgMetadata, live bool) {
	e, err := api.ParseEvent(data)
	if err != nil {
		s.cfg.Logger.Warn("event ignored", "subject", subject, "err", err)
		return
	}
	host := e.GetHostId()
	if !strings.HasPrefix(subject, api.EventSubject(host, "")) {
		s.cfg.Logger.Warn("event ignored: it is about another host", "subject", subject, "host_id", host)
		return
	}
	command, guestNode := s.knows(e)
	if guestNode != "" && guestNode != host {
		s.cfg.Logger.Warn("event ignored: the guest is another host's", "subject", subject, "host_id", host)
		return
	}
	if !s.view.apply(e, host, command, meta) {
		return
	}
	if h := e.GetHeartbeat(); h != nil {
		s.watch(host, h, meta.Timestamp, meta.Sequence.Stream)
	}
	if !live {
		return
	}
	switch b := e.GetBody().(type) {
	case *api.Event_Heartbeat:
		s.keepEpoch(ctx, host, b.Heartbeat.GetIssuerEpoch(), b.Heartbeat.GetStoreId())
	case *api.Event_Capability:
		s.keepEpoch(ctx, host, b.Capability.GetIssuerEpoch(), b.Capability.GetStoreId())
	case *api.Event_CommandRefused:
		s.epochRefused(host, e.GetCommandId())
	case *api.Event_CommandDone, *api.Event_GuestState, *api.Event_Evidence, *api.Event_ResultUploaded, *api.Event_ResultGivenUp,
		*api.Event_UploadGrantWanted, *api.Event_UploadReady, nil:
	}
}

// knows returns what we issued that the event is about.
func (s *Server) knows(e *api.Event) (command *issuedCommand, guestNode string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.state.Commands[e.GetCommandId()]; c != nil && c.Node == e.GetHostId() {
		copied := *c
		command = &copied
	}
	for _, id := range []string{
		e.GetGuestState().GetGuestId(), e.GetEvidence().GetGuestId(), e.GetResultUploaded().GetGuestId(), e.GetResultGivenUp().GetGuestId(),
		e.GetUploadGrantWanted().GetGuestId(), e.GetUploadReady().GetGuestId(),
	} {
		if g := s.state.Guests[id]; g != nil {
			guestNode = g.Node
		}
	}
	return command, guestNode
}

// apply reports whether the event is new.
func (v *view) apply(e *api.Event, host string, command *issuedCommand, meta *jetstream.MsgMetadata) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.seen[e.GetEventId()] {
		return false
	}
	n := v.nodes[host]
	if n == nil {
		n = &nodeView{}
		v.nodes[host] = n
	}
	n.lastSeen = meta.Timestamp
	kind := api.EventKind(e)
	raw, err := protojson.Marshal(e)
	if err != nil {
		v.s.cfg.Logger.Warn("event not listed", "err", err)
	}
	v.events = append(v.events, client.Event{Seq: meta.Sequence.Stream, Kind: kind, Event: json.RawMessage(raw)})
	if len(v.events) > maxEvents {
		v.events = slices.Clone(v.events[maxEvents/10:])
	}
	v.seen[e.GetEventId()] = true
	switch b := e.GetBody().(type) {
	case *api.Event_Heartbeat:
		n.heartbeat = b.Heartbeat
	case *api.Event_Capability:
		// One that waited in the node's outbox may be older than what the node
		// said when it connected.
		if at := e.GetAt().AsTime(); !at.Before(n.capabilityAt) {
			n.capability, n.capabilityAt = b.Capability, at
		}
	case *api.Event_GuestState:
		v.guestLocked(b.GuestState.GetGuestId()).state = b.GuestState
	case *api.Event_ResultUploaded:
		g := v.guestLocked(b.ResultUploaded.GetGuestId())
		g.results = slices.DeleteFunc(g.results, func(r *api.ResultUploaded) bool { return r.GetName() == b.ResultUploaded.GetName() })
		g.results = append(g.results, b.ResultUploaded)
		g.uploadLocked(waitingUpload{name: b.ResultUploaded.GetName()})
	case *api.Event_ResultGivenUp:
		v.guestLocked(b.ResultGivenUp.GetGuestId()).uploadLocked(waitingUpload{name: b.ResultGivenUp.GetName()})
	case *api.Event_UploadGrantWanted:
		v.guestLocked(b.UploadGrantWanted.GetGuestId()).uploadLocked(waitingUpload{e.GetEventId(), b.UploadGrantWanted.GetName(), b.UploadGrantWanted, nil})
	case *api.Event_UploadReady:
		v.guestLocked(b.UploadReady.GetGuestId()).uploadLocked(waitingUpload{e.GetEventId(), b.UploadReady.GetName(), nil, b.UploadReady})
	case *api.Event_Evidence:
		v.guestLocked(b.Evidence.GetGuestId()).answer(command, b.Evidence.GetEvidence())
	case *api.Event_CommandRefused, *api.Event_CommandDone, nil:
	}
	v.outcomeLocked(e, command)
	return true
}

// outcomeLocked notes the first outcome of a command. A command that was
// carried out and is refused when somebody repeats it stays done.
func (v *view) outcomeLocked(e *api.Event, command *issuedCommand) {
	if command == nil || v.outcomes[e.GetCommandId()] != nil {
		return
	}
	o := &outcome{}
	if r := e.GetCommandRefused(); r != nil {
		o.refusal = api.RefusalFromWire(r.GetRefusal())
	}
	v.outcomes[e.GetCommandId()] = o
}

func (v *view) guestLocked(id string) *guestView {
	g := v.guests[id]
	if g == nil {
		g = &guestView{evidence: map[string][]byte{}}
		v.guests[id] = g
	}
	return g
}

// answer files evidence under the nonce it was asked with. Whether it is any
// good is for whoever asked.
func (g *guestView) answer(command *issuedCommand, evidence []byte) {
	nonce := ""
	if command != nil {
		nonce = command.Nonce
	} else if e, err := contract.ParseEvidence(evidence); err == nil {
		nonce = hex.EncodeToString(e.Nonce)
	}
	if nonce == "" {
		return
	}
	if _, again := g.evidence[nonce]; !again {
		g.order = append(g.order, nonce)
	}
	g.evidence[nonce] = evidence
	if len(g.order) > maxEvidence {
		delete(g.evidence, g.order[0])
		g.order = g.order[1:]
	}
}

// pick returns the first open node, by name, that has the image.
func (v *view) pick(image *api.BootImage, hosts map[string]*hostState) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	var fit []string
	for id, h := range hosts {
		n := v.nodes[id]
		if n == nil || h.Epoch == 0 || h.Cordoning || h.alarmed(id) != nil || n.heartbeat.GetCordoned() || n.heartbeat.GetClockDoubt() != "" {
			continue
		}
		if slices.ContainsFunc(n.capability.GetImages(), func(i *api.BootImage) bool { return proto.Equal(i, image) }) {
			fit = append(fit, id)
		}
	}
	if len(fit) == 0 {
		return ""
	}
	return slices.Min(fit)
}

func newUUID() string { return uuid.NewString() }
