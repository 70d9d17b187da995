package tenant

import (
	"context"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/broker"
)

// attested is the guest of deployment "job", attested to the broker once more,
// as at its first boot or at another.
func (w *world) attested() (*broker.Client, error) {
	w.t.Helper()
	c, err := broker.New(w.broker.URL, w.broker.Client().Transport)
	if err != nil {
		w.t.Fatal(err)
	}
	return c, c.Attest(w.t.Context(), broker.NoGPUs, w.guest().BrokerEvidence)
}

func resource(t *testing.T, c *broker.Client, uri string) (string, error) {
	t.Helper()
	r, err := contract.ParseResource(uri)
	if err != nil {
		t.Fatal(err)
	}
	value, err := c.Resource(t.Context(), r)
	return string(value), err
}

func (w *world) releases() int {
	w.t.Helper()
	s, err := w.tenant.Status(w.t.Context(), "job")
	if err != nil || s.Broker == nil {
		w.t.Fatalf("%+v %v", s, err)
	}
	return len(s.Broker.Releases)
}

const (
	tokenURI = "kbs:///job/env/TOKEN"
	dataURI  = "kbs:///job/age/data"
)

// A running guest keeps what it was given; a later one gets what is new; what
// is withdrawn nobody gets; and none of it gives a launch more releases.
func TestRotationReachesNewGuestsLeavesRunningOnesAndCountsOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	o := w.options(image)
	o.Releases = 3
	first, err := w.tenant.Deploy(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	running, err := w.attested()
	if err != nil {
		t.Fatal(err)
	}
	oldToken, errToken := resource(t, running, tokenURI)
	oldData, errData := resource(t, running, dataURI)
	if errToken != nil || errData != nil || oldToken != "canary-token" || w.releases() != 1 {
		t.Fatalf("%q %v %v, %d releases", oldToken, errToken, errData, w.releases())
	}

	if _, err := w.tenant.RotateResource(t.Context(), tokenURI, []byte("second-token")); err != nil {
		t.Fatal(err)
	}
	if v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{}); err != nil || !v.OK() {
		t.Errorf("the running guest: %v", err)
	}
	later, err := w.attested()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := resource(t, later, tokenURI); err != nil || got != "second-token" || w.releases() != 2 {
		t.Errorf("a later guest got %q %v, %d releases", got, err, w.releases())
	}

	keyFile := filepath.Join(t.TempDir(), "new.key")
	rotated, err := w.tenant.RotateKey(t.Context(), "job", keyFile)
	if err != nil {
		t.Fatal(err)
	}
	// The inputs the running guest was launched with are where they were.
	w.opens(first.Inputs[0], oldData)
	third, err := w.attested()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*broker.Client{"a third guest": third, "the running guest, asking again": running} {
		if got, err := resource(t, c, dataURI); code(err) != broker.CodeRefused || !strings.Contains(err.Error(), "broker.resource-unknown") {
			t.Errorf("%s got the withdrawn key: %d bytes, %v", name, len(got), err)
		}
	}
	if _, err := w.attested(); code(err) != broker.CodeRefused || !strings.Contains(err.Error(), "broker.release-exhausted") || w.releases() != 3 {
		t.Errorf("a fourth boot of three: %v, %d releases", err, w.releases())
	}

	o.Replace, o.Releases, o.EncryptionKey = true, 1, "file://"+keyFile
	o.Datasets = []string{"records.csv=encrypted://" + rotated.Inputs[0].Bucket + "/" + rotated.Inputs[0].Key}
	if _, err := w.tenant.Deploy(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	next, err := w.attested()
	if err != nil {
		t.Fatal(err)
	}
	newData, err := resource(t, next, dataURI)
	if err != nil || newData == oldData || w.releases() != 1 {
		t.Fatalf("%v, %d releases", err, w.releases())
	}
	w.opens(rotated.Inputs[0], newData)
}

// opens checks that the key opens the object in the store.
func (w *world) opens(o DeployedObject, key string) {
	w.t.Helper()
	sealed, _, err := w.tenant.store.Get(context.WithoutCancel(w.t.Context()), o.Bucket, o.Key)
	if err != nil {
		w.t.Fatal(err)
	}
	k, err := parseKey([]byte(key))
	if err != nil {
		w.t.Fatal(err)
	}
	plain, err := age.Decrypt(sealed, k.identity)
	if err != nil {
		w.t.Fatal(err)
	}
	if text, err := io.ReadAll(plain); err != nil || string(text) != plaintext {
		w.t.Errorf("%q %v", text, err)
	}
}
