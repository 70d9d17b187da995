//go:build emulated

package lifecycle_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/nodeagent/lifecycle"
)

// A step without its points would be left out of the crash matrix.
func TestEveryStepHasItsPoints(t *testing.T) {
	t.Parallel()
	seen := slices.DeleteFunc(points(t, nil), func(p string) bool { return strings.HasPrefix(p, "settled:") })
	if want := lifecycle.Points(); !slices.Equal(seen, want) {
		t.Errorf("a guest's life passes\n%v\nby the list of steps it should pass\n%v", seen, want)
	}
}
