// Package outside holds the services of the outside that no tenant writes: an
// object store that honours presigned URLs as S3 does, and an OCI registry.
// Both live in memory and end with the process; both are safe for concurrent
// use. For demo and tests only.
package outside

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

// Store is an S3 object store.
type Store struct {
	// AccessKey and SecretKey are its one account.
	AccessKey, SecretKey string
	backend              *s3mem.Backend
	handler              http.Handler
	now                  func() time.Time
}

// NewStore returns a store with these buckets.
func NewStore(accessKey, secretKey string, now func() time.Time, buckets ...string) (*Store, error) {
	s := &Store{AccessKey: accessKey, SecretKey: secretKey, backend: s3mem.New(), now: now}
	for _, b := range buckets {
		if err := s.backend.CreateBucket(b); err != nil {
			return nil, fmt.Errorf("making bucket %s: %w", b, err)
		}
	}
	s.handler = gofakes3.New(s.backend, gofakes3.WithLogger(gofakes3.DiscardLog()), gofakes3.WithTimeSkewLimit(0)).Server()
	return s, nil
}

// ServeHTTP lets through what the account signed, in the URL or in a header.
func (s *Store) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	signed := s.header
	if r.URL.Query().Has("X-Amz-Signature") {
		signed = s.presigned
	}
	if err := signed(r); err != nil {
		http.Error(w, "AccessDenied: "+err.Error(), http.StatusForbidden)
		return
	}
	s.handler.ServeHTTP(w, r)
}

// What AWS Signature Version 4 fixes: the scheme, the form of its times, how
// far clocks may be apart, and how long a presigned URL may live.
const (
	scheme       = "AWS4-HMAC-SHA256"
	timeLayout   = "20060102T150405Z"
	maxSkew      = 15 * time.Minute
	maxPresigned = 7 * 24 * time.Hour
)

// presigned checks a signature in the query.
func (s *Store) presigned(r *http.Request) error {
	query := r.URL.Query()
	date, err := time.Parse(timeLayout, query.Get("X-Amz-Date"))
	if err != nil || query.Get("X-Amz-Algorithm") != scheme {
		return errors.New("X-Amz-Date or X-Amz-Algorithm is missing or malformed")
	}
	seconds, err := strconv.Atoi(query.Get("X-Amz-Expires"))
	life := time.Duration(seconds) * time.Second
	if err != nil || life <= 0 || life > maxPresigned {
		return errors.New("X-Amz-Expires is not 1 s to 7 days")
	}
	if now := s.now(); now.After(date.Add(life)) || now.Add(maxSkew).Before(date) {
		return errors.New("request has expired, or is from the future")
	}
	got := query.Get("X-Amz-Signature")
	query.Del("X-Amz-Signature")
	return s.check(r, query, query.Get("X-Amz-Credential"), query.Get("X-Amz-SignedHeaders"), query.Get("X-Amz-Date"), "UNSIGNED-PAYLOAD", got)
}

// header checks a signature in the Authorization header.
func (s *Store) header(r *http.Request) error {
	fields, ok := strings.CutPrefix(r.Header.Get("Authorization"), scheme+" ")
	if !ok {
		return errors.New("not signed")
	}
	values := map[string]string{}
	for field := range strings.SplitSeq(fields, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		values[name] = value
	}
	stamp := r.Header.Get("X-Amz-Date")
	date, err := time.Parse(timeLayout, stamp)
	if err != nil || s.now().Sub(date).Abs() > maxSkew {
		return errors.New("X-Amz-Date is malformed or too far from the store's clock")
	}
	return s.check(r, r.URL.Query(), values["Credential"], values["SignedHeaders"], stamp, r.Header.Get("X-Amz-Content-Sha256"), values["Signature"])
}

// check computes the signature of a request and compares.
func (s *Store) check(r *http.Request, query url.Values, credential, signedHeaders, stamp, payload, got string) error {
	scope := strings.Split(credential, "/")
	names := strings.Split(signedHeaders, ";")
	if len(scope) != 5 || scope[0] != s.AccessKey || !slices.Contains(names, "host") {
		return errors.New("credential or signed headers are not accepted")
	}
	var headers strings.Builder
	for _, name := range names {
		value := r.Header.Get(name)
		switch name {
		case "host":
			value = r.Host
		case "content-length":
			value = strconv.FormatInt(r.ContentLength, 10)
		}
		headers.WriteString(name + ":" + strings.TrimSpace(value) + "\n")
	}
	request := strings.Join([]string{
		r.Method, r.URL.EscapedPath(), strings.ReplaceAll(query.Encode(), "+", "%20"), headers.String(), signedHeaders, payload,
	}, "\n")
	digest := sha256.Sum256([]byte(request))
	text := strings.Join([]string{scheme, stamp, strings.Join(scope[1:], "/"), hex.EncodeToString(digest[:])}, "\n")
	key := []byte("AWS4" + s.SecretKey)
	for _, part := range append(scope[1:], text) {
		mac := hmac.New(sha256.New, key)
		_, _ = io.WriteString(mac, part)
		key = mac.Sum(nil)
	}
	if !hmac.Equal([]byte(hex.EncodeToString(key)), []byte(got)) {
		return errors.New("signature does not match")
	}
	return nil
}

// Objects returns every object's bytes by bucket/key.
func (s *Store) Objects() (map[string][]byte, error) {
	buckets, err := s.backend.ListBuckets()
	if err != nil {
		return nil, fmt.Errorf("listing buckets: %w", err)
	}
	out := map[string][]byte{}
	for _, b := range buckets {
		list, err := s.backend.ListBucket(b.Name, nil, gofakes3.ListBucketPage{})
		if err != nil {
			return nil, fmt.Errorf("listing %s: %w", b.Name, err)
		}
		for _, o := range list.Contents {
			object, err := s.backend.GetObject(b.Name, o.Key, nil)
			if err != nil {
				return nil, fmt.Errorf("reading %s: %w", o.Key, err)
			}
			data, err := io.ReadAll(object.Contents)
			if err := errors.Join(err, object.Contents.Close()); err != nil {
				return nil, fmt.Errorf("reading %s: %w", o.Key, err)
			}
			out[b.Name+"/"+o.Key] = data
		}
	}
	return out, nil
}

// Replace overwrites an object behind everybody's back, as a hostile store
// does.
func (s *Store) Replace(bucket, key string, data []byte) error {
	meta := map[string]string{"Last-Modified": s.now().UTC().Format(http.TimeFormat)} // clients insist on one
	if _, err := s.backend.PutObject(bucket, key, meta, bytes.NewReader(data), int64(len(data)), nil); err != nil {
		return fmt.Errorf("replacing %s/%s: %w", bucket, key, err)
	}
	return nil
}

// Keys returns the objects' names in order.
func Keys(objects map[string][]byte) []string {
	keys := make([]string, 0, len(objects))
	for k := range objects {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
