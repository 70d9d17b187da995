package endorsements

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
)

func codeOf(err error) string {
	if err == nil {
		return ""
	}
	return contract.AsRefusal(err).Code
}

func results(changes []Change) (all []string) {
	for _, c := range changes {
		all = append(all, c.Result+" "+c.Name)
	}
	slices.Sort(all)
	return all
}

// spaced reports requests that came earlier than ten seconds after the one
// before, or were answered with 429.
func spaced(t *testing.T, requests []request) {
	t.Helper()
	for i, r := range requests {
		if r.code == http.StatusTooManyRequests {
			t.Errorf("request %d for %s was too many", i, r.target)
		}
		if i > 0 && r.at.Sub(requests[i-1].at) < paceInterval {
			t.Errorf("request %d came %s after the one before", i, r.at.Sub(requests[i-1].at))
		}
	}
}

func TestEverythingIsFetchedOnceWithTheRightURLsAndNeverAskedAgain(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		product string
		chip    []byte
		tcb     contract.TCB
		target  string
		file    string
	}{
		{
			snp.ProductMilan, bytes.Repeat([]byte{0xA5}, 64),
			contract.TCB{BootLoader: 4, SNP: 24, Microcode: 219},
			"/vcek/v1/Milan/" + strings.Repeat("a5", 64) + "?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219", "db18000000000004",
		},
		{
			snp.ProductTurin, append([]byte{0x59, 0x79, 0x0f, 0xb1, 0xc3, 0x9f, 0x35, 0xc1}, make([]byte, 56)...),
			contract.TCB{FMC: 1, BootLoader: 1, TEE: 1, SNP: 4, Microcode: 81},
			"/vcek/v1/Turin/59790fb1c39f35c1?fmcSPL=01&blSPL=01&teeSPL=01&snpSPL=04&ucodeSPL=81", "5100000004010101",
		},
	} {
		t.Run(c.product, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				k, dir := newFakeKDS(t), t.TempDir()
				id := identity(t, c.product, c.chip, c.tcb)
				vcek := k.chip(id.Identity)
				changes, err := k.provider(dir, nil).Fetch(t.Context(), id)
				leaf := c.product + "/vcek/" + hex.EncodeToString(id.HWID) + "/" + c.file + ".der"
				names := []string{c.product + "/ark.der", c.product + "/vcek/ask.der", c.product + "/vcek/crl.der", leaf}
				slices.Sort(names)
				if got := strings.Join(results(changes), "\n"); err != nil || got != "fetched "+strings.Join(names, "\nfetched ") {
					t.Fatalf("%v\n%s", err, got)
				}
				asked := k.asked()
				if len(asked) != 3 || asked[0].target != "/vcek/v1/"+c.product+"/cert_chain" || asked[1].target != c.target || asked[2].target != "/vcek/v1/"+c.product+"/crl" {
					t.Errorf("asked %+v", asked)
				}
				spaced(t, asked)
				// The layout of the package comment, to the letter.
				if got, err := os.ReadFile(filepath.Join(dir, "documents", filepath.FromSlash(leaf))); err != nil || !bytes.Equal(got, vcek) {
					t.Errorf("%s does not hold the VCEK: %v", leaf, err)
				}
				// Another process later: certificates are kept for ever.
				<-time.After(23 * time.Hour)
				again, err := k.provider(dir, nil).Fetch(t.Context(), id)
				if got := strings.Join(results(again), "\n"); err != nil || got != "kept "+strings.Join(names, "\nkept ") || len(k.asked()) != 3 {
					t.Errorf("asked again: %v\n%s", err, got)
				}
			})
		})
	}
}

func TestProcessesShareOnePace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k, dir := newFakeKDS(t), t.TempDir()
		var wg sync.WaitGroup
		for i := range 4 {
			id := identity(t, snp.ProductGenoa, bytes.Repeat([]byte{byte(i + 1)}, 64), contract.TCB{SNP: 27})
			k.chip(id.Identity)
			p := k.provider(dir, nil)
			wg.Go(func() {
				if _, err := p.Fetch(t.Context(), id); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		spaced(t, k.asked())
	})
}

func TestTooManyRequestsAreWaitedOutAndRememberedByTheNextProcess(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k, dir := newFakeKDS(t), t.TempDir()
		id := genoa(t)
		k.chip(id.Identity)
		tooMany := func(after string) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Retry-After", after)
				w.WriteHeader(http.StatusTooManyRequests)
			}
		}
		k.scripted(tooMany("45"), tooMany(time.Now().Add(100*time.Second).UTC().Format(http.TimeFormat)), tooMany("soon"), tooMany("-3"))
		if _, err := k.provider(dir, nil).Fetch(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		asked := k.asked()
		for i, least := range []time.Duration{45 * time.Second, 55 * time.Second, paceInterval, paceInterval} {
			if got := asked[i+1].at.Sub(asked[i].at); got < least || got > least+time.Second {
				t.Errorf("after answer %d came a pause of %s, want %s", i, got, least)
			}
		}

		k.scripted(tooMany("600"))
		other := identity(t, snp.ProductGenoa, bytes.Repeat([]byte{2}, 64), contract.TCB{SNP: 27})
		k.chip(other.Identity)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begun := time.Now()
		_, err := k.provider(dir, nil).Fetch(ctx, other)
		if codeOf(err) != "endorsements.rate-limited" || time.Since(begun) > 11*time.Second {
			t.Errorf("after %s: %v", time.Since(begun), err)
		}
		count := len(k.asked())
		if _, err = k.provider(dir, nil).Fetch(ctx, other); codeOf(err) != "endorsements.rate-limited" || len(k.asked()) != count {
			t.Errorf("the next process asked all the same: %v", err)
		}
		if _, err = k.provider(dir, nil).Fetch(t.Context(), other); err != nil {
			t.Errorf("after the pause: %v", err)
		}
	})
}

// Absurd or damaged notes cost one interval, not for ever.
func TestAPaceThatCannotBeTrueIsReplaced(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"far future": `{"not_before":"2900-01-01T00:00:00Z"}`, "damaged": `{"not_before":`, "unknown field": `{"not_before":"2000-01-01T00:00:00Z","x":1}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := pace{t.TempDir(), time.Now}
				if err := os.WriteFile(p.file(), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				begun := time.Now()
				if err := p.take(t.Context()); err != nil || time.Since(begun) != paceInterval {
					t.Errorf("waited %s: %v", time.Since(begun), err)
				}
			})
		})
	}
}

func TestATurnIsOnDiskBeforeTheRequestGoesOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k, dir := newFakeKDS(t), t.TempDir()
		id := genoa(t)
		var next time.Time
		k.scripted(func(w http.ResponseWriter, _ *http.Request) {
			next, _ = pace{dir, time.Now}.next(time.Now())
			w.WriteHeader(http.StatusInternalServerError)
		})
		_, err := k.provider(dir, nil).Fetch(t.Context(), id)
		if wait := time.Until(next); codeOf(err) != "endorsements.unreachable" || wait != paceInterval {
			t.Errorf("the request was under way with the next turn in %s: %v", wait, err)
		}
	})
}

// body answers 200 with bytes of a type.
func body(media string, data []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", media)
		_, _ = w.Write(data)
	}
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

// hang answers with some bytes and then nothing, until the client is gone.
func hang(data []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(data)
		if f, ok := w.(interface{ Unwrap() http.ResponseWriter }); ok && len(data) > 0 {
			_ = http.NewResponseController(f.Unwrap()).Flush()
		}
		<-r.Context().Done()
		panic(http.ErrAbortHandler) // a handler that returns would end the answer properly
	}
}

func (w *codeWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func TestAnAnswerThatIsNotTheChipsCertificateIsRefusedAndNotKept(t *testing.T) {
	t.Parallel()
	type world struct {
		vcek, otherChip, otherTCB, stranger []byte
		authority                           *snptest.Authority
	}
	for name, c := range map[string]struct {
		answer func(w world) http.HandlerFunc
		code   string
	}{
		"HTML page":            {func(world) http.HandlerFunc { return body("text/html; charset=utf-8", []byte("<html>log in</html>")) }, "endorsements.unexpected-answer"},
		"HTML, said certainly": {func(world) http.HandlerFunc { return body("application/octet-stream", []byte("<html>")) }, "endorsements.wrong-certificate"},
		"JSON":                 {func(world) http.HandlerFunc { return body("application/json", []byte("{}")) }, "endorsements.unexpected-answer"},
		"certificate as HTML":  {func(w world) http.HandlerFunc { return body("text/html", w.vcek) }, "endorsements.unexpected-answer"},
		"nothing":              {func(world) http.HandlerFunc { return status(http.StatusOK) }, "endorsements.unexpected-answer"},
		"no content":           {func(world) http.HandlerFunc { return status(http.StatusNoContent) }, "endorsements.unexpected-answer"},
		"redirect": {func(world) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "https://example.com/elsewhere", http.StatusFound)
			}
		}, "endorsements.unexpected-answer"},
		"forbidden":      {func(world) http.HandlerFunc { return status(http.StatusForbidden) }, "endorsements.unexpected-answer"},
		"not found":      {func(world) http.HandlerFunc { return http.NotFound }, "endorsements.unknown-chip"},
		"bad request":    {func(world) http.HandlerFunc { return status(http.StatusBadRequest) }, "endorsements.unknown-chip"},
		"out of order":   {func(world) http.HandlerFunc { return status(http.StatusInternalServerError) }, "endorsements.unreachable"},
		"bad gateway":    {func(world) http.HandlerFunc { return status(http.StatusBadGateway) }, "endorsements.unreachable"},
		"never a header": {func(world) http.HandlerFunc { return hang(nil) }, "endorsements.unreachable"},
		"never an end":   {func(w world) http.HandlerFunc { return hang(w.vcek[:100]) }, "endorsements.unreachable"},
		"connection cut": {func(world) http.HandlerFunc {
			return func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
		}, "endorsements.unreachable"},
		"too large":         {func(world) http.HandlerFunc { return body("", make([]byte, maxDocument+1)) }, "endorsements.unexpected-answer"},
		"headers too large": {func(world) http.HandlerFunc { return hugeHeader }, "endorsements.unreachable"},
		"shorter than told": {func(w world) http.HandlerFunc { return truncated(w.vcek) }, "endorsements.unreachable"},
		"cut":               {func(w world) http.HandlerFunc { return body("", w.vcek[:len(w.vcek)-1]) }, "endorsements.wrong-certificate"},
		"a byte more":       {func(w world) http.HandlerFunc { return body("", append(w.vcek, 0)) }, "endorsements.wrong-certificate"},
		"another chip":      {func(w world) http.HandlerFunc { return body("", w.otherChip) }, "endorsements.wrong-certificate"},
		"another TCB":       {func(w world) http.HandlerFunc { return body("", w.otherTCB) }, "endorsements.wrong-certificate"},
		"another authority": {func(w world) http.HandlerFunc { return body("", w.stranger) }, "endorsements.wrong-certificate"},
		"the ASK":           {func(w world) http.HandlerFunc { return body("", w.authority.ASK.Raw) }, "endorsements.wrong-certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				k, dir := newFakeKDS(t), t.TempDir()
				id := genoa(t)
				w := world{authority: k.authority, vcek: k.chip(id.Identity)}
				other := id.Identity
				other.HWID = bytes.Repeat([]byte{7}, 64)
				w.otherChip = k.chip(other)
				other = id.Identity
				other.TCB.Microcode--
				w.otherTCB = k.chip(other)
				w.stranger = newFakeKDS(t).chip(id.Identity)
				p := k.provider(dir, nil)
				k.scripted(body("", chainPEM(k.authority.ASK, k.authority.ARK)), c.answer(w))
				begun := time.Now()
				_, err := p.Fetch(t.Context(), id)
				if codeOf(err) != c.code || contract.AsRefusal(err).Remedy == "" {
					t.Errorf("refused with %q, want %q: %v", codeOf(err), c.code, err)
				}
				if took := time.Since(begun); took > paceInterval+requestTimeout {
					t.Errorf("took %s", took)
				}
				if _, err := p.cache.raw(namesFor(id).leaf); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("something was kept: %v", err)
				}
				// The right answer is taken afterwards.
				if _, err := p.Fetch(t.Context(), id); err != nil || !p.cache.has(namesFor(id).leaf) {
					t.Errorf("afterwards: %v", err)
				}
			})
		})
	}
}

func hugeHeader(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("X-Huge", strings.Repeat("x", 2<<20))
	w.WriteHeader(http.StatusOK)
}

func truncated(data []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100000")
		_, _ = w.Write(data)
	}
}

func TestAChainThatDoesNotEndInThePinnedRootIsRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		answer func(own, other *snptest.Authority) []byte
		code   string
	}{
		"another root":    {func(_, o *snptest.Authority) []byte { return chainPEM(o.ASK, o.ARK) }, "endorsements.wrong-root"},
		"another ASK":     {func(a, o *snptest.Authority) []byte { return chainPEM(o.ASK, a.ARK) }, "endorsements.wrong-certificate"},
		"the ASVK":        {func(a, _ *snptest.Authority) []byte { return chainPEM(a.ASVK, a.ARK) }, "endorsements.wrong-certificate"},
		"the root as ASK": {func(a, _ *snptest.Authority) []byte { return chainPEM(a.ARK, a.ARK) }, "endorsements.wrong-certificate"},
		"the other way":   {func(a, _ *snptest.Authority) []byte { return chainPEM(a.ARK, a.ASK) }, "endorsements.wrong-root"},
		"only one":        {func(a, _ *snptest.Authority) []byte { return chainPEM(a.ASK) }, "endorsements.unexpected-answer"},
		"three":           {func(a, _ *snptest.Authority) []byte { return chainPEM(a.ASK, a.ARK, a.ARK) }, "endorsements.unexpected-answer"},
		"text after":      {func(a, _ *snptest.Authority) []byte { return append(chainPEM(a.ASK, a.ARK), "x"...) }, "endorsements.unexpected-answer"},
		"a broken one first": {func(a, _ *snptest.Authority) []byte {
			return append([]byte("-----BEGIN CERTIFICATE-----\n"), chainPEM(a.ASK, a.ARK)...)
		}, "endorsements.unexpected-answer"},
		"DER": {func(a, _ *snptest.Authority) []byte { return a.ASK.Raw }, "endorsements.unexpected-answer"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				k := newFakeKDS(t)
				id, p := genoa(t), k.provider(t.TempDir(), nil)
				k.scripted(body("application/x-pem-file", c.answer(k.authority, newFakeKDS(t).authority)))
				if _, err := p.Fetch(t.Context(), id); codeOf(err) != c.code {
					t.Errorf("refused with %q, want %q: %v", codeOf(err), c.code, err)
				}
				if p.cache.has(namesFor(id).intermediate) {
					t.Error("an intermediate was kept")
				}
			})
		})
	}
}

func TestOnlyTLSWithATrustedRootIsSpoken(t *testing.T) {
	t.Parallel()
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	k, err := newKDS(server.URL, nil, pace{t.TempDir(), time.Now})
	if err != nil {
		t.Fatal(err)
	}
	// The system does not know the test server's CA; 404 would mean that it
	// was talked to all the same.
	if _, err := k.crl(t.Context(), snp.ProductGenoa, familyVCEK); codeOf(err) != "endorsements.unreachable" || !errorsIsUnknownAuthority(err) {
		t.Errorf("spoke to a server of an unknown CA: %v", err)
	}
	for _, bad := range []string{"http://kdsintf.amd.com", "kdsintf.amd.com", "https://", "https://u:p@x", "https://x?y", "://"} {
		if _, err := newKDS(bad, nil, pace{t.TempDir(), time.Now}); codeOf(err) != "endorsements.bad-key-service" {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// The key service's certificate is judged at the agent's time; here the host's
// clock has nothing against it.
func TestTheKeyServicesCertificateIsJudgedAtTheAgentsTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newFakeKDS(t)
		late := func() time.Time { return k.server.Certificate().NotAfter.Add(time.Hour) }
		p := k.provider(t.TempDir(), func(c *Config) { c.Now, c.Transport = late, k.transport(late) })
		_, err := p.Fetch(t.Context(), genoa(t))
		var invalid x509.CertificateInvalidError
		if codeOf(err) != "endorsements.unreachable" || !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
			t.Errorf("asked a service whose certificate has ended: %v", err)
		}
		if len(k.asked()) != 0 {
			t.Error("the request went out")
		}
	})
}

func errorsIsUnknownAuthority(err error) bool {
	var unknown x509.UnknownAuthorityError
	return errors.As(err, &unknown)
}

func TestAHostThatNeverAsksSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newFakeKDS(t)
		p := k.provider(t.TempDir(), func(c *Config) { c.KeyService = "" })
		if _, err := p.Fetch(t.Context(), genoa(t)); codeOf(err) != "endorsements.offline" || len(k.asked()) != 0 {
			t.Errorf("%v, asked %v", err, k.asked())
		}
	})
}

func TestADamagedCertificateIsFetchedAnewAndNeverServed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k, dir := newFakeKDS(t), t.TempDir()
		id := genoa(t)
		k.chip(id.Identity)
		p := k.provider(dir, nil)
		if _, err := p.Fetch(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		n, good := namesFor(id), p.load(id)
		for _, damaged := range []name{n.leaf, n.intermediate, n.ark, n.crl} {
			path := p.cache.path(damaged)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			data[len(data)-1] ^= 1
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			if e := p.load(id); equal(e, good) || e.VCEK != nil && damaged != n.crl {
				t.Errorf("damaged %s is served, or a leaf without its chain", damaged)
			}
			if _, err := p.Fetch(t.Context(), id); err != nil || !equal(p.load(id), good) {
				t.Errorf("%s is not fetched anew: %v", damaged, err)
			}
		}
	})
}

func TestACacheOfAnotherVersionIsRefused(t *testing.T) {
	t.Parallel()
	for _, text := range []string{`{"version": 2}`, `{"version": 0}`, `{}`, `x`, `{"version": 1, "x": 1}`} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "version.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openCache(dir, checker{}); codeOf(err) != "endorsements.cache-version" {
			t.Errorf("%s: %v", text, err)
		}
	}
}
