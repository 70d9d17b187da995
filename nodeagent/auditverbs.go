package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/output"
)

// maxListed bounds one document of `nodeagent audit list`.
const maxListed = 10_000

// auditEntries is the document of `nodeagent audit list`.
type auditEntries struct {
	output.Header
	Entries []audit.Entry `json:"entries"`
	// Next is the index to go on from, absent at the end.
	Next *int64 `json:"next,omitempty"`
}

// auditReport is the document of `nodeagent audit verify` and `export`.
type auditReport struct {
	output.Header
	audit.Report
}

func newAuditCommand() *cobra.Command {
	var stateDir string
	var format output.Format
	cmd := &cobra.Command{
		Use: "audit", Short: "List, verify and export what this host was told, refused and launched",
		Long: `List, verify and export the audit log: commands taken and refused, launches and their
ends, changes of the SEV firmware. It only grows, and its signed checkpoint leaves the host in
every heartbeat. The verbs read its files, whether the agent runs or not.`,
		Args: exactArgs(), RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&stateDir, "state-dir", config.Default().StateDir, "the agent's state_dir")
	cmd.PersistentFlags().VarP(&format, "output", "o", "how to print")
	cmd.AddCommand(newAuditList(&stateDir, &format), newAuditVerify(&stateDir, &format), newAuditExport(&stateDir, &format))
	return cmd
}

func newAuditList(stateDir *string, format *output.Format) *cobra.Command {
	var from int64
	var last int
	cmd := &cobra.Command{
		Use: "list", Short: "List entries, oldest first", Args: exactArgs(),
		Long: `List entries, oldest first: the last hundred, or those from an index on. At most 10,000
are printed at a time; a document that ends early says where to go on.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if from < -1 || last < 1 || last > maxListed {
				return usageError("--from is an index and --last 1 to %d", maxListed)
			}
			doc := auditEntries{Header: output.NewHeader("AuditEntries"), Entries: []audit.Entry{}}
			err := audit.List(auditDir(*stateDir), func(e audit.Entry) error {
				switch {
				case from < 0: // the last ones
					if doc.Entries = append(doc.Entries, e); len(doc.Entries) > last {
						doc.Entries = doc.Entries[1:]
					}
				case e.Index >= from && len(doc.Entries) < maxListed:
					doc.Entries = append(doc.Entries, e)
				case e.Index >= from && doc.Next == nil:
					doc.Next = &e.Index
				}
				return nil
			})
			if err != nil {
				return auditExit(err)
			}
			return format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error { return printEntries(w, doc) })
		},
	}
	cmd.Flags().Int64Var(&from, "from", -1, "index of the first entry to list")
	cmd.Flags().IntVar(&last, "last", 100, "how many of the last entries to list without --from")
	return cmd
}

func printEntries(out io.Writer, doc auditEntries) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "INDEX\tWHEN\tKIND\tCOMMAND\tVERB\tGUEST\tSTATUS\tCODE\tDETAIL")
	for _, e := range doc.Entries {
		detail := e.Detail
		if e.Count > 0 {
			detail = fmt.Sprintf("%d of them", e.Count)
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Index, e.At.Format(time.RFC3339), e.Kind, e.CommandID, e.Verb, e.GuestID, e.Status, e.Code, detail)
	}
	if doc.Next != nil {
		fmt.Fprintf(w, "\nthere is more: --from %d\n", *doc.Next)
	}
	return w.Flush()
}

func newAuditVerify(stateDir *string, format *output.Format) *cobra.Command {
	return &cobra.Command{
		Use: "verify", Short: "Read the whole log and compare it with its checkpoints", Args: exactArgs(),
		Long: `Read the whole log and compare every entry with the tree and the tree with its signed
checkpoints. That finds what was changed on this disk. A log that was replaced as a whole, by an
older copy or by another, is intact by itself: that is for the control plane to see, which
remembers the checkpoints of the heartbeats.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := audit.Verify(auditDir(*stateDir))
			if err != nil {
				return auditExit(err)
			}
			doc := auditReport{output.NewHeader("AuditReport"), r}
			return format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error { return printAudit(w, doc) })
		},
	}
}

func newAuditExport(stateDir *string, format *output.Format) *cobra.Command {
	return &cobra.Command{
		Use: "export DIR", Short: "Write what the checkpoint covers to a new folder, as C2SP tlog-tiles", Args: exactArgs("DIR"),
		Long: `Write what the latest checkpoint covers to a new folder in the layout of C2SP tlog-tiles,
with the key that verifies the checkpoint in key.pub: for whoever checks it with tools of their own.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := audit.Export(auditDir(*stateDir), args[0])
			if err != nil {
				return auditExit(err)
			}
			doc := auditReport{output.NewHeader("AuditReport"), r}
			return format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error { return printAudit(w, doc) })
		},
	}
}

func printAudit(out io.Writer, doc auditReport) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "log\t%s\n", doc.Name)
	fmt.Fprintf(w, "key\t%s\n", doc.Key)
	fmt.Fprintf(w, "entries\t%d intact, %d signed for, %d confirmed by the control plane\n", doc.Entries, doc.Signed, doc.Witnessed)
	fmt.Fprintf(w, "root\t%s\n", doc.Root)
	if doc.TornBytes > 0 {
		fmt.Fprintf(w, "torn\t%d bytes of an append that was never confirmed; the agent cuts them off when it starts\n", doc.TornBytes)
	}
	return w.Flush()
}

// auditExit gives what went wrong its exit code.
func auditExit(err error) error {
	switch {
	case errors.Is(err, audit.ErrDamaged):
		return &exitError{exitPrecondition, contract.Refuse(codeAuditDamaged,
			"keep the folder for whoever looks into it; when the agent starts it sets it aside and begins a new one", "%v", err).Because(err)}
	case errors.Is(err, fs.ErrNotExist):
		return &exitError{exitNotFound, fmt.Errorf("there is no audit log: %w; has the agent run, and is --state-dir its own?", err)}
	case errors.Is(err, fs.ErrExist):
		return &exitError{exitConflict, err}
	case errors.Is(err, audit.ErrUnsigned):
		return &exitError{exitPrecondition, err}
	}
	return err
}

// auditPlatform notes a change of the platform in the log of the agent that was
// set up here, if one was.
func auditPlatform(stateDir, command, outcome string) error {
	dir := auditDir(stateDir)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	log, err := audit.Open(dir, "unknown", time.Now)
	if err != nil {
		return auditExit(err)
	}
	uid := os.Getuid()
	return errors.Join(log.Append(audit.Entry{Kind: audit.KindPlatform, Detail: command, Status: outcome, UID: &uid}), log.Close())
}
