package call

import "time"

// An Artifact is a stored file: a result that was too large to send, or one a tool made.
type Artifact struct {
	URI     string // artifact://…, unguessable
	MIME    string
	Size    int64  // bytes
	SHA256  string // hexadecimal
	Created time.Time
	Expires time.Time // it is deleted after this

	Link      string    // address under which whoever has it can download the artifact; "": there is none
	LinkUntil time.Time // when it ends to work
}
