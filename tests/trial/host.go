package trial

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/tests/rig"
)

// Where things are on a host.
const (
	pspSocket = "/run/psp.sock"
	// AgentConfig is the agent's configuration.
	AgentConfig = "/etc/nodeagent/agent.toml"
	// EndorsementsDir is where the agent finds its certificates.
	EndorsementsDir = "/var/lib/nodeagent/endorsements"
	// GuestsDir, CacheDir and StateDir are the agent's.
	GuestsDir = "/run/nodeagent/guests"
	CacheDir  = "/var/cache/nodeagent"
	StateDir  = "/var/lib/nodeagent"
)

// HostOptions are what differs between hosts. The zero value is an honest one.
type HostOptions struct {
	// PSP are further flags of the emulated security processor.
	PSP []string
	// Policy are further lines of the agent's [policy].
	Policy string
	// Hook is a shell script that libvirt runs before a guest's QEMU starts,
	// with the guest's folder as $1: what a hostile host does between the
	// agent's check and the boot.
	Hook string
}

// Host is one provider host with its agent.
type Host struct {
	*rig.Host
	// ID is the host's name to the control plane.
	ID string
	p  *Platform
	o  HostOptions

	psp, agent *Process
	log        *os.File
}

// AddHost starts the next host: libvirtd, security processor, agent. It
// returns when the control plane has opened an epoch for it. Not safe for
// concurrent use.
func (p *Platform) AddHost(ctx context.Context, o HostOptions) (h *Host, err error) {
	n := len(p.hosts)
	h = &Host{ID: fmt.Sprintf("provider%d", n), p: p, o: o}
	if h.log, err = os.Create(filepath.Join(p.Logs, h.ID+"-libvirt.log")); err != nil {
		return nil, fmt.Errorf("starting host: %w", err)
	}
	if h.Host, err = rig.NewHost(ctx, n, h.log); err != nil {
		return nil, errors.Join(err, h.log.Close())
	}
	p.hosts = append(p.hosts, h)
	if err := h.install(ctx); err != nil {
		return nil, fmt.Errorf("installing host %s: %w", h.ID, err)
	}
	if err := h.StartPSP(ctx, o.PSP...); err != nil {
		return nil, err
	}
	return h, h.StartAgent(ctx)
}

// install puts the agent's configuration on the host.
func (h *Host) install(ctx context.Context) error {
	creds, issuer, _, err := h.p.Control.EnrolHost(ctx, h.ID)
	if err != nil {
		return err
	}
	for _, dir := range []string{filepath.Dir(AgentConfig), EndorsementsDir} {
		if err := os.MkdirAll(h.Path(dir), 0o755); err != nil { //nolint:gosec // as a package makes them
			return err
		}
	}
	var text strings.Builder
	err = template.Must(template.New("").Parse(configTemplate)).Execute(&text, map[string]string{
		"ID": h.ID, "Images": h.p.Programs.Images, "Endorsements": EndorsementsDir, "Server": "tls://" + rig.ControlName + ":" + natsPort,
		"Issuer": base64.StdEncoding.EncodeToString(issuer), "Policy": h.o.Policy, "PSP": pspSocket,
	})
	if err != nil {
		return err
	}
	if err := errors.Join(
		os.WriteFile(h.Path(AgentConfig), []byte(text.String()), 0o600),
		os.WriteFile(h.Path("/etc/nodeagent/ca.pem"), h.p.CA.PEM, 0o600),
		os.WriteFile(h.Path("/etc/nodeagent/host.creds"), creds, 0o600),
	); err != nil {
		return err
	}
	if h.o.Hook == "" {
		return nil
	}
	return h.installHook(ctx)
}

// installHook starts libvirtd anew, which looks for hooks only then.
func (h *Host) installHook(ctx context.Context) error {
	const script = "#!/bin/sh\n[ \"$2\" = prepare ] || exit 0\ncat >/dev/null\nset -- " + GuestsDir + "/${1#nodeagent-}\n"
	if err := os.MkdirAll(h.Path("/etc/libvirt/hooks"), 0o755); err != nil { //nolint:gosec // as libvirt's package makes it
		return err
	}
	if err := os.WriteFile(h.Path("/etc/libvirt/hooks/qemu"), []byte(script+h.o.Hook+"\n"), 0o755); err != nil { //nolint:gosec // a program
		return err
	}
	return errors.Join(h.KillLibvirtd(), h.StartLibvirtd(ctx))
}

const configTemplate = `host_id = "{{.ID}}"
tee = "emulated"
image_dirs = ["{{.Images}}"]
endorsements_dir = "{{.Endorsements}}"

[control]
servers = ["{{.Server}}"]
ca_file = "/etc/nodeagent/ca.pem"
creds_file = "/etc/nodeagent/host.creds"
issuer_keys = ["{{.Issuer}}"]
heartbeat = "2s"
dead_man = "20s"

[policy]
reserve_memory_mib = 1024
{{.Policy}}

[network.tls]
listen = ":443"
domain = "guests.example"

[blob]
ca_file = "/etc/nodeagent/ca.pem"

[emulated]
psp_socket = "{{.PSP}}"
`

// StartPSP starts the process that plays the security processor.
func (h *Host) StartPSP(ctx context.Context, flags ...string) (err error) {
	if h.psp != nil {
		h.psp.Kill()
	}
	_ = os.Remove(h.Path(pspSocket)) // left by one before
	cmd := h.Command(context.WithoutCancel(ctx), h.p.Programs.PSP, append([]string{"--socket", pspSocket, "--endorsements", EndorsementsDir}, flags...)...)
	if h.psp, err = start(h.ID+"-psp", h.p.Logs, cmd); err != nil {
		return err
	}
	return h.psp.up(ctx, func(context.Context) bool {
		_, err := os.Stat(h.Path(pspSocket))
		_, rootErr := os.Stat(h.RootFile())
		return errors.Join(err, rootErr) == nil
	})
}

// RootFile is the EMULATED root's certificate.
func (h *Host) RootFile() string { return h.Path(filepath.Join(EndorsementsDir, "root.pem")) }

// StartAgent starts the agent and returns when it takes commands.
func (h *Host) StartAgent(ctx context.Context) error {
	return h.StartAgentWith(ctx, nil, "--log-level", "debug")
}

// StartAgentWith is StartAgent with more environment and with flags.
func (h *Host) StartAgentWith(ctx context.Context, env []string, flags ...string) error {
	return h.StartAgentUnder(ctx, nil, env, flags...)
}

// StartAgentUnder is StartAgentWith by another program, which runs the agent
// as its arguments say.
func (h *Host) StartAgentUnder(ctx context.Context, under, env []string, flags ...string) error {
	if err := h.BeginAgentUnder(ctx, under, env, flags...); err != nil {
		return err
	}
	return h.agent.up(ctx, func(ctx context.Context) bool {
		status, err := h.Status(ctx)
		return err == nil && status.Control.Connected && status.IssuerEpoch > 0 && h.known(ctx)
	})
}

// BeginAgentUnder is StartAgentUnder for an agent that need not come up.
func (h *Host) BeginAgentUnder(ctx context.Context, under, env []string, flags ...string) (err error) {
	argv := slices.Concat(under, []string{h.p.Programs.Agent, "run", "--config", AgentConfig}, flags)
	cmd := h.Command(context.WithoutCancel(ctx), argv[0], argv[1:]...)
	cmd.Env = append(cmd.Env, env...)
	h.agent, err = start(h.ID+"-agent", h.p.Logs, cmd)
	return err
}

// known reports whether the control plane sends this host commands.
func (h *Host) known(ctx context.Context) bool {
	nodes, err := h.p.API.Nodes(ctx)
	if err != nil {
		return false
	}
	for _, n := range nodes {
		if n.ID == h.ID {
			return n.NodeEpoch > 0 && n.NodeEpoch == n.Epoch && len(n.Capability) > 0
		}
	}
	return false
}

// Agent is the running agent.
func (h *Host) Agent() *Process { return h.agent }

// AgentCommand runs a verb of the agent's program on the host.
func (h *Host) AgentCommand(ctx context.Context, args ...string) *exec.Cmd {
	return h.Command(ctx, h.p.Programs.Agent, args...)
}

// Status asks the agent.
func (h *Host) Status(ctx context.Context) (admin.Status, error) {
	var s admin.Status
	out, err := h.AgentCommand(ctx, "status", "-o", "json").Output()
	if err != nil {
		return s, fmt.Errorf("asking the agent: %w", err)
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return s, fmt.Errorf("reading the agent's status: %w", err)
	}
	return s, nil
}

// Leftovers lists what of guests is on the host: nothing, once they ended.
func (h *Host) Leftovers(ctx context.Context) ([]string, error) {
	const script = `set -e
virsh -q -c ` + rig.LibvirtURI + ` list --all --name | sed '/^$/d; s/^/domain /'
ip -o link | sed -n 's/^[0-9]*: \(n[atv][0-9a-f]\{8\}\).*/link \1/p'
ls -A ` + GuestsDir + ` 2>/dev/null | sed 's/^/boot copies /'
find ` + CacheDir + ` -type f 2>/dev/null | sed 's/^/cached /'
ls -A ` + StateDir + `/spool 2>/dev/null | sed 's/^/spool /'
nft list ruleset | grep -o 'na[0-9a-f]\{8\}' | sort -u | sed 's/^/rules for /'
[ "$(cat /proc/sys/net/ipv4/ip_forward)" = 0 ] || echo forwarding`
	out, err := h.Output(ctx, "bash", "-c", script)
	if err != nil {
		return nil, fmt.Errorf("looking for leftovers: %w", err)
	}
	var left []string
	for line := range strings.SplitSeq(strings.TrimSpace(out), "\n") {
		if line != "" {
			left = append(left, line)
		}
	}
	names, err := h.Processes()
	for _, name := range names {
		if strings.HasPrefix(name, "qemu-system") {
			left = append(left, "process "+name)
		}
	}
	return left, err
}

// WaitClean waits until no guest has left anything but cached ciphertext.
func (h *Host) WaitClean(ctx context.Context) error {
	var left []string
	err := Await(ctx, "the host to be clean", func() (bool, error) {
		all, err := h.Leftovers(ctx)
		left = left[:0]
		for _, l := range all {
			if !strings.HasPrefix(l, "cached ") {
				left = append(left, l)
			}
		}
		return len(left) == 0, err
	})
	if err != nil {
		return fmt.Errorf("%w; left over: %v", err, left)
	}
	return nil
}

func (h *Host) close() error {
	var errs []error
	if h.agent != nil && h.agent.Running() {
		errs = append(errs, h.agent.Stop())
	}
	if h.psp != nil {
		h.psp.Kill()
	}
	return errors.Join(append(errs, h.Close(), h.log.Close())...)
}
