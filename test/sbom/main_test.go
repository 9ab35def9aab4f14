package main

import (
	"bytes"
	"runtime/debug"
	"strings"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

func TestMaterialsNameWhatIsLinked(t *testing.T) {
	info := &debug.BuildInfo{
		GoVersion: "go1.26.8", Main: debug.Module{Path: "newel.dev/newel", Version: "v0.1.0"},
		Deps: []*debug.Module{
			{Path: "example.com/b", Version: "v1.0.0", Sum: "h1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="},
			{Path: "example.com/a", Version: "v1.0.0", Replace: &debug.Module{Path: "example.com/fork", Version: "v1.0.1"}},
		},
		Settings: []debug.BuildSetting{{Key: "GOOS", Value: "linux"}, {Key: "-ldflags", Value: "-X secret=1"}},
	}
	var one, two bytes.Buffer
	if err := write(&one, info); err != nil {
		t.Fatal(err)
	}
	if err := write(&two, info); err != nil || !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Errorf("the same binary gave two different bills: %v", err)
	}
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(bytes.NewReader(one.Bytes()), cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, c := range *bom.Components {
		have = append(have, c.PackageURL)
	}
	want := "pkg:golang/example.com/b@v1.0.0 pkg:golang/example.com/fork@v1.0.1 pkg:golang/std@1.26.8"
	if got := strings.Join(have, " "); got != want {
		t.Errorf("components:\n got %s\nwant %s", got, want)
	}
	if bom.Metadata.Component.PackageURL != "pkg:golang/newel.dev/newel@v0.1.0" {
		t.Errorf("main component: %s", bom.Metadata.Component.PackageURL)
	}
	if strings.Contains(one.String(), "secret") {
		t.Error("linker flags are in the bill")
	}
}

func TestBinaryWithoutModuleIsAnError(t *testing.T) {
	if err := write(&bytes.Buffer{}, &debug.BuildInfo{}); err == nil {
		t.Error("a binary that does not name its module got a bill")
	}
}

func TestUnreadableSumIsAnError(t *testing.T) {
	info := &debug.BuildInfo{Main: debug.Module{Path: "x"}, Deps: []*debug.Module{{Path: "y", Sum: "h1:not base64"}}}
	if err := write(&bytes.Buffer{}, info); err == nil {
		t.Error("a broken sum passed")
	}
}
