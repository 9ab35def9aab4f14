package dpop

import (
	"fmt"
	"testing"
	"time"
)

// What is remembered of proofs is bounded, and when there is no room nothing passes.
func TestProofsAreRemembered(t *testing.T) {
	var s seen
	now := time.Unix(1_800_000_000, 0)
	for i := range maxSeen {
		if err := s.first(fmt.Sprint(i), now); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.first("one more", now); err == nil {
		t.Error("there is no bound")
	}
	now = now.Add(2*Window + time.Second)
	if err := s.first("one more", now); err != nil {
		t.Errorf("the next window is full too: %v", err)
	}
	if err := s.first("7", now); err == nil {
		t.Error("a proof of the last window was forgotten")
	}
}
