// Package gofunc publishes Go functions: their JSON Schemas are derived from their types, their
// arguments decoded strictly, their results encoded once.
//
// Start reading at [Tool]; [Schema] says which types and struct tags become which keywords. The
// package validates nothing at call time: that is the validate step's work, with the schema
// derived here.
package gofunc

import (
	"cmp"
	"context"
	"errors"
	"reflect"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"newel.dev/newel/call"
)

// Tool completes c, a tool's capability, with the schemas of In and Out, unless it has its own,
// and with a handler that runs f.
//
// In must be a struct or a map, or a pointer to one. Absent members with a default have it when f
// is called. What Out is decides the result: *call.Result goes out as it is; a string becomes one
// text block; a struct or map becomes structuredContent with an output schema, and its JSON the
// text for clients that read only text; so does anything else if c has an output schema, and
// without one it becomes JSON text.
func Tool[In, Out any](c *call.Capability, f func(context.Context, *call.Call, In) (Out, error)) error {
	in := reflect.TypeFor[In]()
	var err error
	if c.Input == nil {
		if c.Input, err = Schema(in); err != nil {
			return err
		}
	}
	fill, err := newFiller(in)
	if err != nil {
		return err
	}
	out := reflect.TypeFor[Out]()
	if kind := indirect(out).Kind(); c.Output == nil && out != resultType && (kind == reflect.Struct || kind == reflect.Map) {
		if c.Output, err = OutputSchema(out); err != nil {
			return err
		}
	}
	encode := encoder[Out](c.Output != nil)
	c.Run = func(ctx context.Context, call *call.Call) (*call.Result, error) {
		var v In
		if err := decode(call.Args, fill, &v); err != nil {
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

// decode stores arguments in what v points to. They fit the schema; what fails here the schema
// allows and the type does not, such as a number beyond the range of its type.
func decode(args jsontext.Value, fill *filler, v any) error {
	if args == nil {
		args = jsontext.Value("{}")
	}
	if fill != nil {
		args = fill.fill(make(jsontext.Value, 0, len(args)+64), args)
	}
	err := json.Unmarshal(args, v, json.RejectUnknownMembers(true))
	if err == nil {
		return nil
	}
	var at *json.SemanticError
	if !errors.As(err, &at) {
		return call.Errorf(call.Invalid, "the arguments cannot be used").Because(err)
	}
	why := "it does not fit what the tool works with"
	switch {
	case errors.Is(at.Err, json.ErrUnknownName):
		why = "it has a member that the tool does not know"
	case errors.Is(at.Err, strconv.ErrRange):
		why = "it is out of range"
	case at.JSONKind == '0':
		why = "write it as a whole number, without fraction and exponent"
	}
	return call.Errorf(call.Invalid, "invalid arguments: %s: %s", cmp.Or(string(at.JSONPointer), "the object"), why).Because(err)
}

var resultType = reflect.TypeFor[*call.Result]()

// encoder returns how results of a type are encoded; structured says that the tool has an output schema.
func encoder[Out any](structured bool) func(Out) (*call.Result, error) {
	t := reflect.TypeFor[Out]()
	text, _ := ownForm(t, true)
	switch {
	case t == resultType:
		return func(v Out) (*call.Result, error) {
			r, _ := any(v).(*call.Result)
			return r, nil
		}
	case structured:
		return func(v Out) (*call.Result, error) {
			if v := reflect.ValueOf(&v).Elem(); v.Kind() == reflect.Pointer && v.IsNil() {
				return nil, call.Errorf(call.Internal, "internal error").Because(errors.New("the tool returned nil and no error"))
			}
			return call.Structured(v, "")
		}
	case t.Kind() == reflect.String && !text:
		return func(v Out) (*call.Result, error) { return call.Text(reflect.ValueOf(v).String()), nil }
	}
	return func(v Out) (*call.Result, error) {
		raw, err := json.Marshal(v, json.Deterministic(true))
		if err != nil {
			return nil, call.Errorf(call.Internal, "the result could not be encoded").Because(err)
		}
		return call.Text(string(raw)), nil
	}
}
