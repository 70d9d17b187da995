package metadata_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/metadata"
)

func client(t *testing.T, h http.HandlerFunc) *metadata.Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return metadata.At(s.URL)
}

func TestEveryRequestCarriesTheToken(t *testing.T) {
	t.Parallel()
	c := client(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(contract.MetadataHeader) != contract.MetadataToken {
			w.WriteHeader(http.StatusForbidden)
		}
		_, _ = io.WriteString(w, r.Method+" "+r.URL.String())
	})
	got, err := c.Manifest(t.Context())
	if err != nil || string(got) != "GET /v1/manifest" {
		t.Errorf("%q %v", got, err)
	}
	if err := errors.Join(
		c.Status(t.Context(), contract.GuestStatus{}), c.Evidence(t.Context(), "a/b", nil),
		c.PutResult(t.Context(), "x", strings.NewReader("y")), c.PutResultManifest(t.Context(), nil),
	); err != nil {
		t.Error(err)
	}
}

func TestWhatTheHostSendsIsBounded(t *testing.T) {
	t.Parallel()
	endless := client(t, func(w http.ResponseWriter, _ *http.Request) {
		for {
			if _, err := io.WriteString(w, strings.Repeat(" ", 4096)); err != nil {
				return
			}
		}
	})
	_, errManifest := endless.Manifest(t.Context())
	_, errNetwork := endless.Network(t.Context())
	_, _, errChallenge := endless.Challenge(t.Context())
	_, errBoot := endless.Boot(t.Context())
	for _, err := range []error{errManifest, errNetwork, errChallenge, errBoot} {
		if err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%v", err)
		}
	}
}

func TestChallengesAreOneAnswerOrNone(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"id":"1","nonce":"` + strings.Repeat("QUFB", 8) + `"}`: "yes", `{"id":"1","nonce":"QUFB"}`: "error", "": "no", "x": "error",
	} {
		c := client(t, func(w http.ResponseWriter, _ *http.Request) {
			if text == "" {
				w.WriteHeader(http.StatusNoContent)
			}
			_, _ = io.WriteString(w, text)
		})
		_, ok, err := c.Challenge(t.Context())
		got := map[bool]string{true: "yes", false: "no"}[ok]
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

func TestRefusalsAndRedirectsAreErrors(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusForbidden, http.StatusFound, http.StatusConflict} {
		c := client(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(status)
		})
		if _, err := c.Manifest(t.Context()); !errors.Is(err, metadata.ErrRefused) {
			t.Errorf("%d: %v", status, err)
		}
	}
}

func TestTheHostsReasonIsToldAndCut(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]string{
		`{"code":"results.quota","message":"too much","remedy":"r"}`: "results.quota: too much",
		`{"code":"x","message":"` + strings.Repeat("a", 2000) + `"}`: "x: " + strings.Repeat("a", 509),
		`not JSON`: "",
	} {
		c := client(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusUnprocessableEntity)
			_, _ = io.WriteString(w, body)
		})
		var told interface{ Reason() string }
		if err := c.PutResult(t.Context(), "a", strings.NewReader("x")); !errors.As(err, &told) || told.Reason() != want {
			t.Errorf("%.80s: %v", body, err)
		}
	}
}

func TestABusyHostHasNotRefused(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable} {
		c := client(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
		if _, err := c.Manifest(t.Context()); err == nil || errors.Is(err, metadata.ErrRefused) {
			t.Errorf("%d: %v", status, err)
		}
	}
}

func TestNewerHostsMaySayMore(t *testing.T) {
	t.Parallel()
	c := client(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"address":"10.0.0.2/30","new":1}`)
	})
	if f, err := c.Network(t.Context()); err != nil || f.Address != "10.0.0.2/30" {
		t.Errorf("%+v %v", f, err)
	}
}
