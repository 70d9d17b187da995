package main

import (
	"embed"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"
)

//go:embed schemas/*.json
var schemas embed.FS

func schemaKinds() []string {
	names, err := fs.Glob(schemas, "schemas/*.json")
	if err != nil {
		return nil
	}
	for i, n := range names {
		names[i] = strings.TrimSuffix(strings.TrimPrefix(n, "schemas/"), ".json")
	}
	return names
}

func newSchemaCommand() *cobra.Command {
	return &cobra.Command{
		Use: "schema [KIND]", Short: "Print the JSON Schema of a verb's -o json document", ValidArgs: schemaKinds(),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageError("schema takes one kind of %s", strings.Join(schemaKinds(), ", "))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), strings.Join(schemaKinds(), "\n"))
				return err
			}
			text, err := schemas.ReadFile("schemas/" + args[0] + ".json")
			if err != nil {
				return &exitError{exitNotFound, fmt.Errorf("no document of kind %q; there are %s", args[0], strings.Join(schemaKinds(), ", "))}
			}
			_, err = cmd.OutOrStdout().Write(text)
			return err
		},
	}
}
