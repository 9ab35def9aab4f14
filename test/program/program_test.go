package program

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestMain is also the program: it says that it is there, and ends as its environment says.
func TestMain(m *testing.M) {
	switch os.Getenv("PROGRAM_TEST_CHILD") {
	case "":
		os.Exit(Run(m))
	case "waits":
		fmt.Println("here")
		_, _ = os.Stdin.Read(make([]byte, 1)) // until whoever started it has gone
	case "fails":
		os.Exit(3)
	}
}

func child(mode string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "PROGRAM_TEST_CHILD="+mode)
	return cmd
}

func TestProcess(t *testing.T) {
	log := &Log{}
	cmd := child("waits")
	cmd.Stdout = log
	p, err := Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Until(t.Context(), "there", func() bool { return log.String() == "here\n" }); err != nil {
		t.Fatal(err)
	}
	if p.Ended(0) || p.Err() != nil {
		t.Errorf("it ended: %v", p.Err())
	}
	if err := p.End(time.Minute); err == nil { // it does not listen to signals
		t.Error("it ended well")
	}
	if !p.Ended(0) || p.Err() == nil || p.Signal(os.Interrupt) == nil {
		t.Errorf("it lives: %v", p.Err())
	}
	if err := p.End(time.Minute); err != nil {
		t.Errorf("told again: %v", err)
	}
}

func TestProcessThatEndsByItself(t *testing.T) {
	p, err := Start(child("fails"))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Until(t.Context(), "ready", func() bool { return false }); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("waiting for it: %v", err)
	}
	if err := p.End(time.Minute); err == nil || !strings.Contains(err.Error(), "by itself") {
		t.Errorf("told to end: %v", err)
	}
	if _, err := Start(exec.Command("/no/such/program")); err == nil {
		t.Error("a program that is not there was started")
	}
}

func TestBuilt(t *testing.T) {
	file := Built(t, Fixture)
	if again := Built(t, Fixture); again != file {
		t.Errorf("built twice: %s and %s", file, again)
	}
	addr := Address(t)
	p := Serve(t, exec.Command(file, "-http="+addr), Ready("http://"+addr+"/ready"))
	p.Kill()
	if p.Err() == nil || p.Until(t.Context(), "serving", func() bool { return false }) == nil {
		t.Error("it serves")
	}
	p = Serve(t, exec.Command(file, "-no-such-flag"), func() bool { return true })
	if !p.Ended(time.Minute) || !strings.Contains(p.Said(), "-no-such-flag") {
		t.Errorf("it said %q", p.Said())
	}
	p.Kill() // that it ended by itself is right
	if err := Build(t.Context(), file+"-none", Newel+"/none"); err == nil {
		t.Error("built what is not there")
	}
}
