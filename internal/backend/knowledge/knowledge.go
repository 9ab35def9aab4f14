// Package knowledge publishes folders of documents: full-text search, reading by id, resources
// and a prompt. Markdown, text, HTML and PDF are read.
//
// Start reading at [Open], then [Backend.refresh] in index.go. The index is SQLite FTS5, because
// the daemon carries SQLite already, it ranks with BM25 and makes snippets itself, one file holds
// documents and index in one transaction, and it is safe to kill. (Bleve would add some thirty
// modules and a second storage format for analyzers that this does not need.) Words are found
// whatever their case and accents; text without spaces between words, such as Chinese, is only
// found by whole runs of it.
//
// The index holds the text of every document, so reading goes on while a folder is away. Callers
// name documents by ids that the index knows, never by paths; files are only read through
// os.Root. A document that cannot be read is skipped, with a line in the log.
package knowledge

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	_ "modernc.org/sqlite" // the driver

	"newel.dev/newel/call"
	"newel.dev/newel/internal/module"
)

// Config is a knowledge base.
type Config struct {
	Sources      []Source      `yaml:"sources" required:"true" doc:"Folders of documents."`
	Index        string        `yaml:"index" doc:"File of the search index. Without it the index is made anew at each start."`
	MaxFileBytes int           `yaml:"max_file_bytes" default:"10485760" doc:"Larger files are skipped."`
	PartBytes    int           `yaml:"part_bytes" default:"24576" doc:"Longer documents are read in parts of about this size."`
	Refresh      time.Duration `yaml:"refresh" default:"5s" doc:"How often folders are looked through for changes."`
	Owner        string        `yaml:"owner" doc:"Who answers for it."`
}

// Source is one folder.
type Source struct {
	Name     string   `yaml:"name" required:"true" doc:"Name of the source: letters, digits and - _ ."`
	Path     string   `yaml:"path" required:"true" doc:"The folder."`
	Exclude  []string `yaml:"exclude" doc:"Patterns of paths to leave out, such as drafts/*."`
	Policies string   `yaml:"policies" doc:"Folder inside this one whose documents are policies, for get_policy."`
}

// A Backend is a knowledge base. It is safe for concurrent use.
type Backend struct {
	name   string
	config Config
	env    module.Env
	db     *sql.DB
	temp   string // folder of an index that is not kept, or ""
	mu     sync.Mutex
	roots  map[string]*os.Root // open folders by source; guarded by mu
}

// Module declares the kind of backend for the configuration.
func Module() module.Module {
	return module.Backend("knowledge", "A knowledge base: search and reading over folders of documents.", func(ctx context.Context, name string, c Config, env module.Env) (call.Backend, error) {
		return Open(ctx, name, c, env)
	})
}

// Open opens the index and brings it up to date with the folders.
func Open(ctx context.Context, name string, c Config, env module.Env) (*Backend, error) {
	at := func(path string, err error) error { return fmt.Errorf("%s: %w", env.Position(path), err) }
	if c.MaxFileBytes < 1 || c.PartBytes < 1024 || c.Refresh <= 0 {
		return nil, at("", errors.New("max_file_bytes and refresh must be above zero, part_bytes at least 1024"))
	}
	if len(c.Sources) == 0 {
		return nil, at("sources", errors.New("name at least one folder"))
	}
	b := &Backend{name: name, config: c, env: env, roots: map[string]*os.Root{}}
	for i, s := range c.Sources {
		path := fmt.Sprintf("sources[%d]", i)
		if s.Name == "" || strings.Trim(s.Name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") != "" {
			return nil, at(path+".name", fmt.Errorf("the name %q may only hold letters, digits and the signs - _ and dot", s.Name))
		}
		if slices.ContainsFunc(c.Sources[:i], func(o Source) bool { return o.Name == s.Name }) {
			return nil, at(path+".name", fmt.Errorf("two sources are named %q", s.Name))
		}
		for j, p := range s.Exclude {
			if _, err := filepath.Match(p, "x"); err != nil {
				return nil, at(fmt.Sprintf("%s.exclude[%d]", path, j), fmt.Errorf("the pattern %q is not valid", p))
			}
		}
		if _, err := b.root(s); err != nil {
			return nil, errors.Join(at(path+".path", fmt.Errorf("the folder cannot be opened: %w", err)), b.Close())
		}
	}
	if err := b.openIndex(ctx); err != nil {
		return nil, errors.Join(at("index", err), b.Close())
	}
	if _, err := b.refresh(ctx, true); err != nil {
		return nil, errors.Join(at("sources", err), b.Close())
	}
	return b, nil
}

// root returns the open folder of a source. It is opened anew when another folder has come to
// stand at its path, as deployments that swap folders do.
func (b *Backend) root(s Source) (*os.Root, error) {
	path := s.Path
	if !filepath.IsAbs(path) {
		path = filepath.Join(b.env.Dir, path)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if r := b.roots[s.Name]; r != nil {
		if was, err := r.Stat("."); err == nil && os.SameFile(was, now) {
			return r, nil
		}
		delete(b.roots, s.Name)
		if err := r.Close(); err != nil {
			return nil, err
		}
	}
	r, err := os.OpenRoot(path)
	if err == nil {
		b.roots[s.Name] = r
	}
	return r, err
}

// Close closes the index and the folders.
func (b *Backend) Close() error {
	var errs []error
	if b.db != nil {
		errs = append(errs, b.db.Close())
	}
	for _, r := range b.roots {
		errs = append(errs, r.Close())
	}
	if b.temp != "" {
		errs = append(errs, os.RemoveAll(b.temp))
	}
	return errors.Join(errs...)
}

// Name implements call.Backend.
func (b *Backend) Name() string { return b.name }

// Run implements call.Watcher: it looks through the folders until ctx ends.
func (b *Backend) Run(ctx context.Context, changed func(kinds ...call.Kind), updated func(uri string)) error {
	tick := time.NewTicker(b.config.Refresh)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		c, err := b.refresh(ctx, false)
		if err != nil && ctx.Err() == nil {
			b.env.Logger.LogAttrs(ctx, slog.LevelWarn, "documents could not be looked through; what is indexed stays", slog.String("backend", b.name), slog.String("error", err.Error()))
		}
		if c.listed {
			changed()
		}
		for _, uri := range c.updated {
			updated(uri)
		}
	}
}

const (
	everything     = "kb://"
	documentPrefix = "kb://document/"
	policyPrefix   = "kb://policy/"
)

func documentURI(source, id string) string {
	return documentPrefix + url.PathEscape(source) + "/" + url.PathEscape(id)
}

// parseDocumentURI undoes documentURI.
func parseDocumentURI(uri string) (source, id string, ok bool) {
	rest, ok := strings.CutPrefix(uri, documentPrefix)
	s, i, cut := strings.Cut(rest, "/")
	source, err1 := url.PathUnescape(s)
	id, err2 := url.PathUnescape(i)
	return source, id, ok && cut && err1 == nil && err2 == nil
}
