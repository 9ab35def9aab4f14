// Package engines starts the real database servers that tests need.
//
// Start reading at [Start]. A server runs on a free port of the loopback interface, with its data
// in a temporary folder, and is gone when the test is: also when the test process is killed. Nothing is
// skipped: if a server cannot be started, the test fails and says what to install.
//
// It leaves schemas and rows to the tests. Unix only: PostgreSQL refuses to run as root, so as root
// the server gets another user's credentials.
package engines

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"newel.dev/newel/test/program"
)

const (
	superuser  = "newel"
	startTime  = 30 * time.Second // a loaded machine needs several
	stopTime   = 10 * time.Second
	tryTime    = 2 * time.Second
	pollEvery  = 20 * time.Millisecond
	portTrials = 5
)

// Postgres starts a PostgreSQL server for tb and returns how to connect to an empty database on it.
func Postgres(tb testing.TB) (dsn string) {
	tb.Helper()
	return Start(tb).Database(tb)
}

// A Server is a PostgreSQL server of one test. Its methods may be used by subtests in parallel,
// but Stop and Restart by one test at a time.
type Server struct {
	bin      string // folder of the programs
	data     string
	password string
	as       *syscall.SysProcAttr
	port     int
	synced   bool

	mu        sync.Mutex
	databases int

	// Set by launch, cleared by Stop.
	keep   io.Closer     // the server runs until this is closed
	done   chan struct{} // closed when the server has ended
	group  int           // process group, for the last resort
	output *program.Log
}

// Start starts a server that stops at the end of tb.
func Start(tb testing.TB) *Server {
	tb.Helper()
	return start(tb, &Server{password: rand.Text()})
}

// StartSynced starts a server that syncs what it commits, as in production: for measuring.
func StartSynced(tb testing.TB) *Server {
	tb.Helper()
	return start(tb, &Server{password: rand.Text(), synced: true})
}

func start(tb testing.TB, s *Server) *Server {
	tb.Helper()
	var err error
	if s.bin, err = find(); err != nil {
		tb.Fatal(err)
	}
	if s.as, err = unprivileged(); err != nil {
		tb.Fatal(err)
	}
	// Not tb.TempDir: another user has to reach it.
	root, err := os.MkdirTemp("", "newel-postgres-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		s.Stop()
		if err := os.RemoveAll(root); err != nil {
			tb.Errorf("removing the server's data: %v", err)
		}
	})
	if s.as.Credential != nil {
		if err := os.Chown(root, int(s.as.Credential.Uid), int(s.as.Credential.Gid)); err != nil {
			tb.Fatal(err)
		}
	}
	s.data = filepath.Join(root, "data")
	if err := s.initialize(); err != nil {
		tb.Fatal(err)
	}
	for trial := 1; ; trial++ {
		if s.port, err = freePort(); err != nil {
			tb.Fatal(err)
		}
		// Somebody else can take the port before the server does: then take another.
		if err = s.launch(); err == nil {
			return s
		}
		if trial == portTrials {
			tb.Fatalf("PostgreSQL does not start: %v", err)
		}
	}
}

// Database makes an empty database and returns how to connect to it.
func (s *Server) Database(tb testing.TB) (dsn string) {
	tb.Helper()
	s.mu.Lock()
	s.databases++
	name := "test" + strconv.Itoa(s.databases)
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(tb.Context(), startTime)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.dsn("postgres"))
	if err != nil {
		tb.Fatal(err)
	}
	_, err = conn.Exec(ctx, "CREATE DATABASE "+name)
	if err := errors.Join(err, conn.Close(ctx)); err != nil {
		tb.Fatal(err)
	}
	return s.dsn(name)
}

// Stop ends the server at once, as a crash would: connections break. It does nothing if the server
// does not run.
func (s *Server) Stop() {
	if s.keep == nil {
		return
	}
	_ = s.keep.Close() // the pipe may be broken already: then the server has ended
	select {
	case <-s.done:
	case <-time.After(stopTime):
		_ = syscall.Kill(-s.group, syscall.SIGKILL) // gone is what we want
		<-s.done
	}
	s.keep = nil
}

// Restart starts a stopped server again, on the same port and data.
func (s *Server) Restart(tb testing.TB) {
	tb.Helper()
	s.Stop()
	if err := s.launch(); err != nil {
		tb.Fatalf("PostgreSQL does not start again: %v", err)
	}
}

func (s *Server) dsn(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(superuser, s.password),
		Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)), Path: "/" + database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// find returns the folder of the newest PostgreSQL programs.
func find() (string, error) {
	if p, err := exec.LookPath("initdb"); err == nil {
		// PATH may hold links; the server looks for its files beside the real program.
		if p, err = filepath.EvalSymlinks(p); err == nil && isProgram(filepath.Join(filepath.Dir(p), "postgres")) {
			return filepath.Dir(p), nil
		}
	}
	var found []string
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin/initdb", "/usr/pgsql-*/bin/initdb", "/opt/homebrew/opt/postgresql*/bin/initdb"} {
		m, err := filepath.Glob(pattern)
		if err != nil {
			return "", err
		}
		for _, p := range m {
			if dir := filepath.Dir(p); isProgram(filepath.Join(dir, "postgres")) {
				found = append(found, dir)
			}
		}
	}
	if len(found) == 0 {
		return "", errors.New("this test needs a real PostgreSQL server and finds no initdb and postgres; install them (Debian, Ubuntu: apt-get install postgresql; macOS: brew install postgresql)")
	}
	return slices.MaxFunc(found, func(a, b string) int {
		return cmp.Or(cmp.Compare(version(a), version(b)), strings.Compare(a, b))
	}), nil
}

// version returns the first number in a path, or 0.
func version(path string) int {
	digits := strings.FieldsFunc(path, func(r rune) bool { return r < '0' || r > '9' })
	if len(digits) == 0 {
		return 0
	}
	n, err := strconv.Atoi(digits[0])
	if err != nil {
		return 0
	}
	return n
}

func isProgram(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// unprivileged returns how to start the server: as root in another user's name.
func unprivileged() (*syscall.SysProcAttr, error) {
	as := &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() != 0 {
		return as, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return nil, err
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			return nil, err
		}
		as.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		return as, nil
	}
	return nil, errors.New("this test runs as root, PostgreSQL refuses to, and there is neither a user postgres nor nobody")
}

// initialize makes the data folder.
func (s *Server) initialize() error {
	pwfile := filepath.Join(filepath.Dir(s.data), "password")
	if err := os.WriteFile(pwfile, []byte(s.password+"\n"), 0o600); err != nil {
		return err
	}
	if s.as.Credential != nil {
		if err := os.Chown(pwfile, int(s.as.Credential.Uid), int(s.as.Credential.Gid)); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "initdb"), "--pgdata", s.data, "--username", superuser,
		"--pwfile", pwfile, "--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync")
	cmd.Dir, cmd.SysProcAttr = filepath.Dir(s.data), s.as
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return os.Remove(pwfile)
}

// freePort returns a port that nobody listens on now.
func freePort() (int, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		return 0, fmt.Errorf("an unexpected address %v", l.Addr())
	}
	return addr.Port, l.Close()
}

// guardian starts the server and stops it when its input ends: so the server dies with us, even if
// we are killed. It is told with a signal that the server takes in the background, where the shell
// has it ignore some.
func guardian(signal string) string {
	return `"$@" </dev/null & pid=$!; (read -r _; kill -` + signal + ` $pid) <&3 >/dev/null 2>&1 & wait $pid`
}

// launch starts the server and returns when it takes connections.
func (s *Server) launch() error {
	theirs, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	s.output = &program.Log{}
	args := []string{"-c", guardian("QUIT"), "sh", // immediate shutdown
		filepath.Join(s.bin, "postgres"), "-D", s.data, "-p", strconv.Itoa(s.port),
		"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=100"}
	if !s.synced {
		// The data lives as long as the machine runs: what is written, though not synced, survives Stop.
		args = append(args, "-c", "fsync=off", "-c", "full_page_writes=off", "-c", "shared_buffers=16MB", "-c", "autovacuum=off")
	}
	cmd := exec.Command("/bin/sh", args...)
	cmd.Dir, cmd.SysProcAttr = filepath.Dir(s.data), s.as
	cmd.Stdout, cmd.Stderr = s.output, s.output
	cmd.ExtraFiles = []*os.File{theirs} // file descriptor 3
	if err := cmd.Start(); err != nil {
		return errors.Join(err, ours.Close(), theirs.Close())
	}
	if err := theirs.Close(); err != nil {
		return errors.Join(err, ours.Close())
	}
	s.keep, s.done, s.group = ours, make(chan struct{}), cmd.Process.Pid
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

// ready waits until the server answers.
func (s *Server) ready() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := s.try(ctx)
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

// try connects once. Whoever else holds the port may never answer.
func (s *Server) try(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.dsn("postgres"))
	if err != nil {
		return err
	}
	return conn.Close(ctx)
}
