//go:build emulated

package lifecycle

import "slices"

// Points are where a guest's life may be broken, in order, as far as they
// follow from the list of steps: one before, inside and after each step, one
// after its record, and two for its undo.
func Points() []string {
	points := []string{"accepted"}
	for _, s := range steps() {
		if s.gpus {
			continue // no guest under the emulated TEE has any
		}
		points = append(points, "begun:"+s.name, "inside:"+s.name, "did:"+s.name, "done:"+s.name)
	}
	points = append(points, "undoing")
	for _, s := range slices.Backward(steps()) {
		if s.gpus {
			continue
		}
		points = append(points, "undone:"+s.name, "gone:"+s.name)
	}
	return append(points, "ended")
}
