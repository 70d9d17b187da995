package blob

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/durable"
)

// sums of a complete file, as it was received. They are beside it, so that a
// delivery need not read a file of terabytes to know its digest: the CRC, which
// costs next to nothing, finds what the disk damaged. Whoever damages a file on
// purpose is found by the tenant, whose guest has signed the digest.
type sums struct {
	SHA256 string `json:"sha256"`
	CRC32C uint32 `json:"crc32c"`
	Size   int64  `json:"size"`
}

const (
	sumsSuffix = ".sums"
	maxSums    = 1 << 10
)

func newCRC() hash.Hash32 { return crc32.New(crc32.MakeTable(crc32.Castagnoli)) }

func sumsFile(dir, name string) string { return filepath.Join(dir, "."+name+sumsSuffix) }

// forgetSums comes before a file is replaced: sums of another one would be
// worse than none, which only cost time.
func forgetSums(dir, name string) error {
	err := os.Remove(sumsFile(dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return errors.Join(err, durable.SyncDir(dir))
}

func keepSums(dir, name string, s sums) error {
	raw, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encoding sums: %w", err)
	}
	if err := replaceFile(sumsFile(dir, name), raw); err != nil {
		return diskError(fmt.Errorf("writing sums: %w", err))
	}
	return nil
}

// replaceFile replaces a small file whole or not at all, without fsync: for
// what only saves work.
func replaceFile(path string, content []byte) error {
	if err := os.WriteFile(path+partialSuffix, content, 0o600); err != nil {
		return err
	}
	return os.Rename(path+partialSuffix, path)
}

// readSums returns the sums of a file of this size, if they are there.
func readSums(dir, name string, size int64) (s sums, digest [32]byte, ok bool) {
	file, err := os.Open(sumsFile(dir, name))
	if err != nil {
		return s, digest, false
	}
	defer file.Close() //nolint:errcheck // read only
	raw, err := io.ReadAll(io.LimitReader(file, maxSums+1))
	if err != nil {
		return s, digest, false
	}
	s, digest, err = parseSums(raw)
	return s, digest, err == nil && s.Size == size
}

func parseSums(raw []byte) (s sums, digest [32]byte, err error) {
	if err := contract.UnmarshalStrict(raw, maxSums, &s); err != nil {
		return sums{}, digest, fmt.Errorf("reading sums: %w", err)
	}
	sum, err := hex.DecodeString(s.SHA256)
	if err != nil || len(sum) != len(digest) || s.Size < 0 {
		return sums{}, digest, errors.New("reading sums: malformed")
	}
	return s, [32]byte(sum), nil
}

// checker returns what tells while sending whether a file still is the one that
// was received.
func checker(dir string, e Entry) (sum hash.Hash, want []byte) {
	s, digest, ok := readSums(dir, e.Name, e.Size)
	if !ok || digest != e.SHA256 {
		return sha256.New(), e.SHA256[:]
	}
	return newCRC(), binary.BigEndian.AppendUint32(nil, s.CRC32C)
}

// digestOf is a file's, by its sums or by reading all of it.
func digestOf(dir, name string) (e Entry, err error) {
	file, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return Entry{}, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	info, err := file.Stat()
	if err != nil {
		return Entry{}, err
	}
	if _, digest, ok := readSums(dir, name, info.Size()); ok {
		return Entry{name, digest, info.Size()}, nil
	}
	sum, crc := sha256.New(), newCRC()
	size, err := io.CopyBuffer(io.MultiWriter(sum, crc), file, make([]byte, 256<<10))
	if err != nil {
		return Entry{}, err
	}
	e = Entry{name, [32]byte(sum.Sum(nil)), size}
	return e, keepSums(dir, name, sumsOf(e, crc))
}

func sumsOf(e Entry, crc hash.Hash32) sums {
	return sums{SHA256: hex.EncodeToString(e.SHA256[:]), CRC32C: crc.Sum32(), Size: e.Size}
}
