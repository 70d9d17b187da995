// Package trial puts a whole platform on one machine: the outside (control
// plane, object store, registry, each tenant's key broker) and provider hosts
// with a real libvirtd, the agent in its own process and a process that plays
// the security processor. Demo, whole-system tests and benchmarks stand on it.
//
// Everything lives in the namespaces of package rig and ends with them. The
// programs are the ones a user would run, built with the tag "emulated"; only
// store and registry are part of the calling process. A Platform and what it
// returns are safe for concurrent use unless said otherwise. For trials only:
// nothing here may be given real secrets.
package trial
