package endorsements

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

const (
	// requestTimeout bounds one request, its answer included.
	requestTimeout = 30 * time.Second
	// maxHeaderBytes of an answer.
	maxHeaderBytes = 32 << 10
)

const importInstead = "try again later, or fetch on another machine and carry the certificates over with export and import"

// kds is a client of AMD's key distribution service (AMD 57230).
type kds struct {
	base *url.URL
	http *http.Client
	pace pace
}

// newKDS returns a client of the service at an https URL. A nil transport
// trusts the system's roots.
func newKDS(base string, transport http.RoundTripper, p pace) (*kds, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return nil, contract.Refuse("endorsements.bad-key-service", "write it as https://host, or leave it empty to never ask",
			"key service %q is not an https URL", base)
	}
	if transport == nil {
		transport = systemTransport(p.now)
	}
	client := &http.Client{
		Transport: transport, Timeout: requestTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &kds{base: u, http: client, pace: p}, nil
}

func systemTransport(now func() time.Time) *http.Transport {
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, Time: now}, MaxResponseHeaderBytes: maxHeaderBytes,
		DisableKeepAlives: true, // ten seconds lie between two requests
	}
}

// vcek returns a chip's certificate at a TCB, DER, as it was answered.
func (k *kds) vcek(ctx context.Context, id snp.Identity) ([]byte, error) {
	u := k.base.JoinPath(familyVCEK, "v1", id.Product.Name, hex.EncodeToString(id.HWID))
	u.RawQuery = tcbQuery(id)
	return k.get(ctx, u)
}

// tcbQuery is the reported TCB in two-digit decimals, in AMD's order.
func tcbQuery(id snp.Identity) string {
	query := fmt.Sprintf("blSPL=%02d&teeSPL=%02d&snpSPL=%02d&ucodeSPL=%02d", id.TCB.BootLoader, id.TCB.TEE, id.TCB.SNP, id.TCB.Microcode)
	if id.Product.HasFMC() {
		query = fmt.Sprintf("fmcSPL=%02d&", id.TCB.FMC) + query
	}
	return query
}

// chain returns the intermediate and the root of a product and family, DER.
func (k *kds) chain(ctx context.Context, product, family string) (intermediate, ark []byte, err error) {
	text, err := k.get(ctx, k.base.JoinPath(family, "v1", product, "cert_chain"))
	if err != nil {
		return nil, nil, err
	}
	if intermediate, ark, err = parseChain(text); err != nil {
		return nil, nil, unexpected("the certificate chain of "+product, err)
	}
	return intermediate, ark, nil
}

// crl returns the revocation list of a product and family, DER.
func (k *kds) crl(ctx context.Context, product, family string) ([]byte, error) {
	return k.get(ctx, k.base.JoinPath(family, "v1", product, "crl"))
}

// parseChain decodes exactly two PEM certificates: intermediate, then root.
func parseChain(text []byte) (intermediate, ark []byte, err error) {
	first, rest := pem.Decode(text)
	second, rest := pem.Decode(rest)
	// Decode skips what it does not understand; nothing is skipped here.
	if first == nil || second == nil || len(bytes.TrimSpace(rest)) > 0 || bytes.Count(text, []byte("-----BEGIN CERTIFICATE-----")) != 2 {
		return nil, nil, errors.New("it is not two PEM certificates and nothing else")
	}
	return first.Bytes, second.Bytes, nil
}

// get asks once it is this caller's turn, and again after each 429 until the
// next turn would lie behind the context's deadline.
func (k *kds) get(ctx context.Context, u *url.URL) ([]byte, error) {
	for {
		if err := k.pace.take(ctx); err != nil {
			return nil, err
		}
		body, again, err := k.once(ctx, u)
		if again <= 0 {
			return body, err
		}
		if err := k.pace.postpone(ctx, again); err != nil {
			return nil, err
		}
	}
}

// once makes one request. A positive again is for how long the service does
// not want to be asked.
func (k *kds) once(ctx context.Context, u *url.URL) (body []byte, again time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), http.NoBody)
	if err != nil {
		return nil, 0, fmt.Errorf("asking AMD's key service: %w", err)
	}
	resp, err := k.http.Do(req)
	if err != nil {
		return nil, 0, k.unreachable("gave no answer", err)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	switch code := resp.StatusCode; {
	case code == http.StatusTooManyRequests:
		return nil, retryAfter(resp.Header.Get("Retry-After"), k.pace.now()), nil
	case code == http.StatusNotFound || code == http.StatusBadRequest:
		return nil, 0, contract.Refuse("endorsements.unknown-chip", "compare product, chip id and reported TCB with what the firmware says (they change with BIOS and microcode)",
			"the key service at %s knows no %s (%d)", k.base.Host, u.Path, code)
	case code >= http.StatusInternalServerError:
		return nil, 0, k.unreachable(fmt.Sprintf("is out of order (%d)", code), nil)
	case code != http.StatusOK:
		return nil, 0, unexpected(u.Path, fmt.Errorf("status %d", code))
	}
	if media, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err == nil && (media == "text/html" || media == "application/json") {
		return nil, 0, unexpected(u.Path, fmt.Errorf("a document of type %s", media))
	}
	body, err = readLimited(resp.Body, maxDocument)
	switch {
	case err == nil && len(body) == 0:
		return nil, 0, unexpected(u.Path, errors.New("nothing"))
	case err == nil:
		return body, 0, nil
	case errors.Is(err, errTooLarge):
		return nil, 0, unexpected(u.Path, err)
	}
	return nil, 0, k.unreachable("broke off its answer", err)
}

func (k *kds) unreachable(what string, cause error) error {
	return contract.Refuse("endorsements.unreachable", "check that this host may reach it (proxy, firewall, clock); "+importInstead,
		"the key service at %s %s", k.base.Host, what).Because(cause)
}

func unexpected(what string, cause error) error {
	return contract.Refuse("endorsements.unexpected-answer", "look for a proxy or portal that answers in AMD's place; "+importInstead,
		"the key service answered for %s with something else", what).Because(cause)
}

// retryAfter decodes the header, seconds or a date; without one it is the
// usual interval.
func retryAfter(header string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		return max(time.Duration(seconds)*time.Second, paceInterval)
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(at.Sub(now), paceInterval)
	}
	return paceInterval
}
