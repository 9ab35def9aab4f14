package process

import (
	"log/slog"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// isolate gives the child a process group of its own, so that all it starts can be ended with it.
// No Pdeathsig: it follows the thread that forked, and Go ends threads when it likes.
func isolate(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

func terminateGroup(pid int) { _ = unix.Kill(-pid, unix.SIGTERM) } // it may be gone already

func killGroup(pid int) { _ = unix.Kill(-pid, unix.SIGKILL) } // it may be gone already

// waitExit returns when the child has exited; it stays a zombie, so that its group number cannot
// be given to another process before the group has been killed.
func waitExit(pid int, _ <-chan struct{}) {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil)
		if err != unix.EINTR { //nolint:errorlint // a bare errno
			return
		}
	}
}

// limit caps the address space of a child.
func limit(pid int, memory int64, log *slog.Logger) {
	if memory <= 0 {
		return
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_AS, &unix.Rlimit{Cur: uint64(memory), Max: uint64(memory)}, nil); err != nil {
		log.Warn("the memory of the process could not be capped", "error", err.Error())
	}
}
