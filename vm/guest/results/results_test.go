package results_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/results"
)

// node takes results, after refusing the first few.
type node struct {
	refuse int
	got    map[string][]byte
}

func (n *node) PutResult(_ context.Context, name string, r io.Reader) error {
	if n.refuse > 0 {
		n.refuse--
		// As a server does that stops reading in the middle.
		_, err := io.CopyN(io.Discard, r, 10)
		return errors.Join(err, errors.New("busy"))
	}
	data, err := io.ReadAll(r)
	n.got[name] = data
	return err
}

func (n *node) PutResultManifest(_ context.Context, signed []byte) error {
	n.got[contract.ResultsManifestName] = signed
	return nil
}

type job struct {
	dir      string
	manifest *contract.Manifest
	identity *age.X25519Identity
	public   ed25519.PublicKey
	key      ed25519.PrivateKey
}

func newJob(t *testing.T, names ...string) *job {
	t.Helper()
	j := &job{dir: t.TempDir(), manifest: &contract.Manifest{LaunchID: strings.Repeat("ab", 16)}}
	var err error
	if j.identity, err = age.GenerateX25519Identity(); err != nil {
		t.Fatal(err)
	}
	if j.public, j.key, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		j.manifest.Results = append(j.manifest.Results, contract.Result{Name: n, Recipients: []string{j.identity.Recipient().String()}})
	}
	return j
}

func (j *job) deliver(ctx context.Context, n *node) error {
	n.got = map[string][]byte{}
	return results.Deliver(ctx, n, j.dir, j.manifest, 3, j.key)
}

func TestResultsAreSealedListedAndSigned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJob(t, "a", "missing", "link", "folder", "empty")
		if err := errors.Join(
			os.WriteFile(filepath.Join(j.dir, "a"), bytes.Repeat([]byte("result"), 1<<16), 0o600),
			os.WriteFile(filepath.Join(j.dir, "empty"), nil, 0o600),
			os.WriteFile(filepath.Join(j.dir, "unlisted"), []byte("x"), 0o600),
			os.Symlink("/etc/passwd", filepath.Join(j.dir, "link")),
			os.Mkdir(filepath.Join(j.dir, "folder"), 0o700),
		); err != nil {
			t.Fatal(err)
		}
		n := &node{refuse: 2}
		if err := j.deliver(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		list, err := contract.OpenResults(n.got[contract.ResultsManifestName], j.public)
		if err != nil {
			t.Fatal(err)
		}
		if list.ExitCode != 3 || list.LaunchID != j.manifest.LaunchID || len(list.Results) != 2 || len(n.got) != 3 {
			t.Errorf("%+v, sent %d objects", list, len(n.got))
		}
		for i, want := range []string{strings.Repeat("result", 1<<16), ""} {
			e := list.Results[i]
			sum := sha256.Sum256(n.got[e.Name])
			if e.SHA256 != hex.EncodeToString(sum[:]) || e.Size != int64(len(n.got[e.Name])) {
				t.Errorf("%+v is not what was sent", e)
			}
			r, err := age.Decrypt(bytes.NewReader(n.got[e.Name]), j.identity)
			if err != nil {
				t.Fatal(err)
			}
			if plain, err := io.ReadAll(r); err != nil || string(plain) != want {
				t.Errorf("%s: %d bytes, %v", e.Name, len(plain), err)
			}
		}
	})
}

func TestANodeThatNeverTakesResultsIsNamed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJob(t, "a")
		if err := os.WriteFile(filepath.Join(j.dir, "a"), []byte("result of some length"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := j.deliver(t.Context(), &node{refuse: 100})
		if refused, ok := errors.AsType[*contract.Refusal](err); !ok || refused.Code != "guest.results-undelivered" {
			t.Errorf("%v", err)
		}
	})
}

func TestRecipientsMustBeAges(t *testing.T) {
	t.Parallel()
	for _, recipient := range []string{"", "nobody", "ssh-ed25519 AAAA", "# comment", "age1qqqq"} {
		_, err := results.Recipients([]contract.Result{{Name: "a", Recipients: []string{recipient}}})
		if refused, ok := errors.AsType[*contract.Refusal](err); !ok || refused.Code != "guest.recipient-malformed" {
			t.Errorf("%q: %v", recipient, err)
		}
	}
}
