package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A server is one of servers/*, running on its own CPU.
type server struct {
	name string
	addr string
	cmd  *exec.Cmd
	gone chan struct{}

	speaks dialect // zero: that of the servers here
	group  bool    // it may have child processes, which count as it
}

// A dialect is how a server is spoken to. The zero value is revision 2026-07-28 at /mcp.
type dialect struct {
	older    string // revision before 2026-07-28, or ""
	sessions bool   // each connection begins a session
	path     string // "": /mcp
}

func (d *dialect) revision() string {
	if d.older != "" {
		return d.older
	}
	return "2026-07-28"
}

func (d *dialect) where() string {
	if d.path != "" {
		return d.path
	}
	return "/mcp"
}

func (d *dialect) String() string {
	if d.sessions {
		return d.revision() + ", sessions"
	}
	return d.revision()
}

// startServer starts a server and returns once it accepts connections.
func startServer(ctx context.Context, cpu int, binary string, args ...string) (*server, error) {
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	s := &server{name: filepath.Base(binary), addr: addr}
	s.cmd = exec.CommandContext(ctx, binary, append([]string{"-addr=" + addr}, args...)...)
	s.cmd.Env = os.Environ() // what is in the environment counts: see idleSessions
	s.cmd.Stderr = os.Stderr
	return s, s.run(ctx, cpu, 10*time.Second)
}

// run starts s.cmd and returns once it accepts connections, for which it has so long.
func (s *server) run(ctx context.Context, cpu int, patience time.Duration) error {
	s.gone = make(chan struct{})
	s.cmd.Env = append(s.cmd.Env, "GOMAXPROCS=1")
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: s.group}
	s.cmd.Cancel = s.kill
	if err := startOn(cpu, s.cmd); err != nil {
		return err
	}
	go func() {
		defer close(s.gone)
		_ = s.cmd.Wait() // it is killed in the end; what it had to say is on standard error
	}()
	err := s.accept(ctx, patience)
	if err != nil {
		s.stop()
	}
	return err
}

// startOn starts cmd on one CPU: a child has the affinity of the thread that starts it.
func startOn(cpu int, cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := setAffinity(cpu); err != nil {
		return err
	}
	err := cmd.Start()
	return errors.Join(err, setAffinity(loadCPU))
}

// setAffinity pins the calling thread.
func setAffinity(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pinning to CPU %d: %w", cpu, err)
	}
	return nil
}

// accept waits until the server accepts connections.
func (s *server) accept(ctx context.Context, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	again := time.NewTicker(200 * time.Microsecond)
	defer again.Stop()
	var d net.Dialer
	for {
		c, err := d.DialContext(ctx, "tcp", s.addr)
		if err == nil {
			return c.Close()
		}
		select {
		case <-s.gone:
			return errors.New("ended before it answered")
		case <-ctx.Done():
			return fmt.Errorf("does not accept connections: %w", err)
		case <-again.C:
		}
	}
}

func (s *server) stop() {
	_ = s.kill() // it may be gone already
	<-s.gone
}

func (s *server) kill() error {
	if s.group {
		return syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
	}
	return s.cmd.Process.Kill()
}

// processes are those of the server.
func (s *server) processes() ([]int, error) {
	if !s.group {
		return []int{s.cmd.Process.Pid}, nil
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var all []int
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if of, err := syscall.Getpgid(pid); err == nil && of == s.cmd.Process.Pid {
			all = append(all, pid)
		}
	}
	return all, nil
}

// ticksPerSecond is the unit of /proc/PID/stat; Linux shows 100 to programs on every platform.
const ticksPerSecond = 100

// cpu is the user and system time that the server's processes have used.
func (s *server) cpu() (time.Duration, error) {
	all, err := s.processes()
	var sum time.Duration
	for _, pid := range all {
		one, err := cpuOf(pid)
		if s.group && errors.Is(err, os.ErrNotExist) {
			continue // a child that ended counts in what its parent waited for
		}
		if err != nil {
			return 0, err
		}
		sum += one
	}
	return sum, err
}

func cpuOf(pid int) (time.Duration, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(raw), ") ") // the name may hold spaces
	f := strings.Fields(rest)
	if len(f) < 15 {
		return 0, fmt.Errorf("/proc/PID/stat has %d fields", len(f))
	}
	var ticks int64
	for _, field := range f[11:15] { // user and system, its own and of children it waited for
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / ticksPerSecond, nil
}

// memory returns a line of /proc/PID/status in MiB, of all processes of the server; one that is gone
// has none.
func (s *server) memory(line string) float64 {
	all, err := s.processes()
	if err != nil {
		return 0
	}
	var sum float64
	for _, pid := range all {
		sum += memoryOf(pid, line)
	}
	return sum
}

func memoryOf(pid int, line string) float64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for l := range strings.Lines(string(raw)) {
		if name, value, _ := strings.Cut(l, ":"); name == line {
			kib, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 64)
			if err != nil {
				return 0
			}
			return kib / 1024
		}
	}
	return 0
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
