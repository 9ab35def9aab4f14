package engines

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"newel.dev/newel/test/program"
)

// A RedisServer is a Redis server of one test. It keeps nothing on disk: a Restart finds it empty.
// Its methods are for one goroutine.
type RedisServer struct {
	URL string // how to connect, password included

	password string
	port     int
	bin      string

	keep   io.Closer
	done   chan struct{}
	output *program.Log
}

// Redis starts a Redis (or Valkey) server that stops at the end of tb.
func Redis(tb testing.TB) *RedisServer {
	tb.Helper()
	s := &RedisServer{password: rand.Text()}
	for _, name := range []string{"redis-server", "valkey-server"} {
		if p, err := exec.LookPath(name); err == nil {
			s.bin = p
		}
	}
	if s.bin == "" {
		tb.Fatal("this test needs a real Redis server and finds neither redis-server nor valkey-server; install one (Debian, Ubuntu: apt-get install redis-server; macOS: brew install redis)")
	}
	tb.Cleanup(s.Stop)
	for trial := 1; ; trial++ {
		var err error
		if s.port, err = freePort(); err != nil {
			tb.Fatal(err)
		}
		s.URL = "redis://:" + s.password + "@" + net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port))
		if err = s.launch(); err == nil {
			return s
		}
		if trial == portTrials {
			tb.Fatalf("Redis does not start: %v", err)
		}
	}
}

// Stop ends the server at once. It does nothing if the server does not run.
func (s *RedisServer) Stop() {
	if s.keep == nil {
		return
	}
	_ = s.keep.Close() // the pipe may be broken already: then the server has ended
	<-s.done
	s.keep = nil
}

// Restart starts a stopped server again, on the same port and with nothing in it.
func (s *RedisServer) Restart(tb testing.TB) {
	tb.Helper()
	s.Stop()
	if err := s.launch(); err != nil {
		tb.Fatalf("Redis does not start again: %v", err)
	}
}

func (s *RedisServer) launch() error {
	theirs, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	s.output = &program.Log{}
	cmd := exec.Command("/bin/sh", "-c", guardian("TERM"), "sh", s.bin, "--port", strconv.Itoa(s.port), "--bind", "127.0.0.1",
		"--requirepass", s.password, "--save", "", "--appendonly", "no", "--dir", os.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stdout, cmd.Stderr = s.output, s.output
	cmd.ExtraFiles = []*os.File{theirs} // file descriptor 3
	if err := cmd.Start(); err != nil {
		return errors.Join(err, ours.Close(), theirs.Close())
	}
	if err := theirs.Close(); err != nil {
		return errors.Join(err, ours.Close())
	}
	s.keep, s.done = ours, make(chan struct{})
	done := s.done
	go func() {
		defer close(done)
		_ = cmd.Wait() // how it ended does not matter; what it said is in output
	}()
	if err := s.ready(); err != nil {
		s.Stop()
		return fmt.Errorf("%w\n%s", err, s.output)
	}
	return nil
}

func (s *RedisServer) ready() error {
	o, err := redis.ParseURL(s.URL)
	if err != nil {
		return err
	}
	o.DialerRetries = 1
	c := redis.NewClient(o)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := c.Ping(ctx).Err()
		if err == nil {
			return nil
		}
		select {
		case <-s.done:
			return errors.New("the server ended")
		case <-ctx.Done():
			return fmt.Errorf("the server does not answer: %w", err)
		case <-tick.C:
		}
	}
}
