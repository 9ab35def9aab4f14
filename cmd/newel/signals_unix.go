//go:build unix

package main

import (
	"os"
	"os/signal"
	"syscall"
)

// notify passes on the signals that ask for another configuration, and for another process.
func notify(reload, restart chan<- os.Signal) {
	signal.Notify(reload, syscall.SIGHUP)
	signal.Notify(restart, syscall.SIGUSR2)
}

// closeOnExec keeps a descriptor from programs that this one starts.
func closeOnExec(fd uintptr) { syscall.CloseOnExec(int(fd)) }
