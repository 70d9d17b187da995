package main

import (
	"context"
	"errors"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/supervise"
)

// fakeRoot is a /proc with 8 GiB of memory.
func fakeRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{
		"proc/sys/kernel/osrelease": "6.17.0\n",
		"proc/meminfo":              "MemTotal:        8388608 kB\nMemFree: 1 kB\n", "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC 9554\n",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func localUser(t *testing.T) string {
	t.Helper()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	return me.Username
}

func TestHostFactsAreReadAndTheReserveIsKept(t *testing.T) {
	t.Parallel()
	root, cfg := fakeRoot(t), config.Default()
	cfg.Libvirt.QEMUUser = localUser(t)
	h, err := readHost(root, cfg)
	if err != nil || h.kernel != "6.17.0" || h.cpuBrand != "AMD EPYC 9554" || h.capacity.MemoryMiB != 8192-4096 {
		t.Errorf("%+v %v", h, err)
	}
	cfg.Policy.ReserveMemoryMiB = 8192
	if _, err := readHost(root, cfg); err == nil || contract.AsRefusal(err).Code != "config.reserve-too-large" {
		t.Errorf("nothing left for guests: %v", err)
	}
	cfg = config.Default()
	cfg.Libvirt.QEMUUser = "nobody-of-that-name"
	if _, err := readHost(root, cfg); err == nil || contract.AsRefusal(err).Code != "config.no-qemu-user" {
		t.Errorf("no QEMU user: %v", err)
	}
	if err := os.Remove(filepath.Join(root, "proc/meminfo")); err != nil {
		t.Fatal(err)
	}
	if _, err := readHost(root, config.Default()); err == nil {
		t.Error("missing facts are made up")
	}
}

// The umask is the process's: no t.Parallel.
func TestFoldersHaveTheirModesWhateverWasThere(t *testing.T) { //nolint:paralleltest // see above
	defer syscall.Umask(syscall.Umask(0o077))
	dir := t.TempDir()
	cfg := config.Default()
	cfg.StateDir, cfg.RunDir, cfg.CacheDir = dir+"/state", dir+"/run", dir+"/cache"
	if err := errors.Join(os.Mkdir(cfg.StateDir, 0o700), os.Chmod(cfg.StateDir, 0o755)); err != nil { //nolint:gosec // open, as an operator's mkdir makes it
		t.Fatal(err)
	}
	if err := makeDirs(cfg); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{cfg.StateDir: 0o700, cfg.RunDir: 0o711, guestsDir(cfg): 0o711, cfg.CacheDir: 0o711} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v %v, want %v", path, info.Mode(), err, want)
		}
	}
}

// What cannot work is said at the start, naming the file and what to do.
func TestAnAgentWithoutCredentialsDoesNotStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cfg := config.Default()
	cfg.HostID, cfg.Libvirt.QEMUUser, cfg.Policy.ReserveMemoryMiB = "host-1", localUser(t), 1
	cfg.StateDir, cfg.RunDir, cfg.CacheDir = dir+"/state", dir+"/run", dir+"/cache"
	cfg.Control.Servers, cfg.Control.CAFile, cfg.Control.CredsFile = []string{"tls://control.example:4222"}, dir+"/none.pem", dir+"/none.creds"
	cfg.Control.IssuerKeys = []string{"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="}
	err := runAgent(t.Context(), cfg, hclog.NewNullLogger())
	if err == nil || !strings.Contains(err.Error(), "none.") {
		t.Errorf("started, or failed without naming the file: %v", err)
	}
	if _, err := os.Stat(storeFile(cfg)); err == nil {
		t.Error("the store was opened all the same")
	}
}

// systemd hears of the end when it begins, not when it is over: it would take
// a slow one for a hang.
func TestSystemdHearsOfTheEndBeforeItIsOver(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	states := make(chan string, 4)
	heard := make(chan struct{})
	tasks := supervise.New(ctx, hclog.NewNullLogger())
	tasks.Go("slow", func(ctx context.Context) error {
		<-ctx.Done()
		<-heard
		return nil
	})
	done := make(chan error, 1)
	go func() { done <- serve(ctx, tasks, func(state string) { states <- state }) }()
	if s := <-states; s != daemon.SdNotifyReady {
		t.Errorf("first %q", s)
	}
	cancel()
	if s := <-states; s != daemon.SdNotifyStopping {
		t.Errorf("then %q", s)
	}
	close(heard)
	if err := <-done; err != nil || len(states) > 0 {
		t.Errorf("ended with %v, told %d states more", err, len(states))
	}
}

func TestSystemdHearsOfAnEndNobodyAskedFor(t *testing.T) {
	t.Parallel()
	var states []string
	tasks := supervise.New(t.Context(), hclog.NewNullLogger())
	tasks.Go("broken", func(context.Context) error { return errors.New("broken") })
	err := serve(t.Context(), tasks, func(state string) { states = append(states, state) })
	if err == nil || len(states) != 2 || states[1] != daemon.SdNotifyStopping {
		t.Errorf("ended with %v, told %v", err, states)
	}
}
