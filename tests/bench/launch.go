package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/controlplane/client"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/trial"
	"github.com/confidential-node/agent/vm"
)

const (
	// guests are launched one after another; a first one more warms caches.
	guests = 7
	// creates of each guest's XML by virsh.
	creates      = 3
	guestTimeout = 2 * time.Minute
	inputFile    = "records.csv"
)

// life is when a guest came how far, by the host's clock.
type life struct {
	published, accepted, started time.Time
	phases                       map[contract.GuestPhase]time.Time
	// uptime is how long the guest's init had run when it said "booted".
	uptime time.Duration
	// stepMS is how long each step of the launch took, by the agent's word.
	stepMS map[string]uint64
}

// plain is what virsh took, in ms.
type plain struct{ create, validated, connect []float64 }

// launches compares launches by the agent with virsh create of the same XML,
// and splits the way of a guest to its first plaintext byte.
func (l *lab) launches(ctx context.Context) (err error) {
	var published stamps
	stop, err := l.p.Control.Sniff(func(subject string, _ map[string][]string, _ []byte) {
		if subject == api.CommandSubject(l.h.ID) {
			published.add(time.Now())
		}
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	if err := os.WriteFile(filepath.Join(l.t.Dir, inputFile), []byte("id,value\n1,42\n"), 0o600); err != nil {
		return err
	}
	var lives []life
	var virsh plain
	for n := range guests + 1 {
		guest, err := l.launch(ctx, fmt.Sprintf("bench%d", n), &published)
		if err != nil {
			return err
		}
		var again plain
		if err := l.relaunch(ctx, guest.id, &again); err != nil {
			return fmt.Errorf("starting guest %s by virsh: %w", guest.id, err)
		}
		if n == 0 {
			continue
		}
		lives = append(lives, guest.life)
		virsh.create = append(virsh.create, again.create...)
		virsh.validated = append(virsh.validated, again.validated...)
		virsh.connect = append(virsh.connect, again.connect...)
	}
	l.show(launchTable(lives, virsh))
	l.show(stepTable(lives))
	l.show(phaseTable(lives))
	return nil
}

// stamps are moments, in order.
type stamps struct {
	mu sync.Mutex
	at []time.Time
}

func (s *stamps) add(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = append(s.at, t)
}

// before returns the last one that is not after t.
func (s *stamps) before(t time.Time) (last time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, at := range s.at {
		if !at.After(t) {
			last = at
		}
	}
	return last
}

type launched struct {
	id string
	life
}

// launch deploys a guest with one small input and waits until its workload
// runs.
func (l *lab) launch(ctx context.Context, name string, published *stamps) (launched, error) {
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	a, err := l.t.Run(ctx, "deploy", "confidential", "--name", name, "--image", trial.Repository+":1", "--dataset", "file://"+inputFile,
		"--port", "8000", "--memory", "1024", "--command", "/workload", "--command", "serve")
	if err != nil {
		return launched{}, err
	}
	var id string
	for line := range strings.Lines(a.Stdout) {
		if key, value, _ := strings.Cut(line, " "); key == "guest" {
			id = strings.TrimSpace(value)
		}
	}
	if a.Code != 0 || id == "" {
		return launched{}, fmt.Errorf("deploying %s: %v", name, a)
	}
	g, err := l.p.API.WaitGuest(ctx, id, func(g *client.Guest) bool {
		s, err := g.GuestState()
		return err == nil && s.GetGuestPhase() == string(contract.PhaseRunning) || g.Ended()
	})
	if err != nil {
		return launched{}, err
	}
	if g.Ended() {
		return launched{}, fmt.Errorf("guest %s ended early: %s", id, g.State)
	}
	of, err := l.life(ctx, id)
	if err != nil {
		return launched{}, err
	}
	of.published = published.before(of.accepted)
	of.uptime, err = uptime(l.h.Agent().Log, id)
	return launched{id, of}, err
}

// uptime is what a guest said of its init with the phase "booted". Events do
// not tell it; the agent's log does.
func uptime(logFile, id string) (time.Duration, error) {
	text, err := os.ReadFile(logFile)
	if err != nil {
		return 0, fmt.Errorf("reading the agent's log: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		_, fields, reports := strings.Cut(line, "guest reports: guest_id="+id+" phase=booted uptime_ms=")
		if ms, err := strconv.Atoi(strings.TrimSpace(fields)); reports && err == nil {
			return time.Duration(ms) * time.Millisecond, nil
		}
	}
	return 0, fmt.Errorf("the agent's log says nothing of the boot of guest %s", id)
}

// life reads a running guest's events.
func (l *lab) life(ctx context.Context, id string) (life, error) {
	const limit = 10_000
	events, err := l.p.API.Events(ctx, 0, limit, false)
	if err != nil {
		return life{}, err
	}
	of := life{phases: map[contract.GuestPhase]time.Time{}}
	for _, raw := range events {
		e, err := raw.Decode()
		if err != nil {
			return life{}, err
		}
		s, at := e.GetGuestState(), e.GetAt().AsTime()
		switch {
		case s.GetGuestId() != id:
		case s.GetGuestPhase() != "":
			of.phases[contract.GuestPhase(s.GetGuestPhase())] = at
			of.stepMS = s.GetStepMs()
		case s.GetStatus() == api.GuestStatus_GUEST_STATUS_ACCEPTED:
			of.accepted = at
		case s.GetStatus() == api.GuestStatus_GUEST_STATUS_STARTED:
			of.started = at
		}
	}
	return of, nil
}

// relaunch ends the agent's guest and starts the same domain by virsh: the
// XML that libvirt had of it, the same files at the same places, a tap of the
// same name.
func (l *lab) relaunch(ctx context.Context, id string, took *plain) (err error) {
	const kept, xmlFile = "/run/bench", "/run/bench/domain.xml"
	domain, copies := vm.NamePrefix+id, filepath.Join(trial.GuestsDir, id)
	xml, err := l.h.Output(ctx, "virsh", "-q", "-c", rig.LibvirtURI, "dumpxml", "--inactive", domain)
	if err != nil {
		return err
	}
	tap, err := l.tap(ctx, domain)
	if err != nil {
		return err
	}
	run := func(name string, args ...string) error {
		_, err := l.h.Output(ctx, name, args...)
		return err
	}
	if err := errors.Join(
		run("mkdir", "-p", kept), os.WriteFile(l.h.Path(xmlFile), []byte(xml), 0o600), run("cp", "-a", copies, kept+"/copies"), l.end(ctx, id),
	); err != nil {
		return err
	}
	// The agent clears away what guests leave, these files too; it is held
	// still meanwhile.
	agent := l.h.Agent()
	if err := agent.Signal(syscall.SIGSTOP); err != nil {
		return fmt.Errorf("holding the agent still: %w", err)
	}
	defer func() {
		err = errors.Join(err, run("ip", "link", "del", tap), run("rm", "-r", kept, copies), agent.Signal(syscall.SIGCONT), l.h.WaitClean(ctx))
	}()
	if err := errors.Join(
		run("mv", kept+"/copies", copies), run("ip", "tuntap", "add", "dev", tap, "mode", "tap", "user", "libvirt-qemu", "vnet_hdr"), run("ip", "link", "set", tap, "up"),
	); err != nil {
		return err
	}
	for range creates {
		for _, verb := range []struct {
			args []string
			took *[]float64
		}{
			{[]string{"uri"}, &took.connect},
			{[]string{"create", xmlFile}, &took.create},
			{[]string{"create", "--validate", xmlFile}, &took.validated},
		} {
			d, err := l.virsh(ctx, verb.args...)
			if err != nil {
				return err
			}
			*verb.took = append(*verb.took, milliseconds(d))
			if verb.args[0] == "create" {
				if _, err := l.virsh(ctx, "destroy", domain); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// tap is the name of a domain's interface.
func (l *lab) tap(ctx context.Context, domain string) (string, error) {
	out, err := l.h.Output(ctx, "virsh", "-q", "-c", rig.LibvirtURI, "domiflist", domain)
	if err != nil {
		return "", err
	}
	if fields := strings.Fields(out); len(fields) > 0 {
		return fields[0], nil
	}
	return "", fmt.Errorf("domain %s has no interface", domain)
}

// end stops a guest and waits until nothing of it is left.
func (l *lab) end(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	if _, err := l.p.API.Stop(ctx, id, 0); err != nil {
		return err
	}
	if _, err := l.p.API.WaitGuest(ctx, id, (*client.Guest).Ended); err != nil {
		return err
	}
	return l.h.WaitClean(ctx)
}
