//go:build emulated

package lifecycle

import "slices"

// Points are where the life of a guest without GPUs may be broken, in order, as
// far as they follow from the list of steps: one before, inside and after each
// step, one after its record, and two for its undo.
func Points() []string { return points(false) }

// GPUPoints are those of a guest with GPUs.
func GPUPoints() []string { return append([]string{"gpus-reserved"}, points(true)...) }

// UploadPoints are where the delivery of a result that goes up in parts may be
// broken, in order: before any part is sent, once a grant or the completion was
// asked for, given, and at its end.
func UploadPoints(name string) []string {
	return []string{"sending:" + name, "wanted:" + name, "granted:" + name, "completed:" + name, "settled:" + name}
}

// StopPoints are where a stop may be broken: once it is on record.
func StopPoints() []string { return []string{"stopping"} }

func points(gpus bool) []string {
	points := []string{"accepted"}
	taken := slices.DeleteFunc(steps(), func(s step) bool { return s.gpus && !gpus })
	for _, s := range taken {
		points = append(points, "begun:"+s.name, "inside:"+s.name, "did:"+s.name, "done:"+s.name)
	}
	points = append(points, "undoing")
	for _, s := range slices.Backward(taken) {
		points = append(points, "undone:"+s.name, "gone:"+s.name)
	}
	return append(points, "ended")
}
