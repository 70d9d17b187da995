package endorsements

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

const (
	// pollInterval is how often the platform is asked for its TCB and the
	// cache is read, so that a firmware update and an import are noticed.
	pollInterval = time.Minute
	// roundTimeout bounds one round of requests: three with their pauses, and
	// room for a few 429s.
	roundTimeout = 2 * time.Minute
	// Pauses between rounds that failed.
	firstBackoff, maxBackoff = time.Minute, time.Hour
)

// Identity is what the platform's reports are signed for.
type Identity struct {
	snp.Identity
	// VLEK says that the firmware signs with a cloud provider's key.
	VLEK bool
}

func (id Identity) equal(o Identity) bool { return namesFor(id) == namesFor(o) }

// Platform tells the identity of this machine at the moment. The TCB changes
// with firmware and microcode.
type Platform interface {
	Identity(ctx context.Context) (Identity, error)
}

// Config of a Provider.
type Config struct {
	// Dir is the cache.
	Dir string
	// OperatorDir may hold vcek.der, ask.der, ark.der and crl.der, which win.
	OperatorDir string
	// KeyService is the https URL of AMD's service or a mirror of it; "" never
	// asks.
	KeyService string
	// Roots are the ARKs by product line; snp.PinnedRoots outside tests.
	Roots map[string]*x509.Certificate
	// Platform is nil where there is none to ask: then the operator's files
	// are all that is served.
	Platform Platform
	// Transport to the key service; nil trusts the system's roots.
	Transport http.RoundTripper
	// Now is the clock that certificates are judged by, the key service's own
	// included, and that its requests are spaced by.
	Now    func() time.Time
	Logger hclog.Logger
}

// Provider serves endorsements from memory and keeps them current.
type Provider struct {
	cfg   Config
	cache *cache
	kds   *kds // nil when it is never asked
	log   hclog.Logger

	mu sync.Mutex
	// identity is nil until the platform has told it; current belongs to it.
	identity *Identity
	current  contract.Endorsements
	// problem is why the last round did not get everything.
	problem *contract.Refusal
}

// New opens the cache and asks nobody.
func New(cfg Config) (*Provider, error) {
	c, err := openCache(cfg.Dir, checker{cfg.Roots, cfg.Now})
	if err != nil {
		return nil, err
	}
	p := &Provider{cfg: cfg, cache: c, log: cfg.Logger.Named("endorsements")}
	if cfg.KeyService != "" {
		if p.kds, err = newKDS(cfg.KeyService, cfg.Transport, pace{cfg.Dir, cfg.Now}); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Endorsements returns what is known at this moment, and never waits for
// anybody. The operator's certificates win as a whole, and their revocation
// list on its own. What is missing stays empty, and so does the place of a
// revocation list that is not current.
func (p *Provider) Endorsements() contract.Endorsements {
	e, _ := p.compose()
	return e
}

// compose also returns what is wrong with what is served.
func (p *Provider) compose() (contract.Endorsements, []*contract.Refusal) {
	operator, findings := readOperator(p.cfg.OperatorDir)
	p.mu.Lock()
	e := p.current
	p.mu.Unlock()
	if operator.CRL != nil {
		e.CRL = operator.CRL
	}
	if operator.VCEK != nil {
		operator.CRL = e.CRL
		e = operator
	}
	if e.CRL == nil {
		return e, findings
	}
	if finding := staleCRL(e.CRL, p.cfg.Now()); finding != nil {
		e.CRL = nil
		findings = append(findings, finding)
	}
	return e, findings
}

func staleCRL(der []byte, now time.Time) *contract.Refusal {
	crl, err := x509.ParseRevocationList(der)
	switch {
	case err != nil:
		return contract.Refuse("endorsements.bad-crl", "replace crl.der in the operator's folder, or remove it", "the revocation list cannot be read and is not served").Because(err)
	case !now.Before(crl.NextUpdate):
		return contract.Refuse("endorsements.stale-crl", "let this host reach AMD's key service, or import a newer one",
			"the revocation list was current until %s and is not served", crl.NextUpdate.UTC().Format(time.RFC3339))
	}
	return nil
}

// Observed reports whether it is known what the platform needs. Where there is
// none to ask, nothing is waited for.
func (p *Provider) Observed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cfg.Platform == nil || p.identity != nil
}

// Findings returns what an operator should know, the worst first: none when
// everything that the platform needs is there and current.
func (p *Provider) Findings() []*contract.Refusal {
	e, findings := p.compose()
	p.mu.Lock()
	id, problem := p.identity, p.problem
	p.mu.Unlock()
	if id != nil {
		findings = append(p.judge(*id, e), findings...)
	}
	if problem != nil {
		findings = append(findings, problem)
	}
	return findings
}

// judge compares what is served with what the platform needs.
func (p *Provider) judge(id Identity, e contract.Endorsements) (findings []*contract.Refusal) {
	n := namesFor(id)
	look := func(o name) ([]byte, error) {
		if o == n.intermediate && e.ASK != nil {
			return e.ASK, nil
		}
		return nil, fs.ErrNotExist
	}
	switch err := p.cache.check(n.leaf, e.VCEK, look); {
	case e.VCEK == nil && id.VLEK:
		findings = append(findings, contract.Refuse("endorsements.vlek-missing", "get it from your cloud provider, then nodeagent endorsements import --vlek FILE --chain FILE",
			"there is no valid VLEK for the TCB that this platform reports; its evidence cannot be verified"))
	case e.VCEK == nil:
		findings = append(findings, contract.Refuse("endorsements.vcek-missing", "let this host reach AMD's key service, or import a bundle",
			"there is no VCEK for the TCB that this platform reports; its evidence cannot be verified"))
	case err != nil || !bytes.Equal(e.ARK, p.cache.roots[id.Product.Name].Raw):
		findings = append(findings, contract.Refuse("endorsements.operator-mismatch", "replace the files in the operator's folder, or remove them all and let the agent fetch its own",
			"vcek.der in %s is served, but does not fit this platform: its evidence cannot be verified", p.cfg.OperatorDir).Because(err))
	}
	if e.CRL == nil {
		return findings
	}
	crl, err := snp.ParseCRL(e.CRL, p.cache.roots[id.Product.Name])
	if err != nil {
		return append(findings, contract.Refuse("endorsements.bad-crl", "replace crl.der in the operator's folder, or remove it", "the revocation list that is served is not one of this platform's root").Because(err))
	}
	if ask, err := x509.ParseCertificate(e.ASK); err == nil && revokes(crl, ask) {
		findings = append(findings, contract.Refuse("endorsements.revoked", "follow AMD's security bulletin for it; until then verifiers refuse this host",
			"AMD has revoked %s, which issued this platform's certificate", ask.Subject.CommonName))
	}
	return findings
}

func revokes(crl *x509.RevocationList, cert *x509.Certificate) bool {
	for _, entry := range crl.RevokedCertificateEntries {
		if entry.SerialNumber.Cmp(cert.SerialNumber) == 0 {
			return true
		}
	}
	return false
}

// observe asks the platform and reads the cache for it.
func (p *Provider) observe(ctx context.Context) (id Identity, changed bool, err error) {
	if id, err = p.cfg.Platform.Identity(ctx); err != nil {
		return id, false, err
	}
	e := p.load(id)
	p.mu.Lock()
	defer p.mu.Unlock()
	changed = p.identity == nil || !p.identity.equal(id)
	p.identity, p.current = &id, e
	return id, changed, nil
}

// load reads what the cache has for an identity. A leaf whose chain is not
// whole is of no use to anybody and stays out.
func (p *Provider) load(id Identity) contract.Endorsements {
	read := func(n name) []byte {
		data, err := p.cache.get(n)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			p.log.Warn("ignored until it is replaced", "err", err)
		}
		return data
	}
	n := namesFor(id)
	e := contract.Endorsements{ASK: read(n.intermediate), ARK: read(n.ark), CRL: read(n.crl)}
	if e.ASK != nil && e.ARK != nil {
		e.VCEK = read(n.leaf)
	}
	return e
}

// Run keeps the cache and what is served current until ctx ends.
func (p *Provider) Run(ctx context.Context) error {
	var b backoff
	said := ""
	for ctx.Err() == nil {
		if p.cfg.Platform != nil {
			p.round(ctx, &b)
		}
		said = p.sayChanges(said)
		select {
		case <-ctx.Done():
		case <-time.After(pollInterval):
		}
	}
	return nil
}

// backoff spaces rounds that failed.
type backoff struct {
	until time.Time
	pause time.Duration
}

func (b *backoff) failed() {
	b.pause = min(max(2*b.pause, firstBackoff), maxBackoff)
	b.until = time.Now().Add(b.pause)
}

// round observes the platform and fetches what is missing for it.
func (p *Provider) round(ctx context.Context, b *backoff) {
	id, changed, err := p.observe(ctx)
	if err != nil {
		p.setProblem(noPlatform(err))
		return
	}
	if changed {
		*b = backoff{}
		p.log.Info("platform identity", "product", id.Product.Name, "tcb", fmt.Sprintf("%+v", id.TCB), "vlek", id.VLEK)
	}
	operator, _ := readOperator(p.cfg.OperatorDir)
	wanted := p.wanted(id, operator)
	if len(wanted) == 0 {
		*b = backoff{}
		p.setProblem(nil)
		return
	}
	if time.Now().Before(b.until) {
		return
	}
	bounded, cancel := context.WithTimeout(ctx, roundTimeout)
	defer cancel()
	for _, n := range wanted {
		if _, err := p.fetchDocument(bounded, id, n); err != nil {
			if ctx.Err() != nil { // told to end, which is no problem
				return
			}
			p.setProblem(contract.AsRefusal(err))
			b.failed()
			return
		}
		e := p.load(id)
		p.mu.Lock()
		p.current = e
		p.mu.Unlock()
	}
	*b = backoff{}
	p.setProblem(nil)
}

// noPlatform keeps what a platform says in a typed way.
func noPlatform(cause error) *contract.Refusal {
	if refusal, ok := errors.AsType[*contract.Refusal](cause); ok {
		return refusal
	}
	return contract.Refuse("endorsements.no-platform", "run as root where /dev/sev is, or name the chip with --product, --chip-id and --tcb",
		"the platform does not tell its product, chip id and TCB").Because(cause)
}

func (p *Provider) setProblem(problem *contract.Refusal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.problem = problem
}

// sayChanges logs the findings when they are others than the last time.
func (p *Provider) sayChanges(said string) string {
	findings := p.Findings()
	var codes []string
	for _, f := range findings {
		codes = append(codes, f.Code)
	}
	now := strings.Join(codes, " ")
	if now == said {
		return now
	}
	for _, f := range findings {
		p.log.Warn(f.Message, "code", f.Code, "remedy", f.Remedy, "err", f.Cause)
	}
	if len(findings) == 0 {
		p.log.Info("endorsements are complete and current")
	}
	return now
}
