package verify

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Why some vectors that are valid are refused all the same, by their number.
const (
	sharedSecret = "a secret that issuer and server share signs no token here"
	otherPurpose = "the key says that it is for another algorithm"
	noAlgorithm  = "the key says that it is for ES521, which does not exist: P-521 signs ES512"
)

var refusedValid = map[int]string{
	1: sharedSecret, 348: sharedSecret, 352: sharedSecret, 357: sharedSecret, 358: sharedSecret, 359: sharedSecret,
	372: sharedSecret, 373: sharedSecret, 376: sharedSecret, 377: sharedSecret,
	346: otherPurpose, 350: otherPurpose, 347: noAlgorithm, 351: noAlgorithm,
}

// Every vector of Wycheproof goes the way of a token's signature: its key is published by an issuer,
// fetched, judged and used.
func TestWycheproof(t *testing.T) {
	raw, err := os.ReadFile("testdata/wycheproof/json_web_signature_test.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Count  int `json:"numberOfTests"`
		Groups []struct {
			Comment string         `json:"comment"`
			Public  jsontext.Value `json:"public"`
			Private jsontext.Value `json:"private"` // of shared secrets there is no other
			Tests   []struct {
				ID      int    `json:"tcId"`
				Comment string `json:"comment"`
				JWS     string `json:"jws"`
				Result  string `json:"result"`
			} `json:"tests"`
		} `json:"testGroups"`
	}
	if err := json.Unmarshal(raw, &file); err != nil {
		t.Fatal(err)
	}
	ran, accepted := 0, map[string]int{}
	for _, g := range file.Groups {
		key := g.Public
		if key == nil {
			key = g.Private
		}
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, `{"keys":[%s]}`, key) }))
		is := &issuer{Issuer: Issuer{URL: s.URL, JWKS: s.URL, Algorithms: append([]string{"RS384", "RS512", "PS384", "PS512", "ES512"}, defaultAlgorithms...)}}
		if err := is.check(resource); err != nil {
			t.Fatal(err)
		}
		is.keys = &keySet{issuer: is.URL, uri: is.JWKS, http: s.Client(), now: time.Now, lost: func() {}}
		for _, tt := range g.Tests {
			ran++
			parts := strings.Split(tt.JWS, ".")
			if len(parts) != 3 {
				if tt.Result != "invalid" {
					t.Errorf("%s %d %s: it has %d parts, and is %s", g.Comment, tt.ID, tt.Comment, len(parts), tt.Result)
				}
				continue // no token in compact form: an issuer would be asked about it
			}
			payload, _, err := is.open(t.Context(), tt.JWS, parts)
			if err == nil {
				accepted[g.Comment]++
			}
			switch why := refusedValid[tt.ID]; {
			case tt.Result != "valid" && tt.Result != "invalid":
				t.Errorf("%s %d %s: the result %q is not known", g.Comment, tt.ID, tt.Comment, tt.Result)
			case (err == nil) != (tt.Result == "valid" && why == ""):
				t.Errorf("%s %d %s is %s (%s): %v", g.Comment, tt.ID, tt.Comment, tt.Result, why, err)
			case err == nil && base64.RawURLEncoding.EncodeToString(payload) != parts[1]:
				t.Errorf("%s %d %s: the payload became %q", g.Comment, tt.ID, tt.Comment, payload)
			}
		}
		s.Close()
	}
	if ran != file.Count || accepted["es256"] == 0 || accepted["rs512"] != 4 || accepted["ps256"] != 6 {
		t.Errorf("of %d vectors %d ran; accepted: %v", file.Count, ran, accepted)
	}
}
