// Package live holds tests of a server that is changed and replaced while it serves: the real
// program, real signals, real sockets.
package live

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"newel.dev/newel/test/program"
)

func TestMain(m *testing.M) {
	if os.Getenv("LIVE_TEST_CHILD") != "" {
		upstream() // this very program is a server over stdio
		return
	}
	os.Exit(program.Run(m))
}

// upstream is an MCP server of one tool, which says in which process it runs.
func upstream() {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var m struct {
			ID     json.RawMessage
			Method string
		}
		if json.Unmarshal(in.Bytes(), &m) != nil || m.ID == nil {
			continue
		}
		result := `{}`
		switch m.Method {
		case "initialize":
			result = `{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"u","version":"1"}}`
		case "tools/list":
			result = `{"tools":[{"name":"pid","description":"D.","inputSchema":{"type":"object"},"annotations":{"readOnlyHint":true}}]}`
		case "tools/call":
			result = fmt.Sprintf(`{"content":[{"type":"text","text":"%d"}]}`, os.Getpid())
		default:
			fmt.Printf(`{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"no"}}`+"\n", m.ID)
			continue
		}
		fmt.Printf(`{"jsonrpc":"2.0","id":%s,"result":%s}`+"\n", m.ID, result)
	}
}

// A server is newel serve on a folder of its own.
type server struct {
	t    *testing.T
	dir  string
	url  string // without path
	cmd  *exec.Cmd
	log  program.Log
	done chan error
}

// configure writes the configuration, as an editor does: aside, then in its place.
func (s *server) configure(text string) {
	s.t.Helper()
	name := filepath.Join(s.dir, "newel.yaml")
	if err := errors.Join(os.WriteFile(name+".new", []byte(text), 0o600), os.Rename(name+".new", name)); err != nil {
		s.t.Fatal(err)
	}
}

// start serves a configuration until the test ends. change may change the command.
func start(t *testing.T, configuration string, change ...func(*exec.Cmd)) *server {
	t.Helper()
	s := &server{t: t, dir: t.TempDir(), done: make(chan error, 1)}
	s.configure(configuration)
	if err := errors.Join(os.Mkdir(filepath.Join(s.dir, "docs"), 0o700), os.WriteFile(filepath.Join(s.dir, "docs", "a.md"), []byte("# A\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	s.cmd = exec.Command(program.Built(t, program.Newel), "serve", "--listen", "127.0.0.1:0")
	s.cmd.Dir, s.cmd.Env = s.dir, append(os.Environ(), "LIVE_TEST_CHILD=")
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	logs, logsIn, err := os.Pipe() // its successor writes there too
	if err != nil {
		t.Fatal(err)
	}
	s.cmd.Stdout, s.cmd.Stderr = in, logsIn
	for _, c := range change {
		c(s.cmd)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	logsIn.Close()
	var copied sync.WaitGroup
	copied.Go(func() { _, _ = io.Copy(&s.log, logs) })
	go func() { s.done <- s.cmd.Wait() }()
	t.Cleanup(func() {
		_ = s.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		copied.Wait()
		out.Close()
		logs.Close()
		if t.Failed() {
			t.Logf("logs:\n%.8000s", s.log.String())
		}
	})
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if url, ok := strings.CutPrefix(lines.Text(), "Serving MCP at "); ok {
			s.url = strings.TrimSuffix(strings.TrimSpace(url), "/mcp")
			go func() {
				for lines.Scan() {
				}
			}()
			return s
		}
	}
	t.Fatalf("it did not start: %s", s.log.String())
	return nil
}

// reload tells the server to, and returns the outcome.
func (s *server) reload() (outcome string, all map[string]any) {
	s.t.Helper()
	outcome, all, err := s.order()
	if err != nil {
		s.t.Fatal(err)
	}
	return outcome, all
}

func (s *server) order() (outcome string, all map[string]any, err error) {
	c, err := net.Dial("unix", filepath.Join(s.dir, ".newel", "newel.yaml.sock"))
	if err != nil {
		return "", nil, err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "reload\n"); err != nil {
		return "", nil, err
	}
	err = json.NewDecoder(c).Decode(&all)
	outcome, _ = all["outcome"].(string)
	return outcome, all, err
}

func (s *server) signal(sig os.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// metric reads one number of /metrics.
func (s *server) metric(name string) float64 {
	s.t.Helper()
	resp, err := http.Get(s.url + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + name + `(?:\{[^}]*\})? (\S+)$`).FindSubmatch(text)
	if m == nil {
		s.t.Fatalf("there is no metric %s in\n%s", name, text)
	}
	v, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`

// call calls a tool and returns its text; refused is the message of an error that the server answers.
func call(client *http.Client, url, tool string) (text, refused string, err error) {
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":%q,"arguments":{},%s}}`, tool, meta)
	r, err := http.NewRequest(http.MethodPost, url+"/mcp", strings.NewReader(body))
	if err != nil {
		return "", "", err
	}
	for name, v := range map[string]string{"Content-Type": "application/json", "Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": tool} {
		r.Header.Set(name, v)
	}
	resp, err := client.Do(r)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", "", err
	}
	var answer struct {
		Result struct {
			Content []struct{ Text string }
			IsError bool
		}
		Error *struct{ Message string }
	}
	if err := json.Unmarshal(raw, &answer); err != nil {
		return "", "", fmt.Errorf("%s: %s", resp.Status, raw)
	}
	switch {
	case answer.Error != nil:
		return "", answer.Error.Message, nil
	case len(answer.Result.Content) != 1:
		return "", "", fmt.Errorf("%s: %s", resp.Status, raw)
	case answer.Result.IsError:
		return "", answer.Result.Content[0].Text, nil
	}
	return answer.Result.Content[0].Text, "", nil
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.After(30 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-limit:
			t.Fatal(what)
		case <-tick.C:
		}
	}
}

// load calls a tool from several connections until stop is called, which returns how many calls
// there were. good judges each.
func load(t *testing.T, url, tool string, good func(text, refused string) bool) (calls *atomic.Int64, stop func() int64) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	calls = &atomic.Int64{}
	var all sync.WaitGroup
	for range 4 {
		client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1}, Timeout: 30 * time.Second}
		all.Go(func() {
			defer client.CloseIdleConnections()
			for ctx.Err() == nil {
				text, refused, err := call(client, url, tool)
				if err != nil || !good(text, refused) {
					t.Errorf("a call failed: %q %q %v", text, refused, err)
					return
				}
				calls.Add(1)
			}
		})
	}
	return calls, func() int64 {
		cancel()
		all.Wait()
		return calls.Load()
	}
}

// version is a configuration whose tool and whose policy both say n: even ones allow it, odd ones
// deny it and say why.
func version(n int) string {
	then := "allow"
	if n%2 == 1 {
		then = "deny"
	}
	return fmt.Sprintf(`telemetry: {log_level: error}
policy:
  explicit: true
  rules:
    - {name: rule %[1]d, then: %[2]s, tools: ["*"], reason: "rule %[1]d denies version %[1]d"}
backends:
  - type: sql
    name: version
    driver: sqlite
    file: db
    tools:
      - {name: which, title: "%[1]d", description: D., sql: "SELECT %[1]d AS version"}
`, n, then)
}

// Fault E15: reloads under load, of a real server with its state in a file. No call fails, none is
// decided by two configurations, nothing is left over.
func TestReloadUnderLoad(t *testing.T) {
	s := start(t, version(0))
	says := regexp.MustCompile(`"version":(\d+)`)
	calls, stop := load(t, s.url, "which", func(text, refused string) bool {
		if refused != "" { // only odd ones deny, each with its own reason
			var rule, denied int
			i := strings.Index(refused, "rule ")
			_, err := fmt.Sscanf(refused[max(i, 0):], "rule %d denies version %d", &rule, &denied)
			return err == nil && rule == denied && rule%2 == 1
		}
		m := says.FindStringSubmatch(text)
		return m != nil && (m[1][len(m[1])-1]-'0')%2 == 0
	})
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	goroutines, files := 0.0, 0
	var worst float64
	for n := 1; n <= 220; n++ {
		<-tick.C
		s.configure(version(n))
		out, all := s.reload()
		if out != "applied" && out != "unchanged" { // the file may have been seen first
			t.Fatal(all)
		}
		if ms, _ := all["milliseconds"].(float64); ms > worst {
			worst = ms
		}
		if n == 20 {
			goroutines, files = s.metric("go_goroutines"), s.descriptors()
		}
	}
	t.Logf("%d calls while 220 configurations came; the slowest reload took %v ms", stop(), worst)
	if calls.Load() == 0 {
		t.Error("nobody called")
	}
	if text, refused, err := call(http.DefaultClient, s.url, "which"); err != nil || refused != "" || !strings.Contains(text, "220") {
		t.Error(text, refused, err)
	}
	until(t, "goroutines or descriptors are left over", func() bool {
		return s.metric("go_goroutines") <= goroutines+4 && s.descriptors() <= files+4
	})
}

func (s *server) descriptors() int {
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
	switch {
	case err != nil && runtime.GOOS != "linux":
		s.t.Skip("this system does not list descriptors")
	case err != nil:
		s.t.Fatal(err)
	}
	return len(all)
}

const docs = `backends:
  - {type: knowledge, name: docs, sources: [{name: docs, path: docs}]}
`

// A saved file, and the signal, are heard; metrics say how it went; what is wrong changes nothing.
func TestSavedFilesAndSignal(t *testing.T) {
	s := start(t, docs)
	if s.metric("newel_config_last_reload_successful") != 1 {
		t.Error("the configuration that it started with counts as failed")
	}
	loaded := s.metric("newel_config_last_reload_success_timestamp_seconds")
	s.configure("backends: [")
	until(t, "the saved file is not seen", func() bool { return s.metric("newel_config_last_reload_successful") == 0 })
	if !strings.Contains(s.log.String(), "newel.yaml:1:") {
		t.Error("the log names no place")
	}
	if s.metric("newel_config_last_reload_success_timestamp_seconds") != loaded {
		t.Error("a failure counts as success")
	}
	if _, refused, err := call(http.DefaultClient, s.url, "search_kb"); err != nil || !strings.Contains(refused, "query") {
		t.Error("what was served is gone:", refused, err)
	}
	s.configure(docs + "limits: {max_queued_calls: 7}\n")
	s.signal(syscall.SIGHUP)
	until(t, "the signal is not heard", func() bool { return s.metric("newel_config_last_reload_successful") == 1 })
	// A file that the configuration names is followed as well.
	policy := filepath.Join(s.dir, "p.cedar")
	if err := os.WriteFile(policy, []byte(`permit(principal, action, resource);`), 0o600); err != nil {
		t.Fatal(err)
	}
	s.configure(docs + "policy: {cedar: [p.cedar]}\n")
	if out, all := s.reload(); out != "applied" {
		t.Fatal(all)
	}
	if err := os.WriteFile(policy, []byte(`permit(principal, action, resource) nonsense`), 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "the policy is not followed", func() bool { return s.metric("newel_config_last_reload_successful") == 0 })
	if err := os.WriteFile(policy, []byte(`forbid(principal, action, resource);`), 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "the policy is not followed", func() bool { return s.metric("newel_config_last_reload_successful") == 1 })
	if _, refused, err := call(http.DefaultClient, s.url, "search_kb"); err != nil || refused == "" || strings.Contains(refused, "query") {
		t.Error("the policy does not count:", refused, err)
	}
}

// Many who ask at once share few reloads, and all hear the outcome.
func TestReloadWhileReloading(t *testing.T) {
	s := start(t, docs)
	s.configure(docs + "limits: {max_queued_calls: 7}\n")
	var all sync.WaitGroup
	var applied, refused atomic.Int64
	for range 10 {
		all.Go(func() {
			out, _, err := s.order()
			if err != nil {
				t.Error(err)
			}
			switch out {
			case "applied":
				applied.Add(1)
			case "unchanged":
			default:
				refused.Add(1)
			}
		})
	}
	all.Wait()
	if applied.Load() == 0 || refused.Load() != 0 {
		t.Errorf("%d applied, %d refused", applied.Load(), refused.Load())
	}
	if n := strings.Count(s.log.String(), "the configuration was loaded"); n != 1 {
		t.Errorf("one configuration was gone over to %d times", n)
	}
}

// A server behind the gateway whose settings stay keeps its process.
func TestProcessesStay(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	behind := fmt.Sprintf("mcpServers:\n  u: {command: %q, env: {LIVE_TEST_CHILD: \"1\"}}\n", self)
	s := start(t, behind)
	var pid string
	until(t, "the server behind does not answer", func() bool {
		text, _, err := call(http.DefaultClient, s.url, "pid")
		pid = text
		return err == nil && text != ""
	})
	for n := range 5 {
		s.configure(behind + fmt.Sprintf("limits: {max_queued_calls: %d}\n", 10+n))
		if out, all := s.reload(); out != "applied" {
			t.Fatal(all)
		}
		if text, refused, err := call(http.DefaultClient, s.url, "pid"); err != nil || text != pid {
			t.Fatalf("%q instead of %q: %s %v", text, pid, refused, err)
		}
	}
	s.configure(strings.Replace(behind, `"1"`, `"2"`, 1))
	if out, all := s.reload(); out != "applied" || !strings.Contains(fmt.Sprint(all["changed"]), "backend u opened anew") {
		t.Fatal(all)
	}
	until(t, "changed settings start no other process", func() bool {
		text, _, err := call(http.DefaultClient, s.url, "pid")
		return err == nil && text != "" && text != pid
	})
}

// Another process takes the socket over under load, and no call fails: with a state that all
// processes may have at once, and with one that is handed on.
func TestHandOver(t *testing.T) {
	for _, engine := range []string{"memory", "sqlite"} {
		t.Run(engine, func(t *testing.T) {
			configuration := "state: {engine: " + engine + "}\n" + version(0)
			s := start(t, configuration)
			calls, stop := load(t, s.url, "which", func(text, _ string) bool { return strings.Contains(text, "version") })
			until(t, "no calls", func() bool { return calls.Load() > 100 })
			began := time.Now()
			s.signal(syscall.SIGUSR2)
			if err := <-s.done; err != nil {
				t.Fatal("the one before did not end well:", err)
			}
			took := time.Since(began)
			so := calls.Load()
			until(t, "the next does not answer", func() bool { return calls.Load() > so+100 || t.Failed() })
			t.Logf("%d calls; the one before was gone after %v", stop(), took)
			// The next takes orders too, and can hand over again.
			if out, all := s.reload(); out != "unchanged" {
				t.Error(all)
			}
			next := s.owner()
			if err := next.Signal(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
			until(t, "the next does not end", func() bool { return next.Signal(syscall.Signal(0)) != nil })
		})
	}
}

// owner is the process that serves now, as its metrics tell.
func (s *server) owner() *os.Process {
	s.t.Helper()
	entries, err := os.ReadDir("/proc")
	switch {
	case err != nil && runtime.GOOS != "linux":
		s.t.Skip("this system does not list processes")
	case err != nil:
		s.t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd")); err == nil && cwd == s.dir {
			p, err := os.FindProcess(pid)
			if err != nil {
				s.t.Fatal(err)
			}
			return p
		}
	}
	s.t.Fatal("nobody serves")
	return nil
}

// A successor that cannot start leaves everything as it is, and says why.
func TestHandOverRefused(t *testing.T) {
	s := start(t, version(0))
	s.configure("backends: [")
	s.signal(syscall.SIGUSR2)
	until(t, "nothing is said", func() bool { return strings.Contains(s.log.String(), "no other process took over") })
	if !strings.Contains(s.log.String(), "newel.yaml:1:") {
		t.Error("it does not say why")
	}
	if text, _, err := call(http.DefaultClient, s.url, "which"); err != nil || !strings.Contains(text, "version") {
		t.Error(text, err)
	}
}

// A socket of the service manager is taken.
func TestSocketActivation(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		t.Fatal("no TCP")
	}
	f, err := tcp.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	activated := func(count string) func(*exec.Cmd) {
		return func(c *exec.Cmd) {
			c.ExtraFiles = []*os.File{f}
			// The shell has the process id that the program will have.
			c.Args = []string{"sh", "-c", "LISTEN_PID=$$ LISTEN_FDS=" + count + " exec " + program.Built(t, program.Newel) + " serve --listen 127.0.0.1:1"}
			c.Path = "/bin/sh"
		}
	}
	s := start(t, version(0), activated("1"))
	if s.url != "http://"+l.Addr().String() {
		t.Errorf("it serves at %s", s.url)
	}
	l.Close() // it has the socket
	if text, _, err := call(http.DefaultClient, s.url, "which"); err != nil || !strings.Contains(text, "version") {
		t.Error(text, err)
	}
	two := exec.Command("/bin/sh")
	activated("2")(two)
	two.Dir = t.TempDir()
	if out, err := two.CombinedOutput(); err == nil || !strings.Contains(string(out), "write one ListenStream") {
		t.Errorf("two sockets: %v %s", err, out)
	}
}
