// Package alerts holds the alerts and the dashboard that are shipped against Prometheus' own parser and
// engine, and against what a real server measures.
package alerts

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
)

const (
	rulesFile     = "../../deploy/prometheus/newel.rules.yaml"
	dashboardFile = "../../deploy/grafana/newel.json"
	runbooksFile  = "../../docs/runbooks.md"
)

// groups parses a file of rules as Prometheus does.
func groups(t *testing.T, text []byte) []rulefmt.Rule {
	t.Helper()
	g, errs := rulefmt.Parse(text, false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
	for _, err := range errs {
		t.Error(err)
	}
	var all []rulefmt.Rule
	if g != nil {
		for _, one := range g.Groups {
			all = append(all, one.Rules...)
		}
	}
	if len(all) == 0 {
		t.Fatal("there are no rules")
	}
	return all
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// anchors are the headings of the runbooks, as links name them.
func anchors(t *testing.T) []string {
	t.Helper()
	var all []string
	for line := range strings.Lines(string(read(t, runbooksFile))) {
		if h, ok := strings.CutPrefix(line, "## "); ok {
			all = append(all, strings.ToLower(strings.TrimSpace(h)))
		}
	}
	return all
}

func TestEveryAlertHasARunbook(t *testing.T) {
	known := anchors(t)
	used := map[string]bool{}
	for _, r := range slices.Concat(groups(t, read(t, rulesFile)), groups(t, objectives(t))) {
		if r.Alert == "" {
			continue
		}
		if s := r.Labels["severity"]; s != "page" && s != "ticket" {
			t.Errorf("%s: severity %q", r.Alert, s)
		}
		want := strings.ToLower(r.Alert)
		if r.Annotations["runbook"] != "docs/runbooks.md#"+want || !slices.Contains(known, want) {
			t.Errorf("%s: there is no runbook at %q", r.Alert, r.Annotations["runbook"])
		}
		if r.Annotations["summary"] == "" {
			t.Errorf("%s: no summary", r.Alert)
		}
		used[want] = true
	}
	for _, a := range known {
		if !used[a] {
			t.Errorf("the runbook %q is of no alert", a)
		}
	}
}

// of are series of a counter or gauge, one value a minute.
func of(name, labels, values string) string { return "  " + name + "{" + labels + "} " + values + "\n" }

// calls are calls of a tool that end as kind says, one more of step every minute for a week.
func calls(tool, code string, step int) string {
	labels := `job="newel",instance="a",mcp_method_name="tools/call",gen_ai_tool_name="` + tool + `"`
	if code != "" {
		labels += `,error_type="` + code + `"`
	}
	return of("mcp_server_operation_duration_seconds_count", labels, fmt.Sprintf("0+%dx10080", step))
}

// TestAlerts has every alert see what it is about, and what it is not.
func TestAlerts(t *testing.T) {
	here := `job="newel",instance="a"`
	well := calls("get", "", 100) + calls("get", "invalid_arguments", 50)
	tests := map[string]struct{ bad, good string }{
		"NewelDown":           {of("up", here, "0x10080"), of("up", here, "1x10080")},
		"NewelRestarts":       {of("process_start_time_seconds", here, "0+60x10080"), of("process_start_time_seconds", here, "5x10080")},
		"NewelErrors":         {calls("get", "", 90) + calls("get", "unavailable", 10), well + calls("get", "timeout", 1)},
		"NewelToolFails":      {calls("get", "", 9000) + calls("put", "internal", 3) + calls("put", "", 6), well},
		"NewelOutcomeUnknown": {of("mcp_server_operation_duration_seconds_count", here+`,gen_ai_tool_name="pay",error_type="outcome_unknown"`, "_x10060 1x20"), well},
		"NewelSaturated":      {of("newel_calls_queued", here, "3x10080"), of("newel_calls_queued", here, "0 5x1 0 4x1 0 0+0x10080")},
		"NewelSheds":          {well + calls("get", "exhausted", 60), well + calls("get", "exhausted", 60) + of("newel_quota_refusals_total", here, "0+60x10080")},
		"NewelMemory":         {of("newel_overload", here, "2x10080"), of("newel_overload", here, "1x10080")},
		"NewelBackendAway":    {of("newel_backend_breaker", here+`,newel_backend="b"`, "2x10078 1 1 1"), of("newel_backend_breaker", here+`,newel_backend="b"`, "2x10076 1 0x9")},
		"NewelBackendFull":    {of("newel_backend_full_total", here+`,newel_backend="b"`, "0+60x10080"), of("newel_backend_full_total", here+`,newel_backend="b"`, "60x10080")},
		"NewelApprovalsWait":  {of("newel_approvals_pending", here, "2x10080"), of("newel_approvals_pending", here, "2x10070 0 2x20")},
		"NewelReloadFailed":   {of("newel_config_last_reload_successful", here, "0x10080"), of("newel_config_last_reload_successful", here, "1x10080")},
		"NewelConfigurationsDiffer": {
			of("newel_config_last_reload_success_timestamp_seconds", here, "5x10080") + of("newel_config_last_reload_success_timestamp_seconds", `job="newel",instance="b"`, "9x10080") + of("newel_config_last_reload_successful", here, "0x10080"),
			of("newel_config_last_reload_success_timestamp_seconds", here, "5x10080") + of("newel_config_last_reload_success_timestamp_seconds", `job="newel",instance="b"`, "9x10080") + of("newel_config_last_reload_successful", here, "1x10080"),
		},
		"NewelCertificateEnds": {of("newel_tls_certificate_expiry_timestamp_seconds", here, "605000x10080"), of("newel_tls_certificate_expiry_timestamp_seconds", here, "99999999x10080")},
		"NewelAuthFailures":    {of("newel_auth_failures_total", here, "0+600x10080"), of("newel_auth_failures_total", here, "0+6x10080")},
		"NewelTasksWait":       {of("newel_tasks_oldest", here, "400x10080"), of("newel_tasks_oldest", here, "4x10080")},
		"NewelQuotasLocal":     {of("newel_quota_fallbacks_total", here, "_x10075 1x5"), of("newel_quota_fallbacks_total", here, "7x10080")},
		"NewelBudgetRunsOut":   {of("newel_quota_alerts_total", here+`,newel_quota_rule="each"`, "_x10075 1x5"), of("newel_quota_alerts_total", here+`,newel_quota_rule="each"`, "7x10080")},
	}
	for _, r := range groups(t, read(t, rulesFile)) {
		one, ok := tests[r.Alert]
		if !ok {
			t.Errorf("%s: nothing shows that it works", r.Alert)
			continue
		}
		delete(tests, r.Alert)
		if got := ask(t, one.bad, r.Expr); len(got) == 0 {
			t.Errorf("%s: does not see what it is about", r.Alert)
		}
		if got := ask(t, one.good, r.Expr); len(got) != 0 {
			t.Errorf("%s: sees %v where all is well", r.Alert, got)
		}
	}
	for name := range tests {
		t.Errorf("there is no alert %s", name)
	}
}

// at is when it is asked: after a week.
var at = time.Unix(0, 0).Add(7 * 24 * time.Hour)

// ask evaluates an expression over series.
func ask(t *testing.T, series, expr string) promql.Vector {
	t.Helper()
	store := promqltest.LoadedStorage(t, "load 1m\n"+series)
	defer store.Close()
	engine := promqltest.NewTestEngine(t, false, 5*time.Minute, promqltest.DefaultMaxSamplesPerQuery)
	q, err := engine.NewInstantQuery(t.Context(), store, nil, expr, at)
	if err != nil {
		t.Fatalf("%s: %v", expr, err)
	}
	defer q.Close()
	v, err := q.Exec(t.Context()).Vector()
	if err != nil {
		t.Fatalf("%s: %v", expr, err)
	}
	return slices.Clone(v)
}

// TestObjectives computes what the made rules record, and has their alerts see a budget burn.
func TestObjectives(t *testing.T) {
	rules := groups(t, objectives(t))
	expr := func(record string, labels map[string]string) string {
		t.Helper()
		for _, r := range rules {
			if r.Record == record && r.Labels["of"] == labels["of"] && r.Labels["slo"] == labels["slo"] {
				return r.Expr
			}
		}
		t.Fatalf("nothing records %s of %v", record, labels)
		return ""
	}
	success := map[string]string{"slo": "orders", "of": "success"}
	latency := map[string]string{"slo": "orders", "of": "latency"}
	bucket := of("mcp_server_operation_duration_seconds_bucket", `mcp_method_name="tools/call",gen_ai_tool_name="get_order",le="0.5"`, "0+90x10080")
	tests := []struct {
		what, series, expr string
		want               float64
	}{
		{"one in a hundred fails", calls("get_order", "", 99) + calls("get_order", "timeout", 1), expr("newel:slo_errors:ratio_rate1h", success), 0.01},
		{"nothing fails", calls("get_order", "", 100), expr("newel:slo_errors:ratio_rate3d", success), 0},
		{"callers make mistakes", calls("get_order", "", 50) + calls("get_order", "denied", 50), expr("newel:slo_errors:ratio_rate1h", success), 0},
		{"another tool fails", calls("get_order", "", 100) + calls("search", "timeout", 100), expr("newel:slo_errors:ratio_rate1h", success), 0},
		{"one in ten is slow", calls("get_order", "", 100) + bucket, expr("newel:slo_errors:ratio_rate1h", latency), 0.1},
		{"half of the budget is left", of("newel:slo_errors:ratio_rate7d", `slo="orders",of="success"`, "0.0005x10080"), expr("newel:slo_budget_remaining:ratio", success), 0.5},
	}
	for _, test := range tests {
		got := ask(t, test.series, test.expr)
		if len(got) != 1 || got[0].F < test.want-1e-6 || got[0].F > test.want+1e-6 {
			t.Errorf("%s: %v, want %v", test.what, got, test.want)
		}
	}
	alerts := 0
	for _, r := range rules {
		if r.Alert == "" {
			continue
		}
		alerts++
		labels := fmt.Sprintf("slo=%q,of=%q", r.Labels["slo"], r.Labels["of"])
		series := func(share string) string {
			var b strings.Builder
			for _, w := range []string{"5m", "30m", "1h", "2h", "6h", "1d", "3d"} {
				b.WriteString(of("newel:slo_errors:ratio_rate"+w, labels, share+"x10080"))
			}
			return b.String()
		}
		if len(ask(t, series("0.9"), r.Expr)) == 0 {
			t.Errorf("%s %v does not see a budget burn", r.Alert, r.Labels)
		}
		if got := ask(t, series("0.0005"), r.Expr); len(got) > 0 {
			t.Errorf("%s %v sees %v where budget is left", r.Alert, r.Labels, got)
		}
	}
	if alerts != 8 { // four of each kind
		t.Errorf("%d alerts", alerts)
	}
}

// configuration is of a server that measures all there is.
const configuration = `listen: %s
tls: {certificates: [{certificate: cert.pem, key: key.pem}]}
redis: {url: "${env:REDIS_URL}"}
quotas:
  rules:
    - {name: few, tools: [get], per: [tool], rate: 1/h, burst: 2, budget: {calls: 100}, alert_at: 0.01}
policy:
  rules:
    - {name: not this, then: deny, tools: [forbidden]}
    - {name: all, then: allow}
slos:
  - {name: orders, tools: ["*_order"], success: 0.999, latency: 500ms, window: 168h}
backends:
  - type: sql
    name: shop
    driver: sqlite
    file: shop.db
    init: init.sql
    tools:
      - {name: get, description: Gets., result: row, sql: SELECT 1 AS n}
      - {name: forbidden, description: Gets not., result: row, sql: SELECT 1 AS n}
`

// folder makes a folder with a configuration and the program.
func folder(t *testing.T) (dir, bin, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr = l.Addr().String()
	l.Close()
	dir = t.TempDir()
	certificate(t, dir)
	for name, text := range map[string]string{"newel.yaml": fmt.Sprintf(configuration, addr), "init.sql": "CREATE TABLE t (n);"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if bin, err = program(); err != nil {
		t.Fatal(err)
	}
	return dir, bin, addr
}

// program builds the command once.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "newel-alerts-")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "newel")
	build := exec.Command("go", "build", "-o", bin, "./cmd/newel")
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return bin, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if bin, err := program(); err == nil {
		_ = os.RemoveAll(filepath.Dir(bin))
	}
	os.Exit(code)
}

// environment has a Redis that is away.
func environment() []string { return append(os.Environ(), "REDIS_URL=redis://127.0.0.1:1") }

// objectives are the rules that the program makes.
func objectives(t *testing.T) []byte {
	t.Helper()
	dir, bin, _ := folder(t)
	cmd := exec.Command(bin, "slo", "rules")
	cmd.Dir, cmd.Env = dir, environment()
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, said.String())
	}
	return out
}

// TestWhatIsAskedForIsMeasured holds the names in rules and dashboard against those of a real server.
func TestWhatIsAskedForIsMeasured(t *testing.T) {
	dir, bin, addr := folder(t)
	cmd := exec.Command(bin, "serve")
	cmd.Dir, cmd.Env = dir, environment()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		_ = cmd.Wait()
	}()
	client := trusting(t, dir)
	base := "https://" + addr
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for until := time.Now().Add(30 * time.Second); ; <-tick.C {
		if resp, err := client.Get(base + "/ready"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				break
			}
		}
		if time.Now().After(until) {
			t.Fatalf("it is not ready\n%s", read(t, log.Name()))
		}
	}
	for _, tool := range []string{"get", "get", "get", "forbidden", "unknown"} {
		send(t, client, base, tool, `{}`)
	}
	send(t, client, base, "get", `{"no": "such"}`)
	send(t, client, base, "", `nonsense`)

	measured := map[string]bool{"up": true} // Prometheus' own
	resp, err := client.Get(base + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	series := regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)[{ ]`)
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if m := series.FindStringSubmatch(lines.Text()); m != nil {
			measured[m[1]] = true
		}
	}
	// What needs calls that wait, report progress or fail in ways that cannot be had in a moment.
	for _, name := range []string{"newel_queue_duration_seconds_bucket", "newel_progress_notifications_total", "newel_auth_failures_total"} {
		measured[name] = true
	}
	var exprs []string
	for _, r := range slices.Concat(groups(t, read(t, rulesFile)), groups(t, objectives(t))) {
		if r.Record != "" {
			measured[r.Record] = true
		}
		exprs = append(exprs, r.Expr)
	}
	var dashboard any
	if err := json.Unmarshal(read(t, dashboardFile), &dashboard); err != nil {
		t.Fatal(err)
	}
	exprs = append(exprs, expressions(dashboard)...)
	asked := 0
	for _, expr := range exprs {
		expr = strings.NewReplacer("$__rate_interval", "5m", "$job", "newel").Replace(expr)
		parsed, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
		if err != nil {
			t.Errorf("%s: %v", expr, err)
			continue
		}
		parser.Inspect(parsed, func(n parser.Node, _ []parser.Node) error {
			if v, ok := n.(*parser.VectorSelector); ok {
				asked++
				if !measured[v.Name] {
					t.Errorf("%s is not measured, and %s asks for it", v.Name, expr)
				}
			}
			return nil
		})
	}
	if asked < 50 {
		t.Errorf("only %d names were looked for", asked)
	}
}

// expressions are the queries of a dashboard.
func expressions(v any) []string {
	var all []string
	switch v := v.(type) {
	case map[string]any:
		if e, ok := v["expr"].(string); ok {
			all = append(all, e)
		}
		for _, one := range v {
			all = append(all, expressions(one)...)
		}
	case []any:
		for _, one := range v {
			all = append(all, expressions(one)...)
		}
	}
	return all
}

func send(t *testing.T, client *http.Client, base, tool, args string) {
	t.Helper()
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":%s,"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}}}`, tool, args)
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, base+"/mcp", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": tool} {
		req.Header.Set(name, value)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}
