//go:build faults

package sqlite

import (
	"errors"
	"io"
	"io/fs"
	"net/url"
	"os"
	"sync"
	"unsafe"

	"modernc.org/libc"
	lite "modernc.org/sqlite/lib"

	"newel.dev/newel/internal/faultpoint"
)

// throughFaults has files opened through a layer between SQLite and the system's files. Beside each
// file it keeps another one, named .synced, with what a power failure would leave of it: writes get
// there when the file is synced, and not before. It can also refuse to write, or to sync.
func throughFaults(q url.Values) {
	if disk.register() {
		q.Set("vfs", diskName)
	}
}

const diskName = "faults"

// disk is the layer. SQLite knows it as a table of C functions: each of ours does its part and
// calls the one that it replaces.
var disk = &layer{files: map[uintptr]*shadow{}, byName: map[string]*shadow{}, ours: map[uintptr]*lite.Tsqlite3_io_methods{}, theirs: map[uintptr]lite.Tsqlite3_io_methods{}}

type layer struct {
	once   sync.Once
	vfs    lite.Tsqlite3_vfs
	open   uintptr // of the system
	remove uintptr

	mu     sync.Mutex
	files  map[uintptr]*shadow
	byName map[string]*shadow
	ours   map[uintptr]*lite.Tsqlite3_io_methods // by theirs
	theirs map[uintptr]lite.Tsqlite3_io_methods  // by ours
}

// A shadow is one file as a power failure would leave it.
type shadow struct {
	name  string
	mu    sync.Mutex
	dirty [][2]int64 // from, length
}

func (l *layer) register() bool {
	l.once.Do(func() {
		tls := libc.NewTLS()
		system := lite.Xsqlite3_vfs_find(tls, 0)
		l.vfs = *(*lite.Tsqlite3_vfs)(pointer(system))
		name, err := libc.CString(diskName)
		if err != nil {
			panic(err)
		}
		l.open, l.remove = l.vfs.FxOpen, l.vfs.FxDelete
		l.vfs.FzName, l.vfs.FpNext = name, 0
		l.vfs.FxOpen = entry(l.xOpen)
		l.vfs.FxDelete = entry(l.xDelete)
		if rc := lite.Xsqlite3_vfs_register(tls, uintptr(unsafe.Pointer(&l.vfs)), 0); rc != 0 {
			panic("the layer for faults cannot be registered")
		}
	})
	return true
}

// pointer makes a pointer of an address of C memory, which does not move.
func pointer(p uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&p)) }

// kept holds Go functions that C code knows by their address.
var kept []any

// entry returns a function as C code calls it.
func entry[F any](f F) uintptr {
	kept = append(kept, f)
	return *(*uintptr)(unsafe.Pointer(&struct{ f F }{f}))
}

// function is the way back.
func function[F any](p uintptr) F { return *(*F)(unsafe.Pointer(&struct{ p uintptr }{p})) }

func (l *layer) xOpen(tls *libc.TLS, vfs, name, file uintptr, flags int32, out uintptr) int32 {
	rc := function[func(*libc.TLS, uintptr, uintptr, uintptr, int32, uintptr) int32](l.open)(tls, vfs, name, file, flags, out)
	f := (*lite.Tsqlite3_file)(pointer(file))
	if rc != 0 || name == 0 || f.FpMethods == 0 || flags&(lite.SQLITE_OPEN_MAIN_DB|lite.SQLITE_OPEN_WAL) == 0 {
		return rc
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	path := libc.GoString(name)
	s := l.byName[path]
	if s == nil {
		s = &shadow{name: path}
		l.byName[path] = s
		if _, err := os.Stat(path + ".synced"); errors.Is(err, fs.ErrNotExist) { // what was there before is on the disk
			if err := s.all(); err != nil {
				panic(err)
			}
		}
	}
	l.files[file] = s
	theirs := f.FpMethods
	ours := l.ours[theirs]
	if ours == nil {
		m := *(*lite.Tsqlite3_io_methods)(pointer(theirs))
		ours = &lite.Tsqlite3_io_methods{}
		*ours = m
		ours.FxWrite, ours.FxTruncate, ours.FxSync, ours.FxClose = entry(l.xWrite), entry(l.xTruncate), entry(l.xSync), entry(l.xClose)
		l.ours[theirs] = ours
		l.theirs[uintptr(unsafe.Pointer(ours))] = m
	}
	f.FpMethods = uintptr(unsafe.Pointer(ours))
	return rc
}

// of returns the file and the functions of the system for it.
func (l *layer) of(file uintptr) (*shadow, lite.Tsqlite3_io_methods) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.files[file], l.theirs[(*lite.Tsqlite3_file)(pointer(file)).FpMethods]
}

func (l *layer) xWrite(tls *libc.TLS, file, buf uintptr, n int32, at int64) int32 {
	s, m := l.of(file)
	if faultpoint.Armed(faultpoint.DiskFull) {
		return lite.SQLITE_FULL
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dirty = append(s.dirty, [2]int64{at, int64(n)})
	return function[func(*libc.TLS, uintptr, uintptr, int32, int64) int32](m.FxWrite)(tls, file, buf, n, at)
}

func (l *layer) xTruncate(tls *libc.TLS, file uintptr, size int64) int32 {
	_, m := l.of(file)
	return function[func(*libc.TLS, uintptr, int64) int32](m.FxTruncate)(tls, file, size)
}

func (l *layer) xSync(tls *libc.TLS, file uintptr, flags int32) int32 {
	s, m := l.of(file)
	if faultpoint.Armed(faultpoint.SyncFail) {
		return lite.SQLITE_IOERR_FSYNC
	}
	rc := function[func(*libc.TLS, uintptr, int32) int32](m.FxSync)(tls, file, flags)
	if rc == 0 {
		if err := s.sync(); err != nil {
			panic(err)
		}
	}
	return rc
}

func (l *layer) xClose(tls *libc.TLS, file uintptr) int32 {
	_, m := l.of(file)
	l.mu.Lock()
	delete(l.files, file)
	l.mu.Unlock()
	return function[func(*libc.TLS, uintptr) int32](m.FxClose)(tls, file)
}

func (l *layer) xDelete(tls *libc.TLS, vfs, name uintptr, dir int32) int32 {
	rc := function[func(*libc.TLS, uintptr, uintptr, int32) int32](l.remove)(tls, vfs, name, dir)
	if rc == 0 {
		l.mu.Lock()
		defer l.mu.Unlock()
		path := libc.GoString(name)
		delete(l.byName, path)
		_ = os.Remove(path + ".synced")
	}
	return rc
}

// all copies the whole file.
func (s *shadow) all() error {
	b, err := os.ReadFile(s.name)
	if err != nil {
		return err
	}
	return os.WriteFile(s.name+".synced", b, 0o600)
}

// sync copies what was written since the last time. It need not be whole if the process is killed
// meanwhile: neither is what a disk syncs when the power fails.
func (s *shadow) sync() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	from, err := os.Open(s.name)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(s.name+".synced", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	for _, d := range s.dirty {
		if _, err := io.Copy(io.NewOffsetWriter(to, d[0]), io.NewSectionReader(from, d[0], d[1])); err != nil {
			return err
		}
	}
	s.dirty = s.dirty[:0]
	info, err := from.Stat()
	if err != nil {
		return err
	}
	return to.Truncate(info.Size())
}
