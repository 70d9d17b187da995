package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/nodeagent/history"
	"github.com/confidential-node/agent/nodeagent/output"
)

// platformHistory is the document of `nodeagent platform history`.
type platformHistory struct {
	output.Header
	Changes []history.Entry `json:"changes"`
	Damaged int             `json:"damaged"`
}

func historyFile(stateDir string) string { return filepath.Join(stateDir, "platform-history.jsonl") }

// stateFolder is the one that --state-dir names, or the configuration.
func (f *platformFlags) stateFolder(cmd *cobra.Command) (string, error) {
	dir := f.stateDir
	if dir == "" {
		cfg, err := configOrDefaults(cmd, f.configFile)
		if err != nil {
			return "", err
		}
		dir = cfg.StateDir
	}
	return filepath.Join(f.root, dir), nil
}

// diary is where changes of the platform are noted.
type diary struct {
	stateDir string
	log      *history.Log
}

// note writes down where a change stands, in the history and the audit log.
func (d diary) note(doc platformChange, outcome string, failure error) error {
	e := history.Entry{At: time.Now().UTC(), Command: doc.Command, UID: os.Getuid(), Outcome: outcome}
	var err error
	if e.Before, err = json.Marshal(doc.Before); err != nil {
		return fmt.Errorf("noting a change: %w", err)
	}
	if outcome == history.Done && failure == nil {
		if e.After, err = json.Marshal(doc.After); err != nil {
			return fmt.Errorf("noting a change: %w", err)
		}
	}
	if failure != nil {
		e.Error = failure.Error()
	}
	return errors.Join(d.log.Append(e), auditPlatform(d.stateDir, doc.Command, outcome))
}

func newPlatformHistory(f *platformFlags) *cobra.Command {
	return &cobra.Command{
		Use: "history", Short: "List what was done to the SEV firmware of this host by hand", Args: exactArgs(),
		Long: `List what was done to the SEV firmware of this host by the verbs beside this one, oldest
first. "unknown" means that the command or the host died before the outcome could be noted;
` + "`nodeagent capability` shows what the firmware is now.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := f.stateFolder(cmd)
			if err != nil {
				return err
			}
			entries, damaged, err := history.Read(historyFile(dir))
			if err != nil {
				return err
			}
			doc := platformHistory{output.NewHeader("PlatformHistory"), append([]history.Entry{}, entries...), damaged}
			return f.format.Print(cmd.OutOrStdout(), doc, func(w io.Writer) error { return printHistory(w, doc) })
		},
	}
}

func printHistory(out io.Writer, doc platformHistory) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "WHEN\tCOMMAND\tUID\tOUTCOME")
	for _, e := range doc.Changes {
		outcome := e.Outcome
		switch e.Outcome {
		case history.Failed, history.Done:
			if e.Error != "" {
				outcome += ": " + e.Error
			}
		case history.Unknown:
			outcome += ": it may have happened; nodeagent capability shows what is"
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", e.At.Format(time.RFC3339), e.Command, e.UID, outcome)
	}
	if doc.Damaged > 0 {
		fmt.Fprintf(w, "\n%d lines of the history were cut short by a crash\n", doc.Damaged)
	}
	return w.Flush()
}
