// Package process supervises the child processes of one program that speaks in lines over its
// standard input and output. It knows nothing of MCP: it moves lines.
//
// Start reading at [Supervisor.Run], which starts and retires processes, and [Process.mind], which
// ends one. It refuses more processes than configured, new ones while the program crashes again
// and again, lines over their bound, and programs that are not there. It needs nothing but the
// operating system; where that offers less than Linux, package comments beside the functions in
// group_unix.go and group_other.go say what is missing.
//
// A program that crashes makes Acquire fail at once with Unavailable and advice when to try again.
// A child that does not read, or writes a line without end, is ended. When Run has returned there
// is no child, and nothing that a child started:
//
//   - Every child leads a process group; the whole group is killed when the child ends, for
//     whatever reason.
//   - What left the group (setsid) is found by a variable in its environment, [markName], and killed
//     too. Only a program that leaves the group and also clears its environment gets away.
//   - When this process itself is killed, the kernel kills the children (Pdeathsig). What they
//     started sees only the end of its input.
//
// The package does not make this process a child subreaper (PR_SET_CHILD_SUBREAPER). That is an
// attribute of the whole program, which would then have to reap the orphans of everybody in it;
// waiting for any child at all would take exit codes away from os/exec. If the program is one
// nevertheless, or is process 1 of a container, orphans of a child's group become ours and are
// reaped by the number of their group, which can take nothing from anybody.
package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"newel.dev/newel/call"
)

// Options configure a Supervisor. Command is required. Zero means the default in brackets; below
// zero is refused.
type Options struct {
	Name    string   // of the server, for errors and logs [Command]
	Command string   // a path, or a name that New looks up once in the PATH of this process
	Args    []string // passed as they are: there is no shell
	Env     []string // name=value; beside it a child has PATH, HOME, TMPDIR, LANG and USER of this process, and nothing else
	Dir     string   // working folder [that of this process]

	MaxProcesses int           // most at once [4]
	StartTimeout time.Duration // longest wait of Acquire [30 s]
	IdleTimeout  time.Duration // a process that is free for this long ends [5 min]
	MaxLifetime  time.Duration // a process older than this ends when it is free [0: none]
	KillGrace    time.Duration // from the end of its input to SIGTERM, and from there to SIGKILL [2 s]
	BackoffBase  time.Duration // pause after a crash, doubled by each further one [100 ms]
	BackoffMax   time.Duration // longest such pause [30 s]

	MaxLine     int   // bytes of a line, without its end; a longer one ends the process [16 MiB]
	MaxStderr   int   // bytes a second of standard error that reach the log [16 KiB]
	MemoryBytes int64 // private writable memory of each process, not of their sum (RLIMIT_DATA) [0: no cap]
	CPUSeconds  int64 // processor time of each process over its whole life (RLIMIT_CPU) [0: no cap]

	Logger *slog.Logger // [discards]
}

// inherited are the variables a child has without asking: none of them holds a secret.
var inherited = []string{"PATH", "HOME", "TMPDIR", "LANG", "USER"}

// stableAfter is the life after which a process ends the count of crashes in a row.
const stableAfter = 30 * time.Second

// A Supervisor starts and ends the processes of one program. It is safe for concurrent use.
type Supervisor struct {
	o      Options
	path   string            // of the program, absolute
	env    []string          // of every child, but for its mark
	places chan struct{}     // one element per process that is in use or was, until it has ended; served in order
	starts chan chan<- begun // to Run, which forks
	closed chan struct{}     // closed when Run begins to end
	ran    atomic.Bool
	capped sync.Once // the missing caps are logged once
	minds  sync.WaitGroup

	mu        sync.Mutex // guards what is below
	all       map[*Process]struct{}
	free      []*Process // the one free for longest first
	started   int64
	crashes   int64
	pause     time.Duration // the last one
	notBefore time.Time     // no start before this
}

type begun struct {
	p   *Process
	err error
}

// New checks the options and looks the program up; it starts nothing. The error names every
// option that makes no sense and says what to do.
func New(o Options) (*Supervisor, error) {
	if o.Name == "" {
		o.Name = o.Command
	}
	var problems []error
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf("process: "+format, args...)) }
	for _, n := range []struct {
		name  string
		value int64
	}{
		{"MaxProcesses", int64(o.MaxProcesses)}, {"StartTimeout", int64(o.StartTimeout)}, {"IdleTimeout", int64(o.IdleTimeout)},
		{"MaxLifetime", int64(o.MaxLifetime)}, {"KillGrace", int64(o.KillGrace)}, {"BackoffBase", int64(o.BackoffBase)},
		{"BackoffMax", int64(o.BackoffMax)}, {"MaxLine", int64(o.MaxLine)}, {"MaxStderr", int64(o.MaxStderr)},
		{"MemoryBytes", o.MemoryBytes}, {"CPUSeconds", o.CPUSeconds},
	} {
		if n.value < 0 {
			bad("%s is below zero", n.name)
		}
	}
	for _, v := range o.Env {
		if name, _, ok := strings.Cut(v, "="); !ok || name == "" || strings.ContainsRune(v, 0) {
			bad("Env has %q, which is not name=value", name) // the value may be a secret
		}
	}
	if o.Dir != "" {
		if info, err := os.Stat(o.Dir); err != nil || !info.IsDir() {
			bad("the working folder %q is not there; make it, or name another", o.Dir)
		}
	}
	path, err := lookup(o.Command, o.Dir)
	if err != nil {
		problems = append(problems, err)
	}
	if problems != nil {
		return nil, errors.Join(problems...)
	}
	o.MaxProcesses = or(o.MaxProcesses, 4)
	o.StartTimeout = or(o.StartTimeout, 30*time.Second)
	o.IdleTimeout = or(o.IdleTimeout, 5*time.Minute)
	o.KillGrace = or(o.KillGrace, 2*time.Second)
	o.BackoffBase = or(o.BackoffBase, 100*time.Millisecond)
	o.BackoffMax = max(or(o.BackoffMax, 30*time.Second), o.BackoffBase)
	o.MaxLine = or(o.MaxLine, 16<<20)
	o.MaxStderr = or(o.MaxStderr, 16<<10)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.Args = slices.Clone(o.Args)
	return &Supervisor{
		o: o, path: path, env: environment(o.Env),
		places: make(chan struct{}, o.MaxProcesses),
		starts: make(chan chan<- begun),
		closed: make(chan struct{}),
		all:    map[*Process]struct{}{},
	}, nil
}

func or[T ~int | ~int64](v, otherwise T) T {
	if v == 0 {
		return otherwise
	}
	return v
}

// lookup returns the absolute path of a program. A relative path counts from dir.
func lookup(command, dir string) (string, error) {
	if command == "" {
		return "", errors.New("process: Command is required")
	}
	file := command
	if filepath.Base(file) != file && !filepath.IsAbs(file) {
		file = filepath.Join(dir, file)
		if !filepath.IsAbs(file) {
			file = "." + string(filepath.Separator) + file // else it is looked for in PATH
		}
	}
	path, err := exec.LookPath(file)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("process: the program %q must not be executed (%w); make it executable", command, err)
	case err != nil:
		return "", fmt.Errorf("process: the program %q was not found (%w); install it, or give its full path", command, err)
	}
	return filepath.Abs(path)
}

// environment returns what every child gets; what is given wins over what is inherited.
func environment(given []string) []string {
	var env []string
	for _, name := range inherited {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return append(env, given...) // os/exec lets the last of a name win
}

// Acquire returns a process for the caller alone: the free one that was used last, or a new one. The
// caller ends with Release or Kill. It waits in order of arrival while all processes are in use, at
// most StartTimeout and while ctx lives, then fails with Exhausted. While the program crashes again
// and again, and when it cannot be started, it fails at once with Unavailable; RetryAfter says when
// the next start is allowed. It needs Run to run.
func (s *Supervisor) Acquire(ctx context.Context) (*Process, error) {
	if err := s.resting(); err != nil {
		return nil, err
	}
	ctx, stop := context.WithTimeout(ctx, s.o.StartTimeout)
	defer stop()
	select {
	case s.places <- struct{}{}:
	case <-s.closed:
		return nil, s.unavailable("is being stopped", nil)
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, call.AsError(ctx.Err())
		}
		e := call.Errorf(call.Exhausted, "all %d processes of %q are in use; try again in a moment", s.o.MaxProcesses, s.o.Name)
		e.RetryAfter = time.Second
		return nil, e.Because(ctx.Err())
	}
	p, err := s.take(ctx)
	if err != nil {
		<-s.places
	}
	return p, err
}

// take returns a free process or a new one; the caller holds a place.
func (s *Supervisor) take(ctx context.Context) (*Process, error) {
	if p := s.takeFree(); p != nil {
		return p, nil
	}
	if err := s.resting(); err != nil { // it may have crashed while we waited
		return nil, err
	}
	reply := make(chan begun, 1)
	select {
	case s.starts <- reply:
	case <-s.closed:
		return nil, s.unavailable("is being stopped", nil)
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, call.AsError(ctx.Err())
		}
		return nil, s.unavailable("could not be started in time; try again in a moment", ctx.Err())
	}
	b := <-reply // a fork cannot be called off, and takes milliseconds
	if b.err != nil {
		s.mu.Lock()
		pause := time.Until(s.notBefore)
		s.mu.Unlock()
		e := s.unavailable("could not be started; its operator finds the reason in the log", b.err)
		e.RetryAfter = max(pause, time.Millisecond)
		return nil, e
	}
	return b.p, nil
}

func (s *Supervisor) takeFree() *Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := len(s.free); n > 0; n = len(s.free) {
		p := s.free[n-1] // the last: so the others can become idle
		s.free = s.free[:n-1]
		if !p.isEnding() {
			p.leased = true
			return p
		}
	}
	return nil
}

// resting returns an error if there is no free process and none may be started yet.
func (s *Supervisor) resting() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	pause := time.Until(s.notBefore)
	if pause <= 0 || len(s.free) > 0 {
		return nil
	}
	e := s.unavailable("keeps crashing; it is started again in a moment", nil)
	e.RetryAfter = pause
	return e
}

func (s *Supervisor) unavailable(why string, cause error) *call.Error {
	return call.Errorf(call.Unavailable, "the program of %q %s", s.o.Name, why).Because(cause)
}

// Run starts processes for those who acquire them and ends those that are idle or too old. When
// ctx ends it ends all of them, and returns when there are none. It is called once; the error of a
// second call is the only one.
//
// Run keeps an OS thread for itself and forks on it alone: the kernel sends Pdeathsig when the
// thread that forked ends, not the process, and Go ends a thread when a goroutine that is locked
// to it returns. This thread outlives all its children.
func (s *Supervisor) Run(ctx context.Context) error {
	if s.ran.Swap(true) {
		return errors.New("process: Run was called twice")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tick := time.NewTicker(s.period())
	defer tick.Stop()
	for {
		select {
		case reply := <-s.starts:
			p, err := s.start()
			reply <- begun{p, err} // has room
		case now := <-tick.C:
			s.retire(now)
			s.reapOrphans()
		case <-ctx.Done():
			close(s.closed)
			s.mu.Lock()
			for p := range s.all {
				p.stop(errStopped, false)
			}
			s.mu.Unlock()
			s.minds.Wait()
			return nil
		}
	}
}

// period is how often Run looks for processes to retire: idle ones end at most a quarter late.
func (s *Supervisor) period() time.Duration {
	shortest := s.o.IdleTimeout
	if s.o.MaxLifetime > 0 {
		shortest = min(shortest, s.o.MaxLifetime)
	}
	return min(max(shortest/4, 10*time.Millisecond), 10*time.Second)
}

// start forks. It is called by Run only, see there.
func (s *Supervisor) start() (*Process, error) {
	p, err := s.launch()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.rest(0)
		s.crashes++
		s.o.Logger.LogAttrs(context.Background(), slog.LevelError, "the program could not be started", slog.String("program", s.path), slog.String("error", err.Error()))
		return nil, err
	}
	s.started++
	s.all[p] = struct{}{}
	s.minds.Go(p.mind)
	return p, nil
}

// retire ends free processes that are idle or too old. Like those who acquire one it takes a place
// for each, until it has ended: so there are never more processes than places.
func (s *Supervisor) retire(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free = slices.DeleteFunc(s.free, func(p *Process) bool {
		var why error
		switch {
		case s.tooOld(p, now):
			why = errTooOld
		case now.Sub(p.freeSince) >= s.o.IdleTimeout:
			why = errIdle
		default:
			return false
		}
		select {
		case s.places <- struct{}{}:
			p.leased = true
			p.stop(why, false)
			return true
		default: // somebody is about to take it
			return false
		}
	})
}

func (s *Supervisor) tooOld(p *Process, now time.Time) bool {
	return s.o.MaxLifetime > 0 && now.Sub(p.began) >= s.o.MaxLifetime
}

// reapOrphans reaps what children started and left behind, should it have become ours.
func (s *Supervisor) reapOrphans() {
	s.mu.Lock()
	groups := make([]int, 0, len(s.all))
	for p := range s.all {
		groups = append(groups, p.cmd.Process.Pid)
	}
	s.mu.Unlock()
	if len(groups) > 0 {
		reapAdopted(groups)
	}
}

// release makes a process free, or ends it if it is too old.
func (s *Supervisor) release(p *Process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	switch {
	case !p.leased || p.isEnding(): // its place is free when it has ended
	case s.tooOld(p, now):
		p.stop(errTooOld, false)
	default:
		p.leased = false
		p.freeSince = now
		s.free = append(s.free, p)
		<-s.places // ours: this does not block
	}
}

// forget is told of every end.
func (s *Supervisor) forget(p *Process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, p)
	s.free = slices.DeleteFunc(s.free, func(f *Process) bool { return f == p })
	lived := time.Since(p.began)
	switch {
	case p.crashed:
		s.crashes++
		s.rest(lived)
	case lived >= stableAfter:
		s.pause = 0
	}
	if p.leased {
		p.leased = false
		<-s.places
	}
}

// rest sets the pause after a crash; the caller holds mu. Half of it is chance, so that programs
// which failed together do not start together.
func (s *Supervisor) rest(lived time.Duration) {
	if lived >= stableAfter {
		s.pause = 0
	}
	s.pause = min(max(2*s.pause, s.o.BackoffBase), s.o.BackoffMax)
	s.notBefore = time.Now().Add(s.pause/2 + rand.N(s.pause/2+1)) //nolint:gosec // spreads starts, no secret
}

// Stats counts processes since the start.
type Stats struct {
	Running int   // now, those included that are being ended
	Starts  int64 // that succeeded
	Crashes int64 // failed to start, ended without being asked, or had to be ended because they broke the rules
}

// Stats returns the counts.
func (s *Supervisor) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{Running: len(s.all), Starts: s.started, Crashes: s.crashes}
}

// Full reports whether Acquire would have to wait now.
func (s *Supervisor) Full() bool { return len(s.places) == cap(s.places) }
