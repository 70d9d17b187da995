package controlplane

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/renameio/v2"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
)

// realServer drives the embedded server for the transport's suite.
type realServer struct {
	w         *world
	transport control.Transport
	creds     string // file of transport
	// wiped streams are read from the server itself: the control plane
	// follows the one it began with.
	wiped bool
}

func (s *realServer) Transport() control.Transport { return s.transport }

func (s *realServer) Send(tb testing.TB, raw []byte) {
	tb.Helper()
	if err := s.w.Server.Publish(tb.Context(), host, raw); err != nil {
		tb.Fatal(err)
	}
}

func (s *realServer) Events(tb testing.TB) []*api.Event {
	tb.Helper()
	if !s.wiped {
		return s.w.events()
	}
	stream, err := s.w.Server.broker.js.Stream(tb.Context(), EventStream)
	if err != nil {
		tb.Fatal(err)
	}
	state := stream.CachedInfo().State
	var out []*api.Event
	for seq := max(state.FirstSeq, 1); seq <= state.LastSeq; seq++ {
		msg, err := stream.GetMsg(tb.Context(), seq)
		if err != nil {
			tb.Fatal(err)
		}
		e, err := api.ParseEvent(msg.Data)
		if err != nil {
			tb.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

func (s *realServer) Unsettled(tb testing.TB) int {
	tb.Helper()
	n, err := s.w.Server.Unsettled(tb.Context(), host)
	if err != nil {
		tb.Fatal(err)
	}
	return n
}

func (s *realServer) Cut(tb testing.TB) {
	tb.Helper()
	if err := s.w.Server.Disconnect(host); err != nil {
		tb.Fatal(err)
	}
}

func (s *realServer) Stop(testing.TB) { s.w.stop() }

func (s *realServer) Start(testing.TB) { s.w.start() }

func (s *realServer) LoseQueue(tb testing.TB) {
	tb.Helper()
	if err := s.w.Server.broker.js.DeleteConsumer(tb.Context(), CommandStream, host); err != nil {
		tb.Fatal(err)
	}
}

func (s *realServer) LoseStream(tb testing.TB) {
	tb.Helper()
	s.wiped = true
	if err := s.w.Server.broker.js.DeleteStream(tb.Context(), EventStream); err != nil {
		tb.Fatal(err)
	}
}

func (s *realServer) Restore(tb testing.TB) {
	tb.Helper()
	b := s.w.Server.broker
	if err := errors.Join(b.streams(tb.Context()), b.consumer(tb.Context(), host)); err != nil {
		tb.Fatal(err)
	}
}

func (s *realServer) Revoke(tb testing.TB) {
	tb.Helper()
	if err := s.w.Server.Revoke(host); err != nil {
		tb.Fatal(err)
	}
}

func (s *realServer) Renew(tb testing.TB) {
	tb.Helper()
	creds, _, _, err := s.w.Server.EnrolHost(tb.Context(), host)
	if err == nil {
		err = renameio.WriteFile(s.creds, creds, 0o600)
	}
	if err != nil {
		tb.Fatal(err)
	}
}

func TestTheRealTransportConforms(t *testing.T) {
	t.Parallel()
	controltest.Suite(t, func(t *testing.T, body func(*testing.T, controltest.Server)) {
		t.Helper()
		t.Parallel()
		w := newWorld(t)
		s := &realServer{w: w, creds: filepath.Join(w.dir, "host.creds")}
		s.Renew(t)
		var err error
		s.transport, err = control.NewNATS(control.NATSConfig{Servers: []string{w.Server.NATSURL()}, CAFile: w.ca, CredsFile: s.creds, HostID: host})
		if err != nil {
			t.Fatal(err)
		}
		body(t, s)
	})
}
