package knowledge

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/backend/backendtest"
	"newel.dev/newel/internal/catalog"
	"newel.dev/newel/internal/module"
)

// pdfOf makes a PDF of one page with one line.
func pdfOf(line string) string {
	var b strings.Builder
	var at []int
	obj := func(s string) {
		at = append(at, b.Len())
		fmt.Fprintf(&b, "%d 0 obj\n%s\nendobj\n", len(at), s)
	}
	b.WriteString("%PDF-1.4\n")
	obj("<< /Type /Catalog /Pages 2 0 R >>")
	obj("<< /Type /Pages /Kids [3 0 R] /Count 1 >>")
	obj("<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 300] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>")
	stream := "BT /F1 12 Tf 10 100 Td (" + line + ") Tj ET"
	obj(fmt.Sprintf("<< /Length %d >>\nstream\n%s\nendstream", len(stream), stream))
	obj("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
	obj("<< /Title (Report in PDF) >>")
	start := b.Len()
	fmt.Fprintf(&b, "xref\n0 %d\n0000000000 65535 f \n", len(at)+1)
	for _, o := range at {
		fmt.Fprintf(&b, "%010d 00000 n \n", o)
	}
	fmt.Fprintf(&b, "trailer\n<< /Size %d /Root 1 0 R /Info 6 0 R >>\nstartxref\n%d\n%%%%EOF\n", len(at)+1, start)
	return b.String()
}

// world is a knowledge base over a folder.
type world struct {
	*Backend
	dir  string
	docs string
	log  *bytes.Buffer
}

func write(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func config() Config {
	return Config{Sources: []Source{{Name: "docs", Path: "docs", Policies: "policies", Exclude: []string{"drafts"}}}, MaxFileBytes: 1 << 20, PartBytes: 1024, Refresh: time.Hour}
}

func newWorld(t testing.TB, c Config, files map[string]string) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), log: &bytes.Buffer{}}
	w.docs = filepath.Join(w.dir, "docs")
	if err := os.MkdirAll(w.docs, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, w.docs, files)
	w.open(t, c)
	return w
}

func (w *world) env() module.Env {
	return module.Env{Dir: w.dir, Logger: slog.New(slog.NewTextHandler(w.log, nil)), Position: func(p string) string { return "newel.yaml:" + p }, Progress: func(string, int, int) {}}
}

func (w *world) open(t testing.TB, c Config) {
	t.Helper()
	b, err := Open(t.Context(), "kb", c, w.env())
	if err != nil {
		t.Fatal(err)
	}
	w.Backend = b
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
}

// do calls a capability through the catalog's checks.
func (w *world) do(t testing.TB, c *call.Call) (*call.Result, error) {
	t.Helper()
	caps, err := w.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s, err := catalog.Build([]catalog.Source{{Backend: "kb", Capabilities: caps}})
	if err != nil {
		t.Fatal(err)
	}
	var target *call.Capability
	switch c.Kind {
	case call.Resource:
		target = s.Resource(c.Name)
	case call.Prompt:
		target = s.Prompt(c.Name)
	default:
		c.Kind = call.Tool
		target = s.Tool(c.Name)
	}
	if target == nil {
		t.Fatalf("%q does not resolve", c.Name)
	}
	if target.Check != nil {
		if err := target.Check(c.Args); err != nil {
			return nil, err
		}
	}
	r, err := target.Run(t.Context(), c)
	if err == nil && target.CheckOutput != nil {
		if err := target.CheckOutput(r.Structured); err != nil {
			t.Errorf("%s: the result does not fit its schema: %v", c.Name, err)
		}
	}
	return r, err
}

func (w *world) search(t testing.TB, query string, more ...string) hits {
	t.Helper()
	args := `{"query":` + string(call.AppendString(nil, query)) + strings.Join(more, "") + `}`
	r, err := w.do(t, &call.Call{Name: "search_kb", Args: jsontext.Value(args)})
	if err != nil {
		t.Fatalf("%s: %v", args, err)
	}
	var h hits
	if err := json.Unmarshal(r.Structured, &h); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h hits) ids() string {
	var ids []string
	for _, r := range h.Results {
		ids = append(ids, r.ID)
	}
	return strings.Join(ids, " ")
}

var library = map[string]string{
	"guide.md":             "---\ntitle: \"The guide\"\n---\n# Not this\nHow to rotate a Schlüssel safely. ~tilde~",
	"sub/notes.txt":        "Notes about rotation of tyres and the café.",
	"page.html":            "<html><head><title>A  page</title><style>p{color:rotate}</style></head><body><p>Visible words</p><script>hidden()</script><p>second &amp; line</p></body></html>",
	"report.pdf":           pdfOf("Quarterly numbers rose"),
	"policies/security.md": "# Security policy\nKeys are rotated every year.",
	"latin1.txt":           "caf\xe9 au lait",
	"drafts/secret.md":     "# Draft\nnot yet public",
	".hidden.md":           "# Hidden\ninvisible",
	"image.png":            "not a document",
	"broken.pdf":           "%PDF-1.4 this is broken",
	"a b%c~d.md":           "# Odd name\nodd",
}

func TestFormats(t *testing.T) {
	w := newWorld(t, config(), library)
	for query, want := range map[string]string{
		"schlussel":     "guide.md", // whatever the accents and case
		"CAFE":          "latin1.txt sub~notes.txt",
		"visible words": "page.html",
		"quarterly":     "report.pdf",
		"hidden":        "",
		"color":         "",
		"public":        "",
		"invisible":     "",
		`"every year"`:  "policies~security.md",
		`"year every"`:  "",
		"quart*":        "report.pdf",
		"odd":           "a b%c~~d.md",
	} {
		h := w.search(t, query)
		got := strings.Fields(h.ids())
		if strings.Join(got, " ") != want && len(got) != len(strings.Fields(want)) {
			t.Errorf("%s: got %q, want %q", query, h.ids(), want)
		}
	}
	titles := map[string]string{"guide.md": "The guide", "page.html": "A page", "report.pdf": "Report in PDF", "sub~notes.txt": "notes", "policies~security.md": "Security policy"}
	for id, want := range titles {
		r, err := w.do(t, &call.Call{Name: "get_document", Args: jsontext.Value(`{"source":"docs","id":"` + id + `"}`)})
		var p part
		if err == nil {
			err = json.Unmarshal(r.Structured, &p)
		}
		if err != nil || p.Title != want {
			t.Errorf("%s: title %q, %v", id, p.Title, err)
		}
	}
	if !strings.Contains(w.log.String(), "broken.pdf") {
		t.Error("nothing is said of the broken PDF")
	}
	// Not all words: some are enough, and it is said.
	if h := w.search(t, "quarterly elephants"); h.ids() != "report.pdf" || h.Matched != "some words" {
		t.Errorf("got %q, %s", h.ids(), h.Matched)
	}
	if h := w.search(t, "rotated"); len(h.Results) != 1 || !strings.Contains(h.Results[0].Snippet, "**rotated**") {
		t.Errorf("got %+v", h)
	}
}

// Every listed resource can be read under the URI it is listed with.
func TestResources(t *testing.T) {
	w := newWorld(t, config(), library)
	caps, err := w.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, c := range caps {
		if c.Kind == call.Resource && c.URI != "" {
			n++
			if r, err := w.do(t, &call.Call{Kind: call.Resource, Name: c.URI}); err != nil || !strings.Contains(string(r.Content), `"text":`) {
				t.Errorf("%s: %v", c.URI, err)
			}
		}
	}
	if n != 8 {
		t.Errorf("%d documents listed", n)
	}
	if r, err := w.do(t, &call.Call{Kind: call.Resource, Name: "kb://policy/security"}); err != nil || !strings.Contains(string(r.Content), "rotated every year") {
		t.Errorf("the policy: %v", err)
	}
	for _, uri := range []string{"kb://document/docs/nope", "kb://document/docs/..%2F..%2Fetc%2Fpasswd", "kb://document/other/guide.md", "kb://policy/nope", "kb://policy/%25"} {
		if _, err := w.do(t, &call.Call{Kind: call.Resource, Name: uri}); err == nil || call.AsError(err).Code != call.NotFound {
			t.Errorf("%s: %v", uri, err)
		}
	}
	if _, err := w.do(t, &call.Call{Name: "get_policy", Args: jsontext.Value(`{"name":"nope"}`)}); err == nil || !strings.Contains(err.Error(), "the policies are: security") {
		t.Errorf("got %v", err)
	}
	for _, tt := range [][3]string{{"source", "d", "docs"}, {"id", "pol", "policies~security.md"}, {"id", "%", ""}} {
		got, _, err := w.suggestDocument(t.Context(), &call.Completion{Argument: tt[0], Value: tt[1]})
		if err != nil || strings.Join(got, " ") != tt[2] {
			t.Errorf("%v: %v, %v", tt, got, err)
		}
	}
}

// A long document comes in parts that make up the whole, cut between characters.
func TestParts(t *testing.T) {
	whole := strings.Repeat("Zeile mit Ümläuten und 漢字。\n", 500) + strings.Repeat("ü", 3000)
	w := newWorld(t, config(), map[string]string{"long.md": whole})
	got, cursor := "", ""
	for parts := 0; ; parts++ {
		r, err := w.do(t, &call.Call{Name: "get_document", Args: jsontext.Value(`{"source":"docs","id":"long.md","cursor":"` + cursor + `"}`)})
		if err != nil {
			t.Fatal(err)
		}
		var p part
		if err := json.Unmarshal(r.Structured, &p); err != nil {
			t.Fatal(err)
		}
		got += p.Text
		if cursor = p.Next; cursor == "" || parts > 100 {
			break
		}
	}
	if got != whole {
		t.Errorf("%d bytes of %d came back", len(got), len(whole))
	}
	for _, bad := range []string{"x", "YXQ6LTE", "YXQ6OTk5OTk5OTk5"} {
		if _, err := w.do(t, &call.Call{Name: "get_document", Args: jsontext.Value(`{"source":"docs","id":"long.md","cursor":"` + bad + `"}`)}); err == nil || call.AsError(err).Code != call.Invalid {
			t.Errorf("cursor %q: %v", bad, err)
		}
	}
}

// Links, pipes and files that are too large are passed over.
func TestConfined(t *testing.T) {
	w := &world{dir: t.TempDir(), log: &bytes.Buffer{}}
	w.docs = filepath.Join(w.dir, "docs")
	write(t, w.dir, map[string]string{"outside.md": "# Outside\nsecret treasure", "docs/inside.md": "# Inside\nplain", "docs/large.txt": strings.Repeat("large ", 300_000)})
	if err := os.Symlink("../outside.md", filepath.Join(w.docs, "link.md")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(w.dir, filepath.Join(w.docs, "up")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(w.docs, "pipe.md"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.open(t, config())
	if h := w.search(t, "treasure"); h.Total != 0 {
		t.Errorf("found what lies outside: %s", h.ids())
	}
	caps, err := w.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range caps {
		if c.URI != "" && c.URI != "kb://document/docs/inside.md" {
			t.Errorf("%s is listed", c.URI)
		}
	}
	if !strings.Contains(w.log.String(), "over the limit") {
		t.Error("nothing is said of the large file")
	}
}

func TestChanges(t *testing.T) {
	c := config()
	c.Index = "index.db"
	w := newWorld(t, c, map[string]string{"a.md": "# A\nalpha", "b.md": "# B\nbeta"})
	refresh := func() change {
		t.Helper()
		got, err := w.refresh(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := refresh(); got.listed || got.updated != nil {
		t.Errorf("nothing changed, and %+v", got)
	}
	write(t, w.docs, map[string]string{"a.md": "# A\nalpha and omega", "c.md": "# C\ngamma"})
	if err := os.Remove(filepath.Join(w.docs, "b.md")); err != nil {
		t.Fatal(err)
	}
	got := refresh()
	slices.Sort(got.updated)
	if want := []string{"kb://document/docs/a.md", "kb://document/docs/b.md", "kb://document/docs/c.md"}; !got.listed || !slices.Equal(got.updated, want) {
		t.Errorf("got %+v", got)
	}
	for query, want := range map[string]string{"omega": "a.md", "beta": "", "gamma": "c.md"} {
		if h := w.search(t, query); h.ids() != want {
			t.Errorf("%s: %q", query, h.ids())
		}
	}
	// The folder goes away: what is indexed stays, and it is said.
	if err := os.Rename(w.docs, w.docs+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.refresh(t.Context(), false); err == nil {
		t.Error("the folder is gone, and nothing is said")
	}
	if h := w.search(t, "gamma"); h.ids() != "c.md" {
		t.Errorf("the index lost %q", h.ids())
	}
	if err := os.Rename(w.docs+".away", w.docs); err != nil {
		t.Fatal(err)
	}
	refresh()
	// A damaged index is made anew.
	if err := w.db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "index.db"), []byte(strings.Repeat("garbage", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	w.open(t, c)
	if h := w.search(t, "gamma"); h.ids() != "c.md" || !strings.Contains(w.log.String(), "made anew") {
		t.Errorf("got %q; log %s", h.ids(), w.log)
	}
}

// Run tells of changes; it ends with its context.
func TestRun(t *testing.T) {
	c := config()
	c.Refresh = 5 * time.Millisecond
	w := newWorld(t, c, map[string]string{"a.md": "# A\nalpha"})
	ctx, cancel := context.WithCancel(t.Context())
	listed, updated := make(chan struct{}, 1), make(chan string, 1)
	var running sync.WaitGroup
	running.Go(func() {
		err := w.Run(ctx, func(...call.Kind) {
			select {
			case listed <- struct{}{}:
			default:
			}
		}, func(uri string) {
			select {
			case updated <- uri:
			default:
			}
		})
		if err != nil {
			t.Error(err)
		}
	})
	write(t, w.docs, map[string]string{"b.md": "# B\nbeta"})
	<-listed
	if uri := <-updated; uri != "kb://document/docs/b.md" {
		t.Error(uri)
	}
	write(t, w.docs, map[string]string{"a.md": "# A\nanother alpha"})
	if uri := <-updated; uri != "kb://document/docs/a.md" {
		t.Error(uri)
	}
	cancel()
	running.Wait()
}

func TestOpenRefuses(t *testing.T) {
	w := &world{dir: t.TempDir(), log: &bytes.Buffer{}}
	for want, change := range map[string]func(*Config){
		"newel.yaml:sources[0].path: the folder cannot be opened": func(*Config) {},
		"newel.yaml:sources: name at least one":                   func(c *Config) { c.Sources = nil },
		"newel.yaml:sources[0].name: the name":                    func(c *Config) { c.Sources[0].Name = "a/b" },
		"newel.yaml:sources[0].exclude[0]: the pattern":           func(c *Config) { c.Sources[0].Exclude = []string{"["} },
		"part_bytes at least 1024":                                func(c *Config) { c.PartBytes = 1 },
	} {
		c := config()
		change(&c)
		if _, err := Open(t.Context(), "kb", c, w.env()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// Nothing that is searched for is syntax.
func TestHostileQueries(t *testing.T) {
	w := newWorld(t, config(), library)
	for _, q := range []string{`"`, `" OR "`, `NEAR(a b)`, `title: x`, `a AND`, `(`, `^a`, `-a`, `a* b*`, `'; DROP TABLE documents; --`, "漢字", "🚀 rotate", strings.Repeat("a ", 200), `{a b}: c`, `"unclosed phrase`} {
		args := `{"query":` + string(call.AppendString(nil, q)) + `}`
		if _, err := w.do(t, &call.Call{Name: "search_kb", Args: jsontext.Value(args)}); err != nil && call.AsError(err).Code != call.Invalid {
			t.Errorf("%q: %v", q, err)
		}
	}
	if _, err := w.do(t, &call.Call{Name: "search_kb", Args: jsontext.Value(`{"query":"!!! ***"}`)}); err == nil || !strings.Contains(err.Error(), "no words to look for") {
		t.Errorf("got %v", err)
	}
}

func FuzzTerms(f *testing.F) {
	dir := f.TempDir()
	write(f, dir, map[string]string{"docs/a.md": "# A\nalpha"})
	b, err := Open(context.Background(), "kb", config(), module.Env{Dir: dir, Logger: slog.New(slog.DiscardHandler), Position: func(string) string { return "" }, Progress: func(string, int, int) {}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = b.Close() })
	f.Add(`a "b c" d* NEAR/3`)
	f.Add("\"\x00\" OR a")
	f.Fuzz(func(t *testing.T, q string) {
		words := terms(q)
		if len(words) == 0 {
			return
		}
		if _, err := b.find(t.Context(), strings.Join(words, " AND "), "", 1, 0); err != nil {
			t.Errorf("%q became %q: %v", q, words, err)
		}
	})
}

func TestTenThousandDocuments(t *testing.T) {
	dir := t.TempDir()
	const n = 10_000
	for i := range n {
		p := filepath.Join(dir, "docs", fmt.Sprintf("d%02d", i%100))
		if i < 100 {
			if err := os.MkdirAll(p, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		text := fmt.Sprintf("# Document %d\n\nThis is about topic%d and number %d. %s", i, i%500, i, strings.Repeat("Common words fill the rest. ", 30))
		if err := os.WriteFile(filepath.Join(p, fmt.Sprintf("%05d.md", i)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{dir: dir, log: &bytes.Buffer{}}
	env := w.env()
	last, calls := 0, 0
	env.Progress = func(_ string, done, total int) {
		if done <= last || total != n {
			t.Errorf("progress %d of %d after %d", done, total, last)
		}
		last, calls = done, calls+1
	}
	start := time.Now()
	b, err := Open(t.Context(), "kb", config(), env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	took := time.Since(start)
	start = time.Now()
	if _, err := b.refresh(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d documents indexed in %v (%.0f a second), looked through again in %v", n, took.Round(time.Millisecond), n/took.Seconds(), time.Since(start).Round(time.Millisecond))
	if last != n || calls < 10 {
		t.Errorf("progress ended at %d after %d reports", last, calls)
	}
	w.Backend = b
	if h := w.search(t, "topic42", `,"limit":5`); h.Total != 20 || len(h.Results) != 5 || h.Next == "" {
		t.Errorf("got %d of %d", len(h.Results), h.Total)
	} else if next := w.search(t, "topic42", `,"limit":50,"cursor":"`+h.Next+`"`); len(next.Results) != 15 || next.Next != "" {
		t.Errorf("the next page has %d", len(next.Results))
	}
}

func TestSuite(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) call.Backend {
		return newWorld(t, config(), library).Backend
	}, []backendtest.Sample{
		{Name: "search_kb", Args: `{"query":"rotated"}`},
		{Name: "search_kb", Args: `{"query":"!!!"}`, Want: call.Invalid},
		{Name: "get_document", Args: `{"source":"docs","id":"guide.md"}`},
		{Name: "get_document", Args: `{"source":"docs","id":"../guide.md"}`, Want: call.Failed},
		{Name: "get_policy", Args: `{"name":"security"}`},
		{Kind: call.Resource, Name: "kb://document/docs/guide.md"},
		{Kind: call.Resource, Name: "kb://policy/nope", Want: call.NotFound},
		{Kind: call.Prompt, Name: "answer_from_kb", Args: `{"question":"x"}`},
	})
}

// A resource carries a validator: the same while its text is, another one after it changed. Under both
// its URIs a policy tells of changes.
func TestETag(t *testing.T) {
	c := config()
	c.Sources[0].Policies = "policies"
	w := newWorld(t, c, map[string]string{"a.md": "# A\nalpha", "policies/returns.md": "# Returns\nfour weeks"})
	tag := func(uri string) string {
		t.Helper()
		r, err := w.do(t, &call.Call{Kind: call.Resource, Name: uri})
		if err != nil {
			t.Fatal(err)
		}
		var contents []struct {
			Meta map[string]string `json:"_meta"`
		}
		if err := json.Unmarshal(r.Content, &contents); err != nil || len(contents[0].Meta["dev.newel/etag"]) != 32 {
			t.Fatalf("%v: %s", err, r.Content)
		}
		return contents[0].Meta["dev.newel/etag"]
	}
	a, returns := tag("kb://document/docs/a.md"), tag("kb://policy/returns")
	if again := tag("kb://document/docs/a.md"); again != a || a == returns {
		t.Errorf("%s, then %s; another document has %s", a, again, returns)
	}
	write(t, w.docs, map[string]string{"policies/returns.md": "# Returns\nsix weeks, not four"})
	got, err := w.refresh(t.Context(), false)
	if err != nil || !slices.Contains(got.updated, "kb://policy/returns") {
		t.Errorf("%+v, %v", got, err)
	}
	if tag("kb://policy/returns") == returns || tag("kb://document/docs/a.md") != a {
		t.Error("the validators do not tell what changed")
	}
}
