package outside_test

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7/pkg/signer"

	"github.com/confidential-node/agent/tests/outside"
)

const signedLink = "https://store.example/bucket/in.age"

// fuzzStore is a store with one object, and what it answers to a GET of it.
func fuzzStore(f *testing.F, now time.Time) func(tb testing.TB, edit func(*http.Request)) int {
	f.Helper()
	store, err := outside.NewStore(accessKey, secretKey, func() time.Time { return now }, "bucket")
	if err != nil {
		f.Fatal(err)
	}
	if err := store.Replace("bucket", "in.age", []byte("sealed")); err != nil {
		f.Fatal(err)
	}
	return func(tb testing.TB, edit func(*http.Request)) int {
		tb.Helper()
		r := request(tb)
		edit(r)
		w := httptest.NewRecorder()
		store.ServeHTTP(w, r)
		return w.Code
	}
}

func request(tb testing.TB) *http.Request {
	tb.Helper()
	return httptest.NewRequestWithContext(tb.Context(), http.MethodGet, signedLink, http.NoBody)
}

// Only the query that the account signed opens the object.
func FuzzPresignedQuery(f *testing.F) {
	now := time.Now()
	ask := fuzzStore(f, now)
	valid := signer.PreSignV4(*request(f), accessKey, secretKey, "", "us-east-1", 60).URL.RawQuery
	with := func(query string) func(*http.Request) { return func(r *http.Request) { r.URL.RawQuery = query } }
	if code := ask(f, with(valid)); code != http.StatusOK {
		f.Fatalf("the signed query: %d", code)
	}
	want, err := url.ParseQuery(valid)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(valid)
	f.Add("")
	f.Add(valid + "&versionId=x")
	f.Add(strings.Replace(valid, "X-Amz-Expires=60", "X-Amz-Expires=61", 1))
	f.Add(strings.Replace(valid, "X-Amz-Expires=60", "X-Amz-Expires=99999999999999999999", 1))
	f.Add(strings.Replace(valid, "SignedHeaders=host", "SignedHeaders=", 1))
	f.Add("X-Amz-Signature=%zz&X-Amz-Credential=" + accessKey + "/////")
	f.Fuzz(func(t *testing.T, query string) {
		code := ask(t, with(query))
		got, _ := url.ParseQuery(query) // like the store, skip what does not parse
		if len(got["X-Amz-Signature"]) > 1 {
			got["X-Amz-Signature"] = got["X-Amz-Signature"][:1]
		}
		if code != http.StatusForbidden && !reflect.DeepEqual(got, want) {
			t.Fatalf("%d for a query nobody signed: %q", code, query)
		}
	})
}

// Only the header that the account signed opens the object.
func FuzzAuthorizationHeader(f *testing.F) {
	now := time.Now()
	ask := fuzzStore(f, now)
	unsigned := request(f)
	unsigned.Header.Set("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")
	signed := signer.SignV4(*unsigned, accessKey, secretKey, "", "us-east-1").Header
	valid, date := signed.Get("Authorization"), signed.Get("X-Amz-Date")
	with := func(authorization, stamp string) func(*http.Request) {
		return func(r *http.Request) {
			r.Header = signed.Clone()
			r.Header["Authorization"], r.Header["X-Amz-Date"] = []string{authorization}, []string{stamp}
		}
	}
	if code := ask(f, with(valid, date)); code != http.StatusOK {
		f.Fatalf("the signed header: %d", code)
	}
	f.Add(valid, date)
	f.Add("", "")
	f.Add("Bearer x", date)
	f.Add("AWS4-HMAC-SHA256 Credential="+accessKey+"////, SignedHeaders=host, Signature=", date)
	f.Add(strings.Replace(valid, "SignedHeaders=host;", "SignedHeaders=host;;", 1), date)
	f.Add(strings.ReplaceAll(valid, "=", ""), date)
	f.Add(valid, now.UTC().Add(time.Minute).Format("20060102T150405Z"))
	_, fields, _ := strings.Cut(valid, " ")
	f.Fuzz(func(t *testing.T, authorization, stamp string) {
		if ask(t, with(authorization, stamp)) == http.StatusForbidden {
			return
		}
		for field := range strings.SplitSeq(fields, ", ") {
			if !strings.Contains(authorization, field) || stamp != date {
				t.Fatalf("a header nobody signed opens the object: %q at %q", authorization, stamp)
			}
		}
	})
}
