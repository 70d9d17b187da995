package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	idleWindows = 5
	// idleWindow holds one heartbeat of a trial's agent.
	idleWindow = 2 * time.Second
	// idleAfter is how long nothing was asked before an agent is idle; it
	// takes up to ten seconds to see that it is at rest.
	idleAfter = 12 * time.Second
)

// usage of a process in each window.
type usage struct {
	rss, dirty []float64 // MiB
	cpu        []float64 // ms per second
}

// idle watches agent and libvirtd for some seconds in which nothing is asked
// of them.
func (l *lab) idle(ctx context.Context) (watched map[string]*usage, err error) {
	libvirtd, err := l.h.Output(ctx, "bash", "-c", "pgrep -x libvirtd --ns $$ --nslist net")
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(libvirtd))
	if err != nil {
		return nil, fmt.Errorf("finding libvirtd: %w", err)
	}
	pids := map[string]int{"agent": l.h.Agent().PID(), "libvirtd": pid}
	watched = map[string]*usage{}
	for name := range pids {
		watched[name] = &usage{}
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(idleAfter):
	}
	tick := time.NewTicker(idleWindow)
	defer tick.Stop()
	for range idleWindows {
		begin, spent := time.Now(), map[string]time.Duration{}
		for name, pid := range pids {
			if spent[name], err = cpuTime(pid); err != nil {
				return nil, err
			}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
		for name, pid := range pids {
			if err := watched[name].add(pid, spent[name], time.Since(begin)); err != nil {
				return nil, err
			}
		}
	}
	return watched, nil
}

func (u *usage) add(pid int, before, window time.Duration) error {
	after, cpuErr := cpuTime(pid)
	rss, dirty, err := memory(pid)
	u.cpu = append(u.cpu, milliseconds(after-before)/window.Seconds())
	u.rss, u.dirty = append(u.rss, rss), append(u.dirty, dirty)
	return errors.Join(cpuErr, err)
}

// cpuTime reads the CPU clock of a process, of all its threads and to the
// nanosecond; /proc/PID/stat counts in steps of 10 ms.
func cpuTime(pid int) (time.Duration, error) {
	const scheduler = 2 // CPUCLOCK_SCHED, see clock_getcpuclockid(3)
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduler), &t); err != nil {
		return 0, fmt.Errorf("reading CPU time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// memory returns what a process holds in RAM, and what of it is its own and
// not backed by a file, in MiB.
func memory(pid int) (rss, dirty float64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("reading memory: %w", err)
	}
	return smaps(string(text))
}

func smaps(text string) (rss, dirty float64, err error) {
	values := map[string]float64{}
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[2] == "kB" {
			kib, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				return 0, 0, fmt.Errorf("reading memory: %w", err)
			}
			values[fields[0]] = kib / 1024
		}
	}
	if values["Rss:"] == 0 {
		return 0, 0, errors.New("reading memory: there is no Rss")
	}
	return values["Rss:"], values["Private_Dirty:"], nil
}

// idleTables shows the agent at rest, before its first guest and now.
func (l *lab) idleTables(ctx context.Context, before map[string]*usage) error {
	after, err := l.idle(ctx)
	if err != nil {
		return err
	}
	const first, later, its = "agent, fresh", "agent, after its guests", "libvirtd"
	l.show(table{
		Title: "Idle memory", Unit: "MiB", Against: []string{its},
		About: fmt.Sprintf(`Resident memory of the agent with its link up, no guest and nothing asked for %v, against libvirtd's on the same
			host. Good: at most 40 MiB; what is its own (private and dirty) is the part that the host cannot take back.`, idleAfter),
		Rows: []row{
			newRow(its, after[its].rss...), newRow(first, before["agent"].rss...), newRow(later, after["agent"].rss...),
			newRow("its own of fresh", before["agent"].dirty...), newRow("its own after its guests", after["agent"].dirty...),
		},
	})
	full := "a CPU fully used"
	l.show(table{
		Title: "Idle CPU", Unit: "ms/s", Against: []string{full},
		About: fmt.Sprintf(`CPU time per second of the same processes, in windows of %v with one heartbeat each (a provider's default is one
			every 30 s). Good: below 0.010 of a CPU.`, idleWindow),
		Rows: []row{
			newRow(full, milliseconds(time.Second)), newRow(its, after[its].cpu...), newRow(first, before["agent"].cpu...), newRow(later, after["agent"].cpu...),
		},
	})
	return nil
}
