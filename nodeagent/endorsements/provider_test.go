package endorsements

import (
	"bytes"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
)

// host is a machine with a running provider.
type host struct {
	k        *fakeKDS
	dir      string
	platform *platform
	// ahead is how far the clock is set ahead of the bubble's: an age is
	// reached without a round for each of its minutes.
	ahead atomic.Int64
	*Provider
}

func (h *host) now() time.Time { return time.Now().Add(time.Duration(h.ahead.Load())) }

// later sets the clock ahead and waits until that was noticed.
func (h *host) later(d time.Duration) {
	h.ahead.Add(int64(d))
	<-time.After(2 * pollInterval)
}

func startHost(t *testing.T, id Identity) *host {
	t.Helper()
	h := &host{k: newFakeKDS(t), dir: t.TempDir(), platform: &platform{id: id}}
	h.start(t)
	return h
}

// start begins a process; the one before ends with the test.
func (h *host) start(t *testing.T) {
	t.Helper()
	h.Provider = h.k.provider(h.dir, func(c *Config) { c.Platform, c.Now = h.platform, h.now })
	done := make(chan error)
	go func() { done <- h.Run(t.Context()) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func (h *host) operator(t *testing.T, files map[string][]byte) {
	t.Helper()
	if err := os.MkdirAll(h.cfg.OperatorDir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(h.cfg.OperatorDir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func codes(findings []*contract.Refusal) (all []string) {
	for _, f := range findings {
		if f.Remedy == "" {
			all = append(all, "no remedy for")
		}
		all = append(all, f.Code)
	}
	return all
}

func wantFindings(t *testing.T, p *Provider, want ...string) {
	t.Helper()
	if got := codes(p.Findings()); !slices.Equal(got, want) {
		t.Errorf("findings %v, want %v", got, want)
	}
}

func equal(a, b contract.Endorsements) bool {
	return bytes.Equal(a.VCEK, b.VCEK) && bytes.Equal(a.ASK, b.ASK) && bytes.Equal(a.ARK, b.ARK) && bytes.Equal(a.CRL, b.CRL)
}

func TestEverythingIsThereBeforeALaunchAsksAndAfterATCBChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		want := contract.Endorsements{VCEK: h.k.chip(id.Identity), ASK: h.k.authority.ASK.Raw, ARK: h.k.authority.ARK.Raw, CRL: h.k.crl}
		<-time.After(pollInterval)
		if !equal(h.Endorsements(), want) {
			t.Fatal("not everything was fetched in advance")
		}
		wantFindings(t, h.Provider)

		id.TCB.Microcode++
		next := h.k.chip(id.Identity)
		h.platform.set(id, nil)
		<-time.After(2 * pollInterval)
		if got := h.Endorsements(); !bytes.Equal(got.VCEK, next) {
			t.Error("the certificate for the new TCB is not served")
		}
		if asked := h.k.asked(); len(asked) != 4 {
			t.Errorf("asked for more than the new VCEK: %+v", asked)
		}
		// Back again, as after a BIOS that was rolled back: from the cache.
		id.TCB.Microcode--
		h.platform.set(id, nil)
		<-time.After(2 * pollInterval)
		if !equal(h.Endorsements(), want) || len(h.k.asked()) != 4 {
			t.Error("what was known before is not served")
		}
		spaced(t, h.k.asked())
	})
}

func TestALaunchNeverWaitsForAMD(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		h.k.breaks(hang(nil))
		synctest.Wait()
		if len(h.k.asked()) != 1 {
			t.Fatal("no request is under way")
		}
		begun := time.Now()
		if e := h.Endorsements(); e.VCEK != nil || time.Since(begun) != 0 {
			t.Errorf("waited %s", time.Since(begun))
		}
		wantFindings(t, h.Provider, "endorsements.vcek-missing")
	})
}

func TestAnOutageIsEnduredWithFewRequestsAndEndsByItself(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		h.k.chip(id.Identity)
		<-time.After(pollInterval)
		before := h.Endorsements()

		h.k.breaks(status(http.StatusServiceUnavailable))
		id.TCB.SNP++
		vcek := h.k.chip(id.Identity)
		h.platform.set(id, nil)
		count := len(h.k.asked())
		<-time.After(2 * time.Hour)
		if n := len(h.k.asked()) - count; n < 5 || n > 8 {
			t.Errorf("%d requests in two hours", n)
		}
		wantFindings(t, h.Provider, "endorsements.vcek-missing", "endorsements.unreachable")
		e := h.Endorsements()
		if e.VCEK != nil || !bytes.Equal(e.ASK, before.ASK) {
			t.Error("a certificate for another TCB is served, or what is right is not")
		}
		h.k.breaks(nil)
		<-time.After(maxBackoff + 2*pollInterval)
		if e := h.Endorsements(); !bytes.Equal(e.VCEK, vcek) {
			t.Error("not fetched after the outage")
		}
		wantFindings(t, h.Provider)
		spaced(t, h.k.asked())
	})
}

// The pause between failures is over with the reason for them.
func TestANewTCBIsTriedAtOnceAfterFailures(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id) // AMD does not know the chip
		<-time.After(35 * time.Minute)
		wantFindings(t, h.Provider, "endorsements.vcek-missing", "endorsements.unknown-chip")
		id.TCB.SNP++
		vcek := h.k.chip(id.Identity)
		h.platform.set(id, nil)
		<-time.After(2 * pollInterval)
		if !bytes.Equal(h.Endorsements().VCEK, vcek) {
			t.Error("still pausing")
		}
	})
}

func TestAnImportIsNoticedByTheRunningAgent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		vcek := h.k.chip(id.Identity)
		elsewhere := h.k.provider(t.TempDir(), nil)
		if _, err := elsewhere.Fetch(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		data, _, err := elsewhere.Export()
		if err != nil {
			t.Fatal(err)
		}
		h.k.breaks(status(http.StatusServiceUnavailable))
		if _, err := h.k.provider(h.dir, nil).Import(t.Context(), data); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * pollInterval)
		if !bytes.Equal(h.Endorsements().VCEK, vcek) {
			t.Error("not served")
		}
		wantFindings(t, h.Provider)
	})
}

func TestARevocationListIsFetchedDailyAndNeverServedStale(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		h.k.chip(id.Identity)
		<-time.After(pollInterval)
		second := h.k.newCRL(h.now(), h.now().AddDate(0, 0, 10))
		first := h.k.crl
		h.k.serveCRL(second)
		h.later(23 * time.Hour)
		if !bytes.Equal(h.Endorsements().CRL, first) {
			t.Error("fetched before a day was over")
		}
		h.later(2 * time.Hour)
		if !bytes.Equal(h.Endorsements().CRL, second) {
			t.Error("not fetched after a day")
		}
		// An older list, replayed by whoever answers, changes nothing.
		h.k.serveCRL(first)
		h.later(25 * time.Hour)
		if !bytes.Equal(h.Endorsements().CRL, second) {
			t.Error("a newer list was replaced by an older one")
		}
		wantFindings(t, h.Provider)
		h.k.breaks(status(http.StatusServiceUnavailable))
		h.later(5 * 24 * time.Hour)
		if !bytes.Equal(h.Endorsements().CRL, second) {
			t.Error("a list that is still current is not served")
		}
		h.later(5 * 24 * time.Hour)
		if e := h.Endorsements(); e.CRL != nil || e.VCEK == nil {
			t.Error("a stale list is served, or the certificate with it gone")
		}
		wantFindings(t, h.Provider, "endorsements.stale-crl", "endorsements.unreachable")
	})
}

func TestAShortLivedRevocationListIsFetchedAtHalfItsLife(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		h.k.chip(id.Identity)
		h.k.serveCRL(h.k.newCRL(time.Now(), time.Now().Add(4*time.Hour)))
		<-time.After(pollInterval)
		h.later(time.Hour)
		next := h.k.newCRL(h.now(), h.now().Add(4*time.Hour))
		h.k.serveCRL(next)
		h.later(90 * time.Minute)
		if !bytes.Equal(h.Endorsements().CRL, next) {
			t.Error("not fetched in time")
		}
	})
}

func TestARevokedIntermediateIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		h.k.chip(id.Identity)
		h.k.serveCRL(h.k.newCRL(time.Now(), time.Now().AddDate(0, 1, 0), h.k.authority.ASK))
		<-time.After(pollInterval)
		wantFindings(t, h.Provider, "endorsements.revoked")
	})
}

func TestTheOperatorsFilesWin(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		h.k.chip(id.Identity)
		<-time.After(pollInterval)
		fetched := h.Endorsements()
		own := contract.Endorsements{VCEK: h.k.chip(id.Identity), ASK: fetched.ASK, ARK: fetched.ARK}
		h.operator(t, map[string][]byte{"vcek.der": own.VCEK, "ask.der": own.ASK, "ark.der": own.ARK})
		own.CRL = fetched.CRL
		if !equal(h.Endorsements(), own) {
			t.Error("the operator's certificates are not served")
		}
		wantFindings(t, h.Provider)
		h.operator(t, map[string][]byte{"ark.der": own.ASK})
		wantFindings(t, h.Provider, "endorsements.operator-mismatch")
		h.operator(t, map[string][]byte{"ark.der": own.ARK})
		own.CRL = h.k.newCRL(time.Now(), time.Now().Add(48*time.Hour))
		h.operator(t, map[string][]byte{"crl.der": own.CRL})
		if !equal(h.Endorsements(), own) {
			t.Error("the operator's list is not served")
		}
		h.later(49 * time.Hour)
		if h.Endorsements().CRL != nil {
			t.Error("the operator's stale list is served")
		}
		wantFindings(t, h.Provider, "endorsements.stale-crl")
		h.operator(t, map[string][]byte{"crl.der": []byte("x")})
		if h.Endorsements().CRL != nil {
			t.Error("something is served as a list")
		}
		wantFindings(t, h.Provider, "endorsements.bad-crl")

		// A TCB change that the operator forgot is told, and nothing is asked
		// in their place.
		if err := os.Remove(filepath.Join(h.cfg.OperatorDir, "crl.der")); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * pollInterval)
		count := len(h.k.asked())
		id.TCB.SNP++
		h.platform.set(id, nil)
		<-time.After(2 * pollInterval)
		if !bytes.Equal(h.Endorsements().VCEK, own.VCEK) || len(h.k.asked()) != count {
			t.Error("the operator's file does not win")
		}
		wantFindings(t, h.Provider, "endorsements.operator-mismatch")
	})
}

func TestACRLOfAnotherRootIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		h.k.chip(id.Identity)
		<-time.After(pollInterval)
		h.operator(t, map[string][]byte{"crl.der": newFakeKDS(t).crl})
		wantFindings(t, h.Provider, "endorsements.bad-crl")
	})
}

func TestAFileThatCannotBeReadIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := startHost(t, genoa(t))
		h.operator(t, map[string][]byte{"vcek.der": make([]byte, maxDocument+1)})
		if h.Endorsements().VCEK != nil || !slices.Contains(codes(h.Findings()), "endorsements.operator-file") {
			t.Errorf("findings %v", codes(h.Findings()))
		}
	})
}

// Emulated hosts have the operator's folder and nothing else: no finding, no
// request, roots that are not AMD's.
func TestWithoutAPlatformTheOperatorsFolderIsAllThereIs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := &host{k: newFakeKDS(t), dir: t.TempDir()}
		h.Provider = h.k.provider(h.dir, nil)
		chain, err := snptest.NewChain(snptest.ProductEmulated, contract.TCB{SNP: 1}, make([]byte, 64), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- h.Run(t.Context()) }()
		t.Cleanup(func() {
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		if !equal(h.Endorsements(), contract.Endorsements{}) {
			t.Error("something is served")
		}
		h.operator(t, map[string][]byte{"vcek.der": chain.VCEK, "ask.der": chain.ASK, "ark.der": chain.ARK, "root.pem": []byte("ignored")})
		<-time.After(pollInterval)
		if !equal(h.Endorsements(), chain.Endorsements) || len(h.k.asked()) != 0 {
			t.Error("the folder is not served as it is")
		}
		wantFindings(t, h.Provider)
	})
}

func TestAPlatformThatDoesNotAnswerIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := startHost(t, id)
		vcek := h.k.chip(id.Identity)
		<-time.After(pollInterval)
		h.platform.set(Identity{}, errors.New("no such device"))
		<-time.After(2 * pollInterval)
		wantFindings(t, h.Provider, "endorsements.no-platform")
		if !bytes.Equal(h.Endorsements().VCEK, vcek) {
			t.Error("what is known is no longer served")
		}
	})
}

func TestAVLEKIsTheOperatorsToLoad(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		id.VLEK = true
		h := startHost(t, id)
		<-time.After(pollInterval)
		wantFindings(t, h.Provider, "endorsements.vlek-missing")
		if e := h.Endorsements(); e.VCEK != nil || !bytes.Equal(e.ASK, h.k.authority.ASVK.Raw) || e.CRL == nil {
			t.Error("the chain of VLEKs was not fetched")
		}
		for _, r := range h.k.asked() {
			if r.target != "/vlek/v1/Genoa/cert_chain" && r.target != "/vlek/v1/Genoa/crl" {
				t.Errorf("asked for %s", r.target)
			}
		}
		vlek, _, err := h.k.authority.VLEK(snp.ProductGenoa, "CN=csp.example", id.TCB)
		if err != nil {
			t.Fatal(err)
		}
		chain := chainPEM(h.k.authority.ASVK, h.k.authority.ARK)
		if _, err := h.ImportVLEK(t.Context(), vlek.Raw, chainPEM(h.k.authority.ASK, h.k.authority.ARK)); codeOf(err) != "endorsements.import-refused" {
			t.Errorf("a VLEK under the VCEKs' intermediate: %v", err)
		}
		if _, err := h.ImportVLEK(t.Context(), h.k.chip(id.Identity), chain); codeOf(err) != "endorsements.import-refused" {
			t.Errorf("a VCEK as VLEK: %v", err)
		}
		if _, err := h.ImportVLEK(t.Context(), []byte("x"), chain); codeOf(err) != "endorsements.bad-vlek" {
			t.Errorf("no certificate: %v", err)
		}
		if _, err := h.ImportVLEK(t.Context(), vlek.Raw, []byte("x")); codeOf(err) != "endorsements.bad-chain" {
			t.Errorf("no chain: %v", err)
		}
		if _, err := h.ImportVLEK(t.Context(), vlek.Raw, chain); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * pollInterval)
		if !bytes.Equal(h.Endorsements().VCEK, vlek.Raw) {
			t.Error("the VLEK is not served")
		}
		wantFindings(t, h.Provider)
		// A VLEK is valid for a year.
		h.later(366 * 24 * time.Hour)
		if h.Endorsements().VCEK != nil {
			t.Error("an expired VLEK is served")
		}
	})
}

func TestStatusTellsWhatIsThereAndWhatIsMissing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		id := genoa(t)
		h := &host{k: newFakeKDS(t), dir: t.TempDir(), platform: &platform{id: id}}
		h.Provider = h.k.provider(h.dir, func(c *Config) { c.Platform = h.platform })
		s, err := h.Status(t.Context())
		if err != nil || s.Source != "none" || len(s.Documents) != 0 || !slices.Equal(codes(s.Findings), []string{"endorsements.vcek-missing"}) {
			t.Errorf("%v %+v", err, s)
		}
		h.k.chip(id.Identity)
		h.k.serveCRL(h.k.newCRL(time.Now(), time.Now().AddDate(0, 0, 1)))
		if _, err := h.Fetch(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		s, err = h.Status(t.Context())
		if err != nil || s.Source != "cache" || len(s.Documents) != 4 || len(s.Findings) != 0 || s.Platform == nil || s.Platform.TCB != id.TCB {
			t.Errorf("%v %+v", err, s)
		}
		if wait := time.Until(s.MayAskAt); wait != paceInterval {
			t.Errorf("may ask in %s", wait)
		}
		stranger := filepath.Join(h.dir, "documents", "Genoa", "note.txt")
		if err := os.WriteFile(stranger, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(h.cache.path(namesFor(id).leaf), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		<-time.After(48 * time.Hour)
		s, err = h.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		byName := map[string]Document{}
		for _, d := range s.Documents {
			byName[d.Name] = d
		}
		if !byName["Genoa/vcek/crl.der"].Stale || byName[namesFor(id).leaf.String()].Problem == "" || byName["Genoa/note.txt"].Problem == "" || byName["Genoa/vcek/ask.der"].Problem != "" {
			t.Errorf("%+v", s.Documents)
		}
		if want := []string{"endorsements.vcek-missing", "endorsements.stale-crl"}; !slices.Equal(codes(s.Findings), want) {
			t.Errorf("findings %v, want %v", codes(s.Findings), want)
		}
	})
}
