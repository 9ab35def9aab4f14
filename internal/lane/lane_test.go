package lane

import (
	"context"
	"errors"
	"runtime"
	"testing"
)

func TestLargeMessagesLeaveOneProcessor(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	var leaves []func()
	for range max(1, runtime.GOMAXPROCS(0)-1) {
		leave, err := Enter(t.Context(), Large)
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, leave)
	}
	if _, err := Enter(over, Large); !errors.Is(err, context.Canceled) {
		t.Fatalf("one more large message: %v", err)
	}
	leave, err := Enter(over, Large-1)
	if err != nil {
		t.Fatalf("a small message has to wait: %v", err)
	}
	leave()
	waiting := make(chan func())
	go func() {
		leave, err := Enter(t.Context(), Large)
		if err != nil {
			t.Error(err)
		}
		waiting <- leave
	}()
	leaves[0]()
	leaves[0] = <-waiting // whose turn it is then
	for _, leave := range leaves {
		leave()
	}
	if len(places) != 0 {
		t.Errorf("%d turns did not end", len(places))
	}
}
