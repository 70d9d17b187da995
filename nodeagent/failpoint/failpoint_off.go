//go:build !emulated

package failpoint

// Points are none in this build.
type Points struct{}

// FromEnvironment reads nothing in this build.
func FromEnvironment() *Points { return nil }

// Hit does nothing in this build.
func (*Points) Hit(string) error { return nil }
