package bound

import (
	"context"
	"encoding/base64"
	"errors"
	"maps"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// A shelf is a Store that shows what it was given.
type shelf struct {
	owner *call.Principal
	tool  string
	mime  string
	data  string
	link  string
	fails error
}

func (s *shelf) Put(_ context.Context, owner *call.Principal, tool, mime string, data []byte) (call.Artifact, error) {
	if s.fails != nil {
		return call.Artifact{}, s.fails
	}
	s.owner, s.tool, s.mime, s.data = owner, tool, mime, string(data)
	made := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return call.Artifact{URI: "artifact://ID", MIME: mime, Size: int64(len(data)), SHA256: "abc", Created: made.Add(-time.Hour), Expires: made, Link: s.link, LinkUntil: made.Add(-time.Minute)}, nil
}

func run(t *testing.T, o Options, c *call.Call, r *call.Result) (*call.Result, error) {
	t.Helper()
	b, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return b.Guard(func(context.Context, *call.Call) (*call.Result, error) { return r, nil })(t.Context(), c)
}

func toolCall() *call.Call {
	return &call.Call{Kind: call.Tool, Name: "export", Target: &call.Capability{Kind: call.Tool, Name: "export", Effect: call.Read}, Principal: &call.Principal{ID: "u"}}
}

type content []struct {
	Type, Text, URI, Name, MimeType string
	Size                            int64
	Meta                            map[string]string `json:"_meta"`
}

func decode(t *testing.T, r *call.Result) content {
	t.Helper()
	var c content
	if err := json.Unmarshal(r.Content, &c, json.MatchCaseInsensitiveNames(true)); err != nil {
		t.Fatalf("%v\n%s", err, r.Content)
	}
	return c
}

func TestSmallResultsPass(t *testing.T) {
	r := call.Text("fine")
	c := toolCall()
	got, err := run(t, Options{}, c, r)
	if got != r || err != nil || c.Event.ResultBytes != len(r.Content) || c.Event.Tokens == 0 || c.Event.Paged {
		t.Errorf("got %v, %v, event %+v", got, err, c.Event)
	}
}

func TestLargeTextIsPutAside(t *testing.T) {
	text := strings.Repeat("Ein Satz mit Umlauten: äöü. ", 20_000)
	store := &shelf{}
	c := toolCall()
	r := call.Text(text)
	r.Extra = jsontext.Value(`{"_meta":{"a":1}}`)
	got, err := run(t, Options{Store: store}, c, r)
	if err != nil {
		t.Fatal(err)
	}
	if store.data != text || store.mime != "text/plain; charset=utf-8" || store.owner != c.Principal {
		t.Errorf("kept %d bytes of %s for %v", len(store.data), store.mime, store.owner)
	}
	if got.IsError || got.Structured != nil || string(got.Extra) != string(r.Extra) {
		t.Errorf("answer: %+v", got)
	}
	if !c.Event.Paged || c.Event.ResultBytes != len(got.Content)+len(got.Extra) || c.Event.Tokens > 2000 {
		t.Errorf("event: %+v", c.Event)
	}
	blocks := decode(t, got)
	if len(blocks) != 3 {
		t.Fatalf("%d blocks", len(blocks))
	}
	if !strings.Contains(blocks[0].Text, "artifact://ID?offset=0") || !strings.Contains(blocks[0].Text, "2026-01-02T03:04:05Z") {
		t.Errorf("note: %s", blocks[0].Text)
	}
	link := blocks[1]
	if link.Type != "resource_link" || link.URI != "artifact://ID" || link.Name != "result of export" || link.MimeType != store.mime || link.Size != int64(len(text)) || link.Meta["dev.newel/sha256"] != "abc" {
		t.Errorf("link: %+v", link)
	}
	_, shown, labelled := strings.Cut(blocks[2].Text, "Preview, the first 2048 of")
	_, shown, _ = strings.Cut(shown, "\n")
	if !labelled || !strings.HasPrefix(text, shown) || !utf8.ValidString(shown) || len(shown) < previewBytes-utf8.UTFMax {
		t.Errorf("preview of %d bytes: %.100s", len(shown), blocks[2].Text)
	}
}

// An address for people is only there if the store makes some, and only for the client.
func TestDownloadAddress(t *testing.T) {
	text := strings.Repeat("x", 300<<10)
	for _, link := range []string{"", "https://mcp.example.com/artifacts/ID?signature=s"} {
		store := &shelf{link: link}
		got, err := run(t, Options{Store: store}, toolCall(), call.Text(text))
		if err != nil {
			t.Fatal(err)
		}
		blocks := decode(t, got)
		want := map[string]string{"dev.newel/sha256": "abc", "dev.newel/created": "2026-01-02T02:04:05Z", "dev.newel/expires": "2026-01-02T03:04:05Z"}
		if link != "" {
			want["dev.newel/download"], want["dev.newel/downloadUntil"] = link, "2026-01-02T03:03:05Z"
		}
		if store.tool != "export" || !maps.Equal(blocks[1].Meta, want) || strings.Contains(blocks[0].Text, "/artifacts/") {
			t.Errorf("of %s: %v\n%s", store.tool, blocks[1].Meta, blocks[0].Text)
		}
	}
}

func TestWhatIsKept(t *testing.T) {
	long := strings.Repeat("x", 1000)
	object := jsontext.Value(`{"rows":"` + long + `"}`)
	image := strings.Repeat("\x89PNG", 300)
	encoded := base64.StdEncoding.EncodeToString([]byte(image))
	extra := jsontext.Value(`{"_meta":{"m":"` + strings.Repeat("y", maxExtra) + `"}}`)
	for name, tt := range map[string]struct {
		r          *call.Result
		mime, data string
	}{
		"text that repeats":    {&call.Result{Content: call.TextContent(string(object)), Structured: object}, "application/json", string(object)},
		"only structured":      {&call.Result{Structured: object}, "application/json", string(object)},
		"empty content":        {&call.Result{Content: jsontext.Value(`[]`), Structured: object}, "application/json", string(object)},
		"text that differs":    {&call.Result{Content: call.TextContent("three rows"), Structured: object}, "application/json", `{"content":[{"type":"text","text":"three rows"}],"structuredContent":` + string(object) + `}`},
		"image":                {&call.Result{Content: jsontext.Value(`[{"type":"image","mimeType":"image/png","data":"` + encoded + `"}]`)}, "image/png", image},
		"image that says more": {&call.Result{Content: jsontext.Value(`[{"type":"image","annotations":{},"mimeType":"image/png","data":"` + encoded + `"}]`)}, "application/json", `[{"type":"image","annotations":{},"mimeType":"image/png","data":"` + encoded + `"}]`},
		"two blocks":           {&call.Result{Content: jsontext.Value(`[{"type":"text","text":"` + long + `"},{"type":"text","text":"b"}]`)}, "application/json", `[{"type":"text","text":"` + long + `"},{"type":"text","text":"b"}]`},
		"large extra":          {&call.Result{Content: call.TextContent("a"), Extra: extra}, "application/json", `{"content":[{"type":"text","text":"a"}],"further":` + string(extra) + `}`},
	} {
		t.Run(name, func(t *testing.T) {
			store := &shelf{}
			got, err := run(t, Options{MaxBytes: 500, Store: store}, toolCall(), tt.r)
			if err != nil {
				t.Fatal(err)
			}
			if store.mime != tt.mime || store.data != tt.data {
				t.Errorf("kept as %s: %.200s", store.mime, store.data)
			}
			if !got.Content.IsValid() {
				t.Errorf("content is not JSON: %s", got.Content)
			}
		})
	}
}

func TestOutputSchema(t *testing.T) {
	c := toolCall()
	c.Target.Output = jsontext.Value(`{"type":"object"}`)
	large := jsontext.Value(`{"rows":"` + strings.Repeat("x", 1000) + `"}`)

	if _, err := run(t, Options{}, c, call.Text("no structure")); call.AsError(err) == nil || call.AsError(err).Code != call.Internal {
		t.Errorf("without structured content: %v", err)
	}
	if r, err := run(t, Options{}, c, &call.Result{IsError: true, Content: call.TextContent("failed")}); err != nil || !r.IsError {
		t.Errorf("an error result needs no structure: %v", err)
	}
	r, err := run(t, Options{MaxBytes: 500, Store: &shelf{}}, c, &call.Result{Structured: large})
	if err != nil || !r.IsError || r.Structured != nil || !strings.Contains(decode(t, r)[0].Text, "marked as an error only because") || decode(t, r)[1].Type != "resource_link" {
		t.Errorf("put aside: %+v, %v", r, err)
	}
	wrong := errors.New("rows must be an array")
	o := Options{CheckOutput: func(target *call.Capability, v jsontext.Value) error {
		if target != c.Target || string(v) != string(large) {
			t.Errorf("checked %s", v)
		}
		return wrong
	}}
	if _, err := run(t, o, c, &call.Result{Structured: large}); !errors.Is(err, wrong) || call.AsError(err).Code != call.Internal {
		t.Errorf("against the schema: %v", err)
	}
}

func TestNowhereToKeep(t *testing.T) {
	full := call.Errorf(call.Unavailable, "no space left")
	for name, tt := range map[string]struct {
		store  Store
		effect call.Effect
		want   call.Code
		says   string
	}{
		"no store, read":  {nil, call.Read, call.TooLarge, "ask for less"},
		"no store, write": {nil, call.Write, call.TooLarge, "the tool ran, do not repeat it"},
		"full, read":      {&shelf{fails: full}, call.Read, call.Unavailable, "try again later"},
		"full, write":     {&shelf{fails: full}, call.Write, call.TooLarge, "the tool ran, do not repeat it"},
		"full, unknown":   {&shelf{fails: full}, call.Unknown, call.TooLarge, "the tool ran, do not repeat it"},
	} {
		t.Run(name, func(t *testing.T) {
			c := toolCall()
			c.Target.Effect = tt.effect
			_, err := run(t, Options{MaxBytes: 100, Store: tt.store}, c, call.Text(strings.Repeat("x", 200)))
			e := call.AsError(err)
			if e == nil || e.Code != tt.want || !strings.Contains(e.Message, tt.says) || c.Event.Paged {
				t.Errorf("got %v", err)
			}
			if tt.store != nil && !errors.Is(err, full) {
				t.Error("the cause is lost")
			}
		})
	}
}

func TestOtherKinds(t *testing.T) {
	large := &call.Result{Content: call.TextContent(strings.Repeat("x", 2000))}
	store := &shelf{}
	o := Options{MaxBytes: 1000, Store: store}
	for _, tt := range []struct {
		c    *call.Call
		want call.Code
	}{
		{&call.Call{Kind: call.Resource, Target: &call.Capability{Kind: call.Resource}}, call.TooLarge},
		{&call.Call{Kind: call.Resource, Target: &call.Capability{Kind: call.Resource, MaxResultBytes: 4000}}, call.OK},
		{&call.Call{Kind: call.Prompt, Target: &call.Capability{Kind: call.Prompt}}, call.TooLarge},
		{&call.Call{Kind: call.ListTools}, call.OK},
		{&call.Call{Kind: call.Complete, Target: &call.Capability{Kind: call.Prompt}}, call.OK},
	} {
		r, err := run(t, o, tt.c, large)
		got := call.OK
		if err != nil {
			got = call.AsError(err).Code
		}
		if got != tt.want || got == call.OK && r != large {
			t.Errorf("%v: %v", tt.c.Kind, err)
		}
		if tt.c.Event.ResultBytes != len(large.Content) {
			t.Errorf("%v: event %+v", tt.c.Kind, tt.c.Event)
		}
	}
	if store.data != "" {
		t.Error("something was put aside")
	}
}

func TestTokensBoundAndOwnBound(t *testing.T) {
	chinese := call.Text(strings.Repeat("数据库", 100)) // 300 characters, 900 bytes
	if _, err := run(t, Options{MaxBytes: 10_000, MaxTokens: 299}, toolCall(), chinese); call.AsError(err) == nil || call.AsError(err).Code != call.TooLarge {
		t.Errorf("over the bound of tokens: %v", err)
	}
	c := toolCall()
	c.Target.MaxResultBytes = 10_000
	if _, err := run(t, Options{MaxTokens: 299}, c, chinese); err != nil {
		t.Errorf("within the bound of its own: %v", err)
	}
}

func TestErrorsPass(t *testing.T) {
	b, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	ask := &call.InputRequired{}
	_, err = b.Guard(func(context.Context, *call.Call) (*call.Result, error) { return nil, ask })(t.Context(), toolCall())
	if !errors.Is(err, ask) {
		t.Errorf("got %v", err)
	}
	if _, err := run(t, Options{}, toolCall(), nil); call.AsError(err) == nil || call.AsError(err).Code != call.Internal {
		t.Errorf("neither result nor error: %v", err)
	}
	if _, err := New(Options{MaxBytes: -1}); err == nil {
		t.Error("no error for a bound below zero")
	}
}

func slowTokens(text []byte) int {
	ascii, chars := 0, 0
	for _, r := range string(text) {
		if r < utf8.RuneSelf {
			ascii++
		} else {
			chars++
		}
	}
	return ascii/4 + chars
}

func TestTokens(t *testing.T) {
	for _, s := range []string{"", "a", "hello, world", "数据库", strings.Repeat("a", 31), strings.Repeat("aé数😀", 50), strings.Repeat("x", 100) + "é"} {
		if got, want := Tokens([]byte(s)), slowTokens([]byte(s)); got != want {
			t.Errorf("%.20q: %d, want %d", s, got, want)
		}
	}
}

func FuzzTokens(f *testing.F) {
	f.Add("aé数😀 and more than thirty-two bytes of text")
	f.Fuzz(func(t *testing.T, s string) {
		got := Tokens([]byte(s))
		if utf8.ValidString(s) && got != slowTokens([]byte(s)) {
			t.Errorf("%q: %d", s, got)
		}
		if got < 0 || got > len(s) {
			t.Errorf("%q: %d tokens of %d bytes", s, got, len(s))
		}
	})
}

func benchmark(b *testing.B, r *call.Result) {
	bounds, err := New(Options{})
	if err != nil {
		b.Fatal(err)
	}
	h := bounds.Guard(func(context.Context, *call.Call) (*call.Result, error) { return r, nil })
	c := toolCall()
	b.SetBytes(int64(len(r.Content)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h(b.Context(), c); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGuard(b *testing.B) {
	b.Run("small", func(b *testing.B) { benchmark(b, call.Text("The order is on its way.")) })
	b.Run("100KB", func(b *testing.B) { benchmark(b, call.Text(strings.Repeat("All ASCII, as most are. ", 100_000/24))) })
	b.Run("100KB beyond ASCII", func(b *testing.B) { benchmark(b, call.Text(strings.Repeat("数据库 ", 100_000/10))) })
}
