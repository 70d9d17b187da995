package rootfs

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/confidential-node/agent/firmware/contract"
)

// file is one entry of a layer; the zero owner is whoever runs the test, for
// files can be given away by root only.
type file struct {
	name, text, link string
	kind             byte
	mode             int64
	uid              int
	pax              map[string]string
}

func archive(tb testing.TB, files []file) []byte {
	tb.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Typeflag: f.kind, Linkname: f.link, Mode: f.mode, Uid: os.Getuid() + f.uid, Gid: os.Getgid(), PAXRecords: f.pax}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if h.Typeflag == 0 {
			h.Typeflag, h.Size = tar.TypeReg, int64(len(f.text))
		}
		if err := w.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.WriteString(w, f.text); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return out.Bytes()
}

func picture(t *testing.T, layers ...[]file) v1.Image {
	t.Helper()
	img := empty.Image
	for _, files := range layers {
		data := archive(t, files)
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

func unpack(t *testing.T, layers ...[]file) (string, error) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir, (&Unpacker{IDs: 1 << 31, MaxBytes: 1 << 20}).Unpack(t.Context(), picture(t, layers...), dir)
}

func code(err error) string {
	if refused, ok := errors.AsType[*contract.Refusal](err); ok {
		return refused.Code
	}
	return fmt.Sprint(err)
}

func read(t *testing.T, parts ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(parts...))
	if err != nil {
		return "error"
	}
	return string(text)
}

func TestHigherLayersReplaceAndRemoveWhatLowerOnesLeft(t *testing.T) {
	t.Parallel()
	dir, err := unpack(t, []file{
		{name: "etc/", kind: tar.TypeDir, mode: 0o750},
		{name: "etc/a", text: "a1"},
		{name: "etc/b", text: "b1"},
		{name: "gone/x", text: "x"},
		{name: "usr/lib/f", text: "f1"},
		{name: "lib", kind: tar.TypeSymlink, link: "usr/lib"},
		{name: "run", kind: tar.TypeSymlink, link: "/usr/run"},
		{name: "set", text: "s", mode: 0o4755},
		{name: "tmp", kind: tar.TypeDir, mode: 0o1777},
		{name: "dir/inner", text: "i"},
		{name: "hard", kind: tar.TypeLink, link: "etc/a"},
		{name: "dev/console", kind: tar.TypeChar},
	}, []file{
		{name: "etc/a", text: "a2"},
		{name: "etc/.wh.b"},
		{name: "gone/new", text: "n"},
		{name: "gone/.wh..wh..opq"},
		{name: "lib/g", text: "g2"},
		{name: "run/pid", text: "1"},
		{name: "dir", text: "now a file"},
		{name: "etc", kind: tar.TypeDir, mode: 0o755},
	})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"etc/a": "a2", "etc/b": "error", "gone/x": "error", "gone/new": "n", "usr/lib/f": "f1", "usr/lib/g": "g2", "usr/run/pid": "1",
		"dir": "now a file", "hard": "a1", "dev/console": "error",
	} {
		if got := read(t, dir, path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	for path, want := range map[string]fs.FileMode{"set": 0o755, "tmp": 0o777 | fs.ModeSticky | fs.ModeDir, "etc": 0o755 | fs.ModeDir} {
		if info, err := os.Stat(filepath.Join(dir, path)); err != nil || info.Mode() != want {
			t.Errorf("%s: %v %v", path, info.Mode(), err)
		}
	}
}

func TestNoLayerWritesOutside(t *testing.T) {
	t.Parallel()
	for name, files := range map[string][]file{
		"dots":          {{name: "../../evil", text: "x"}},
		"absolute":      {{name: "/evil", text: "x"}},
		"link to above": {{name: "up", kind: tar.TypeSymlink, link: "../.."}, {name: "up/evil", text: "x"}},
		"absolute link": {{name: "up", kind: tar.TypeSymlink, link: "/tmp"}, {name: "up/evil", text: "x"}},
		"chain":         {{name: "a", kind: tar.TypeSymlink, link: "b/.."}, {name: "b", kind: tar.TypeSymlink, link: "../../.."}, {name: "a/evil", text: "x"}},
		"over a link":   {{name: "f", kind: tar.TypeSymlink, link: "/etc/passwd"}, {name: "f", text: "x"}},
		"whiteout":      {{name: "up", kind: tar.TypeSymlink, link: ".."}, {name: "up/.wh.keep"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "root")
			keep := filepath.Join(filepath.Dir(dir), "keep")
			if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(keep, []byte("k"), 0o600)); err != nil {
				t.Fatal(err)
			}
			if err := (&Unpacker{IDs: 1 << 31, MaxBytes: 1 << 20}).Unpack(t.Context(), picture(t, files), dir); err != nil {
				t.Fatal(err) // it lands inside, as in the image's own root
			}
			if read(t, keep) != "k" {
				t.Error("a file outside is gone")
			}
			around, err := os.ReadDir(filepath.Dir(dir))
			if err != nil || len(around) != 2 {
				t.Errorf("around the root: %v %v", around, err)
			}
		})
	}
}

func TestLayersThatAreNoFileSystemAreRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		files []file
		code  string
	}{
		"device":            {[]file{{name: "mem", kind: tar.TypeChar}}, "guest.image-malformed"},
		"pipe":              {[]file{{name: "p", kind: tar.TypeFifo}}, "guest.image-malformed"},
		"link circle":       {[]file{{name: "a", kind: tar.TypeSymlink, link: "b"}, {name: "b", kind: tar.TypeSymlink, link: "a"}, {name: "a/x", text: "x"}}, "guest.image-malformed"},
		"hard link to none": {[]file{{name: "h", kind: tar.TypeLink, link: "../../etc/passwd"}}, "guest.image-malformed"},
		"too large":         {[]file{{name: "big", text: strings.Repeat("x", 1<<20+1)}}, "guest.out-of-memory"},
		"whiteout of all":   {[]file{{name: ".wh..."}}, "guest.image-malformed"},
		"nobody's":          {[]file{{name: "f", uid: -1 - os.Getuid()}}, "guest.image-malformed"},
		"foreign owner":     {[]file{{name: "f", uid: 1 << 31}}, "guest.image-malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := unpack(t, c.files); code(err) != c.code {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestUsersAreTheImagesOwn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	err := errors.Join(os.Mkdir(dir+"/etc", 0o755),
		os.WriteFile(dir+"/etc/passwd", []byte("root:x:0:0::/:\nweb:x:33:44::/:\nbig:x:70000:1::/:\n"), 0o600),
		os.WriteFile(dir+"/etc/group", []byte("www:x:55:web,root\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	for user, want := range map[string]string{
		"": "0 0", "web": "33 44", "33": "33 44", "7": "7 0", "web:www": "33 55", "7:8": "7 8", ":www": "0 55",
		"nobody": "guest.image-user", "web:none": "guest.image-user", "big": "guest.image-user", "-1": "guest.image-user", "7:70000": "guest.image-user",
	} {
		uid, gid, err := User(user, dir, 65536)
		got := fmt.Sprint(uid, gid)
		if err != nil {
			got = code(err)
		}
		if got != want {
			t.Errorf("user %q: %s, want %s", user, got, want)
		}
	}
}

// answer is what a registry sends.
type answer struct {
	path   string
	status int
	header http.Header
	body   []byte
	cut    bool // the connection ends before the body does
	vague  bool // no length is told beforehand
}

// severed is a body whose connection ends.
type severed struct{ io.Reader }

func (s severed) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// rewrite lets a registry lie.
type rewrite struct {
	next http.RoundTripper
	lie  func(*answer)
}

func (r rewrite) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := r.next.RoundTrip(req)
	if err != nil || r.lie == nil || req.Method != http.MethodGet {
		return resp, err
	}
	body, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return nil, err
	}
	a := &answer{path: req.URL.Path, status: resp.StatusCode, header: resp.Header, body: body}
	r.lie(a)
	resp.StatusCode, resp.Body, resp.ContentLength = a.status, io.NopCloser(bytes.NewReader(a.body)), int64(len(a.body))
	if a.vague {
		resp.ContentLength = -1
		resp.Header.Del("Content-Length")
	}
	if a.cut {
		resp.Body, resp.ContentLength = io.NopCloser(severed{bytes.NewReader(a.body[:len(a.body)/2])}), int64(len(body))
	}
	return resp, nil
}

func TestARegistryThatLiesIsFoundOut(t *testing.T) {
	t.Parallel()
	server := httptest.NewTLSServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "https://")
	img, err := mutate.Config(picture(t, []file{{name: "f", text: "content"}}), v1.Config{Entrypoint: []string{"a"}, Cmd: []string{"b"}, Env: []string{"X=1"}})
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(host + "/r/i:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithTransport(server.Client().Transport)); err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	flip := func(part string) func(*answer) {
		return func(a *answer) {
			if strings.Contains(a.path, part) {
				a.body[len(a.body)-2] ^= 1
			}
		}
	}
	manifests := func(lie func(*answer)) func(*answer) {
		return func(a *answer) {
			if strings.Contains(a.path, "/manifests/") {
				lie(a)
			}
		}
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	blobs := func(lie func(*answer)) func(*answer) {
		return func(a *answer) {
			if strings.HasSuffix(a.path, layer.String()) {
				lie(a)
			}
		}
	}
	for name, c := range map[string]struct {
		lie  func(*answer)
		code string
	}{
		"honest":   {nil, "<nil>"},
		"manifest": {flip("/manifests/"), "guest.image-digest-mismatch"},
		"schema 1": {manifests(func(a *answer) {
			a.header.Set("Content-Type", string(types.DockerManifestSchema1Signed))
			a.header.Set("Docker-Content-Digest", digest.String())
			a.body = []byte(`{"signatures":[{}]}`)
		}), "guest.image-digest-mismatch"},
		"blobs":                  {flip("/blobs/"), "guest.image-digest-mismatch"},
		"short blobs":            {blobs(func(a *answer) { a.body = a.body[:len(a.body)/2] }), "guest.image-digest-mismatch"},
		"long blobs":             {blobs(func(a *answer) { a.body = append(a.body, a.body...) }), "guest.image-digest-mismatch"},
		"empty blobs":            {blobs(func(a *answer) { a.body = nil }), "guest.image-digest-mismatch"},
		"cut blobs":              {blobs(func(a *answer) { a.cut = true }), "guest.image-unreachable"},
		"denied blobs":           {blobs(func(a *answer) { a.status = http.StatusForbidden }), "guest.image-refused"},
		"lost blobs":             {blobs(func(a *answer) { a.status = http.StatusNotFound }), "guest.image-refused"},
		"bomb for a blob":        {blobs(func(a *answer) { a.body, a.vague = pressed(t, make([]byte, 64<<20)), true }), "guest.image-digest-mismatch"},
		"cut manifest":           {manifests(func(a *answer) { a.cut = true }), "guest.image-unreachable"},
		"endless manifest":       {manifests(func(a *answer) { a.body = make([]byte, 128<<20) }), "guest.image-unreachable"},
		"short blobs, no length": {blobs(func(a *answer) { a.body, a.vague = a.body[:len(a.body)/2], true }), "guest.image-digest-mismatch"},
		"long blobs, no length":  {blobs(func(a *answer) { a.body, a.vague = append(a.body, a.body...), true }), "<nil>"},
		"web page":               {manifests(func(a *answer) { a.header.Set("Content-Type", "text/html") }), "<nil>"},
		"another image's":        {manifests(func(a *answer) { a.body = []byte(`{"schemaVersion":2}`) }), "guest.image-digest-mismatch"},
		"absent":                 {manifests(func(a *answer) { a.status = http.StatusNotFound }), "guest.image-refused"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Pull(t.Context(), host+"/r/i@"+digest.String(), rewrite{server.Client().Transport, c.lie})
			if err == nil {
				_, err = Configuration(got, nil)
			}
			if err == nil {
				err = (&Unpacker{IDs: 1 << 31, MaxBytes: 1 << 20}).Unpack(t.Context(), got, t.TempDir())
			}
			if code(err) != c.code {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestTheManifestsCommandReplacesTheImages(t *testing.T) {
	t.Parallel()
	img, err := mutate.Config(empty.Image, v1.Config{Entrypoint: []string{"a"}, Cmd: []string{"b"}})
	if err != nil {
		t.Fatal(err)
	}
	own, errOwn := Configuration(img, nil)
	other, errOther := Configuration(img, []string{"c"})
	if err := errors.Join(errOwn, errOther); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprintf("%v %v %v", own.Args, other.Args, own.Dir) != "[a b] [c] /" {
		t.Errorf("%v %v", own, other)
	}
	if _, err := Configuration(empty.Image, nil); code(err) != "guest.image-no-command" {
		t.Errorf("%v", err)
	}
}
