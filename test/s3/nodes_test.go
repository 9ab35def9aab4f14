package s3

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"newel.dev/newel/test/program"
)

// node runs the daemon with a configuration of its own, in a folder that nodes share.
func node(t *testing.T, dir, name, endpoint string) (base string) {
	t.Helper()
	addr := program.Address(t)
	file := filepath.Join(dir, name+".yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, `
listen: %s
limits: {max_result_bytes: 2KiB}
state: {path: %s.db, checkpoint: %[2]s.checkpoint, key_file: key}
artifacts:
  links_for: 5m
  s3: {endpoint: "%s", bucket: %s, access_key: "${env:S3_ACCESS_KEY}", secret_key: "${env:S3_SECRET_KEY}"}
backends:
  - type: sql
    name: reports
    driver: sqlite
    file: reports.db
    tools:
      - {name: report, description: A large report., result: row, sql: "SELECT printf('%%.*c', 100000, 'x') AS report"}
`, addr, name, endpoint, bucket), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program.Built(t, program.Newel), "serve", "--config", file)
	cmd.Env = append(os.Environ(), "S3_ACCESS_KEY="+accessKey, "S3_SECRET_KEY="+secretKey)
	base = "http://" + addr
	p := program.Serve(t, cmd, program.Ready(base+"/ready"))
	t.Cleanup(func() {
		if err := p.End(30 * time.Second); err != nil {
			t.Error(err)
		}
		if strings.Contains(p.Said(), secretKey) {
			t.Error("the secret key is in the log")
		}
	})
	return base
}

// ask sends one request of revision 2026-07-28.
func ask(t *testing.T, base, method, name, params string) string {
	t.Helper()
	const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base+"/mcp", strings.NewReader(fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":%q,"params":{%s,%s}}`, method, params, meta)))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": method, "Mcp-Name": name} {
		r.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(got)
}

// What one node keeps another gives out, to the caller in parts and to whoever has its address.
func TestNodes(t *testing.T) {
	s := start(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "reports.db"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	one := node(t, dir, "one", s.address)
	two := node(t, dir, "two", s.address)
	answer := ask(t, one, "tools/call", "report", `"name":"report","arguments":{}`)
	var reply struct {
		Result struct {
			Content []struct {
				Type, URI string
				Size      int
				Meta      map[string]string `json:"_meta"`
			}
		}
	}
	if err := json.Unmarshal([]byte(answer), &reply); err != nil || len(reply.Result.Content) < 2 || reply.Result.Content[1].Type != "resource_link" {
		t.Fatalf("%v in %.2000s", err, answer)
	}
	link := reply.Result.Content[1]
	for _, base := range []string{two, one} {
		if got := ask(t, base, "resources/read", link.URI, fmt.Sprintf(`"uri":%q`, link.URI)); !strings.Contains(got, `"dev.newel/sha256":"`+link.Meta["dev.newel/sha256"]) || !strings.Contains(got, "xxxxx") {
			t.Errorf("read at %s: %.300s", base, got)
		}
		resp, err := http.Get(strings.Replace(link.Meta["dev.newel/download"], one, base, 1))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || len(got) != link.Size || !bytes.Contains(got, []byte("xxxxx")) {
			t.Errorf("download at %s: %s, %d bytes of %d, %v", base, resp.Status, len(got), link.Size, err)
		}
	}
	objects, err := filepath.Glob(filepath.Join(s.dir, "newel", "*"))
	if err != nil || len(objects) != 1 {
		t.Errorf("in the bucket: %v, %v", objects, err)
	}
}
