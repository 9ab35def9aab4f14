package config

import (
	"fmt"
	"slices"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// Resilience is how much of the server one backend may take, and what happens while it fails.
type Resilience struct {
	Concurrency  int                 `yaml:"concurrency" above:"0" doc:"Most calls that each backend gets at once; default: a quarter of limits.max_concurrent_calls, or all if there is one backend only."`
	Queue        int                 `yaml:"queue" above:"0" doc:"Most calls that wait for each backend; default: half of concurrency."`
	QueueTimeout time.Duration       `yaml:"queue_timeout" above:"0" doc:"Longest wait for a backend; default: 1s."`
	Timeout      time.Duration       `yaml:"timeout" above:"0" doc:"Longest attempt at a backend; default: as long as the call may take."`
	Breaker      Breaker             `yaml:"breaker" doc:"When a backend that fails is left alone."`
	Retries      Retries             `yaml:"retries" doc:"Calls that are made again, where that does no harm."`
	Backends     []BackendResilience `yaml:"backends" doc:"Single backends, where they differ."`
}

// Breaker says when a backend that fails is left alone.
type Breaker struct {
	Failures int           `yaml:"failures" above:"0" doc:"Failures in a row; default: 5. A failure is a backend that cannot be reached, breaks off or does not answer in time, not one that says no."`
	Delay    time.Duration `yaml:"delay" above:"0" doc:"How long, before one call tries whether it works again; default: 5s."`
}

// Retries says which calls are made again.
type Retries struct {
	Attempts int     `yaml:"attempts" above:"0" doc:"Attempts of one call, the first included; default: 3. 1: no call is made again."`
	Budget   float64 `yaml:"budget" above:"0" doc:"Retries as a share of calls, at most 1; default: 0.1."`
}

// BackendResilience is a backend that differs.
type BackendResilience struct {
	Backend      string        `yaml:"backend" required:"true" doc:"Name of the backend."`
	Concurrency  int           `yaml:"concurrency" above:"0" doc:"Most calls that it gets at once."`
	Queue        int           `yaml:"queue" above:"0" doc:"Most calls that wait for it."`
	QueueTimeout time.Duration `yaml:"queue_timeout" above:"0" doc:"Longest wait for it."`
	Timeout      time.Duration `yaml:"timeout" above:"0" doc:"Longest attempt."`
	Breaker      Breaker       `yaml:"breaker" doc:"When it is left alone."`
	Retries      Retries       `yaml:"retries" doc:"Its calls that are made again."`
}

// resilience checks what the settings of backends are about.
func (d *decoder) resilience(root ast.Node) {
	r := &d.file.Config.Resilience
	node := child(root, "resilience")
	share := func(v float64, path string, n ast.Node) {
		if v > 1 {
			d.problem(where(child(child(n, "retries"), "budget")), path+".retries.budget", "is a share of calls, at most 1", "0.1 is one retry for ten calls")
		}
	}
	share(r.Retries.Budget, "resilience", node)
	list, _ := child(node, "backends").(*ast.SequenceNode)
	seen := map[string]bool{}
	for i := range r.Backends {
		b, path, n := &r.Backends[i], fmt.Sprintf("resilience.backends[%d]", i), list.Values[i]
		share(b.Retries.Budget, path, n)
		names := make([]string, len(d.file.Config.Backends))
		for j := range names {
			names[j] = d.file.Config.Backends[j].Name
		}
		switch {
		case b.Backend == "": // already a problem
		case !slices.Contains(names, b.Backend):
			d.problem(where(child(n, "backend")), path+".backend", fmt.Sprintf("there is no backend %q", b.Backend), suggest(b.Backend, names))
		case seen[b.Backend]:
			d.problem(where(child(n, "backend")), path+".backend", fmt.Sprintf("the backend %q is given twice", b.Backend), "")
		}
		seen[b.Backend] = true
	}
}
