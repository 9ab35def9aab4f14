// Command conformance runs the official MCP conformance suite against the fixture server, both
// revisions on one URL, and expects no failure at all.
//
//	go run ./test/conformance           # or: make conformance
//	go run ./test/conformance -update   # after a new suite: rewrite scenarios.txt, review the diff
//	go run ./test/conformance -gateway  # or: make conformance-gateway: the same through the gateway
//	go run ./test/conformance -auth     # or: make conformance-auth: the authorization server for development,
//	                                    # and the gateway as a client of servers that ask for access tokens
//
// Start reading at [run]. Which scenarios must run, and with how many checks, is written in
// scenarios.txt: a scenario that silently stops checking fails like one that checks and fails.
// Warnings and skipped checks fail too; the suite itself counts both as green. Only scenarios of
// protocol extensions that Newel does not serve are left out, see [extension].
//
// It needs npm; the Node that runs the suite comes from package-lock.json.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
)

// revisions are the requirement sets of the suite. Both run against the same server.
var revisions = []string{"2025-11-25", "2026-07-28"}

// atOnce is how many suites run side by side: they wait most of the time.
const atOnce = 3

func main() {
	update := flag.Bool("update", false, "write scenarios.txt from this run instead of comparing with it")
	gateway := flag.Bool("gateway", false, "run the suite through the gateway, in front of servers of every era and transport")
	auth := flag.Bool("auth", false, "run the scenarios of authorization servers, and those of their clients")
	driven := flag.String("drive", "", "be the client under test, with this gateway: the suite starts it so")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *driven != "" {
		if err := drive(ctx, *driven, flag.Arg(0)); err != nil {
			fmt.Fprintln(os.Stderr, "drive:", err)
			stop()
			os.Exit(1)
		}
		return
	}
	if err := run(ctx, os.Stdout, *update, *gateway, *auth); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		stop()
		os.Exit(1)
	}
}

// run is the whole way: install, build, start, ask, judge.
func run(ctx context.Context, out io.Writer, update, gateway, auth bool) error {
	root, err := moduleRoot(ctx)
	if err != nil {
		return err
	}
	here := filepath.Join(root, "test", "conformance")
	temp, err := os.MkdirTemp("", "newel-conformance-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)

	if err := install(ctx, here); err != nil {
		return err
	}
	got := Report{}
	var subjects []subject
	if auth {
		err = authorization(ctx, here, temp, got)
	} else {
		subjects, err = subjectsOf(ctx, temp, gateway)
	}
	if err != nil {
		return err
	}
	failures := make([]error, len(subjects))
	room := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for i := range subjects {
		all.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			failures[i] = subjects[i].ask(ctx, here, temp)
		})
	}
	all.Wait()
	if err := errors.Join(failures...); err != nil {
		return err
	}
	for i := range subjects {
		if err := subjects[i].add(got, temp); err != nil {
			return err
		}
	}

	list := filepath.Join(here, "scenarios.txt")
	switch {
	case auth:
		list = filepath.Join(here, "auth-scenarios.txt")
	case gateway:
		list = filepath.Join(here, "gateway-scenarios.txt")
	}
	want := got.Expectation()
	if !update {
		if want, err = os.ReadFile(list); err != nil {
			return err
		}
	}
	passed, failed, err := got.Print(out, want)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "conformance: %d passed, %d failed\n", passed, failed)
	if failed > 0 {
		return errors.New("not conformant; the lines marked FAIL say where")
	}
	if update {
		return os.WriteFile(list, want, 0o644)
	}
	return nil
}

func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "newel.dev/newel").Output()
	if err != nil {
		return "", fmt.Errorf("finding the module: %w; run this inside a clone", err)
	}
	return string(out[:len(out)-1]), nil
}

// install runs npm ci, unless what is installed already is what the lock file says.
func install(ctx context.Context, here string) error {
	lock, err := os.ReadFile(filepath.Join(here, "package-lock.json"))
	if err != nil {
		return err
	}
	stamp := filepath.Join(here, "node_modules", ".installed-lock")
	if have, err := os.ReadFile(stamp); err == nil && string(have) == string(lock) {
		return nil
	}
	npm := exec.CommandContext(ctx, "npm", "ci", "--no-fund", "--no-audit", "--loglevel=error")
	npm.Dir, npm.Stdout, npm.Stderr = here, os.Stderr, os.Stderr
	if err := npm.Run(); err != nil {
		return fmt.Errorf("npm ci in test/conformance: %w; the suite needs npm and the network once", err)
	}
	return os.WriteFile(stamp, lock, 0o644)
}

// suite runs one requirement set. Its exit code is not asked: the results are.
func suite(ctx context.Context, here, url, revision, results string) error {
	bin := filepath.Join(here, "node_modules", ".bin")
	log, err := os.Create(results + ".log")
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "node"), filepath.Join(bin, "conformance"),
		"server", "--url", url, "--requirements", revision, "-o", results)
	cmd.Dir, cmd.Stdout, cmd.Stderr = here, log, log
	err = cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("starting the suite: %w", err)
	}
	if _, err := os.Stat(results); err != nil {
		said, _ := os.ReadFile(log.Name()) // only to say more
		return fmt.Errorf("the suite wrote no results for %s: %s", revision, said)
	}
	return nil
}
