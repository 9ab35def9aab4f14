// Package gofunc publishes Go functions: their JSON Schemas are derived from their types, their
// arguments decoded strictly, their results encoded once.
//
// Start reading at [Tool]; [Schema] says which types and struct tags become which keywords. The
// package validates nothing at call time: that is the validate step's work, with the schema
// derived here.
package gofunc

import (
	"context"
	"reflect"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// Tool completes c, a tool's capability, with the schemas of In and Out, unless it has its own,
// and with a handler that runs f.
//
// In must be a struct or a map. Absent members with a default have it when f is called. What Out
// is decides the result: *call.Result goes out as it is; a string becomes one text block; a
// struct or map becomes structuredContent with an output schema, and its JSON the text for
// clients that read only text; anything else becomes JSON text.
func Tool[In, Out any](c *call.Capability, f func(context.Context, *call.Call, In) (Out, error)) error {
	in := reflect.TypeFor[In]()
	fill, err := defaults(in)
	if err != nil {
		return err
	}
	if c.Input == nil {
		if c.Input, err = Schema(in); err != nil {
			return err
		}
	}
	encode, hasSchema := encoder[Out]()
	if c.Output == nil && hasSchema {
		if c.Output, err = Schema(reflect.TypeFor[Out]()); err != nil {
			return err
		}
	}
	c.Run = func(ctx context.Context, call *call.Call) (*call.Result, error) {
		v, err := decode[In](call.Args, fill)
		if err != nil {
			return nil, err
		}
		out, err := f(ctx, call, v)
		if err != nil {
			return nil, err
		}
		return encode(out)
	}
	return nil
}

// decode returns the arguments as In. They fit the schema; what fails here the schema allows and
// the type does not, such as a number beyond the range of its type.
func decode[In any](args jsontext.Value, fill func(reflect.Value)) (In, error) {
	var v In
	if fill != nil {
		fill(reflect.ValueOf(&v).Elem())
	}
	if args == nil {
		return v, nil
	}
	if err := json.Unmarshal(args, &v); err != nil {
		return v, call.Errorf(call.Invalid, "the arguments cannot be used: %s", err)
	}
	return v, nil
}

// encoder returns how results of a type are encoded, and whether they have an output schema.
func encoder[Out any]() (encode func(Out) (*call.Result, error), hasSchema bool) {
	t := reflect.TypeFor[Out]()
	switch {
	case t == reflect.TypeFor[*call.Result]():
		return func(v Out) (*call.Result, error) {
			r, _ := any(v).(*call.Result)
			return r, nil
		}, false
	case t.Kind() == reflect.String:
		return func(v Out) (*call.Result, error) { return call.Text(reflect.ValueOf(v).String()), nil }, false
	}
	base := t
	if base.Kind() == reflect.Pointer {
		base = base.Elem()
	}
	if base.Kind() == reflect.Struct || base.Kind() == reflect.Map {
		return func(v Out) (*call.Result, error) { return call.Structured(v, "") }, true
	}
	return func(v Out) (*call.Result, error) {
		raw, err := json.Marshal(v, json.Deterministic(true))
		if err != nil {
			return nil, call.Errorf(call.Internal, "the result could not be encoded").Because(err)
		}
		return call.Text(string(raw)), nil
	}, false
}
