package contract

import "slices"

// Status is the outcome of one check.
type Status string

// Outcomes. Skip never counts as held on its own behalf and never fails.
const (
	Pass Status = "pass"
	Fail Status = "fail"
	Skip Status = "skip"
)

// Check is one named finding. Names are stable.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	// Want and Got are the compared values, "" where there are none.
	Want string `json:"want,omitempty"`
	Got  string `json:"got,omitempty"`
	// Why is one sentence for people: what holds, or what to do.
	Why string `json:"why,omitempty"`
}

// Warning is what a relying party should know although no check fails.
type Warning struct {
	// Name is stable.
	Name string `json:"name"`
	Why  string `json:"why"`
}

// Checks are all that were made of one thing, in their order.
type Checks []Check

// OK reports whether at least one check was made and none failed.
func (cs *Checks) OK() bool { return len(*cs) > 0 && cs.Failed() == nil }

// Failed returns the first failed check, nil when there is none.
func (cs *Checks) Failed() *Check {
	i := slices.IndexFunc(*cs, func(c Check) bool { return c.Status == Fail })
	if i < 0 {
		return nil
	}
	return &(*cs)[i]
}

// Add appends a check: holds with its sentence, or not with the other one.
func (cs *Checks) Add(name string, holds bool, want, got, held, broken string) {
	c := Check{name, Pass, want, got, held}
	if !holds {
		c.Status, c.Why = Fail, broken
	}
	*cs = append(*cs, c)
}

// Skip appends a check that is not made.
func (cs *Checks) Skip(name, why string) {
	*cs = append(*cs, Check{Name: name, Status: Skip, Why: why})
}
