package admin

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
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
	var wrong error
	server := New(socket, func(context.Context) (Status, error) { return want, nil }, func() error { return wrong }, nil)
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
	if err := AcceptClock(t.Context(), socket); err != nil {
		t.Errorf("accepting the clock: %v", err)
	}
	wrong = contract.Refuse("clock.before-build", "set it", "it is 1970")
	if err := AcceptClock(t.Context(), socket); err == nil || contract.AsRefusal(err).Code != "clock.before-build" || contract.AsRefusal(err).Remedy != "set it" {
		t.Errorf("accepting a wrong clock: %v", err)
	}
	info, err := os.Stat(socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v, %v", info.Mode(), err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("graceful stop: %v", err)
	}
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket outlives its server: %v", err)
	}
}

// The umask is the process's: no t.Parallel.
func TestTheSocketIsNeverOpenToOthers(t *testing.T) { //nolint:paralleltest // see above
	defer syscall.Umask(syscall.Umask(0))
	dir := t.TempDir()
	socket := filepath.Join(dir, SocketName)
	left := filepath.Join(dir, ".new", SocketName) // by an agent that died while binding
	if err := errors.Join(os.Mkdir(filepath.Dir(left), 0o777), os.WriteFile(left, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	binding := &net.ListenConfig{Control: func(_, address string, _ syscall.RawConn) error {
		info, err := os.Stat(filepath.Dir(address))
		if err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("bound in a folder of mode %v, %v", info.Mode(), err)
		}
		return nil
	}}
	listener, err := listen(t.Context(), binding, socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close() //nolint:errcheck // a test's
	if info, err := os.Stat(socket); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("socket mode %v, %v", info.Mode(), err)
	}
	if found, err := os.ReadDir(dir); err != nil || len(found) != 1 {
		t.Errorf("besides the socket something is left: %v, %v", found, err)
	}
}

func TestMissingSocketSaysWhatToDo(t *testing.T) {
	t.Parallel()
	if _, err := FetchStatus(t.Context(), filepath.Join(t.TempDir(), "none.sock")); !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
}
