package endorsements

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/tests/skip"
)

// offline is a provider that trusts an authority and asks nobody.
func offline(tb testing.TB, roots map[string]*x509.Certificate, now time.Time) *Provider {
	tb.Helper()
	dir := tb.TempDir()
	p, err := New(Config{
		Dir: filepath.Join(dir, "cache"), OperatorDir: filepath.Join(dir, "operator"), Roots: roots,
		Now: func() time.Time { return now }, Logger: hclog.NewNullLogger(),
	})
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// stock is everything about one chip of an authority of its own.
type stock struct {
	authority *snptest.Authority
	id        Identity
	documents map[name][]byte
	roots     map[string]*x509.Certificate
	now       time.Time
}

func newStock(tb testing.TB) *stock {
	tb.Helper()
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	authority, err := snptest.NewAuthority(now)
	if err != nil {
		tb.Fatal(err)
	}
	id, err := snp.NewIdentity(snp.ProductGenoa, bytes.Repeat([]byte{0xC1}, 64), contract.TCB{BootLoader: 10, SNP: 27, Microcode: 86})
	if err != nil {
		tb.Fatal(err)
	}
	vcek, _, err := authority.VCEK(snp.ProductGenoa, id.TCB, id.HWID)
	if err != nil {
		tb.Fatal(err)
	}
	crl, err := authority.CRL(now, now.AddDate(0, 1, 0))
	if err != nil {
		tb.Fatal(err)
	}
	s := &stock{authority: authority, id: Identity{Identity: id}, now: now, roots: map[string]*x509.Certificate{snp.ProductGenoa: authority.ARK}}
	n := namesFor(s.id)
	s.documents = map[name][]byte{n.ark: authority.ARK.Raw, n.intermediate: authority.ASK.Raw, n.leaf: vcek.Raw, n.crl: crl}
	return s
}

// bundle encodes documents, sorted by name.
func encodeBundle(tb testing.TB, documents map[string][]byte, change func(*bundle)) []byte {
	tb.Helper()
	b := bundle{Version: bundleVersion}
	for text, data := range documents {
		sum := sha256.Sum256(data)
		b.Documents = append(b.Documents, bundleEntry{text, hex.EncodeToString(sum[:]), data})
	}
	slices.SortFunc(b.Documents, func(x, y bundleEntry) int { return strings.Compare(x.Name, y.Name) })
	if change != nil {
		change(&b)
	}
	raw, err := json.Marshal(b)
	if err != nil {
		tb.Fatal(err)
	}
	return raw
}

func (s *stock) byName() map[string][]byte {
	all := map[string][]byte{}
	for n, data := range s.documents {
		all[n.String()] = data
	}
	return all
}

func TestABundleCarriesACacheToAnotherHost(t *testing.T) {
	t.Parallel()
	s := newStock(t)
	from, to := offline(t, s.roots, s.now), offline(t, s.roots, s.now)
	if _, err := from.Import(t.Context(), encodeBundle(t, s.byName(), nil)); err != nil {
		t.Fatal(err)
	}
	n := namesFor(s.id)
	if err := os.WriteFile(filepath.Join(from.cfg.Dir, "documents", "Genoa", "stranger"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	raw, exported, err := from.Export()
	if err != nil || len(exported) != 5 || exported[0].Result != resultLeftOut || exported[0].Name != "Genoa/stranger" {
		t.Fatalf("%v %+v", err, exported)
	}
	changes, err := to.Import(t.Context(), raw)
	want := []string{"imported " + n.ark.String(), "imported " + n.intermediate.String(), "imported " + n.crl.String(), "imported " + n.leaf.String()}
	slices.Sort(want)
	if err != nil || !slices.Equal(results(changes), want) {
		t.Errorf("%v %v", err, results(changes))
	}
	if e := to.load(s.id); !bytes.Equal(e.VCEK, s.documents[n.leaf]) || !bytes.Equal(e.CRL, s.documents[n.crl]) || !bytes.Equal(e.ASK, s.documents[n.intermediate]) || !bytes.Equal(e.ARK, s.documents[n.ark]) {
		t.Error("something did not arrive")
	}
	changes, err = to.Import(t.Context(), raw)
	if err != nil || slices.ContainsFunc(changes, func(c Change) bool { return c.Result != resultKept }) {
		t.Errorf("the second time: %v %v", err, results(changes))
	}
	// What goes bad in a cache is left out, and does not stop the rest.
	if err := os.WriteFile(from.cache.path(n.leaf), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, exported, err = from.Export()
	if err != nil || exported[4].Result != resultLeftOut || exported[4].Why == "" || exported[3].Result != resultExported {
		t.Errorf("%v %+v", err, exported)
	}
}

func TestABundleThatDoesNotCheckLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	s, other := newStock(t), newStock(t)
	n := namesFor(s.id)
	for name, c := range map[string]struct {
		documents func(map[string][]byte)
		bundle    func(*bundle)
		raw       func([]byte) []byte
		code, why string
	}{
		"no JSON":              {raw: func([]byte) []byte { return []byte("x") }, code: "endorsements.bad-bundle"},
		"cut":                  {raw: func(b []byte) []byte { return b[:len(b)-1] }, code: "endorsements.bad-bundle"},
		"something after":      {raw: func(b []byte) []byte { return append(b, '1') }, code: "endorsements.bad-bundle"},
		"too large":            {raw: func(b []byte) []byte { return append(b, make([]byte, MaxBundle)...) }, code: "endorsements.bad-bundle", why: "limit"},
		"unknown field":        {raw: func(b []byte) []byte { return bytes.Replace(b, []byte(`"version"`), []byte(`"x":1,"version"`), 1) }, code: "endorsements.bad-bundle", why: `"x"`},
		"newer version":        {bundle: func(b *bundle) { b.Version++ }, code: "endorsements.bad-bundle", why: "version 2"},
		"nothing in it":        {bundle: func(b *bundle) { b.Documents = nil }, code: "endorsements.bad-bundle", why: "0 documents"},
		"twice the same":       {bundle: func(b *bundle) { b.Documents = append(b.Documents, b.Documents[0]) }, code: "endorsements.bad-bundle", why: "Genoa/ark.der is there twice"},
		"changed on the way":   {bundle: func(b *bundle) { b.Documents[1].Data[7] ^= 1 }, code: "endorsements.bad-bundle", why: "Genoa/vcek/ask.der does not have its digest"},
		"a stranger":           {documents: func(d map[string][]byte) { d["Genoa/notes.txt"] = []byte("x") }, code: "endorsements.bad-bundle", why: `"Genoa/notes.txt"`},
		"out of the folder":    {documents: func(d map[string][]byte) { d["../../etc/passwd"] = []byte("x") }, code: "endorsements.bad-bundle", why: `"../../etc/passwd"`},
		"another product":      {documents: func(d map[string][]byte) { d["Naples/ark.der"] = []byte("x") }, code: "endorsements.bad-bundle", why: `"Naples/ark.der"`},
		"another root":         {documents: func(d map[string][]byte) { d[n.ark.String()] = other.authority.ARK.Raw }, code: "endorsements.import-refused", why: "Genoa/ark.der"},
		"another intermediate": {documents: func(d map[string][]byte) { d[n.intermediate.String()] = other.authority.ASK.Raw }, code: "endorsements.import-refused", why: "ask.der"},
		"another list":         {documents: func(d map[string][]byte) { d[n.crl.String()] = other.documents[namesFor(other.id).crl] }, code: "endorsements.import-refused", why: "crl.der"},
		"another chip":         {documents: func(d map[string][]byte) { d[strings.ReplaceAll(n.leaf.String(), "c1", "c2")] = d[n.leaf.String()] }, code: "endorsements.import-refused", why: "c2c2"},
		"another TCB": {documents: func(d map[string][]byte) {
			d[strings.Replace(n.leaf.String(), "0a.der", "0b.der", 1)] = d[n.leaf.String()]
		}, code: "endorsements.import-refused", why: "0b.der"},
		"no issuer": {documents: func(d map[string][]byte) { delete(d, n.intermediate.String()) }, code: "endorsements.import-refused", why: "issuer"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			documents := s.byName()
			for text, data := range documents {
				documents[text] = bytes.Clone(data)
			}
			if c.documents != nil {
				c.documents(documents)
			}
			raw := encodeBundle(t, documents, c.bundle)
			if c.raw != nil {
				raw = c.raw(raw)
			}
			p := offline(t, s.roots, s.now)
			_, err := p.Import(t.Context(), raw)
			if codeOf(err) != c.code || !strings.Contains(err.Error(), c.why) {
				t.Errorf("refused with %q, want %q with %q: %v", codeOf(err), c.code, c.why, err)
			}
			if found, strangers, err := p.cache.list(); err != nil || len(found)+len(strangers) > 0 {
				t.Errorf("%v and %v were imported (%v)", found, strangers, err)
			}
		})
	}
}

func TestAListFromTheFutureIsRefused(t *testing.T) {
	t.Parallel()
	s := newStock(t)
	crl, err := s.authority.CRL(s.now.Add(clockSkew+time.Minute), s.now.AddDate(0, 1, 0))
	if err != nil {
		t.Fatal(err)
	}
	s.documents[namesFor(s.id).crl] = crl
	if _, err := offline(t, s.roots, s.now).Import(t.Context(), encodeBundle(t, s.byName(), nil)); codeOf(err) != "endorsements.import-refused" {
		t.Errorf("%v", err)
	}
}

// realStock is the published certificates of a processor, which AMD's pinned
// roots must bear out.
func realStock(tb testing.TB, product string) map[string][]byte {
	tb.Helper()
	dir := filepath.Join("..", "..", "..", "shared", "data", "snp-reports")
	read := func(file string) []byte {
		data, err := os.ReadFile(filepath.Join(dir, strings.ToLower(product)+file))
		if err != nil {
			skip.Missing(tb, "real SEV-SNP reports in ../shared/data")
		}
		if block, _ := pem.Decode(data); block != nil {
			return block.Bytes
		}
		return data
	}
	report, err := snp.ParseReport(read(".report.bin"))
	if err != nil {
		tb.Fatal(err)
	}
	line, err := snp.ProductByName(product)
	if err != nil {
		tb.Fatal(err)
	}
	id, err := snp.NewIdentity(product, report.ChipID[:], line.TCB(report.ReportedTCB))
	if err != nil {
		tb.Fatal(err)
	}
	n := namesFor(Identity{Identity: id})
	return map[string][]byte{
		n.ark.String(): read(".ark.pem"), n.intermediate.String(): read(".ask.pem"), n.leaf.String(): read(".vcek.pem"),
	}
}

func TestCertificatesOfRealProcessorsAreKeptUnderTheirReportsChipAndTCB(t *testing.T) {
	t.Parallel()
	roots := pinned(t)
	for _, product := range []string{snp.ProductMilan, snp.ProductGenoa, snp.ProductTurin} {
		t.Run(product, func(t *testing.T) {
			t.Parallel()
			documents := realStock(t, product)
			p := offline(t, roots, time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC))
			if changes, err := p.Import(t.Context(), encodeBundle(t, documents, nil)); err != nil || len(changes) != 3 {
				t.Fatalf("%v %v", err, results(changes))
			}
			for text, data := range documents {
				n, err := parseName(text)
				if err != nil {
					t.Fatal(err)
				}
				for i := 0; i < len(data); i += 7 {
					flipped := bytes.Clone(data)
					flipped[i] ^= 1 << (i % 8)
					if err := p.cache.check(n, flipped, p.cache.raw); err == nil {
						t.Errorf("%s: bit %d of byte %d may be flipped", text, i%8, i)
					}
				}
			}
		})
	}
}

func pinned(tb testing.TB) map[string]*x509.Certificate {
	tb.Helper()
	roots, err := snp.PinnedRoots()
	if err != nil || len(roots) != 3 {
		tb.Fatalf("%v %v", roots, err)
	}
	return roots
}

func TestNamesHaveOneSpelling(t *testing.T) {
	t.Parallel()
	s := newStock(t)
	vlek := Identity{Identity: s.id.Identity, VLEK: true}
	for _, id := range []Identity{s.id, vlek} {
		n := namesFor(id)
		for _, want := range []name{n.ark, n.intermediate, n.crl, n.leaf} {
			if got, err := parseName(want.String()); err != nil || got != want {
				t.Errorf("%s is read as %+v: %v", want, got, err)
			}
		}
	}
	chip, tcb := strings.Repeat("c1", 64), "/541700000000000a.der"
	for _, bad := range []string{
		"", "/", "Genoa", "Genoa/", "genoa/ark.der", "Genoa/ask.der", "Genoa/vcek/ark.der", "Genoa/vlek", "Genoa//ark.der", "./Genoa/ark.der",
		"Genoa/xcek/ask.der", "Genoa/vcek/ask.pem", "Genoa/vcek" + tcb, "Genoa/vlek/" + chip + tcb, "Genoa/vcek/" + chip + "/x" + tcb,
		"Genoa/vcek/" + strings.ToUpper(chip) + tcb, "Genoa/vcek/" + chip + "/541700000000000A.der", "Genoa/vcek/" + chip + "/41700000000000a.der",
		"Genoa/vcek/" + chip + "/541700000001000a.der", "Genoa/vcek/" + chip[2:] + tcb, "Genoa/vcek/" + strings.Repeat("00", 64) + tcb,
		"Turin/vcek/" + chip + tcb, "Genoa/vcek/" + chip[:16] + tcb, "Genoa/vlek/+41700000000000a.der",
	} {
		if n, err := parseName(bad); err == nil {
			t.Errorf("%q is read as %+v", bad, n)
		}
	}
}
