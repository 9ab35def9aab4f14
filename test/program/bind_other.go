//go:build !linux

package program

import "os/exec"

// bind does nothing: the system has no such thing.
func bind(*exec.Cmd) {}
