package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"filippo.io/age"
	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/sealed"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/tests/outside"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/tenant"
)

const (
	uploadBytes = 1 << 30
	uploadParts = 8
	uploadGuest = "guest"
	uploadName  = "out"
	sinkPort    = "9001"
)

// delivery is one result in a spool, and where it goes: one URL, or one for
// each part. URLs go over pipes.
type delivery struct {
	Dir      string   `json:"dir"`
	SHA256   [32]byte `json:"sha256"`
	Size     int64    `json:"size"`
	URLs     []string `json:"urls"`
	PartSize int64    `json:"part_size"`
	CAFile   string   `json:"ca_file"`
}

// uploadChild delivers one result as the agent does.
func uploadChild(ctx context.Context, in io.Reader) error {
	var d delivery
	if err := json.NewDecoder(in).Decode(&d); err != nil {
		return fmt.Errorf("reading what to deliver: %w", err)
	}
	client, err := storeClient(d.CAFile)
	if err != nil {
		return err
	}
	spools, err := blob.OpenSpools(d.Dir, blob.SpoolConfig{MaxBytes: 2 * d.Size, Parts: uploadParts, CheckHeader: sealed.CheckHeader}, client, hclog.NewNullLogger())
	if err != nil {
		return err
	}
	e := blob.Entry{Name: uploadName, SHA256: d.SHA256, Size: d.Size}
	// As a delivery begins: the digest is known from the receipt.
	spool, err := spools.Open(uploadGuest, map[string]int64{uploadName: d.Size}, d.Size)
	if err != nil {
		return err
	}
	if entries, err := spool.Entries(); err != nil || len(entries) != 1 || entries[0] != e {
		return fmt.Errorf("the spool has %v: %w", entries, err)
	}
	if d.PartSize == 0 {
		return spools.Upload(ctx, uploadGuest, e, d.URLs[0])
	}
	_, err = spools.UploadParts(ctx, uploadGuest, e, blob.Grant{UploadID: "bench", PartSize: d.PartSize, FirstPart: 1, URLs: d.URLs})
	return err
}

// sink is a store that keeps nothing: nothing but the sender is measured.
type sink struct{ taken atomic.Int64 }

func (s *sink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n, err := io.CopyBuffer(onlyWriter{io.Discard}, r.Body, make([]byte, 256<<10))
	s.taken.Add(n)
	if err == nil {
		w.Header().Set("ETag", `"sink"`)
	}
}

// onlyWriter keeps io.Copy from reading in pieces of 8 KiB.
type onlyWriter struct{ io.Writer }

// uploads compares the agent's deliveries with curl -T.
func (l *lab) uploads(ctx context.Context) error {
	s := &sink{}
	cert, err := l.p.CA.Issue(rig.OutsideAddr)
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	defer stop()
	if err := outside.Serve(running, rig.OutsideAddr+":"+sinkPort, cert, s); err != nil {
		return err
	}
	d, pieces, err := l.spooled(ctx, "https://"+rig.OutsideAddr+":"+sinkPort+"/")
	if err != nil {
		return err
	}
	single := d
	single.PartSize = 0
	agent := func(d delivery) func(context.Context) (time.Duration, error) {
		return func(ctx context.Context) (time.Duration, error) { return l.agentMoves(ctx, uploadVerb, d) }
	}
	curl := func(files []string) func(context.Context) (time.Duration, error) {
		return func(ctx context.Context) (time.Duration, error) { return l.curlPuts(ctx, d, files) }
	}
	whole := filepath.Join(d.Dir, uploadGuest, uploadName)
	ways := []way{
		{"curl -T", curl([]string{whole})},
		{"curl -T ×8", curl(pieces)},
		{"agent, one PUT", agent(single)},
		{"agent, 8 parts", agent(d)},
	}
	t := table{
		Title: "Result upload against curl", Unit: "MiB/s", Against: []string{ways[0].name, ways[1].name},
		About: fmt.Sprintf(`%d MiB from the checkout's disk over TLS to the same server, which keeps nothing: the agent's one PUT (checked
			on the way against the checksum of its receipt) and its 8 parts at a time against curl with one stream and with 8 at a time
			(of a file cut into 8 before). Sender and server share the CPUs. Good: one PUT at least 0.8 of curl -T, 8 parts at least 0.8 of curl -T ×8.`, d.Size>>20),
	}
	return l.race(ctx, t, d.Size, ways, func() error { s.taken.Store(0); return nil }, func() error {
		if n := s.taken.Load(); n != d.Size {
			return fmt.Errorf("%d bytes came, not %d", n, d.Size)
		}
		return removeIfThere(filepath.Join(d.Dir, uploadGuest, "."+uploadName+".parts"))
	})
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// spooled seals zeros into a spool, and cuts a copy into pieces for curl.
func (l *lab) spooled(ctx context.Context, store string) (d delivery, pieces []string, err error) {
	d = delivery{Dir: filepath.Join(l.disk, "spool"), CAFile: l.p.CAFile()}
	cut := filepath.Join(l.disk, "pieces")
	if err := os.Mkdir(cut, 0o700); err != nil {
		return d, nil, err
	}
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return d, nil, err
	}
	e, err := receive(ctx, d.Dir, identity.Recipient())
	if err != nil {
		return d, nil, err
	}
	d.SHA256, d.Size, d.PartSize = e.SHA256, e.Size, (e.Size+uploadParts-1)/uploadParts
	file, err := os.Open(filepath.Join(d.Dir, uploadGuest, uploadName))
	if err != nil {
		return d, nil, err
	}
	defer file.Close() //nolint:errcheck // read only
	for i := range int64(uploadParts) {
		piece := filepath.Join(cut, fmt.Sprint(i))
		out, err := os.Create(piece)
		if err != nil {
			return d, nil, err
		}
		_, err = io.Copy(out, io.NewSectionReader(file, i*d.PartSize, d.PartSize))
		if err := errors.Join(err, out.Close()); err != nil {
			return d, nil, err
		}
		pieces, d.URLs = append(pieces, piece), append(d.URLs, fmt.Sprintf("%s%s?partNumber=%d", store, uploadName, i+1))
	}
	return d, pieces, nil
}

// receive takes sealed zeros as from a guest.
func receive(ctx context.Context, dir string, to age.Recipient) (blob.Entry, error) {
	spools, err := blob.OpenSpools(dir, blob.SpoolConfig{MaxBytes: 2 * uploadBytes, CheckHeader: sealed.CheckHeader}, http.DefaultClient, hclog.NewNullLogger())
	if err != nil {
		return blob.Entry{}, err
	}
	spool, err := spools.Open(uploadGuest, map[string]int64{uploadName: 2 * uploadBytes}, 2*uploadBytes)
	if err != nil {
		return blob.Entry{}, err
	}
	r, w := io.Pipe()
	go func() {
		_, err := tenant.Seal(w, io.LimitReader(zeros{}, uploadBytes), to)
		w.CloseWithError(err)
	}()
	return spool.Receive(ctx, uploadName, r)
}

// curlPuts puts each file to its own URL, all at a time.
func (l *lab) curlPuts(ctx context.Context, d delivery, files []string) (time.Duration, error) {
	var config strings.Builder
	for i, file := range files {
		if i > 0 {
			config.WriteString("next\n")
		}
		fmt.Fprintf(&config, "silent\nshow-error\nfail\ncacert = %q\nurl = %q\nupload-file = %q\n", d.CAFile, d.URLs[i], file)
	}
	args := []string{"--config", "-"}
	if len(files) > 1 {
		args = append(args, "--parallel", "--parallel-immediate", "--parallel-max", fmt.Sprint(len(files)))
	}
	return l.onHost(ctx, strings.NewReader(config.String()), "curl", args...)
}
