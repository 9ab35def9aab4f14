package leaks

import (
	"errors"
	"testing"
)

// The rules that come with the program can be read; nothing gets through where they could not.
func TestRules(t *testing.T) {
	k, err := read()
	if err != nil || len(k.rules) < 100 || len(k.of) > 512 {
		t.Fatalf("%+v, %v", k, err)
	}
	broken := &Rules{read: func() (*known, error) { return nil, errors.New("broken") }}
	if found, _, ok := broken.Find("nothing secret", 1000); ok || found != nil {
		t.Errorf("without rules: %v, %v", found, ok)
	}
}
