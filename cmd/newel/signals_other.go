//go:build !unix

package main

import (
	"errors"
	"net"
	"os"
)

// notify does nothing: this system has no such signals. newel reload, and saving the file, work.
func notify(_, _ chan<- os.Signal) {}

// closeOnExec does nothing: nothing is handed over here.
func closeOnExec(uintptr) {}

// duplicate refuses: nothing is handed over here.
func duplicate(*net.TCPListener) (*os.File, error) { return nil, errors.ErrUnsupported }
