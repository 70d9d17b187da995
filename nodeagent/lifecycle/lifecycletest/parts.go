package lifecycletest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
)

// Expired is part of a URL that the store does not accept any more.
const Expired = "expired"

// part is one of a multipart upload.
type part struct{ data []byte }

// UploadParts implements lifecycle.Spools. Which parts are there survives the
// agent, as a journal on disk does.
func (w Store) UploadParts(ctx context.Context, id string, e lifecycle.Entry, g blob.Grant) ([]string, error) {
	for _, op := range []string{"upload", "upload " + e.Name} {
		if err := w.enter(ctx, op); err != nil {
			return nil, err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.spools[id]
	if s == nil || sum(s.files[e.Name]) != e.SHA256 {
		return nil, fmt.Errorf("no such file: %s", e.Name)
	}
	chunks := slices.Collect(slices.Chunk(s.files[e.Name], int(g.PartSize)))
	upload := w.uploads[g.UploadID]
	if upload == nil {
		upload = map[int]*part{}
		w.uploads[g.UploadID] = upload
	}
	var why *contract.Refusal
	for i, url := range g.URLs {
		number := g.FirstPart + i
		if number > len(chunks) || upload[number] != nil {
			continue
		}
		if bytes.Contains([]byte(url), []byte(Expired)) {
			why = contract.Refuse("blob.url-expired", "r", "expired")
			continue
		}
		upload[number] = &part{data: chunks[number-1]}
	}
	tags := make([]string, 0, len(chunks))
	wanted := &blob.WantedError{Why: why}
	for i := range chunks {
		if p := upload[i+1]; p != nil {
			wanted.Done++
			tags = append(tags, tagOf(p.data))
		} else if wanted.Part == 0 {
			wanted.Part = i + 1
		}
	}
	if wanted.Part != 0 {
		return nil, wanted
	}
	return tags, nil
}

func tagOf(data []byte) string {
	digest := sum(data)
	return fmt.Sprintf("%q", fmt.Sprintf("%x", digest[:16]))
}

// Complete makes an object of an upload's parts, as whoever holds the store's
// keys does. The host goes on believing in its parts.
func (w *World) Complete(uploadID, url string, tags []string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var whole []byte
	for i, tag := range tags {
		p := w.uploads[uploadID][i+1]
		if p == nil || tagOf(p.data) != tag {
			return errors.New("InvalidPart")
		}
		whole = append(whole, p.data...)
	}
	w.objects[url] = whole
	return nil
}
