//go:build !unix

package process

import (
	"errors"
	"os/exec"
	"syscall"
)

// attributes are none: this system has no process groups. What a child starts is not ended with it.
func attributes() *syscall.SysProcAttr { return nil }

// terminate does what kill does: this system has no signal that asks.
func terminate(cmd *exec.Cmd) { kill(cmd) }

func kill(cmd *exec.Cmd) { _ = cmd.Process.Kill() } // it may be gone already

// waitExit reaps the child.
func waitExit(cmd *exec.Cmd) { _ = cmd.Wait() } // its ProcessState says how it ended

// collect has nothing to do: waitExit has reaped the child.
func collect(*exec.Cmd) {}

// sweep finds nothing: what the child started stays.
func sweep(string) int { return 0 }

// reapAdopted does nothing: this system gives orphans to nobody.
func reapAdopted([]int) {}

func limit(_ int, memory, cpuSeconds int64) error {
	if memory > 0 || cpuSeconds > 0 {
		return errors.New("this system does not let another process be capped")
	}
	return nil
}
