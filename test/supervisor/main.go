// Command supervisor shows that the process supervisor leaves nothing behind: 1,000 sessions of
// a child process that itself starts another one, 200 of which crash.
//
//	go run ./test/supervisor   # or: make supervisor-soak
//
// The last line is one JSON object. It fails if a process or a zombie is left. It needs /proc.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"newel.dev/newel/internal/process"
)

const (
	sessions = 1000
	crashes  = 200
	atOnce   = 8
	childEnv = "NEWEL_SOAK_CHILD"
)

func main() {
	switch os.Getenv(childEnv) {
	case "server":
		serve()
		return
	case "helper":
		_, _ = io.Copy(io.Discard, os.Stdin) // until its parent or the supervisor ends it
		<-time.After(time.Hour)
	}
	if err := run(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "supervisor-soak:", err)
		os.Exit(1)
	}
}

// serve is the child: it starts a helper of its own, echoes lines, and crashes when told to.
func serve() {
	helper := exec.Command(os.Args[0])
	helper.Env = []string{childEnv + "=helper"}
	in, err := helper.StdinPipe()
	if err == nil {
		err = helper.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	defer in.Close()
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if lines.Text() == "crash" {
			os.Exit(3)
		}
		fmt.Println(lines.Text())
	}
}

type outcome struct {
	Before   int `json:"processes_before"`
	After    int `json:"processes_after"`
	Zombies  int `json:"zombies"`
	Sessions int `json:"sessions"`
	Crashes  int `json:"crashes"`
}

func run(out io.Writer) error {
	before, _, err := family()
	if err != nil {
		return err
	}
	s, err := process.New(process.Options{
		Name: "soak", Command: os.Args[0], Env: []string{childEnv + "=server"}, MaxProcesses: atOnce,
		KillGrace: 200 * time.Millisecond, BackoffBase: time.Microsecond, BackoffMax: time.Millisecond,
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()

	bar := term.IsTerminal(int(os.Stderr.Fd())) //nolint:gosec // a file descriptor fits
	work := make(chan int)
	failed := make(chan error, atOnce)
	var all sync.WaitGroup
	for range atOnce {
		all.Go(func() {
			for i := range work {
				if err := session(ctx, s, i); err != nil {
					select {
					case failed <- fmt.Errorf("session %d: %w", i, err):
					default:
					}
				}
			}
		})
	}
	for i := range sessions {
		work <- i
		if bar && i%10 == 9 {
			fmt.Fprintf(os.Stderr, "\r%d of %d sessions", i+1, sessions)
		}
	}
	close(work)
	all.Wait()
	if bar {
		fmt.Fprint(os.Stderr, "\r\033[K")
	}
	cancel()
	if err := <-ended; err != nil {
		return err
	}
	select {
	case err := <-failed:
		return err
	default:
	}
	st := s.Stats()
	after, zombies, err := settle(before)
	if err != nil {
		return err
	}
	o := outcome{Before: before, After: after, Zombies: zombies, Sessions: int(st.Starts), Crashes: int(st.Crashes)}
	line, err := json.Marshal(o)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, string(line))
	switch {
	case after != before || zombies != 0:
		return errors.New("processes are left")
	case o.Sessions < sessions || o.Crashes < crashes:
		return errors.New("it did not do all it should")
	}
	return nil
}

// session is one life of a process: a few lines, then its end or its crash.
func session(ctx context.Context, s *process.Supervisor, i int) error {
	ctx, stop := context.WithTimeout(ctx, 20*time.Second)
	defer stop()
	var p *process.Process
	for p == nil {
		var err error
		if p, err = s.Acquire(ctx); err != nil {
			t := time.NewTimer(time.Millisecond) // it backs off after crashes
			select {
			case <-ctx.Done():
				return err
			case <-t.C:
			}
		}
	}
	defer func() { <-p.Done() }()
	for _, line := range []string{"one", "two"} {
		if err := p.Send(ctx, []byte(line)); err != nil {
			return err
		}
		if got, err := p.Read(); err != nil || string(got) != line {
			p.Kill()
			return fmt.Errorf("got %q: %w", got, err)
		}
	}
	if i%(sessions/crashes) == 0 {
		return p.Send(ctx, []byte("crash"))
	}
	p.Kill()
	return nil
}

// settle waits for the system to collect what was killed, at most two seconds.
func settle(want int) (processes, zombies int, err error) {
	deadline, again := time.After(2*time.Second), time.NewTicker(10*time.Millisecond)
	defer again.Stop()
	for {
		processes, zombies, err = family()
		if err != nil || processes == want && zombies == 0 {
			return processes, zombies, err
		}
		select {
		case <-deadline:
			return processes, zombies, nil
		case <-again.C:
		}
	}
}

// family counts the processes of this program, wherever they hang in the tree, and the zombies
// among them: what it started carries its mark in the environment or its path.
func family() (processes, zombies int, err error) {
	self, err := os.Executable()
	if err != nil {
		return 0, 0, err
	}
	name := filepath.Base(self)
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil || len(stats) == 0 {
		return 0, 0, errors.New("this needs /proc")
	}
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it ended meanwhile
		}
		open, end := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
		if open < 0 || end < open || string(stat[open+1:end]) != name[:min(len(name), 15)] {
			continue
		}
		if strings.HasPrefix(string(stat[end+1:]), " Z") {
			zombies++
		}
		processes++
	}
	return processes, zombies, nil
}
