package outside_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/outside"
)

// stand is a store with one object, and a client of its account.
type stand struct {
	t      *testing.T
	now    time.Time
	store  *outside.Store
	server *httptest.Server
	client *minio.Client
}

const (
	accessKey = "access"
	secretKey = "secret-key-of-the-store"
	object    = "a folder/in.age"
)

func newStand(t *testing.T) *stand {
	t.Helper()
	s := &stand{t: t, now: time.Now()}
	var err error
	if s.store, err = outside.NewStore(accessKey, secretKey, func() time.Time { return s.now }, "bucket"); err != nil {
		t.Fatal(err)
	}
	s.server = httptest.NewTLSServer(s.store)
	t.Cleanup(s.server.Close)
	s.client = s.account(accessKey, secretKey)
	if err := s.put(s.client, object, "sealed"); err != nil {
		t.Fatal(err)
	}
	return s
}

// account is a client with these credentials.
func (s *stand) account(access, secret string) *minio.Client {
	s.t.Helper()
	client, err := minio.New(strings.TrimPrefix(s.server.URL, "https://"), &minio.Options{
		Creds: credentials.NewStaticV4(access, secret, ""), Secure: true, Region: "us-east-1", BucketLookup: minio.BucketLookupPath,
		Transport: s.server.Client().Transport, MaxRetries: 1,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return client
}

func (s *stand) put(c *minio.Client, key, text string) error {
	_, err := c.PutObject(s.t.Context(), "bucket", key, strings.NewReader(text), int64(len(text)), minio.PutObjectOptions{})
	return err
}

func (s *stand) presign(method, key string, life time.Duration) string {
	s.t.Helper()
	u, err := s.client.Presign(s.t.Context(), method, "bucket", key, life, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return u.String()
}

// ask sends a request that carries no more than its URL.
func (s *stand) ask(method, link, body string) (int, string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, link, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := s.server.Client().Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it is read
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(got)
}

func TestStoreHonoursPresignedURLsAsS3Does(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	get, put := s.presign(http.MethodGet, object, time.Minute), s.presign(http.MethodPut, "out", time.Minute)
	if code, got := s.ask(http.MethodGet, get, ""); code != http.StatusOK || got != "sealed" {
		t.Errorf("presigned GET: %d %q", code, got)
	}
	if code, _ := s.ask(http.MethodPut, put, "result"); code != http.StatusOK {
		t.Errorf("presigned PUT: %d", code)
	}
	for name, link := range map[string]string{
		"unsigned":        s.server.URL + "/bucket/out",
		"other object":    strings.Replace(put, "/out?", "/other?", 1),
		"other signature": strings.Replace(get, "X-Amz-Signature=", "X-Amz-Signature=0", 1),
		"longer life":     strings.Replace(get, "X-Amz-Expires=60", "X-Amz-Expires=6000", 1),
		"endless life":    strings.Replace(get, "X-Amz-Expires=60", "X-Amz-Expires=604801", 1),
		"no life":         strings.Replace(get, "X-Amz-Expires=60", "X-Amz-Expires=-60", 1),
		"other account":   strings.Replace(get, "X-Amz-Credential="+accessKey, "X-Amz-Credential=other", 1),
		"other scheme":    strings.Replace(get, "AWS4-HMAC-SHA256", "AWS4-HMAC-SHA1", 1),
	} {
		if code, _ := s.ask(http.MethodGet, link, ""); code != http.StatusForbidden {
			t.Errorf("%s: %d", name, code)
		}
	}
	if code, _ := s.ask(http.MethodPut, get, "x"); code != http.StatusForbidden {
		t.Errorf("PUT with a URL for GET: %d", code)
	}
	s.now = s.now.Add(2 * time.Minute)
	if code, _ := s.ask(http.MethodGet, get, ""); code != http.StatusForbidden {
		t.Errorf("expired: %d", code)
	}
	s.now = s.now.Add(-time.Hour)
	if code, _ := s.ask(http.MethodGet, get, ""); code != http.StatusForbidden {
		t.Errorf("signed in the future: %d", code)
	}
	objects, err := s.store.Objects()
	if err != nil || string(objects["bucket/out"]) != "result" || !slices.Equal(outside.Keys(objects), []string{"bucket/" + object, "bucket/out"}) {
		t.Errorf("objects %v %v", outside.Keys(objects), err)
	}
}

func TestStoreTakesRequestsOfItsAccountOnly(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	for name, client := range map[string]*minio.Client{
		"another secret": s.account(accessKey, secretKey+"x"), "another account": s.account("other", secretKey), "nobody": s.account("", ""),
	} {
		if err := s.put(client, "stolen", "x"); err == nil {
			t.Errorf("%s may write", name)
		}
		if _, err := client.StatObject(t.Context(), "bucket", object, minio.StatObjectOptions{}); err == nil {
			t.Errorf("%s may read", name)
		}
	}
	s.now = s.now.Add(time.Hour)
	if err := s.put(s.client, "late", "x"); err == nil {
		t.Error("a request signed an hour ago is accepted")
	}
	if objects, err := s.store.Objects(); err != nil || len(objects) != 1 {
		t.Errorf("objects %v %v", outside.Keys(objects), err)
	}
}

func TestAHostileStoreServesWhatItLikes(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	if err := s.store.Replace("bucket", object, []byte("swapped")); err != nil {
		t.Fatal(err)
	}
	if code, got := s.ask(http.MethodGet, s.presign(http.MethodGet, object, time.Minute), ""); code != http.StatusOK || got != "swapped" {
		t.Errorf("%d %q", code, got)
	}
	if info, err := s.client.StatObject(t.Context(), "bucket", object, minio.StatObjectOptions{}); err != nil || info.Size != int64(len("swapped")) {
		t.Errorf("%+v %v", info, err)
	}
}

func TestRegistryServesAnImageByItsDigestWhereverTheTagMoves(t *testing.T) {
	t.Parallel()
	server := httptest.NewTLSServer(outside.Registry())
	t.Cleanup(server.Close)
	tag := strings.TrimPrefix(server.URL, "https://") + "/team/app:1"
	push := func(word string) string {
		image, err := mutate.Config(empty.Image, v1.Config{Cmd: []string{word}})
		if err != nil {
			t.Fatal(err)
		}
		pinned, err := outside.Push(t.Context(), tag, image, server.Client())
		if err != nil {
			t.Fatal(err)
		}
		return pinned
	}
	first, second := push("first"), push("second")
	for reference, want := range map[string]string{first: "first", second: "second", tag: "second"} {
		parsed, err := name.ParseReference(reference)
		if err != nil {
			t.Fatal(err)
		}
		image, err := remote.Image(parsed, remote.WithContext(t.Context()), remote.WithTransport(server.Client().Transport))
		if err != nil {
			t.Fatal(err)
		}
		if config, err := image.ConfigFile(); err != nil || !slices.Equal(config.Config.Cmd, []string{want}) {
			t.Errorf("%s: %v %v, want %s", reference, config, err, want)
		}
	}
	if _, _, _, err := contract.SplitImage(first); err != nil {
		t.Errorf("a manifest does not take what Push returns: %v", err)
	}
}

func TestServicesSpeakTLS13UntilTheyAreToldToEnd(t *testing.T) {
	t.Parallel()
	template := httptest.NewTLSServer(nil)
	cert := template.TLS.Certificates[0]
	template.Close()
	free, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancel(t.Context())
	defer end()
	if err := outside.Serve(ctx, addr, cert, outside.Registry()); err != nil {
		t.Fatal(err)
	}
	dial := func(version uint16) error {
		dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, MaxVersion: version}} //nolint:gosec // the version is what is tested
		conn, err := dialer.DialContext(t.Context(), "tcp", addr)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	if err := dial(tls.VersionTLS13); err != nil {
		t.Error(err)
	}
	if err := dial(tls.VersionTLS12); err == nil {
		t.Error("TLS 1.2 is accepted")
	}
}
