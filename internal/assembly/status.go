package assembly

import (
	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/resilience"
)

// Status is how a house is, for people.
type Status struct {
	Calls     CallsStatus     `json:"calls"`
	Tasks     TasksStatus     `json:"tasks"`
	Approvals int64           `json:"approvals_pending"` // of all nodes, at most 256
	Servers   []ServerStatus  `json:"servers"`
	Backends  []BackendStatus `json:"backends"`
}

// CallsStatus is what runs on this node.
type CallsStatus struct {
	Running       int64  `json:"running"`
	Queued        int64  `json:"queued"`
	Subscriptions int64  `json:"subscriptions"`
	Overload      string `json:"overload,omitempty"` // what is refused to save memory
}

// TasksStatus is about tasks of all nodes.
type TasksStatus struct {
	Queued  int64 `json:"queued"`
	Running int64 `json:"running"`
	Waiting int64 `json:"waiting"`        // for answers of their callers
	Oldest  int64 `json:"oldest_seconds"` // in the queue
}

// ServerStatus is what one address shows those who may see all.
type ServerStatus struct {
	Address   string `json:"address"`
	Tools     int    `json:"tools"`
	Resources int    `json:"resources"` // and templates
	Prompts   int    `json:"prompts"`
}

// BackendStatus is how calls of one backend go.
type BackendStatus struct {
	resilience.Status
	Of call.Backend `json:"-"`
}

// overloads are what is refused, by the number that the gate says.
var overloads = [...]string{"", "new subscriptions and sessions", "tools that are not critical, new subscriptions and sessions", "all calls"}

// Status returns how the house is now.
func (h *House) Status() Status {
	t := h.kept.tasks
	s := Status{
		Calls:     CallsStatus{h.gate.Running(), h.gate.Queued(), h.gate.Streams(), overloads[h.gate.Overload()]},
		Tasks:     TasksStatus{t.Queued(), t.Running(), t.Waiting(), t.Oldest()},
		Approvals: h.approvals.Pending(),
	}
	for _, f := range h.faces {
		c := f.catalog.Load()
		s.Servers = append(s.Servers, ServerStatus{
			Address: f.server.Host + f.server.Path, Tools: len(c.Names(call.ListTools)), Prompts: len(c.Names(call.ListPrompts)),
			Resources: len(c.Names(call.ListResources)) + len(c.Names(call.ListTemplates)),
		})
	}
	for _, one := range h.Backends() {
		for _, b := range h.backends {
			if b.Name() == one.Name {
				s.Backends = append(s.Backends, BackendStatus{one, b})
			}
		}
	}
	return s
}
