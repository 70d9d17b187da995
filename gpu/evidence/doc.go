// Package evidence judges what the GPUs of a guest say about themselves
// against a verifier's own policy: that they are as many and of the model that
// was paid for, NVIDIA's silicon, asked under the verifier's nonce, in
// confidential mode, and running firmware that NVIDIA vouches for.
//
// What it cannot judge it says: no signature ties a GPU to the processor that
// signed the guest's report, so that both are in one machine is the word of
// the measured guest that asked them.
//
// Pure: manifests come read and verified. All functions are safe for
// concurrent use.
package evidence
