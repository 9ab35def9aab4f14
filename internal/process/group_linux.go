package process

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// attributes gives a child a process group of its own, and the kernel's word that it does not
// outlive the thread which forked it; see [Supervisor.Run]. The word is void for programs that
// change their user (setuid, file capabilities).
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// terminate asks the whole group to end.
func terminate(cmd *exec.Cmd) { _ = unix.Kill(-cmd.Process.Pid, unix.SIGTERM) } // it may be gone already

// kill ends the whole group.
func kill(cmd *exec.Cmd) { _ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) } // it may be gone already

// waitExit returns when the child has exited. It stays a zombie, and keeps its number.
func waitExit(cmd *exec.Cmd) {
	for errors.Is(unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
	}
}

// collect reaps a child that has exited, and the members of its group that became ours. All of
// them have been killed.
func collect(cmd *exec.Cmd) {
	_ = cmd.Wait() // its ProcessState says how it ended
	for {
		// By the number of the group: nobody else can be waiting for these.
		if _, err := unix.Wait4(-cmd.Process.Pid, nil, 0, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return // there are none
		}
	}
}

const (
	sweepTime = 2 * time.Second       // longest wait for what was killed to be gone
	execTime  = 50 * time.Millisecond // longest wait for a process that has no environment yet
)

// sweep kills what carries the token in its environment. It looks again until it finds nothing, as
// what it looks for may fork meanwhile, and until what it killed is gone; those that became ours
// are reaped. It returns how many resist: they wait inside of the kernel.
func sweep(token string) (left int) {
	began := time.Now()
	killed := map[int]bool{}
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		again := false
		eachProcess(func(pid int) {
			switch yes, unclear := marked(pid, token); {
			case yes && killMarked(pid, token):
				killed[pid] = true
				again = true
			case unclear && time.Since(began) < execTime:
				again = true
			}
		})
		for pid := range killed {
			if gone(pid, killed) {
				delete(killed, pid)
			}
		}
		if !again && len(killed) == 0 || time.Since(began) > sweepTime {
			return len(killed)
		}
		time.Sleep(pause)
	}
}

// marked reports whether the environment of a process holds the token. It is not clear while a
// process executes another program, and for one that really has no environment.
func marked(pid int, token string) (yes, unclear bool) {
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil || len(env) > 0 {
		return bytes.Contains(env, []byte(token)), false
	}
	const kthreadd = 2 // the parent of the kernel's own threads
	s, ok := status(pid)
	return false, ok && s.state != 'Z' && s.parent != kthreadd && pid != kthreadd
}

// killMarked kills a process without ever killing another that got its number meanwhile: the
// descriptor stands for one process, whose environment is read after it was opened.
func killMarked(pid int, token string) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false // it is gone, or the kernel is older than 5.3
	}
	defer unix.Close(fd) //nolint:errcheck // a descriptor without data
	yes, _ := marked(pid, token)
	return yes && unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil
}

// gone reports whether a killed process is dead, and reaps it if it is ours. If its parent dies too
// it may become ours any moment. (A state of Z is not enough: other threads may live for a moment.)
func gone(pid int, killed map[int]bool) bool {
	s, ok := status(pid)
	switch {
	case !ok:
		return true
	case s.parent == os.Getpid():
		reaped, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
		return reaped == pid || errors.Is(err, unix.ECHILD)
	}
	return s.state == 'Z' && !killed[s.parent]
}

// reapAdopted reaps the zombies of these groups that became ours: the program is process 1 or a
// subreaper. The children that lead the groups are not touched, see [Process.mind].
func reapAdopted(groups []int) {
	leads := map[int]bool{}
	for _, g := range groups {
		leads[g] = true
	}
	eachProcess(func(pid int) {
		if s, ok := status(pid); ok && s.state == 'Z' && s.parent == os.Getpid() && leads[s.group] && !leads[pid] {
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil) // another may have been faster
		}
	})
}

// eachProcess calls f for every process there is.
func eachProcess(f func(pid int)) {
	dir, err := os.Open("/proc")
	if err != nil {
		return // not mounted: what left its group is not found
	}
	defer dir.Close() //nolint:errcheck // only read
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			f(pid)
		}
	}
}

type processStatus struct {
	state         byte // R, S, D, T, Z, X
	parent, group int
}

// status reads /proc/PID/stat (proc(5)); it is false if there is no such process.
func status(pid int) (processStatus, bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return processStatus{}, false
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:]) // the name before it may hold anything
	if len(f) < 3 {
		return processStatus{}, false
	}
	parent, err1 := strconv.Atoi(string(f[1]))
	group, err2 := strconv.Atoi(string(f[2]))
	return processStatus{f[0][0], parent, group}, err1 == nil && err2 == nil
}

// limit caps a child that has just started; all that it starts from now on inherits the caps. It
// has run for some microseconds without: nothing but a program of our own between fork and exec
// could cap it sooner.
//
// Memory is RLIMIT_DATA, what may be written to. RLIMIT_AS would count address space too, which
// Node, Java and Go reserve by the gigabyte and do not use.
func limit(pid int, memory, cpuSeconds int64) error {
	set := func(resource int, soft, hard uint64) error {
		var old unix.Rlimit
		if err := unix.Prlimit(pid, resource, nil, &old); err != nil {
			return err
		}
		hard = min(hard, old.Max) // a lower one of the system stays
		return unix.Prlimit(pid, resource, &unix.Rlimit{Cur: min(soft, hard), Max: hard}, nil)
	}
	var errs []error
	if memory > 0 {
		errs = append(errs, set(unix.RLIMIT_DATA, uint64(memory), uint64(memory)))
	}
	if cpuSeconds > 0 {
		// SIGXCPU first, which says in the exit state what it was; a second later SIGKILL.
		errs = append(errs, set(unix.RLIMIT_CPU, uint64(cpuSeconds), uint64(cpuSeconds)+1))
	}
	if err := errors.Join(errs...); !errors.Is(err, unix.ESRCH) { // else it has crashed already
		return err
	}
	return nil
}
