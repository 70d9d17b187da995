//go:build emulated

package failpoint_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/nodeagent/failpoint"
)

// The child process is this test with a fault in its environment.
const childEnv = "FAILPOINT_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		_ = failpoint.FromEnvironment().Hit("here")
		<-time.After(time.Minute)
		return
	}
	os.Exit(m.Run())
}

func TestFaultsAreTheTestsOwn(t *testing.T) {
	t.Parallel()
	a, b := failpoint.New(), failpoint.New()
	a.Arm("here", "error(lost)")
	a.Arm("full", "error(ENOSPC)")
	if err := a.Hit("here"); err == nil || err.Error() != "failpoint here: lost" {
		t.Errorf("error is %v", err)
	}
	if err := a.Hit("full"); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("error is %v", err)
	}
	var none *failpoint.Points
	if err := errors.Join(a.Hit("there"), b.Hit("here"), none.Hit("here")); err != nil {
		t.Error(err)
	}
	for _, fault := range []string{"panic", "explode", "delay(soon)"} {
		a.Arm("here", fault)
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s does not panic", fault)
				}
			}()
			err := a.Hit("here")
			t.Errorf("%s: %v", fault, err)
		}()
	}
}

func TestDelayAndHangTakeTheirTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := failpoint.New()
		var slept time.Duration
		p.Sleep = func(d time.Duration) { slept = d }
		p.Arm("slow", "delay(3h)")
		if err := p.Hit("slow"); err != nil || slept != 3*time.Hour {
			t.Errorf("slept %v, %v", slept, err)
		}
		p.Arm("held", "hang")
		done := make(chan error)
		go func() { done <- p.Hit("held") }()
		select {
		case err := <-done:
			t.Errorf("it was not held: %v", err)
		case <-time.After(time.Hour):
		}
		p.Disarm("held")
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestAProcessDiesOfItsFile(t *testing.T) {
	t.Parallel()
	for _, fault := range []string{"kill", "kill(1ms)"} {
		file := filepath.Join(t.TempDir(), "faults")
		if err := os.WriteFile(file, []byte("there=panic\nhere="+fault+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"=1", failpoint.FileEnv+"="+file)
		err := cmd.Run()
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exit.String() != "signal: killed" {
			t.Errorf("%s: ended with %v", fault, err)
		}
	}
}
