package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/trial"
)

// lab is the platform that is measured.
type lab struct {
	out      io.Writer
	programs *trial.Programs
	p        *trial.Platform
	h        *trial.Host
	t        *trial.Tenant
	// disk is a folder on the checkout's disk, the same path everywhere.
	disk   string
	report *report
}

// measureAll runs every benchmark whose topic matches, printing each table as it
// is ready.
func measureAll(ctx context.Context, out io.Writer, match *regexp.Regexp) (r *report, err error) {
	l := &lab{out: out, report: &report{Version: reportVersion, At: time.Now().UTC()}}
	defer func() { err = errors.Join(err, l.close(err != nil)) }()
	if err := l.setUp(ctx); err != nil {
		return nil, fmt.Errorf("setting up: %w", err)
	}
	fmt.Fprintln(out, l.report.Machine)
	before, err := l.idle(ctx)
	if err != nil {
		return nil, fmt.Errorf("measuring the idle agent: %w", err)
	}
	for _, b := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"launches", l.launches},
		{"launch digest", l.digest},
		{"blob fetch", l.fetches},
		{"result upload", l.uploads},
		{"idle agent", func(ctx context.Context) error { return l.idleTables(ctx, before) }},
	} {
		if !match.MatchString(b.name) {
			continue
		}
		if err := b.do(ctx); err != nil {
			return nil, fmt.Errorf("measuring %s: %w", b.name, err)
		}
	}
	return l.report, nil
}

// show prints a table and keeps it.
func (l *lab) show(t table) {
	t = t.divided()
	t.write(l.out)
	l.report.Tables = append(l.report.Tables, t)
}

func (l *lab) setUp(ctx context.Context) (err error) {
	load := loadAverage()
	if l.programs, err = trial.Build(ctx); err != nil {
		return err
	}
	l.disk = filepath.Join(filepath.Dir(l.programs.Images), "bench")
	// One that was killed has left its own.
	if err := errors.Join(os.RemoveAll(l.disk), os.Mkdir(l.disk, 0o711)); err != nil { //nolint:gosec // QEMU's user passes through
		return err
	}
	if l.p, err = trial.New(ctx, l.programs); err != nil {
		return err
	}
	if l.h, err = l.p.AddHost(ctx, trial.HostOptions{}); err != nil {
		return err
	}
	if err := l.useDisk(ctx); err != nil {
		return err
	}
	if l.t, err = l.p.AddTenant(ctx, "tenant", trial.TenantOptions{}); err != nil {
		return err
	}
	status, err := l.h.Status(ctx)
	l.report.Machine = fmt.Sprintf("%d CPUs %s, load average before %s, %s, guests in software emulation", runtime.NumCPU(), cpuModel(), load, status.Hypervisor)
	return err
}

// useDisk puts the agent's state and cache where a provider has them. A
// trial's host keeps them in memory, where nothing waits for a disk.
func (l *lab) useDisk(ctx context.Context) error {
	if err := l.h.Agent().Stop(); err != nil {
		return err
	}
	for _, dir := range []string{trial.StateDir, trial.CacheDir} {
		onDisk := filepath.Join(l.disk, filepath.Base(filepath.Dir(dir)))
		if _, err := l.h.Output(ctx, "cp", "-a", dir, onDisk); err != nil {
			return err
		}
		if _, err := l.h.Output(ctx, "mount", "--bind", onDisk, dir); err != nil {
			return err
		}
	}
	return l.h.StartAgent(ctx)
}

// close ends the platform; after a failure it shows what the agent said last.
func (l *lab) close(failed bool) error {
	var errs []error
	if l.p != nil {
		if log, err := os.ReadFile(filepath.Join(l.p.Logs, "provider0-agent.log")); failed && err == nil {
			const last = 4 << 10
			fmt.Fprintf(l.out, "\nThe agent's log ends with:\n%s\n", log[max(0, len(log)-last):])
		}
		errs = append(errs, l.p.Close())
	}
	if l.disk != "" {
		errs = append(errs, os.RemoveAll(l.disk))
	}
	return errors.Join(errs...)
}

func cpuModel() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

// loadAverage of the last minute: what else runs distorts everything.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	last, _, _ := strings.Cut(string(text), " ")
	return last
}

// virsh runs a verb on the host's libvirtd and returns how long it took.
func (l *lab) virsh(ctx context.Context, args ...string) (time.Duration, error) {
	begin := time.Now()
	_, err := l.h.Output(ctx, "virsh", append([]string{"-q", "-c", rig.LibvirtURI}, args...)...)
	return time.Since(begin), err
}
