package tenant

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/confidential-node/agent/firmware/contract"
)

// ObjectStore is what the tenant needs of S3.
type ObjectStore interface {
	PartStore
	// Put uploads exactly size bytes.
	Put(ctx context.Context, bucket, key string, r io.Reader, size int64) error
	// Get opens an object and tells its size.
	Get(ctx context.Context, bucket, key string) (io.ReadCloser, int64, error)
	// PresignGet and PresignPut return URLs that need no further credential.
	PresignGet(ctx context.Context, bucket, key string, valid time.Duration) (string, error)
	PresignPut(ctx context.Context, bucket, key string, valid time.Duration) (string, error)
	// Remove deletes an object; one that is not there is no error.
	Remove(ctx context.Context, bucket, key string) error
}

// pinnedTransport trusts the CA in file and nothing else, over TLS 1.3.
func pinnedTransport(caFile string) (*http.Transport, error) {
	caPEM, err := readSmall(caFile)
	if err != nil {
		return nil, fmt.Errorf("reading CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(caPEM) {
		return nil, Usage("CA file %s holds no PEM certificate", caFile)
	}
	return &http.Transport{
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool},
		ResponseHeaderTimeout: time.Minute,
		IdleConnTimeout:       30 * time.Second,
		DisableCompression:    true,
	}, nil
}

type s3Store struct{ client *minio.Client }

// newS3 connects to the profile's store.
func newS3(p *StoreProfile) (ObjectStore, error) {
	if err := need(map[string]string{
		"store.endpoint": p.Endpoint, "store.ca_file": p.CAFile, "store.bucket": p.Bucket,
		"store.access_key": p.AccessKey, "store.secret_key_file": p.SecretKeyFile,
	}); err != nil {
		return nil, err
	}
	transport, err := pinnedTransport(p.CAFile)
	if err != nil {
		return nil, err
	}
	secret, err := readSecret(p.SecretKeyFile)
	if err != nil {
		return nil, fmt.Errorf("reading store credentials: %w", err)
	}
	u, err := url.Parse(p.Endpoint)
	if err != nil {
		return nil, Usage("store.endpoint %q is not a URL", p.Endpoint)
	}
	region := p.Region
	if region == "" {
		region = "us-east-1"
	}
	client, err := minio.New(u.Host, &minio.Options{
		Creds: credentials.NewStaticV4(p.AccessKey, secret, ""), Secure: true, Transport: transport,
		Region: region, BucketLookup: minio.BucketLookupPath,
	})
	if err != nil {
		return nil, fmt.Errorf("connecting to the object store: %w", err)
	}
	return &s3Store{client}, nil
}

func storeError(doing string, err error) error {
	switch minio.ToErrorResponse(err).StatusCode {
	case http.StatusNotFound:
		return contract.Refuse(codeObjectNotFound, "check bucket and key, or upload the object first", "%s: the object store has no such object", doing)
	case http.StatusForbidden:
		return contract.Refuse("tenant.store-denied", "check access_key and secret_key_file of [store] in the profile, this machine's clock, and the account's rights on the bucket",
			"%s: the object store denies access", doing).Because(err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// noObject reports whether the store answered that there is no such object.
func noObject(err error) bool {
	refused, ok := errors.AsType[*contract.Refusal](err)
	return ok && refused.Code == codeObjectNotFound
}

func (s *s3Store) Put(ctx context.Context, bucket, key string, r io.Reader, size int64) error {
	_, err := s.client.PutObject(ctx, bucket, key, r, size, minio.PutObjectOptions{ContentType: "application/octet-stream"})
	if err != nil {
		return storeError("uploading "+bucket+"/"+key, err)
	}
	return nil
}

func (s *s3Store) Get(ctx context.Context, bucket, key string) (io.ReadCloser, int64, error) {
	doing := "downloading " + bucket + "/" + key
	obj, err := s.client.GetObject(ctx, bucket, key, minio.GetObjectOptions{})
	if err != nil {
		return nil, 0, storeError(doing, err)
	}
	info, err := obj.Stat()
	if err != nil {
		return nil, 0, errors.Join(storeError(doing, err), obj.Close())
	}
	return obj, info.Size, nil
}

func (s *s3Store) PresignGet(ctx context.Context, bucket, key string, valid time.Duration) (string, error) {
	u, err := s.client.PresignedGetObject(ctx, bucket, key, valid, nil)
	if err != nil {
		return "", storeError("signing a download", err)
	}
	return u.String(), nil
}

func (s *s3Store) PresignPut(ctx context.Context, bucket, key string, valid time.Duration) (string, error) {
	u, err := s.client.PresignedPutObject(ctx, bucket, key, valid)
	if err != nil {
		return "", storeError("signing an upload", err)
	}
	return u.String(), nil
}

func (s *s3Store) Remove(ctx context.Context, bucket, key string) error {
	if err := s.client.RemoveObject(ctx, bucket, key, minio.RemoveObjectOptions{}); err != nil {
		if err := storeError("removing "+bucket+"/"+key, err); !noObject(err) {
			return err
		}
	}
	return nil
}

// source is one --dataset or --model.
type source struct {
	name        string // under /inputs
	scheme      string // encrypted, s3 or file
	bucket, key string // encrypted and s3
	path        string // file
}

// parseSource understands [NAME=]encrypted://bucket/key, [NAME=]s3://bucket/key
// and [NAME=]file://PATH.
func parseSource(text string) (source, error) {
	bad := func() (source, error) {
		return source{}, Usage("%q is not [NAME=]s3://bucket/key, encrypted://bucket/key or file://path", text)
	}
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok {
		return bad()
	}
	name, after, named := strings.Cut(scheme, "=")
	if named {
		scheme = after
	}
	s := source{scheme: scheme}
	base := path.Base(rest)
	switch scheme {
	case "encrypted", "s3":
		s.bucket, s.key, ok = strings.Cut(rest, "/")
		if !ok || s.bucket == "" || s.key == "" || strings.HasSuffix(s.key, "/") {
			return bad()
		}
	case "file":
		s.path = rest
	default:
		return bad()
	}
	if s.name = name; !named {
		s.name = strings.TrimSuffix(base, ".age")
	}
	if !contract.ValidFileName(s.name) {
		return source{}, Usage("%q gives no valid file name for /inputs; write NAME=%s", text, text)
	}
	return s, nil
}

// objectKey is where deploying a source puts its ciphertext; empty when it is
// sealed already and stays where it is.
func (s source) objectKey(prefix string) string {
	if s.scheme == "encrypted" {
		return ""
	}
	return prefix + s.name + ".age"
}

// input brings one source into the store as ciphertext and returns where it
// is. Plaintext is sealed on the way, in memory.
func (t *Tenant) input(ctx context.Context, prefix string, s source, key *dataKey) (DeployedObject, error) {
	switch s.scheme {
	case "encrypted":
		o, err := t.sealedObject(ctx, s)
		if err != nil {
			return DeployedObject{}, err
		}
		return o, t.opens(ctx, s, key)
	case "s3":
		r, size, err := t.store.Get(ctx, s.bucket, s.key)
		if err != nil {
			return DeployedObject{}, err
		}
		defer r.Close() //nolint:errcheck // only read from
		plain, err := checkPlain(s.key, r)
		if err != nil {
			return DeployedObject{}, err
		}
		return t.sealAndPut(ctx, s.name, s.objectKey(prefix), plain, size, key)
	default:
		f, err := os.Open(s.path)
		if err != nil {
			return DeployedObject{}, fmt.Errorf("opening input %s: %w", s.name, err)
		}
		defer f.Close() //nolint:errcheck // only read from
		info, err := f.Stat()
		if err != nil {
			return DeployedObject{}, fmt.Errorf("opening input %s: %w", s.name, err)
		}
		plain, err := checkPlain(s.path, f)
		if err != nil {
			return DeployedObject{}, err
		}
		return t.sealAndPut(ctx, s.name, s.objectKey(prefix), plain, info.Size(), key)
	}
}

func (t *Tenant) sealAndPut(ctx context.Context, name, objectKey string, r io.Reader, size int64, key *dataKey) (out DeployedObject, err error) {
	bar := t.report.Transfer("sealing "+name, size)
	file, err := sealToTemp(t.state.root, io.TeeReader(r, bar), key.recipient)
	bar.Close() //nolint:errcheck // a bar that stays is no error
	if err != nil {
		return DeployedObject{}, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	out = DeployedObject{Name: name, Bucket: t.profile.Store.Bucket, Key: objectKey, SHA256: file.SHA256, Size: file.Size}
	return out, t.put(ctx, out, file.file)
}

// put uploads ciphertext and remembers its digest.
func (t *Tenant) put(ctx context.Context, o DeployedObject, r io.Reader) error {
	bar := t.report.Transfer("uploading "+o.Name, o.Size)
	defer bar.Close() //nolint:errcheck // a bar that stays is no error
	if err := t.store.Put(ctx, o.Bucket, o.Key, io.TeeReader(r, bar), o.Size); err != nil {
		return err
	}
	return t.state.remember(o)
}

// sealedObject finds digest and size of an object that is already sealed:
// from this tool's own index, else by reading it all once. The store is not
// trusted later: the manifest pins the digest.
func (t *Tenant) sealedObject(ctx context.Context, s source) (DeployedObject, error) {
	known, ok, err := t.state.object(s.bucket, s.key)
	if err != nil {
		return DeployedObject{}, err
	}
	if ok {
		known.Name = s.name
		return known, nil
	}
	r, size, err := t.store.Get(ctx, s.bucket, s.key)
	if err != nil {
		return DeployedObject{}, err
	}
	defer r.Close() //nolint:errcheck // only read from
	bar := t.report.Transfer("hashing "+s.name, size)
	defer bar.Close() //nolint:errcheck // a bar that stays is no error
	checked, err := checkSealed(s.key, io.TeeReader(r, bar))
	if err != nil {
		return DeployedObject{}, err
	}
	sum, err := copyHashed(io.Discard, checked)
	if err != nil {
		return DeployedObject{}, fmt.Errorf("hashing %s: %w", s.key, err)
	}
	o := DeployedObject{Name: s.name, Bucket: s.bucket, Key: s.key, SHA256: sum.SHA256, Size: sum.Size}
	return o, t.state.remember(o)
}

// opens refuses a key that is not one of the object's recipients: otherwise the
// guest would find out, after its only release. It reads no more than a header.
func (t *Tenant) opens(ctx context.Context, s source, key *dataKey) error {
	r, _, err := t.store.Get(ctx, s.bucket, s.key)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // only read from
	_, err = age.Decrypt(r, key.identity)
	if _, other := errors.AsType[*age.NoIdentityMatchError](err); other {
		return contract.Refuse("tenant.key-mismatch", "give the key it was sealed with as --encryption-key, or seal it again",
			"the encryption key does not open %s/%s", s.bucket, s.key)
	}
	if err != nil {
		return fmt.Errorf("opening %s/%s: %w", s.bucket, s.key, err)
	}
	return nil
}

// Upload puts a sealed file into the store at target, bucket/key or empty for
// the profile's bucket and the file's name. Anything that is not an age file
// is refused.
func (t *Tenant) Upload(ctx context.Context, file, target string) (DeployedObject, error) {
	if err := t.needStore(); err != nil {
		return DeployedObject{}, err
	}
	bucket, key := t.profile.Store.Bucket, filepath.Base(file)
	if target != "" {
		s, err := parseSource("x=encrypted://" + strings.TrimPrefix(strings.TrimPrefix(target, "encrypted://"), "s3://"))
		if err != nil {
			return DeployedObject{}, Usage("target %q is not bucket/key", target)
		}
		bucket, key = s.bucket, s.key
	}
	f, err := os.Open(file)
	if err != nil {
		return DeployedObject{}, fmt.Errorf("uploading: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read from
	if _, err := checkSealed(file, f); err != nil {
		return DeployedObject{}, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return DeployedObject{}, fmt.Errorf("uploading: %w", err)
	}
	sum, err := copyHashed(io.Discard, f)
	if err != nil {
		return DeployedObject{}, fmt.Errorf("uploading: %w", err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return DeployedObject{}, fmt.Errorf("uploading: %w", err)
	}
	o := DeployedObject{Name: path.Base(key), Bucket: bucket, Key: key, SHA256: sum.SHA256, Size: sum.Size}
	return o, t.put(ctx, o, f)
}
