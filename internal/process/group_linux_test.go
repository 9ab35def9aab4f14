package process

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// systemRole runs the roles that only this system can play: programs that have a supervisor.
func systemRole(name, arg string) {
	switch name {
	case "host": // has a child of the role arg, writes its number
		p := host(arg)
		if _, err := p.Read(); err != nil { // else it would end because nobody reads what it writes
			panic(err)
		}
		fmt.Println(p.cmd.Process.Pid)
		forever()
	case "subreaper": // has a family; all orphans below become its own
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			panic(err)
		}
		subreaper(arg)
	case "orphan": // starts an orphan that ends when its input does, writes its number
		cmd := exec.Command("/bin/sh", "-c", `cat <&3 >/dev/null 2>&1 3<&- & echo $!`)
		hold, held, err := os.Pipe()
		if err != nil {
			panic(err)
		}
		cmd.ExtraFiles = []*os.File{hold}
		out, err := cmd.Output()
		if err != nil {
			panic(err)
		}
		_ = hold.Close()
		fmt.Print(string(out))
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		_ = held.Close() // it ends now
		forever()
	}
}

// host is a supervisor in a program of its own, with one child.
func host(role string) *Process {
	s, err := New(Options{Command: os.Args[0], Env: []string{roleName + "=" + role}, KillGrace: 100 * time.Millisecond, IdleTimeout: 50 * time.Millisecond})
	if err != nil {
		panic(err)
	}
	go func() { _ = s.Run(context.Background()) }()
	p, err := s.Acquire(context.Background())
	if err != nil {
		panic(err)
	}
	return p
}

// subreaper writes how many processes are below it, zombies too, before and after an end.
func subreaper(how string) {
	role := "family"
	if how == "orphan" {
		role = "orphan"
	}
	p := host(role)
	if _, err := p.Read(); err != nil {
		panic(err)
	}
	fmt.Println(descendants())
	switch how {
	case "kill":
		p.Kill()
		<-p.Done()
	case "crash":
		_ = p.Send(context.Background(), nil)
		<-p.Done()
	case "orphan": // the child lives on
		_ = p.Send(context.Background(), nil)
		for range time.Tick(5 * time.Millisecond) {
			if descendants() == 1 {
				break
			}
		}
	}
	fmt.Println(descendants())
}

// descendants counts the processes below this one.
func descendants() int {
	children := map[int][]int{}
	eachProcess(func(pid int) {
		if s, ok := status(pid); ok {
			children[s.parent] = append(children[s.parent], pid)
		}
	})
	n := 0
	next := []int{os.Getpid()}
	for len(next) > 0 {
		below := children[next[0]]
		n += len(below)
		next = append(next[1:], below...)
	}
	return n
}

// dead reports whether a process does nothing any more: it is a zombie at most, until whoever has
// it reaps it.
func dead(pid int) bool {
	s, ok := status(pid)
	return !ok || s.state == 'Z' || s.state == 'X'
}

func TestDescendantsEndWithTheProcess(t *testing.T) {
	for name, end := range map[string]func(*Process, func()){
		"kill":  func(p *Process, _ func()) { p.Kill() },
		"crash": func(p *Process, _ func()) { _ = p.Send(context.Background(), []byte("end")) },
		"run":   func(_ *Process, stop func()) { stop() },
	} {
		t.Run(name, func(t *testing.T) {
			s, stop := run(t, "family", Options{})
			p := acquire(t, s)
			var pids []int
			if err := json.Unmarshal([]byte(read(t, p)), &pids); err != nil || len(pids) != 4 {
				t.Fatal(pids, err)
			}
			eventually(t, "two of four leave the group", func() bool {
				own := 0
				for _, pid := range pids {
					if s, _ := status(pid); s.group == p.cmd.Process.Pid && !dead(pid) {
						own++
					}
				}
				return own == 2
			})
			end(p, stop)
			ended(t, p)
			for i, pid := range pids {
				if !dead(pid) {
					t.Errorf("process %d (%d) lives", i, pid)
				}
			}
		})
	}
}

// What cannot be found must not hold up the end, though it holds the pipes open.
func TestFugitiveDoesNotHoldUpTheEnd(t *testing.T) {
	s, stop := run(t, "fugitive", Options{})
	p := acquire(t, s)
	pid, err := strconv.Atoi(read(t, p))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(pid, syscall.SIGKILL) }()
	if _, err := p.Read(); err == nil {
		t.Error("Read has read")
	}
	ended(t, p)
	stop()
	if dead(pid) {
		t.Error("it was found: this tests nothing")
	}
}

// A supervisor in a program that gets the orphans leaves no zombie.
func TestOrphansAreReaped(t *testing.T) {
	for _, how := range []string{"kill", "crash", "orphan"} {
		t.Run(how, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), roleName+"=subreaper:"+how)
			out, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			want := "5\n0\n"
			if how == "orphan" {
				want = "2\n1\n"
			}
			if string(out) != want {
				t.Errorf("processes before and after: %q, want %q", out, want)
			}
		})
	}
}

func TestChildrenDieWithUs(t *testing.T) {
	cmd := self("host:stubborn", nil)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(pid, syscall.SIGKILL) }()
	if dead(pid) {
		t.Fatal("there is no child")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	eventually(t, "the child dies", func() bool { return dead(pid) })
}

// The kernel's promise is about threads. The end of one that has nothing to do with it must not
// take a child along.
func TestChildrenOutliveThreads(t *testing.T) {
	s, _ := run(t, "echo", Options{})
	var p *Process
	var err error
	thread := make(chan int)
	go func() { // a goroutine that ends with its thread locked ends the thread
		runtime.LockOSThread()
		p, err = s.Acquire(context.Background())
		thread <- unix.Gettid()
	}()
	tid := <-thread
	if err != nil {
		t.Fatal(err)
	}
	if tid != os.Getpid() { // the first thread never ends
		eventually(t, "the thread ends", func() bool {
			_, err := os.Stat("/proc/self/task/" + strconv.Itoa(tid))
			return errors.Is(err, os.ErrNotExist)
		})
	}
	send(t, p, "still there")
	if read(t, p) != "still there" || p.isEnding() {
		t.Error("the child is gone")
	}
}

// The child is a shell, as the race detector takes more memory than a child should.
func TestMemoryIsCapped(t *testing.T) {
	for _, tt := range []struct {
		bytes    string
		survives bool
	}{{"1000000", true}, {"100000000", false}} {
		s, _ := run(t, "", Options{
			Command: "/bin/sh", MemoryBytes: 50 << 20,
			Args: []string{"-c", `read go; text=$(head -c "$0" /dev/zero | tr '\0' x); echo ${#text}; read end`, tt.bytes},
		})
		p := acquire(t, s)
		send(t, p, "go") // the cap is there now
		line, err := p.Read()
		if (string(line) == tt.bytes) != tt.survives {
			t.Errorf("%s bytes: %q, %v", tt.bytes, line, err)
		}
	}
}

func TestProcessorTimeIsCapped(t *testing.T) {
	s, _ := run(t, "spin", Options{CPUSeconds: 1})
	p := acquire(t, s)
	read(t, p)
	e := ended(t, p)
	status, ok := e.State.Sys().(syscall.WaitStatus)
	if used := e.State.UserTime() + e.State.SystemTime(); !ok || !status.Signaled() || used < 900*time.Millisecond || used > 3*time.Second {
		t.Errorf("after %v: %v", used, e)
	}
}

func TestCapsKeepLowerLimits(t *testing.T) {
	s, _ := run(t, "echo", Options{CPUSeconds: 100})
	p := acquire(t, s)
	pid := p.cmd.Process.Pid
	if err := limit(pid, 0, 50); err != nil {
		t.Fatal(err)
	}
	if err := limit(pid, 0, 1000); err != nil {
		t.Fatal(err)
	}
	var got unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_CPU, nil, &got); err != nil || got != (unix.Rlimit{Cur: 51, Max: 51}) {
		t.Errorf("%+v, %v", got, err)
	}
	if err := limit(1<<22, 1<<30, 1); err != nil { // no such process
		t.Errorf("a child that has crashed already: %v", err)
	}
}
