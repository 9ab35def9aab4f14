package secret

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
)

func TestNeverPrints(t *testing.T) {
	s := New("hunter2")
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "secret", s, "in", struct{ S String }{s})
	encoded, err := json.Marshal(struct{ S String }{s})
	if err != nil {
		t.Fatal(err)
	}
	for name, out := range map[string]string{
		"%v": fmt.Sprintf("%v", s), "%+v": fmt.Sprintf("%+v", struct{ S String }{s}), "%#v": fmt.Sprintf("%#v", s),
		"%s": fmt.Sprint(s), "log": log.String(), "json": string(encoded),
	} {
		if strings.Contains(out, "hunter2") {
			t.Errorf("%s gives it away: %s", name, out)
		}
	}
	if s.Reveal() != "hunter2" || s.IsZero() || !(String{}).IsZero() {
		t.Error("the secret is lost")
	}
}
