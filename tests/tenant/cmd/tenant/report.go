package main

import (
	"fmt"
	"io"
	"os"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/confidential-node/agent/tests/tenant"
)

// newReporter shows bars on a terminal, lines elsewhere, nothing when quiet.
func newReporter(w io.Writer, quiet bool) tenant.Reporter {
	if quiet {
		return silent{}
	}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return &bars{lines{w}}
	}
	return &lines{w}
}

type silent struct{}

func (silent) Step(string)                           {}
func (silent) Transfer(string, int64) io.WriteCloser { return nopCloser{io.Discard} }

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// lines print one line per step and per finished transfer.
type lines struct{ w io.Writer }

func (l *lines) Step(text string) { fmt.Fprintf(l.w, "· %s\n", text) }

func (l *lines) Transfer(label string, _ int64) io.WriteCloser { return &transfer{l: l, label: label} }

type transfer struct {
	l     *lines
	label string
	n     int64
}

func (t *transfer) Write(p []byte) (int, error) {
	t.n += int64(len(p))
	return len(p), nil
}

func (t *transfer) Close() error {
	t.l.Step(fmt.Sprintf("%s: %d bytes", t.label, t.n))
	return nil
}

// bars draw a bar per transfer.
type bars struct{ lines }

func (b *bars) Transfer(label string, total int64) io.WriteCloser {
	return progressbar.NewOptions64(total,
		progressbar.OptionSetWriter(b.w), progressbar.OptionSetDescription(label), progressbar.OptionShowBytes(true),
		progressbar.OptionClearOnFinish(), progressbar.OptionSetWidth(30))
}
