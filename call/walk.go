package call

import (
	"bytes"

	"github.com/go-json-experiment/json/jsontext"
)

// EachMember calls f for each member of a JSON object, in order. v is only valid during the
// call of f. Anything but an object is an error.
func EachMember(obj jsontext.Value, f func(name string, v jsontext.Value)) error {
	d := jsontext.NewDecoder(bytes.NewBuffer(obj))
	t, err := d.ReadToken()
	if err != nil {
		return err
	}
	if t.Kind() != '{' {
		return Errorf(Malformed, "not a JSON object")
	}
	for d.PeekKind() == '"' {
		t, err := d.ReadToken()
		if err != nil {
			return err
		}
		name := t.String()
		v, err := d.ReadValue()
		if err != nil {
			return err
		}
		f(name, v)
	}
	_, err = d.ReadToken()
	return err
}

// EachElement calls f for each element of a JSON array, in order. v is only valid during the
// call of f. Anything but an array is an error.
func EachElement(arr jsontext.Value, f func(v jsontext.Value)) error {
	d := jsontext.NewDecoder(bytes.NewBuffer(arr))
	t, err := d.ReadToken()
	if err != nil {
		return err
	}
	if t.Kind() != '[' {
		return Errorf(Malformed, "not a JSON array")
	}
	for k := d.PeekKind(); k != ']' && k != 0; k = d.PeekKind() {
		v, err := d.ReadValue()
		if err != nil {
			return err
		}
		f(v)
	}
	_, err = d.ReadToken()
	return err
}
