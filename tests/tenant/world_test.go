package tenant

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
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
	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/confidential-node/agent/firmware/contract"
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
		StateDir: filepath.Join(w.dir, "state"), ImageDir: w.image(), Hosts: map[string]string{"broker.example": "198.51.100.1"},
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

// image writes a guest image folder with a small OVMF that declares a page
// for kernel hashes.
func (w *world) image() string {
	w.t.Helper()
	dir := filepath.Join(w.dir, "image")
	if err := os.Mkdir(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	desc := contract.ImageDescription{Version: contract.ImageVersion, Name: "test", Variant: contract.VariantProduction, Emulated: true, Cmdline: "quiet"}
	for name, part := range map[string]struct {
		file *contract.ImageFile
		data []byte
	}{"fw": {&desc.Firmware, smallOVMF()}, "kernel": {&desc.Kernel, []byte("kernel")}, "initrd": {&desc.Initrd, []byte("initrd")}} {
		sum := sha256.Sum256(part.data)
		*part.file = contract.ImageFile{File: name, SHA256: hex.EncodeToString(sum[:]), Size: int64(len(part.data))}
		w.file(filepath.Join("image", name), string(part.data))
	}
	raw, err := json.Marshal(desc)
	if err != nil {
		w.t.Fatal(err)
	}
	w.file(filepath.Join("image", contract.ImageDescriptionName), string(raw))
	return dir
}

// smallOVMF is 4 KiB with the footer table and the SEV metadata of AmdSev.
func smallOVMF() []byte {
	const size = 4096
	image := make([]byte, size)
	put := func(at int, words ...uint32) {
		for i, word := range words {
			binary.LittleEndian.PutUint32(image[at+4*i:], word)
		}
	}
	sections := []uint32{0x800000, 0x9000, 1, 0x80d000, 0x1000, 2, 0x80e000, 0x1000, 3, 0x810000, 0x1000, 0x10}
	meta := size - 1024
	copy(image[meta:], "ASEV")
	put(meta+4, uint32(16+4*len(sections)), 1, uint32(len(sections)/3))
	put(meta+16, sections...)
	var table []byte
	guid := func(text string) {
		g := uuid.MustParse(text)
		table = append(table, g[3], g[2], g[1], g[0], g[5], g[4], g[7], g[6])
		table = append(table, g[8:]...)
	}
	entry := func(id string, words ...uint32) {
		for _, word := range words {
			table = binary.LittleEndian.AppendUint32(table, word)
		}
		table = binary.LittleEndian.AppendUint16(table, uint16(4*len(words)+18))
		guid(id)
	}
	entry("dc886566-984a-4798-a75e-5585a7bf67cc", 1024)
	entry("7255371f-3a3b-4b04-927b-1da6efa8d454", 0x810c00, 0x400)
	entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", 0x80b004)
	table = binary.LittleEndian.AppendUint16(table, uint16(len(table)+18))
	guid("96b582de-1fb2-45f7-baea-a366c55a082d")
	copy(image[size-32-len(table):], table)
	return image
}
