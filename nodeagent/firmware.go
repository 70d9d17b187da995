package main

import (
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/catalogue"
	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/output"
)

// firmwareFacts is what there is to say of one image.
type firmwareFacts struct {
	Path      string            `json:"path"`
	Size      int64             `json:"size"`
	SHA256    string            `json:"sha256"`
	Build     string            `json:"build"`
	Usable    bool              `json:"usable"`
	Refusal   *contract.Refusal `json:"refusal,omitempty"`
	Base      string            `json:"base,omitempty"`
	ResetEIP  string            `json:"reset_eip,omitempty"`
	HashTable *memoryArea       `json:"hash_table,omitempty"`
	Sections  []firmwareSection `json:"sections,omitempty"`
}

type memoryArea struct {
	Base string `json:"base"`
	Size string `json:"size"`
}

type firmwareSection struct {
	memoryArea
	Type string `json:"type"`
}

// firmwareDocument is the document of `nodeagent firmware inspect`.
type firmwareDocument struct {
	output.Header
	firmwareFacts
}

// firmwareList is the document of `nodeagent firmware list`.
type firmwareList struct {
	output.Header
	Firmware []firmwareFacts `json:"firmware"`
}

func newFirmwareCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "firmware", Short: "Look at the firmware images of this host",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newFirmwareListCommand(), newFirmwareInspectCommand())
	return cmd
}

func newFirmwareListCommand() *cobra.Command {
	var format output.Format
	cmd := &cobra.Command{
		Use:   "list [DIR...]",
		Short: "List firmware images and whether each can boot guests",
		Long: `List the firmware images (*.fd) in the given folders and right below them; without
any, in those of the distribution's packages and of the guest images.`,
		Example: "  nodeagent firmware list\n  nodeagent firmware list ./unpacked/usr/share/ovmf -o json",
		RunE: func(cmd *cobra.Command, dirs []string) error {
			if len(dirs) == 0 {
				dirs = append(catalogue.Dirs("/"), config.Default().ImageDirs...)
			}
			entries, err := catalogue.List(dirs)
			if err != nil {
				return err
			}
			doc := firmwareList{output.NewHeader("FirmwareList"), []firmwareFacts{}}
			for _, e := range entries {
				doc.Firmware = append(doc.Firmware, facts(e))
			}
			return format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error {
				if len(doc.Firmware) == 0 {
					_, err := fmt.Fprintf(w, "no firmware image in %s; name other folders, or install Debian's package ovmf-amdsev\n", strings.Join(dirs, ", "))
					return err
				}
				t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(t, "USABLE\tBUILD\tSHA-256\tPATH")
				for _, f := range doc.Firmware {
					fmt.Fprintf(t, "%s\t%s\t%.16s…\t%s\n", yesNo(f.Usable), f.Build, f.SHA256, f.Path)
				}
				return t.Flush()
			})
		},
	}
	cmd.Flags().VarP(&format, "output", "o", "how to print")
	return cmd
}

func newFirmwareInspectCommand() *cobra.Command {
	var format output.Format
	cmd := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Say what a firmware image is and whether it can boot guests",
		Long: `Say what a firmware image is: its digest, its build, where processors start, and what
of guest memory is part of the launch digest, in order. Exit code 5 means that it
cannot boot guests.`,
		Example: "  nodeagent firmware inspect /usr/share/ovmf/OVMF.amdsev.fd",
		Args:    exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := catalogue.Inspect(args[0])
			if err != nil {
				return err
			}
			doc := firmwareDocument{output.NewHeader("Firmware"), facts(e)}
			err = format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error { return printFirmware(w, doc.firmwareFacts) })
			if err == nil && !doc.Usable {
				return &exitError{code: exitPrecondition}
			}
			return err
		},
	}
	cmd.Flags().VarP(&format, "output", "o", "how to print")
	return cmd
}

func facts(e catalogue.Entry) firmwareFacts {
	f := firmwareFacts{
		Path: e.Path, Size: e.Size, SHA256: hex.EncodeToString(e.SHA256[:]), Build: string(e.Build), Usable: e.Refusal == nil, Refusal: e.Refusal,
	}
	if e.Firmware == nil {
		return f
	}
	area := func(base, size uint32) memoryArea {
		return memoryArea{fmt.Sprintf("%#x", base), fmt.Sprintf("%#x", size)}
	}
	f.Base, f.ResetEIP = fmt.Sprintf("%#x", e.Firmware.GPA()), fmt.Sprintf("%#x", e.Firmware.ResetEIP)
	if t := e.Firmware.HashTable; t != nil {
		a := area(t.Base, t.Size)
		f.HashTable = &a
	}
	for _, s := range e.Firmware.Sections {
		f.Sections = append(f.Sections, firmwareSection{area(s.GPA, s.Size), s.Type.String()})
	}
	return f
}

func printFirmware(w io.Writer, f firmwareFacts) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "path\t%s\nsize\t%d\nsha-256\t%s\nbuild\t%s\nusable\t%s\n", f.Path, f.Size, f.SHA256, f.Build, yesNo(f.Usable))
	if f.Refusal != nil {
		fmt.Fprintf(t, "why\t%s\nwhat to do\t%s\n", f.Refusal.Message, f.Refusal.Remedy)
	}
	if f.Base != "" {
		fmt.Fprintf(t, "base\t%s\nreset EIP\t%s\n", f.Base, f.ResetEIP)
	}
	if f.HashTable != nil {
		fmt.Fprintf(t, "hash table\t%s+%s\n", f.HashTable.Base, f.HashTable.Size)
	}
	for i, s := range f.Sections {
		fmt.Fprintf(t, "section %d\t%s+%s\t%s\n", i, s.Base, s.Size, s.Type)
	}
	return t.Flush()
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
