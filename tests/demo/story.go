package main

import (
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/confidential-node/agent/tests/trial"
)

// story tells what happens, with times.
type story struct {
	w     io.Writer
	color bool
	begin time.Time
	last  time.Time
	step  int
}

func newStory(w io.Writer, color bool) *story {
	now := time.Now()
	return &story{w: w, color: color, begin: now, last: now}
}

func (s *story) elapsed() float64 { return time.Since(s.begin).Seconds() }

func (s *story) paint(code, text string) string {
	if !s.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// chapter runs one step and says how long it took.
func (s *story) chapter(title string, do func() error) error {
	s.step++
	fmt.Fprintf(s.w, "\n%s\n", s.paint("1", fmt.Sprintf("%d. %s", s.step, title)))
	s.last = time.Now()
	if err := do(); err != nil {
		return fmt.Errorf("step %d (%s): %w", s.step, title, err)
	}
	fmt.Fprintf(s.w, "   %s\n", s.paint("32", fmt.Sprintf("✓ %.1f s", time.Since(s.last).Seconds())))
	return nil
}

func (s *story) say(format string, args ...any) {
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		fmt.Fprintf(s.w, "   %s\n", strings.TrimRight(line, "\n"))
	}
}

// run shows a command as a user would type it, runs it, and shows its answer.
// Any exit code but 0 is an error.
func (s *story) run(cmd *exec.Cmd) (trial.Answer, error) {
	return s.runAs(cmd, 0, append([]string{filepath.Base(cmd.Path)}, cmd.Args[1:]...)...)
}

// runAs is run for a command that a user would type otherwise, and for one
// that ends with another exit code.
func (s *story) runAs(cmd *exec.Cmd, wanted int, typed ...string) (trial.Answer, error) {
	for i, word := range typed {
		typed[i] = shorten(word)
	}
	s.say("%s", s.paint("36", "$ "+strings.Join(typed, " ")))
	a, err := trial.Ask(cmd, nil)
	if err != nil {
		return a, err
	}
	s.say("%s%s", a.Stderr, a.Stdout)
	if a.Code != wanted {
		return a, fmt.Errorf("exit code %d, wanted %d", a.Code, wanted)
	}
	return a, nil
}

// shorten makes folders of this run and long digests readable, and quotes as
// a shell wants it.
func shorten(word string) string {
	const digest, kept = 64, 12
	if at := strings.LastIndexByte(word, ':') + 1; len(word)-at >= digest {
		word = word[:at+kept] + "…"
	}
	if filepath.IsAbs(word) && strings.Count(word, "/") > 2 {
		word = "…/" + filepath.Base(word)
	}
	if strings.ContainsAny(word, " ?") {
		word = "'" + word + "'"
	}
	return word
}
