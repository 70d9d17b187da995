// Package metadata is the host's side of the service a guest asks for what it
// needs to start and hands its evidence and sealed results to: HTTP/1.1 on the
// host's end of the guest's own tap, one listener per guest, bound to that
// device. The wire is in firmware/contract.
//
// Every byte that arrives is a guest's and untrusted: sizes, times, rates and
// connections are bounded, paths and methods exact, documents strict. What a
// guest says about itself is passed on as said and never relied upon; evidence
// is relayed unopened. Nothing secret is served, nothing a guest sends is
// logged, and one guest's session knows nothing of another's.
//
// A Server is safe for concurrent use. Each session has one goroutine for its
// listener and net/http's per connection; Close and Shutdown wait for the
// first and cut the others.
package metadata
