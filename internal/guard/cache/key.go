package cache

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

type key [sha256.Size]byte

// A question is what a call asks, as far as answers are concerned.
type question struct {
	rule      int
	wide, own key    // under which an answer is kept for whom the rule says, and for this caller alone
	resource  string // URI, or "" of tools
	reads     string // prefix of the resources that the answer is made of, or ""
}

// question returns what makes two calls the same. ok is false for arguments that have no one form.
func (c *Cache) question(server string, rule int, cl *call.Call) (q *question, ok bool) {
	args := jsontext.Value("{}")
	if len(cl.Args) > 0 {
		args = slices.Clone(cl.Args)
		if args.Canonicalize(jsontext.CanonicalizeRawInts(false), jsontext.CanonicalizeRawFloats(false)) != nil {
			return nil, false
		}
	}
	t := cl.Target
	what := []string{server, cl.Kind.String(), cl.Name, string(args), string(t.Input), t.Owner, t.Origin}
	if t.Depends != call.OnArguments { // whatever else of the request goes on to where it is answered
		flags := []byte{'0', '0', '0', '0', '0'}
		for i, set := range []bool{cl.Client.ElicitForm, cl.Client.ElicitURL, cl.Client.Sampling, cl.Client.SamplingTools, cl.Client.Roots} {
			if set {
				flags[i] = '1'
			}
		}
		what = append(what, string(cl.Meta), string(cl.Unknown), string(cl.Client.Raw), string(flags))
	}
	p := cl.Principal
	if p == nil {
		p = &call.Principal{}
	}
	own := []string{Caller, p.Tenant, p.ID}
	if t.Depends == call.OnCaller { // all of a caller: the same person may come with fewer rights
		own = slices.Concat(own, []string{p.Client, string(sum(p.Scopes)), string(sum(p.Roles))})
	}
	q = &question{rule: rule, own: key(sum(slices.Concat(what, own)))}
	if q.reads = t.Reads; cl.Kind == call.Resource {
		q.resource = cl.Name
	}
	switch r := &c.o.Rules[rule]; {
	case t.Depends == call.OnCaller || r.For == Caller: // a rule cannot make it good for others
		q.wide = q.own
	case r.For == Tenant:
		q.wide = key(sum(append(what, Tenant, p.Tenant)))
	default:
		q.wide = key(sum(append(what, Everybody)))
	}
	return q, true
}

// sum is a digest of texts, of which none can be mistaken for parts of others.
func sum(parts []string) []byte {
	h := sha256.New()
	for _, part := range parts {
		h.Write(binary.AppendUvarint(nil, uint64(len(part))))
		h.Write([]byte(part))
	}
	return h.Sum(nil)
}
