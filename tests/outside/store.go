// Package outside holds the services of the outside that no tenant writes: an
// object store that honours presigned URLs as S3 does, and an OCI registry.
// Both live in memory and end with the process; both are safe for concurrent
// use. For demo and tests only.
package outside

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
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

// ServeHTTP lets through what is signed: a presigned URL whose signature and
// time hold, or a request with the account's authorization.
func (s *Store) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var err error
	if query := r.URL.Query(); query.Has("X-Amz-Signature") {
		err = s.presigned(r, query)
	} else if !strings.Contains(r.Header.Get("Authorization"), "Credential="+s.AccessKey+"/") {
		err = errors.New("not signed")
	}
	if err != nil {
		http.Error(w, "AccessDenied: "+err.Error(), http.StatusForbidden)
		return
	}
	s.handler.ServeHTTP(w, r)
}

// presigned checks query authentication (AWS Signature Version 4).
func (s *Store) presigned(r *http.Request, query url.Values) error {
	const layout = "20060102T150405Z"
	signed, err := time.Parse(layout, query.Get("X-Amz-Date"))
	if err != nil {
		return fmt.Errorf("X-Amz-Date: %w", err)
	}
	seconds, err := strconv.Atoi(query.Get("X-Amz-Expires"))
	if err != nil || s.now().After(signed.Add(time.Duration(seconds)*time.Second)) {
		return errors.New("request has expired")
	}
	credential := strings.Split(query.Get("X-Amz-Credential"), "/")
	if len(credential) != 5 || credential[0] != s.AccessKey || query.Get("X-Amz-SignedHeaders") != "host" {
		return errors.New("credential or signed headers are not accepted")
	}
	got := query.Get("X-Amz-Signature")
	query.Del("X-Amz-Signature")
	request := strings.Join([]string{
		r.Method, r.URL.EscapedPath(), strings.ReplaceAll(query.Encode(), "+", "%20"), "host:" + r.Host + "\n", "host", "UNSIGNED-PAYLOAD",
	}, "\n")
	digest := sha256.Sum256([]byte(request))
	scope := strings.Join(credential[1:], "/")
	text := strings.Join([]string{"AWS4-HMAC-SHA256", query.Get("X-Amz-Date"), scope, hex.EncodeToString(digest[:])}, "\n")
	key := []byte("AWS4" + s.SecretKey)
	for _, part := range append(credential[1:], text) {
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
	_, err := s.backend.PutObject(bucket, key, map[string]string{}, strings.NewReader(string(data)), int64(len(data)), nil)
	return err
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
