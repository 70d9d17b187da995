package api

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// The wire is read by people who write other nodes and control planes: every
// message, field and value says what it means.
func TestEverythingOnTheWireSaysWhatItMeans(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("node.proto")
	if err != nil {
		t.Fatal(err)
	}
	entry := regexp.MustCompile(`^\s*(?:(?:message|enum) (\w+) \{|(?:[\w.<>, ]+ )?(\w+) = \d+;)`)
	entries, previous := 0, ""
	for line := range strings.Lines(string(text)) {
		if m := entry.FindStringSubmatch(line); m != nil {
			entries++
			if !strings.HasPrefix(strings.TrimSpace(previous), "//") {
				t.Errorf("%s%s has no comment", m[1], m[2])
			}
		}
		previous = line
	}
	if entries < 120 {
		t.Errorf("only %d messages, fields and values were found", entries)
	}
}
