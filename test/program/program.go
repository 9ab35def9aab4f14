// Package program builds and runs the programs that are tested: Newel, and those around it.
//
// Tests hand themselves in ([Built], [Address], [Serve]); programs that test others get errors
// ([Build], [FreeAddress], [Start]).
package program

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Packages of programs.
const (
	Newel   = "newel.dev/newel/cmd/newel"
	Fixture = "newel.dev/newel/test/conformance/fixture" // a server with all that the official suite asks for
)

const (
	startTime = time.Minute // until a program does what it was started for
	endTime   = 30 * time.Second
	pollEvery = 5 * time.Millisecond
)

// Build builds a package into a file, without C as releases are, with the versions that Newel's module
// names. The folder that it is called in may be of any module that requires Newel's.
func Build(ctx context.Context, file, pkg string, flags ...string) error {
	file, err := filepath.Abs(file)
	if err != nil {
		return err
	}
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "newel.dev/newel").Output()
	if err != nil {
		return fmt.Errorf("finding the module: %w; run this inside a clone", err)
	}
	cmd := exec.CommandContext(ctx, "go", slices.Concat([]string{"build", "-o", file}, flags, []string{pkg})...)
	cmd.Dir = strings.TrimSpace(string(root))
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", pkg, err, out)
	}
	return nil
}

// built has the programs of the tests of one package.
var built struct {
	sync.Mutex
	dir string
}

// Built returns the path of a program, which is built when it is asked for first. The package's
// TestMain calls [Run], which removes it.
func Built(tb testing.TB, pkg string) string {
	tb.Helper()
	built.Lock()
	defer built.Unlock()
	if built.dir == "" {
		dir, err := os.MkdirTemp("", "newel-tests-")
		if err != nil {
			tb.Fatal(err)
		}
		built.dir = dir
	}
	file := filepath.Join(built.dir, path.Base(pkg))
	if _, err := os.Stat(file); err == nil {
		return file
	}
	if err := Build(tb.Context(), file, pkg); err != nil {
		tb.Fatal(err)
	}
	return file
}

// Run runs the tests of a package, removes the programs that they had built, and returns the exit code.
func Run(m *testing.M) int {
	defer func() { _ = os.RemoveAll(built.dir) }() // a temporary folder: the system clears it too
	return m.Run()
}

// FreeAddress returns a loopback address that nobody listens on now.
func FreeAddress() (string, error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// Address is [FreeAddress] for a test.
func Address(tb testing.TB) string {
	tb.Helper()
	addr, err := FreeAddress()
	if err != nil {
		tb.Fatal(err)
	}
	return addr
}

// A Log is what a program says: a buffer that is read while it is written. The zero value is empty. Its
// methods are safe for concurrent use.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String returns what was written so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A Process is a program that runs. Its methods are safe for concurrent use.
type Process struct {
	cmd  *exec.Cmd
	told atomic.Bool   // to end
	gone chan struct{} // closed when it has ended
	err  error         // how, then
	said string        // file with what it says, or ""
}

// Start starts a program. It does not outlive this one, where the system sees to that (Linux); its input,
// unless the command has one, is nothing, and ends when this program does.
func Start(cmd *exec.Cmd) (*Process, error) {
	bind(cmd)
	if cmd.Stdin == nil {
		if _, err := cmd.StdinPipe(); err != nil {
			return nil, err
		}
	}
	p := &Process{cmd: cmd, gone: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: a process that is bound ends with the thread that started it
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		p.err = cmd.Wait()
		close(p.gone)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// Serve starts a server for a test and waits until it is ready. It is told to end when the test ends: that
// it does not end well then, or has ended by itself, fails the test.
func Serve(tb testing.TB, cmd *exec.Cmd, ready func() bool) *Process {
	tb.Helper()
	// A file has what was said before an answer came; a pipe may hold it back.
	said, err := os.Create(filepath.Join(tb.TempDir(), "said"))
	if err != nil {
		tb.Fatal(err)
	}
	defer said.Close()
	cmd.Stderr = said
	if cmd.Stdout == nil {
		cmd.Stdout = said
	}
	p, err := Start(cmd)
	if err != nil {
		tb.Fatal(err)
	}
	p.said = said.Name()
	tb.Cleanup(func() {
		if err := p.End(endTime); err != nil {
			tb.Errorf("%s did not end well: %v", cmd.Path, err)
		}
		if tb.Failed() {
			tb.Logf("%s said:\n%.8000s", cmd.Path, p.Said())
		}
	})
	if err := p.Until(tb.Context(), "ready", ready); err != nil {
		tb.Fatal(err)
	}
	return p
}

// client has no connections that outlive a question.
var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}

// Ready asks whether a URL answers with 200.
func Ready(url string) func() bool {
	return func() bool {
		resp, err := client.Get(url)
		if err != nil {
			return false
		}
		return resp.Body.Close() == nil && resp.StatusCode == http.StatusOK
	}
}

// Until asks until it is so, for at most a minute. It is an error that the program ends before; what is
// for the text of errors.
func (p *Process) Until(ctx context.Context, what string, so func() bool) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for limit := time.After(startTime); !so(); {
		select {
		case <-p.gone:
			return fmt.Errorf("%s: the program ended: %v", what, p.err)
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, ctx.Err())
		case <-limit:
			return fmt.Errorf("%s: not within %v", what, startTime)
		case <-tick.C:
		}
	}
	return nil
}

// Said is what a program that [Serve] started has said so far, without its output if the command sends
// that elsewhere.
func (p *Process) Said() string {
	said, err := os.ReadFile(p.said)
	if err != nil {
		return err.Error()
	}
	return string(said)
}

// PID is the id of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Signal sends it a signal. It is an error if it has ended.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Ended waits for its end, for so long, and reports whether it has ended.
func (p *Process) Ended(most time.Duration) bool {
	select {
	case <-p.gone:
		return true
	default:
	}
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case <-p.gone:
		return true
	case <-t.C:
		return false
	}
}

// Err is how it ended; nil: well, or not yet.
func (p *Process) Err() error {
	if p.Ended(0) {
		return p.err
	}
	return nil
}

// Kill ends it at once and waits for that.
func (p *Process) Kill() {
	p.told.Store(true)
	_ = p.Signal(syscall.SIGKILL) // it may be gone
	<-p.gone
}

// End tells it to end and waits for that; after so long it is killed. The error says that it did not end
// well, or had ended before by itself. What was told to end, or killed, is only waited for.
func (p *Process) End(most time.Duration) error {
	if p.told.Swap(true) {
		<-p.gone
		return nil
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		<-p.gone
		return errors.Join(errors.New("it ended by itself"), p.err)
	}
	if !p.Ended(most) {
		p.Kill()
		return fmt.Errorf("it did not end within %v", most)
	}
	return p.err
}
