// Command sbom writes the bill of materials of a Go binary as CycloneDX 1.6 JSON: the modules that
// are linked into it, by the build information inside the binary, not by what go.mod might allow.
//
//	go run ./test/sbom dist/newel > dist/newel.cdx.json
//
// The same binary gives the same bytes: there is no time and no random serial number in them.
package main

import (
	"cmp"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: sbom BINARY > FILE")
		os.Exit(2)
	}
	info, err := buildinfo.ReadFile(os.Args[1])
	if err == nil {
		err = write(os.Stdout, info)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

// write writes the bill of materials of a binary with this build information.
func write(out io.Writer, info *debug.BuildInfo) error {
	bom, err := materials(info)
	if err != nil {
		return err
	}
	enc := cdx.NewBOMEncoder(out, cdx.BOMFileFormatJSON)
	enc.SetPretty(true)
	return enc.EncodeVersion(bom, cdx.SpecVersion1_6)
}

func materials(info *debug.BuildInfo) (*cdx.BOM, error) {
	if info.Main.Path == "" {
		return nil, fmt.Errorf("the binary does not say which module it is of; build it with go build inside the module")
	}
	main := component(cdx.ComponentTypeApplication, info.Main.Path, settled(info))
	toolchain := component(cdx.ComponentTypeLibrary, "std", strings.TrimPrefix(info.GoVersion, "go"))
	parts := []cdx.Component{toolchain}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		c := component(cdx.ComponentTypeLibrary, m.Path, m.Version)
		if h, ok := strings.CutPrefix(m.Sum, "h1:"); ok {
			raw, err := base64.StdEncoding.DecodeString(h)
			if err != nil {
				return nil, fmt.Errorf("%s: the sum %q cannot be read: %w", m.Path, m.Sum, err)
			}
			// It is the SHA-256 over the sums of the module's files, as go.sum has it.
			c.Properties = &[]cdx.Property{{Name: "go:module:h1", Value: hex.EncodeToString(raw)}}
		}
		parts = append(parts, c)
	}
	slices.SortFunc(parts, func(a, b cdx.Component) int { return cmp.Compare(a.BOMRef, b.BOMRef) })
	refs := make([]string, len(parts))
	for i, c := range parts {
		refs[i] = c.BOMRef
	}
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Component: &main, Properties: settings(info)}
	bom.Components = &parts
	// Build information is flat: who needs whom is not in it, only that all of it is linked.
	bom.Dependencies = &[]cdx.Dependency{{Ref: main.BOMRef, Dependencies: &refs}}
	return bom, nil
}

func component(kind cdx.ComponentType, path, version string) cdx.Component {
	purl := "pkg:golang/" + path
	if version != "" {
		purl += "@" + version
	}
	return cdx.Component{Type: kind, BOMRef: purl, Name: path, Version: version, PackageURL: purl, Scope: cdx.ScopeRequired}
}

// settled is the version of the main module: its tag, or the revision it was built from.
func settled(info *debug.BuildInfo) string {
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return "devel"
}

// settings are the build settings that change what is linked.
func settings(info *debug.BuildInfo) *[]cdx.Property {
	var out []cdx.Property
	for _, s := range info.Settings {
		switch s.Key {
		case "GOOS", "GOARCH", "CGO_ENABLED", "-tags", "-trimpath", "vcs.modified":
			out = append(out, cdx.Property{Name: "go:build:" + s.Key, Value: s.Value})
		}
	}
	return &out
}
