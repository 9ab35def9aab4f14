package process

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"newel.dev/newel/call"
)

// The test binary is also the child: PROCESS_TEST_CHILD says how it behaves.
func TestMain(m *testing.M) {
	if mode := os.Getenv("PROCESS_TEST_CHILD"); mode != "" {
		child(mode)
		return
	}
	os.Exit(m.Run())
}

func child(mode string) {
	switch mode {
	case "crash":
		fmt.Fprintln(os.Stderr, "no\x1b[31m luck")
		os.Exit(3)
	case "deaf": // reads nothing, does not end when asked
		ignoreTerm()
		<-time.After(time.Hour)
	case "endless":
		for {
			fmt.Print(strings.Repeat("x", 1<<16))
		}
	case "parent": // leaves a grandchild that keeps its pipes open
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "PROCESS_TEST_CHILD=deaf")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		fmt.Println(cmd.Process.Pid)
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if mode == "once" {
			os.Exit(1)
		}
		fmt.Println("echo " + in.Text() + os.Getenv("SECRET_OF_PARENT"))
	}
}

func supervisor(t *testing.T, mode string, o Options) *Supervisor {
	t.Helper()
	t.Setenv("SECRET_OF_PARENT", "leaked")
	o.Name, o.Command = mode, os.Args[0]
	o.Env = append(o.Env, "PROCESS_TEST_CHILD="+mode)
	if o.KillGrace == 0 {
		o.KillGrace = 50 * time.Millisecond
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := s.Stats().Running; n != 0 {
			t.Errorf("%d processes are left", n)
		}
	})
	return s
}

func acquire(t *testing.T, s *Supervisor) *Process {
	t.Helper()
	p, err := s.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestEcho(t *testing.T) {
	s := supervisor(t, "echo", Options{})
	p := acquire(t, s)
	for i := range 100 {
		if err := p.Send(t.Context(), []byte(strconv.Itoa(i))); err != nil {
			t.Fatal(err)
		}
		line, err := p.Read()
		if want := fmt.Sprintf("echo %d", i); err != nil || string(line) != want {
			t.Fatalf("got %q, %v, want %q: the child sees only the environment it is given", line, err, want)
		}
	}
	p.Kill()
	<-p.Done()
	if _, err := p.Read(); err == nil {
		t.Error("reads on after the end")
	}
	if s.Stats().Crashes != 0 {
		t.Error("an end that was asked for counts as a crash")
	}
}

func TestUnknownProgram(t *testing.T) {
	if _, err := New(Options{Command: "no-such-program-here"}); err == nil || !strings.Contains(err.Error(), "no-such-program-here") {
		t.Errorf("got %v", err)
	}
}

// A program that crashes is not started again at once, and the pauses grow.
func TestCrashLoop(t *testing.T) {
	s := supervisor(t, "crash", Options{BackoffBase: time.Hour, BackoffMax: time.Hour})
	p := acquire(t, s)
	<-p.Done()
	if err := p.Err(); err == nil || !strings.Contains(err.Error(), `no\x1b[31m luck`) || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("got %v: it must name the status and the last words, escaped", err)
	}
	_, err := s.Acquire(t.Context())
	if e := call.AsError(err); e.Code != call.Unavailable || e.RetryAfter < time.Minute {
		t.Errorf("got %v, %v", e, e.RetryAfter)
	}
	if st := s.Stats(); st.Starts != 1 || st.Crashes != 1 {
		t.Errorf("%+v", st)
	}
}

// A child that does not read holds nobody up for longer than his deadline, and is ended.
func TestDeafChild(t *testing.T) {
	s := supervisor(t, "deaf", Options{})
	p := acquire(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := p.Send(ctx, make([]byte, 1<<20)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	<-p.Done() // SIGTERM is ignored: SIGKILL is not
}

func TestEndlessLine(t *testing.T) {
	s := supervisor(t, "endless", Options{MaxLine: 1 << 20})
	p := acquire(t, s)
	if _, err := p.Read(); err == nil || !strings.Contains(err.Error(), "more than 1048576 bytes") {
		t.Errorf("got %v", err)
	}
	<-p.Done()
}

// What a child started ends with it, although it ignores SIGTERM and holds the pipes open.
func TestGrandchild(t *testing.T) {
	s := supervisor(t, "parent", Options{})
	p := acquire(t, s)
	line, err := p.Read()
	if err != nil {
		t.Fatal(err)
	}
	grandchild, err := strconv.Atoi(string(line))
	if err != nil {
		t.Fatal(err)
	}
	p.Kill()
	<-p.Done()
	for deadline := time.Now().Add(5 * time.Second); !gone(grandchild); {
		if time.Now().After(deadline) {
			t.Fatal("the grandchild lives")
		}
	}
}

// gone reports whether a process has ended; who collects it is not for this test.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return syscall.Kill(pid, 0) != nil
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(after, "Z") || strings.HasPrefix(after, "X")
}

func TestPlacesAreBounded(t *testing.T) {
	s := supervisor(t, "echo", Options{MaxProcesses: 2})
	first := acquire(t, s)
	acquire(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Acquire(ctx); call.AsError(err).Code != call.Exhausted || !s.Full() {
		t.Errorf("got %v", err)
	}
	first.Kill()
	acquire(t, s) // waits until the place is free
}

func TestEndDuringCall(t *testing.T) {
	s := supervisor(t, "once", Options{})
	p := acquire(t, s)
	if err := p.Send(t.Context(), []byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Read(); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("got %v", err)
	}
}
