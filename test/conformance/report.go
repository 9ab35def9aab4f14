package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
)

// A Report is what the suite found, by "revision scenario".
type Report map[string]*Outcome

// An Outcome counts the checks of one scenario.
type Outcome struct {
	Passed int
	Failed []string // one line for every check that is not a success
}

// check is one entry of a checks.json of the suite.
type check struct {
	ID, Description, Status string
	ErrorMessage            string `json:"errorMessage"`
}

// resultDir matches the folder of one scenario's results: server-NAME-TIME.
var resultDir = regexp.MustCompile(`^(?:authorization-)?server-(.+)-\d{4}-\d{2}-\d{2}T[\d-]+Z$`)

// extension reports whether a scenario is of a protocol extension that is not served yet, or only a
// stub: the suite skips tasks-status-notifications itself; our own test has them (tasks_test.go).
func extension(scenario string) bool {
	return scenario == "tasks-status-notifications" || strings.HasPrefix(scenario, "sep-2640-")
}

// Read adds the results that one run of the suite left in dir.
func (r Report) Read(revision, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		m := resultDir.FindStringSubmatch(e.Name())
		if m == nil || extension(m[1]) {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(dir, e.Name(), "checks.json"))
		if err != nil {
			return fmt.Errorf("the suite left no checks of %s: %w", m[1], err)
		}
		var checks []check
		if err := json.Unmarshal(raw, &checks, json.MatchCaseInsensitiveNames(true)); err != nil {
			return fmt.Errorf("checks of %s: %w", m[1], err)
		}
		key := revision + " " + m[1]
		if r[key] == nil {
			r[key] = &Outcome{}
		}
		r[key].add(checks)
	}
	return nil
}

// ReadClient adds the results of one scenario for clients. The suite checks each request, and how
// many there are is for the client to say: every kind of check counts once. said is what the suite
// had to say about a client that failed.
func (r Report) ReadClient(revision, scenario, dir, said string) error {
	var file string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "checks.json" {
			file = path
		}
		return err
	})
	if err != nil || file == "" {
		return fmt.Errorf("the suite left no checks: %w; it said: %s", err, said)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var checks []check
	if err := json.Unmarshal(raw, &checks, json.MatchCaseInsensitiveNames(true)); err != nil {
		return err
	}
	seen := map[[2]string]bool{}
	o := &Outcome{}
	for _, c := range checks {
		if kind := [2]string{c.ID, c.Status}; !seen[kind] {
			seen[kind] = true
			o.add([]check{c})
		}
	}
	if said != "" && len(o.Failed) == 0 {
		o.Failed = []string{"the client failed: " + said}
	}
	r["client/"+revision+" "+scenario] = o
	return nil
}

func (o *Outcome) add(checks []check) {
	for _, c := range checks {
		switch c.Status {
		case "SUCCESS":
			o.Passed++
		case "INFO": // a remark of the suite, not a check
		default:
			o.Failed = append(o.Failed, strings.TrimSpace(fmt.Sprintf("%s %s: %s %s", c.Status, c.ID, c.Description, c.ErrorMessage)))
		}
	}
}

// Expectation is the content of scenarios.txt for this report.
func (r Report) Expectation() []byte {
	var b bytes.Buffer
	b.WriteString("# Scenarios of the official suite that must run, with the number of checks that must pass.\n# Written by: go run ./test/conformance -update\n")
	for _, key := range slices.Sorted(maps.Keys(r)) {
		fmt.Fprintf(&b, "%s %d\n", key, r[key].Passed)
	}
	return b.Bytes()
}

// Print writes a line for every scenario and counts checks. A check that should have run and did
// not counts as failed.
func (r Report) Print(out io.Writer, expectation []byte) (passed, failed int, err error) {
	want, err := parse(expectation)
	if err != nil {
		return 0, 0, err
	}
	keys := map[string]bool{}
	for k := range want {
		keys[k] = true
	}
	for k := range r {
		keys[k] = true
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		o := r[key]
		if o == nil {
			o = &Outcome{}
		}
		bad := slices.Clone(o.Failed)
		for missing := want[key] - o.Passed - len(o.Failed); missing > 0; missing-- {
			bad = append(bad, "MISSING a check that scenarios.txt expects did not run")
		}
		verdict := "ok  "
		if len(bad) > 0 {
			verdict = "FAIL"
		}
		revision, scenario, _ := strings.Cut(key, " ")
		fmt.Fprintf(out, "%s  %s  %-46s %3d passed %3d failed\n", verdict, revision, scenario, o.Passed, len(bad))
		for _, line := range bad {
			fmt.Fprintln(out, "      ", line)
		}
		passed += o.Passed
		failed += len(bad)
	}
	return passed, failed, nil
}

// parse reads scenarios.txt.
func parse(text []byte) (map[string]int, error) {
	want := map[string]int{}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Fields(line)
		if len(f) != 3 {
			return nil, fmt.Errorf("scenarios.txt:%d: want revision, scenario and number of checks, have %q", n, line)
		}
		checks, err := strconv.Atoi(f[2])
		if err != nil {
			return nil, fmt.Errorf("scenarios.txt:%d: %w", n, err)
		}
		want[f[0]+" "+f[1]] = checks
	}
	if len(want) == 0 {
		return nil, fmt.Errorf("scenarios.txt expects no scenario at all")
	}
	return want, lines.Err()
}
