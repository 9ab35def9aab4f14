package inmem

import (
	"testing"

	"newel.dev/newel/internal/store/storetest"
)

func TestEngine(t *testing.T) {
	storetest.Run(t, func(*testing.T) (storetest.Engine, storetest.Engine) { return New(), nil })
}
