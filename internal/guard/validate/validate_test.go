package validate

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
	"newel.dev/newel/internal/lane"
)

func TestLargeArgumentsTakeTurns(t *testing.T) {
	checked := 0
	target := &call.Capability{Check: func(args jsontext.Value) error {
		checked++
		if strings.Contains(string(args[:20]), "panic") {
			panic("in a check")
		}
		return nil
	}}
	guard := Guard(func(context.Context, *call.Call) (*call.Result, error) { return call.Text("ok"), nil })
	run := func(ctx context.Context, start string, size int) error {
		args := jsontext.Value(`{"` + start + strings.Repeat("a", size) + `":1}`)
		_, err := guard(ctx, &call.Call{Kind: call.Tool, Args: args, Target: target})
		return err
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	var leaves []func()
	for range max(1, runtime.GOMAXPROCS(0)-1) {
		leave, err := lane.Enter(t.Context(), lane.Large)
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, leave)
	}
	if err := run(over, "large", lane.Large); !errors.Is(err, context.Canceled) || checked != 0 {
		t.Errorf("large arguments out of turn: %v, checked %d times", err, checked)
	}
	if err := run(over, "small", 1000); err != nil || checked != 1 {
		t.Errorf("small arguments: %v, checked %d times", err, checked)
	}
	for _, leave := range leaves {
		leave()
	}
	for range 2 * len(leaves) { // a check that fails badly gives its turn back
		func() {
			defer func() { _ = recover() }()
			_ = run(t.Context(), "panic", lane.Large)
		}()
	}
	if err := run(t.Context(), "large", lane.Large); err != nil || checked != 2+2*len(leaves) {
		t.Errorf("large arguments: %v, checked %d times", err, checked)
	}
}
