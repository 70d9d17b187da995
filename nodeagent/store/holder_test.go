package store

import (
	"strings"
	"testing"
)

func TestTheHolderOfALockIsRead(t *testing.T) {
	t.Parallel()
	const one = "1: FLOCK  ADVISORY  WRITE 42 fe:00:5678 0 EOF\n"
	for text, want := range map[string]int{
		"": 0, one: 42, one + one: 42,
		one + "2: FLOCK  ADVISORY  WRITE 43 08:01:5678 0 EOF\n":                                         0,
		"1: POSIX  ADVISORY  WRITE 42 fe:00:5678 0 EOF\n":                                               0,
		"1: FLOCK  ADVISORY  READ 42 fe:00:5678 0 EOF\n":                                                0,
		"1: FLOCK  ADVISORY  WRITE 42 fe:00:15678 0 EOF\n2: -> FLOCK ADVISORY WRITE 7 fe:00:5678 0 EOF": 0,
		"1: FLOCK  ADVISORY  WRITE -1 fe:00:5678 0 EOF\n":                                               0,
	} {
		if got := parseHolder(strings.NewReader(text), 5678); got != want {
			t.Errorf("%q: process %d, want %d", text, got, want)
		}
	}
}

func FuzzHolder(f *testing.F) {
	f.Add("1: FLOCK  ADVISORY  WRITE 42 fe:00:5678 0 EOF\n", uint64(5678))
	f.Fuzz(func(t *testing.T, text string, inode uint64) {
		if pid := parseHolder(strings.NewReader(text), inode); pid < 0 {
			t.Errorf("process %d", pid)
		}
	})
}
