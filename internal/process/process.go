package process

import (
	"bufio"
	"bytes"
	"context"
	cryptorand "crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// What a caller may want to tell apart.
var (
	// ErrNotSent says that the child got nothing of a line: it may be sent to another process.
	ErrNotSent = errors.New("nothing of the line was sent")
	// ErrLineTooLong says that the child wrote a line over MaxLine.
	ErrLineTooLong = errors.New("it wrote a line that is too long")
)

// Why a process ends, beside [ErrLineTooLong].
var (
	errItself    = errors.New("it ended by itself")
	errKilled    = errors.New("it is not needed any more")
	errIdle      = errors.New("nobody used it")
	errTooOld    = errors.New("it has reached its age")
	errStopped   = errors.New("all processes are stopped")
	errDeaf      = errors.New("it does not read its input")
	errNoInput   = errors.New("it closed its input")
	errNoOutput  = errors.New("it closed its output")
	errLineBreak = errors.New("a line break inside of a line")
)

// An ExitError says how a process ended. It is for operators: the lines may hold anything.
type ExitError struct {
	Reason error            // why it ended; [ErrLineTooLong] is one
	State  *os.ProcessState // exit code, signal, processor time
	Stderr []string         // the last lines it wrote to standard error, control characters escaped
}

// Error says all of it, on one line.
func (e *ExitError) Error() string {
	s := "the process has ended: " + e.Reason.Error() + ": " + e.State.String()
	if len(e.Stderr) > 0 {
		s += "; it said last: " + strings.Join(e.Stderr, " | ")
	}
	return s
}

// Unwrap returns the reason.
func (e *ExitError) Unwrap() error { return e.Reason }

// A Process is one running child. All but Read is safe for concurrent use, so several calls may
// share a process. After Release it belongs to somebody else.
type Process struct {
	s     *Supervisor
	cmd   *exec.Cmd
	token string // in its environment and in that of all it starts
	began time.Time
	log   *slog.Logger

	stdin   *os.File
	writing chan struct{} // held by who writes
	stdout  *os.File
	lines   *bufio.Reader
	stderr  *os.File
	said    teller

	once    sync.Once
	ending  chan struct{} // closed when the end has been decided; then why and crashed are set
	why     error
	crashed bool
	ended   chan struct{} // closed when the child was reaped; then exit is set
	exit    *ExitError

	// Guarded by Supervisor.mu.
	leased    bool // holds a place
	freeSince time.Time
}

// markName is a variable in the environment of every child: one random text per process around it,
// the innermost last. By it a child's descendants are found wherever they went.
const markName = "NEWEL_PROCESS"

// launch starts a child, on the caller's OS thread.
func (s *Supervisor) launch() (*Process, error) {
	p := &Process{
		s: s, token: cryptorand.Text(), leased: true,
		writing: make(chan struct{}, 1), ending: make(chan struct{}), ended: make(chan struct{}),
	}
	p.cmd = exec.Command(s.path, s.o.Args...) //nolint:gosec,noctx // from the operator's options; its end is ours
	p.cmd.Dir = s.o.Dir
	p.cmd.Env = append(s.env[:len(s.env):len(s.env)], markName+"="+strings.TrimPrefix(os.Getenv(markName)+"."+p.token, "."))
	p.cmd.SysProcAttr = attributes()
	if err := p.connect(); err != nil {
		return nil, err
	}
	p.began = time.Now()
	p.lines = bufio.NewReaderSize(p.stdout, 64<<10)
	p.log = s.o.Logger.With(slog.String("process", s.o.Name), slog.Int("pid", p.cmd.Process.Pid))
	p.said = teller{log: p.log, perSecond: s.o.MaxStderr}
	if err := limit(p.cmd.Process.Pid, s.o.MemoryBytes, s.o.CPUSeconds); err != nil {
		s.capped.Do(func() {
			p.log.LogAttrs(context.Background(), slog.LevelWarn, "memory and processor time of processes are not capped", slog.String("error", err.Error()))
		})
	}
	p.log.LogAttrs(context.Background(), slog.LevelDebug, "the process has started")
	return p, nil
}

// connect starts the command with pipes. They are not those of os/exec, whose Wait would close them
// before all was read.
func (p *Process) connect() (err error) {
	var theirs [3]*os.File
	defer func() {
		for _, f := range theirs {
			_ = f.Close() // nothing was written to it here
		}
		if err != nil {
			for _, f := range []*os.File{p.stdin, p.stdout, p.stderr} {
				_ = f.Close()
			}
		}
	}()
	if theirs[0], p.stdin, err = os.Pipe(); err != nil {
		return err
	}
	if p.stdout, theirs[1], err = os.Pipe(); err != nil {
		return err
	}
	if p.stderr, theirs[2], err = os.Pipe(); err != nil {
		return err
	}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = theirs[0], theirs[1], theirs[2]
	return p.cmd.Start()
}

// Send writes a line, to which it adds the end; the line holds no line break. It is safe for
// concurrent use: lines stay whole. It waits while the child does not read, as long as ctx lives.
//
// If ctx ends before the child took the whole line, the process is ended: half a line would spoil
// all that follow, and a child that takes nothing until a deadline is stuck. Only if ctx was
// canceled and the child had nothing of the line yet does it live on: who goes away must not end
// what others use. Errors with [ErrNotSent] mean that the child got nothing of the line.
func (p *Process) Send(ctx context.Context, line []byte) error {
	if bytes.IndexByte(line, '\n') >= 0 {
		return notSent(errLineBreak)
	}
	select {
	case p.writing <- struct{}{}:
		defer func() { <-p.writing }()
	case <-ctx.Done():
		return notSent(ctx.Err())
	case <-p.ending:
		return notSent(p.reason())
	}
	if err := ctx.Err(); err != nil {
		return notSent(err)
	}
	n, err := p.write(ctx, append(append(make([]byte, 0, len(line)+1), line...), '\n'))
	if err == nil {
		return nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = ctx.Err()
		if n > 0 || errors.Is(err, context.DeadlineExceeded) {
			p.stop(errDeaf, true)
		}
	} else {
		p.stop(errNoInput, true)
		select { // how it ended says more than a broken pipe
		case <-p.ended:
		case <-ctx.Done():
		}
		err = p.reason()
	}
	if n == 0 {
		return notSent(err)
	}
	return err
}

func notSent(err error) error { return fmt.Errorf("%w: %w", ErrNotSent, err) }

// write writes to the child until ctx ends, then fails with os.ErrDeadlineExceeded.
func (p *Process) write(ctx context.Context, b []byte) (int, error) {
	hurried := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(hurried)
		if p.stdin.SetWriteDeadline(time.Unix(1, 0)) != nil { // pipes have none on this system
			p.stop(errDeaf, true)
		}
	})
	n, err := p.stdin.Write(b)
	if !stop() {
		<-hurried
		_ = p.stdin.SetWriteDeadline(time.Time{}) // closed, or without deadlines: nothing to undo
	}
	return n, err
}

// Read returns the next line without its end, whatever it holds; the caller may keep it. A last
// line that has no end was cut off, and is not returned. One goroutine at a time may read. When
// the output has ended it waits for the process to do so and returns what Err does. At a line over
// MaxLine it fails with [ErrLineTooLong], and the process is ended.
//
// A child is not read ahead of Read: one that writes more than is read waits.
func (p *Process) Read() ([]byte, error) {
	var line []byte
	for {
		part, err := p.lines.ReadSlice('\n')
		line = append(line, part...)
		text := bytes.TrimSuffix(line, []byte("\n"))
		switch {
		case len(text) > p.s.o.MaxLine:
			p.stop(ErrLineTooLong, true)
			return nil, fmt.Errorf("%w: more than %d bytes", ErrLineTooLong, p.s.o.MaxLine)
		case err == nil:
			return bytes.TrimSuffix(text, []byte("\r")), nil
		case !errors.Is(err, bufio.ErrBufferFull):
			_ = p.stdout.Close() // there is no more; it may be closed already
			p.stop(errNoOutput, true)
			<-p.ended
			return nil, p.exit
		}
	}
}

// Done returns a channel that is closed when the process has ended and was reaped, and all that it
// started has been killed.
func (p *Process) Done() <-chan struct{} { return p.ended }

// Err returns nil until Done, then an [*ExitError].
func (p *Process) Err() error {
	select {
	case <-p.ended:
		return p.exit
	default:
		return nil
	}
}

// Release gives the process back, for the next who acquires one: it ends when nobody does for
// IdleTimeout, or at once when it is over MaxLifetime. What it writes meanwhile is not lost but read
// by the next. The second Release, and one after the end, do nothing.
func (p *Process) Release() { p.s.release(p) }

// Kill ends the process and all that it started: first its input ends, after KillGrace it gets
// SIGTERM, after another SIGKILL. It does not wait; Done does. Its place is free when it is gone.
func (p *Process) Kill() { p.stop(errKilled, false) }

// stop decides that the process ends. The first reason counts.
func (p *Process) stop(why error, crashed bool) {
	p.once.Do(func() {
		p.why, p.crashed = why, crashed
		close(p.ending)
	})
}

func (p *Process) isEnding() bool {
	select {
	case <-p.ending:
		return true
	default:
		return false
	}
}

// reason returns why the process ends or has ended; the caller knows that it does.
func (p *Process) reason() error {
	if err := p.Err(); err != nil {
		return err
	}
	return p.why
}

// mind stays with the child until nothing is left of it. It is the only one to send it signals, and
// reaps it after the last: until then the kernel gives its number to nobody else.
func (p *Process) mind() {
	grace := p.s.o.KillGrace
	silent := make(chan struct{})
	go func() {
		p.said.tell(p.stderr)
		close(silent)
	}()
	exited := make(chan struct{})
	go func() {
		waitExit(p.cmd)
		close(exited)
	}()

	select {
	case <-exited:
		p.stop(errItself, true)
	case <-p.ending:
	}
	_ = p.stdin.Close() // the polite way to ask; whoever writes fails
	for _, insist := range []func(*exec.Cmd){terminate, kill} {
		if within(grace, exited) {
			break
		}
		insist(p.cmd)
	}
	<-exited

	// The child is gone, but what it started may live and hold its pipes open.
	kill(p.cmd)
	collect(p.cmd)
	if left := sweep(p.token); left > 0 {
		p.log.LogAttrs(context.Background(), slog.LevelError, "some of what the process started cannot be killed", slog.Int("processes", left))
	}
	if !within(grace, silent) {
		_ = p.stderr.Close()
		<-silent
	}
	_ = p.stderr.Close()                                   // again, maybe
	time.AfterFunc(grace, func() { _ = p.stdout.Close() }) // Read has this long to take the rest

	p.exit = &ExitError{Reason: p.why, State: p.cmd.ProcessState, Stderr: p.said.last()}
	level := slog.LevelDebug
	if p.crashed {
		level = slog.LevelWarn
	}
	p.log.LogAttrs(context.Background(), level, "the process has ended", slog.String("reason", p.why.Error()),
		slog.String("state", p.exit.State.String()), slog.Duration("lived", time.Since(p.began)))
	p.s.forget(p)
	close(p.ended)
}

// within reports whether c is closed before d has passed.
func within(d time.Duration, c <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
		return false
	}
}
