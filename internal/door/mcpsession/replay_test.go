package mcpsession

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// read returns what follows an event.
func read(t *testing.T, s mcp.EventStore, session, id string, index int) ([]string, error) {
	t.Helper()
	var all []string
	for data, err := range s.After(t.Context(), session, id, index) {
		if err != nil {
			return nil, err
		}
		all = append(all, string(data))
	}
	return all, nil
}

func add(t *testing.T, s mcp.EventStore, session, id string, data []byte) {
	t.Helper()
	if err := s.Append(t.Context(), session, id, data); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, s mcp.EventStore, session, id string) {
	t.Helper()
	if err := s.Open(t.Context(), session, id); err != nil {
		t.Fatal(err)
	}
}

// While nothing has to go, events are those of the SDK's own store.
func TestReplayIsTheSDKs(t *testing.T) {
	ours, theirs := newReplay(1<<20), mcp.NewMemoryEventStore(nil)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 2000 {
		session, id := fmt.Sprint("s", r.IntN(3)), []string{"", "a", "b", "c"}[r.IntN(4)]
		switch n := r.IntN(100); {
		case n == 0:
			for _, s := range []mcp.EventStore{ours, theirs} {
				if err := s.SessionClosed(t.Context(), session); err != nil {
					t.Fatal(err)
				}
			}
		case n < 50:
			for _, s := range []mcp.EventStore{ours, theirs} {
				open(t, s, session, id)
				add(t, s, session, id, fmt.Append(nil, i))
			}
		default:
			index := r.IntN(30) - 1
			a, failed := read(t, ours, session, id, index)
			b, want := read(t, theirs, session, id, index)
			if !slices.Equal(a, b) || (failed == nil) != (want == nil) {
				t.Fatalf("after %d: %q %v, want %q %v", index, a, failed, b, want)
			}
		}
	}
}

// The oldest goes first, whosever it is; what is left keeps its place.
func TestReplayForgetsTheOldest(t *testing.T) {
	s := newReplay(2*streamBytes + 4*(eventBytes+1))
	open(t, s, "one", "")
	open(t, s, "two", "a")
	for i := range 4 {
		add(t, s, "one", "", fmt.Append(nil, i))
	}
	add(t, s, "two", "a", []byte("x")) // more than the bound: that streams were opened goes first
	for i := 4; i < 7; i++ {
		add(t, s, "one", "", fmt.Append(nil, i))
	}
	for index, want := range map[int][]string{0: {"1", "2", "3", "4", "5", "6"}, 4: {"5", "6"}, 6: nil, 70: nil} {
		if got, err := read(t, s, "one", "", index); err != nil || !slices.Equal(got, want) {
			t.Errorf("after %d: %q, %v; want %q", index, got, err, want)
		}
	}
	if _, err := read(t, s, "one", "", -1); !errors.Is(err, mcp.ErrEventsPurged) {
		t.Errorf("event 0 is gone, but not missed: %v", err)
	}
	if got, err := read(t, s, "two", "a", -1); err != nil || !slices.Equal(got, []string{"x"}) {
		t.Errorf("%q, %v", got, err)
	}
	if s.used > s.most {
		t.Errorf("%d bytes, at most %d", s.used, s.most)
	}
}

// A session that makes requests for ever takes no more than the bound; what is sent on a stream that is
// forgotten is not told as if it were something else.
func TestReplayOfALongSession(t *testing.T) {
	const most = 64 << 10
	s := newReplay(most)
	open(t, s, "long", "")
	open(t, s, "long", "slow")
	add(t, s, "long", "slow", []byte("begun"))
	for i := range 100_000 {
		id := fmt.Sprint("request ", i)
		open(t, s, "long", id)
		add(t, s, "long", id, []byte("answer"))
		if s.used > most {
			t.Fatalf("%d bytes, at most %d", s.used, most)
		}
	}
	if n := len(s.sessions["long"]); n > most/streamBytes {
		t.Errorf("%d streams", n)
	}
	add(t, s, "long", "slow", []byte("ended"))
	if _, err := read(t, s, "long", "slow", 0); !errors.Is(err, mcp.ErrEventsPurged) {
		t.Errorf("a stream that was forgotten: %v", err)
	}
	if got, err := read(t, s, "long", "request 99999", -1); err != nil || !slices.Equal(got, []string{"answer"}) {
		t.Errorf("%q, %v", got, err)
	}
	add(t, s, "long", "", []byte("changed"))
	if got, err := read(t, s, "long", "", -1); err != nil || !slices.Equal(got, []string{"changed"}) {
		t.Errorf("the session's own stream: %q, %v", got, err)
	}
	if err := s.SessionClosed(t.Context(), "long"); err != nil || s.used != 0 || s.order.Len() != 0 || len(s.sessions) != 0 {
		t.Errorf("%v; %d bytes, %d events, %d sessions are left", err, s.used, s.order.Len(), len(s.sessions))
	}
}

// One event that is larger than all that may be kept is kept until the next one comes.
func TestReplayOfALargeEvent(t *testing.T) {
	s := newReplay(1000)
	open(t, s, "a", "")
	add(t, s, "a", "", make([]byte, 5000))
	if got, err := read(t, s, "a", "", -1); err != nil || len(got) != 1 {
		t.Error(len(got), err)
	}
	add(t, s, "a", "", []byte("small"))
	if got, err := read(t, s, "a", "", 0); err != nil || !slices.Equal(got, []string{"small"}) {
		t.Errorf("%q, %v", got, err)
	}
}
