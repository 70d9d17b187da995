package vfio

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Writer writes a value to one of the kernel's control files. A write that
// does not end before ctx does is vfio.stuck; it may still happen later.
type Writer interface {
	Write(ctx context.Context, path, value string) error
}

// Disposable writes from a child process. The kernel may block such a write
// for ever, uninterruptibly, and a thread of the agent must not be what hangs.
type Disposable struct {
	// Command is the program and arguments that read a value from standard
	// input and write it, by one write(2), to the path given last; WriteMain.
	Command []string
	// Limit bounds each write: the kernel waits up to a minute for a device
	// after a reset.
	Limit time.Duration
}

// abandon is how long a killed child may take to die before it is given up:
// one that waits in the kernel does not die.
const abandon = time.Second

// Write implements Writer.
func (d Disposable) Write(ctx context.Context, path, value string) error {
	ctx, cancel := context.WithTimeout(ctx, d.Limit)
	defer cancel()
	command := exec.CommandContext(ctx, d.Command[0], append(d.Command[1:len(d.Command):len(d.Command)], path)...)
	command.Stdin = strings.NewReader(value)
	var says strings.Builder
	command.Stderr = &says
	command.WaitDelay = abandon
	if err := command.Start(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			return fmt.Errorf("writing %q to %s: %s", strings.TrimSpace(value), path, reason(says.String(), err))
		}
		return nil
	case <-ctx.Done():
	}
	timer := time.NewTimer(abandon)
	defer timer.Stop()
	select {
	case err := <-ended:
		if err == nil { // it ended in the same moment
			return nil
		}
	case <-timer.C: // it hangs in the kernel, and its goroutine with it
	}
	return contract.Refuse("vfio.stuck", "look at the kernel log; the host needs a reboot before this device can be used",
		"writing %q to %s did not end", strings.TrimSpace(value), path).Because(context.Cause(ctx))
}

func reason(says string, err error) string {
	if says = strings.TrimSpace(says); says != "" {
		return says
	}
	return err.Error()
}

// WriteMain is the child's part: it writes all of standard input to path by
// one write and returns the exit code.
func WriteMain(path string) int {
	if err := writeOnce(path); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func writeOnce(path string) error {
	value := make([]byte, attributeLimit)
	n, err := os.Stdin.Read(value)
	if err != nil {
		return fmt.Errorf("no value on standard input: %w", err)
	}
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.Write(value[:n])
	return errors.Join(err, file.Close())
}
