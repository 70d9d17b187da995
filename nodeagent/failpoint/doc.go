// Package failpoint lets tests break the agent at a named point. It exists only
// under the build tag "emulated"; in what is shipped a point is an empty
// function, and tests/arch looks that nothing else is left of it.
//
// A point is named by what goes on there: "begun:tap", "blob.part". To add one,
// hand the code a func(point string) error (nil-safe (*Points).Hit, made once in
// nodeagent/run.go) and call it there:
//
//	if err := hit("blob.part"); err != nil {
//		return err
//	}
//
// A point at which the agent may die belongs into the list that its crash test
// goes through (lifecycle.Points and its like): tests/fault fails otherwise.
//
// A unit test, in a file with the tag, arms it for itself alone:
//
//	points := failpoint.New()
//	points.Arm("blob.part", "error(ENOSPC)")
//	cache := open(t, points.Hit)
//
// A test of the whole agent writes lines POINT=FAULT into a file on the host and
// names the file in the agent's NODEAGENT_FAILPOINTS. The file is read at every
// point, so that faults come and go while the agent runs.
//
//	error(TEXT)     the point fails; error(ENOSPC) as a full disk does
//	panic           it panics
//	kill            SIGKILL to the own process; kill(300ms) that much later,
//	                while the agent goes on
//	delay(2s)       it takes that long, by Points.Sleep
//	hang            it holds until the fault is disarmed or its line is gone
//
// Points are safe for concurrent use. There is no state of the package: two
// tests do not see each other's faults.
package failpoint

// FileEnv names the file that holds a process's faults.
const FileEnv = "NODEAGENT_FAILPOINTS"
