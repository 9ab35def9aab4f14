package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"reflect"
	"sync/atomic"

	"newel.dev/newel/internal/assembly"
	"newel.dev/newel/internal/backend/mcpupstream"
	"newel.dev/newel/internal/config"
)

// opened is what a configuration opened: the parts of a house, and what has to be closed after it.
type opened struct {
	*assembly.House // nil for a configuration that another house goes over to
	file            *config.File
	options         assembly.Options
	telemetry       *telemetry
	things          map[string]*thing
	order           []*thing // as they were opened
}

// A thing is a part that configurations share which say the same of it.
type thing struct {
	settings any
	value    any
	close    func(context.Context) error
	users    atomic.Int32
}

// reuse returns the part of a name: that of before, if it was opened with the same settings,
// otherwise what open opens. It is closed when no configuration has it any more.
func reuse[T any](o, before *opened, name string, settings any, open func() (T, func(context.Context) error, error)) (T, error) {
	if before != nil {
		if t := before.things[name]; t != nil && reflect.DeepEqual(t.settings, settings) {
			t.users.Add(1) // before has it, so it is open
			o.add(name, t)
			v, _ := t.value.(T) // it is a nil interface otherwise
			return v, nil
		}
	}
	v, end, err := open()
	if err != nil {
		return v, err
	}
	t := &thing{settings: settings, value: v, close: end}
	t.users.Store(1)
	o.add(name, t)
	return v, nil
}

func (o *opened) add(name string, t *thing) {
	o.things[name] = t
	o.order = append(o.order, t)
}

// has reports whether a part of o is the one that another configuration has under its name.
func (o *opened) has(name string, t *thing) bool { return o.things[name] == t }

// close closes what nobody else has, what was opened last first: telemetry hears of all the others.
func (o *opened) close(ctx context.Context) error {
	var errs []error
	for i := len(o.order) - 1; i >= 0; i-- {
		t := o.order[i]
		if t.users.Add(-1) == 0 && t.close != nil {
			errs = append(errs, t.close(context.WithoutCancel(ctx)))
		}
	}
	o.order = nil
	return errors.Join(errs...)
}

// named are files that a configuration names, and that are read when it is loaded or opened. Those
// of certificates are not among them: they are followed by themselves.
func named(f *config.File) []string {
	files := append(cedarFiles(f), signingKeys(f)...)
	for i := range f.Config.Backends {
		if name := keyFile(f, &f.Config.Backends[i]); name != "" {
			files = append(files, name)
		}
	}
	return files
}

func cedarFiles(f *config.File) []string {
	var files []string
	for _, name := range f.Config.Policy.Cedar {
		files = append(files, from(f.Dir, name))
	}
	return files
}

// signingKeys are the files of the keys of mode broker.
func signingKeys(f *config.File) []string {
	var files []string
	for _, name := range f.Config.Auth.Broker.SigningKeys {
		files = append(files, from(f.Dir, name))
	}
	return files
}

// keyFile is the file of the key with which the gateway logs in to a server behind it, or "".
func keyFile(f *config.File, b *config.Backend) string {
	if c, ok := b.Settings.(mcpupstream.Config); ok && c.Auth != nil && c.Auth.PrivateKeyFile != "" {
		return from(f.Dir, c.Auth.PrivateKeyFile)
	}
	return ""
}

// digest stands for the contents of files. One that cannot be read counts too.
func digest(files ...string) [sha256.Size]byte {
	h := sha256.New()
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			text = []byte(err.Error())
		}
		sum := sha256.Sum256(text)
		h.Write(sum[:])
	}
	return [sha256.Size]byte(h.Sum(nil))
}
