package outside_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/confidential-node/agent/tests/outside"
)

func TestStoreHonoursPresignedURLsAsS3Does(t *testing.T) {
	t.Parallel()
	now := time.Now()
	store, err := outside.NewStore("access", "secret-key-of-the-store", func() time.Time { return now }, "bucket")
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewTLSServer(store)
	defer server.Close()
	client, err := minio.New(strings.TrimPrefix(server.URL, "https://"), &minio.Options{
		Creds: credentials.NewStaticV4("access", "secret-key-of-the-store", ""), Secure: true, Region: "us-east-1", BucketLookup: minio.BucketLookupPath,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, //nolint:gosec // the test's own server
	})
	if err != nil {
		t.Fatal(err)
	}
	const key = "a folder/in.age"
	if _, err := client.PutObject(t.Context(), "bucket", key, strings.NewReader("sealed"), 6, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	get, err := client.PresignedGetObject(t.Context(), "bucket", key, time.Minute, url.Values{})
	if err != nil {
		t.Fatal(err)
	}
	put, err := client.PresignedPutObject(t.Context(), "bucket", "out", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(method, link, body string) int {
		req, err := http.NewRequestWithContext(context.WithoutCancel(t.Context()), method, link, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := server.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close() //nolint:errcheck // a test
		if got, err := io.ReadAll(resp.Body); err != nil || (method == http.MethodGet && resp.StatusCode == http.StatusOK && string(got) != "sealed") {
			t.Errorf("got %q, %v", got, err)
		}
		return resp.StatusCode
	}
	if code := ask(http.MethodGet, get.String(), ""); code != http.StatusOK {
		t.Errorf("presigned GET: %d", code)
	}
	if code := ask(http.MethodPut, put.String(), "result"); code != http.StatusOK {
		t.Errorf("presigned PUT: %d", code)
	}
	for name, link := range map[string]string{
		"unsigned": server.URL + "/bucket/out", "other object": strings.Replace(put.String(), "/out?", "/other?", 1),
		"other signature": strings.Replace(get.String(), "X-Amz-Signature=", "X-Amz-Signature=0", 1),
		"longer life":     strings.Replace(get.String(), "X-Amz-Expires=60", "X-Amz-Expires=6000", 1),
	} {
		if code := ask(http.MethodGet, link, ""); code != http.StatusForbidden {
			t.Errorf("%s: %d", name, code)
		}
	}
	if code := ask(http.MethodPut, get.String(), "x"); code != http.StatusForbidden {
		t.Errorf("PUT with a URL for GET: %d", code)
	}
	now = now.Add(2 * time.Minute)
	if code := ask(http.MethodGet, get.String(), ""); code != http.StatusForbidden {
		t.Errorf("expired: %d", code)
	}
	objects, err := store.Objects()
	if err != nil || !bytes.Equal(objects["bucket/out"], []byte("result")) || len(outside.Keys(objects)) != 2 {
		t.Errorf("objects %v %v", outside.Keys(objects), err)
	}
}
