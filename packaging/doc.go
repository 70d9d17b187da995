// Package packaging holds what a distribution package of nodeagent ships
// besides the binary: the annotated sample configuration and the systemd
// unit. It owns no code; its tests keep both true.
package packaging
