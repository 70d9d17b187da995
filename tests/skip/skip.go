// Package skip is the one way a test says that the machine lacks something.
// Every skip goes through Missing, which names the capability in a fixed
// form, so that the test runner can end with the list of what was not tested.
// It keeps no state and is safe for concurrent use.
package skip

import "testing"

// Prefix starts every skip message; the summary of `make test` looks for it.
const Prefix = "capability missing: "

// Missing skips the test and names the capability in words an operator knows
// ("root", "AMD SEV-SNP host", "real reports in ../shared/data").
func Missing(tb testing.TB, capability string) {
	tb.Helper()
	tb.Skip(Prefix + capability)
}
