package main

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/confidential-node/agent/tests/emulator/gpu"
)

const asProgram = "FAKEGPU_TEST_RUNS_THE_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// start runs the program and returns when it takes orders.
func start(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	program := exec.CommandContext(t.Context(), os.Args[0], "--model", "b200", "--pdi", "7",
		"--socket", filepath.Join(dir, "s"), "--state", filepath.Join(dir, "state"), "--control", filepath.Join(dir, "ctl"))
	program.Env = append(os.Environ(), asProgram+"=1")
	program.Stderr = t.Output()
	out, err := program.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := program.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil { // its one line: it listens
		t.Fatal(err)
	}
	return program
}

func TestAKilledProgramStartsAgainWithItsKnobs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	program := start(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	control := filepath.Join(dir, "ctl")
	if _, err := gpu.Command(ctx, control, gpu.Order{Do: "knob", Knob: 8, Value: 1}); err != nil {
		t.Fatal(err)
	}
	if err := program.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := program.Wait(); err == nil {
		t.Error("it ended by itself")
	}
	program = start(t, dir)
	state, err := gpu.Command(ctx, control, gpu.Order{Do: "state"})
	if err != nil || state.Knobs[8] != 1 || state.PDI != 7 || state.Model != "B200" || state.CC {
		t.Errorf("started again: %+v, %v", state, err)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close() //nolint:errcheck // nothing was written
	if err := program.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := program.Wait(); err != nil {
		t.Errorf("interrupted: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "s")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its socket is left: %v", err)
	}
}

func TestAStateFileThatCannotBeReadIsNotOverwritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	if err := os.WriteFile(state, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := run(t.Context(), gpu.Models()["h100"], filepath.Join(dir, "s"), state, "")
	if _, syntax := errors.AsType[*json.SyntaxError](err); !syntax {
		t.Errorf("%v", err)
	}
	if data, err := os.ReadFile(state); err != nil || string(data) != "{" {
		t.Errorf("%q, %v", data, err)
	}
}
