// Package e2e holds the whole-system tests: each puts a platform on this
// machine (package trial), lets real guests go their way on it, and lets
// hosts, guests, control planes and stores misbehave. It has no code of its
// own outside its tests.
package e2e
