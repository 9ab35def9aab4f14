// Package s3 keeps artifacts in a bucket of Amazon S3 or of a server that speaks its protocol.
//
// Start reading at [Open]. One object is one artifact; objects appear whole or not at all. The
// client is minio-go: it uses the transport that it is given and nothing of its environment, and
// works with servers other than Amazon's as it is. Several nodes may share a bucket and a prefix.
package s3

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/encrypt"
	"github.com/minio/minio-go/v7/pkg/s3utils"

	"newel.dev/newel/internal/backend/artifact"
	"newel.dev/newel/internal/secret"
)

// Options name a bucket. Zero means the default in brackets.
type Options struct {
	Endpoint string // such as https://s3.eu-central-1.amazonaws.com
	Region   string // [us-east-1]
	Bucket   string
	Prefix   string // of the names of objects; nothing else may be there
	Style    string // path or host: where the bucket stands in addresses [path]

	AccessKey    secret.String
	SecretKey    secret.String
	SessionToken secret.String // of temporary credentials

	Encryption string // at rest, by the server: s3 or kms; "": as the bucket says
	KMSKey     string // name of the key, for kms

	Transport http.RoundTripper // internal/egress makes it
	Timeout   time.Duration     // of a request, and a second more for each MiB [10 s]
}

// A Bucket is a shelf. It is safe for concurrent use.
type Bucket struct {
	client  minio.Core
	name    string
	prefix  string
	sse     encrypt.ServerSide // nil: as the bucket says
	timeout time.Duration
}

var _ artifact.Shelf = (*Bucket)(nil)

// maxTries bounds how often a request is sent.
const maxTries = 2

// Open checks the options and connects to nothing yet.
func Open(o Options) (*Bucket, error) {
	u, err := url.Parse(o.Endpoint)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return nil, fmt.Errorf("%q is no endpoint; write an address without path, such as https://s3.eu-central-1.amazonaws.com", o.Endpoint)
	}
	if o.Bucket == "" || o.AccessKey.IsZero() || o.SecretKey.IsZero() {
		return nil, errors.New("a bucket needs bucket, access_key and secret_key")
	}
	if err := s3utils.CheckValidBucketNameStrict(o.Bucket); err != nil {
		return nil, fmt.Errorf("%q cannot be the name of a bucket: %w", o.Bucket, err)
	}
	if o.Prefix != "" && (!strings.HasSuffix(o.Prefix, "/") || path.Clean("/"+o.Prefix)+"/" != "/"+o.Prefix || s3utils.CheckValidObjectName(o.Prefix) != nil) {
		return nil, fmt.Errorf("%q is no prefix; write names with a / after each, such as newel/", o.Prefix)
	}
	if o.Transport == nil {
		return nil, errors.New("s3: Transport is needed")
	}
	if o.Timeout < 0 {
		return nil, errors.New("s3: Timeout must not be below zero")
	}
	b := &Bucket{name: o.Bucket, prefix: o.Prefix, timeout: cmp.Or(o.Timeout, 10*time.Second)}
	if b.sse, err = encryption(o.Encryption, o.KMSKey); err != nil {
		return nil, err
	}
	style := minio.BucketLookupPath
	if o.Style == "host" {
		style = minio.BucketLookupDNS
	}
	c, err := minio.NewCore(u.Host, &minio.Options{
		Creds:  credentials.NewStaticV4(o.AccessKey.Reveal(), o.SecretKey.Reveal(), o.SessionToken.Reveal()),
		Secure: u.Scheme == "https", Region: cmp.Or(o.Region, "us-east-1"), BucketLookup: style,
		Transport: bounded{o.Transport}, MaxRetries: maxTries,
	})
	if err != nil {
		return nil, err
	}
	b.client = *c
	return b, nil
}

func encryption(kind, key string) (encrypt.ServerSide, error) {
	switch {
	case kind == "kms" && key != "":
		return encrypt.NewSSEKMS(key, nil)
	case kind == "kms":
		return nil, errors.New("encryption by kms needs the name of the key: kms_key")
	case key != "":
		return nil, errors.New("kms_key is for encryption: kms")
	case kind == "s3":
		return encrypt.NewSSE(), nil
	case kind == "":
		return nil, nil
	}
	return nil, fmt.Errorf("%q is no encryption; write s3 or kms", kind)
}

// bounded bounds answers, of which the client also reads what nobody asked for: objects to the range
// that was asked for, pages of a list, which have at most a thousand names, and errors.
type bounded struct{ next http.RoundTripper }

const maxAnswer = 4 << 20 // bytes, of what is no object

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	limit := int64(maxAnswer)
	var from, to int64
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err == nil && resp.StatusCode == http.StatusPartialContent {
		limit = to - from + 1
	}
	resp.Body = http.MaxBytesReader(nil, resp.Body, limit)
	return resp, nil
}

func (b *Bucket) within(ctx context.Context, bytes int64) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, b.timeout+time.Duration(bytes>>20)*time.Second)
}

// Put implements artifact.Shelf.
func (b *Bucket) Put(ctx context.Context, name string, blob []byte) error {
	ctx, cancel := b.within(ctx, int64(len(blob)))
	defer cancel()
	_, err := b.client.Client.PutObject(ctx, b.name, b.prefix+name, bytes.NewReader(blob), int64(len(blob)), minio.PutObjectOptions{
		ContentType: "application/octet-stream", ServerSideEncryption: b.sse,
		DisableMultipart: true, // parts of what is not finished would stay
		SendContentMd5:   true, // servers that know no newer sum know this one
	})
	return b.explain(err)
}

// Get implements artifact.Shelf.
func (b *Bucket) Get(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	if length <= 0 {
		return nil, nil
	}
	ctx, cancel := b.within(ctx, length)
	defer cancel()
	var o minio.GetObjectOptions
	if err := o.SetRange(offset, offset+length-1); err != nil {
		return nil, err
	}
	body, _, _, err := b.client.GetObject(ctx, b.name, b.prefix+name, o)
	if minio.ToErrorResponse(err).Code == "InvalidRange" {
		return nil, nil // it ends before
	}
	if err != nil {
		return nil, b.explain(err)
	}
	data, err := io.ReadAll(io.LimitReader(body, length))
	return data, b.explain(errors.Join(err, body.Close()))
}

// Delete implements artifact.Shelf.
func (b *Bucket) Delete(ctx context.Context, name string) error {
	ctx, cancel := b.within(ctx, 0)
	defer cancel()
	err := b.explain(b.client.RemoveObject(ctx, b.name, b.prefix+name, minio.RemoveObjectOptions{}))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// List implements artifact.Shelf.
func (b *Bucket) List(ctx context.Context) iter.Seq2[artifact.Entry, error] {
	return func(yield func(artifact.Entry, error) bool) {
		// A timeout from page to page, of which each is one request.
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		slow := time.AfterFunc(b.timeout, func() { cancel(context.DeadlineExceeded) })
		defer slow.Stop()
		for o := range b.client.ListObjectsIter(ctx, b.name, minio.ListObjectsOptions{Prefix: b.prefix}) {
			if o.Err != nil {
				yield(artifact.Entry{}, b.explain(cmp.Or(context.Cause(ctx), o.Err)))
				return
			}
			slow.Reset(b.timeout)
			if !yield(artifact.Entry{Name: strings.TrimPrefix(o.Key, b.prefix), Size: o.Size, Modified: o.LastModified}, nil) {
				return
			}
		}
		if err := context.Cause(ctx); err != nil {
			yield(artifact.Entry{}, b.explain(err))
		}
	}
}

// Close implements artifact.Shelf.
func (b *Bucket) Close() error { return nil }

// explain says what an error of the server means here, and what to do.
func (b *Bucket) explain(err error) error {
	if err == nil {
		return nil
	}
	r := minio.ToErrorResponse(err)
	switch {
	case r.Code == "NoSuchKey":
		return fs.ErrNotExist
	case r.Code == "NoSuchBucket":
		return fmt.Errorf("there is no bucket %q; make it, or name another: %w", b.name, err)
	case r.Code == "AccessDenied":
		return fmt.Errorf("the credentials do not allow this in the bucket %q (s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject are needed): %w", b.name, err)
	case r.StatusCode == http.StatusInsufficientStorage || slices.Contains([]string{"XMinioStorageFull", "QuotaExceeded", "XAmzQuotaExceeded"}, r.Code):
		return fmt.Errorf("the bucket %q: %w: %w", b.name, artifact.ErrFull, err)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("the server of the bucket %q takes too long: %w", b.name, err)
	}
	return fmt.Errorf("bucket %q: %w", b.name, err)
}
