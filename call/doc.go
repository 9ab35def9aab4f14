// Package call is the vocabulary of Newel: the value that travels ([Call]), the value that
// comes back ([Result]), what can be called ([Capability]), who handles it ([Handler],
// [Guard], [Backend]) and how it fails ([Error]).
//
// Start reading at [Call]. A door (stdio, Streamable HTTP) turns a protocol message into a
// Call; the guards of internal/guard run in the order of internal/guard/path.go; a backend's
// handler ends it. Neither a Call nor a Result knows which door or which backend it meets.
//
// Arguments and results are raw JSON ([jsontext.Value]): checked strictly once by the door and
// never decoded and encoded again on the way, so that unknown fields, key order and number
// precision survive.
//
// The package holds no state and starts nothing. It imports nothing of Newel.
package call
