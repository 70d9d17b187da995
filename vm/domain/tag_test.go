//go:build !emulated

package domain

const emulatedBuild = false
