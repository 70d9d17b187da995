package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/confidential-node/agent/tests/keybroker"
	"github.com/confidential-node/agent/tests/keybroker/hsm"
)

// tokenFlags are how the broker and the commands below find the token.
func tokenFlags(f *pflag.FlagSet, cfg *hsm.Config) {
	f.StringVar(&cfg.Library, "token-library", "", "PKCS#11 `MODULE`; with it a key in the token wraps the resources")
	f.StringVar(&cfg.Label, "token", "", "the token's label")
	f.StringVar(&cfg.PINFile, "token-pin-file", "", "file with the user PIN, mode 0600")
	f.StringVar(&cfg.Key, "token-key", "keybroker", "label of the wrapping keys, which get -1, -2, ... behind it")
}

// openToken returns nil when no token is asked for.
func openToken(cfg *hsm.Config) (*hsm.Token, error) {
	if cfg.Library == "" && cfg.Label == "" && cfg.PINFile == "" {
		return nil, nil //nolint:nilnil // no token is no error
	}
	if cfg.Library == "" || cfg.Label == "" || cfg.PINFile == "" {
		return nil, usageError{errors.New("--token-library, --token and --token-pin-file go together")}
	}
	return hsm.Open(*cfg)
}

// newToken are the commands for the wrapping keys.
func newToken() *cobra.Command {
	var cfg hsm.Config
	var stateDir string
	root := &cobra.Command{
		Use:   "token",
		Short: "Make the key in a PKCS#11 token that wraps the resources, and change it",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("say init, migrate, rotate or rewrap; see keybroker token --help")}
		},
	}
	tokenFlags(root.PersistentFlags(), &cfg)
	add := func(use, short string, aliases []string, do func(*cobra.Command, *hsm.Token) error) *cobra.Command {
		cmd := &cobra.Command{Use: use, Short: short, Aliases: aliases, Args: noArgs}
		cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
			token, err := openToken(&cfg)
			if err != nil {
				return err
			}
			if token == nil {
				return usageError{errors.New("--token-library, --token and --token-pin-file are required")}
			}
			defer func() { err = errors.Join(err, token.Close()) }()
			return do(cmd, token)
		}
		root.AddCommand(cmd)
		return cmd
	}
	add("init", "Make the first wrapping key, unless there is one", nil, func(cmd *cobra.Command, token *hsm.Token) error {
		if label, err := token.Newest(); err == nil {
			cmd.Printf("wrapping key %s is there\n", label)
			return nil
		}
		return generate(cmd, token)
	})
	add("rotate", "Make the wrapping key of the next generation; rewrap brings the store to it", nil, generate)
	rewrap := add("rewrap", "Wrap all resources with the newest key, also those of a store without token", []string{"migrate"},
		func(cmd *cobra.Command, token *hsm.Token) error {
			if stateDir == "" {
				return usageError{errors.New("--state-dir is required")}
			}
			done, err := keybroker.Rewrap(stateDir, token)
			if err != nil {
				return err
			}
			cmd.Printf("%d of %d launches changed; all are wrapped by %s, and no older key is needed\n", done.Changed, done.Launches, done.Key)
			return nil
		})
	rewrap.Flags().StringVar(&stateDir, "state-dir", "", "the stopped broker's folder (required)")
	return root
}

func generate(cmd *cobra.Command, token *hsm.Token) error {
	label, err := token.Generate()
	if err != nil {
		return err
	}
	cmd.Printf("wrapping key %s made\n", label)
	return nil
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unexpected argument %q; see keybroker --help", args[0])}
	}
	return nil
}
