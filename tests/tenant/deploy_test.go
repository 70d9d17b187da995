package tenant

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// options deploys one sealed input and one result.
func (w *world) options(image string) DeployOptions {
	return DeployOptions{
		Name: "job", Image: image, Confidential: true, AttestationRequired: true,
		Datasets: []string{"file://" + w.file("records.csv", plaintext)}, Results: []string{"report.json"},
		SecretEnv: map[string]string{"TOKEN": w.file("token", "canary-token")}, Env: map[string]string{"MODE": "fast"},
		Ports: []int{8000}, Command: []string{"/app", "--once"},
	}
}

func (w *world) deploy() *Deployment {
	w.t.Helper()
	image, _ := w.push(0)
	d, err := w.tenant.Deploy(w.t.Context(), w.options(image))
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

func TestDeploySendsOnlyCiphertextAndPinsEverything(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := w.deploy()
	if d.Stage != StageLaunched || d.GuestID == "" || !strings.Contains(d.Image, "@sha256:") {
		t.Fatalf("%+v", d)
	}
	g := w.guest()
	m, err := contract.ParseManifest(g.command.GetManifest())
	if err != nil {
		t.Fatal(err)
	}
	if m.LaunchID != d.LaunchID || m.Image != d.Image || m.Env["MODE"] != "fast" || m.SecretEnv["TOKEN"] != "kbs:///job/env/TOKEN" || len(m.Inputs) != 1 || m.Inputs[0].Name != "records.csv" {
		t.Fatalf("%+v", m)
	}
	blob := g.command.GetInputs()[0]
	sealed := g.http(t, http.MethodGet, blob.GetUrl(), nil)
	if int64(len(sealed)) != m.Inputs[0].Size || hex.EncodeToString(blob.GetSha256()) != m.Inputs[0].SHA256 {
		t.Fatal("command and manifest do not name the uploaded bytes")
	}
	key, err := readKeyFile(w.tenant.state.path("job", "data.key"))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := age.Decrypt(bytes.NewReader(sealed), key.identity)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(plain); err != nil || string(got) != plaintext {
		t.Fatalf("%q %v", got, err)
	}
	s, err := w.tenant.Status(t.Context(), "job")
	if err != nil || len(s.Broker.Resources) != 2 || s.Broker.MaxReleases != 1 || s.State != "running" || len(s.Problems) != 0 {
		t.Fatalf("%+v %v", s, err)
	}
	for _, canary := range []string{plaintext, "canary-token", string(key.bytes), storeKey} {
		if w.uploads.contains(canary) || bytes.Contains(g.command.GetManifest(), []byte(canary)) {
			t.Errorf("%.20q left the tenant", canary)
		}
	}
	if leftovers, err := filepath.Glob(filepath.Join(w.profile.StateDir, "sealing-*")); err != nil || len(leftovers) != 0 {
		t.Errorf("leftovers %v %v", leftovers, err)
	}
	if info, err := os.Stat(w.profile.StateDir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("state folder %v %v", info.Mode(), err)
	}
}

func TestAServerNameIsAskedForAndItsFeatureDemanded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	o := w.options(image)
	o.Ports, o.ServerNames = []int{8000, 8001}, map[int]string{8001: "job.guests.example"}
	if _, err := w.tenant.Deploy(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	ports := w.guest().command.GetPorts()
	if len(ports) != 2 || ports[0].GetServerName() != "" || ports[1].GetServerName() != "job.guests.example" || ports[1].GetGuestPort() != 8001 {
		t.Errorf("asked for %v", ports)
	}
	if !slices.Contains(o.features(), api.FeaturePortsServerName) {
		t.Error("a node without shared port would take it")
	}
	for _, pairs := range [][]string{{"8000"}, {"x=a.b"}, {"8000="}, {"8000=a.b", "8000=c.d"}} {
		if _, err := ParseServerNames(pairs); code(err) != codeUsage {
			t.Errorf("%q: %v", pairs, err)
		}
	}
	if names, err := ParseServerNames([]string{"8000=Job.Guests.Example"}); err != nil || names[8000] != "job.guests.example" {
		t.Errorf("%v %v", names, err)
	}
}

func TestPlaintextInTheStoreIsSealedBeforeItGoesBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.plant("raw/data.bin", plaintext)
	image, _ := w.push(0)
	o := w.options(image)
	o.Datasets = []string{"data=s3://" + bucket + "/raw/data.bin"}
	d, err := w.tenant.Deploy(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if d.Inputs[0].Key == "raw/data.bin" || d.Inputs[0].Name != "data" || w.uploads.contains(plaintext) {
		t.Fatalf("%+v", d.Inputs)
	}
}

func TestSealedObjectIsUsedAsItIs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, kind := range []KeyKind{KeyX25519, KeyHybrid} {
		raw, err := Keygen(kind)
		if err != nil {
			t.Fatal(err)
		}
		keyFile := filepath.Join(t.TempDir(), "key")
		if err := WriteKey(keyFile, raw); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(t.TempDir(), "model.age")
		sealed, err := SealFile("-", out, "file://"+keyFile, strings.NewReader(plaintext), w.steps)
		if err != nil {
			t.Fatal(err)
		}
		object, err := w.tenant.Upload(t.Context(), out, bucket+"/models/model.age")
		if err != nil || object.SHA256 != sealed.SHA256 {
			t.Fatalf("%+v %v", object, err)
		}
		// A new state folder knows nothing of the upload and reads it once.
		for _, state := range []string{w.profile.StateDir, filepath.Join(t.TempDir(), "other")} {
			w.profile.StateDir = state
			w.reopen()
			image, _ := w.push(0)
			o := w.options(image)
			o.Datasets, o.Models, o.EncryptionKey, o.Replace = nil, []string{"encrypted://" + bucket + "/models/model.age"}, "file://"+keyFile, true
			d, err := w.tenant.Deploy(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if in := d.Inputs[0]; in.SHA256 != sealed.SHA256 || in.Size != sealed.Size || in.Name != "model" || in.Key != "models/model.age" {
				t.Fatalf("%+v", in)
			}
		}
	}
}

func TestTagKeepsTheDigestOfDeployment(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := w.deploy()
	tag, moved := w.push(3) // the tag moves
	if strings.HasSuffix(d.Image, moved.String()) {
		t.Fatal("the image did not change")
	}
	if _, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{}); err != nil {
		t.Fatal(err)
	}
	v, err := w.tenant.VerifyDeployment("job", VerifyOptions{ExpectedImage: tag})
	if err != nil || !v.OK() {
		t.Fatalf("%+v %v", v, err)
	}
	if _, err := w.tenant.VerifyDeployment("job", VerifyOptions{ExpectedImage: "elsewhere/app:1"}); code(err) != "tenant.image-unpinned" {
		t.Fatal(err)
	}
}

func TestAnImageOfSeveralPlatformsIsPinnedToOneOfThem(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	child, err := mutate.Config(empty.Image, v1.Config{Cmd: []string{"amd64"}})
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{
		Add: child, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}},
	})
	digest, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref := strings.TrimPrefix(w.registry.URL, "https://") + "/team/app@" + digest.String()
	parsed, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(parsed, index, remote.WithTransport(w.registry.Client().Transport)); err != nil {
		t.Fatal(err)
	}
	d, err := w.tenant.Deploy(t.Context(), w.options(ref))
	if err != nil {
		t.Fatal(err)
	}
	if want, err := child.Digest(); err != nil || !strings.HasSuffix(d.Image, want.String()) {
		t.Fatalf("deployed %s, %v", d.Image, err)
	}
	v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{ExpectedImage: ref})
	if err != nil || !v.OK() {
		t.Fatalf("the reference that was deployed is not the one expected: %+v %v", v.Failed(), err)
	}
}

func code(err error) string {
	if err == nil {
		return ""
	}
	return contract.AsRefusal(err).Code
}

func TestForbiddenDeploymentsEndInTheirRefusal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	gpg := w.file("model.gpg", "-----BEGIN PGP MESSAGE-----\n\nhQEM\n")
	for key, body := range map[string]string{"model.gpg": "\x85\x01\x0c\x03rest of a session key packet", "armoured": "-----BEGIN PGP MESSAGE-----\n", "plain": plaintext, "sealed.age": "age-encryption.org/v1\n"} {
		w.plant(key, body)
	}
	key := w.file("k", string(mustKey(t)))
	other, err := parseKey(mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	var sealed strings.Builder
	if _, err := Seal(&sealed, strings.NewReader(plaintext), other.recipient); err != nil {
		t.Fatal(err)
	}
	w.plant("other.age", sealed.String())
	exposed := w.file("exposed", string(mustKey(t)))
	if err := os.Chmod(exposed, 0o644); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name, code string
		change     func(*DeployOptions)
	}{
		{"hsm", "tenant.key-management-unsupported", func(o *DeployOptions) { o.KeyManagement = "hsm" }},
		{"not confidential", "tenant.confidential-mandatory", func(o *DeployOptions) { o.Confidential = false }},
		{"no attestation", "tenant.attestation-mandatory", func(o *DeployOptions) { o.AttestationRequired = false }},
		{"unknown key management", codeUsage, func(o *DeployOptions) { o.KeyManagement = "cloud" }},
		{"a server name for no port", codeUsage, func(o *DeployOptions) { o.ServerNames = map[int]string{9: "a.example"} }},
		{"a server name that is none", "network.name-malformed", func(o *DeployOptions) { o.ServerNames = map[int]string{8000: "10.0.0.1"} }},
		{"bad name", codeUsage, func(o *DeployOptions) { o.Name = "../x" }},
		{"no image", codeUsage, func(o *DeployOptions) { o.Image = "" }},
		{"count without gpu", codeUsage, func(o *DeployOptions) { o.GPUCount = 4 }},
		{"unknown image", "tenant.image-not-found", func(o *DeployOptions) { o.Image = strings.Replace(image, "app:1", "none:1", 1) }},
		{"foreign registry", "tenant.registry-mismatch", func(o *DeployOptions) { o.Image = "docker.io/library/app:1" }},
		{"gpg file sealed as dataset", codeFormatGPG, func(o *DeployOptions) {
			o.Datasets = []string{"encrypted://" + bucket + "/model.gpg"}
			o.EncryptionKey = "file://" + key
		}},
		{"armoured gpg", codeFormatGPG, func(o *DeployOptions) {
			o.Models = []string{"encrypted://" + bucket + "/armoured"}
			o.EncryptionKey = "file://" + key
		}},
		{"plaintext called encrypted", codeNotSealed, func(o *DeployOptions) {
			o.Models = []string{"encrypted://" + bucket + "/plain"}
			o.EncryptionKey = "file://" + key
		}},
		{"sealed input called plain", codeAlreadySealed, func(o *DeployOptions) { o.Datasets = []string{"s3://" + bucket + "/sealed.age"} }},
		{"sealed file called plain", codeAlreadySealed, func(o *DeployOptions) {
			o.Models = []string{"file://" + w.file("m.age", "age-encryption.org/v1\n-> X25519 a\n")}
		}},
		{"armoured age file", codeAlreadySealed, func(o *DeployOptions) {
			o.Models = []string{"file://" + w.file("m.txt", "-----BEGIN AGE ENCRYPTED FILE-----\n")}
		}},
		{"gpg file to be sealed here", codeFormatGPG, func(o *DeployOptions) { o.Models = []string{"file://" + gpg} }},
		{"armoured gpg to be sealed here", codeFormatGPG, func(o *DeployOptions) { o.Datasets = []string{"s3://" + bucket + "/armoured"} }},
		{"sealed for another key", "tenant.key-mismatch", func(o *DeployOptions) {
			o.Models, o.EncryptionKey = []string{"encrypted://" + bucket + "/other.age"}, "file://"+key
		}},
		{"encrypted without key", codeUsage, func(o *DeployOptions) { o.Models = []string{"encrypted://" + bucket + "/plain"} }},
		{"missing object", "tenant.object-not-found", func(o *DeployOptions) {
			o.Models = []string{"encrypted://" + bucket + "/none"}
			o.EncryptionKey = "file://" + key
		}},
		{"odd source", codeUsage, func(o *DeployOptions) { o.Models = []string{"http://x/y"} }},
		{"same input twice", codeUsage, func(o *DeployOptions) { o.Models = o.Datasets }},
		{"key others can read", "tenant.key-exposed", func(o *DeployOptions) { o.EncryptionKey = "file://" + exposed }},
		{"key that is none", "tenant.key-unsupported", func(o *DeployOptions) { o.EncryptionKey = "file://" + gpg }},
		{"key by another scheme", codeUsage, func(o *DeployOptions) { o.EncryptionKey = "hsm://slot/1" }},
		{"unknown node", "control.node-not-found", func(o *DeployOptions) { o.Node = "node-9" }},
		{"bad port", codeUsage, func(o *DeployOptions) { o.Ports = []int{70000} }},
		{"bad result name", codeUsage, func(o *DeployOptions) { o.Results = []string{"../x"} }},
	}
	for _, test := range tests {
		o := w.options(image)
		test.change(&o)
		_, err := w.tenant.Deploy(t.Context(), o)
		refused := contract.AsRefusal(err)
		if err == nil || refused.Code != test.code || refused.Remedy == "" {
			t.Errorf("%s: %v, want %s", test.name, err, test.code)
		}
		if _, err := os.Stat(w.tenant.state.path("job")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: left a deployment behind", test.name)
		}
	}
	if len(w.node.guests) != 0 || w.uploads.contains(plaintext+"x") {
		t.Error("something was started")
	}
}

func mustKey(t *testing.T) []byte {
	t.Helper()
	raw, err := Keygen(KeyX25519)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestGPUsThatCannotBeConfidentialAreRefusedEarly(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, c := range []struct {
		model string
		count int
	}{{"A100", 1}, {"H100", 4}} {
		o := w.options("x")
		o.GPU, o.GPUCount = c.model, c.count
		_, err := w.tenant.Deploy(t.Context(), o)
		if refused := contract.AsRefusal(err); err == nil || !strings.HasPrefix(refused.Code, "gpu.") || refused.Remedy == "" {
			t.Errorf("%d %s: %v", c.count, c.model, err)
		}
	}
	image, _ := w.push(0)
	o := w.options(image)
	o.GPU = "H100"
	d, err := w.tenant.Deploy(t.Context(), o)
	if err != nil || d.GPU.Count != 1 {
		t.Fatalf("one H100: %v", err)
	}
	v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{ExpectedGPU: "B200"})
	if err != nil || v.OK() || !failed(v, "gpu-demand") {
		t.Fatalf("another GPU than expected: %v", err)
	}
}

func failed(v *Verdict, name string) bool {
	for _, c := range v.Checks {
		if c.Name == name && c.Status == "fail" {
			return true
		}
	}
	return false
}

func TestComplianceAndAuditAreDemandedFromTheNode(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	o := w.options(image)
	o.Compliance, o.AuditLogging = "hipaa", true
	if _, err := w.tenant.Deploy(t.Context(), o); code(err) != api.CodeFeatureUnknown || ExitCode(err) != ExitPrecondition {
		t.Fatal(err)
	}
	if w.launches() != 0 || w.tenant.Known("job") {
		t.Fatal("a launch the node refused left keys or a deployment behind")
	}
	w.node.features = map[string]bool{"compliance.hipaa": true, "audit.log": true}
	if _, err := w.tenant.Deploy(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if m, err := contract.ParseManifest(w.guest().command.GetManifest()); err != nil || m.Compliance != "hipaa" {
		t.Fatal(err)
	}
	if g, err := w.tenant.WaitRunning(t.Context(), "job"); err != nil || g.Status != api.GuestStatus_GUEST_STATUS_RUNNING {
		t.Fatal(err)
	}
}

func TestNamesAreUsedOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.deploy()
	o := w.options(first.RequestedImage)
	_, err := w.tenant.Deploy(t.Context(), o)
	if code(err) != codeNameInUse || ExitCode(err) != ExitConflict {
		t.Fatal(err)
	}
	o.Replace = true
	second, err := w.tenant.Deploy(t.Context(), o)
	if err != nil || second.LaunchID == first.LaunchID {
		t.Fatal(err)
	}
	names, err := w.tenant.List()
	if err != nil || len(names) != 2 {
		t.Fatalf("%v %v", names, err)
	}
	o.Compliance = "hipaa"
	if _, err := w.tenant.Deploy(t.Context(), o); code(err) != api.CodeFeatureUnknown {
		t.Fatal(err)
	}
	if d, err := w.tenant.state.load("job"); err != nil || d.LaunchID != second.LaunchID {
		t.Fatalf("a refused replacement took the name of what runs: %+v %v", d, err)
	}
	if names, err := w.tenant.List(); err != nil || len(names) != 2 {
		t.Fatalf("%v %v", names, err)
	}
}

// launches counts what the broker has registered.
func (w *world) launches() int {
	w.t.Helper()
	entries, err := os.ReadDir(filepath.Join(w.dir, "broker", "launches"))
	if err != nil {
		w.t.Fatal(err)
	}
	return len(entries)
}

func TestASilentNodeMayStillAnswer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.node.silent, w.tenant.answerWithin = true, time.Millisecond
	if d := w.deploy(); d.Stage != StageLaunched || w.launches() != 1 {
		t.Fatalf("%+v, %d launches", d, w.launches())
	}
	if !slices.ContainsFunc(w.steps.text, func(s string) bool { return strings.Contains(s, "has not answered yet") }) {
		t.Fatalf("nothing says so: %q", w.steps.text)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	w.tenant.answerWithin = time.Hour
	err := w.tenant.answer(ctx, &plan{d: &Deployment{Name: "job", GuestID: w.guest().state.GuestID}})
	if ExitCode(err) != ExitTimeout {
		t.Fatalf("the user's own timeout: %v", err)
	}
}

func TestALaunchThatFailsAtOnceIsKeptToLookAt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.node.status = api.GuestStatus_GUEST_STATUS_FAILED
	image, _ := w.push(0)
	if _, err := w.tenant.Deploy(t.Context(), w.options(image)); code(err) != "tenant.guest-failed" {
		t.Fatal(err)
	}
	if !w.tenant.Known("job") {
		t.Fatal("its deployment was forgotten")
	}
}

func TestKeysThatCannotBeWithdrawnAreNotForgotten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	w.node.fail = contract.Refuse("control.full", "wait", "no room")
	w.node.onLaunch = w.broker.Close
	_, err := w.tenant.Deploy(t.Context(), w.options(image))
	if code(err) != "control.full" || !errors.Is(err, brokeradmin.ErrUnreachable) || !strings.Contains(err.Error(), "withdrawing the keys of launch ") {
		t.Fatal(err)
	}
	if !w.tenant.Known("job") {
		t.Fatal("the name of a launch whose keys are out is gone")
	}
}

func TestRefusedLaunchWithdrawsTheKeysButSilenceDoesNot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	w.node.fail = contract.Refuse("control.full", "wait", "no room")
	if _, err := w.tenant.Deploy(t.Context(), w.options(image)); code(err) != "control.full" {
		t.Fatal(err)
	}
	if w.launches() != 0 {
		t.Fatal("the broker still holds keys of a refused launch")
	}
	w.node.fail = errors.New("connection lost")
	if _, err := w.tenant.Deploy(t.Context(), w.options(image)); err == nil || w.launches() != 1 {
		t.Fatalf("%v, %d launches", err, w.launches())
	}
	if !w.tenant.Known("job") {
		t.Fatal("a launch that may have happened was forgotten")
	}
}

func TestChangedImageFilesAreNotPredicted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	image, _ := w.push(0)
	if err := os.WriteFile(filepath.Join(w.profile.ImageDir, "kernel"), []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.tenant.Deploy(t.Context(), w.options(image)); code(err) != "tenant.image-files-differ" {
		t.Fatal(err)
	}
}
