package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/nodeagent/config"
)

func newRunCommand() *cobra.Command {
	var configFile, level, logFormat string
	cmd := &cobra.Command{
		Use: "run", Short: "Run the agent", Args: exactArgs(),
		Long: `Run the agent in the foreground. It stops gracefully on SIGTERM or SIGINT; running
guests are never touched by its end, and are found again by the next start.`,
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

func newLogger(w interface{ Write([]byte) (int, error) }, level, format string) (hclog.Logger, error) {
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

var _ = fmt.Sprint
var _ = os.Args
var _ = strings.Join

func runAgent(ctx context.Context, cfg config.Config, logger hclog.Logger) error {
	return nil
}
