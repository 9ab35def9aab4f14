// Command hostile attacks a real newel process from outside, while a neighbour goes on making good
// calls, and checks what the attack costs.
//
//	go run ./test/hostile                        # or: make faults
//	go run ./test/hostile -only E11 -streams 10000
//
// Start reading at [scenarios]. Four programs take part: newel, with a bound of memory; the attackers,
// in niced processes of their own at another address (attack.go); a server behind newel that is
// hostile itself (upstream.go); and this one, which is the neighbour (neighbour.go), the good server that
// it calls, and the judge. docs/reliability.md tells the method. The last line is one JSON object; the
// exit code is 1 if something did not hold. It needs Linux.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"newel.dev/newel/test/program"
)

// budget is the memory that the process may have.
const budget = 512 << 20

// cpuPerRefusal is what one refused request may cost.
const cpuPerRefusal = 50 * time.Millisecond

type options struct {
	only    string
	streams int
	binary  string
	dir     string
	out     io.Writer
}

func main() {
	if len(os.Args) > 1 && (os.Args[1] == "attack" || os.Args[1] == "upstream") {
		if err := serve(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
			os.Exit(1)
		}
		return
	}
	o := options{out: os.Stdout}
	flag.StringVar(&o.only, "only", "all", "scenarios: all, or names with commas")
	flag.IntVar(&o.streams, "streams", 2000, "open streams of E11")
	flag.StringVar(&o.binary, "binary", "", "program to attack; default: it is built")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, &o); err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
		os.Exit(1)
	}
}

// serve is what this program is to itself.
func serve(what string, args []string) error {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0) // the judge is gone
	}()
	if what == "upstream" && len(args) == 1 {
		return serveUpstream(args[0])
	}
	if what == "attack" && len(args) == 3 {
		most, err := time.ParseDuration(args[2])
		if err != nil {
			return err
		}
		return attack(args[0], args[1], most)
	}
	return errors.New("wrong arguments")
}

// A scenario is one fault. It returns an error only if it could not be run: what did not hold is
// told to the stage.
type scenario struct {
	name, what string
	do         func(ctx context.Context, s *stage) error
}

func scenarios() []scenario {
	return []scenario{
		{"E4", "slow clients and a slow server", slow},
		{"E5", "garbage from a server", garbage},
		{"E6", "answers and lists without end", endless},
		{"E11", "many streams", streams},
		{"E12", "bombs from clients", bombs},
		{"E12 lists", "bombs in what a server lists", listed},
		{"floods", "of streams, sessions and unknown keys", floods},
	}
}

// A finding is what did not hold.
type finding struct {
	Scenario string `json:"scenario"`
	What     string `json:"what"`
}

// A figure is one number of a scenario, with what it may be at most; 0: nothing.
type figure struct {
	Scenario string  `json:"scenario"`
	Name     string  `json:"name"`
	Value    float64 `json:"value"`
	Most     float64 `json:"most,omitzero"`
	Unit     string  `json:"unit"`
}

func run(ctx context.Context, o *options) (err error) {
	if o.dir, err = os.MkdirTemp("", "newel-hostile-"); err != nil {
		return err
	}
	if o.binary == "" {
		o.binary = filepath.Join(o.dir, "newel")
		if err := program.Build(ctx, o.binary, program.Newel); err != nil {
			return err
		}
	}
	begun := time.Now()
	var found []finding
	var figures []figure
	ran := 0
	for _, sc := range scenarios() {
		if o.only != "all" && !slices.Contains(strings.Split(o.only, ","), sc.name) {
			continue
		}
		ran++
		s := &stage{o: o, name: sc.name, seen: map[string]int{}}
		at := time.Now()
		fmt.Fprintf(o.out, "%s: %s\n", sc.name, sc.what)
		err := sc.do(ctx, s)
		s.end()
		for _, f := range s.figures {
			fmt.Fprintf(o.out, "  %s\n", f)
		}
		for _, f := range s.found {
			fmt.Fprintf(o.out, "  VIOLATION: %s\n", f.What)
		}
		fmt.Fprintf(o.out, "  %.0f s\n", time.Since(at).Seconds())
		found, figures = append(found, s.found...), append(figures, s.figures...)
		if err != nil {
			return fmt.Errorf("%s: %w; what was written is in %s", sc.name, err, o.dir)
		}
	}
	if ran == 0 {
		return fmt.Errorf("there is no scenario %q", o.only)
	}
	line, err := json.Marshal(struct {
		Violations int       `json:"violations"`
		Found      []finding `json:"found"`
		Figures    []figure  `json:"figures"`
		Seconds    int       `json:"seconds"`
	}{len(found), found, figures, int(time.Since(begun).Seconds())})
	if err != nil {
		return err
	}
	fmt.Fprintf(o.out, "%s\n", line)
	if len(found) > 0 {
		return fmt.Errorf("%d violations; what was written is in %s", len(found), o.dir)
	}
	return os.RemoveAll(o.dir)
}

// String is one line of the table.
func (f figure) String() string {
	out := fmt.Sprintf("%-46s %10.4g %s", f.Name, f.Value, f.Unit)
	if f.Most > 0 {
		out += fmt.Sprintf(" (at most %.4g)", f.Most)
	}
	return out
}
