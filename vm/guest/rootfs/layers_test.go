package rootfs

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/pin"
)

func pressed(tb testing.TB, data []byte) []byte {
	tb.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(data)
	if err := errors.Join(err, w.Close()); err != nil {
		tb.Fatal(err)
	}
	return out.Bytes()
}

func zstandard(tb testing.TB, data []byte) []byte {
	tb.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		tb.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

// sparse is an archive with one file of 1 TiB that is a hole (pax 1.0).
func sparse(tb testing.TB) []byte {
	tb.Helper()
	content := "1\n1099511627776\n0\n"
	raw := archive(tb, []file{{name: "GNUSparseFile/huge", text: content + strings.Repeat("\x00", 512-len(content)), pax: map[string]string{
		"GNU.sparsX.major": "1", "GNU.sparsX.minor": "0", "GNU.sparsX.name": "huge", "GNU.sparsX.realsize": "1099511627776",
	}}})
	return bytes.ReplaceAll(raw, []byte("GNU.sparsX"), []byte("GNU.sparse")) // the writer refuses them
}

// raw unpacks layers given as they are on the wire.
func raw(tb testing.TB, u *Unpacker, dir string, layers ...[]byte) error {
	tb.Helper()
	img := empty.Image
	for _, data := range layers {
		var err error
		if img, err = mutate.AppendLayers(img, static.NewLayer(data, types.OCILayer)); err != nil {
			return err
		}
	}
	return u.Unpack(tb.Context(), img, dir)
}

func deep(n int) string { return strings.Repeat("d/", n) + "f" }

func TestHostileLayersAreRefusedOrStayInside(t *testing.T) {
	t.Parallel()
	const malformed, full, unpacked = "guest.image-malformed", "guest.out-of-memory", "<nil>"
	many := func(n int, f func(int) file) (out []file) {
		for i := range n {
			out = append(out, f(i))
		}
		return out
	}
	plain := func(layers ...[]file) (out [][]byte) {
		for _, l := range layers {
			out = append(out, archive(t, l))
		}
		return out
	}
	skipped := archive(t, []file{{name: ".wh.x", text: strings.Repeat("\x00", 32<<20)}})
	for name, c := range map[string]struct {
		layers [][]byte
		code   string
	}{
		"hard link above":                           {plain([]file{{name: "h", kind: tar.TypeLink, link: "../keep"}}), malformed},
		"hard link to an absolute name":             {plain([]file{{name: "h", kind: tar.TypeLink, link: "/etc/passwd"}}), malformed},
		"hard link through a link":                  {plain([]file{{name: "up", kind: tar.TypeSymlink, link: "../.."}, {name: "h", kind: tar.TypeLink, link: "up/keep"}}), malformed},
		"hard link through an earlier layer's link": {plain([]file{{name: "up", kind: tar.TypeSymlink, link: ".."}}, []file{{name: "h", kind: tar.TypeLink, link: "up/keep"}}), malformed},
		"hard link to a folder":                     {plain([]file{{name: "d", kind: tar.TypeDir}, {name: "h", kind: tar.TypeLink, link: "d"}}), malformed},
		"hard link to a link, written":              {plain([]file{{name: "l", kind: tar.TypeSymlink, link: "../keep"}, {name: "h", kind: tar.TypeLink, link: "l"}, {name: "h", text: "x"}}), unpacked},
		"through an earlier layer's link":           {plain([]file{{name: "up", kind: tar.TypeSymlink, link: "../.."}}, []file{{name: "up/keep", text: "x"}}), unpacked},
		"a folder over an earlier link":             {plain([]file{{name: "up", kind: tar.TypeSymlink, link: ".."}}, []file{{name: "up", kind: tar.TypeDir}, {name: "up/keep", text: "x"}}), unpacked},
		"a link over an earlier folder":             {plain([]file{{name: "d/f", text: "x"}}, []file{{name: "d", kind: tar.TypeSymlink, link: ".."}, {name: "d/keep", text: "x"}}), unpacked},
		"whiteout through a link":                   {plain([]file{{name: "up", kind: tar.TypeSymlink, link: ".."}}, []file{{name: "up/.wh.keep"}, {name: "up/.wh..wh..opq"}}), unpacked},
		"whiteout of the folder above":              {plain([]file{{name: ".wh..."}}), malformed},
		"whiteout of nothing":                       {plain([]file{{name: "d/.wh."}}), malformed},
		"block device":                              {plain([]file{{name: "sda", kind: tar.TypeBlock}}), malformed},
		"device of an earlier link":                 {plain([]file{{name: "dev", kind: tar.TypeSymlink, link: "etc"}}, []file{{name: "dev/mem", kind: tar.TypeChar}}), malformed},
		"reserved type":                             {plain([]file{{name: "c", kind: tar.TypeCont}}), malformed},
		"a file for a folder":                       {plain([]file{{name: "f", text: "x"}, {name: "f/g", text: "x"}}), malformed},
		"a file for a folder, deep":                 {plain([]file{{name: "f", text: "x"}, {name: "f/g/h", text: "x"}}), malformed},
		"a long name":                               {plain([]file{{name: strings.Repeat("n", 300), text: "x"}}), malformed},
		"a long path":                               {plain([]file{{name: strings.Repeat("nnnnnnn/", 600) + "f"}}), malformed},
		"a deep path":                               {plain([]file{{name: deep(maxDepth), text: "x"}}), malformed},
		"a deep path by links":                      {plain([]file{{name: deep(200), text: "x"}, {name: "l", kind: tar.TypeSymlink, link: strings.TrimSuffix(deep(200), "/f")}, {name: "l/" + deep(200), text: "x"}}), malformed},
		"a long link":                               {plain([]file{{name: "l", kind: tar.TypeSymlink, link: strings.Repeat("x/", 3000)}}), malformed},
		"a path of many steps":                      {plain([]file{{name: "l", kind: tar.TypeSymlink, link: strings.Repeat("./", 1800)}, {name: "m", kind: tar.TypeSymlink, link: strings.Repeat("l/", 30)}, {name: "m/f"}}), malformed},
		"many empty files":                          {plain(many(1100, func(i int) file { return file{name: fmt.Sprint(i)} })), full},
		"many long names": {plain(many(400, func(i int) file {
			return file{name: fmt.Sprintf("%s/%d", strings.TrimSuffix(strings.Repeat("nnnnnnn/", 240), "/"), i)}
		})), full},
		"many folders in between": {plain(many(8, func(i int) file { return file{name: fmt.Sprintf("%d/%s", i, deep(200))} })), full},
		"sparse":                  {[][]byte{sparse(t)}, full},
		"sparse, packed":          {[][]byte{pressed(t, sparse(t))}, full},
		"gzip of a large file":    {[][]byte{pressed(t, archive(t, []file{{name: "f", text: strings.Repeat("\x00", 2<<20)}}))}, full},
		"gzip of what is skipped": {[][]byte{pressed(t, skipped)}, malformed},
		"zstd of what is skipped": {[][]byte{zstandard(t, skipped)}, malformed},
		"gzip behind the end":     {[][]byte{pressed(t, append(archive(t, nil), make([]byte, 32<<20)...))}, malformed},
		"gzip of many members":    {[][]byte{bytes.Repeat(pressed(t, make([]byte, 1<<20)), 32)}, malformed},
		"zstd with a huge window": {[][]byte{{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00}}, malformed},
		"gzip that ends":          {[][]byte{pressed(t, archive(t, []file{{name: "f", text: "x"}}))[:40]}, malformed},
		"zstd that is none":       {[][]byte{{0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff, 0xff}}, malformed},
		"no archive":              {[][]byte{bytes.Repeat([]byte("no archive"), 200)}, malformed},
		"an archive that ends":    {[][]byte{archive(t, []file{{name: "f", text: strings.Repeat("x", 2000)}})[:1000]}, malformed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "root")
			keep := filepath.Join(filepath.Dir(dir), "keep")
			if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(keep, []byte("k"), 0o600)); err != nil {
				t.Fatal(err)
			}
			err := raw(t, &Unpacker{IDs: 1 << 31, MaxBytes: 1 << 20}, dir, c.layers...)
			if code(err) != c.code {
				t.Errorf("%v, want %s", err, c.code)
			}
			if around, err := os.ReadDir(filepath.Dir(dir)); err != nil || len(around) != 2 || read(t, keep) != "k" {
				t.Errorf("around the root: %v %v", around, err)
			}
			onlyFiles(t, dir)
		})
	}
}

// onlyFiles fails when anything but plain files, folders and links is there,
// or a file with set-id bits or capabilities.
func onlyFiles(tb testing.TB, dir string) {
	tb.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if info.Mode()&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket|fs.ModeSetuid|fs.ModeSetgid) != 0 {
			tb.Errorf("%s is %v", path, info.Mode())
		}
		if n, err := unix.Lgetxattr(path, "security.capability", nil); err == nil {
			tb.Errorf("%s has capabilities of %d bytes", path, n)
		}
		return nil
	})
	if err != nil {
		tb.Error(err)
	}
}

func TestTheNumberOfEntriesIsBounded(t *testing.T) {
	t.Parallel()
	u := &Unpacker{IDs: 1 << 31, MaxBytes: 1 << 20, entries: maxEntries - 2}
	if err := raw(t, u, t.TempDir(), archive(t, []file{{name: "./", kind: tar.TypeDir}, {name: "./", kind: tar.TypeDir}, {name: "./", kind: tar.TypeDir}})); code(err) != "guest.image-malformed" {
		t.Error(err)
	}
}

func TestPrivilegesOfALayerAreLeftOut(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	capability := string([]byte{1, 0, 0, 2, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	err := raw(t, &Unpacker{IDs: 1 << 31, MaxBytes: 1 << 20}, dir, zstandard(t, archive(t, []file{
		{name: "suid", text: "s", mode: 0o6755},
		{name: "d", kind: tar.TypeDir, mode: 0o2755},
		{name: "ping", text: "p", pax: map[string]string{"SCHILY.xattr.user.note": "n", "LIBARCHIVE.xattr.user.note": "bg"}},
		{name: "cap", text: "p", pax: map[string]string{"SCHILY.xattr.security.capability": strings.ReplaceAll(capability, "\x00", "0")}},
	})))
	if err != nil || read(t, dir, "ping") != "p" {
		t.Fatal(err)
	}
	onlyFiles(t, dir)
	if n, err := unix.Lgetxattr(filepath.Join(dir, "ping"), "user.note", nil); err == nil {
		t.Errorf("an attribute of %d bytes was set", n)
	}
}

func TestMarkersHideLowerLayersOnly(t *testing.T) {
	t.Parallel()
	dir, err := unpack(t, []file{
		{name: "o/sub/old", text: "old"}, {name: "o/top", text: "old"}, {name: "p/old", text: "old"}, {name: "w", text: "old"}, {name: "f", text: "1"},
	}, []file{
		{name: "o/sub/new", text: "new"}, // its folder is not named
		{name: "p", kind: tar.TypeDir},
		{name: "p/new", text: "new"},
		{name: "o/.wh..wh..opq"},
		{name: ".wh.p"},
		{name: "w", text: "new"},
		{name: ".wh.w"},
		{name: "f", text: "2"},
		{name: "f", kind: tar.TypeDir},
		{name: "f", text: "3"},
		{name: ".wh.f"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"o/sub/old": "error", "o/top": "error", "o/sub/new": "new", "p/old": "error", "p/new": "new", "w": "new", "f": "3",
	} {
		if got := read(t, dir, path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
}

func TestARegistryThatIsAwayOrSendsElsewhereIsTold(t *testing.T) {
	t.Parallel()
	reference := "@sha256:" + strings.Repeat("ab", 32)
	if _, err := Pull(t.Context(), "127.0.0.1:1/r/i"+reference, http.DefaultTransport); code(err) != "guest.image-unreachable" {
		t.Errorf("away: %v", err)
	}
	elsewhere := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the redirect was followed") }))
	t.Cleanup(elsewhere.Close)
	s := httptest.NewTLSServer(http.RedirectHandler(elsewhere.URL, http.StatusTemporaryRedirect))
	t.Cleanup(s.Close)
	sum := sha256.Sum256(s.Certificate().RawSubjectPublicKeyInfo)
	pinned, err := pin.Transport(contract.Endpoint{URL: s.URL, SPKISHA256: hex.EncodeToString(sum[:])})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Pull(t.Context(), strings.TrimPrefix(s.URL, "https://")+"/r/i"+reference, pinned); !errors.Is(err, pin.ErrUnpinned) {
		t.Errorf("redirect: %v", err)
	}
}

func FuzzUnpack(f *testing.F) {
	tricks := archive(f, []file{
		{name: "a", kind: tar.TypeSymlink, link: ".."},
		{name: "a/b", text: "x"},
		{name: "a/.wh.b"},
		{name: "h", kind: tar.TypeLink, link: "a"},
		{name: "s", text: "x", mode: 0o6755},
		{name: "d/.wh..wh..opq"},
	})
	for _, seed := range [][]byte{tricks, pressed(f, tricks), zstandard(f, tricks), sparse(f)} {
		f.Add(seed, seed)
	}
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		outer := t.TempDir()
		dir := filepath.Join(outer, "root")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		_ = raw(t, &Unpacker{IDs: 1 << 31, MaxBytes: 1 << 16}, dir, lower, upper)
		if around, err := os.ReadDir(outer); err != nil || len(around) != 1 {
			t.Errorf("a layer wrote outside: %v %v", around, err)
		}
		onlyFiles(t, dir)
	})
}
