package newel_test

import (
	"context"
	"fmt"
	"testing"

	"newel.dev/newel"
	"newel.dev/newel/call"
	"newel.dev/newel/neweltest"
)

// example stands in for *testing.T.
type example struct{ testing.TB }

func (example) Helper()                           {}
func (example) Context() context.Context          { return context.Background() }
func (example) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }

func ExampleAddTool() {
	type in struct {
		City  string `json:"city" doc:"Where." minLength:"1"`
		Units string `json:"units" enum:"celsius,fahrenheit" default:"celsius"`
	}
	type out struct {
		City  string  `json:"city"`
		Value float64 `json:"value"`
		Units string  `json:"units"`
	}
	s := newel.New(&newel.Options{Name: "weather"})
	newel.AddTool(s, newel.Tool{Name: "get_weather", Description: "Weather now.", Effect: call.Read},
		func(_ context.Context, _ *newel.Request, in in) (out, error) {
			return out{in.City, 21, in.Units}, nil
		})

	c := neweltest.New(example{}, s)
	fmt.Printf("%+v\n", neweltest.Call[out](c, "get_weather", map[string]any{"city": "Oslo"}))
	fmt.Println(c.Fail("get_weather", map[string]any{"citi": "Oslo"}).Message)
	fmt.Println(c.Fail("get_weather", map[string]any{"city": "Oslo", "units": "kelvin"}).Message)
	// Output:
	// {City:Oslo Value:21 Units:celsius}
	// invalid arguments: "city" is required and missing; unknown member "citi"; did you mean "city"?
	// invalid arguments: /units: must be one of "celsius", "fahrenheit"
}

// A handler that asks its caller is written once; it works for every protocol revision.
func ExampleElicit() {
	type confirmation struct {
		Sure bool `json:"sure" doc:"Really?"`
	}
	s := newel.New(nil)
	newel.AddTool(s, newel.Tool{Name: "delete_account", Description: "Deletes an account.", Effect: call.Destructive},
		func(ctx context.Context, req *newel.Request, in struct {
			ID int `json:"id"`
		}) (string, error) {
			answer, action, err := newel.Elicit[confirmation](ctx, req, "sure", "Delete this account?")
			if err != nil {
				return "", err
			}
			if action != newel.Accepted || !answer.Sure {
				return "", newel.Errorf("the person said no; do not try again")
			}
			return fmt.Sprintf("account %d is deleted", in.ID), nil
		})

	fmt.Println(neweltest.Call[string](neweltest.New(example{}, s).Answer("sure", neweltest.Accept(confirmation{true})), "delete_account", map[string]int{"id": 7}))
	fmt.Println(neweltest.New(example{}, s).Answer("sure", neweltest.Decline()).Fail("delete_account", map[string]int{"id": 7}).Message)
	// Output:
	// account 7 is deleted
	// the person said no; do not try again
}

func ExampleAddTemplate() {
	s := newel.New(nil)
	newel.AddTemplate(s, newel.Template{Template: "note://{name}", Name: "note", MIME: "text/plain"},
		func(_ context.Context, _ *newel.Request, vars map[string]string) (newel.Contents, error) {
			return newel.Contents{Text: "About " + vars["name"] + "."}, nil
		})
	fmt.Println(neweltest.New(example{}, s).Read("note://rivers"))
	// Output:
	// [{"uri":"note://rivers","mimeType":"text/plain","text":"About rivers."}]
}

func ExampleAddPrompt() {
	s := newel.New(nil)
	newel.AddPrompt(s, newel.Prompt{Name: "review", Description: "Reviews a text.", Arguments: []call.Argument{
		{Name: "text", Required: true}, {Name: "tone", Enum: []string{"kind", "strict"}},
	}}, func(_ context.Context, _ *newel.Request, args map[string]string) ([]newel.Message, error) {
		return []newel.Message{{Role: "user", Content: newel.TextBlock("Review: " + args["text"])}}, nil
	})
	c := neweltest.New(example{}, s)
	fmt.Println(c.Prompt("review", map[string]string{"text": "Hello."}))
	fmt.Println(c.Complete(call.Prompt, "review", "tone", "s"))
	// Output:
	// [{"role":"user","content":{"type":"text","text":"Review: Hello."}}]
	// [strict]
}
