package lifecycletest

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/admit"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
)

// Serve puts a blob at a URL.
func (w *World) Serve(url string, data []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.origin[url] = data
}

// Uploaded returns what was put to a URL.
func (w *World) Uploaded(url string) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.objects[url]
}

// Cache holds ciphertext.
type Cache struct{ *World }

var _ lifecycle.Blobs = Cache{}

// Fetch implements lifecycle.Blobs.
func (w Cache) Fetch(ctx context.Context, b lifecycle.Blob, owner string) (string, error) {
	if err := w.enter(ctx, "fetch"); err != nil {
		return "", err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	data := w.origin[b.URL]
	if sum(data) != b.SHA256 || int64(len(data)) != b.Size {
		return "", contract.Refuse("blob.digest-mismatch", "upload it again", "the input is not the one expected")
	}
	path := filepath.Join(w.Dir, "cache-"+hex.EncodeToString(b.SHA256[:4]))
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return "", err
	}
	w.blobs[owner] = append(w.blobs[owner], b.SHA256)
	return path, nil
}

// Release implements lifecycle.Blobs.
func (w Cache) Release(owner string) error {
	if err := w.enter(context.Background(), "release"); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.domains[owner] != nil {
		w.brokenLocked("blobs of %s released under its domain", owner)
	}
	delete(w.blobs, owner)
	return nil
}

// Owners implements lifecycle.Blobs.
func (w Cache) Owners() ([]string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for owner := range w.blobs {
		out = append(out, owner)
	}
	return out, nil
}

// Store holds spools.
type Store struct{ *World }

var _ lifecycle.Spools = Store{}

type spool struct {
	w     *World
	most  map[string]int64
	quota int64
	files map[string][]byte
}

// Open implements lifecycle.Spools.
func (w Store) Open(id string, most map[string]int64, quota int64) (lifecycle.Spool, error) {
	if err := w.enter(context.Background(), "spool"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.spools[id]; s != nil {
		if !maps.Equal(s.most, most) || s.quota != quota {
			return nil, fmt.Errorf("spool of %s was opened for %v, %d bytes", id, s.most, s.quota)
		}
		return s, nil
	}
	s := &spool{w: w.World, most: maps.Clone(most), quota: quota, files: map[string][]byte{}}
	w.spools[id] = s
	return s, nil
}

// Upload implements lifecycle.Spools.
func (w Store) Upload(ctx context.Context, id string, e lifecycle.Entry, putURL string) error {
	for _, op := range []string{"upload", "upload " + e.Name} {
		if err := w.enter(ctx, op); err != nil {
			return err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.spools[id]
	if s == nil || sum(s.files[e.Name]) != e.SHA256 {
		return fmt.Errorf("no such file: %s", e.Name)
	}
	w.objects[putURL] = s.files[e.Name]
	return nil
}

// Remove implements lifecycle.Spools.
func (w Store) Remove(id string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.spools, id)
	return nil
}

// List implements lifecycle.Spools.
func (w Store) List() ([]string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for id := range w.spools {
		out = append(out, id)
	}
	return out, nil
}

// Receive implements lifecycle.Spool.
func (s *spool) Receive(_ context.Context, name string, r io.Reader) (lifecycle.Entry, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return lifecycle.Entry{}, err
	}
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	used := int64(len(data))
	for other, have := range s.files {
		if other != name {
			used += int64(len(have))
		}
	}
	if most, known := s.most[name]; !known || used > s.quota || int64(len(data)) > most {
		return lifecycle.Entry{}, contract.Refuse("blob.results-quota", "ask for more", "file %s does not fit", name)
	}
	s.files[name] = data
	return lifecycle.Entry{Name: name, SHA256: sum(data), Size: int64(len(data))}, nil
}

// Entries implements lifecycle.Spool.
func (s *spool) Entries() ([]lifecycle.Entry, error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	var out []lifecycle.Entry
	for name, data := range s.files {
		out = append(out, lifecycle.Entry{Name: name, SHA256: sum(data), Size: int64(len(data))})
	}
	return out, nil
}

// Image writes a guest image and returns its catalogue entry.
func (w *World) Image() (admit.Image, error) {
	dir := filepath.Join(w.Dir, "image")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return admit.Image{}, err
	}
	d := contract.ImageDescription{Version: contract.ImageVersion, Name: "test", Variant: contract.VariantProduction, Cmdline: "quiet", GPUEvidence: true}
	for name, f := range map[string]*contract.ImageFile{"OVMF.fd": &d.Firmware, "vmlinuz": &d.Kernel, "initrd": &d.Initrd} {
		data := []byte(strings.Repeat(name, 1000))
		digest := sum(data)
		*f = contract.ImageFile{File: name, SHA256: hex.EncodeToString(digest[:]), Size: int64(len(data))}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return admit.Image{}, err
		}
	}
	text, err := json.Marshal(d)
	if err != nil {
		return admit.Image{}, err
	}
	return admit.Image{Dir: dir, Description: d}, os.WriteFile(filepath.Join(dir, contract.ImageDescriptionName), text, 0o600)
}

// Measure stands for the silicon: any two different boots measure differently.
func Measure(b lifecycle.Boot) (lifecycle.Measured, error) {
	firmware, err := os.ReadFile(b.Firmware)
	if err != nil {
		return lifecycle.Measured{}, err
	}
	text := fmt.Appendf(nil, "%x %x %q %d %s %d ", b.Kernel, b.Initrd, b.Cmdline, b.VCPUs, b.CPUModel, b.GuestFeatures)
	return lifecycle.Measured{Digest: sha512.Sum384(append(text, firmware...)), HashTable: bytes.Repeat([]byte{1}, 176)}, nil
}
