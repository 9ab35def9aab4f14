package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"newel.dev/newel/internal/assembly"
)

// Sockets that this process was started with come as file descriptors from firstFD on: that of
// systemd (LISTEN_FDS), or that of the server before this one, with two pipes.
const (
	firstFD     = 3
	handOverEnv = "NEWEL_HAND_OVER"
	// startTimeout bounds how long a successor may take to open what the configuration names.
	startTimeout = 5 * time.Minute
	// endTimeout bounds how long one that failed may take to end.
	endTimeout = 10 * time.Second
	// turnTimeout bounds how long its calls may take to end: longer than a server drains.
	turnTimeout = time.Minute
	maxReport   = 64 << 10 // bytes of what a successor says
)

// relay is what a process was given to serve on.
type relay struct {
	socket *os.File // nil: none
	report *os.File // to the server before this one; nil: there is none
	before *os.File // ends when that server has ended

	successor bool // there was a server before this one
}

// inherited takes what this process was given. What it starts in turn does not see it.
func (e *environment) inherited() (*relay, error) {
	if _, ok := e.getenv(handOverEnv); ok {
		defer os.Unsetenv(handOverEnv)
		return &relay{socket: file(firstFD, "listener"), report: file(firstFD+1, "report"), before: file(firstFD+2, "before"), successor: true}, nil
	}
	pid, _ := e.getenv("LISTEN_PID")
	if pid != strconv.Itoa(os.Getpid()) {
		return &relay{}, nil // there are none, or they are for another process
	}
	count, _ := e.getenv("LISTEN_FDS")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name)
	}
	if count != "1" {
		return nil, fmt.Errorf("the service manager hands over %q sockets; this server takes one: write one ListenStream", count)
	}
	return &relay{socket: file(firstFD, "listener")}, nil
}

func file(fd uintptr, name string) *os.File {
	closeOnExec(fd)
	return os.NewFile(fd, name)
}

// listen takes the socket that was handed over, or opens one.
func (r *relay) listen(ctx context.Context, addr string, x assembly.Exposure) (net.Listener, error) {
	if r.socket == nil {
		return assembly.Listen(ctx, addr, x)
	}
	l, err := net.FileListener(r.socket)
	if err != nil {
		return nil, fmt.Errorf("what was handed over is not a socket to listen on: %w", err)
	}
	r.socket.Close() // l has a descriptor of its own
	if _, ok := l.(*net.TCPListener); !ok {
		return nil, errors.Join(fmt.Errorf("the socket that was handed over is not of TCP but %s", l.Addr().Network()), l.Close())
	}
	if err := x.Check(l.Addr().String()); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// turn waits until the server before this one has let go of what only one process can have. It has
// stopped to accept connections then: those that come wait until this process is ready.
func (r *relay) turn(ctx context.Context) error {
	if r.report == nil {
		return nil
	}
	r.say("waiting")
	gone := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, r.before) // ends with that process
		close(gone)
	}()
	limit := time.NewTimer(turnTimeout)
	defer limit.Stop()
	select {
	case <-gone:
		return nil
	case <-limit.C:
		return fmt.Errorf("the server before this one has not ended after %v", turnTimeout)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ready tells the server before this one that it may leave.
func (r *relay) ready() { r.say("ready") }

// failed tells it why it may not; nil: there is nothing to tell.
func (r *relay) failed(err error) {
	if err != nil {
		r.say("failed " + strings.ReplaceAll(err.Error(), "\n", "; "))
	}
}

func (r *relay) say(what string) {
	if r.report == nil {
		return
	}
	_, _ = io.WriteString(r.report, what+"\n") // if that server is gone, it has left
	_ = r.report.Close()
	r.report = nil
}

// handOver starts this program again, as it is on disk now, and gives it the socket. It returns
// when the successor is ready to serve; otherwise this process is to go on.
func (s *serving) handOver(ctx context.Context) error {
	tcp, ok := s.listener.(*net.TCPListener)
	if !ok {
		return fmt.Errorf("a socket of %s is not handed over", s.listener.Addr().Network())
	}
	if len(s.program) == 0 {
		return errors.New("the name of this program is not known")
	}
	path, err := exec.LookPath(s.program[0])
	if err != nil {
		return err
	}
	socket, err := duplicate(tcp)
	if err != nil {
		return err
	}
	defer socket.Close()
	reads, report, err := os.Pipe()
	if err != nil {
		return err
	}
	defer reads.Close()
	defer report.Close()
	before, alive, err := os.Pipe()
	if err != nil {
		return err
	}
	defer before.Close()
	cmd := exec.CommandContext(context.WithoutCancel(ctx), path, s.program[1:]...) //nolint:gosec // this very program
	cmd.Args[0] = s.program[0]
	cmd.Env = append(os.Environ(), handOverEnv+"=1")
	cmd.ExtraFiles = []*os.File{socket, report, before}
	cmd.Stdout, cmd.Stderr = s.out, s.err
	if err := cmd.Start(); err != nil {
		return errors.Join(err, alive.Close())
	}
	report.Close()
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(io.LimitReader(reads, maxReport)).ReadString('\n') // "": it ended
		answer <- strings.TrimSpace(line)
	}()
	limit := time.NewTimer(startTimeout)
	defer limit.Stop()
	var why error
	select {
	case line := <-answer:
		if line == "ready" || line == "waiting" {
			s.alive = alive // closed with this process
			s.log.LogAttrs(ctx, slog.LevelInfo, "another process serves on", slog.Int("pid", cmd.Process.Pid), slog.String("state", line))
			return cmd.Process.Release()
		}
		why = errors.New("it ended while it started")
		if text, ok := strings.CutPrefix(line, "failed "); ok {
			why = errors.New(text)
		}
		kill := time.AfterFunc(endTimeout, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		_ = cmd.Wait() // how it ended was said
		return errors.Join(why, alive.Close())
	case <-limit.C:
		why = fmt.Errorf("it was not ready after %v", startTimeout)
	case <-ctx.Done():
		why = errors.New("this server is stopping")
	}
	_ = cmd.Process.Kill() // it may have ended by itself
	_ = cmd.Wait()         // why is said
	return errors.Join(why, alive.Close())
}
