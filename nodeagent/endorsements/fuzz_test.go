package endorsements

import (
	"bytes"
	"io/fs"
	"os"
	"testing"
	"time"
)

func FuzzImport(f *testing.F) {
	s := newStock(f)
	f.Add(encodeBundle(f, s.byName(), nil))
	f.Add(encodeBundle(f, map[string][]byte{"Genoa/ark.der": s.authority.ARK.Raw}, nil))
	f.Add([]byte(`{"version":1,"created_at":"2026-11-01T00:00:00Z","documents":[{"name":"../x","sha256":"","data":""}]}`))
	p := offline(f, s.roots, s.now)
	f.Fuzz(func(t *testing.T, raw []byte) {
		documents, err := parseBundle(raw)
		if err != nil {
			return
		}
		look := func(n name) ([]byte, error) { return documents[n], nil }
		for n, data := range documents {
			if again, err := parseName(n.String()); err != nil || again != n {
				t.Errorf("%s is read as %+v: %v", n, again, err)
			}
			// The fuzzer has no key: what holds is what the authority signed.
			if p.cache.check(n, data, look) == nil && !s.signed(data) {
				t.Errorf("%s of %d bytes checks", n, len(data))
			}
		}
	})
}

func (s *stock) signed(data []byte) bool {
	for _, known := range s.documents {
		if bytes.Equal(known, data) {
			return true
		}
	}
	return false
}

func FuzzName(f *testing.F) {
	s := newStock(f)
	for text := range s.byName() {
		f.Add(text)
	}
	f.Add("Turin/vlek/0000000004010101.der")
	f.Fuzz(func(t *testing.T, text string) {
		n, err := parseName(text)
		if err == nil && n.String() != text {
			t.Errorf("%q is read as %s", text, n)
		}
	})
}

func FuzzDocument(f *testing.F) {
	s := newStock(f)
	for n, data := range s.documents {
		f.Add(int(n.kind), false, data)
		f.Add(int(n.kind), true, data)
	}
	p, n := offline(f, s.roots, s.now), namesFor(s.id)
	look := func(o name) ([]byte, error) {
		if data, ok := s.documents[o]; ok {
			return data, nil
		}
		return nil, fs.ErrNotExist
	}
	f.Fuzz(func(t *testing.T, k int, vlek bool, data []byte) {
		doc := n.leaf
		doc.kind, doc.vlek = kind(k%4), vlek && kind(k%4) != kindARK
		err := p.cache.check(doc, data, look)
		if err == nil && !s.signed(data) {
			t.Errorf("%s of %d bytes checks", doc, len(data))
		}
		if err == nil {
			if _, _, err := validity(doc, data); err != nil {
				t.Error(err)
			}
		}
	})
}

func FuzzChain(f *testing.F) {
	s := newStock(f)
	f.Add(chainPEM(s.authority.ASK, s.authority.ARK))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		first, second, err := parseChain(text)
		if err == nil && len(first)+len(second) > len(text) {
			t.Errorf("%d bytes of certificates in %d of text", len(first)+len(second), len(text))
		}
	})
}

func FuzzPace(f *testing.F) {
	f.Add([]byte(`{"not_before":"2026-11-01T00:00:05Z"}`))
	f.Add([]byte(`{"not_before":"9999-12-31T23:59:59Z"}`))
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	p := pace{f.TempDir(), time.Now}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if err := os.WriteFile(p.file(), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if next, err := p.next(now); err == nil && next.After(now.Add(maxPostpone)) {
			t.Errorf("nobody may ask until %s", next)
		}
	})
}

func FuzzRetryAfter(f *testing.F) {
	f.Add("10")
	f.Add("Sun, 01 Nov 2026 00:01:00 GMT")
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, header string) {
		if wait := retryAfter(header, now); wait < paceInterval {
			t.Errorf("%q means %s", header, wait)
		}
	})
}

func FuzzOperatorCRL(f *testing.F) {
	s := newStock(f)
	f.Add(s.documents[namesFor(s.id).crl])
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(t *testing.T, der []byte) {
		if staleCRL(der, s.now.AddDate(0, 2, 0)) == nil && s.signed(der) {
			t.Error("a list that is over counts as current")
		}
	})
}

func BenchmarkEndorsements(b *testing.B) {
	s := newStock(b)
	p := offline(b, s.roots, s.now)
	p.identity = &s.id
	if _, err := p.Import(b.Context(), encodeBundle(b, s.byName(), nil)); err != nil {
		b.Fatal(err)
	}
	b.Run("served", func(b *testing.B) {
		p.current = p.load(s.id)
		for b.Loop() {
			if p.Endorsements().VCEK == nil {
				b.Fatal("nothing is served")
			}
		}
	})
	b.Run("read from disk and checked", func(b *testing.B) {
		for b.Loop() {
			if p.load(s.id).VCEK == nil {
				b.Fatal("nothing is there")
			}
		}
	})
}

func BenchmarkRealChainFromDisk(b *testing.B) {
	documents := realStock(b, "Turin")
	p := offline(b, pinned(b), time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC))
	changes, err := p.Import(b.Context(), encodeBundle(b, documents, nil))
	if err != nil {
		b.Fatal(err)
	}
	leaf, err := parseName(changes[len(changes)-1].Name)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if !p.cache.has(leaf) {
			b.Fatal("nothing is there")
		}
	}
}
