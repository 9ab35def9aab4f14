// Package lane has large messages take turns, for small ones not to wait behind them.
//
// To decode 4 MB, or to hold them against a schema, takes a processor for milliseconds. While all
// processors do that, small calls wait at each of their steps, and nobody even looks for what has come
// over the network. So large messages leave one processor to the others. Start reading at [Enter]. It
// does not know what a message is.
package lane

import (
	"context"
	"runtime"
)

// Large is the size, in bytes, of a message that takes turns: about a millisecond of work.
const Large = 256 << 10

// places are those of the whole process, as its processors are.
var places = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1))

// Enter waits for the turn of a message of so many bytes, first come first served, and returns what ends the
// turn; one that is not large has no turn to wait for. It fails with the error of ctx, if that ends
// first. Who has the turn waits for nothing and enters no second time. It is safe for concurrent use.
func Enter(ctx context.Context, size int) (leave func(), err error) {
	if size < Large {
		return func() {}, nil
	}
	select {
	case places <- struct{}{}:
		return func() { <-places }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
