//go:build !linux

package process

import (
	"log/slog"
	"os"
	"os/exec"
)

func isolate(*exec.Cmd) {}

func terminateGroup(pid int) { killGroup(pid) }

// killGroup ends the child alone: this system is served without process groups.
func killGroup(pid int) {
	if p, err := os.FindProcess(pid); err == nil {
		_ = p.Kill() // it may be gone already
	}
}

// waitExit returns when standard error is closed, which is what tells here that the child has ended.
func waitExit(_ int, quiet <-chan struct{}) { <-quiet }

func limit(_ int, memory int64, log *slog.Logger) {
	if memory > 0 {
		log.Warn("the memory of processes cannot be capped on this system")
	}
}
