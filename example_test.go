package newel_test

import (
	"context"
	"fmt"
	"strings"

	"newel.dev/newel"
	"newel.dev/newel/call"
	"newel.dev/newel/neweltest"
)

type forecastIn struct {
	City string `json:"city" doc:"Where." minLength:"1"`
	Unit string `json:"unit" doc:"Of the temperature." enum:"celsius,fahrenheit" default:"celsius"`
}

type forecastOut struct {
	Temperature float64 `json:"temperature"`
	Unit        string  `json:"unit"`
}

// A tool is a function of a typed input; its schemas come from the types.
func ExampleAddTool() {
	s := newel.New(&newel.Options{Name: "weather"})
	newel.AddTool(s, newel.Tool{Name: "get_weather", Description: "Weather now.", Effect: call.Read},
		func(ctx context.Context, req *newel.Request, in forecastIn) (forecastOut, error) {
			if in.City == "Atlantis" {
				return forecastOut{}, newel.Errorf("Atlantis has no weather station; try a city on land")
			}
			return forecastOut{Temperature: 21, Unit: in.Unit}, nil
		})

	c := neweltest.New(nil, s)
	defer c.Close()
	fmt.Println(c.Call("get_weather", map[string]any{"city": "Oslo"}).Text())
	fmt.Println(c.Call("get_weather", map[string]any{"city": "Atlantis"}).Text())
	fmt.Println(c.Call("get_weather", map[string]any{"town": "Oslo"}).Text())
	// Output:
	// {"temperature":21,"unit":"celsius"}
	// Atlantis has no weather station; try a city on land
	// invalid arguments: "city" is required and missing; unknown member "town"; accepted: city, unit
}

// A handler asks the person at the caller's side before it has effects.
func ExampleElicit() {
	type confirmation struct {
		Really bool `json:"really" doc:"Deleted files do not come back."`
	}
	type in struct {
		Folder string `json:"folder"`
	}
	s := newel.New(nil)
	newel.AddTool(s, newel.Tool{Name: "empty_folder", Description: "Deletes what is in a folder.", Effect: call.Destructive},
		func(ctx context.Context, req *newel.Request, in in) (string, error) {
			answer, action, err := newel.Elicit[confirmation](ctx, req, "confirm", "Empty "+in.Folder+"?")
			if err != nil {
				return "", err
			}
			if action != newel.Accepted || !answer.Really {
				return "", newel.Errorf("%s was left as it is: the person did not confirm", in.Folder)
			}
			return in.Folder + " is empty", nil
		})

	args := map[string]any{"folder": "drafts"}
	yes := neweltest.New(nil, s, neweltest.WithAnswers(map[string]any{"confirm": neweltest.Accept(confirmation{Really: true})}))
	defer yes.Close()
	fmt.Println(yes.Call("empty_folder", args).Text())
	no := neweltest.New(nil, s, neweltest.WithAnswers(map[string]any{"confirm": neweltest.Decline()}))
	defer no.Close()
	fmt.Println(no.Call("empty_folder", args).Text())
	// Output:
	// drafts is empty
	// drafts was left as it is: the person did not confirm
}

// A template is a family of resources.
func ExampleAddTemplate() {
	s := newel.New(nil)
	newel.AddTemplate(s, newel.Template{Template: "greeting://{language}", Name: "Greetings", MIME: "text/plain",
		Suggest: func(_ context.Context, _, typed string) ([]string, error) {
			var out []string
			for _, l := range []string{"danish", "dutch", "finnish"} {
				if strings.HasPrefix(l, typed) {
					out = append(out, l)
				}
			}
			return out, nil
		}},
		func(_ context.Context, _ *newel.Request, vars map[string]string) (newel.Contents, error) {
			if vars["language"] != "finnish" {
				return newel.Contents{}, call.Errorf(call.NotFound, "no greeting in %s", vars["language"])
			}
			return newel.Contents{Text: "Hyvää päivää"}, nil
		})

	c := neweltest.New(nil, s)
	defer c.Close()
	fmt.Println(c.Read("greeting://finnish").Text())
	fmt.Println(c.Read("greeting://danish").Err.Message)
	fmt.Println(c.Complete(call.Resource, "greeting://{language}", "language", "d", nil))
	// Output:
	// Hyvää päivää
	// no greeting in danish
	// [danish dutch]
}

// A prompt is a parameterised template.
func ExampleAddPrompt() {
	s := newel.New(nil)
	newel.AddPrompt(s, newel.Prompt{Name: "review", Description: "Reviews a text.", Arguments: []call.Argument{
		{Name: "text", Required: true}, {Name: "tone", Enum: []string{"kind", "strict"}}}},
		func(_ context.Context, _ *newel.Request, args map[string]string) ([]newel.Message, error) {
			return []newel.Message{{Role: "user", Content: newel.TextBlock("Review in a " + args["tone"] + " tone: " + args["text"])}}, nil
		})

	c := neweltest.New(nil, s)
	defer c.Close()
	fmt.Println(c.Prompt("review", map[string]string{"text": "Hello.", "tone": "kind"}).Text())
	fmt.Println(c.Complete(call.Prompt, "review", "tone", "s", nil))
	// Output:
	// Review in a kind tone: Hello.
	// [strict]
}

// Errors in what was added surface when the server starts, all of them, with names and places.
func ExampleServer_Handler() {
	s := newel.New(nil)
	type in struct {
		Level string `json:"level" minimum:"1"`
	}
	newel.AddTool(s, newel.Tool{Name: "set_level", Effect: call.Write},
		func(context.Context, *newel.Request, in) (string, error) { return "ok", nil })
	_, err := s.Handler()
	_, message, _ := strings.Cut(err.Error(), "example_test.go:") // before it, where the file is
	_, message, _ = strings.Cut(message, ": ")
	fmt.Println(message)
	// Output:
	// tool "set_level": newel_test.in.Level: the tag minimum does not fit a value of type "string"
}
