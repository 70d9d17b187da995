package blob_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/sealed"
	"github.com/confidential-node/agent/nodeagent/blob"
)

func spools(t *testing.T) *blob.Spools {
	t.Helper()
	s, err := blob.OpenSpools(t.TempDir(), blob.SpoolConfig{MaxBytes: 1 << 30, CheckHeader: sealed.CheckHeader, Stall: 2 * time.Second}, client(t), hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// unlimited allows files of any size a test makes.
func unlimited(names ...string) map[string]int64 {
	out := map[string]int64{}
	for _, name := range names {
		out[name] = 1 << 30
	}
	return out
}

func TestResultsAreTakenWholeSealedAndUnderTheQuota(t *testing.T) {
	t.Parallel()
	s := spools(t)
	data := seal(t, 10_000)
	names := unlimited("a", "b", contract.ResultsManifestName)
	spool, err := s.Open("guest-1", names, int64(len(data))+100)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // again replaces
		e, err := spool.Receive(t.Context(), "a", bytes.NewReader(data))
		if err != nil || e.SHA256 != sha256.Sum256(data) || e.Size != int64(len(data)) {
			t.Errorf("%+v %v", e, err)
		}
	}
	broken := io.MultiReader(bytes.NewReader(data[:100]), errorReader{})
	for name, c := range map[string]struct {
		file string
		r    io.Reader
		code string
	}{
		"unknown":      {"c", bytes.NewReader(data), "results.unknown-name"},
		"path":         {"../x", bytes.NewReader(data), "results.unknown-name"},
		"over quota":   {"b", bytes.NewReader(data), "results.quota"},
		"plaintext":    {"b", strings.NewReader("plain"), "results.not-sealed"},
		"broken off":   {"b", broken, "internal"},
		"endless list": {contract.ResultsManifestName, bytes.NewReader(make([]byte, 1000)), "results.quota"},
	} {
		if _, err := spool.Receive(t.Context(), c.file, c.r); contract.AsRefusal(err).Code != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	again, err := s.Open("guest-1", names, int64(len(data))+100)
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := again.Entries(); err != nil || len(entries) != 1 || entries[0].SHA256 != sha256.Sum256(data) {
		t.Errorf("after a restart: %+v %v", entries, err)
	}
	if ids, err := s.List(); err != nil || len(ids) != 1 {
		t.Errorf("%v %v", ids, err)
	}
	for range 2 {
		if err := s.Remove("guest-1"); err != nil {
			t.Error(err)
		}
	}
}

// All guests' results together have a bound, which a restart does not forget
// and what is refused, replaced or removed does not use up.
func TestAllSpoolsTogetherAreBounded(t *testing.T) {
	t.Parallel()
	dir, data := t.TempDir(), seal(t, 200_000)
	limit := int64(len(data))*2 + 500
	var s *blob.Spools
	receive := func(guest, name string, r io.Reader) error {
		spool, err := s.Open(guest, unlimited("a", "b"), 1<<20)
		if err == nil {
			_, err = spool.Receive(t.Context(), name, r)
		}
		return err
	}
	reopen := func() {
		var err error
		if s, err = blob.OpenSpools(dir, blob.SpoolConfig{MaxBytes: limit, CheckHeader: sealed.CheckHeader}, client(t), hclog.NewNullLogger()); err != nil {
			t.Fatal(err)
		}
	}
	reopen()
	for range 5 {
		broken := receive("guest-1", "b", io.MultiReader(bytes.NewReader(data[:190_000]), errorReader{}))
		if contract.AsRefusal(broken).Code != "internal" {
			t.Errorf("broken off: %v", broken)
		}
		// Again replaces: both are there for a moment.
		if err := errors.Join(receive("guest-1", "a", bytes.NewReader(data)), s.Remove("guest-2")); err != nil {
			t.Error(err)
		}
	}
	if err := receive("guest-2", "a", bytes.NewReader(data)); err != nil {
		t.Error(err)
	}
	for range 2 {
		full := receive("guest-3", "a", bytes.NewReader(data))
		if r := contract.AsRefusal(full); full == nil || r.Code != "results.spools-full" || r.Remedy == "" {
			t.Errorf("over the bound: %v", full)
		}
		reopen()
	}
	if err := errors.Join(s.Remove("guest-1"), receive("guest-3", "a", bytes.NewReader(data))); err != nil {
		t.Error(err)
	}
}

type errorReader struct{}

func (errorReader) Read([]byte) (int, error) { return 0, errors.New("broken off") }

// A store that does not take the file has not got it, whatever it says.
func TestAnUploadIsDoneOnlyWhenTheStoreTookAllOfIt(t *testing.T) {
	t.Parallel()
	s := spools(t)
	data := seal(t, 8<<20)
	spool, err := s.Open("guest-1", unlimited("a"), 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	e, err := spool.Receive(t.Context(), "a", bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		code   string
	}{
		"redirected": {func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut {
				http.Redirect(w, r, "/elsewhere", http.StatusSeeOther)
			}
		}, "blob.redirected"},
		"answered early": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush() //nolint:errcheck,forcetypeassert // it is one
		}, "internal"},
		"not read": {func(http.ResponseWriter, *http.Request) { <-over }, "internal"},
	} {
		server := httptest.NewTLSServer(c.answer)
		err := s.Upload(t.Context(), "guest-1", e, server.URL+"?sig=SECRETSIGNATURE")
		if err == nil || contract.AsRefusal(err).Code != c.code || strings.Contains(err.Error(), "SECRETSIGNATURE") {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
		if name == "not read" {
			close(over)
		}
		server.CloseClientConnections()
		server.Close()
	}
	for name, url := range map[string]string{"in the clear": "http://127.0.0.1:1/", "no URL": "https://%zz/"} {
		if err := s.Upload(t.Context(), "guest-1", e, url); contract.AsRefusal(err).Code != "blob.url-malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	short := e
	short.Size--
	gone := e
	gone.Name = "b"
	for _, e := range []blob.Entry{short, gone} {
		if err := s.Upload(t.Context(), "guest-1", e, "https://127.0.0.1:1/"); contract.AsRefusal(err).Code != "results.spool-damaged" {
			t.Errorf("%+v: %v", e, err)
		}
	}
}

func TestUploadsSendTheFileAndSayWhatIsFinal(t *testing.T) {
	t.Parallel()
	s := spools(t)
	data := seal(t, 100_000)
	spool, err := s.Open("guest-1", unlimited("a"), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	e, err := spool.Receive(t.Context(), "a", bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	code := http.StatusOK
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, _ = io.ReadAll(r.Body)
		w.WriteHeader(code)
	}))
	t.Cleanup(server.Close)
	url := server.URL + "?sig=SECRETSIGNATURE"
	if err := s.Upload(t.Context(), "guest-1", e, url); err != nil || !bytes.Equal(got, data) {
		t.Errorf("uploaded %d bytes, %v", len(got), err)
	}
	code = http.StatusForbidden
	if err := s.Upload(t.Context(), "guest-1", e, url); contract.AsRefusal(err).Code != "blob.url-expired" {
		t.Errorf("expired: %v", err)
	}
	code = http.StatusServiceUnavailable
	if err := s.Upload(t.Context(), "guest-1", e, url); err == nil || contract.AsRefusal(err).Code != "internal" {
		t.Errorf("may pass: %v", err)
	}
	code = http.StatusOK
	e.SHA256[0] ^= 1
	if err := s.Upload(t.Context(), "guest-1", e, url); contract.AsRefusal(err).Code != "results.spool-damaged" {
		t.Errorf("damaged: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Upload(ctx, "guest-1", e, url); err == nil || strings.Contains(err.Error(), "SECRETSIGNATURE") {
		t.Errorf("cancelled: %v", err)
	}
}

// BenchmarkUpload against BenchmarkPlainPut shows what checking while sending
// costs.
func BenchmarkUpload(b *testing.B) {
	s, err := blob.OpenSpools(b.TempDir(), blob.SpoolConfig{MaxBytes: 1 << 30, CheckHeader: sealed.CheckHeader}, client(b), hclog.NewNullLogger())
	if err != nil {
		b.Fatal(err)
	}
	spool, err := s.Open("guest-1", unlimited("a"), 1<<30)
	if err != nil {
		b.Fatal(err)
	}
	entry, err := spool.Receive(b.Context(), "a", bytes.NewReader(seal(b, 64<<20)))
	if err != nil {
		b.Fatal(err)
	}
	url := sink(b)
	b.SetBytes(entry.Size)
	for b.Loop() {
		if err := s.Upload(b.Context(), "guest-1", entry, url); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPlainPut(b *testing.B) {
	plain, data, url := client(b), seal(b, 64<<20), sink(b)
	path := filepath.Join(b.TempDir(), "a")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		file, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		req, err := http.NewRequestWithContext(b.Context(), http.MethodPut, url, file)
		if err != nil {
			b.Fatal(err)
		}
		req.ContentLength = int64(len(data))
		resp, err := plain.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		if err := resp.Body.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// sink takes whatever is put.
func sink(tb testing.TB) (url string) {
	tb.Helper()
	server := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	tb.Cleanup(server.Close)
	return server.URL + "/a"
}
