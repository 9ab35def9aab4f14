//go:build unix

package process

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"newel.dev/newel/call"
)

// log is a buffer for a logger that several goroutines write to.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *log) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// run returns a supervisor of children with a role, and how to stop it. When it has stopped, at the
// latest with the test, there must be no process.
func run(t *testing.T, role string, o Options) (*Supervisor, func()) {
	t.Helper()
	if o.Command == "" {
		o.Command = os.Args[0]
	}
	o.Env = append(o.Env, roleName+"="+role, "GORACE=atexit_sleep_ms=0") // else the race detector sleeps at the end
	if o.KillGrace == 0 {
		o.KillGrace = 200 * time.Millisecond
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := s.Stats().Running; n != 0 || len(s.free) != 0 || len(s.places) != 0 {
			t.Errorf("after Run: %d processes, %d free, %d places taken", n, len(s.free), len(s.places))
		}
	})
	t.Cleanup(stop)
	return s, stop
}

func acquire(t *testing.T, s *Supervisor) *Process {
	t.Helper()
	p, err := s.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func send(t *testing.T, p *Process, line string) {
	t.Helper()
	if err := p.Send(t.Context(), []byte(line)); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, p *Process) string {
	t.Helper()
	line, err := p.Read()
	if err != nil {
		t.Fatal(err)
	}
	return string(line)
}

// ended waits for the end and returns how it was.
func ended(t *testing.T, p *Process) *ExitError {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the process does not end")
	}
	var e *ExitError
	if !errors.As(p.Err(), &e) {
		t.Fatalf("Err is %v", p.Err())
	}
	return e
}

// eventually waits for something that has no channel.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	late := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatal("never: " + what)
		}
	}
}

func TestNewSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		o    Options
		want []string
	}{
		{Options{}, []string{"Command is required"}},
		{Options{Command: "no-such-program-anywhere"}, []string{`"no-such-program-anywhere"`, "install it, or give its full path"}},
		{Options{Command: filepath.Join(dir, "absent")}, []string{"absent", "not found"}},
		{Options{Command: plain}, []string{"plain", "make it executable"}},
		{Options{Command: "sh", Dir: filepath.Join(dir, "absent")}, []string{"working folder", "absent"}},
		{Options{Command: "sh", MaxLine: -1, KillGrace: -1}, []string{"MaxLine is below zero", "KillGrace is below zero"}},
		{Options{Command: "sh", Env: []string{"SECRET"}}, []string{"not name=value"}},
		{Options{Command: "sh", Env: []string{"SECRET=hidden\x00"}}, []string{`"SECRET"`}},
	} {
		_, err := New(tt.o)
		if err == nil {
			t.Errorf("%+v: no error", tt.o)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hidden") {
				t.Errorf("%+v: %v, want %q in it", tt.o, err, want)
			}
		}
	}
	if err := os.Chmod(plain, 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	if _, err := New(Options{Command: "./plain", Dir: dir}); err != nil {
		t.Errorf("a path that counts from the working folder: %v", err)
	}
}

func TestChildHasOnlyWhatItIsGiven(t *testing.T) {
	t.Setenv("TOKEN_OF_THE_GATEWAY", "secret")
	t.Setenv("LANG", "de_DE")
	t.Setenv("USER", "somebody")
	dir := t.TempDir()
	s, _ := run(t, "show", Options{Args: []string{"$(touch x)", "* ;", ""}, Dir: dir, Env: []string{"OWN=1", "USER=given"}})
	var got struct {
		Args, Env []string
		Dir       string
	}
	if err := json.Unmarshal([]byte(read(t, acquire(t, s))), &got); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.Args, []string{"$(touch x)", "* ;", ""}) {
		t.Errorf("arguments: %q", got.Args)
	}
	if real, _ := filepath.EvalSymlinks(dir); got.Dir != real {
		t.Errorf("folder: %s", got.Dir)
	}
	var names []string
	for _, v := range got.Env {
		name, _, _ := strings.Cut(v, "=")
		names = append(names, name)
	}
	for _, name := range names {
		if !slices.Contains(inherited, name) && name != "OWN" && name != markName && name != roleName && name != "GORACE" {
			t.Errorf("the child has %s", name)
		}
	}
	for _, want := range []string{"OWN=1", "USER=given", "LANG=de_DE", "PATH=" + os.Getenv("PATH")} {
		if !slices.Contains(got.Env, want) {
			t.Errorf("the child has no %s", want)
		}
	}
}

func TestManyCallsShareAProcess(t *testing.T) {
	s, _ := run(t, "echo", Options{})
	p := acquire(t, s)
	const senders, each = 8, 50
	padding := strings.Repeat("x", 10_000) // more than a pipe takes at once
	var all sync.WaitGroup
	for i := range senders {
		all.Go(func() {
			for j := range each {
				if err := p.Send(t.Context(), fmt.Appendf(nil, "%d %d %s", i, j, padding)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	next := [senders]int{}
	for range senders * each {
		var i, j int
		var rest string
		if _, err := fmt.Sscanf(read(t, p), "%d %d %s", &i, &j, &rest); err != nil || rest != padding || next[i] != j {
			t.Fatalf("line %d of sender %d: %v", j, i, err)
		}
		next[i]++
	}
	all.Wait()
	if err := p.Send(t.Context(), []byte("two\nlines")); !errors.Is(err, ErrNotSent) {
		t.Errorf("a line with a break: %v", err)
	}
}

func TestPool(t *testing.T) {
	s, _ := run(t, "echo", Options{MaxProcesses: 2})
	a, b := acquire(t, s), acquire(t, s)

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if !s.Full() {
		t.Error("two of two are not all")
	}
	_, err := s.Acquire(ctx)
	if e := call.AsError(err); e.Code != call.Exhausted || !strings.Contains(e.Message, "all 2 processes") || e.RetryAfter == 0 {
		t.Errorf("a third: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err := s.Acquire(ctx); call.AsError(err).Code != call.Canceled {
		t.Errorf("canceled: %v", err)
	}

	got := make(chan *Process)
	go func() {
		p, err := s.Acquire(t.Context())
		if err != nil {
			t.Error(err)
		}
		got <- p
	}()
	a.Release()
	a.Release() // once more does no harm
	if p := <-got; p != a {
		t.Error("who waits does not get what is released")
	}
	a.Release()
	b.Release()
	for range 3 {
		p := acquire(t, s)
		if p != b {
			t.Error("the process used last is not the one used next")
		}
		p.Release()
	}
	if st := s.Stats(); st != (Stats{Running: 2, Starts: 2}) || s.Full() {
		t.Errorf("%+v, full: %v", st, s.Full())
	}

	b = acquire(t, s)
	b.Kill()
	b.Release()
	if e := ended(t, b); !e.State.Success() {
		t.Errorf("the input ended, and: %v", e)
	}
	if err := b.Send(t.Context(), []byte("x")); !errors.Is(err, ErrNotSent) {
		t.Errorf("after the end: %v", err)
	}
	if acquire(t, s) != a {
		t.Error("the free one was not taken")
	}
	a.Release()
	a.Kill() // by somebody who has it still
	if p := acquire(t, s); p == a || p == b {
		t.Error("a process was given out that ends")
	}
	if crashes := s.Stats().Crashes; crashes != 0 {
		t.Errorf("%d crashes, though all was asked for", crashes)
	}
}

// Many at once, with all that can happen: never more processes than places.
func TestPoolUnderLoad(t *testing.T) {
	s, stop := run(t, "echo", Options{MaxProcesses: 3, IdleTimeout: 12 * time.Millisecond, MaxLifetime: 50 * time.Millisecond})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 20 {
				p, err := s.Acquire(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if n := s.Stats().Running; n > 3 {
					t.Errorf("%d processes", n)
				}
				if p.Send(t.Context(), []byte("x")) == nil { // an idle one may have just been ended
					_, _ = p.Read()
				}
				if (i+j)%5 == 0 {
					p.Kill()
				} else {
					p.Release()
				}
			}
		})
	}
	all.Wait()
	stop()
	if crashes := s.Stats().Crashes; crashes != 0 {
		t.Errorf("%d crashes", crashes)
	}
}

func TestIdleProcessesEnd(t *testing.T) {
	s, _ := run(t, "echo", Options{IdleTimeout: 50 * time.Millisecond})
	used, idle := acquire(t, s), acquire(t, s)
	released := time.Now()
	idle.Release()
	if e := ended(t, idle); !errors.Is(e, errIdle) || time.Since(released) < 50*time.Millisecond {
		t.Errorf("after %v: %v", time.Since(released), e)
	}
	send(t, used, "still there")
	read(t, used)
}

// A process that is retired keeps a place until it is gone.
func TestRetiredProcessesKeepTheirPlace(t *testing.T) {
	s, _ := run(t, "stubborn", Options{MaxProcesses: 1, IdleTimeout: 20 * time.Millisecond, KillGrace: 50 * time.Millisecond})
	p := acquire(t, s)
	read(t, p)
	p.Release()
	<-p.ending
	next := acquire(t, s)
	if n := s.Stats().Running; next == p || n != 1 {
		t.Errorf("%d processes for one place", n)
	}
}

func TestOldProcessesEndWhenFree(t *testing.T) {
	s, _ := run(t, "echo", Options{MaxLifetime: 60 * time.Millisecond})
	free, used := acquire(t, s), acquire(t, s)
	free.Release()
	if e := ended(t, free); !errors.Is(e, errTooOld) {
		t.Error(e)
	}
	eventually(t, "old", func() bool { return time.Since(used.began) > 100*time.Millisecond })
	send(t, used, "still there")
	read(t, used)
	used.Release()
	if !used.isEnding() {
		t.Error("it was too old when it was released, and may be given out again")
	}
	if e := ended(t, used); !errors.Is(e, errTooOld) {
		t.Error(e)
	}
	if crashes := s.Stats().Crashes; crashes != 0 {
		t.Errorf("%d crashes", crashes)
	}
}

func TestHowItEnded(t *testing.T) {
	for _, tt := range []struct {
		role   string
		lines  int
		reason error // or nil: itself, or by the end of its output, whichever was seen first
		state  string
		stderr string
	}{
		{"crash", 0, nil, "exit status 3", `complaint 4|complaint 5|complaint 6|\x1b[31mred\x1b[0m`},
		{"crash:2", 2, nil, "exit status 3", `complaint 3|complaint 4|complaint 5|complaint 6|\x1b[31mred\x1b[0m`},
		{"die", 0, nil, "signal: killed", ""},
		{"mute", 0, errNoOutput, "signal: terminated", ""},
	} {
		t.Run(tt.role, func(t *testing.T) {
			s, _ := run(t, tt.role, Options{})
			p := acquire(t, s)
			for range tt.lines {
				send(t, p, "x")
				read(t, p)
			}
			_, err := p.Read()
			e := ended(t, p)
			if err != p.Err() {
				t.Errorf("Read failed with %v", err)
			}
			if tt.reason != nil && !errors.Is(e, tt.reason) || tt.reason == nil && !errors.Is(e, errItself) && !errors.Is(e, errNoOutput) {
				t.Errorf("reason: %v", e.Reason)
			}
			if !strings.HasPrefix(e.State.String(), tt.state) {
				t.Errorf("state: %v", e.State)
			}
			if got := strings.Join(e.Stderr, "|"); !strings.Contains(got, tt.stderr) || len(e.Stderr) > 5 {
				t.Errorf("stderr: %s", got)
			}
			if st := s.Stats(); st != (Stats{Starts: 1, Crashes: 1}) {
				t.Errorf("%+v", st)
			}
		})
	}
}

func TestCrashLoop(t *testing.T) {
	s, _ := run(t, "crash", Options{BackoffBase: 300 * time.Millisecond})
	began := time.Now()
	for crash := int64(1); crash <= 2; crash++ {
		p := acquire(t, s)
		<-p.Done()
		_, err := s.Acquire(t.Context())
		e := call.AsError(err)
		if e.Code != call.Unavailable || !e.Retryable || e.RetryAfter <= 0 {
			t.Fatalf("after crash %d: %v", crash, err)
		}
		if !strings.Contains(e.Message, "keeps crashing") || strings.Contains(e.Message, "complaint") {
			t.Errorf("message: %s", e.Message)
		}
		<-time.After(e.RetryAfter + time.Millisecond)
		if crashes := s.Stats().Crashes; crashes != crash {
			t.Errorf("%d crashes, want %d", crashes, crash)
		}
	}
	if all := time.Since(began); all < 150*time.Millisecond+300*time.Millisecond {
		t.Errorf("two pauses took %v together", all)
	}
}

func TestCrashDoesNotTakeFreeOnes(t *testing.T) {
	s, _ := run(t, "crash:1", Options{BackoffBase: time.Hour, BackoffMax: time.Hour})
	a, b := acquire(t, s), acquire(t, s)
	send(t, a, "x")
	ended(t, a)
	b.Release()
	if acquire(t, s) != b {
		t.Error("the free one was not given out while the program rests")
	}
	if _, err := s.Acquire(t.Context()); call.AsError(err).Code != call.Unavailable {
		t.Error(err)
	}
}

func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(Options{Command: "sh"})
		if err != nil {
			t.Fatal(err)
		}
		crash := func(lived time.Duration) time.Duration {
			s.forget(&Process{crashed: true, began: time.Now().Add(-lived)})
			return time.Until(s.notBefore)
		}
		for i, want := range []time.Duration{100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000, 30000} {
			want *= time.Millisecond
			if got := crash(time.Second); got < want/2 || got > want {
				t.Errorf("pause %d is %v, want %v or down to half", i, got, want)
			}
		}
		if got := crash(stableAfter); got > 100*time.Millisecond {
			t.Errorf("after a stable life: %v", got)
		}
		crash(0)
		s.forget(&Process{began: time.Now().Add(-stableAfter)}) // no crash
		if got := crash(0); got > 100*time.Millisecond {
			t.Errorf("after another's stable life: %v", got)
		}
		if s.resting() == nil {
			t.Error("no pause")
		}
		time.Sleep(100 * time.Millisecond)
		if err := s.resting(); err != nil {
			t.Errorf("after the pause: %v", err)
		}
		pauses := map[time.Duration]bool{}
		for range 20 {
			pauses[crash(stableAfter)] = true
		}
		if len(pauses) < 2 {
			t.Error("no chance in it")
		}
	})
}

func TestProgramThatCannotBeStarted(t *testing.T) {
	file := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(file, []byte("#!/no/such/interpreter\n"), 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	var out log
	s, err := New(Options{Command: file, Name: "broken", Logger: out.logger()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	_, err = s.Acquire(ctx)
	e := call.AsError(err)
	if e.Code != call.Unavailable || e.RetryAfter <= 0 || !strings.Contains(e.Message, `"broken"`) || strings.Contains(e.Message, file) {
		t.Errorf("got %v, message %s", err, e.Message)
	}
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(out.String(), "could not be started") {
		t.Errorf("cause %v, log %s", err, out.String())
	}
	cancel()
	<-done
	if _, err := s.Acquire(t.Context()); call.AsError(err).Code != call.Unavailable {
		t.Errorf("after Run: %v", err)
	}
	if err := s.Run(t.Context()); err == nil {
		t.Error("Run ran twice")
	}
	if len(s.places) != 0 {
		t.Errorf("%d places are taken", len(s.places))
	}
}

func TestAcquireNeedsRun(t *testing.T) {
	s, err := New(Options{Command: "sh", StartTimeout: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Acquire(t.Context()); call.AsError(err).Code != call.Unavailable || len(s.places) != 0 {
		t.Errorf("got %v, %d places are taken", err, len(s.places))
	}
}

func TestStubbornProcessIsKilled(t *testing.T) {
	s, _ := run(t, "stubborn", Options{KillGrace: 50 * time.Millisecond})
	p := acquire(t, s)
	read(t, p)
	asked := time.Now()
	p.Kill()
	if e := ended(t, p); e.State.String() != "signal: killed" || !errors.Is(e, errKilled) {
		t.Error(e)
	}
	if took := time.Since(asked); took < 100*time.Millisecond {
		t.Errorf("it had %v of two graces of 50 ms", took)
	}
}

func TestRunEndsAll(t *testing.T) {
	s, stop := run(t, "stubborn", Options{KillGrace: 20 * time.Millisecond, MaxProcesses: 3})
	all := []*Process{acquire(t, s), acquire(t, s), acquire(t, s)}
	for _, p := range all {
		read(t, p)
	}
	all[0].Release()
	waiting := make(chan error)
	taken := acquire(t, s)
	go func() {
		_, err := s.Acquire(context.Background())
		waiting <- err
	}()
	stop()
	if err := <-waiting; call.AsError(err).Code != call.Unavailable {
		t.Errorf("who waited got %v", err)
	}
	taken.Release()
	for _, p := range all {
		select {
		case <-p.Done():
		default:
			t.Error("Run has returned before a process ended")
		}
		if err := syscall.Kill(p.cmd.Process.Pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("the process is there still: %v", err)
		}
	}
	if crashes := s.Stats().Crashes; crashes != 0 {
		t.Errorf("%d crashes", crashes)
	}
}

func TestDeafProcessIsEnded(t *testing.T) {
	s, _ := run(t, "deaf", Options{})
	big := bytes.Repeat([]byte("x"), 1<<20) // more than a pipe holds

	p := acquire(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := p.Send(ctx, big); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrNotSent) {
		t.Errorf("half a line: %v", err)
	}
	if e := ended(t, p); !errors.Is(e, errDeaf) {
		t.Error(e)
	}
	if crashes := s.Stats().Crashes; crashes != 1 {
		t.Errorf("%d crashes", crashes)
	}
}

// A process that is only slow outlives callers who go away, but not one who waits until the deadline.
func TestSlowProcessAndImpatientCallers(t *testing.T) {
	s, _ := run(t, "deaf", Options{})
	p := acquire(t, s)
	fill := bytes.Repeat([]byte("x"), 4095) // with its end just what a pipe takes whole or not at all
	var err error
	for err == nil {
		ctx, cancel := context.WithCancel(t.Context())
		late := time.AfterFunc(50*time.Millisecond, cancel)
		err = p.Send(ctx, fill)
		late.Stop()
		cancel()
	}
	if !errors.Is(err, ErrNotSent) || !errors.Is(err, context.Canceled) {
		t.Fatalf("the one who went away got %v", err)
	}
	if p.isEnding() {
		t.Fatal("one who went away has ended the process")
	}

	// One writes, another waits for its turn; only the one in turn measures the child.
	first, cancel := context.WithCancel(t.Context())
	sent := make(chan error)
	go func() { sent <- p.Send(first, fill) }()
	eventually(t, "somebody writes", func() bool { return len(p.writing) == 1 })
	second, cancelSecond := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancelSecond()
	if err := p.Send(second, fill); !errors.Is(err, ErrNotSent) || p.isEnding() {
		t.Errorf("the one behind: %v", err)
	}
	cancel()
	if err := <-sent; !errors.Is(err, ErrNotSent) {
		t.Error(err)
	}

	late, cancelLate := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancelLate()
	if err := p.Send(late, fill); !errors.Is(err, ErrNotSent) || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if e := ended(t, p); !errors.Is(e, errDeaf) {
		t.Error(e)
	}
}

func TestSendEndsWithTheProcess(t *testing.T) {
	s, _ := run(t, "deaf", Options{})
	p := acquire(t, s)
	read(t, p)
	sent := make(chan error, 2)
	for range 2 { // one writes, one waits
		go func() { sent <- p.Send(context.Background(), bytes.Repeat([]byte("x"), 1<<20)) }()
	}
	eventually(t, "somebody writes", func() bool { return len(p.writing) == 1 })
	p.Kill()
	for range 2 {
		if err := <-sent; !errors.Is(err, errKilled) {
			t.Error(err)
		}
	}
	ended(t, p)
}

func TestLinesAreBounded(t *testing.T) {
	const most = 200_000 // more than the buffers on the way
	for _, tt := range []struct {
		role string
		ok   bool
	}{{"long:" + strconv.Itoa(most), true}, {"long:" + strconv.Itoa(most+1), false}, {"endless", false}} {
		t.Run(tt.role, func(t *testing.T) {
			s, _ := run(t, tt.role, Options{MaxLine: most})
			p := acquire(t, s)
			line, err := p.Read()
			if tt.ok {
				if err != nil || len(line) != most || read(t, p) != "short" {
					t.Errorf("%d bytes, %v", len(line), err)
				}
				return
			}
			if !errors.Is(err, ErrLineTooLong) {
				t.Errorf("%d bytes, %v", len(line), err)
			}
			if e := ended(t, p); !errors.Is(e, ErrLineTooLong) || e.State.Success() {
				t.Error(e)
			}
		})
	}
}

func TestGarbageIsTheCallers(t *testing.T) {
	s, _ := run(t, "garbage", Options{})
	p := acquire(t, s)
	if got := read(t, p); got != "\x00\xff{" {
		t.Errorf("%q", got)
	}
	if got := read(t, p); got != "" {
		t.Errorf("%q", got)
	}
	if line, err := p.Read(); err == nil {
		t.Errorf("a line that was cut off: %q", line)
	}
}

// What was written before the end is read, however late.
func TestNothingIsLostAtTheEnd(t *testing.T) {
	s, _ := run(t, "count:5000", Options{KillGrace: 10 * time.Second})
	p := acquire(t, s)
	<-p.Done()
	for i := range 5000 {
		if got := read(t, p); got != strconv.Itoa(i) {
			t.Fatalf("line %d is %q", i, got)
		}
	}
	if _, err := p.Read(); err != p.Err() {
		t.Error(err)
	}
}

func TestFloodOfStandardError(t *testing.T) {
	var out log
	s, stop := run(t, "flood:20000", Options{Logger: out.logger(), MaxStderr: 1000})
	p := acquire(t, s)
	send(t, p, "hello")
	if read(t, p) != "hello" { // it is not held up
		t.Error("no echo")
	}
	stop()
	text := out.String()
	if !strings.Contains(text, `line="line 0 of a flood \\a"`) || strings.Contains(text, "\x07") {
		t.Errorf("no first line, or a control character: %.500s", text)
	}
	if n := strings.Count(text, "msg=stderr"); n < 30 || n > 400 {
		t.Errorf("%d lines passed", n)
	}
	if !strings.Contains(text, "some was dropped") {
		t.Error("nothing says that some was dropped")
	}
}

func TestTeller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out log
		r, w := io.Pipe()
		teller := teller{perSecond: 10, log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{
			ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
					return slog.Attr{}
				}
				return a
			},
		}))}
		done := make(chan struct{})
		go func() { teller.tell(r); close(done) }()
		say := func(s string) {
			_, _ = io.WriteString(w, s)
			synctest.Wait()
		}
		say("12345\n123\n")
		say("1234\n")  // over the bound
		say("1\n\r\n") // would fit, but comes after
		time.Sleep(time.Second)
		say("next")
		say(" one\r\n")
		say("again more\n")
		_ = w.Close()
		<-done
		const about = `msg="the process writes too much to standard error; some was dropped"`
		want := "msg=stderr line=12345\nmsg=stderr line=123\n" + about + " lines=2 bytes=5\nmsg=stderr line=\"next one\"\n" + about + " lines=1 bytes=10\n"
		if out.String() != want {
			t.Errorf("got\n%swant\n%s", out.String(), want)
		}
		if got := strings.Join(teller.last(), "|"); got != "123|1234|1|next one|again more" {
			t.Errorf("last: %s", got)
		}
	})
}

func TestEscape(t *testing.T) {
	for in, want := range map[string]string{
		"plain \"text\" \\n {}": "plain \"text\" \\n {}",
		"\x1b[2Jx\r\t\x00":      `\x1b[2Jx\r\t\x00`,
		"größe €":               "größe €",
		"\xff\xc3":              `\xff\xc3`,
		"a\u202eb\u2028":        `a\u202eb\u2028`,
	} {
		if got := escape([]byte(in)); got != want {
			t.Errorf("%q became %s, want %s", in, got, want)
		}
	}
}

// BenchmarkEcho is a line there and back; BenchmarkStart a process from its start to its end.
func BenchmarkEcho(b *testing.B) {
	s, stop := supervise(b)
	defer stop()
	p, err := s.Acquire(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	line := bytes.Repeat([]byte("x"), 200)
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Send(b.Context(), line); err != nil {
			b.Fatal(err)
		}
		if _, err := p.Read(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStart(b *testing.B) {
	s, stop := supervise(b)
	defer stop()
	for b.Loop() {
		p, err := s.Acquire(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		p.Kill()
		<-p.Done()
	}
}

// supervise runs cat(1), which costs next to nothing.
func supervise(b *testing.B) (*Supervisor, func()) {
	b.Helper()
	s, err := New(Options{Command: "cat"})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	return s, func() { cancel(); <-done }
}
