package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/inputs"
	"github.com/confidential-node/agent/vm/guest/metadata"
	"github.com/confidential-node/agent/vm/guest/tee"
	"github.com/confidential-node/agent/vm/guest/workload"
)

// processor plays the silicon of a guest in this process.
type processor struct{ hostData [32]byte }

func (p *processor) Report(_ context.Context, data [64]byte) (tee.Attestation, error) {
	return tee.Attestation{Report: report(data, p.hostData)}, nil
}

// fakeWorkload is a workload in this process: it reads its inputs, writes
// results and serves a port, as the real one does in its namespaces.
type fakeWorkload struct {
	spec    workload.Spec
	server  *httptest.Server
	done    chan struct{}
	endOnce sync.Once
	code    int
}

func (f *fakeWorkload) end(code int) {
	f.endOnce.Do(func() {
		f.code = code
		close(f.done)
	})
}
func (f *fakeWorkload) Done() <-chan struct{}  { return f.done }
func (f *fakeWorkload) ExitCode() (int, error) { <-f.done; return f.code, nil }
func (f *fakeWorkload) Stop(time.Duration)     { f.end(143) }
func (f *fakeWorkload) Close() error           { f.server.Close(); return nil }
func (f *fakeWorkload) Dial(ctx context.Context, _ int) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", f.server.Listener.Addr().String())
}

// stage is a guest on the host: everything real but the machine's own parts.
type stage struct {
	*world
	g    *guest
	fake *fakeWorkload
	port string
	err  chan error
}

func newStage(t *testing.T) *stage {
	t.Helper()
	s := &stage{world: newWorld(t, "127.0.0.1", []byte("program")), err: make(chan error, 1)}
	host := httptest.NewServer(s.metadataHandler())
	t.Cleanup(host.Close)
	dir := t.TempDir()
	sub := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	s.fake = &fakeWorkload{done: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		var b bytes.Buffer
		_, _ = b.ReadFrom(r.Body)
		_, _ = w.Write(b.Bytes())
	})
	mux.HandleFunc("/quit", func(http.ResponseWriter, *http.Request) { s.fake.end(7) })
	s.fake.server = httptest.NewServer(mux)
	t.Cleanup(s.fake.server.Close)
	s.g = &guest{
		log: hclog.NewNullLogger(), host: metadata.At(host.URL), started: time.Now(), now: time.Now, linger: time.Millisecond,
		stopping: make(chan struct{}), memory: 1 << 30,
		configure:  func(contract.NetworkFacts) error { return nil },
		inputs:     inputs.Store{Disks: inputs.Disks{Sys: sub("sys"), Dev: sub("dev")}, Private: sub("private"), Plain: sub("inputs")},
		resultsDir: sub("results"), rootDir: sub("root"), ids: 65536,
		listen: func(ctx context.Context, _ int) (net.Listener, error) {
			l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
			if err == nil {
				s.port = l.Addr().String()
			}
			return l, err
		},
		start: func(_ context.Context, spec workload.Spec) (process, error) {
			s.fake.spec = spec
			plain, err := os.ReadFile(filepath.Join(spec.Inputs, "data"))
			return s.fake, errors.Join(err, os.WriteFile(filepath.Join(spec.Results, "report.json"), plain, 0o600), os.Symlink("/etc/passwd", filepath.Join(spec.Results, "link")))
		},
	}
	return s
}

// run starts the flow with the world as it is now.
func (s *stage) run(ctx context.Context) {
	s.t.Helper()
	s.served = s.manifestBytes()
	s.runWith(ctx, &processor{contract.HostData(s.served)})
}

func (s *stage) runWith(ctx context.Context, p *processor) {
	s.t.Helper()
	s.g.tee = p
	for serial, file := range s.writeDisks(s.g.inputs.Disks.Dev) {
		block := filepath.Join(s.g.inputs.Disks.Sys, filepath.Base(file))
		if err := errors.Join(os.Mkdir(block, 0o755), os.WriteFile(filepath.Join(block, "serial"), []byte(serial), 0o600)); err != nil {
			s.t.Fatal(err)
		}
	}
	go func() { s.err <- s.g.end(ctx, s.g.flow(ctx)) }()
}

func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func notStarted(context.Context, workload.Spec) (process, error) {
	return nil, contract.Refuse("guest.workload-not-started", "r", "m")
}

func TestAGuestGoesItsWholeWay(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	ctx := deadline(t)
	s.g.linger = 30 * time.Second
	s.run(ctx)
	s.await(ctx, "the workload", func() bool { return s.status(contract.PhaseRunning) != nil })
	s.converse(ctx, s.port)
	nonce := bytes.Repeat([]byte{9}, 32)
	s.challenges <- contract.Challenge{ID: "c1", Nonce: nonce}
	s.await(ctx, "evidence", func() bool { return s.evidence["c1"] != nil })
	e := s.verify(s.evidence["c1"], nonce)
	s.fake.end(7)
	if err := <-s.err; err != nil {
		t.Fatal(err)
	}
	var phases []contract.GuestPhase
	for _, st := range s.statuses {
		phases = append(phases, st.Phase)
	}
	if want := []contract.GuestPhase{"booted", "attested", "inputs", "image", "running", "collecting", "done"}; !slices.Equal(phases, want) {
		t.Errorf("phases %v", phases)
	}
	list, err := contract.OpenResults(s.results[contract.ResultsManifestName], e.ResultKey)
	if err != nil {
		t.Fatal(err)
	}
	if list.ExitCode != 7 || list.LaunchID != s.manifest.LaunchID || len(list.Results) != 1 || list.Results[0].Name != "report.json" || list.Results[0].Size != int64(len(s.results["report.json"])) {
		t.Errorf("results %+v", list)
	}
	if plain := s.openResult("report.json"); string(plain) != "plaintext" {
		t.Errorf("result %q", plain)
	}
	if _, ok := s.results["link"]; ok {
		t.Error("a symbolic link of the workload's was followed")
	}
	if want := []string{"PATH=/bin", "SECRET=s3cret"}; !slices.Equal(s.fake.spec.Env, want) || !slices.Equal(s.fake.spec.Args, []string{"probe", "one"}) || fmt.Sprintf("%d:%d", s.fake.spec.UID, s.fake.spec.GID) != imageUser() || s.fake.spec.Dir != "/bin" {
		t.Errorf("workload %+v", s.fake.spec)
	}
	if left, err := os.ReadDir(s.g.inputs.Private); err != nil || len(left) != 0 {
		t.Errorf("ciphertext is left: %v %v", left, err)
	}
}

func TestWhatIsNotAsTheManifestSaysIsRefused(t *testing.T) {
	t.Parallel()
	for code, spoil := range map[string]func(*stage){
		"guest.host-data-mismatch": func(s *stage) {
			s.manifest.Env["X"] = "1"
			s.served = s.manifestBytes()
			delete(s.manifest.Env, "X")
		},
		"guest.manifest-malformed":     func(s *stage) { s.served = []byte("{}") },
		"guest.gpu-unsupported":        func(s *stage) { s.manifest.GPU = &contract.GPU{Model: "H100", Count: 1} },
		"guest.compliance-unsupported": func(s *stage) { s.manifest.Compliance = "hipaa" },
		"guest.recipient-malformed":    func(s *stage) { s.manifest.Results[0].Recipients = []string{"nobody"} },
		"guest.out-of-memory":          func(s *stage) { s.g.memory = 400 },
		"guest.broker-refused":         func(s *stage) { s.refuse = contract.Refuse("broker.digest", "ask the tenant", "another launch digest") },
		"guest.attest-unpinned":        func(s *stage) { s.manifest.Broker.SPKISHA256 = strings.Repeat("00", 32) },
		"guest.input-missing":          func(s *stage) { delete(s.disks, "data") },
		"guest.input-digest-mismatch":  func(s *stage) { s.disks["data"][5] ^= 1 },
		"guest.input-key":              func(s *stage) { s.resources["tenant/keys/data"] = []byte("no key") },
		"guest.image-refused":          func(s *stage) { s.manifest.Image = s.manifest.Image[:len(s.manifest.Image)-2] + "00" },
		"guest.image-unpinned":         func(s *stage) { s.manifest.Registry.CAPEM = otherCA(s.t) },
		"guest.secret-malformed":       func(s *stage) { s.resources["tenant/env/secret"] = []byte("a\x00b") },
		"guest.workload-not-started":   func(s *stage) { s.g.start = notStarted },
		"guest.results-undelivered":    func(s *stage) { s.deaf = true },
		"guest.stopped":                func(s *stage) { s.g.stop() },
	} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			s := newStage(t)
			ctx := deadline(t)
			spoil(s)
			text := s.manifestBytes()
			if s.served == nil {
				s.served = text
			}
			p := &processor{contract.HostData(text)}
			if code == "guest.manifest-malformed" {
				p.hostData = contract.HostData(s.served)
			}
			s.fake.end(0)
			s.runWith(ctx, p)
			err := <-s.err
			var refused *contract.Refusal
			if !errors.As(err, &refused) || refused.Code != code || refused.Remedy == "" {
				t.Fatalf("%v", err)
			}
			told := s.status(contract.PhaseFailed)
			if told == nil || told.Refusal.Code != code {
				t.Errorf("the host was told %+v", told)
			}
			if code == "guest.broker-refused" && !strings.Contains(refused.Message, "another launch digest (broker.digest)") {
				t.Errorf("the broker's reason is lost: %s", refused.Message)
			}
		})
	}
}
