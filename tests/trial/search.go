package trial

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Found is the outcome of a search.
type Found struct {
	// Places says where was searched and how much.
	Places []string
	// Hits are the places that hold what they must not.
	Hits []string
}

// Search looks for secrets wherever the platform and its hosts could keep
// them: the agents' memory, every file of theirs, logs, everything that went
// over NATS, and every object of the store. Secrets are also found in hex and
// base64. Guests' memory is not searched: under emulation QEMU's is readable,
// on silicon it is encrypted.
func (p *Platform) Search(ctx context.Context, secrets [][]byte) (Found, error) {
	s := searcher{needles: needles(secrets)}
	var errs []error
	for _, h := range p.hosts {
		if h.agent != nil && h.agent.Running() {
			errs = append(errs, s.memory(ctx, h.ID+": the agent's memory", h.agent.PID()))
		}
		for what, dir := range map[string]string{
			"state": StateDir, "ciphertext cache": CacheDir, "boot copies and sockets": "/run/nodeagent", "temporary files": "/run/tmp",
			"libvirt's files": "/var/lib/libvirt", "libvirt's logs": "/var/log/libvirt", "libvirt's state": "/run/libvirt",
		} {
			errs = append(errs, s.files(ctx, h.ID+": "+what, h.Path(dir)))
		}
	}
	errs = append(errs, s.files(ctx, "logs of every program", p.Logs), s.files(ctx, "the control plane's streams", p.ControlDir), s.files(ctx, "NATS traffic", p.traffic))
	objects, err := p.Store.Objects()
	errs = append(errs, err)
	var total int64
	for name, data := range objects {
		total += int64(len(data))
		errs = append(errs, s.scan(ctx, "object "+name, bytes.NewReader(data)))
	}
	s.found.Places = append(s.found.Places, fmt.Sprintf("%-44s %d objects, %d bytes", "the object store", len(objects), total))
	return s.found, errors.Join(errs...)
}

// needles are the secrets as they would appear, also inside JSON.
func needles(secrets [][]byte) [][]byte {
	var out [][]byte
	for _, secret := range secrets {
		out = append(out, secret, []byte(hex.EncodeToString(secret)))
		// Where the secret begins within three bytes decides its base64; the
		// first and last characters depend on what stands beside it.
		for shift := range 3 {
			text := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), secret...))
			out = append(out, []byte(text[min(4, len(text)):max(4, len(text)-4)]))
		}
	}
	return out
}

type searcher struct {
	needles [][]byte
	found   Found
}

// chunk is read at a time; pieces overlap by the longest needle.
const chunk = 4 << 20

func (s *searcher) scan(ctx context.Context, place string, r io.Reader) error {
	longest := 0
	for _, n := range s.needles {
		longest = max(longest, len(n))
	}
	buffer := make([]byte, 0, chunk+longest)
	for ctx.Err() == nil {
		n, err := io.ReadFull(r, buffer[len(buffer):len(buffer)+chunk])
		buffer = buffer[:len(buffer)+n]
		for _, needle := range s.needles {
			if bytes.Contains(buffer, needle) {
				s.found.Hits = append(s.found.Hits, place)
				return nil
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("searching %s: %w", place, err)
		}
		keep := min(longest, len(buffer))
		buffer = append(buffer[:0], buffer[len(buffer)-keep:]...)
	}
	return ctx.Err()
}

func (s *searcher) files(ctx context.Context, place, dir string) error {
	var files, total int64
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close() //nolint:errcheck // only read from
		info, err := f.Stat()
		if err != nil {
			return err
		}
		files++
		total += info.Size()
		return s.scan(ctx, path, f)
	})
	if err != nil {
		return fmt.Errorf("searching %s: %w", place, err)
	}
	s.found.Places = append(s.found.Places, fmt.Sprintf("%-44s %d files, %d bytes", place, files, total))
	return nil
}

// memory searches every readable mapping of a process.
func (s *searcher) memory(ctx context.Context, place string, pid int) error {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return fmt.Errorf("searching %s: %w", place, err)
	}
	defer maps.Close() //nolint:errcheck // only read from
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return fmt.Errorf("searching %s: %w", place, err)
	}
	defer mem.Close() //nolint:errcheck // only read from
	var total int64
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); err != nil {
			continue // the vsyscall page lies above what int64 holds
		}
		if !strings.HasPrefix(mode, "r") || strings.Contains(lines.Text(), "[v") {
			continue
		}
		// A mapping that is gone meanwhile or not backed reads as an error.
		n, _ := io.Copy(io.Discard, io.NewSectionReader(mem, from, 1)) // probe
		if n == 0 {
			continue
		}
		total += to - from
		if err := s.scan(ctx, place, &tolerant{io.NewSectionReader(mem, from, to-from)}); err != nil {
			return err
		}
	}
	s.found.Places = append(s.found.Places, fmt.Sprintf("%-44s %d bytes", place, total))
	return nil
}

// tolerant ends where memory cannot be read any more.
type tolerant struct{ r io.Reader }

func (t *tolerant) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err != nil {
		err = io.EOF
	}
	return n, err
}
