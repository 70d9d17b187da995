package main

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// rowOf is a quantity of every guest, in ms.
func rowOf(name string, lives []life, of func(life) time.Duration) row {
	rounds := make([]float64, 0, len(lives))
	for _, g := range lives {
		rounds = append(rounds, milliseconds(of(g)))
	}
	return newRow(name, rounds...)
}

func launchTable(lives []life, virsh plain) table {
	const create = "virsh create"
	return table{
		Title: "Launch: from a command to a running domain", Unit: "ms", Against: []string{create},
		About: `The agent's whole way to a running domain (verify and record the command, fetch, copy and measure, tap and rules, metadata,
			start) against virsh create of the very same XML, files and tap name on the same host. Good: at most 1.3 (from acceptance).
			virsh uri is the share of virsh that only connects; the agent lets libvirt validate the XML, as --validate does.`,
		Rows: []row{
			newRow("virsh uri", virsh.connect...),
			newRow(create, virsh.create...),
			newRow("virsh create --validate", virsh.validated...),
			rowOf("agent, accepted to running", lives, func(g life) time.Duration { return g.started.Sub(g.accepted) }),
			rowOf("agent, published to running", lives, func(g life) time.Duration { return g.started.Sub(g.published) }),
		},
	}
}

// stepTable says where the agent spends a launch.
func stepTable(lives []life) table {
	const whole = "accepted to running"
	t := table{
		Title: "Launch: the agent's steps", Unit: "ms", Against: []string{whole},
		About: `The same launches by the agent's own step times (whole ms). Records are what lies between the steps: each is written and
			fsynced before its step begins and after it ends. Everything but the step "domain" should be the smaller part.`,
		Rows: []row{rowOf(whole, lives, func(g life) time.Duration { return g.started.Sub(g.accepted) })},
	}
	step := func(g life, name string) time.Duration { return time.Duration(g.stepMS[name]) * time.Millisecond }
	// Beside steps there are a guest's phases; undoing has not begun.
	names := slices.DeleteFunc(slices.Sorted(maps.Keys(lives[0].stepMS)), func(name string) bool { return strings.HasPrefix(name, "guest-") })
	for _, name := range names {
		t.Rows = append(t.Rows, rowOf("step "+name, lives, func(g life) time.Duration { return step(g, name) }))
	}
	slices.SortStableFunc(t.Rows[1:], func(a, b row) int { return cmp.Compare(b.Median, a.Median) })
	t.Rows = append(t.Rows, rowOf("records", lives, func(g life) time.Duration {
		rest := g.started.Sub(g.accepted)
		for _, name := range names {
			rest -= step(g, name)
		}
		return rest
	}))
	return t
}

// phaseTable splits the way to the first plaintext byte, and goes on to the
// running workload.
func phaseTable(lives []life) table {
	const whole = "command to first plaintext byte"
	at := func(g life, p contract.GuestPhase) time.Time { return g.phases[p] }
	return table{
		Title: "Boot, evidence, first plaintext byte", Unit: "ms", Against: []string{whole},
		About: `The way of a guest (2 vCPUs, 1 GiB, one small input) by the host's clock; the guest itself says how long its init has run. The ratio is the share of the way from the command
			on the wire to the opened inputs. Software emulation makes what runs in the guest many times slower than silicon would: the
			shares say where the time goes here, and a good change makes one of them smaller.`,
		Rows: []row{
			rowOf("command published to accepted", lives, func(g life) time.Duration { return g.accepted.Sub(g.published) }),
			rowOf("accepted to domain running", lives, func(g life) time.Duration { return g.started.Sub(g.accepted) }),
			rowOf("domain running to init: firmware, kernel", lives, func(g life) time.Duration {
				return at(g, contract.PhaseBooted).Sub(g.started) - g.uptime
			}),
			rowOf("init to booted: manifest, report, keys", lives, func(g life) time.Duration { return g.uptime }),
			rowOf("booted to attested, keys released", lives, func(g life) time.Duration {
				return at(g, contract.PhaseAttested).Sub(at(g, contract.PhaseBooted))
			}),
			rowOf("attested to first plaintext byte", lives, func(g life) time.Duration {
				return at(g, contract.PhaseInputs).Sub(at(g, contract.PhaseAttested))
			}),
			rowOf(whole, lives, func(g life) time.Duration { return at(g, contract.PhaseInputs).Sub(g.published) }),
			rowOf("then: image pulled and unpacked", lives, func(g life) time.Duration {
				return at(g, contract.PhaseImage).Sub(at(g, contract.PhaseInputs))
			}),
			rowOf("then: workload running", lives, func(g life) time.Duration {
				return at(g, contract.PhaseRunning).Sub(at(g, contract.PhaseImage))
			}),
		},
	}
}
