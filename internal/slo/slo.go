// Package slo makes recording rules and alerts for Prometheus of service level objectives.
//
// Start reading at [Rules]. An objective has an error budget: the share of calls that may be bad in
// its window. Alerts are those of several windows and burn rates of the SRE Workbook, chapter 5: a
// page when 2 % of a budget of 30 days burn in an hour or 5 % in six, a ticket when 10 % burn in three days.
//
// It is pure: what is measured stands in internal/guard/observe.
package slo

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/guard/observe"
	"newel.dev/newel/internal/pattern"
)

// An Objective is what calls of some tools are to be like.
type Objective struct {
	Name           string
	Tools          []string      // patterns of names; empty: all
	Success        float64       // share of calls that must not fail, above 0 and below 1
	Latency        time.Duration // within which calls are to be answered; 0: no objective
	LatencySuccess float64       // share of calls that must be, above 0 and below 1
	Window         time.Duration // whole days
}

// name is what an objective may be called: it is part of labels and links.
var name = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)

const day = 24 * time.Hour

// Check reports what about an objective makes no sense.
func (o *Objective) Check() error {
	switch {
	case !name.MatchString(o.Name):
		return fmt.Errorf("%q is no name of an objective: write up to 63 lower-case letters, digits, - and _", o.Name)
	case !share(o.Success):
		return errors.New("success must be above 0 and below 1, such as 0.995: with 1 there is no error budget")
	case o.Latency != 0 && !slices.Contains(observe.Buckets, o.Latency.Seconds()):
		return fmt.Errorf("latency %s is not measured; the nearest that is: %s", o.Latency, nearest(o.Latency))
	case o.Latency != 0 && !share(o.LatencySuccess):
		return errors.New("latency_success must be above 0 and below 1, such as 0.95")
	case o.Window < day || o.Window > 90*day || o.Window%day != 0:
		return errors.New("window must be whole days, from 24h to 2160h (90 days)")
	}
	return pattern.Check(o.Tools...)
}

func share(f float64) bool { return f > 0 && f < 1 }

func nearest(d time.Duration) time.Duration {
	best := observe.Buckets[0]
	for _, b := range observe.Buckets {
		if abs(b-d.Seconds()) < abs(best-d.Seconds()) {
			best = b
		}
	}
	return time.Duration(best * float64(time.Second))
}

func abs(f float64) float64 { return max(f, -f) }

// Faults are the codes of errors that count against an objective: those that are not the caller's. A
// call that was over a quota was refused as the operator wanted.
func Faults() []call.Code {
	return []call.Code{call.Timeout, call.Unavailable, call.Internal, call.OutcomeUnknown, call.TooLarge}
}

// windows are those that rates are recorded over, beside the objective's own.
var windows = []string{"5m", "30m", "1h", "2h", "6h", "1d", "3d"}

// burns are the alerts: the budget burns factor times as fast as it may, over both windows.
var burns = []struct {
	long, short string
	factor      float64
	wait        string
	severity    string
}{
	{"1h", "5m", 14.4, "2m", "page"},
	{"6h", "30m", 6, "15m", "page"},
	{"1d", "2h", 3, "1h", "ticket"},
	{"3d", "6h", 1, "3h", "ticket"},
}

// Rules writes the file of rules. The objectives have been checked.
func Rules(objectives []Objective) []byte {
	var b bytes.Buffer
	b.WriteString("# Made by `newel slo rules`: recording rules and alerts for Prometheus.\ngroups:\n")
	for i := range objectives {
		o := &objectives[i]
		fmt.Fprintf(&b, "  - name: newel-slo-%s\n    rules:\n", o.Name)
		calls, faults := o.selector(""), o.selector(`error_type=~"`+strings.Join(names(Faults()), "|")+`"`)
		o.rules(&b, "success", o.Success, func(window string) string {
			return fmt.Sprintf("(sum(rate(%s_count%s[%s])) or vector(0)) / sum(rate(%s_count%s[%s]))", duration, faults, window, duration, calls, window)
		})
		if o.Latency == 0 {
			continue
		}
		fast := o.selector(within(o.Latency))
		o.rules(&b, "latency", o.LatencySuccess, func(window string) string {
			return fmt.Sprintf("1 - sum(rate(%s_bucket%s[%s])) / sum(rate(%s_count%s[%s]))", duration, fast, window, duration, calls, window)
		})
	}
	if len(objectives) == 0 {
		return []byte("groups: []\n")
	}
	return b.Bytes()
}

// duration is the histogram of mcp.server.operation.duration, as Prometheus calls it.
const duration = "mcp_server_operation_duration_seconds"

// within selects the bucket of calls that took at most d. Exporters write whole seconds in two ways.
func within(d time.Duration) string {
	le := strconv.FormatFloat(d.Seconds(), 'g', -1, 64)
	if strings.Contains(le, ".") {
		return "le=" + strconv.Quote(le)
	}
	return "le=~" + strconv.Quote(le+`|`+le+`\.0`)
}

func names(codes []call.Code) []string {
	var out []string
	for _, c := range codes {
		out = append(out, c.String())
	}
	return out
}

// selector chooses the calls of the objective's tools.
func (o *Objective) selector(more string) string {
	labels := []string{`mcp_method_name="tools/call"`}
	if len(o.Tools) > 0 {
		var any []string
		for _, p := range o.Tools {
			any = append(any, pattern.RE2(p))
		}
		labels = append(labels, "gen_ai_tool_name=~"+strconv.Quote(strings.Join(any, "|")))
	}
	if more != "" {
		labels = append(labels, more)
	}
	return "{" + strings.Join(labels, ",") + "}"
}

// rules writes what is recorded and alerted on of one kind of bad calls. ratio is the share of bad
// calls over a window.
func (o *Objective) rules(b *bytes.Buffer, of string, objective float64, ratio func(window string) string) {
	labels := fmt.Sprintf("{slo: %s, of: %s}", quote(o.Name), of)
	record := func(name, expr string) {
		fmt.Fprintf(b, "      - record: %s\n        expr: %s\n        labels: %s\n", name, quote(expr), labels)
	}
	whole := fmt.Sprintf("%dd", o.Window/day)
	all := windows
	if !slices.Contains(all, whole) {
		all = append(slices.Clone(all), whole)
	}
	for _, w := range all {
		record("newel:slo_errors:ratio_rate"+w, ratio(w))
	}
	budget := strconv.FormatFloat(1-objective, 'g', 12, 64)
	this := fmt.Sprintf("{slo=%q,of=%q}", o.Name, of)
	record("newel:slo_objective:ratio", "vector("+strconv.FormatFloat(objective, 'g', 12, 64)+")")
	record("newel:slo_budget_remaining:ratio", fmt.Sprintf("1 - newel:slo_errors:ratio_rate%s%s / %s", whole, this, budget))
	for _, a := range burns {
		limit := strconv.FormatFloat(a.factor*(1-objective), 'g', 12, 64)
		fmt.Fprintf(b, "      - alert: NewelErrorBudgetBurns\n        expr: %s\n        for: %s\n        labels: {severity: %s, slo: %s, of: %s, window: %s}\n",
			quote(fmt.Sprintf("newel:slo_errors:ratio_rate%s%s > %s and newel:slo_errors:ratio_rate%s%s > %s", a.long, this, limit, a.short, this, limit)),
			a.wait, a.severity, quote(o.Name), of, a.long)
		fmt.Fprintf(b, "        annotations:\n          summary: %s\n          description: %s\n          runbook: docs/runbooks.md#newelerrorbudgetburns\n",
			quote(fmt.Sprintf("%s of %s: the error budget burns %s times as fast as it may", of, o.Name, strconv.FormatFloat(a.factor, 'g', -1, 64))),
			quote("{{ $value | humanizePercentage }} of calls in the last "+a.long+" were bad; "+strconv.FormatFloat(100*(1-objective), 'g', 4, 64)+" % may be."))
	}
}

// quote writes a string as JSON does, which YAML reads the same way.
func quote(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(s) // a string can be encoded
	return strings.TrimSuffix(b.String(), "\n")
}
