package main

import (
	"fmt"
	"net/url"
	"time"

	"newel.dev/newel/internal/backend/artifact"
	"newel.dev/newel/internal/certs"
	"newel.dev/newel/internal/config"
	"newel.dev/newel/internal/egress"
	"newel.dev/newel/internal/secret"
	"newel.dev/newel/internal/store/s3"
)

// artifacts says where large results are kept. Addresses for people are only made if HTTP is served.
// Positions of what is wrong come from f.
func artifacts(f *config.File, key secret.Key, base string, http bool) (artifact.Options, error) {
	c := &f.Config.Artifacts
	o := artifact.Options{MaxBytes: int64(c.MaxBytes), MaxCount: c.MaxCount, Retention: c.KeepFor}
	for i, class := range c.Classes {
		if class.KeepFor < 0 || class.MaxBytes < 0 || len(class.Tools) == 0 {
			return o, fmt.Errorf("%s: a class needs tools, and its bounds must not be below zero", f.Position(fmt.Sprintf("artifacts.classes[%d]", i)))
		}
		o.Classes = append(o.Classes, artifact.Class{Tools: class.Tools, Retention: class.KeepFor, MaxBytes: int64(class.MaxBytes)})
	}
	if f.Config.State.Engine != "memory" {
		var err error
		if o.Key, err = key.Derive("newel artifacts"); err != nil {
			return o, err
		}
	}
	switch {
	case c.LinksFor == 0:
	case o.Key == nil:
		return o, fmt.Errorf("%s: addresses are signed with the key in state.key_file, which the engine memory does not have; write state.engine: sqlite", f.Position("artifacts.links_for"))
	case http:
		o.Links = artifact.Links{Base: base, Life: c.LinksFor}
	}
	if c.Dir != "" {
		o.Dir = from(f.Dir, c.Dir)
	}
	if c.S3.Bucket == "" && c.S3.Endpoint == "" {
		return o, nil
	}
	if o.Dir != "" {
		return o, fmt.Errorf("%s: results are kept in a folder or in a bucket; write one of dir and s3", f.Position("artifacts.dir"))
	}
	if o.Key == nil {
		return o, fmt.Errorf("%s: what is in a bucket is signed with the key in state.key_file, which the engine memory does not have; write state.engine: sqlite", f.Position("artifacts.s3"))
	}
	b, err := bucket(f, &c.S3)
	if err != nil {
		return o, err
	}
	o.Shelf = b
	return o, nil
}

func bucket(f *config.File, c *config.S3) (*s3.Bucket, error) {
	at := func(setting string) string { return f.Position("artifacts.s3." + setting) }
	private, err := ranges(f, c.Private, "artifacts.s3.private_ranges")
	if err != nil {
		return nil, err
	}
	if u, err := url.Parse(c.Endpoint); err == nil { // s3.Open says what is wrong with it
		private = append(private, egress.Named(u.Hostname())...)
		if u.Scheme == "http" && len(private) == 0 {
			return nil, fmt.Errorf("%s: results would be readable on the way; write https, or private_ranges if the server is in a network of your own", at("endpoint"))
		}
	}
	ca := c.CA
	if ca != "" {
		ca = from(f.Dir, ca)
	}
	trust, err := certs.Client(certs.ClientOptions{CA: ca, Where: at})
	if err != nil {
		return nil, err
	}
	transport := egress.Transport(egress.Options{Allow: private, Timeout: c.Timeout, TLS: trust})
	transport.MaxIdleConnsPerHost, transport.IdleConnTimeout = 16, 90*time.Second
	encryption := c.Encryption
	if encryption == "none" {
		encryption = ""
	}
	b, err := s3.Open(s3.Options{
		Endpoint: c.Endpoint, Region: c.Region, Bucket: c.Bucket, Prefix: c.Prefix, Style: c.Style,
		AccessKey: c.AccessKey, SecretKey: c.SecretKey, SessionToken: c.SessionToken,
		Encryption: encryption, KMSKey: c.KMSKey, Transport: transport, Timeout: c.Timeout,
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Position("artifacts.s3"), err)
	}
	return b, nil
}
