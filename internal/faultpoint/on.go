//go:build faults && linux

package faultpoint

import (
	"bytes"
	"context"
	"net"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// On says that the program is built for these tests.
const On = true

// File is the variable that names the file with the point that is armed. A point is followed by
// the word stop if the process is to be stopped there, and not killed.
const File = "NEWEL_FAULTPOINT"

// Reached ends the process if the point is armed. The file is removed first: it happens once.
func Reached(p Point) {
	stop := is(p + " stop")
	if !stop && !is(p) {
		return
	}
	if os.Remove(os.Getenv(File)) != nil {
		return // another one was faster
	}
	if stop {
		// Sent to this thread, it stops before it goes on here; sent to the process, it takes a moment.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_ = unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGSTOP)
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // it takes a moment
}

// Armed reports whether a fault that lasts is armed.
func Armed(p Point) bool { return is(p) }

func is(p Point) bool {
	b, err := os.ReadFile(os.Getenv(File))
	return err == nil && string(bytes.TrimSpace(b)) == string(p)
}

// Names is the variable with the address of the name server of a test; without it the system's are
// asked.
const Names = "NEWEL_FAULTS_DNS"

// Resolver returns one that asks the name server of the test.
func Resolver() *net.Resolver {
	at := os.Getenv(Names)
	if at == "" {
		return nil
	}
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", at)
	}}
}

// Now returns the time, later by as much as stands in the file beside that of the points.
func Now() time.Time {
	now := time.Now()
	b, err := os.ReadFile(os.Getenv(File) + ".clock")
	if err != nil {
		return now
	}
	later, err := time.ParseDuration(strings.TrimSpace(string(b)))
	if err != nil {
		return now
	}
	return now.Add(later)
}
