package controlplane

import (
	"crypto/tls"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
)

func TestTheMessageServerStoresOnDiskBeforeItAnswers(t *testing.T) {
	t.Parallel()
	o, err := serverOptions("/plane", "127.0.0.1:4222", tls.Certificate{})
	if err != nil {
		t.Fatal(err)
	}
	if !o.JetStream || o.StoreDir != "/plane/jetstream" || !o.SyncAlways {
		t.Errorf("JetStream %v in %q, synced always: %v", o.JetStream, o.StoreDir, o.SyncAlways)
	}
	if o.TLSConfig.MinVersion != tls.VersionTLS13 || !o.TLSHandshakeFirst || o.AllowNonTLS || o.TLSTimeout <= 0 || o.AuthTimeout <= 0 {
		t.Errorf("TLS from version %x, first: %v, or none: %v; timeouts %v and %v", o.TLSConfig.MinVersion, o.TLSHandshakeFirst, o.AllowNonTLS,
			o.TLSTimeout, o.AuthTimeout)
	}
	if o.MaxPayload <= api.MaxCommandBytes || o.Host != "127.0.0.1" || o.Port != 4222 {
		t.Errorf("%d bytes at most, at %s:%d", o.MaxPayload, o.Host, o.Port)
	}
	if free, err := serverOptions("/plane", "127.0.0.1:0", tls.Certificate{}); err != nil || free.Port != server.RANDOM_PORT {
		t.Errorf("port 0: %v", err)
	}
	for _, listen := range []string{"", "127.0.0.1", "127.0.0.1:nats", "127.0.0.1:-1", "127.0.0.1:65536"} {
		if _, err := serverOptions("/plane", listen, tls.Certificate{}); err == nil {
			t.Errorf("address %q is accepted", listen)
		}
	}
	w := newWorld(t)
	config := w.Server.broker.server.JetStreamConfig()
	if config == nil || !config.SyncAlways {
		t.Errorf("the running server stores with %+v", config)
	}
	for _, name := range []string{CommandStream, EventStream} {
		if got := w.stream(name).Config; got.Storage != jetstream.FileStorage || got.NoAck {
			t.Errorf("stream %s: %+v", name, got)
		}
	}
}

// stream is what the server says of a stream.
func (w *world) stream(name string) *jetstream.StreamInfo {
	w.t.Helper()
	s, err := w.Server.broker.js.Stream(w.t.Context(), name)
	if err != nil {
		w.t.Fatal(err)
	}
	return s.CachedInfo()
}

func TestAnEventPublishedTwiceIsStoredOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	transport := w.enrol(host)
	subject := api.EventSubject(host, api.KindGuestState)
	publish := func(e *api.Event) {
		t.Helper()
		data, err := api.MarshalEvent(e)
		if err != nil {
			t.Fatal(err)
		}
		// The answer to the first may have been lost with its connection.
		conn, err := transport.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Publish(t.Context(), control.Outgoing{Subject: subject, ID: e.GetEventId(), Data: data}); err != nil {
			t.Fatal(err)
		}
	}
	event := func() *api.Event {
		return api.NewGuestState(host, "", time.Now(), &api.GuestState{GuestId: "x"})
	}
	before := w.stream(EventStream).State.Msgs
	e := event()
	publish(e)
	publish(e)
	if got := w.stream(EventStream).State.Msgs - before; got != 1 {
		t.Errorf("one event is stored %d times", got)
	}
	publish(event())
	if got := w.stream(EventStream).State.Msgs - before; got != 2 {
		t.Errorf("two events are stored as %d", got)
	}
}
