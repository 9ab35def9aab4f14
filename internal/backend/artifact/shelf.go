package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A Shelf keeps blobs under names of capital letters and digits. All methods are safe for concurrent
// use and return soon after ctx ends.
type Shelf interface {
	// Put keeps a blob under a new name, whole or not at all, and durably once it has returned. It
	// does not keep the slice. It fails with ErrFull when there is no room.
	Put(ctx context.Context, name string, blob []byte) error
	// Get returns length bytes from offset, and fewer only where the blob ends. It fails with
	// fs.ErrNotExist if there is no such blob.
	Get(ctx context.Context, name string, offset, length int64) ([]byte, error)
	// Delete deletes a blob; one that is not there is no error.
	Delete(ctx context.Context, name string) error
	// List returns all blobs that are whole, in any order, and ends after the first error.
	List(ctx context.Context) iter.Seq2[Entry, error]
	// Close gives back what was opened; blobs stay.
	Close() error
}

// An Entry is what a Shelf says of a blob.
type Entry struct {
	Name     string
	Size     int64
	Modified time.Time
}

// ErrFull is a disk, quota or bucket that has no room.
var ErrFull = errors.New("there is no room")

// memory is a shelf that ends with the process.
type memory struct {
	mu    sync.Mutex
	blobs map[string]kept
}

type kept struct {
	data  []byte
	since time.Time
}

// Memory returns a shelf that ends with the process.
func Memory() Shelf { return &memory{blobs: map[string]kept{}} }

func (m *memory) Put(ctx context.Context, name string, blob []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	m.blobs[name] = kept{bytes.Clone(blob), time.Now()}
	return nil
}

func (m *memory) Get(_ context.Context, name string, offset, length int64) ([]byte, error) {
	m.mu.Lock()
	k, ok := m.blobs[name]
	m.mu.Unlock()
	if !ok {
		return nil, fs.ErrNotExist
	}
	from := min(offset, int64(len(k.data)))
	return k.data[from:min(from+length, int64(len(k.data)))], nil
}

func (m *memory) Delete(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.blobs, name)
	return nil
}

func (m *memory) List(context.Context) iter.Seq2[Entry, error] {
	m.mu.Lock()
	defer m.mu.Unlock()
	entries := make([]Entry, 0, len(m.blobs))
	for name, k := range m.blobs {
		entries = append(entries, Entry{name, int64(len(k.data)), k.since})
	}
	return func(yield func(Entry, error) bool) {
		for _, e := range entries {
			if !yield(e, nil) {
				return
			}
		}
	}
}

func (m *memory) Close() error { return nil }

// A dir is a folder of blobs.
//
// The order of things makes a blob whole or not there. It is written under another name and
// synced; a crash leaves a .tmp file, which is deleted when it is old. Then it is renamed, which is the
// moment from which it exists, and then the folder is synced, so that it still exists after a
// power loss.
type dir struct {
	root   *os.Root                          // nothing outside of it can be reached, through links neither
	create func(name string) (target, error) // opens a new file
}

// A target is a file being written. Tests have one that fails.
type target interface {
	io.WriteCloser
	Sync() error
}

const (
	tmpSuffix = ".tmp"
	tmpAge    = time.Hour // no blob takes that long
)

// Dir returns a shelf in a folder, which it makes. It touches no file that does not have the name
// of a blob.
func Dir(path string) (Shelf, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("the folder for artifacts cannot be made: %w", err)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, fmt.Errorf("the folder for artifacts cannot be opened: %w", err)
	}
	return &dir{root: root, create: func(name string) (target, error) {
		return root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	}}, nil
}

func (d *dir) Put(ctx context.Context, name string, blob []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := d.write(name, blob)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return errors.Join(ErrFull, err)
	}
	return err
}

func (d *dir) write(name string, blob []byte) error {
	f, err := d.create(name + tmpSuffix)
	if err != nil {
		return err
	}
	_, err = f.Write(blob)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = d.root.Rename(name+tmpSuffix, name)
	}
	if err != nil {
		return errors.Join(err, d.root.Remove(name+tmpSuffix))
	}
	return d.sync()
}

// sync makes names durable.
func (d *dir) sync() error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (d *dir) Get(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := d.root.Open(name)
	if err != nil {
		return nil, err
	}
	data := make([]byte, length)
	n, err := f.ReadAt(data, offset)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return data[:n], errors.Join(err, f.Close())
}

func (d *dir) Delete(_ context.Context, name string) error {
	if err := d.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (d *dir) List(context.Context) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		entries, err := fs.ReadDir(d.root.FS(), ".")
		if err != nil {
			yield(Entry{}, err)
			return
		}
		for _, e := range entries {
			name, half := strings.CutSuffix(e.Name(), tmpSuffix)
			if !isID(name) || !e.Type().IsRegular() {
				continue
			}
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue // it went while we looked
			}
			if err == nil && half {
				if time.Since(info.ModTime()) > tmpAge {
					err = d.Delete(context.Background(), e.Name())
				}
				if err == nil {
					continue
				}
			}
			if err != nil {
				yield(Entry{}, err)
				return
			}
			if !yield(Entry{name, info.Size(), info.ModTime()}, nil) {
				return
			}
		}
	}
}

func (d *dir) Close() error { return d.root.Close() }
