package tenant

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"

	"github.com/confidential-node/agent/firmware/contract"
)

// stored are the keys of all objects in the store.
func (w *world) stored() []string {
	w.t.Helper()
	list, err := w.objects.ListBucket(bucket, &gofakes3.Prefix{}, gofakes3.ListBucketPage{})
	if err != nil {
		w.t.Fatal(err)
	}
	var keys []string
	for _, o := range list.Contents {
		keys = append(keys, o.Key)
	}
	return keys
}

func TestARefusedDeployLeavesNoCiphertext(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	sealedKey := w.file("sealed.key", "")
	raw, err := Keygen(KeyX25519)
	if err != nil {
		t.Fatal(err)
	}
	w.file("sealed.key", string(raw))
	key, err := parseKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	var own strings.Builder
	if _, err := Seal(&own, strings.NewReader("mine"), key.recipient); err != nil {
		t.Fatal(err)
	}
	w.plant("own.age", own.String())
	o := w.options(image)
	o.EncryptionKey = "file://" + sealedKey
	o.Datasets = append(o.Datasets, "own=encrypted://"+bucket+"/own.age")
	refuse := contract.Refuse("control.full", "wait", "no room")
	for name, change := range map[string]func(){
		"the control plane": func() { w.node.fail = refuse },
		"the broker":        func() { w.node.fail, w.profile.Broker.URL = nil, "https://127.0.0.1:1"; w.reopen() },
	} {
		change()
		if _, err := w.tenant.Deploy(t.Context(), o); err == nil {
			t.Fatalf("%s: not refused", name)
		}
		if got := w.stored(); !slices.Equal(got, []string{"own.age"}) {
			t.Errorf("%s: the store holds %v", name, got)
		}
		index, err := w.tenant.state.objectsLocked()
		if err != nil || len(index) != 1 {
			t.Errorf("%s: remembered %v %v", name, index, err)
		}
	}
}

func TestCiphertextThatCannotBeRemovedIsNamed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	w.node.fail = contract.Refuse("control.full", "wait", "no room")
	w.tenant.store = keeps{w.tenant.store}
	_, err := w.tenant.Deploy(t.Context(), w.options(image))
	if code(err) != "control.full" || !strings.Contains(err.Error(), "inputs/records.csv.age, which nobody can open any more") {
		t.Error(err)
	}
	if w.tenant.Known("job") {
		t.Error("the name is still in use")
	}
}

// keeps is a store that removes nothing.
type keeps struct{ ObjectStore }

func (keeps) Remove(context.Context, string, string) error { return errors.New("read-only") }

func TestWaitingOutlastsAnOutageAndEndsOnWhatLasts(t *testing.T) {
	t.Parallel()
	down := fmt.Errorf("%w: connection refused", ErrUnreachable)
	denied := contract.Refuse("control.unauthorized", "use another token", "the token is not known")
	for name, c := range map[string]struct {
		trouble  []error
		evidence error
		later    time.Duration // the clock, per look at it
		code     string
		exit     int
	}{
		"a short outage":       {trouble: []error{down, down}, exit: ExitOK},
		"a long outage":        {trouble: slices.Repeat([]error{down}, 20), later: time.Minute, exit: ExitUnreachable},
		"a refusal":            {trouble: []error{denied}, code: "control.unauthorized", exit: ExitPrecondition},
		"a malformed answer":   {trouble: []error{errors.New("reading the control plane's answer: invalid")}, exit: ExitFailed},
		"evidence denied":      {evidence: denied, code: "control.unauthorized", exit: ExitPrecondition},
		"evidence never comes": {evidence: contract.Refuse("evidence.timeout", "ask again", "no answer"), later: 10 * time.Minute, code: "tenant.evidence-timeout", exit: ExitTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.deploy()
			now := time.Now()
			w.tenant.now = func() time.Time {
				now = now.Add(c.later)
				return now
			}
			w.node.trouble, w.node.evidence = c.trouble, c.evidence
			_, err := w.tenant.WaitRunning(t.Context(), "job")
			if ExitCode(err) != c.exit || (c.code != "" && code(err) != c.code) {
				t.Errorf("exit %d, want %d: %v", ExitCode(err), c.exit, err)
			}
		})
	}
}

// What the tenant's tool meets at its broker, and how a deploy ends.
func TestFaultsOfTheBrokerEndADeployTypedAndLeaveNothing(t *testing.T) {
	t.Parallel()
	answer := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	for name, c := range map[string]struct {
		broker http.HandlerFunc // of a registration
		other  bool             // a certificate of another CA
		gone   bool             // it does not take keys back either
		unsure bool             // it may have taken them
		exit   int
	}{
		"refuses": {broker: answer(http.StatusForbidden, `{"code":"broker.full","message":"full","remedy":"delete"}`), exit: ExitPrecondition},
		"fails":   {broker: answer(http.StatusInternalServerError, "<html>"), unsure: true, exit: ExitFailed},
		"away":    {broker: answer(http.StatusServiceUnavailable, ""), unsure: true, exit: ExitUnreachable},
		"redirects": {broker: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		}, unsure: true, exit: ExitFailed},
		"oversize refusal": {broker: answer(http.StatusForbidden, strings.Repeat(" ", 5<<20)), unsure: true, exit: ExitFailed},
		"cuts for good":    {broker: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, gone: true, exit: ExitUnreachable},
		"cuts":             {broker: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, unsure: true, exit: ExitUnreachable},
		"hangs":            {broker: func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body); <-r.Context().Done() }, unsure: true, exit: ExitTimeout},
		"another's":        {broker: answer(http.StatusNoContent, ""), other: true, exit: ExitUnreachable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			image, _ := w.push(0)
			ca := w.ca(w.broker)
			withdrawn := false
			s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodDelete || c.gone {
					c.broker(w, r)
					return
				}
				withdrawn = true
				w.WriteHeader(http.StatusNoContent)
			}))
			s.TLS = &tls.Config{MinVersion: tls.VersionTLS13}
			s.StartTLS()
			t.Cleanup(s.Close)
			if c.other {
				ca = w.file("other.pem", otherCA(t))
			}
			w.profile.Broker.URL, w.profile.Broker.CAFile = s.URL, ca
			w.reopen()
			ctx, cancel := context.WithCancel(t.Context())
			if c.exit == ExitTimeout {
				ctx, cancel = context.WithTimeout(t.Context(), 3*time.Second)
			}
			defer cancel()
			_, err := w.tenant.Deploy(ctx, w.options(image))
			if ExitCode(err) != c.exit || Remedy(err) == "" {
				t.Errorf("exit %d, want %d: %v", ExitCode(err), c.exit, err)
			}
			if left := len(w.stored()) > 0; w.tenant.Known("job") != c.gone || left != c.gone {
				t.Errorf("left behind: %v", w.stored())
			}
			if withdrawn != c.unsure {
				t.Errorf("keys withdrawn: %v, want %v", withdrawn, c.unsure)
			}
		})
	}
}

// otherCA is a certificate that nothing here has signed with.
func otherCA(t *testing.T) string {
	t.Helper()
	c := certificate(t, newGuestKey(t))
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}))
}
