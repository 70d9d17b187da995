package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/vfio"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if os.Getpid() == 1 {
		if err := guestInit(os.Stdout); err != nil {
			fmt.Fprintln(os.Stdout, "guest:", err)
		}
		return
	}
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "hostvm:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "hostvm", Short: "A provider's host in a virtual machine", SilenceUsage: true, SilenceErrors: true}
	cmd.AddCommand(newRun(),
		&cobra.Command{Use: "inside", Short: "Carry out orders, in the machine", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return inside(cmd.Context())
		}},
		&cobra.Command{Use: "mode vfio|sysfs ADDRESS MODE|query", Short: "Set or read a device's CC mode", Args: cobra.ExactArgs(3), RunE: func(cmd *cobra.Command, args []string) error {
			return setMode(cmd.Context(), args[0], args[1], args[2], cmd.OutOrStdout())
		}},
		&cobra.Command{Use: "hold ADDRESS", Short: "Keep a device open through VFIO", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			return hold(cmd.Context(), args[0], cmd.OutOrStdout())
		}},
		&cobra.Command{Use: "write FILE", Hidden: true, Args: cobra.ExactArgs(1), RunE: func(_ *cobra.Command, args []string) error {
			if code := vfio.WriteMain(args[0]); code != 0 {
				os.Exit(code)
			}
			return nil
		}},
	)
	return cmd
}

func newRun() *cobra.Command {
	var image, programs, match string
	cmd := &cobra.Command{
		Use: "run", Short: "Boot the host, go through the steps, print the table", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			pattern, err := regexp.Compile(match)
			if err != nil {
				return fmt.Errorf("--match: %w", err)
			}
			dir, err := os.MkdirTemp("", "hostvm-")
			if err != nil {
				return err
			}
			failed := run(cmd.Context(), image, programs, dir, pattern, cmd.OutOrStdout())
			if failed != nil {
				return fmt.Errorf("%w; logs are in %s", failed, dir)
			}
			return errors.Join(failed, os.RemoveAll(dir))
		},
	}
	cmd.Flags().StringVar(&image, "image", "", "folder that image.sh made")
	cmd.Flags().StringVar(&programs, "programs", "", "folder with nodeagent, controlplane, fakegpu, hostvm and nodeagent.service")
	cmd.Flags().StringVar(&match, "match", "", "only the steps whose name matches; those that prepare the host run always")
	for _, name := range []string{"image", "programs"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // the name is the line above's
		}
	}
	return cmd
}
