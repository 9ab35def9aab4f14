package knowledge

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// schemaVersion changes when an older index cannot be used; such an index is made anew.
const schemaVersion = 2

const schema = `
CREATE TABLE documents (
  key     INTEGER PRIMARY KEY,
  source  TEXT NOT NULL,
  id      TEXT NOT NULL,
  path    TEXT NOT NULL,
  title   TEXT NOT NULL,
  mime    TEXT NOT NULL,
  policy  TEXT,
  changed INTEGER NOT NULL,
  size    INTEGER NOT NULL,
  hash    BLOB NOT NULL,
  text    TEXT NOT NULL,
  UNIQUE (source, id)
);
CREATE INDEX policies ON documents (policy) WHERE policy IS NOT NULL;
CREATE VIRTUAL TABLE words USING fts5 (title, text, content='documents', content_rowid='key', tokenize="unicode61 remove_diacritics 2");
CREATE TRIGGER documents_added AFTER INSERT ON documents BEGIN
  INSERT INTO words (rowid, title, text) VALUES (new.key, new.title, new.text);
END;
CREATE TRIGGER documents_removed AFTER DELETE ON documents BEGIN
  INSERT INTO words (words, rowid, title, text) VALUES ('delete', old.key, old.title, old.text);
END;
CREATE TRIGGER documents_changed AFTER UPDATE OF title, text ON documents BEGIN
  INSERT INTO words (words, rowid, title, text) VALUES ('delete', old.key, old.title, old.text);
  INSERT INTO words (rowid, title, text) VALUES (new.key, new.title, new.text);
END;
`

// openIndex opens the index, making it anew if it is missing, damaged or of another version:
// everything in it can be read again from the folders.
func (b *Backend) openIndex(ctx context.Context) error {
	file := b.config.Index
	switch {
	case file == "":
		dir, err := os.MkdirTemp("", "newel-index-")
		if err != nil {
			return err
		}
		b.temp, file = dir, filepath.Join(dir, "index.db")
	case !filepath.IsAbs(file):
		file = filepath.Join(b.env.Dir, file)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	err := b.tryIndex(ctx, file)
	if err == nil || ctx.Err() != nil {
		return err
	}
	b.env.Logger.LogAttrs(ctx, slog.LevelInfo, "the search index is made anew", slog.String("backend", b.name), slog.String("reason", err.Error()))
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(file + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return b.tryIndex(ctx, file)
}

var errVersion = errors.New("it is of another version")

func (b *Backend) tryIndex(ctx context.Context, file string) (err error) {
	q := url.Values{"_pragma": {"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(NORMAL)"}, "_txlock": {"immediate"}}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: file}).EscapedPath(), RawQuery: q.Encode()}).String())
	if err != nil {
		return err
	}
	db.SetMaxOpenConns(4)
	defer func() {
		if err != nil {
			err = errors.Join(err, db.Close())
		} else {
			b.db = db
		}
	}()
	var version, tables int
	if err := db.QueryRowContext(ctx, "SELECT (SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_master)").Scan(&version, &tables); err != nil {
		return err
	}
	if tables > 0 {
		if version != schemaVersion {
			return errVersion
		}
		_, err := db.ExecContext(ctx, "INSERT INTO words (words) VALUES ('integrity-check')")
		return err
	}
	_, err = db.ExecContext(ctx, "BEGIN;"+schema+fmt.Sprintf("PRAGMA user_version = %d; COMMIT;", schemaVersion))
	return err
}

// change is what a refresh found.
type change struct {
	listed  bool     // documents came, went, or changed their titles
	updated []string // URIs of documents with other text, that came or went
}

// update notes that a document is another one, under all its URIs.
func (c *change) update(source, id string, policy sql.NullString) {
	c.updated = append(c.updated, documentURI(source, id))
	if policy.Valid {
		c.updated = append(c.updated, policyPrefix+url.PathEscape(policy.String))
	}
}

// known is what the index knows of a file.
type known struct {
	key     int64
	changed int64
	size    int64
	hash    []byte
	title   string
	id      string
	policy  sql.NullString
}

// found is a file of a folder.
type found struct {
	path string
	info fs.FileInfo
}

const batch = 200 // files of one transaction: bounds memory and what a crash repeats

// refresh brings the index up to date. Files with the size and time that the index knows are not
// read. A folder that is away keeps what is indexed, and is an error.
func (b *Backend) refresh(ctx context.Context, first bool) (change, error) {
	var all change
	var problems []error
	for _, s := range b.config.Sources {
		c, err := b.refreshSource(ctx, s, first)
		all.listed = all.listed || c.listed
		all.updated = append(all.updated, c.updated...)
		if err != nil {
			problems = append(problems, fmt.Errorf("source %q: %w", s.Name, err))
		}
	}
	return all, errors.Join(problems...)
}

func (b *Backend) refreshSource(ctx context.Context, s Source, first bool) (change, error) {
	var c change
	root, err := b.root(s)
	if err != nil {
		return c, err
	}
	files, err := b.walk(ctx, s, root)
	if err != nil {
		return c, err
	}
	index, err := b.indexed(ctx, s.Name)
	if err != nil {
		return c, err
	}
	var todo []found
	for _, f := range files {
		k, ok := index[f.path]
		delete(index, f.path)
		if !ok || k.changed != f.info.ModTime().UnixNano() || k.size != f.info.Size() {
			todo = append(todo, f)
		}
	}
	label := "indexing " + s.Name
	for start := 0; start < len(todo); start += batch {
		part := todo[start:min(start+batch, len(todo))]
		if err := b.indexBatch(ctx, s, root, part, &c); err != nil {
			return c, err
		}
		if first {
			b.env.Progress(label, start+len(part), len(todo))
		}
	}
	if len(index) > 0 { // what is left is in the index and not in the folder
		c.listed = true
		tx, err := b.db.BeginTx(ctx, nil)
		if err != nil {
			return c, err
		}
		for _, k := range index {
			c.update(s.Name, k.id, k.policy)
			if _, err := tx.ExecContext(ctx, "DELETE FROM documents WHERE key = ?", k.key); err != nil {
				return c, errors.Join(err, tx.Rollback())
			}
		}
		return c, tx.Commit()
	}
	return c, nil
}

// walk lists the documents of a folder. Links and everything but regular files are passed over.
func (b *Backend) walk(ctx context.Context, s Source, root *os.Root) ([]found, error) {
	var files []found
	err := fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if p == "." {
				return err
			}
			b.skip(ctx, s, p, err)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if p != "." && strings.HasPrefix(d.Name(), ".") || excluded(s, p) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() || formatOf(p) == nil {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil // it went away just now
		}
		if info.Size() > int64(b.config.MaxFileBytes) {
			b.skip(ctx, s, p, fmt.Errorf("%d bytes, over the limit of %d", info.Size(), b.config.MaxFileBytes))
			return nil
		}
		files = append(files, found{p, info})
		return nil
	})
	return files, err
}

func excluded(s Source, p string) bool {
	for _, pattern := range s.Exclude {
		if ok, err := path.Match(pattern, p); err == nil && ok {
			return true
		}
	}
	return false
}

func (b *Backend) skip(ctx context.Context, s Source, p string, why error) {
	b.env.Logger.LogAttrs(ctx, slog.LevelWarn, "a document is skipped", slog.String("backend", b.name), slog.String("source", s.Name), slog.String("path", p), slog.String("error", why.Error()))
}

func (b *Backend) indexed(ctx context.Context, source string) (map[string]known, error) {
	rows, err := b.db.QueryContext(ctx, "SELECT path, key, changed, size, hash, title, id, policy FROM documents WHERE source = ?", source)
	if err != nil {
		return nil, err
	}
	index := map[string]known{}
	for rows.Next() {
		var p string
		var k known
		if err := rows.Scan(&p, &k.key, &k.changed, &k.size, &k.hash, &k.title, &k.id, &k.policy); err != nil {
			return nil, errors.Join(err, rows.Close())
		}
		index[p] = k
	}
	return index, errors.Join(rows.Err(), rows.Close())
}

// indexBatch reads files and puts them into the index in one transaction.
func (b *Backend) indexBatch(ctx context.Context, s Source, root *os.Root, files []found, c *change) (err error) {
	tx, err := b.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		if rb := tx.Rollback(); err != nil && rb != nil && !errors.Is(rb, sql.ErrTxDone) {
			err = errors.Join(err, rb)
		}
	}()
	for _, f := range files {
		data, err := read(root, f.path, b.config.MaxFileBytes)
		if err != nil {
			b.skip(ctx, s, f.path, err)
			continue
		}
		hash := sha256.Sum256(data)
		format := formatOf(f.path)
		doc, err := format.extract(data)
		if err != nil {
			b.skip(ctx, s, f.path, err)
			doc = document{} // it is listed by its name, so that people see that it is there
		}
		if doc.title == "" {
			doc.title = strings.TrimSuffix(path.Base(f.path), path.Ext(f.path))
		}
		var policy sql.NullString
		if s.Policies != "" && path.Dir(f.path) == path.Clean(s.Policies) {
			policy = sql.NullString{String: strings.TrimSuffix(path.Base(f.path), path.Ext(f.path)), Valid: true}
		}
		var before sql.Null[[]byte]
		var title sql.NullString
		id := idOf(f.path)
		switch err := tx.QueryRowContext(ctx, "SELECT hash, title FROM documents WHERE source = ? AND id = ?", s.Name, id).Scan(&before, &title); {
		case errors.Is(err, sql.ErrNoRows):
			c.listed = true
			c.update(s.Name, id, policy)
		case err != nil:
			return err
		case string(before.V) != string(hash[:]):
			c.update(s.Name, id, policy)
			c.listed = c.listed || title.String != doc.title
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO documents (source, id, path, title, mime, policy, changed, size, hash, text) VALUES (?,?,?,?,?,?,?,?,?,?)
			ON CONFLICT (source, id) DO UPDATE SET title = excluded.title, mime = excluded.mime, policy = excluded.policy, changed = excluded.changed, size = excluded.size, hash = excluded.hash, text = excluded.text`,
			s.Name, id, f.path, doc.title, format.mime, policy, f.info.ModTime().UnixNano(), f.info.Size(), hash[:], doc.text); err != nil {
			return err
		}
	}
	return tx.Commit()
}

// idOf makes a path into an id without slashes.
func idOf(p string) string {
	return strings.ReplaceAll(strings.ReplaceAll(p, "~", "~~"), "/", "~")
}

// read reads a regular file inside a folder. It does not wait on pipes and follows no link out.
func read(root *os.Root, p string, limit int) (data []byte, err error) {
	f, err := root.OpenFile(p, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	data, err = io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(data) > limit {
		return nil, fmt.Errorf("over the limit of %d bytes", limit)
	}
	return data, err
}

// queryTimeout bounds one look into the index.
const queryTimeout = 10 * time.Second
