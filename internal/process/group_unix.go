//go:build unix && !linux

package process

import (
	"errors"
	"os/exec"
	"syscall"
)

// attributes gives a child a process group of its own. Without Pdeathsig it learns only by the end
// of its input that this process was killed.
func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

// terminate asks the whole group to end.
func terminate(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) } // it may be gone already

// kill ends the whole group.
func kill(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // it may be gone already

// waitExit reaps the child: there is no portable way to wait and leave it. Its group is killed in
// the next moment; no other group has its number unless the numbers came round in between.
func waitExit(cmd *exec.Cmd) { _ = cmd.Wait() } // its ProcessState says how it ended

// collect has nothing to do: waitExit has reaped the child.
func collect(*exec.Cmd) {}

// sweep finds nothing: what left the group of the child stays.
func sweep(string) int { return 0 }

// reapAdopted does nothing: only Linux gives orphans to others than process 1.
func reapAdopted([]int) {}

func limit(_ int, memory, cpuSeconds int64) error {
	if memory > 0 || cpuSeconds > 0 {
		return errors.New("this system does not let another process be capped")
	}
	return nil
}
