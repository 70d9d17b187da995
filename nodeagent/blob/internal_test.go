package blob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

func FuzzParseContentRange(f *testing.F) {
	for _, seed := range []string{"bytes 0-9/10", "bytes */10", "bytes 5-4/10", "bytes 0-9/*", "bytes -1-2/3", "lines 0-1/2", "bytes 0-9223372036854775807/9223372036854775807"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if first, last, total, err := parseContentRange(text); err == nil && (first < 0 || last < first || total <= last) {
			t.Errorf("%q is %d-%d/%d", text, first, last, total)
		}
		if total := parseUnsatisfied(text); total < -1 {
			t.Errorf("%q has %d bytes", text, total)
		}
	})
}

func FuzzParseJournal(f *testing.F) {
	f.Add([]byte(`{"etag":"\"1\"","size":100,"part_size":10,"parts":3,"beyond":[4,7]}`))
	f.Add([]byte(`{"size":-1,"part_size":0,"parts":-5}`))
	f.Add([]byte(`{"size":1,"part_size":1,"done":[true]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		j, err := parseJournal(raw)
		if err != nil {
			return
		}
		if j.Size <= 0 || j.PartSize <= 0 || j.Parts < 0 {
			t.Errorf("%+v", j)
		}
		again, err := json.Marshal(j)
		if err != nil {
			t.Fatal(err)
		}
		k, err := parseJournal(again)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := json.Marshal(k); err != nil || !bytes.Equal(again, twice) {
			t.Errorf("%s became %s, %v", again, twice, err)
		}
	})
}

// hostile answers every request alike.
type hostile struct {
	status int
	header http.Header
	body   []byte
}

func (h hostile) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{
		StatusCode: h.status, Status: http.StatusText(h.status), Header: h.header.Clone(), ContentLength: int64(len(h.body)),
		Body: io.NopCloser(bytes.NewReader(h.body)), Request: r,
	}, nil
}

// Whatever a store answers: a blob appears only with the content it is named
// after, and nothing is left of the URL in an error.
func FuzzFetch(f *testing.F) {
	content := []byte("sealed: the very content")
	f.Add(http.StatusPartialContent, "bytes 0-23/24", `"1"`, content)
	f.Add(http.StatusOK, "", "", content)
	f.Add(http.StatusOK, "", "", []byte("sealed: another content!"))
	f.Add(http.StatusFound, "", "", []byte{})
	f.Add(http.StatusRequestedRangeNotSatisfiable, "bytes */5", "W/\"x\"", []byte("plain"))
	f.Fuzz(func(t *testing.T, status int, contentRange, etag string, body []byte) {
		if status < 100 || status > 999 || status/100 == 5 || len(body) > 1<<16 || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout {
			return // what may pass is tried for half a minute
		}
		dir := t.TempDir()
		header := http.Header{"Content-Range": {contentRange}, "Etag": {etag}, "Location": {"%zz?SECRETSIGNATURE"}}
		check := func(r io.Reader) error {
			head := make([]byte, 7)
			if _, err := io.ReadFull(r, head); err != nil {
				return err
			}
			if string(head) != "sealed:" {
				return io.ErrUnexpectedEOF
			}
			return nil
		}
		c, err := Open(dir, Config{MaxBytes: 1 << 20, CheckHeader: check, Stall: time.Minute}, &http.Client{Transport: noRedirects{hostile{status, header, body}}}, hclog.NewNullLogger())
		if err != nil {
			t.Fatal(err)
		}
		// An answer that may pass is not tried for long.
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		ref := Ref{SHA256: sha256.Sum256(content), Size: int64(len(content)), URL: "https://store.example/o?SECRETSIGNATURE"}
		path, err := c.Fetch(ctx, ref, "o", nil)
		if err != nil {
			if bytes.Contains([]byte(err.Error()), []byte("SECRETSIGNATURE")) {
				t.Errorf("the URL is in %v", err)
			}
			if left, globErr := filepath.Glob(filepath.Join(dir, "blobs", "*")); globErr != nil || len(left) > 0 {
				t.Errorf("left %v, %v", left, globErr)
			}
			return
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// An eviction that has looked at the claims takes a blob which a guest asks
// for at that very moment: the guest gets it anew, not the name of nothing.
func TestAClaimWaitsForAnEvictionUnderWay(t *testing.T) {
	t.Parallel()
	content := []byte("content")
	ref := Ref{SHA256: sha256.Sum256(content), Size: int64(len(content)), URL: "https://store.example/"}
	store := hostile{http.StatusOK, http.Header{}, content}
	c, err := Open(t.TempDir(), Config{MaxBytes: 1 << 20, CheckHeader: func(io.Reader) error { return nil }}, &http.Client{Transport: store}, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Fetch(t.Context(), ref, "guest-1", nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Release("guest-1"); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	_, free, err := c.usage("another")
	if err != nil || len(free) != 1 {
		t.Fatalf("%v, %v", free, err)
	}
	fetched := make(chan string)
	go func() {
		path, err := c.Fetch(t.Context(), ref, "guest-2", nil)
		if err != nil {
			t.Error(err)
		}
		fetched <- path
	}()
	claim := filepath.Join(c.dir, "owners", "guest-2", ref.name())
	for range 20_000 { // time enough to claim, if nothing hinders it
		if _, err := os.Stat(claim); err == nil {
			t.Error("claimed while an eviction was under way")
			break
		}
		runtime.Gosched()
	}
	err = os.Remove(c.final(free[0].name))
	c.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(<-fetched); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%q, %v", got, err)
	}
}

func TestAPresignedURLTellsItsEnd(t *testing.T) {
	t.Parallel()
	const date = "?X-Amz-Date=20261123T120000Z&X-Amz-Expires="
	for url, want := range map[string]time.Time{
		"https://s/o" + date + "60":         time.Date(2026, 11, 23, 12, 1, 0, 0, time.UTC),
		"https://s/o" + date + "-60":        {},
		"https://s/o" + date + "9999999999": {},
		"https://s/o":                       {},
		"://" + date + "60":                 {},
	} {
		if got := Expiry(url); !got.Equal(want) {
			t.Errorf("%s ends at %v, want %v", url, got, want)
		}
	}
}

func FuzzExpiry(f *testing.F) {
	f.Add("https://s/o?X-Amz-Date=20261123T120000Z&X-Amz-Expires=60")
	f.Fuzz(func(t *testing.T, url string) {
		if at := Expiry(url); !at.IsZero() && (at.Year() < 0 || at.Year() > 9999+70) {
			t.Errorf("%q ends at %v", url, at)
		}
	})
}

func FuzzErrorDocument(f *testing.F) {
	f.Add([]byte(""))
	f.Add([]byte(`<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>m</Message></Error>`))
	f.Add([]byte(`<Error><Code>a<b/>&x;</Code>`))
	f.Add([]byte(`<!DOCTYPE html><html><Error/></html>`))
	f.Add([]byte("<Error><Code>https://store.example/?X-Amz-Signature=1\n</Code></Error>"))
	f.Fuzz(func(t *testing.T, body []byte) {
		code, failed := errorDocument(body)
		if failed != (code != "") || len(code) > 64 || failed && !bytes.Contains(body, []byte("Error")) {
			t.Errorf("%q is %q, %t", body, code, failed)
		}
		if strings.ContainsAny(code, "\n\r<>&/?=") {
			t.Errorf("%q passes", code)
		}
	})
}

func FuzzParsePartsJournal(f *testing.F) {
	f.Add([]byte(`{"upload_id":"u","part_size":5,"size":9,"sha256":"aa","etags":["\"1\"",""]}`))
	f.Add([]byte(`{"upload_id":"u","part_size":-5,"size":-9,"sha256":"","etags":["<a>"]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		j, err := parsePartsJournal(raw)
		if err != nil {
			return
		}
		again, err := json.Marshal(j)
		if err != nil {
			t.Fatal(err)
		}
		if k, err := parsePartsJournal(again); err != nil || !slices.Equal(j.ETags, k.ETags) || len(j.ETags) > 10_000 {
			t.Errorf("%+v became %+v, %v", j, k, err)
		}
	})
}

func FuzzParseSums(f *testing.F) {
	f.Add([]byte(`{"sha256":"0000000000000000000000000000000000000000000000000000000000000000","crc32c":4294967295,"size":9}`))
	f.Add([]byte(`{"sha256":"00","crc32c":-1,"size":-9}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, digest, err := parseSums(raw)
		if err == nil && (s.Size < 0 || !strings.EqualFold(s.SHA256, hex.EncodeToString(digest[:]))) {
			t.Errorf("%+v, %x", s, digest)
		}
	})
}

// The longest journal a node writes is one that it reads.
func TestTheLongestJournalOfAnUploadIsRead(t *testing.T) {
	t.Parallel()
	j := partsJournal{UploadID: strings.Repeat("u", 1024), ETags: slices.Repeat([]string{strings.Repeat(`"`, 96)}, 10_000)}
	raw, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parsePartsJournal(raw); err != nil {
		t.Error(err)
	}
	if raw, err = json.Marshal(partsJournal{ETags: slices.Repeat([]string{""}, 10_001)}); err != nil {
		t.Fatal(err)
	}
	if _, err := parsePartsJournal(raw); err == nil {
		t.Error("more parts than an upload has are read")
	}
}
