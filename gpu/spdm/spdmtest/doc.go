// Package spdmtest plays GPUs towards those who ask for their evidence: it
// issues certificates like NVIDIA's and signs the transcripts that such a GPU
// would. A test says what a GPU is (its chip, PDI, driver, mode), and the
// package works out what its evidence then looks like. No product code may
// import it: whoever holds such a key can mint evidence, so its roots always
// carry EMULATED in their names and no verifier accepts them unless told.
//
// It owns its keys and nothing else. An Authority, and a GPU that nobody
// changes, are safe for concurrent use.
package spdmtest
