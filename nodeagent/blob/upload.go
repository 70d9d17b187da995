package blob

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/confidential-node/agent/firmware/contract"
)

// Upload puts one complete file of a guest's spool to a presigned URL, and
// checks while sending that it still is that file. A *contract.Refusal is
// final, any other error may pass.
func (s *Spools) Upload(ctx context.Context, guestID string, e Entry, putURL string) error {
	file, err := s.open(guestID, e)
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // read only
	sum, want := checker(filepath.Join(s.dir, guestID), e)
	body := &sending{r: io.LimitReader(file, e.Size), sum: sum}
	if _, err := s.put(ctx, putURL, body, e.Size); err != nil {
		return fmt.Errorf("uploading result %s: %w", e.Name, err)
	}
	if got, _ := body.sent(); !bytes.Equal(got, want) {
		return damaged(e, "has another checksum: "+hex.EncodeToString(got))
	}
	return nil
}

// open opens a complete file, if it still has its size.
func (s *Spools) open(guestID string, e Entry) (*os.File, error) {
	if !contract.ValidFileName(guestID) || !contract.ValidFileName(e.Name) {
		return nil, fmt.Errorf("uploading: names %q, %q are malformed", guestID, e.Name)
	}
	file, err := os.Open(filepath.Join(s.dir, guestID, e.Name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, damaged(e, "is gone")
	}
	if err != nil {
		return nil, fmt.Errorf("uploading result: %w", err)
	}
	info, err := file.Stat()
	if err == nil && info.Size() != e.Size {
		err = damaged(e, fmt.Sprintf("has %d bytes, not %d", info.Size(), e.Size))
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

func damaged(e Entry, how string) error {
	return contract.Refuse("results.spool-damaged", "launch again; check the host's disk", "result %s changed on the host's disk: it %s", e.Name, how)
}

// put sends a body of so many bytes, and returns the head of the answer when
// the store took all of it.
func (s *Spools) put(ctx context.Context, presigned string, body *sending, size int64) (http.Header, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := request(ctx, http.MethodPut, presigned, http.NoBody)
	if err != nil {
		return nil, err
	}
	if size > 0 {
		moving := watch(body, s.cfg.Stall, cancel)
		defer moving.dog.Stop()
		req.Body, req.ContentLength = io.NopCloser(moving), size
	}
	resp, err := s.client.Do(req)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, withoutURL(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it is read
	if err := answered(resp, http.StatusOK, http.StatusCreated, http.StatusNoContent); err != nil {
		return nil, err
	}
	if _, n := body.sent(); n != size {
		return nil, fmt.Errorf("object store answers %s after %d of %d bytes", resp.Status, n, size)
	}
	said := watch(resp.Body, s.cfg.Stall, cancel)
	defer said.dog.Stop()
	text, err := io.ReadAll(io.LimitReader(said, maxAnswer))
	if cause := context.Cause(ctx); cause != nil {
		return nil, cause
	}
	if err != nil {
		return nil, fmt.Errorf("reading the object store's answer: %w", withoutURL(err))
	}
	if code, failed := errorDocument(text); failed {
		return nil, &busyError{status: resp.Status + " and then " + code}
	}
	return resp.Header, nil
}

// maxAnswer bounds what is read of an answer to a PUT, which is empty unless
// something failed.
const maxAnswer = 16 << 10

// errorDocument reports whether a body says that the request failed after all,
// and the code it gives (S3, "error responses"). A store that had to answer
// before it was done can say so in no other way.
func errorDocument(body []byte) (code string, failed bool) {
	const maxCode = 64
	var doc struct {
		XMLName xml.Name `xml:"Error"`
		Code    string   `xml:"Code"`
	}
	decoder := xml.NewDecoder(bytes.NewReader(body))
	for {
		token, err := decoder.Token()
		if err != nil {
			return "", false
		}
		start, is := token.(xml.StartElement)
		if !is {
			continue
		}
		if start.Name.Local != "Error" {
			return "", false
		}
		if err := decoder.DecodeElement(&doc, &start); err != nil {
			doc.Code = ""
		}
		letter := func(r rune) bool { return r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' }
		if code = doc.Code; code == "" || len(code) > maxCode || strings.ContainsFunc(code, func(r rune) bool { return !letter(r) }) {
			code = "an error"
		}
		return code, true
	}
}

// sending counts what is sent, and hashes it when sum is set. net/http may go
// on reading a body after the answer came.
type sending struct {
	mu  sync.Mutex
	r   io.Reader
	sum hash.Hash
	n   int64
}

func (s *sending) Read(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.r.Read(b)
	if s.sum != nil {
		s.sum.Write(b[:n])
	}
	s.n += int64(n)
	return n, err
}

// sent returns no sum when there is none.
func (s *sending) sent() (sum []byte, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sum != nil {
		sum = s.sum.Sum(nil)
	}
	return sum, s.n
}
