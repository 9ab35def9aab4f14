//go:build unix

package main

import (
	"net"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// notify passes on the signals that ask for another configuration, and for another process.
func notify(reload, restart chan<- os.Signal) {
	signal.Notify(reload, syscall.SIGHUP)
	signal.Notify(restart, syscall.SIGUSR2)
}

// closeOnExec keeps a descriptor from programs that this one starts.
func closeOnExec(fd uintptr) { syscall.CloseOnExec(int(fd)) }

// duplicate returns another descriptor of a socket. That of net.TCPListener.File would make the
// socket a blocking one, in this process too, as soon as a program is started with it: then Accept
// does not end any more.
func duplicate(l *net.TCPListener) (*os.File, error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var failed error
	if err := raw.Control(func(s uintptr) { fd, failed = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, os.NewSyscallError("fcntl", failed)
	}
	return os.NewFile(uintptr(fd), "listener"), nil
}
