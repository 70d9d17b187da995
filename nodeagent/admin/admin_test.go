package admin

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/confidential-node/agent/nodeagent/output"
)

func TestStatusTravelsOverASocketOnlyItsOwnerCanOpen(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), SocketName)
	stale, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false) //nolint:errcheck,forcetypeassert // a unix listener
	if err := stale.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := FetchStatus(t.Context(), socket); !errors.Is(err, ErrUnreachable) {
		t.Fatalf("dead socket: %v", err)
	}

	want := Status{Header: output.NewHeader("Status"), HostID: "host-1", Guests: []Guest{{ID: "g", VCPUs: 2}}}
	server := New(socket, func(context.Context) (Status, error) { return want, nil })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	var got Status
	for got.HostID == "" {
		select {
		case err := <-done:
			t.Fatalf("server ended: %v", err)
		default:
		}
		got, err = FetchStatus(t.Context(), socket)
		if err != nil && !errors.Is(err, ErrUnreachable) {
			t.Fatal(err)
		}
	}
	if got.Guests[0].VCPUs != 2 || got.Kind != "Status" {
		t.Errorf("got %+v", got)
	}
	info, err := os.Stat(socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v, %v", info.Mode(), err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("graceful stop: %v", err)
	}
}

func TestMissingSocketSaysWhatToDo(t *testing.T) {
	t.Parallel()
	if _, err := FetchStatus(t.Context(), filepath.Join(t.TempDir(), "none.sock")); !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
}
