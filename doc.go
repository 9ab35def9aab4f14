// Package newel builds production MCP servers. Whatever the tool and whatever the door (stdio,
// Streamable HTTP of every revision), a call takes one guarded path: it is observed, admitted,
// resolved, validated, run and bounded, in the order of internal/guard/path.go.
//
// A tool in ten lines:
//
//	type In struct {
//		City string `json:"city" doc:"Where." minLength:"1"`
//	}
//	type Out struct {
//		Celsius float64 `json:"celsius"`
//	}
//	s := newel.New(&newel.Options{Name: "weather"})
//	newel.AddTool(s, newel.Tool{Name: "get_weather", Description: "Weather now.", Effect: call.Read},
//		func(ctx context.Context, req *newel.Request, in In) (Out, error) { return Out{Celsius: 21}, nil })
//	log.Fatal(s.Serve(ctx, "127.0.0.1:8080"))
//
// # A map of the house
//
//   - call: the vocabulary: [call.Call], [call.Result], [call.Capability], [call.Error]
//   - neweltest: the whole path in memory, for tests
//   - modules/sqlite, modules/postgres: what a server remembers, on disk
//   - internal/guard: the order of the path, one folder a step
//   - internal/door: protocols: decode once, run the path, encode
//   - internal/backend: where calls end: Go functions, SQL, documents
//   - internal/catalog: what is published, as immutable snapshots
//   - internal/assembly: turns values into a running house
//   - cmd/newel: the command
package newel
