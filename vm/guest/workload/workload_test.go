package workload_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/skip"
	"github.com/confidential-node/agent/vm/guest/workload"
)

func TestMain(m *testing.M) {
	code := 1
	if os.Args[0] != workload.Stage || workload.Enter() == nil {
		code = runTests(m)
	}
	os.Exit(code)
}

// probe is the path of the workload these tests run.
var probe string

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "workload-test-")
	if err != nil {
		panic(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	probe = filepath.Join(dir, "probe")
	build := exec.CommandContext(context.Background(), "go", "build", "-o", probe, "../testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		panic(string(out))
	}
	return m.Run()
}

// spec makes a root with the probe as its only program.
func spec(t *testing.T) workload.Spec {
	t.Helper()
	if os.Geteuid() != 0 {
		skip.Missing(t, "root")
	}
	// A folder every user may enter: t.TempDir is for its owner only.
	dir, err := os.MkdirTemp("", "workload-test-") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := workload.Spec{
		Root: filepath.Join(dir, "root"), Inputs: filepath.Join(dir, "inputs"), Results: filepath.Join(dir, "results"),
		Args: []string{"probe", "one"}, Env: []string{"PATH=/bin", "SECRET=s3cret"}, Dir: "/bin", UID: 12, GID: 34,
	}
	for _, d := range []string{dir, s.Root, s.Inputs, s.Results, s.Root + "/bin"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	program, err := os.ReadFile(probe)
	if err := errors.Join(err,
		os.WriteFile(s.Root+"/bin/probe", program, 0o755),
		os.WriteFile(s.Inputs+"/data", []byte("plaintext"), 0o444),
		os.Chown(s.Root, workload.IDShift, workload.IDShift),
		os.Chown(s.Results, workload.IDShift+s.UID, workload.IDShift+s.GID),
	); err != nil {
		t.Fatal(err)
	}
	return s
}

func start(t *testing.T, s workload.Spec, out io.Writer) *workload.Process {
	t.Helper()
	p, err := workload.Start(t.Context(), s, out)
	if refused, ok := errors.AsType[*contract.Refusal](err); ok {
		t.Fatalf("%v: %v", refused, refused.Cause)
	}
	if err != nil && strings.Contains(err.Error(), "operation not permitted") {
		skip.Missing(t, "user namespaces")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Stop(0)
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func ask(ctx context.Context, p *workload.Process, path, body string) (string, error) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return p.Dial(ctx, 8080) },
	}}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://workload"+path, bytes.NewBufferString(body))
		if err != nil {
			return "", err
		}
		resp, err := client.Do(req)
		if err != nil {
			select {
			case <-ctx.Done():
				return "", err
			case <-time.After(20 * time.Millisecond):
				continue
			}
		}
		text, err := io.ReadAll(resp.Body)
		return string(text), errors.Join(err, resp.Body.Close())
	}
}

func TestAWorkloadSeesItsFilesAndNothingElse(t *testing.T) {
	t.Parallel()
	s := spec(t)
	p := start(t, s, t.Output())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if text, err := ask(ctx, p, "/echo", "hello"); err != nil || text != "hello" {
		t.Fatalf("%q %v", text, err)
	}
	if _, err := ask(ctx, p, "/quit", ""); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		t.Fatal("the workload does not end")
	}
	if code, err := p.ExitCode(); code != 7 || err != nil {
		t.Errorf("exit code %d %v", code, err)
	}
	text, err := os.ReadFile(s.Results + "/report.json")
	if err != nil {
		t.Fatal(err)
	}
	checkReport(t, text)
}

// report runs a workload to its end and returns what it wrote.
func report(t *testing.T, s workload.Spec) []byte {
	t.Helper()
	p := start(t, s, t.Output())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := ask(ctx, p, "/quit", ""); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	text, err := os.ReadFile(s.Results + "/report.json")
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func checkReport(t *testing.T, text []byte) {
	t.Helper()
	var got map[string]string
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"args": "probe one", "secret": "s3cret", "input": "plaintext", "dir": "/bin", "uid": "12 34", "pid": "1", "links": "lo", "env": "2", "sys": "",
		"dev":  "/dev/fd /dev/full /dev/null /dev/ptmx /dev/pts /dev/random /dev/shm /dev/stderr /dev/stdin /dev/stdout /dev/tty /dev/urandom /dev/zero",
		"root": "/bin /dev /inputs /proc /results /tmp",
	} {
		if got[key] != want {
			t.Errorf("%s is %q, want %q", key, got[key], want)
		}
	}
	for _, key := range []string{"inputRW", "userns", "mount", "mknod", "sysctl", "sysrq", "kernel", "reboot"} {
		if got[key] == "<nil>" || got[key] == "" {
			t.Errorf("the workload can do: %s", key)
		}
	}
	if !strings.HasPrefix(got["host"], "error: ") {
		t.Error("the workload reaches the metadata address")
	}
	for _, line := range []string{"CapInh:\t0000000000000000", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1", "Groups:\t \n"} {
		if !strings.Contains(got["status"], line) {
			t.Errorf("/proc/self/status lacks %q:\n%s", line, got["status"])
		}
	}
}

func TestAWorkloadWithGPUsGetsTheirFilesAndTheDriversOnly(t *testing.T) {
	t.Parallel()
	s := spec(t)
	dir := filepath.Dir(s.Root)
	s.Driver, s.Devices = filepath.Join(dir, "driver"), []string{filepath.Join(dir, "nvidia0")}
	if err := errors.Join(os.MkdirAll(s.Driver+"/lib", 0o755), os.WriteFile(s.Driver+"/lib/cuda", []byte("cuda"), 0o644),
		unix.Mknod(s.Devices[0], unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), os.Chmod(s.Devices[0], 0o666)); err != nil {
		t.Fatal(err)
	}
	text := report(t, s)
	var got map[string]string
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if got["gpu"] != "0" || got["driver"] != "cuda" || got["driverRW"] == "<nil>" || !strings.Contains(got["dev"], " /dev/nvidia0 ") {
		t.Errorf("device %q, driver %q, writing there %q, /dev %q", got["gpu"], got["driver"], got["driverRW"], got["dev"])
	}
}

func TestRootOfAWorkloadHasNoPower(t *testing.T) {
	t.Parallel()
	s := spec(t)
	s.UID, s.GID = 0, 0
	if err := os.Chown(s.Results, workload.IDShift, workload.IDShift); err != nil {
		t.Fatal(err)
	}
	text := report(t, s)
	checkReport(t, bytes.Replace(text, []byte(`"uid":"0 0"`), []byte(`"uid":"12 34"`), 1))
}

func TestAWorkloadThatDoesNotListenIsEnded(t *testing.T) {
	t.Parallel()
	s := spec(t)
	s.Args = []string{"/bin/probe", "sleep"}
	out, in := io.Pipe()
	p := start(t, s, in)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "deaf\n" {
		t.Fatalf("%q %v", line, err)
	}
	p.Stop(50 * time.Millisecond)
	if code, err := p.ExitCode(); code != 128+9 || err != nil {
		t.Errorf("exit code %d %v", code, err)
	}
}

func TestAWorkloadThatCannotStartIsRefused(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(*workload.Spec) error{
		"no program": func(s *workload.Spec) error { s.Args = []string{"nothing"}; return nil },
		"no folder":  func(s *workload.Spec) error { s.Dir = "/nowhere"; return nil },
		"a link for a mount point": func(s *workload.Spec) error {
			return os.Symlink("/etc", s.Root+"/results")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := spec(t)
			if err := spoil(&s); err != nil {
				t.Fatal(err)
			}
			_, err := workload.Start(t.Context(), s, nil)
			var refused *contract.Refusal
			if !errors.As(err, &refused) || refused.Code != "guest.workload-not-started" {
				t.Errorf("%v", err)
			}
		})
	}
}
