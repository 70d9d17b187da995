// Package blob moves ciphertext: sealed inputs from object stores into a
// content-addressed cache on disk, and sealed results from a guest's spool to
// presigned URLs. It never opens what it moves; it refuses what is not sealed.
//
// Files are named by the SHA-256 of their content and appear under that name
// only after every byte was checked. A fetch is ranged, parallel and resumed
// after a restart. URLs are credentials: they appear in no error and no log.
// Caches and spools are safe for concurrent use.
//
// # Layout
//
//	blobs/DIGEST           complete, 0444
//	partial/DIGEST{,.json} being fetched, and which parts are there
//	owners/OWNER/DIGEST    who needs it; unowned blobs are evicted, oldest first
package blob

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Timing of conversations with an object store.
const (
	// stallTimeout is how long no byte may come.
	stallTimeout = 30 * time.Second
	// attempts per part or upload before giving up for now.
	attempts = 5
	// retryPause doubles from attempt to attempt.
	retryPause = 200 * time.Millisecond
)

// Client returns a client that follows no redirect to another host and never
// transforms bodies.
func Client(transport *http.Transport) *http.Client {
	t := transport.Clone()
	t.DisableCompression = true
	t.ResponseHeaderTimeout = stallTimeout
	return &http.Client{Transport: t, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > 3 || req.URL.Host != via[0].URL.Host || req.URL.Scheme != via[0].URL.Scheme {
			return contract.Refuse("blob.redirected", "give a URL of the store itself", "the object store redirects to another host")
		}
		return nil
	}}
}

// withoutURL removes the URL that net/http puts into its errors.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}

// answered turns a status into nil, a final refusal, or an error that may pass.
func answered(resp *http.Response, want ...int) error {
	if slices.Contains(want, resp.StatusCode) {
		return nil
	}
	const again = "launch again with fresh URLs"
	switch resp.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return contract.Refuse("blob.url-expired", again, "the object store does not accept the URL: it has expired or was not made for this")
	case http.StatusNotFound, http.StatusGone:
		return contract.Refuse("blob.not-found", "upload the sealed file, then launch again", "the object store has no such object")
	case http.StatusPreconditionFailed:
		return errReplaced
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return fmt.Errorf("object store answers %s", resp.Status)
	}
	return contract.Refuse("blob.store-answer", "check the URL and the store", "the object store answers %s", resp.Status)
}

// errReplaced means that the object changed while it was read.
var errReplaced = errors.New("the object was replaced while it was fetched")

// diskError makes a full disk a refusal.
func diskError(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return contract.Refuse("blob.disk-full", "free space on the host, or lower blob.max_bytes", "the host's disk is full").Because(err)
	}
	return err
}

// parseContentRange reads "bytes FIRST-LAST/TOTAL".
func parseContentRange(text string) (first, last, total int64, err error) {
	rest, ok := strings.CutPrefix(text, "bytes ")
	span, size, okSize := strings.Cut(rest, "/")
	from, to, okSpan := strings.Cut(span, "-")
	first, errFirst := strconv.ParseInt(from, 10, 64)
	last, errLast := strconv.ParseInt(to, 10, 64)
	total, errTotal := strconv.ParseInt(size, 10, 64)
	if err := errors.Join(errFirst, errLast, errTotal); !ok || !okSize || !okSpan || err != nil || first < 0 || last < first || total <= last {
		return 0, 0, 0, fmt.Errorf("object store answers with content range %q", text)
	}
	return first, last, total, nil
}
