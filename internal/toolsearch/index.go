package toolsearch

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"strings"
	"unicode"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// BM25 parameters (Robertson and Zaragoza, 2009), and how much more a word counts in a name than
// in running text.
const (
	k1 = 1.2
	b  = 0.6

	nameWeight  = 4.0
	titleWeight = 2.0
	textWeight  = 1.0
	argWeight   = 0.5
)

// An Index ranks tools by how well they fit a query. It is immutable and safe for concurrent use.
type Index struct {
	tools    []*call.Capability
	lengths  []float64
	average  float64
	postings map[string][]posting
	words    []string // all, sorted
}

type posting struct {
	tool   int
	weight float64 // of all occurrences
}

// A Hit is one tool that fits.
type Hit struct {
	Tool  *call.Capability
	Score float64
}

// New indexes tools.
func New(tools []*call.Capability) *Index {
	ix := &Index{tools: tools, lengths: make([]float64, len(tools)), postings: map[string][]posting{}}
	for i, t := range tools {
		weights := map[string]float64{}
		add := func(text string, weight float64) {
			for _, w := range words(text) {
				weights[w] += weight
				ix.lengths[i]++
			}
		}
		add(t.Name, nameWeight)
		add(t.Title, titleWeight)
		add(t.Description, textWeight)
		arguments(t.Input, func(name, description string) {
			add(name, argWeight)
			add(description, argWeight/2)
		})
		for w, weight := range weights {
			ix.postings[w] = append(ix.postings[w], posting{i, weight})
		}
		ix.average += ix.lengths[i] / float64(len(tools))
	}
	ix.words = slices.Sorted(maps.Keys(ix.postings))
	return ix
}

// arguments calls f for each argument of a tool.
func arguments(schema jsontext.Value, f func(name, description string)) {
	var s struct {
		Properties jsontext.Value `json:"properties"`
	}
	if schema == nil || json.Unmarshal(schema, &s) != nil || s.Properties == nil {
		return
	}
	_ = call.EachMember(s.Properties, func(name string, v jsontext.Value) { // checked when the tool was registered
		var p struct {
			Description string `json:"description"`
		}
		_ = json.Unmarshal(v, &p) // a schema may be true: then there is no description
		f(name, p.Description)
	})
}

// Search returns the at most n tools that fit best, best first; equal ones by name.
func (ix *Index) Search(query string, n int) []Hit {
	scores := map[int]float64{}
	seen := map[string]bool{}
	for _, w := range words(query) {
		if seen[w] {
			continue
		}
		seen[w] = true
		ix.score(w, 1, scores)
		for _, other := range append(ix.family(w), related[w]...) {
			if !seen[other] {
				ix.score(other, relatedWeight, scores)
			}
		}
	}
	hits := make([]Hit, 0, len(scores))
	for i, s := range scores {
		hits = append(hits, Hit{ix.tools[i], s})
	}
	slices.SortFunc(hits, func(a, b Hit) int {
		return cmp.Or(cmp.Compare(b.Score, a.Score), strings.Compare(a.Tool.Name, b.Tool.Name))
	})
	return hits[:min(n, len(hits))]
}

// minPrefix is how many letters words of one family share at least: react and reaction.
const minPrefix = 5

// family returns the words that begin with w.
func (ix *Index) family(w string) []string {
	if len(w) < minPrefix {
		return nil
	}
	var out []string
	for i, _ := slices.BinarySearch(ix.words, w); i < len(ix.words) && strings.HasPrefix(ix.words[i], w); i++ {
		if ix.words[i] != w {
			out = append(out, ix.words[i])
		}
	}
	return out
}

func (ix *Index) score(word string, weight float64, scores map[int]float64) {
	found := ix.postings[word]
	n, df := float64(len(ix.tools)), float64(len(found))
	idf := math.Log(1 + (n-df+0.5)/(df+0.5))
	for _, p := range found {
		norm := k1 * (1 - b + b*ix.lengths[p.tool]/ix.average)
		scores[p.tool] += weight * idf * p.weight * (k1 + 1) / (p.weight + norm)
	}
}

// words splits text into normalised words: at everything that is no letter or digit, and where
// camelCase goes up.
func words(text string) []string {
	var out []string
	var word []rune
	flush := func() {
		if len(word) > 0 {
			if w := stem(strings.ToLower(string(word))); !stop[w] {
				out = append(out, w)
			}
			word = word[:0]
		}
	}
	var last rune
	for _, r := range text {
		switch {
		case !unicode.IsLetter(r) && !unicode.IsDigit(r):
			flush()
		case unicode.IsUpper(r) && unicode.IsLower(last):
			flush()
			word = append(word, r)
		default:
			word = append(word, r)
		}
		last = r
	}
	flush()
	return out
}

// stem takes the commonest English endings off, so that orders finds order.
func stem(w string) string {
	if len(w) <= 3 {
		return w
	}
	for _, s := range []struct{ end, instead string }{{"ies", "y"}, {"sses", "ss"}, {"ches", "ch"}, {"shes", "sh"}, {"xes", "x"}, {"ing", ""}, {"ed", ""}, {"s", ""}} {
		if rest, ok := strings.CutSuffix(w, s.end); ok && len(rest) >= 3 && !strings.HasSuffix(w, "ss") {
			return strings.TrimSuffix(rest+s.instead, "e")
		}
	}
	return strings.TrimSuffix(w, "e")
}

// stop are words that stand in every description.
var stop = set("a an and are as at be by can do for from how i in is it its me my of on or our that the their them there this to us was we what where which who will with you your all any each into use used using tool return given want need please")

func set(list string) map[string]bool {
	out := map[string]bool{}
	for _, w := range strings.Fields(list) {
		out[stem(w)] = true
	}
	return out
}

// related are words for one thing, said by different people: those who ask and those who name tools.
var related = groups(
	"find search look lookup query", "get show read fetch view display retrieve", "list enumerate browse",
	"delete remove drop erase destroy", "create add new make insert open", "update change edit modify set rename alter",
	"send post notify email mail message", "cancel stop abort end", "run execute start launch trigger",
	"file document", "folder directory", "issue ticket bug", "customer client buyer", "user person people member employee",
	"price cost amount money", "invoice bill", "order purchase", "picture image photo", "repo repository", "merge combine",
	"schedule book plan appointment", "meeting event calendar", "database table sql", "log history audit", "status state",
	"weather forecast temperature", "translate language", "summary summarize overview", "compare diff difference", "upload store save write",
	"download export", "deploy release ship", "team group", "error failure exception", "metric statistic measure chart")

func groups(lists ...string) map[string][]string {
	out := map[string][]string{}
	for _, l := range lists {
		var stems []string
		for _, w := range strings.Fields(l) {
			stems = append(stems, stem(w))
		}
		for _, w := range stems {
			for _, other := range stems {
				if other != w && !slices.Contains(out[w], other) {
					out[w] = append(out[w], other)
				}
			}
		}
	}
	return out
}

// relatedWeight is how much a related word counts beside the word itself.
const relatedWeight = 0.4
