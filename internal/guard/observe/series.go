package observe

import (
	"log/slog"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"newel.dev/newel/call"
)

// label is what distinguishes measurements of one target.
type label struct {
	kind    call.Kind
	outcome string
	code    call.Code
}

// A series is what measurements and records of one label have in common.
type series struct {
	log      slog.Handler          // writes method, outcome and name of what resolved by itself
	full     []metric.RecordOption // labels, with outcome and error
	plain    []metric.RecordOption // method and name only
	plainAdd []metric.AddOption
}

// allSeries keeps them per target: making attribute sets is most of the cost of a measurement, and
// writing the same attributes again a good part of that of a record. Only what resolved has an entry
// of its own, so the number is that of what was registered; a catalog that changes all the time cannot
// make it grow, see maxTargets.
type allSeries struct {
	targets sync.Map // *call.Capability (nil for none) to *target
	count   atomic.Int64
}

// maxTargets bounds how many targets have series; past it all are forgotten.
const maxTargets = 8192

type target struct {
	ok   [len(methods)]atomic.Pointer[series] // by kind, for calls that succeed
	rest sync.Map                             // label to *series
}

// Forget lets go of targets that are not published any more; those that are come again.
func (o *Observer) Forget() {
	o.series.targets.Clear()
	o.series.count.Store(0)
}

func (l *allSeries) of(o *Observer, c *call.Call) *series {
	v, found := l.targets.Load(c.Target)
	if !found {
		if l.count.Add(1) > maxTargets {
			l.targets.Clear()
			l.count.Store(1)
		}
		v, _ = l.targets.LoadOrStore(c.Target, &target{})
	}
	t, _ := v.(*target)
	kind := kindOf(c)
	if c.Event.Outcome == ok {
		s := t.ok[kind].Load()
		if s == nil {
			s = newSeries(o, c)
			t.ok[kind].Store(s)
		}
		return s
	}
	key := label{kind, c.Event.Outcome, c.Event.Code}
	v, found = t.rest.Load(key)
	if !found {
		v, _ = t.rest.LoadOrStore(key, newSeries(o, c))
	}
	s, _ := v.(*series)
	return s
}

func newSeries(o *Observer, c *call.Call) *series {
	attrs := append([]attribute.KeyValue{method(kindOf(c))}, targetName(c)...)
	plain := metric.WithAttributeSet(attribute.NewSet(attrs...))
	if c.Target != nil && c.Target.Kind == call.Tool {
		attrs = append(attrs, attribute.String("gen_ai.operation.name", "execute_tool"))
	}
	attrs = append(attrs, attribute.String("newel.outcome", c.Event.Outcome))
	attrs = append(attrs, o.failure(c)...)
	full := metric.WithAttributeSet(attribute.NewSet(attrs...))
	said := []slog.Attr{slog.String("method", methods[kindOf(c)]), slog.String("outcome", c.Event.Outcome)}
	if c.Target != nil {
		said = optional(said, "name", nameOf(c))
	}
	return &series{
		log:      o.log.WithAttrs(said),
		full:     []metric.RecordOption{full},
		plain:    []metric.RecordOption{plain},
		plainAdd: []metric.AddOption{plain},
	}
}
