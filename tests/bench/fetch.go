package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/hashicorp/go-hclog"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/sealed"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/tests/tenant"
	"github.com/confidential-node/agent/tests/trial"
)

const (
	fetchRounds = 5
	fetchBytes  = 512 << 20
	fetchKey    = "bench.age"
	// fetchParts is how many parts the agent fetches at a time by default.
	fetchParts = 8
)

// wanted is the object to fetch. URL is a credential and goes over pipes.
type wanted struct {
	URL    string   `json:"url"`
	SHA256 [32]byte `json:"sha256"`
	Size   int64    `json:"size"`
	CAFile string   `json:"ca_file"`
	Dir    string   `json:"dir"`
}

// fetchChild fetches one object as the agent does.
func fetchChild(ctx context.Context, in io.Reader) error {
	var w wanted
	if err := json.NewDecoder(in).Decode(&w); err != nil {
		return fmt.Errorf("reading what to fetch: %w", err)
	}
	client, err := storeClient(w.CAFile)
	if err != nil {
		return err
	}
	cache, err := blob.Open(w.Dir, blob.Config{MaxBytes: 2 * w.Size, Parts: fetchParts, CheckHeader: sealed.CheckHeader}, client, hclog.NewNullLogger())
	if err != nil {
		return err
	}
	_, err = cache.Fetch(ctx, blob.Ref{SHA256: w.SHA256, Size: w.Size, URL: w.URL}, "bench", nil)
	return err
}

// storeClient is the agent's.
func storeClient(caFile string) (*http.Client, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return blob.Client(&http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, MaxIdleConnsPerHost: 64}), nil
}

// way is one way to move so many bytes. It returns the CPU time of the program
// that did it.
type way struct {
	name string
	move func(context.Context) (time.Duration, error)
}

// fetches compares the agent's fetch with curl, into memory and onto a disk.
func (l *lab) fetches(ctx context.Context) error {
	w, err := l.putObject(ctx)
	if err != nil {
		return err
	}
	one := way{"curl", func(ctx context.Context) (time.Duration, error) { return l.curl(ctx, w, 1) }}
	many := way{"curl ×8", func(ctx context.Context) (time.Duration, error) { return l.curl(ctx, w, fetchParts) }}
	synced := way{"curl ×8, fsync", func(ctx context.Context) (time.Duration, error) {
		cpu, err := many.move(ctx)
		return cpu, errors.Join(err, syncFiles(w.Dir))
	}}
	agent := way{"agent", func(ctx context.Context) (time.Duration, error) { return l.agentMoves(ctx, fetchVerb, w) }}
	const about = `%d MiB over TLS from the same store on the same two ends of a link: the agent (8 parts at a time, joined, SHA-256 checked,
		fsync) against curl with one stream and with 8 ranges at a time (left in 8 files, nothing checked). Store and getter share the CPUs. `
	for _, place := range []struct {
		title, about, dir string
		ways              []way
	}{
		{
			"Verified blob fetch against curl, into memory", "Into a tmpfs: the price of checking. Good: at least 0.8 of curl ×8.",
			filepath.Join(l.p.Dir, "fetched"),
			[]way{one, many, agent},
		},
		{
			"Verified blob fetch against curl, onto disk", "Onto the checkout's disk: only fsync makes curl promise what the agent does. Good: at least 0.8 of that.",
			filepath.Join(l.disk, "fetched"),
			[]way{one, many, synced, agent},
		},
	} {
		t := table{Title: place.title, About: fmt.Sprintf(about, w.Size>>20) + place.about, Unit: "MiB/s"}
		for _, way := range place.ways[:len(place.ways)-1] {
			t.Against = append(t.Against, way.name)
		}
		w.Dir = place.dir
		err := l.race(ctx, t, w.Size, place.ways, func() error { return os.Mkdir(w.Dir, 0o700) }, func() error {
			return errors.Join(complete(w), os.RemoveAll(w.Dir))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// race lets the ways take turns, and shows their rates and CPU times.
func (l *lab) race(ctx context.Context, t table, size int64, ways []way, before, after func() error) error {
	rate, spent := make([][]float64, len(ways)), make([][]float64, len(ways))
	for range fetchRounds {
		for i, way := range ways {
			if err := before(); err != nil {
				return err
			}
			begin := time.Now()
			cpu, err := way.move(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			rate[i] = append(rate[i], float64(size)/(1<<20)/time.Since(begin).Seconds())
			spent[i] = append(spent[i], milliseconds(cpu))
			if err := after(); err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			unix.Sync() // the next one finds an idle disk
		}
	}
	cpu := table{
		Title: "CPU time of the same", Unit: "ms", Against: t.Against,
		About: "User and system time of the program alone; steadier than rates when others use the machine. Good: below 1.5, the rest is SHA-256.",
	}
	for i, way := range ways {
		t.Rows, cpu.Rows = append(t.Rows, newRow(way.name, rate[i]...)), append(cpu.Rows, newRow(way.name, spent[i]...))
	}
	l.show(t)
	l.show(cpu)
	return nil
}

// complete makes sure that every byte came.
func complete(w wanted) error {
	var size int64
	err := eachFile(w.Dir, func(f *os.File) error {
		info, err := f.Stat()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	if err == nil && size != w.Size {
		err = fmt.Errorf("%d bytes came, not %d", size, w.Size)
	}
	return err
}

func syncFiles(dir string) error { return eachFile(dir, (*os.File).Sync) }

// eachFile opens every file below dir.
func eachFile(dir string, do func(*os.File) error) error {
	return filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(do(f), f.Close())
	})
}

// putObject seals zeros and puts them into the store.
func (l *lab) putObject(ctx context.Context) (wanted, error) {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return wanted{}, err
	}
	var sealedBytes bytes.Buffer
	sealedBytes.Grow(fetchBytes + fetchBytes>>10)
	if _, err := tenant.Seal(&sealedBytes, io.LimitReader(zeros{}, fetchBytes), identity.Recipient()); err != nil {
		return wanted{}, err
	}
	if err := l.p.Store.Replace(trial.Bucket, fetchKey, sealedBytes.Bytes()); err != nil {
		return wanted{}, err
	}
	address, err := l.presign(ctx)
	return wanted{URL: address, SHA256: sha256.Sum256(sealedBytes.Bytes()), Size: int64(sealedBytes.Len()), CAFile: l.p.CAFile()}, err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func (l *lab) presign(ctx context.Context) (string, error) {
	profile, err := tenant.LoadProfile(l.t.Profile)
	if err != nil {
		return "", err
	}
	endpoint, err := url.Parse(profile.Store.Endpoint)
	if err != nil {
		return "", err
	}
	client, err := minio.New(endpoint.Host, &minio.Options{
		Creds: credentials.NewStaticV4(l.p.Store.AccessKey, l.p.Store.SecretKey, ""), Secure: true, Region: profile.Store.Region,
	})
	if err != nil {
		return "", err
	}
	signed, err := client.PresignedGetObject(ctx, trial.Bucket, fetchKey, time.Hour, nil)
	if err != nil {
		return "", err
	}
	return signed.String(), nil
}

// onHost runs a getter on the provider's host.
func (l *lab) onHost(ctx context.Context, stdin io.Reader, name string, args ...string) (time.Duration, error) {
	cmd := l.h.Command(ctx, name, args...)
	a, err := trial.Ask(cmd, stdin)
	if err == nil && a.Code != 0 {
		err = errors.New(a.String())
	}
	if err != nil {
		return 0, err
	}
	return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// agentMoves runs this program's own verb with the agent's code.
func (l *lab) agentMoves(ctx context.Context, verb string, w any) (time.Duration, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	text, err := json.Marshal(w)
	if err != nil {
		return 0, err
	}
	return l.onHost(ctx, bytes.NewReader(text), self, verb)
}

// curl fetches parts of equal size at a time, each into its own file.
func (l *lab) curl(ctx context.Context, w wanted, parts int) (time.Duration, error) {
	var config strings.Builder
	size := (w.Size + int64(parts) - 1) / int64(parts)
	for i := range int64(parts) {
		if i > 0 {
			config.WriteString("next\n")
		}
		fmt.Fprintf(&config, "silent\nshow-error\nfail\ncacert = %q\nurl = %q\noutput = %q\n", w.CAFile, w.URL, filepath.Join(w.Dir, fmt.Sprint(i)))
		if parts > 1 {
			fmt.Fprintf(&config, "range = \"%d-%d\"\n", i*size, min((i+1)*size, w.Size)-1)
		}
	}
	args := []string{"--config", "-"}
	if parts > 1 {
		args = append(args, "--parallel", "--parallel-immediate", "--parallel-max", fmt.Sprint(parts))
	}
	return l.onHost(ctx, strings.NewReader(config.String()), "curl", args...)
}
