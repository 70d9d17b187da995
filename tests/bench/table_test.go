package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestRowsHoldMedianAndExtremes(t *testing.T) {
	t.Parallel()
	rounds := []float64{9, 1, 4, 2}
	r := newRow("x", rounds...)
	if r.Median != 3 || r.Min != 1 || r.Max != 9 || !slices.Equal(rounds, []float64{9, 1, 4, 2}) {
		t.Errorf("row is %+v of %v", r, rounds)
	}
	if got := newRow("x", 5, 7, 6).Median; got != 6 {
		t.Errorf("median of three is %v", got)
	}
}

func TestEveryRowIsDividedByEveryNamedRow(t *testing.T) {
	t.Parallel()
	tab := table{Against: []string{"base", "other"}, Rows: []row{newRow("base", 2), newRow("other", 8), newRow("mine", 4)}}.divided()
	for i, want := range [][]float64{{1, 0.25}, {4, 1}, {2, 0.5}} {
		if !slices.Equal(tab.Rows[i].Ratios, want) {
			t.Errorf("%s: %v, want %v", tab.Rows[i].Name, tab.Rows[i].Ratios, want)
		}
	}
}

func TestTablesAreAligned(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	tab := table{
		Title: "T", About: strings.Repeat("word ", 50), Unit: "ms", Against: []string{"curl ×8"},
		Rows: []row{newRow("curl ×8", 1000), newRow("a longer name", 1.5, 0.001, 12345)},
	}
	tab.divided().write(&out)
	lines := strings.Split(strings.TrimRight(out.String(), "\n"), "\n")
	rows := lines[len(lines)-3:]
	for _, line := range rows {
		if utf8.RuneCountInString(line) != utf8.RuneCountInString(rows[0]) {
			t.Errorf("lines differ in length:\n%s", out.String())
		}
	}
	if !strings.HasSuffix(rows[1], " 1.000") || !strings.HasSuffix(rows[2], " 0.0015") {
		t.Errorf("ratios are not in the last column:\n%s", out.String())
	}
	for _, line := range lines {
		if utf8.RuneCountInString(line) > 98 {
			t.Errorf("line is too long: %s", line)
		}
	}
}

func TestTheFileToKeepIsNamedWithItsFormat(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{"": "", "-o table": "", "-o json f.json": "f.json"} {
		if got, match, err := arguments(strings.Fields(text)); err != nil || got != want || !match.MatchString("launches") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	if _, match, err := arguments([]string{"-match", "fetch|upload"}); err != nil || match.MatchString("launches") || !match.MatchString("blob fetch") {
		t.Errorf("matches %v, %v", match, err)
	}
	for _, text := range []string{"-o json", "-o yaml f", "f", "-o table f", "-match ["} {
		if _, _, err := arguments(strings.Fields(text)); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}

func TestMemoryIsReadFromTheRollup(t *testing.T) {
	t.Parallel()
	rss, dirty, err := smaps("5560-7fff ---p 00000000 00:00 0 [rollup]\nRss:      2048 kB\nPss:  900 kB\nPrivate_Dirty:   512 kB\n")
	if err != nil || rss != 2 || dirty != 0.5 {
		t.Errorf("%v MiB, %v MiB, %v", rss, dirty, err)
	}
	if _, _, err := smaps("Pss: 1 kB\n"); err == nil {
		t.Error("a rollup without Rss is accepted")
	}
	if rss, _, err := memory(os.Getpid()); err != nil || rss < 1 {
		t.Errorf("this process holds %v MiB, %v", rss, err)
	}
}

func TestCPUTimeIsThatOfTheWholeProcess(t *testing.T) {
	t.Parallel()
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < 20*time.Millisecond; {
	}
	after, err := cpuTime(os.Getpid())
	if err != nil || after-before < time.Millisecond {
		t.Errorf("20 ms of work took %v of CPU time, %v", after-before, err)
	}
}

func TestTheCommandBeforeAMomentIsTheLastOne(t *testing.T) {
	t.Parallel()
	at := time.Now()
	var s stamps
	for _, d := range []time.Duration{-2 * time.Second, -time.Second, time.Second} {
		s.add(at.Add(d))
	}
	if got := s.before(at); !got.Equal(at.Add(-time.Second)) {
		t.Errorf("%v before", at.Sub(got))
	}
}

func TestUptimeIsReadFromTheAgentsLog(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "log")
	const log = "t [INFO]  nodeagent.lifecycle: guest reports: guest_id=other phase=booted uptime_ms=1\n" +
		"t [INFO]  nodeagent.lifecycle: guest reports: guest_id=mine phase=booted uptime_ms=1250\n" +
		"t [INFO]  nodeagent.lifecycle: guest reports: guest_id=mine phase=attested uptime_ms=2000\n"
	if err := os.WriteFile(file, []byte(log), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := uptime(file, "mine"); err != nil || got != 1250*time.Millisecond {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := uptime(file, "nobody"); err == nil {
		t.Error("a guest that said nothing has an uptime")
	}
}
