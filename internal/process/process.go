// Package process supervises the child processes of MCP servers that speak over stdio. It knows
// nothing of MCP: it moves lines.
//
// Start reading at [Supervisor.Acquire]. It refuses more processes than configured, and new ones
// while a program crashes again and again. Children run in process groups of their own, see only
// the environment they are given, and are all gone and reaped when [Supervisor.Run] has returned.
package process

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"newel.dev/newel/call"
)

// Options configure a Supervisor. Command is required; zero means the default in brackets.
type Options struct {
	Name         string // of the server, for errors and logs
	Command      string // started without a shell
	Args         []string
	Env          []string // the whole environment of the child, as name=value
	Dir          string
	MaxLine      int           // bytes of one line on standard output; a longer one ends the process [16 MiB]
	MaxProcesses int           // [4]
	StartTimeout time.Duration // how long Acquire waits for a place [30 s]
	KillGrace    time.Duration // between closing standard input, SIGTERM and SIGKILL, each [1 s]
	MaxStderr    int           // bytes a second of standard error that go to the log [16 KiB]
	BackoffBase  time.Duration // first pause after a crash, doubled by each further one [100 ms]
	BackoffMax   time.Duration // [30 s]
	MemoryBytes  int64         // address space of one process, where the system offers it; 0: no cap
	Logger       *slog.Logger  // nil discards
}

// stableAfter is how long a process has to live for its end not to count as a crash loop.
const stableAfter = 30 * time.Second

// A Supervisor starts and ends the processes of one program. It is safe for concurrent use.
type Supervisor struct {
	o      Options
	places chan struct{} // one per running process
	all    sync.WaitGroup

	mu      sync.Mutex // guards what is below
	running map[*Process]struct{}
	closed  bool
	crashes int       // in a row
	notTill time.Time // no start before this
	stats   Stats
}

// Stats counts processes since the start.
type Stats struct {
	Running int
	Starts  int64
	Crashes int64 // ends that nobody asked for
}

// New checks the options; it starts nothing.
func New(o Options) (*Supervisor, error) {
	if o.Command == "" {
		return nil, errors.New("process: Command is required")
	}
	if o.MaxLine <= 0 {
		o.MaxLine = 16 << 20
	}
	if o.MaxProcesses <= 0 {
		o.MaxProcesses = 4
	}
	if o.StartTimeout <= 0 {
		o.StartTimeout = 30 * time.Second
	}
	if o.KillGrace <= 0 {
		o.KillGrace = time.Second
	}
	if o.MaxStderr <= 0 {
		o.MaxStderr = 16 << 10
	}
	if o.BackoffBase <= 0 {
		o.BackoffBase = 100 * time.Millisecond
	}
	if o.BackoffMax <= 0 {
		o.BackoffMax = 30 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if _, err := exec.LookPath(o.Command); err != nil {
		return nil, fmt.Errorf("the program %q is not there or cannot be run (%w); install it, or give its full path", o.Command, err)
	}
	return &Supervisor{o: o, places: make(chan struct{}, o.MaxProcesses), running: map[*Process]struct{}{}}, nil
}

// Acquire starts a process. It waits for a place while as many run as may; while the program
// crashes again and again it fails at once with Unavailable.
func (s *Supervisor) Acquire(ctx context.Context) (*Process, error) {
	s.mu.Lock()
	pause := time.Until(s.notTill)
	s.mu.Unlock()
	if pause > 0 {
		e := call.Errorf(call.Unavailable, "the program of %q keeps ending; it is started again in a moment", s.o.Name)
		e.RetryAfter = pause
		return nil, e
	}
	ctx, stop := context.WithTimeout(ctx, s.o.StartTimeout)
	defer stop()
	select {
	case s.places <- struct{}{}:
	case <-ctx.Done():
		e := call.Errorf(call.Exhausted, "all %d processes of %q are in use; try again in a moment", s.o.MaxProcesses, s.o.Name)
		return nil, e.Because(ctx.Err())
	}
	p, err := s.start()
	if err != nil {
		<-s.places
		s.crashed(0)
		return nil, err
	}
	return p, nil
}

func (s *Supervisor) start() (*Process, error) {
	cmd := exec.Command(s.o.Command, s.o.Args...) //nolint:gosec // from the operator's file only
	cmd.Env, cmd.Dir = s.o.Env, s.o.Dir
	isolate(cmd)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.New("the supervisor has ended")
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("the program %q could not be started: %w", s.o.Command, err)
	}
	p := &Process{
		s: s, cmd: cmd, stdin: stdin, lines: bufio.NewReaderSize(stdout, 64<<10), began: time.Now(),
		writes: make(chan struct{}, 1), ended: make(chan struct{}),
		log: s.o.Logger.With(slog.Int("pid", cmd.Process.Pid)),
	}
	limit(cmd.Process.Pid, s.o.MemoryBytes, p.log)
	s.running[p] = struct{}{}
	s.stats.Starts++
	var said sync.WaitGroup
	said.Go(func() { p.tell(stderr) })
	s.all.Go(func() {
		<-p.drained(&said)
		p.reap()
	})
	return p, nil
}

// crashed notes an end that nobody asked for, after a life of lived.
func (s *Supervisor) crashed(lived time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Crashes++
	if lived > stableAfter {
		s.crashes = 0
	}
	pause := min(s.o.BackoffBase<<min(s.crashes, 20), s.o.BackoffMax)
	s.crashes++
	s.notTill = time.Now().Add(pause/2 + rand.N(pause/2+1)) //nolint:gosec // spreads starts, no secret
}

// Full reports whether as many processes run as may.
func (s *Supervisor) Full() bool { return len(s.places) == cap(s.places) }

// Stats returns the counts.
func (s *Supervisor) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Running = len(s.running)
	return st
}

// Run waits for ctx to end, then ends all processes and returns when there are none.
func (s *Supervisor) Run(ctx context.Context) error {
	<-ctx.Done()
	s.mu.Lock()
	s.closed = true
	for p := range s.running {
		go p.Kill() // ends with the process, which is waited for below
	}
	s.mu.Unlock()
	s.all.Wait()
	return nil
}

// A Process is one running child. Send and Kill are safe for concurrent use; Read is for one
// goroutine.
type Process struct {
	s      *Supervisor
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  *bufio.Reader
	log    *slog.Logger
	began  time.Time
	writes chan struct{} // held by who writes
	ended  chan struct{} // closed when reaped
	once   sync.Once
	asked  bool // guarded by Supervisor.mu: the end was asked for
	last   string
	why    error
}

// drained returns a channel that is closed when the child has closed standard error, which is when
// it and all that inherited it are gone, or when it has been killed.
func (p *Process) drained(said *sync.WaitGroup) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		state := make(chan struct{})
		go func() { said.Wait(); close(state) }()
		exited := make(chan struct{})
		go func() { waitExit(p.cmd.Process.Pid, state); close(exited) }()
		<-exited
		select { // a grandchild may hold standard error open: it is of the group and dies with it
		case <-state:
		case <-time.After(50 * time.Millisecond):
			killGroup(p.cmd.Process.Pid)
			<-state
		}
		close(done)
	}()
	return done
}

// reap collects the child and everything it left behind.
func (p *Process) reap() {
	killGroup(p.cmd.Process.Pid) // what it started and did not end
	err := p.cmd.Wait()
	s := p.s
	s.mu.Lock()
	delete(s.running, p)
	asked := p.asked
	s.mu.Unlock()
	if err == nil {
		err = errors.New("exit status 0")
	}
	p.why = err
	if p.last != "" {
		p.why = fmt.Errorf("%w; it said last: %s", err, p.last)
	}
	if !asked {
		s.crashed(time.Since(p.began))
		p.log.LogAttrs(context.Background(), slog.LevelWarn, "the process ended by itself", slog.String("error", p.why.Error()))
	}
	close(p.ended)
	<-s.places
}

// Send writes one line. A child that does not read is ended when ctx is: half a line would make
// nonsense of all that follow.
func (p *Process) Send(ctx context.Context, line []byte) error {
	select {
	case p.writes <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ended:
		return p.Err()
	}
	defer func() { <-p.writes }()
	stop := context.AfterFunc(ctx, p.Kill)
	defer stop()
	b := append(append(make([]byte, 0, len(line)+1), line...), '\n')
	if _, err := p.stdin.Write(b); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("writing to the process: %w", err)
	}
	return nil
}

// Read returns the next line without its end. A line over the bound ends the process.
func (p *Process) Read() ([]byte, error) {
	var long []byte
	for {
		part, err := p.lines.ReadSlice('\n')
		if len(long)+len(part) > p.s.o.MaxLine {
			p.Kill()
			return nil, fmt.Errorf("a line of more than %d bytes", p.s.o.MaxLine)
		}
		long = append(long, part...)
		switch {
		case err == nil:
			return []byte(strings.TrimRight(string(long), "\r\n")), nil
		case !errors.Is(err, bufio.ErrBufferFull):
			<-p.ended
			return nil, p.Err()
		}
	}
}

// Done is closed when the process has ended and was reaped.
func (p *Process) Done() <-chan struct{} { return p.ended }

// Err says how the process ended; nil while it runs.
func (p *Process) Err() error {
	select {
	case <-p.ended:
		return p.why
	default:
		return nil
	}
}

// Kill ends the process and its group: standard input is closed, then SIGTERM, then SIGKILL. It
// returns when the process is gone.
func (p *Process) Kill() {
	p.once.Do(func() {
		p.s.mu.Lock()
		p.asked = true
		p.s.mu.Unlock()
		go func() { // ends with the process
			_ = p.stdin.Close()
			for _, end := range []func(int){terminateGroup, killGroup} {
				t := time.NewTimer(p.s.o.KillGrace)
				select {
				case <-p.ended:
					t.Stop()
					return
				case <-t.C:
					end(p.cmd.Process.Pid)
				}
			}
		}()
	})
}

// tell passes standard error on to the log, bounded, with control characters escaped.
func (p *Process) tell(r io.Reader) {
	in := bufio.NewReaderSize(r, 4<<10)
	window, left, dropped := time.Now(), p.s.o.MaxStderr, 0
	for {
		line, err := in.ReadSlice('\n')
		if now := time.Now(); now.Sub(window) > time.Second {
			if dropped > 0 {
				p.log.LogAttrs(context.Background(), slog.LevelWarn, "standard error was cut", slog.Int("bytes", dropped))
			}
			window, left, dropped = now, p.s.o.MaxStderr, 0
		}
		text := strings.Trim(strconv.QuoteToGraphic(strings.TrimRight(string(line), "\r\n")), `"`)
		switch {
		case text == "":
		case len(line) > left:
			dropped += len(line)
		default:
			left -= len(line)
			p.last = text
			p.log.LogAttrs(context.Background(), slog.LevelInfo, "stderr", slog.String("line", text))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}
