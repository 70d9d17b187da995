package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/nodeagent/platform"
	"github.com/confidential-node/agent/vm/libvirt"
)

// noControlLink is what status says until the link is wired in.
const noControlLink = "this build has no control link: no command can reach it, and it starts no guest"

func newRunCommand() *cobra.Command {
	var configFile, level, logFormat string
	cmd := &cobra.Command{
		Use: "run", Short: "Run the agent", Args: exactArgs(),
		Long: `Run the agent in the foreground. It stops gracefully on SIGTERM or SIGINT; running
guests are never touched by its end.

In this version the agent watches libvirt and answers "nodeagent status"; the control
link and the guests' life cycle are not part of it yet.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := newLogger(cmd.ErrOrStderr(), level, logFormat)
			if err != nil {
				return err
			}
			cfg, err := config.Load(configFile)
			if err != nil {
				return err
			}
			return runAgent(cmd.Context(), cfg, logger)
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

// runAgent is the one wiring list: everything the daemon is made of is built
// and started here, and ends when ctx does.
func runAgent(ctx context.Context, cfg config.Config, logger hclog.Logger) error {
	if _, err := platform.Select(cfg); err != nil {
		return err
	}
	// QEMU runs as another user and must pass through to the boot copies.
	if err := os.MkdirAll(cfg.RunDir, 0o711); err != nil { //nolint:gosec // see above
		return fmt.Errorf("creating run directory: %w", err)
	}
	started := time.Now()
	driver := libvirt.New(cfg.Libvirt.URI, logger)
	socket := admin.New(filepath.Join(cfg.RunDir, admin.SocketName), func(ctx context.Context) (admin.Status, error) {
		return status(ctx, cfg, driver, started), nil
	})
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.Go(func() error { return driver.Run(ctx) })
	tasks.Go(func() error { return socket.Run(ctx) })
	logger.Info("started", "host_id", cfg.HostID, "tee", cfg.TEE, "emulated_build", platform.EmulatedBuild)
	logger.Warn(noControlLink)
	_, readyErr := daemon.SdNotify(false, daemon.SdNotifyReady)
	err := tasks.Wait()
	_, stopErr := daemon.SdNotify(false, daemon.SdNotifyStopping)
	logger.Info("stopped")
	return errors.Join(err, readyErr, stopErr)
}

// status is a snapshot. A hypervisor that does not answer is a finding, not
// an error: the rest is still worth seeing.
func status(ctx context.Context, cfg config.Config, driver *libvirt.Driver, started time.Time) admin.Status {
	version := buildVersion()
	s := admin.Status{
		Header: output.NewHeader("Status"), HostID: cfg.HostID, Version: version.Version, Emulated: version.Emulated, TEE: cfg.TEE,
		StartedAt: started, Guests: []admin.Guest{}, Warnings: []string{noControlLink},
	}
	lib, qemu, err := driver.Versions(ctx)
	if err != nil {
		s.Hypervisor = "not reachable"
		s.Warnings = append(s.Warnings, fmt.Sprintf("libvirt at %s: %v; check that libvirtd (or virtqemud) runs", cfg.Libvirt.URI, err))
		return s
	}
	s.Hypervisor = fmt.Sprintf("libvirt %s, hypervisor %s", lib, qemu)
	found, err := driver.List(ctx)
	if err != nil {
		s.Warnings = append(s.Warnings, err.Error())
	}
	for _, g := range found {
		s.Guests = append(s.Guests, admin.Guest{ID: g.GuestID, Generation: g.Generation, Status: string(g.State)})
	}
	return s
}
