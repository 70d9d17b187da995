package tenant

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ociregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/hashicorp/go-hclog"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/confidential-node/agent/firmware/image/imagetest"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/tests/attester"
	"github.com/confidential-node/agent/tests/keybroker"
)

const (
	adminToken = "0123456789abcdef0123456789abcdef"
	storeKey   = "canary-store-secret"
	bucket     = "sealed"
	plaintext  = "canary: patient 4711 has a cold"
)

// testChain is made once: three P-384 keys are slow under the race detector.
var testChain = sync.OnceValues(func() (*snptest.Chain, error) {
	return attester.NewChip(time.Now())
})

// world is everything outside the tenant, as real as it goes in one process.
type world struct {
	t        *testing.T
	dir      string
	profile  *Profile
	tenant   *Tenant
	node     *fakeNode
	objects  gofakes3.Backend
	uploads  *uploadLog
	broker   *httptest.Server
	registry *httptest.Server
	steps    *steps
}

// steps records progress.
type steps struct {
	mu   sync.Mutex
	text []string
}

func (s *steps) Step(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text = append(s.text, text)
}

func (s *steps) Transfer(label string, _ int64) io.WriteCloser {
	s.Step(label)
	return nopCloser{io.Discard}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// uploadLog keeps what reached the store.
type uploadLog struct {
	next http.Handler
	mu   sync.Mutex
	all  bytes.Buffer
}

func (u *uploadLog) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	u.mu.Lock()
	u.all.Write(body)
	u.mu.Unlock()
	r.Body = io.NopCloser(bytes.NewReader(body))
	u.next.ServeHTTP(w, r)
}

func (u *uploadLog) contains(s string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return bytes.Contains(u.all.Bytes(), []byte(s))
}

func newWorld(t *testing.T) *world {
	t.Helper()
	chain, err := testChain()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: t.TempDir(), steps: &steps{}}
	w.file("root.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: chain.Root.Raw})))
	server, err := keybroker.New(keybroker.Config{
		StateDir: filepath.Join(w.dir, "broker"), AdminToken: adminToken, EmulatedRoots: []*x509.Certificate{chain.Root},
		AllowDevelopmentImage: true, Logger: hclog.NewNullLogger(), Rate: 1000, Burst: 1000,
	})
	if err != nil {
		t.Fatal(err)
	}
	w.broker = w.serve(server.Handler())
	w.registry = w.serve(ociregistry.New(ociregistry.Logger(log.New(io.Discard, "", 0))))
	w.objects = s3mem.New()
	if err := w.objects.CreateBucket(bucket); err != nil {
		t.Fatal(err)
	}
	w.uploads = &uploadLog{next: gofakes3.New(w.objects).Server()}
	store := w.serve(w.uploads)
	w.node = &fakeNode{w: w, chain: chain, host: "node-1", features: map[string]bool{}, guests: map[string]*fakeGuest{}}
	w.profile = &Profile{
		StateDir: filepath.Join(w.dir, "state"), ImageDir: imagetest.Folder(t), Hosts: map[string]string{"broker.example": "198.51.100.1"},
		Broker:   BrokerProfile{URL: w.broker.URL, CAFile: w.ca(w.broker), AdminTokenFile: w.file("admin-token", adminToken+"\n")},
		Registry: EndpointProfile{URL: w.registry.URL, CAFile: w.ca(w.registry)},
		Store:    StoreProfile{Endpoint: store.URL, CAFile: w.ca(store), Bucket: bucket, AccessKey: "tenant", SecretKeyFile: w.file("store-key", storeKey)},
		Verify:   VerifyProfile{AllowEmulatedRoots: []string{filepath.Join(w.dir, "root.pem")}, AllowDevelopmentImage: true},
	}
	w.reopen()
	return w
}

func (w *world) reopen() {
	w.t.Helper()
	var err error
	if w.tenant, err = Open(w.profile, w.steps, WithControlPlane(w.node)); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) serve(h http.Handler) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS13}
	s.StartTLS()
	w.t.Cleanup(s.Close)
	return s
}

func (w *world) ca(s *httptest.Server) string {
	return w.file("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
}

func (w *world) file(name, content string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// plant puts an object into the store by another way than the tenant's.
func (w *world) plant(key, body string) {
	w.t.Helper()
	meta := map[string]string{"Last-Modified": time.Now().UTC().Format(http.TimeFormat)}
	if _, err := w.objects.PutObject(bucket, key, meta, strings.NewReader(body), int64(len(body)), nil); err != nil {
		w.t.Fatal(err)
	}
}

// push puts an image into the registry under tag 1 and returns its reference.
func (w *world) push(layers int) (string, v1.Hash) {
	w.t.Helper()
	ref := strings.TrimPrefix(w.registry.URL, "https://") + "/team/app:1"
	parsed, err := name.ParseReference(ref)
	if err != nil {
		w.t.Fatal(err)
	}
	image := empty.Image
	if layers > 0 {
		if image, err = mutate.Config(image, v1.Config{Cmd: []string{fmt.Sprint(layers)}}); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := remote.Write(parsed, image, remote.WithTransport(w.registry.Client().Transport)); err != nil {
		w.t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil {
		w.t.Fatal(err)
	}
	return ref, digest
}
