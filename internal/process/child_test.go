//go:build unix

package process

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// roleName is the variable that makes the test binary a child with one of these roles.
const roleName = "PROCESS_TEST_ROLE"

// roles are what children do. An argument follows the name after a colon.
var roles = map[string]func(arg string){
	"echo":     func(string) { echo(-1) },
	"crash":    crash,
	"count":    count,
	"die":      func(string) { _ = syscall.Kill(os.Getpid(), syscall.SIGKILL); forever() },
	"stubborn": stubborn,
	"family":   family,
	"sleep":    func(string) { forever() },
	"deaf":     func(string) { fmt.Println("ready"); forever() },
	"endless":  endless,
	"long":     long,
	"flood":    flood,
	"show":     show,
	"mute":     func(string) { _ = os.Stdout.Close(); forever() },
	"garbage":  func(string) { _, _ = os.Stdout.WriteString("\x00\xff{\r\n\n{\"cut\":"); os.Exit(0) },
	"spin":     func(string) { fmt.Println("ready"); spin() },
	"fugitive": fugitive,
}

func TestMain(m *testing.M) {
	name, arg, _ := strings.Cut(os.Getenv(roleName), ":")
	if name == "" {
		os.Exit(m.Run())
	}
	if role, ok := roles[name]; ok {
		role(arg)
	} else {
		systemRole(name, arg)
	}
	os.Exit(0)
}

func forever() { <-time.After(time.Hour) }

// echo answers every line with itself, n lines at most, until the end of its input.
func echo(n int) {
	in := bufio.NewReader(os.Stdin)
	for ; n != 0; n-- {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		_, _ = os.Stdout.WriteString(line)
	}
}

// crash complains and exits with code 3; it answers arg lines before.
func crash(arg string) {
	n, _ := strconv.Atoi(arg)
	echo(n)
	for i := range 7 {
		fmt.Fprintf(os.Stderr, "complaint %d\n", i)
	}
	fmt.Fprint(os.Stderr, "\x1b[31mred\x1b[0m")
	os.Exit(3)
}

// count writes arg lines and ends.
func count(arg string) {
	n, _ := strconv.Atoi(arg)
	out := bufio.NewWriter(os.Stdout)
	for i := range n {
		fmt.Fprintln(out, i)
	}
	_ = out.Flush()
}

// stubborn ignores all that asks it to end.
func stubborn(string) {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	fmt.Println("ready")
	forever()
}

// self is a command that runs this program with another role.
func self(role string, attr *syscall.SysProcAttr) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleName+"="+role)
	cmd.SysProcAttr = attr
	return cmd
}

// family starts a child of its own group, one that leaves the group, an orphan and an orphan that
// leaves the group, writes their numbers, and answers one line before it ends.
func family(string) {
	var pids []int
	for _, attr := range []*syscall.SysProcAttr{nil, {Setsid: true}} {
		cmd := self("sleep", attr)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr // they hold the pipes open
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		pids = append(pids, cmd.Process.Pid)
	}
	for _, setsid := range []string{"", "setsid "} {
		out, err := exec.Command("/bin/sh", "-c", setsid+`sleep 1000 >/dev/null 2>&1 & echo $!`).Output()
		if err != nil {
			panic(err)
		}
		pid, _ := strconv.Atoi(strings.TrimSpace(string(out)))
		pids = append(pids, pid)
	}
	_ = json.NewEncoder(os.Stdout).Encode(pids)
	echo(1)
}

// endless writes a line without end.
func endless(string) {
	b := make([]byte, 64<<10)
	for i := range b {
		b[i] = 'x'
	}
	for {
		if _, err := os.Stdout.Write(b); err != nil {
			return
		}
	}
}

// long writes a line of arg bytes, and then a short one.
func long(arg string) {
	n, _ := strconv.Atoi(arg)
	fmt.Println(strings.Repeat("x", n))
	fmt.Println("short")
	forever()
}

// flood writes arg lines to standard error, then answers.
func flood(arg string) {
	n, _ := strconv.Atoi(arg)
	for i := range n {
		fmt.Fprintf(os.Stderr, "line %d of a flood \x07\n", i)
	}
	echo(-1)
}

// show writes what it was given.
func show(string) {
	dir, _ := os.Getwd()
	_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"args": os.Args[1:], "env": os.Environ(), "dir": dir})
	echo(-1)
}

func spin() {
	for i := 0; ; i++ {
		_ = i
	}
}

// fugitive starts what cannot be found, which holds all pipes open, writes its number and ends.
func fugitive(string) {
	cmd := self("sleep", &syscall.SysProcAttr{Setsid: true})
	cmd.Env = []string{roleName + "=sleep"}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	fmt.Println(cmd.Process.Pid)
}
