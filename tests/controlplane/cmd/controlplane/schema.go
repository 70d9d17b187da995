package main

import (
	"embed"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

//go:embed schemas/*.json
var schemas embed.FS

func (a *app) schema() *cobra.Command {
	return &cobra.Command{
		Use: "schema [KIND]", Short: "Print the JSON Schema of a verb's -o json document",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage("schema takes one kind")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			names, err := fs.Glob(schemas, "schemas/*.json")
			if err != nil {
				return err
			}
			for i, name := range names {
				names[i] = strings.TrimSuffix(strings.TrimPrefix(name, "schemas/"), ".json")
			}
			if len(args) == 0 {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), strings.Join(names, "\n"))
				return err
			}
			text, err := schemas.ReadFile("schemas/" + args[0] + ".json")
			if err != nil {
				return fmt.Errorf("no document of kind %q; there are %s: %w", args[0], strings.Join(names, ", "), os.ErrNotExist)
			}
			_, err = cmd.OutOrStdout().Write(text)
			return err
		},
	}
}
