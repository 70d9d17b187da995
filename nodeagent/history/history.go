// Package history keeps what an operator did to a host by hand, in a file that
// only grows: one line for an intent, on disk before anything is done, and one
// for its outcome. An intent without outcome is something that may have
// happened. One process at a time holds the file; reading needs no lock.
package history

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/durable"
)

// maxLine bounds an entry; the file itself grows by an operator's hand only.
const maxLine = 64 << 10

// Entry is one thing that was done or tried.
type Entry struct {
	At      time.Time `json:"at"`
	Command string    `json:"command"`
	UID     int       `json:"uid"`
	// Before and After are the state around it, as the caller words it. After
	// is nil unless Outcome is "done" and it could be read back.
	Before json.RawMessage `json:"before"`
	After  json.RawMessage `json:"after,omitempty"`
	// Outcome is "done", "failed", or "unknown" while there is none.
	Outcome string `json:"outcome"`
	// Error says why it failed, or why After is not known.
	Error string `json:"error,omitempty"`
}

// Outcomes.
const (
	Done    = "done"
	Failed  = "failed"
	Unknown = "unknown"
)

// Log is the open file.
type Log struct{ file *os.File }

// Open opens or creates the file below an existing folder and locks it.
// history.busy when another process has it.
func Open(path string) (*Log, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, contract.Refuse("history.no-folder", "set up the agent first, or name its folder with --state-dir",
			"there is no folder %s to note the change in", filepath.Dir(path)).Because(err)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the history of changes: %w", err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(contract.Refuse("history.busy", "wait until the other command has ended",
			"another command that changes the platform is running").Because(err), file.Close())
	}
	if err := errors.Join(endLine(file), durable.SyncDir(filepath.Dir(path))); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the history of changes: %w", err), file.Close())
	}
	return &Log{file}, nil
}

// endLine ends a line that a crash cut short.
func endLine(file *os.File) error {
	info, err := file.Stat()
	if err != nil || info.Size() == 0 {
		return err
	}
	last := make([]byte, 1)
	if _, err := file.ReadAt(last, info.Size()-1); err != nil || last[0] == '\n' {
		return err
	}
	_, err = file.WriteString("\n")
	return err
}

// Append writes an entry and returns when it is on disk.
func (l *Log) Append(e Entry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encoding an entry: %w", err)
	}
	if _, err := l.file.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("writing the history of changes: %w", err)
	}
	return l.file.Sync()
}

// Close ends the lock.
func (l *Log) Close() error { return l.file.Close() }

// Read returns what happened, oldest first: of an intent with an outcome only
// the latter. Lines that are no entries, as a crash leaves them, are counted.
func Read(path string) (entries []Entry, damaged int, err error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("reading the history of changes: %w", err)
	}
	defer file.Close() //nolint:errcheck // read only
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var e Entry
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Command == "" {
			damaged++
			continue
		}
		// Commands follow one another: an outcome is that of the last intent.
		if last := len(entries) - 1; last >= 0 && e.Outcome != Unknown && entries[last].Outcome == Unknown && entries[last].Command == e.Command {
			entries[last] = e
			continue
		}
		entries = append(entries, e)
	}
	if err := lines.Err(); err != nil {
		return entries, damaged, fmt.Errorf("reading the history of changes: %w", err)
	}
	return entries, damaged, nil
}
