package rim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/confidential-node/agent/gpu/spdm"
)

// MaxFiles bounds a folder of manifests.
const MaxFiles = 1024

// ReadFolder reads every file of a folder as a manifest. One that is none, or
// whose signature does not hold at the given time, spoils the folder: a
// verifier should know that what it relies on is not what it imported.
func ReadFolder(folder fs.FS, roots []spdm.Fingerprint, now time.Time) ([]*Manifest, error) {
	entries, err := fs.ReadDir(folder, ".")
	if err != nil {
		return nil, fmt.Errorf("reading reference manifests: %w", err)
	}
	if len(entries) == 0 || len(entries) > MaxFiles {
		return nil, fmt.Errorf("reading reference manifests: %d files, want 1 to %d", len(entries), MaxFiles)
	}
	var all []*Manifest
	for _, e := range entries {
		data, err := readFile(folder, e.Name())
		if err == nil {
			data, err = Decode(data)
		}
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", e.Name(), err)
		}
		m, err := Parse(data, roots, now)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", e.Name(), err)
		}
		all = append(all, m)
	}
	return all, nil
}

func readFile(folder fs.FS, name string) (data []byte, err error) {
	f, err := folder.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	return io.ReadAll(io.LimitReader(f, maxAnswerBytes+1))
}

// maxAnswerBytes bounds an answer of the RIM service: a manifest in base64
// with some fields around it.
const maxAnswerBytes = 2 * MaxBytes

// Decode returns the manifest in an answer of NVIDIA's RIM service (a JSON
// object that has it in base64), and any other data as it is.
func Decode(data []byte) ([]byte, error) {
	if len(data) > maxAnswerBytes {
		return nil, fmt.Errorf("reference manifest: %d bytes, at most %d are read", len(data), maxAnswerBytes)
	}
	if !bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{")) {
		return data, nil
	}
	var answer struct {
		RIM []byte `json:"rim"`
	}
	if err := json.Unmarshal(data, &answer); err != nil || len(answer.RIM) == 0 {
		return nil, errors.New("reference manifest: a JSON document without a manifest in \"rim\"")
	}
	return answer.RIM, nil
}
