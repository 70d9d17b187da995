package controlplane

import (
	"testing"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
)

// realServer drives the embedded server for the transport's suite.
type realServer struct {
	w         *world
	transport control.Transport
}

func (s *realServer) Transport() control.Transport { return s.transport }

func (s *realServer) Send(tb testing.TB, raw []byte) {
	tb.Helper()
	if err := s.w.Server.Publish(tb.Context(), host, raw); err != nil {
		tb.Fatal(err)
	}
}

func (s *realServer) Events(testing.TB) []*api.Event { return s.w.events() }

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

func TestTheRealTransportConforms(t *testing.T) {
	t.Parallel()
	controltest.Suite(t, func(t *testing.T, body func(*testing.T, controltest.Server)) {
		t.Helper()
		t.Parallel()
		w := newWorld(t)
		body(t, &realServer{w, w.enrol(host)})
	})
}
