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
	"time"

	"golang.org/x/sys/unix"
)

// A server is one of servers/*, running on its own CPU.
type server struct {
	name string
	addr string
	cmd  *exec.Cmd
	gone chan struct{}
}

// startServer starts a server and returns once it accepts connections.
func startServer(ctx context.Context, cpu int, binary string, args ...string) (*server, error) {
	addr, err := freeAddress()
	if err != nil {
		return nil, err
	}
	s := &server{name: filepath.Base(binary), addr: addr, gone: make(chan struct{})}
	s.cmd = exec.CommandContext(ctx, binary, append([]string{"-addr=" + addr}, args...)...)
	s.cmd.Env = append(os.Environ(), "GOMAXPROCS=1") // what is in the environment counts: see idleSessions
	s.cmd.Stderr = os.Stderr
	if err := startOn(cpu, s.cmd); err != nil {
		return nil, err
	}
	go func() {
		defer close(s.gone)
		_ = s.cmd.Wait() // it is killed in the end; what it had to say is on standard error
	}()
	if err := s.accept(ctx); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
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

// accept waits, for at most 10 s, until the server accepts connections.
func (s *server) accept(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
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
	_ = s.cmd.Process.Kill() // it may be gone already
	<-s.gone
}

// ticksPerSecond is the unit of /proc/PID/stat; Linux shows 100 to programs on every platform.
const ticksPerSecond = 100

// cpu is the user and system time the process has used.
func (s *server) cpu() (time.Duration, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(raw), ") ") // the name may hold spaces
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/PID/stat has %d fields", len(f))
	}
	user, err1 := strconv.ParseInt(f[11], 10, 64)
	system, err2 := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * time.Second / ticksPerSecond, errors.Join(err1, err2)
}

// memory returns a line of /proc/PID/status in MiB, or 0 if the process is gone.
func (s *server) memory(line string) float64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
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
