package broker_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/broker"
)

// The exchange itself is tested with a broker that answers right in the
// guest's own package; here are brokers that do not.

func talk(t *testing.T, answers map[string]func(http.ResponseWriter)) error {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := answers[strings.TrimPrefix(r.URL.Path, "/kbs/v0/")]; f != nil {
			f(w)
			return
		}
		w.WriteHeader(http.StatusTeapot)
	}))
	t.Cleanup(s.Close)
	c, err := broker.New(s.URL+"/", s.Client().Transport)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Attest(t.Context(), broker.NoGPUs, func(context.Context, [64]byte) (contract.BrokerEvidence, error) {
		return contract.BrokerEvidence{Report: []byte("report")}, nil
	}); err != nil {
		return err
	}
	_, err = c.Resource(t.Context(), contract.Resource{Repository: "a", Type: "b", Tag: "c"})
	return err
}

func say(status int, text string) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, text)
	}
}

func TestTheBrokersReasonReachesTheGuest(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"code":"broker.tcb","message":"TCB too low","remedy":"update"}`: "the key broker refused: TCB too low (broker.tcb)",
		`{"type":"https://errors/policy","detail":"policy denied"}`:       "the key broker refused: policy denied (https://errors/policy)",
		`no JSON`: "the key broker refused with status 401",
		`{"message":"` + strings.Repeat("x", 10000) + `"}`: "the key broker refused: " + strings.Repeat("x", 300) + "… ()",
	} {
		err := talk(t, map[string]func(http.ResponseWriter){"auth": say(200, `{"nonce":"n","extra-params":""}`), "attest": say(401, text)})
		refused, ok := errors.AsType[*contract.Refusal](err)
		if !ok || refused.Code != broker.CodeRefused || refused.Message != want || refused.Remedy == "" {
			t.Errorf("%.80s: %v", text, err)
		}
	}
}

func TestAnswersThatAreNoneAreErrors(t *testing.T) {
	t.Parallel()
	auth, attest := say(200, `{"nonce":"n","extra-params":""}`), say(200, `{"token":"t"}`)
	for name, answers := range map[string]map[string]func(http.ResponseWriter){
		"no challenge":   {"auth": say(200, "x")},
		"no token":       {"auth": auth, "attest": say(200, `{}`)},
		"endless":        {"auth": auth, "attest": say(200, strings.Repeat(" ", 1<<20))},
		"no JWE":         {"auth": auth, "attest": attest, "resource/a/b/c": say(200, "{}")},
		"plain resource": {"auth": auth, "attest": attest, "resource/a/b/c": say(200, `{"protected":"eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIn0","iv":"AAAA","ciphertext":"AA","tag":"AA"}`)},
		"redirect": {"auth": func(w http.ResponseWriter) {
			w.Header().Set("Location", "/kbs/v0/attest")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}, "attest": attest},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := talk(t, answers)
			refused, ok := errors.AsType[*contract.Refusal](err)
			if want := wanted(name); !ok || refused.Code != want || refused.Remedy == "" {
				t.Errorf("%v, want %s", err, want)
			}
		})
	}
}

// wanted is the code of an answer that is none; a redirect is a refusal.
func wanted(name string) string {
	if name == "redirect" {
		return broker.CodeRefused
	}
	return broker.CodeAnswer
}
