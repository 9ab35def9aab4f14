package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"newel.dev/newel/test/program"
)

// upstreams runs the suite's scenarios for clients that get access tokens, with the gateway as the
// client: see [drive].
func upstreams(ctx context.Context, here, temp, newel string, got Report) error {
	self := filepath.Join(temp, "drive")
	if err := program.Build(ctx, self, "newel.dev/newel/test/conformance"); err != nil {
		return err
	}
	list, err := clientScenarios(ctx, here)
	if err != nil {
		return err
	}
	room := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	var mu sync.Mutex
	var problems []error
	for _, s := range list {
		all.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			results := filepath.Join(temp, "client", s.revision, s.name)
			said, err := s.run(ctx, here, self+" -drive "+newel, results)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				err = got.ReadClient(s.revision, s.name, results, said)
			}
			if err != nil {
				problems = append(problems, fmt.Errorf("%s %s: %w", s.revision, s.name, err))
			}
		})
	}
	all.Wait()
	return errors.Join(problems...)
}

// clientScenario is one scenario at one revision.
type clientScenario struct{ name, revision string }

// listed matches a line of the suite's list: the name, and the revisions or that it is an extension.
var listed = regexp.MustCompile(`(?m)^\s*- (auth/\S+) \[([^\]]+)\]`)

// clientScenarios asks the suite which there are. Extensions are of no revision: they run at both.
func clientScenarios(ctx context.Context, here string) ([]clientScenario, error) {
	bin := filepath.Join(here, "node_modules", ".bin")
	text, err := exec.CommandContext(ctx, filepath.Join(bin, "node"), filepath.Join(bin, "conformance"), "list", "--client").Output()
	if err != nil {
		return nil, fmt.Errorf("asking the suite for its scenarios: %w", err)
	}
	var out []clientScenario
	for _, m := range listed.FindAllStringSubmatch(string(text), -1) {
		at := strings.Split(strings.ReplaceAll(m[2], "extension", strings.Join(revisions, ",")), ",")
		for _, revision := range at {
			out = append(out, clientScenario{m[1], revision})
		}
	}
	if len(out) == 0 {
		return nil, errors.New("the suite has no scenarios for clients that get access tokens")
	}
	return out, nil
}

// run runs one scenario. What the suite says comes back if it thinks that the client failed.
func (s *clientScenario) run(ctx context.Context, here, command, results string) (said string, err error) {
	bin := filepath.Join(here, "node_modules", ".bin")
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "node"), filepath.Join(bin, "conformance"),
		"client", "--command", command, "--scenario", s.name, "--spec-version", s.revision, "--force", "-o", results)
	cmd.Dir = here
	text, err := cmd.CombinedOutput()
	if os.Getenv("CONFORMANCE_LOG") != "" {
		fmt.Fprintf(os.Stderr, "%s\n", text)
	}
	if _, failed := errors.AsType[*exec.ExitError](err); failed {
		return string(text), nil
	}
	return "", err
}
