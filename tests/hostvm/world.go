package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/tests/emulator/gpu"
)

// Limits. Everything in the machine is emulated, and slower by a factor of ten
// to fifty than on a host.
const (
	quick = time.Minute     // a command
	slow  = 3 * time.Minute // a device's way through its states
	// nested is a guest in the host: emulation within emulation.
	nested = 15 * time.Minute
)

// world is the host that the steps act on.
type world struct {
	*machine
	programs string
	out      io.Writer
	address  map[string]string // PCI address in the host, by slot
}

// outcome is a row of the table.
type outcome struct {
	name string
	err  error
	took time.Duration
	ran  bool
}

// run boots the host, takes the steps and prints the table. The first step
// that prepares the host and fails ends the run, any other only itself.
func run(ctx context.Context, image, programs, dir string, match *regexp.Regexp, out io.Writer) error {
	w := &world{programs: programs, out: out, address: map[string]string{}}
	var table []outcome
	begin := time.Now()
	take := func(name string, do func(context.Context) error) error {
		start := time.Now()
		err := do(ctx)
		o := outcome{name: name, err: err, took: time.Since(start), ran: true}
		table = append(table, o)
		fmt.Fprintf(out, "%5.0fs  %-7s %s (%.0f s)\n", time.Since(begin).Seconds(), verdict(err), name, o.took.Seconds())
		return err
	}
	err := take("the host boots", func(ctx context.Context) (err error) {
		w.machine, err = boot(ctx, image, programs, dir)
		return err
	})
	if err != nil {
		return err
	}
	defer w.close() //nolint:errcheck // the run is over
	for _, s := range steps() {
		if !s.always && !match.MatchString(s.name) {
			table = append(table, outcome{name: s.name})
			continue
		}
		err := take(s.name, func(ctx context.Context) error { return s.do(ctx, w) })
		if err != nil {
			if log, lost := w.sh(ctx, quick, "journalctl -u nodeagent -n 40 --no-pager -o cat; dmesg | tail -n 20"); lost == nil {
				err = fmt.Errorf("%w\n%s", err, log)
			}
			fmt.Fprintf(out, "       %s\n", strings.ReplaceAll(err.Error(), "\n", "\n       "))
			if s.always || ctx.Err() != nil {
				break
			}
		}
	}
	return report(out, table, time.Since(begin))
}

func verdict(err error) string {
	if err != nil {
		return "FAILED"
	}
	return "ok"
}

// report prints the table, and is an error when a row of it is.
func report(out io.Writer, table []outcome, took time.Duration) error {
	rows := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	failed, ran := 0, 0
	fmt.Fprintln(rows, "\nresult\tseconds\twhat")
	for _, o := range table {
		if !o.ran {
			fmt.Fprintf(rows, "left out\t-\t%s\n", o.name)
			continue
		}
		ran++
		if o.err != nil {
			failed++
		}
		fmt.Fprintf(rows, "%s\t%.1f\t%s\n", verdict(o.err), o.took.Seconds(), o.name)
	}
	if err := rows.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "%d of %d steps ran in %.0f s, %d failed\n", ran, len(table), took.Seconds(), failed)
	if failed > 0 {
		return fmt.Errorf("%d steps failed", failed)
	}
	return nil
}

// gpus are what the agent says of its devices.
func (w *world) gpus(ctx context.Context) (list admin.GPUList, err error) {
	text, err := w.sh(ctx, quick, "nodeagent gpu list -o json")
	if err != nil {
		return list, err
	}
	return list, json.Unmarshal([]byte(text), &list)
}

// gpu is what the agent says of the device in a slot.
func (w *world) gpu(ctx context.Context, id string) (admin.GPU, error) {
	list, err := w.gpus(ctx)
	if err != nil {
		return admin.GPU{}, err
	}
	for _, g := range list.GPUs {
		if g.Address == w.address[id] {
			return g, nil
		}
	}
	return admin.GPU{}, fmt.Errorf("the agent does not list %s: %+v", id, list)
}

// becomes waits until the agent has a device in a state.
func (w *world) becomes(ctx context.Context, id, state string) error {
	ctx, cancel := context.WithTimeout(ctx, slow)
	defer cancel()
	last := "not listed"
	err := until(ctx, "", func() (bool, error) {
		g, err := w.gpu(ctx, id)
		if err != nil {
			last = err.Error()
			return false, nil //nolint:nilerr // an agent that is not up yet
		}
		last = fmt.Sprintf("%s, step %q, quarantine %+v", g.State, g.Step, g.Quarantine)
		return g.State == state && g.Step == "", nil
	})
	if err != nil {
		return fmt.Errorf("%s is not %s but %s: %w", id, state, last, err)
	}
	return nil
}

// settled waits until the agent has nothing to do on any device: an agent that
// has just started verifies them all, and would die of a fault that is meant
// for one order.
func (w *world) settled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, slow)
	defer cancel()
	return until(ctx, "the agent rests", func() (bool, error) {
		list, err := w.gpus(ctx)
		if err != nil {
			return false, nil //nolint:nilerr // an agent that is not up yet
		}
		for _, g := range list.GPUs {
			if g.Step != "" || g.State != "clean" && g.State != "unmanaged" {
				return false, nil
			}
		}
		return true, nil
	})
}

// finds waits until the agent has a finding about a device.
func (w *world) finds(ctx context.Context, id, code string) error {
	ctx, cancel := context.WithTimeout(ctx, slow)
	defer cancel()
	var last any
	err := until(ctx, "", func() (bool, error) {
		g, err := w.gpu(ctx, id)
		last = g.Finding
		return err == nil && g.Finding != nil && g.Finding.Code == code, nil
	})
	if err != nil {
		return fmt.Errorf("%s: the agent finds %+v, want %s: %w", id, last, code, err)
	}
	return nil
}

// inside looks into the device itself.
func (w *world) inside(ctx context.Context, id string) (gputest.State, error) {
	return gpu.Command(ctx, w.control(id), gpu.Order{Do: "state"})
}

// broken breaks a device, and repairs it with the zero value.
func (w *world) broken(ctx context.Context, id string, faults gputest.Faults) error {
	_, err := gpu.Command(ctx, w.control(id), gpu.Order{Do: "break", Faults: &faults})
	return err
}

// refused runs a script that must fail with a refusal of this code.
func (w *world) refused(ctx context.Context, code, script string) error {
	out, err := w.sh(ctx, slow, script)
	if err == nil {
		return fmt.Errorf("%s: succeeded, want %s: %s", script, code, out)
	}
	if !strings.Contains(err.Error(), code) {
		return fmt.Errorf("want %s: %w", code, err)
	}
	return nil
}
