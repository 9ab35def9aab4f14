// Package claim reads claims of tokens that providers write in more than one way.
//
// Start reading at [Texts]. It knows no token and trusts no issuer: what it returns is what was
// said, and the caller has checked who said it.
package claim

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// List is one text or several, as the claims aud, scp and groups are.
type List []string

// UnmarshalJSON implements json.Unmarshaler.
func (l *List) UnmarshalJSON(raw []byte) error {
	if jsontext.Value(raw).Kind() == '"' {
		var s string
		err := json.Unmarshal(raw, &s)
		*l = List{s}
		return err
	}
	return json.Unmarshal(raw, (*[]string)(l))
}

// Texts returns a claim that holds one text or several; dots lead into objects, unless a claim has
// that whole name. A claim that is not there is empty; one of another kind is an error.
func Texts(claims jsontext.Value, name string) ([]string, error) {
	v := claims
	for _, part := range strings.Split(name, ".") {
		var obj map[string]jsontext.Value
		if v == nil || v.Kind() != '{' || json.Unmarshal(v, &obj) != nil {
			return nil, nil
		}
		if whole, ok := obj[name]; ok { // a claim may have dots in its name
			v = whole
			break
		}
		v = obj[part]
	}
	if v == nil || v.Kind() == 'n' {
		return nil, nil
	}
	var l List
	if err := json.Unmarshal(v, &l); err != nil {
		return nil, fmt.Errorf("the claim %q is neither text nor a list of it", name)
	}
	return l, nil
}

// Time is a time in seconds since 1970, or zero if there is none or nobody could mean it.
func Time(seconds *float64) time.Time {
	if seconds == nil || math.IsNaN(*seconds) || *seconds < 0 || *seconds > 9e9 {
		return time.Time{}
	}
	return time.Unix(0, int64(*seconds*1e9))
}
