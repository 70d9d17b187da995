package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// report is everything one run found.
type report struct {
	Version int       `json:"version"`
	Machine string    `json:"machine"`
	At      time.Time `json:"at"`
	Tables  []table   `json:"tables"`
}

const reportVersion = 1

func (r *report) save(file string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding report: %w", err)
	}
	return os.WriteFile(file, append(text, '\n'), 0o600)
}

// table compares rows of one quantity.
type table struct {
	Title string `json:"title"`
	// About says what is compared and which value is good.
	About string `json:"about"`
	Unit  string `json:"unit"`
	// Against names the rows that every row is divided by, a column each.
	Against []string `json:"against"`
	Rows    []row    `json:"rows"`
}

// row is one quantity, measured in several rounds.
type row struct {
	Name   string    `json:"name"`
	Rounds []float64 `json:"rounds"`
	Median float64   `json:"median"`
	Min    float64   `json:"min"`
	Max    float64   `json:"max"`
	// Ratios of medians, in the order of Against.
	Ratios []float64 `json:"ratios"`
}

// newRow panics without rounds: that is a mistake in a benchmark.
func newRow(name string, rounds ...float64) row {
	return row{Name: name, Rounds: rounds, Median: median(rounds), Min: slices.Min(rounds), Max: slices.Max(rounds)}
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// milliseconds is the unit of every table of times.
func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// divided fills in the ratios.
func (t table) divided() table {
	for i := range t.Rows {
		t.Rows[i].Ratios = nil
		for _, name := range t.Against {
			at := slices.IndexFunc(t.Rows, func(r row) bool { return r.Name == name })
			t.Rows[i].Ratios = append(t.Rows[i].Ratios, t.Rows[i].Median/t.Rows[at].Median)
		}
	}
	return t
}

// write writes the table as aligned text.
func (t table) write(w io.Writer) {
	const indent = "  "
	fmt.Fprintf(w, "\n%s\n", t.Title)
	for _, line := range wrap(t.About, 96) {
		fmt.Fprintln(w, indent+line)
	}
	head := []string{"", "median " + t.Unit, "min", "max"}
	for _, name := range t.Against {
		head = append(head, "/ "+name)
	}
	lines := [][]string{head}
	for _, r := range t.Rows {
		line := []string{r.Name, digits(r.Median), digits(r.Min), digits(r.Max)}
		for _, ratio := range r.Ratios {
			line = append(line, ratioText(ratio))
		}
		lines = append(lines, line)
	}
	width := make([]int, len(head))
	for _, line := range lines {
		for i, cell := range line {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for _, line := range lines {
		fmt.Fprintf(w, indent+"%-*s", width[0], line[0])
		for i, cell := range line[1:] {
			fmt.Fprintf(w, "  %*s", width[i+1], cell)
		}
		fmt.Fprintln(w)
	}
}

// digits shows three significant ones.
func digits(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// ratioText shows three decimals, and two digits of what is smaller than that.
func ratioText(v float64) string {
	if v > 0 && v < 0.01 {
		return fmt.Sprintf("%.2g", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// wrap breaks a text into lines of at most width letters.
func wrap(text string, width int) []string {
	var lines []string
	var line string
	for word := range strings.FieldsSeq(text) {
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line+" "+word) <= width:
			line += " " + word
		default:
			lines, line = append(lines, line), word
		}
	}
	return append(lines, line)
}
