package issuer_test

import (
	"testing"

	"newel.dev/newel/internal/identity/issuer"
	"newel.dev/newel/internal/store/logintest"
)

func TestMemory(t *testing.T) {
	m := issuer.NewMemory(nil)
	logintest.Run(t, m, m)
}
