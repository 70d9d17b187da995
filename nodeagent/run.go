package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/sealed"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/network/relay"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/endorsements"
	"github.com/confidential-node/agent/nodeagent/failpoint"
	"github.com/confidential-node/agent/nodeagent/headroom"
	"github.com/confidential-node/agent/nodeagent/inbox"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/nodeagent/metadata"
	"github.com/confidential-node/agent/nodeagent/platform"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/nodeagent/supervise"
	"github.com/confidential-node/agent/nodeagent/watchdog"
	"github.com/confidential-node/agent/vm/libvirt"
)

// pruneEvery is how often commands that expired are forgotten.
const pruneEvery = 10 * time.Minute

func newRunCommand() *cobra.Command {
	var configFile, level, logFormat string
	cmd := &cobra.Command{
		Use: "run", Short: "Run the agent", Args: exactArgs(),
		Long: `Run the agent in the foreground. It stops gracefully on SIGTERM or SIGINT; running
guests are never touched by its end, and are found again by the next start. SIGHUP has it
say in its log whether the configuration on disk is sound; a restart applies it.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := newLogger(cmd.ErrOrStderr(), level, logFormat)
			if err != nil {
				return err
			}
			if err := leaveNoCore(); err != nil {
				return err
			}
			cfg, err := config.Load(configFile)
			if err != nil {
				return err
			}
			go answerHangups(cmd.Context(), configFile, cfg, logger)
			return headroom.Typed(runAgent(cmd.Context(), cfg, logger))
		},
	}
	cmd.Flags().StringVar(&configFile, "config", "/etc/nodeagent/agent.toml", "configuration file; drop-ins in conf.d beside it")
	cmd.Flags().StringVar(&level, "log-level", "info", "trace, debug, info, warn or error")
	cmd.Flags().StringVar(&logFormat, "log-format", "text", "text or json")
	return cmd
}

func newLogger(w io.Writer, level, format string) (hclog.Logger, error) {
	if !slices.Contains([]string{"trace", "debug", "info", "warn", "error"}, level) {
		return nil, usageError("--log-level %q is not trace, debug, info, warn or error", level)
	}
	if format != "text" && format != "json" {
		return nil, usageError("--log-format %q is not text or json", format)
	}
	return hclog.New(&hclog.LoggerOptions{
		Name: "nodeagent", Level: hclog.LevelFromString(level), Output: w, JSONFormat: format == "json",
	}), nil
}

// agent is everything the daemon is made of.
type agent struct {
	cfg     config.Config
	log     hclog.Logger
	host    hostFacts
	started clock.Instant

	watchdog     *watchdog.Watchdog
	store        *store.Store
	clock        *clock.Clock
	audit        *audit.Log
	auditing     atomic.Bool // something waits for the audit log's disk
	records      *audited    // the store, behind the audit log
	driver       *libvirt.Driver
	network      *network.Host
	relay        *relay.Router
	endorsements *endorsements.Provider
	headroom     *headroom.Gauge
	metadata     *metadata.Server
	gpus         *pool.Pool
	guests       *lifecycle.Manager
	inbox        *inbox.Inbox
	link         *control.Link
	socket       *admin.Server
}

// runAgent builds the agent, runs it until ctx ends, and leaves every guest
// running.
func runAgent(ctx context.Context, cfg config.Config, logger hclog.Logger) (err error) {
	a, err := build(cfg, logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.metadata.Shutdown(), a.close()) }()
	tasks := supervise.New(ctx, logger)
	tasks.Go("clock", a.clock.Run)
	tasks.Go("watchdog", a.watchdog.Run)
	tasks.Go("hypervisor", a.driver.Run)
	tasks.Go("network", a.network.Run)
	tasks.Go("relay", a.relayClients)
	tasks.Go("endorsements", a.endorsements.Run)
	tasks.Go("gpus", a.gpus.Run)
	tasks.Go("guests", a.guests.Run)
	tasks.Go("inbox", a.inbox.Run)
	tasks.Go("link", a.link.Run)
	tasks.Go("admin", a.socket.Run)
	tasks.Go("prune", a.prune)
	tasks.Go("capability", a.watchCapability)
	tasks.Go("headroom", a.headroom.Run)
	tasks.Go("memory", returnMemory)
	logger.Info("started", "host_id", cfg.HostID, "tee", cfg.TEE, "emulated_build", platform.EmulatedBuild)
	err = serve(ctx, tasks, tellSystemd(logger))
	logger.Info("stopped, guests go on running")
	return err
}

// serve waits for the end of the last task and tells systemd: that the agent
// is up, and that it is about to end.
func serve(ctx context.Context, tasks *supervise.Group, notify func(state string)) error {
	notify(daemon.SdNotifyReady)
	pending := context.AfterFunc(ctx, func() { notify(daemon.SdNotifyStopping) })
	err := tasks.Wait()
	if pending() {
		notify(daemon.SdNotifyStopping)
	}
	return err
}

// build is the one wiring list.
func build(cfg config.Config, logger hclog.Logger) (a *agent, err error) {
	a = &agent{cfg: cfg, log: logger}
	tee, err := platform.Select(cfg)
	if err != nil {
		return nil, err
	}
	issuers, err := cfg.Issuers()
	if err != nil {
		return nil, err
	}
	if a.host, err = readHost("/", cfg); err != nil {
		return nil, err
	}
	if err := makeDirs(cfg); err != nil {
		return nil, err
	}
	transport, err := control.NewNATS(control.NATSConfig{
		Servers: cfg.Control.Servers, CAFile: cfg.Control.CAFile, CredsFile: cfg.Control.CredsFile, HostID: cfg.HostID, Clock: a.wall,
	})
	if err != nil {
		return nil, err
	}
	if err := transport.Check(); err != nil {
		return nil, err
	}
	cache, spools, err := openBlobs(cfg, a.wall, logger)
	if err != nil {
		return nil, err
	}
	networkConfig := guestNetwork(cfg)
	if a.network, err = network.New(networkConfig, logger); err != nil {
		return nil, err
	}
	a.relay = newRelay(cfg, logger)
	if err := a.open(); err != nil {
		return nil, err
	}
	if a.endorsements, err = openEndorsements(cfg, a.clock.Wall, logger); err != nil {
		return nil, errors.Join(err, a.close())
	}
	a.headroom = headroom.New("/", writtenFolders(cfg), logger)
	a.driver = libvirt.New(cfg.Libvirt.URI, logger)
	if err := a.openGPUs(pciHost("/")); err != nil {
		return nil, errors.Join(err, a.close())
	}
	a.metadata = metadata.New(logger, a.clock.Wall)
	a.guests, err = lifecycle.New(lifecycle.Deps{
		GPUs: a.passthrough(), Records: a.records, Hypervisor: a.driver, Network: a.network, Relay: a.relay, Metadata: a.metadata,
		Blobs: blobs{cache}, Spools: spoolsOf{spools}, Images: a.images, Measure: lifecycle.Predict, Headroom: a.headroom.Left, TEE: tee, GPURule: gpu.Rule,
		Endorsements: a.endorsements.Endorsements, Logger: logger, Hook: failpoint.FromEnvironment().Hit,
		Clock: a.clock.Now, Doubt: a.clock.Doubt, Turned: a.watchdog.Loop("guests", guestsPatience),
	}, lifecycle.Config{
		HostID: cfg.HostID, BootID: a.started.BootID, GuestsDir: guestsDir(cfg), Policy: cfg.Policy, Capacity: a.host.capacity,
		Network: networkConfig, SharedTLS: cfg.Network.TLS, TapUser: a.host.qemuUID, TapGroup: a.host.qemuGID, DNS: dnsOf(cfg), Emulated: cfg.TEE == config.TEEEmulated,
	})
	if err != nil {
		return nil, errors.Join(err, a.close())
	}
	executor := gate{Executor: a.guests, closed: a.closed, known: func(id string) bool { _, err := a.store.Guest(id); return err == nil }}
	a.inbox, err = inbox.New(inbox.Deps{
		Journal: a.records, Executor: executor, Ready: a.guests.Ready(), Keys: issuers, HostID: cfg.HostID, Features: api.Features(), Logger: logger,
		Clock: a.clock.Now, Doubt: a.clock.Doubt,
	})
	if err != nil {
		return nil, errors.Join(err, a.close())
	}
	a.link, err = control.New(control.Deps{
		Transport: watched{transport, a.watchdog.Loop("link", linkPatience(cfg))}, Clock: a.clock.Wall, Inbox: a.inbox, Outbox: a.store, HostID: cfg.HostID, Heartbeat: a.heartbeat, Confirmed: a.confirmAudit, Capability: a.capability,
		Interval: time.Duration(cfg.Control.Heartbeat), DeadMan: time.Duration(cfg.Control.DeadMan), Logger: logger,
	})
	if err != nil {
		return nil, errors.Join(err, a.close())
	}
	a.socket = admin.New(socketFile(cfg), a.status, a.clock.Accept, gpuDoor{a.gpus})
	return a, nil
}

// wall is the agent's time, for whoever is made before the clock.
func (a *agent) wall() time.Time { return a.clock.Wall() }

// openBlobs opens what guests read, and what they deliver.
func openBlobs(cfg config.Config, now func() time.Time, logger hclog.Logger) (*blob.Cache, *blob.Spools, error) {
	client, err := objectStoreClient(cfg.Blob.CAFile, now)
	if err != nil {
		return nil, nil, err
	}
	cache, err := blob.Open(cfg.CacheDir, blob.Config{MaxBytes: cfg.Blob.MaxBytes, Parts: cfg.Blob.Parts, CheckHeader: sealed.CheckHeader, Clock: now}, client, logger)
	if err != nil {
		return nil, nil, err
	}
	spools, err := blob.OpenSpools(spoolDir(cfg), blob.SpoolConfig{MaxBytes: cfg.Blob.SpoolMaxBytes, Parts: cfg.Blob.Parts, CheckHeader: sealed.CheckHeader, Clock: now}, client, logger)
	return cache, spools, err
}

func guestNetwork(cfg config.Config) network.Config {
	return network.Config{
		GuestCIDR: cfg.Network.GuestCIDR, AllowPrivateEgress: cfg.Network.AllowPrivateEgress,
		PublishedPorts: network.Range(cfg.Network.PublishedPorts), MaxPortConnections: cfg.Network.MaxPortConnections,
		MaxSourceConnections: cfg.Network.MaxSourceConnections, MaxGuestPackets: cfg.Network.MaxGuestPackets, RunDir: cfg.RunDir,
	}
}

func newRelay(cfg config.Config, logger hclog.Logger) *relay.Router {
	return relay.New(relay.Config{Listen: cfg.Network.TLS.Listen, Limits: relay.Limits{
		Connections: cfg.Network.MaxRelayedConnections, Idle: time.Duration(cfg.Network.RelayIdle),
		PerGuest: cfg.Network.MaxPortConnections, PerSource: cfg.Network.MaxSourceConnections,
	}}, logger)
}

// open opens the store and the audit log before it.
func (a *agent) open() (err error) {
	if err := a.openStore(); err != nil {
		return err
	}
	if a.audit, err = openAudit(a.cfg, a.clock.Wall, a.log); err != nil {
		return errors.Join(err, a.store.Close())
	}
	a.records = newAudited(a.store, a.audit, a.clock.Wall)
	if err := a.audit.Append(audit.Entry{Kind: audit.KindStarted, Detail: buildVersion().Version + " on boot " + a.started.BootID}); err != nil {
		a.log.Error("the agent's start is not in the audit log; see that the disk of state_dir has space and can be written", "err", err)
	}
	return nil
}

// close releases what open opened.
func (a *agent) close() error { return errors.Join(a.audit.Close(), a.store.Close()) }

// relayClients lets clients in once the guests are known: until then nobody
// listens on the shared port, instead of telling them that no guest has the name.
func (a *agent) relayClients(ctx context.Context) error {
	select {
	case <-a.guests.Ready():
	case <-ctx.Done():
	}
	return a.relay.Run(ctx)
}

// prune forgets commands once nobody could replay them.
func (a *agent) prune(ctx context.Context) error {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		switch n, err := a.store.PruneCommands(a.clock.Wall().Add(-2 * inbox.DefaultSkew)); {
		case errors.Is(err, store.ErrDamaged):
			return fmt.Errorf("forgetting expired commands: %w", err)
		case err != nil:
			a.log.Warn("expired commands could not be forgotten, tried again; see that the disk of state_dir has space and can be written", "err", err)
		case n > 0:
			a.log.Debug("expired commands forgotten", "count", n)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
