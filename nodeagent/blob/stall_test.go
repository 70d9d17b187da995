package blob // the pace of uploads and a store's words have no other door

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A store that answers the handshake and then reads nothing.
func TestAnUploadThatStallsEndsAndCanBeTriedAgain(t *testing.T) {
	t.Parallel()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close() //nolint:errcheck // a test's
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close() //nolint:errcheck // held open until the end
		}
	}()
	spools, err := OpenSpools(t.TempDir(), nil, Client(&http.Transport{}))
	if err != nil {
		t.Fatal(err)
	}
	spools.stall = 50 * time.Millisecond
	const size = 64 << 20 // more than sockets hold
	path := filepath.Join(spools.dir, "g", "out")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	err = spools.Upload(t.Context(), "g", Entry{Name: "out", Size: size}, "http://"+listener.Addr().String()+"/o?secret")
	if err == nil || !strings.Contains(err.Error(), "took no byte") || strings.Contains(err.Error(), "secret") {
		t.Errorf("error is %v", err)
	}
}

func FuzzParseContentRange(f *testing.F) {
	f.Add("bytes 0-9/10")
	f.Add("bytes 9-0/*")
	f.Add("bytes -1-9223372036854775808/1")
	f.Fuzz(func(t *testing.T, text string) {
		first, last, total, err := parseContentRange(text)
		if err == nil && (first < 0 || last < first || total <= last) {
			t.Errorf("%q is %d-%d of %d", text, first, last, total)
		}
	})
}
