package main

import (
	"fmt"
	"io"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/output"
	"github.com/confidential-node/agent/nodeagent/platform"
)

// versionInfo is the document of `nodeagent version`.
type versionInfo struct {
	output.Header
	// Version is the module version, "(devel)" for a build from a checkout.
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Go       string `json:"go"`
	// Emulated says whether this build can emulate a TEE. Shipped builds
	// cannot.
	Emulated bool `json:"emulated"`
	// Protocol is the control protocol's integer.
	Protocol uint32   `json:"protocol"`
	Features []string `json:"features"`
}

func buildVersion() versionInfo {
	v := versionInfo{
		Header: output.NewHeader("Version"), Version: "(unknown)", Emulated: platform.EmulatedBuild,
		Protocol: api.CapabilityVersion, Features: api.Features(),
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		v.Version, v.Go = info.Main.Version, info.GoVersion
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				v.Revision = s.Value
			}
		}
	}
	return v
}

func newVersionCommand() *cobra.Command {
	var format output.Format
	cmd := &cobra.Command{
		Use: "version", Short: "Print what this build is and can do", Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := buildVersion()
			return format.Print(cmd.OutOrStdout(), v, func(w io.Writer) error {
				note := ""
				if v.Emulated {
					note = "  EMULATED BUILD: can emulate a TEE, never for tenants' secrets"
				}
				_, err := fmt.Fprintf(w, "nodeagent %s %s %s protocol %d%s\n", v.Version, v.Revision, v.Go, v.Protocol, note)
				return err
			})
		},
	}
	cmd.Flags().VarP(&format, "output", "o", "how to print")
	return cmd
}
