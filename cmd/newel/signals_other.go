//go:build !unix

package main

import "os"

// notify does nothing: this system has no such signals. newel reload, and saving the file, work.
func notify(_, _ chan<- os.Signal) {}

// closeOnExec does nothing: nothing is handed over here.
func closeOnExec(uintptr) {}
