package artifact

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"

	"newel.dev/newel/call"
)

// A disk is a folder of artifacts: <id>.data and, beside it, <id>.json with what is known of it.
//
// The order of things makes an artifact whole or not there. Written first is the data, under
// another name; a crash leaves a .tmp file. Then it is renamed; a crash leaves data that nothing
// describes. Then the description comes, in the same two steps: its rename is the moment from
// which the artifact exists. It is deleted in the opposite order. What a crash left is deleted by
// the next process.
type disk struct {
	root   *os.Root                          // nothing outside of it can be reached, through links neither
	create func(name string) (target, error) // opens a new file
}

// A target is a file being written. Tests have one that fails.
type target interface {
	io.WriteCloser
	Sync() error
}

const (
	dataSuffix   = ".data"
	recordSuffix = ".json"
	tmpSuffix    = ".tmp"
	idLength     = 52
	maxRecord    = 64 << 10 // bytes of a description
)

// A record is what stands beside the data.
type record struct {
	Owner   string    `json:"owner"`
	MIME    string    `json:"mime"`
	Size    int64     `json:"size"`
	SHA256  string    `json:"sha256"`
	Text    bool      `json:"text"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
}

// openDisk opens the folder and returns the artifacts in it that are whole and have not expired.
// It touches no file that does not have the name of an artifact.
func openDisk(dir string, now time.Time) (*disk, []*item, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("the folder for artifacts cannot be made: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("the folder for artifacts cannot be opened: %w", err)
	}
	d := &disk{root: root}
	d.create = func(name string) (target, error) {
		return root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	}
	found, err := d.load(now)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("the folder for artifacts cannot be read: %w", err), root.Close())
	}
	return d, found, nil
}

func (d *disk) load(now time.Time) ([]*item, error) {
	entries, err := fs.ReadDir(d.root.FS(), ".")
	if err != nil {
		return nil, err
	}
	var found []*item
	whole := map[string]bool{}
	for _, e := range entries {
		id, suffix := split(e.Name())
		if suffix != recordSuffix {
			continue
		}
		if it := d.read(id); it != nil && now.Before(it.expires) {
			found = append(found, it)
			whole[id] = true
		}
	}
	for _, e := range entries {
		id, suffix := split(e.Name())
		if suffix == "" || whole[id] && (suffix == dataSuffix || suffix == recordSuffix) {
			continue
		}
		if err := d.root.Remove(e.Name()); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// split takes the name of a file of ours apart; the suffix of any other is "".
func split(name string) (id, suffix string) {
	if len(name) <= idLength {
		return "", ""
	}
	id, suffix = name[:idLength], name[idLength:]
	for i := range id {
		if (id[i] < 'A' || id[i] > 'Z') && (id[i] < '2' || id[i] > '7') {
			return "", ""
		}
	}
	switch strings.TrimSuffix(suffix, tmpSuffix) {
	case dataSuffix, recordSuffix:
		return id, suffix
	}
	return "", ""
}

// read returns the artifact, or nil if it is not whole.
func (d *disk) read(id string) *item {
	f, err := d.root.Open(id + recordSuffix)
	if err != nil {
		return nil
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if errors.Join(err, f.Close()) != nil {
		return nil
	}
	var r record
	if json.Unmarshal(raw, &r, json.RejectUnknownMembers(true)) != nil {
		return nil
	}
	info, err := d.root.Lstat(id + dataSuffix)
	if err != nil || !info.Mode().IsRegular() || info.Size() != r.Size {
		return nil
	}
	return &item{id: id, owner: r.Owner, mime: r.MIME, size: r.Size, sha256: r.SHA256, text: r.Text, created: r.Created, expires: r.Expires}
}

// write keeps an artifact, whole or not at all.
func (d *disk) write(it *item, data []byte) error {
	raw, err := json.Marshal(record{it.owner, it.mime, it.size, it.sha256, it.text, it.created.UTC(), it.expires.UTC()})
	if err != nil {
		return call.Errorf(call.Internal, "internal error").Because(err)
	}
	if err = d.file(it.id+dataSuffix, data); err == nil {
		err = d.file(it.id+recordSuffix, raw)
	}
	if err == nil {
		err = d.sync() // the names
	}
	if err == nil {
		return nil
	}
	d.remove(it.id)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return call.Errorf(call.Unavailable, "the result cannot be stored: the server's disk is full; ask its operator to make room").Because(err)
	}
	return call.Errorf(call.Unavailable, "the result cannot be stored at the moment; try again later").Because(err)
}

// file writes one file under another name and renames it once it is on the disk.
func (d *disk) file(name string, data []byte) error {
	f, err := d.create(name + tmpSuffix)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = d.root.Rename(name+tmpSuffix, name)
	}
	if err != nil {
		return errors.Join(err, d.root.Remove(name+tmpSuffix))
	}
	return nil
}

func (d *disk) sync() error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// remove deletes an artifact: first what makes it one. What cannot be deleted now the next
// process deletes.
func (d *disk) remove(id string) {
	_ = d.root.Remove(id + recordSuffix)
	_ = d.root.Remove(id + dataSuffix)
}

// fill reads part of an artifact.
func (d *disk) fill(part []byte, id string, offset int64) error {
	f, err := d.root.Open(id + dataSuffix)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(io.NewSectionReader(f, offset, int64(len(part))), part)
	return errors.Join(err, f.Close())
}
