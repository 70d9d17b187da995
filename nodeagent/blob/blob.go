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
//	partial/DIGEST{,.json} being fetched, and how much of it is there
//	owners/OWNER/DIGEST    who needs it; unowned blobs are evicted, oldest first
//
//	spool/GUEST/NAME          a result, complete
//	spool/GUEST/.NAME.partial being received
//	spool/GUEST/.NAME.sums    its digest, as it was received
//	spool/GUEST/.NAME.parts   which parts of it are in the store
package blob

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/headroom"
)

// Limits of conversations with an object store.
const (
	// stallTimeout is how long it may take for stallBytes to come or go: a
	// store that drips is as bad as one that hangs.
	stallTimeout = 30 * time.Second
	stallBytes   = 64 << 10
	// attempts per part before the launch is refused, about half a minute in
	// all. Who uploads decides by itself how long to go on.
	attempts = 8
	// retryPause doubles from attempt to attempt.
	retryPause = 200 * time.Millisecond
	// maxRetryAfter bounds what a store may ask for.
	maxRetryAfter = time.Minute
	// maxHeaders bounds the headers of an answer; stores send about 1 KiB.
	maxHeaders = 64 << 10
	// headBytes of a file are looked at before any of it is kept. The longest
	// header that firmware/sealed accepts fits.
	headBytes = 64 << 10
)

// Client returns a client that follows no redirect and never transforms
// bodies.
func Client(transport *http.Transport) *http.Client {
	t := transport.Clone()
	t.DisableCompression = true
	t.ResponseHeaderTimeout = stallTimeout
	t.MaxResponseHeaderBytes = maxHeaders
	return &http.Client{Transport: noRedirects{t}}
}

// noRedirects takes away where an answer points to: a presigned URL is good
// at its own host only, a redirected PUT would come back as a GET, and
// net/http quotes a malformed target, signature and all, in its error.
type noRedirects struct{ next http.RoundTripper }

func (n noRedirects) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := n.next.RoundTrip(r)
	if err == nil && resp.StatusCode/100 == 3 {
		resp.Header.Del("Location")
	}
	return resp, err
}

// request makes a request for a presigned URL, of which nothing gets into the
// error.
func request(ctx context.Context, method, presigned string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, presigned, body)
	if err != nil || req.URL.Scheme != "https" || req.URL.Host == "" || req.URL.User != nil {
		return nil, contract.Refuse("blob.url-malformed", "give a presigned https URL", "a URL for the object store is malformed or not https")
	}
	return req, nil
}

// withoutURL removes the URL that net/http puts into its errors.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}

const (
	codeURLExpired = "blob.url-expired"
	codeNotFound   = "blob.not-found"
	again          = "launch again with fresh URLs"
)

// busyError is an answer that may be another one later.
type busyError struct {
	status string
	after  time.Duration
}

func (e *busyError) Error() string { return "object store answers " + e.status }

// busy reads Retry-After in seconds, which is what stores send.
func busy(resp *http.Response) error {
	seconds, err := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 31)
	if err != nil {
		seconds = 0
	}
	return &busyError{resp.Status, min(time.Duration(seconds)*time.Second, maxRetryAfter)}
}

// Expiry reads when a presigned URL (AWS Signature Version 4, query string)
// stops working; zero when it does not say.
func Expiry(presigned string) time.Time {
	u, err := url.Parse(presigned)
	if err != nil {
		return time.Time{}
	}
	from, err := time.Parse("20060102T150405Z", u.Query().Get("X-Amz-Date"))
	seconds, numberErr := strconv.ParseUint(u.Query().Get("X-Amz-Expires"), 10, 31)
	if err != nil || numberErr != nil {
		return time.Time{}
	}
	return from.Add(time.Duration(seconds) * time.Second)
}

// answered turns a status into nil, a final refusal, or an error that may pass.
func answered(resp *http.Response, want ...int) error {
	if slices.Contains(want, resp.StatusCode) {
		return nil
	}
	if resp.StatusCode/100 == 3 {
		return contract.Refuse("blob.redirected", "give a URL of the store itself", "the object store redirects with %s", resp.Status)
	}
	switch resp.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return contract.Refuse(codeURLExpired, again, "the object store does not accept the URL: it has expired or was not made for this")
	case http.StatusNotFound, http.StatusGone:
		return contract.Refuse(codeNotFound, "upload the sealed file, then launch again", "the object store has no such object")
	case http.StatusPreconditionFailed:
		return errReplaced
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return busy(resp)
	}
	return contract.Refuse("blob.store-answer", "check the URL and the store", "the object store answers %s", resp.Status)
}

// sealedHead checks the start of a file before any of it is kept, and returns
// a reader of the whole; no is the answer to what is not sealed.
func sealedHead(r io.Reader, check func(io.Reader) error, no *contract.Refusal) (io.Reader, error) {
	buffered := bufio.NewReaderSize(r, headBytes)
	head, err := buffered.Peek(headBytes)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if err := check(bytes.NewReader(head)); err != nil {
		return nil, no.Because(err)
	}
	return buffered, nil
}

// watched ends a transfer of which too few bytes moved in a stall's time.
type watched struct {
	r     io.Reader
	stall time.Duration
	dog   *time.Timer
	moved int // since the dog was reset
}

// errStalled is the cause of a context that watch ended.
var errStalled = errors.New("too few bytes moved for too long")

func watch(r io.Reader, stall time.Duration, cancel context.CancelCauseFunc) *watched {
	return &watched{r: r, stall: stall, dog: time.AfterFunc(stall, func() { cancel(errStalled) })}
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.r.Read(b)
	if w.moved += n; w.moved >= stallBytes {
		w.moved = 0
		w.dog.Reset(w.stall)
	}
	if err != nil {
		w.dog.Stop()
	}
	return n, err
}

const codeDiskFull = "blob.disk-full"

// diskError makes a refusal of what is the host's fault and not the store's.
func diskError(err error) error {
	if _, refused := errors.AsType[*contract.Refusal](err); refused {
		return err
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return contract.Refuse(codeDiskFull, "free space on the host, or lower blob.max_bytes", "the host's disk is full").Because(err)
	}
	return headroom.Typed(err)
}

// parseUnsatisfied reads TOTAL from "bytes */TOTAL"; -1 when it does not say.
func parseUnsatisfied(text string) int64 {
	size, ok := strings.CutPrefix(text, "bytes */")
	total, err := strconv.ParseUint(size, 10, 63)
	if !ok || err != nil {
		return -1
	}
	return int64(total)
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
		return 0, 0, 0, fmt.Errorf("object store answers with content range %.100q", text)
	}
	return first, last, total, nil
}
