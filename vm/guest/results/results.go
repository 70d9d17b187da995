// Package results seals what the workload left behind to the tenant and signs
// the list of it. The folder was the workload's, so nothing in it is followed:
// only regular files named in the manifest are taken. Nothing here runs while
// the workload does.
package results

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
)

// attempts and pause bound the delivery of one object.
const (
	attempts = 4
	pause    = 2 * time.Second
)

// Sink takes sealed results.
type Sink interface {
	PutResult(ctx context.Context, name string, r io.Reader) error
	PutResultManifest(ctx context.Context, signed []byte) error
}

// Recipients reads the recipients of every result, so that a manifest with a
// bad one is refused before any work is done.
func Recipients(list []contract.Result) (map[string][]age.Recipient, error) {
	out := map[string][]age.Recipient{}
	for _, r := range list {
		to, err := age.ParseRecipients(strings.NewReader(strings.Join(r.Recipients, "\n")))
		if err != nil || len(to) != len(r.Recipients) {
			return nil, contract.Refuse("guest.recipient-malformed", "name age recipients (age1…) in the manifest",
				"a recipient of result %s is none of age's", r.Name).Because(err)
		}
		out[r.Name] = to
	}
	return out, nil
}

// Deliver seals and sends every result that exists, then the signed list.
func Deliver(ctx context.Context, sink Sink, dir string, m *contract.Manifest, exitCode int, key ed25519.PrivateKey) error {
	recipients, err := Recipients(m.Results)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("opening results: %w", err)
	}
	defer root.Close() //nolint:errcheck // only read from
	list := contract.ResultManifest{Version: contract.ResultsVersion, LaunchID: m.LaunchID, ExitCode: exitCode, Results: []contract.ResultEntry{}}
	for _, r := range m.Results {
		info, err := root.Lstat(r.Name)
		if errors.Is(err, fs.ErrNotExist) || (err == nil && !info.Mode().IsRegular()) {
			continue // not produced; the signed list says so
		}
		if err != nil {
			return fmt.Errorf("looking for result %s: %w", r.Name, err)
		}
		var entry contract.ResultEntry
		if err := retry(ctx, func() (err error) {
			entry, err = send(ctx, sink, root, r.Name, recipients[r.Name])
			return err
		}); err != nil {
			return undelivered("result "+r.Name, err)
		}
		list.Results = append(list.Results, entry)
	}
	signed, err := contract.SealResults(&list, key)
	if err != nil {
		return fmt.Errorf("signing results: %w", err)
	}
	if err := retry(ctx, func() error { return sink.PutResultManifest(ctx, signed) }); err != nil {
		return undelivered("the signed list of results", err)
	}
	return nil
}

func undelivered(what string, err error) error {
	var told interface{ Reason() string }
	if errors.As(err, &told) && told.Reason() != "" {
		what += ", it says " + told.Reason()
	}
	return contract.Refuse("guest.results-undelivered", "raise the result quota, or deploy again", "the node does not take %s", what).Because(err)
}

func retry(ctx context.Context, do func() error) error {
	for n := 1; ; n++ {
		err := do()
		if err == nil || n == attempts {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(pause):
		}
	}
}

// send streams one file through age to the sink. Every attempt seals anew, so
// no two share a key.
func send(ctx context.Context, sink Sink, root *os.Root, name string, to []age.Recipient) (contract.ResultEntry, error) {
	f, err := root.Open(name)
	if err != nil {
		return contract.ResultEntry{}, fmt.Errorf("opening result: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read from
	reader, writer := io.Pipe()
	sum := &counter{hash: sha256.New()}
	sealed := make(chan error, 1)
	go func() {
		err := seal(io.MultiWriter(writer, sum), f, to)
		_ = writer.CloseWithError(err) // never fails
		sealed <- err
	}()
	err = sink.PutResult(ctx, name, reader)
	_ = reader.Close() // ends the sealing when the sink gave up
	if sealErr := <-sealed; err == nil {
		err = sealErr
	}
	if err != nil {
		return contract.ResultEntry{}, fmt.Errorf("sending result: %w", err)
	}
	return contract.ResultEntry{Name: name, SHA256: hex.EncodeToString(sum.hash.Sum(nil)), Size: sum.size}, nil
}

func seal(out io.Writer, in io.Reader, to []age.Recipient) error {
	w, err := age.Encrypt(out, to...)
	if err != nil {
		return fmt.Errorf("sealing: %w", err)
	}
	if _, err := io.Copy(w, in); err != nil {
		return fmt.Errorf("sealing: %w", err)
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("sealing: %w", err)
	}
	return nil
}

type counter struct {
	hash hash.Hash
	size int64
}

func (c *counter) Write(p []byte) (int, error) {
	c.size += int64(len(p))
	return c.hash.Write(p)
}
