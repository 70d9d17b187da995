package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/config"
)

func newClockCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "clock", Short: "Tell the running agent that the host's clock is right", Args: exactArgs(),
		Long: `The agent launches nothing while the host's clock cannot be believed: it jumped by more
than two minutes, or is before the time the agent last saw. Guests go on running. The doubt
ends by itself when the clock agrees again or a time service keeps it synchronised; on a
host without one, "nodeagent clock accept" ends it. nodeagent status shows the doubt.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newClockAccept())
	return cmd
}

func newClockAccept() *cobra.Command {
	var socket string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "accept", Short: "Believe the host's clock as it is now", Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			if err := admin.AcceptClock(ctx, socket); err != nil {
				return err
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "the host's clock is believed")
			return err
		},
	}
	cmd.Flags().StringVar(&socket, "socket", filepath.Join(config.Default().RunDir, admin.SocketName), "the agent's admin socket")
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Second, "how long to wait for the answer")
	return cmd
}
