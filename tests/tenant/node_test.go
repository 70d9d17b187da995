package tenant

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/google/uuid"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/idblock"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/attester"
)

// fakeNode is control plane and node: it keeps commands, starts guests and
// relays; tests make it lie.
type fakeNode struct {
	w        *world
	chain    *snptest.Chain
	host     string
	features map[string]bool

	mu     sync.Mutex
	guests map[string]*fakeGuest
	// fail makes the next Launch fail without an answer.
	fail error
	// trouble meets the next requests for a guest, evidence each for evidence.
	trouble  []error
	evidence error
	// onLaunch is called before each Launch is answered.
	onLaunch func()
	// silent nodes never say what became of a launch; status is what others
	// say, running unless set.
	silent bool
	status api.GuestStatus
	// swap changes a command before the guest is started from it.
	swap func(*api.LaunchGuest)
}

// fakeGuest is a guest that has its keys.
type fakeGuest struct {
	*attester.Guest
	node     *fakeNode
	command  *api.LaunchGuest
	state    Guest
	evidence map[string][]byte
	mute     bool
	// answers to uploads in parts; harm may change what is reported of one.
	answers chan answer
	harm    func(uploadID string, etags []string)
}

func (n *fakeNode) Launch(_ context.Context, node string, l *api.LaunchGuest, features []string) (Launched, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.onLaunch != nil {
		n.onLaunch()
	}
	if n.fail != nil {
		return Launched{}, n.fail
	}
	if node != "" && node != n.host {
		return Launched{}, contract.Refuse("control.node-not-found", "use another", "no node %s", node)
	}
	id := uuid.NewString()
	g := &fakeGuest{node: n, command: l, evidence: map[string][]byte{}, answers: make(chan answer, 10), state: Guest{GuestID: id, Node: n.host, Status: api.GuestStatus_GUEST_STATUS_RUNNING}}
	if n.silent || n.status != api.GuestStatus_GUEST_STATUS_UNSPECIFIED {
		g.state.Status = n.status
	}
	for _, f := range features {
		if !n.features[f] && !slices.Contains(api.Features(), f) {
			g.state.Status, g.state.Refused = api.GuestStatus_GUEST_STATUS_UNSPECIFIED, true
			g.state.Refusal = contract.Refuse(api.CodeFeatureUnknown, "choose a node that has it", "this node lacks %s", f)
		}
	}
	if n.swap != nil {
		n.swap(l)
	}
	var err error
	if g.Guest, err = attester.New(n.chain, l.GetManifest(), l.GetLaunchDigest()); err != nil {
		return Launched{}, err
	}
	m := l.GetMachine()
	g.Policy = snp.Policy(m.GetPolicy())
	if len(l.GetIdBlock()) > 0 {
		if g.IDBlock, err = idblock.Verify(l.GetIdBlock(), l.GetIdAuth()); err != nil {
			return Launched{}, err
		}
	}
	g.Boot = contract.BootComponents{
		FirmwareSHA256: hex.EncodeToString(l.GetImage().GetFirmwareSha256()), VCPUs: int(m.GetVcpus()),
		CPUModel: m.GetCpuModel(), GuestFeatures: m.GetGuestFeatures(),
	}
	n.guests[id] = g
	return Launched{CommandID: uuid.NewString(), GuestID: id, Node: n.host}, nil
}

func (n *fakeNode) get(id string) (*fakeGuest, error) {
	g := n.guests[id]
	if g == nil {
		return nil, contract.Refuse("control.guest-not-found", "check the id", "no guest %s", id)
	}
	return g, nil
}

func (n *fakeNode) Guest(_ context.Context, id string) (*Guest, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.trouble) > 0 {
		err := n.trouble[0]
		n.trouble = n.trouble[1:]
		return nil, err
	}
	g, err := n.get(id)
	if err != nil {
		return nil, err
	}
	state := g.state
	return &state, nil
}

func (n *fakeNode) RequestEvidence(_ context.Context, id string, nonce []byte) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	g, err := n.get(id)
	if err != nil {
		return err
	}
	if n.evidence != nil {
		return n.evidence
	}
	if g.state.ended() {
		return contract.Refuse("guest.not-running", "attest while it runs", "guest %s does not run", id)
	}
	if !g.mute {
		g.evidence[string(nonce)], err = g.answer(nonce)
	}
	return err
}

func (n *fakeNode) Evidence(_ context.Context, id string, nonce []byte) ([]byte, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	g, err := n.get(id)
	if err != nil {
		return nil, err
	}
	return g.evidence[string(nonce)], nil
}

func (n *fakeNode) Stop(_ context.Context, id string, _ time.Duration) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	g, err := n.get(id)
	if err == nil {
		g.state.Status = api.GuestStatus_GUEST_STATUS_STOPPED
	}
	return err
}

// guest returns the guest of deployment "job".
func (w *world) guest() *fakeGuest {
	w.t.Helper()
	d, err := w.tenant.state.load("job")
	if err != nil {
		w.t.Fatal(err)
	}
	w.node.mu.Lock()
	defer w.node.mu.Unlock()
	g, err := w.node.get(d.GuestID)
	if err != nil {
		w.t.Fatal(err)
	}
	return g
}

// answer makes evidence as the attested init does.
func (g *fakeGuest) answer(nonce []byte) ([]byte, error) {
	e, err := g.Evidence(nonce)
	if err != nil {
		return nil, err
	}
	return json.Marshal(e)
}

// finish seals and signs the files as the init does and uploads them through
// the presigned URLs; key signs, normally the guest's own.
func (g *fakeGuest) finish(t *testing.T, files map[string]string, key ed25519.PrivateKey) {
	t.Helper()
	m, err := contract.ParseManifest(g.command.GetManifest())
	if err != nil {
		t.Fatal(err)
	}
	list := &contract.ResultManifest{Version: contract.ResultsVersion, LaunchID: m.LaunchID, Results: []contract.ResultEntry{}}
	for _, r := range m.Results {
		content, ok := files[r.Name]
		if !ok {
			continue
		}
		recipient, err := age.ParseX25519Recipient(r.Recipients[0])
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		sealed, err := Seal(&out, strings.NewReader(content), recipient)
		if err != nil {
			t.Fatal(err)
		}
		list.Results = append(list.Results, contract.ResultEntry{Name: r.Name, SHA256: sealed.SHA256, Size: sealed.Size})
		g.put(t, r.Name, out.Bytes())
	}
	signed, err := contract.SealResults(list, key)
	if err != nil {
		t.Fatal(err)
	}
	g.put(t, contract.ResultsManifestName, signed)
	g.node.mu.Lock()
	g.state.Status = api.GuestStatus_GUEST_STATUS_FINISHED
	g.node.mu.Unlock()
}

func (g *fakeGuest) put(t *testing.T, name string, data []byte) {
	t.Helper()
	for _, u := range g.command.GetResults().GetUploads() {
		if u.GetName() == name && u.GetParts() != nil {
			g.putParts(t, u, data, g.harm)
			return
		}
		if u.GetName() == name {
			g.http(t, http.MethodPut, u.GetPutUrl(), data)
			return
		}
	}
	t.Fatalf("no upload for %s", name)
}

// http uses a presigned URL.
func (g *fakeGuest) http(t *testing.T, method, raw string, body []byte) []byte {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil || u.Query().Get("X-Amz-Signature") == "" || u.Query().Get("X-Amz-Expires") == "" {
		t.Fatalf("not a presigned URL with expiry: %v", err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, raw, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it is read
	out, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %v", method, resp.Status, err)
	}
	return out
}

// certificate is the self-signed one of a TLS key.
func certificate(t *testing.T, key *ecdsa.PrivateKey) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "guest"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func newGuestKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
