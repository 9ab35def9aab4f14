// Package leaks finds secrets of known services by the rules of gitleaks.
//
// Start reading at [New]. The rules are those that the library brings; the part of it that walks
// through repositories is not used. Rules that need the name of a file are left out: there is none.
package leaks

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"

	ahocorasick "github.com/BobuSumisu/aho-corasick"
	"github.com/spf13/viper"
	"github.com/zricethezav/gitleaks/v8/config"

	"newel.dev/newel/internal/redact"
)

// Rules find secrets. They are safe for concurrent use.
type Rules struct {
	read func() (*known, error) // once
}

var _ redact.Finder = (*Rules)(nil)

// New returns rules that are read when they are used first, which takes some 30 ms: servers whose
// calls only read never use them.
func New() *Rules { return &Rules{read: sync.OnceValues(read)} }

// known is what the rules say.
type known struct {
	rules []config.Rule
	words *ahocorasick.Trie
	of    [][]int // rules by the index of a word
}

func read() (*known, error) {
	v := viper.New()
	v.SetConfigType("toml")
	if err := v.ReadConfig(strings.NewReader(config.DefaultConfig)); err != nil {
		return nil, fmt.Errorf("leaks: %w", err)
	}
	var raw config.ViperConfig
	if err := v.Unmarshal(&raw); err != nil {
		return nil, fmt.Errorf("leaks: %w", err)
	}
	all, err := raw.Translate()
	if err != nil {
		return nil, fmt.Errorf("leaks: %w", err)
	}
	r := &known{}
	index := map[string]int{}
	var words []string
	for _, rule := range all.GetOrderedRules() {
		if rule.Regex == nil || rule.Path != nil || len(rule.Keywords) == 0 {
			continue
		}
		r.rules = append(r.rules, rule)
		for _, w := range rule.Keywords {
			w = strings.ToLower(w)
			i, known := index[w]
			if !known {
				i = len(words)
				index[w] = i
				words, r.of = append(words, w), append(r.of, nil)
			}
			r.of[i] = append(r.of[i], len(r.rules)-1)
		}
	}
	r.words = ahocorasick.NewTrieBuilder().AddStrings(words).Build()
	return r, nil
}

// Find implements redact.Finder. A rule is matched if one of its words is there. Without rules, which
// come with the program, it gives up: nothing is shown.
func (r *Rules) Find(text string, most int) (found []redact.Span, spent int, ok bool) {
	k, err := r.read()
	if err != nil {
		return nil, len(text), false
	}
	return k.find(text, most)
}

func (r *known) find(text string, most int) (found []redact.Span, spent int, ok bool) {
	var seen [512]bool // words; read has fewer
	var due []int
	r.words.Walk([]byte(strings.ToLower(text)), func(_, _, word int64) bool {
		if !seen[word] {
			seen[word] = true
			due = append(due, r.of[word]...)
		}
		return true
	})
	if spent = len(text); spent > most {
		return nil, spent, false
	}
	slices.Sort(due)
	for _, i := range slices.Compact(due) {
		if spent += len(text); spent > most {
			return nil, spent, false
		}
		found = one(found, &r.rules[i], text)
	}
	return found, spent, true
}

// one matches one rule.
func one(found []redact.Span, rule *config.Rule, text string) []redact.Span {
	for _, m := range rule.Regex.FindAllStringSubmatchIndex(text, -1) {
		group := rule.SecretGroup
		if group == 0 { // as gitleaks has it: the first group that is there
			for g := 1; 2*g < len(m); g++ {
				if m[2*g] >= 0 && m[2*g] < m[2*g+1] {
					group = g
					break
				}
			}
		}
		from, to := m[2*group], m[2*group+1]
		if from < 0 || from == to {
			continue
		}
		secret := text[from:to]
		if rule.Entropy > 0 && entropy(secret) <= rule.Entropy || allowed(rule, text, text[m[0]:m[1]], secret) {
			continue
		}
		found = append(found, redact.Span{From: from, To: to, Rule: rule.RuleID})
	}
	return found
}

// allowed reports whether the rule says that this is no secret. Names of files and commits are not
// known here, so lists that ask for them too do not count.
func allowed(rule *config.Rule, text, match, secret string) bool {
	for _, a := range rule.Allowlists {
		target := secret
		switch a.RegexTarget {
		case "match":
			target = match
		case "line":
			target = text
		}
		regex := len(a.Regexes) > 0 && a.RegexAllowed(target)
		word, _ := a.ContainsStopWord(secret)
		if a.MatchCondition == config.AllowlistMatchAnd {
			if len(a.Commits) > 0 || len(a.Paths) > 0 {
				continue
			}
			if (len(a.Regexes) == 0 || regex) && (len(a.StopWords) == 0 || word) {
				return true
			}
		} else if regex || word {
			return true
		}
	}
	return false
}

// entropy is that of Shannon, in bits per character.
func entropy(s string) (bits float64) {
	counts := map[rune]int{}
	n := 0
	for _, c := range s {
		counts[c]++
		n++
	}
	for _, k := range counts {
		p := float64(k) / float64(n)
		bits -= p * math.Log2(p)
	}
	return bits
}
