package effect

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/catalog"
)

const maxShown = 4 << 10 // bytes of arguments in a question

// confirm asks the caller whether it means a call of the classes of Options.Confirm. A person who
// approved exactly this call has said so; an answer that is stored runs nothing; what goes on was
// confirmed when it began. A caller that
// cannot be asked is refused.
func (o *operation) confirm(ctx context.Context) error {
	c := o.c
	class := c.Target.Effect
	if class == call.Unknown {
		class = call.Destructive
	}
	if c.Kind != call.Tool || !slices.Contains(o.o.Confirm, class) || o.rule.Recovery == call.RecoverSafe || c.Approval != nil || c.Door == UndoDoor || len(o.res.Resume) > 0 {
		return nil
	}
	if o.res.Scope != nil {
		op, err := o.store.Find(ctx, o.res.Scope)
		if err != nil {
			return away(ctx, err)
		}
		if op.State == Completed {
			return nil
		}
	}
	args, err := catalog.Canonical(c.Args)
	if err != nil {
		return err
	}
	shown := string(args)
	if len(shown) > maxShown {
		shown = strings.ToValidUTF8(shown[:maxShown], "") + fmt.Sprintf("… (%d bytes)", len(args))
	}
	b := call.AppendString(jsontext.Value(`{"mode":"form","message":`), fmt.Sprintf("This call is %s and cannot be taken back by itself. Run it?\n\n%s %s", class, c.Target.Name, shown))
	b = append(b, `,"requestedSchema":{"type":"object","properties":{"confirm":{"type":"boolean","title":"Run it"}},"required":["confirm"]}}`...)
	q := call.Question{Key: "newel-confirm", Method: call.MethodElicit, Params: b}
	answers, err := c.Asker.Ask(ctx, q)
	if err != nil {
		return err
	}
	var said struct {
		Action  string `json:"action"`
		Content struct {
			Confirm bool `json:"confirm"`
		} `json:"content"`
	}
	if json.Unmarshal(answers[q.Key], &said) != nil || said.Action != "accept" || !said.Content.Confirm {
		return call.Errorf(call.Denied, "the person at the client did not confirm this call; nothing was done")
	}
	return nil
}
