//go:build emulated

package main

const emulatedTag = true
