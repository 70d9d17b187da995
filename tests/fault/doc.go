// Package fault breaks the agent's own process on a real provider host, with a
// real libvirtd and real guests, and looks whether everything is undone or
// adopted: the crash matrix (its tests) and the soak (tests/soak) stand on a
// Field, one platform for many launches. Guests here need no tenant: they boot,
// find no broker, and are stopped. It owns launches, blobs to fetch, and the
// look for what is left; it must never run outside rig.Enter. A Field is for
// one goroutine, but for its object store.
package fault
