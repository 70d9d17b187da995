package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/confidential-node/agent/tests/trial"
)

// What must never be seen outside the tenant and the guest.
const (
	canaryModel  = "CANARY-MODEL-WEIGHTS-5f1c"
	canaryToken  = "CANARY-API-TOKEN-77aa"
	modelFile    = "model.bin"
	recordsFile  = "records.csv"
	workloadPort = "8000"
	// logLines of each log are shown when the demo fails.
	logLines = 40
)

// show is one run of the main job.
type show struct {
	*story
	programs *trial.Programs
	p        *trial.Platform
	h        *trial.Host
	t        *trial.Tenant
	// guest is the guest's id, digest its launch digest, image the workload's.
	guest, digest, image string
}

func run(ctx context.Context, s *story) (err error) {
	d := &show{story: s}
	s.say("A provider's host and the outside live in namespaces of their own; no packet leaves this machine.")
	s.say("EMULATED: the security processor and memory encryption. Everything else is the real thing.")
	defer func() {
		if d.p == nil {
			return
		}
		if err != nil {
			for name, text := range d.p.LogTails(logLines) {
				d.say("\n%s:\n%s", name, text)
			}
		}
		err = errors.Join(err, d.p.Close())
	}()
	for _, c := range []struct {
		title string
		do    func(context.Context) error
	}{
		{"Programs and the measured guest image", d.build},
		{"The outside: control plane, object store, registry", d.outside},
		{"A provider's host: libvirtd, security processor, nodeagent", d.host},
		{"The tenant: a key, a sealed model, ciphertext in the store", d.seal},
		{"Deploy: signed launch, measured boot, attestation, key release", d.deploy},
		{"An attested answer: TLS that ends in the guest", d.call},
		{"Evidence, judged by anybody with nodeagent verify", d.verify},
		{"The end: sealed results, signed by the attested guest", d.results},
		{"What the host has seen", d.canaries},
		{"Nothing is left on the host", d.clean},
	} {
		if err := s.chapter(c.title, func() error { return c.do(ctx) }); err != nil {
			return err
		}
	}
	s.say("\nThe whole way took %.1f s.", s.elapsed())
	return nil
}

func (d *show) build(ctx context.Context) (err error) {
	if d.programs, err = trial.Build(ctx); err != nil {
		return err
	}
	raw, err := os.ReadFile(filepath.Join(d.programs.Image, "image.json"))
	if err != nil {
		return err
	}
	var image struct {
		Cmdline                  string
		Firmware, Kernel, Initrd struct{ SHA256, Source string }
	}
	if err := json.Unmarshal(raw, &image); err != nil {
		return err
	}
	d.say("firmware  %.16s…  %s\nkernel    %.16s…  %s\ninitrd    %.16s…  %s", image.Firmware.SHA256, image.Firmware.Source,
		image.Kernel.SHA256, image.Kernel.Source, image.Initrd.SHA256, image.Initrd.Source)
	return nil
}

func (d *show) outside(ctx context.Context) (err error) {
	if d.p, err = trial.New(ctx, d.programs); err != nil {
		return err
	}
	d.image = d.p.Image
	d.say("control plane  %s\nworkload       %s", d.p.Control.NATSURL(), d.image)
	return nil
}

func (d *show) host(ctx context.Context) (err error) {
	if d.h, err = d.p.AddHost(ctx, trial.HostOptions{}); err != nil {
		return err
	}
	if err := d.agent(ctx, 0, "status"); err != nil {
		return err
	}
	_, err = d.run(d.controlplane(ctx, "nodes"))
	return err
}

func (d *show) seal(ctx context.Context) (err error) {
	if d.t, err = d.p.AddTenant(ctx, "tenant", trial.TenantOptions{}); err != nil {
		return err
	}
	model := append([]byte(canaryModel), make([]byte, 8<<20)...)
	for name, data := range map[string][]byte{modelFile: model, recordsFile: []byte("id,value\n1,42\n"), "token": []byte(canaryToken)} {
		if err := os.WriteFile(filepath.Join(d.t.Dir, name), data, 0o600); err != nil {
			return err
		}
	}
	for _, args := range [][]string{
		{"keygen", "data.key"},
		{"seal", modelFile, "--encryption-key", "file://data.key"},
		{"upload", modelFile + ".age", "--to", trial.Bucket + "/" + modelFile + ".age"},
	} {
		if _, err := d.run(d.t.Command(ctx, args...)); err != nil {
			return err
		}
	}
	return nil
}

func (d *show) deploy(ctx context.Context) error {
	a, err := d.run(d.t.Command(ctx, "deploy", "confidential", "--name", "demo", "--image", trial.Repository+":1", "--confidential", "--attestation-required",
		"--model", "encrypted://"+trial.Bucket+"/"+modelFile+".age", "--encryption-key", "file://data.key", "--key-management", "file",
		"--dataset", "file://"+recordsFile, "--secret-env", "API_TOKEN=token", "--port", workloadPort, "--result", "summary.json", "--command", "/workload", "--command", "serve",
		"--memory", "1024", "--wait-running"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(a.Stdout) {
		switch key, value, _ := strings.Cut(line, " "); key {
		case "guest":
			d.guest = strings.TrimSpace(value)
		case "launch":
			if digest, ok := strings.CutPrefix(strings.TrimSpace(value), "digest"); ok {
				d.digest = strings.TrimSpace(digest)
			}
		}
	}
	return d.agent(ctx, 0, "status")
}

func (d *show) call(ctx context.Context) error {
	if _, err := d.run(d.t.Command(ctx, "confidential", "attest", "demo", "--expected-image", trial.Repository+":1")); err != nil {
		return err
	}
	a, err := d.run(d.t.Command(ctx, "confidential", "call", "demo", "/v1/infer", "-X", "POST", "-d", "What is confidential?"))
	if err == nil && !strings.Contains(a.Stdout, "answer") {
		err = errors.New("the workload gave no answer")
	}
	return err
}

func (d *show) verify(ctx context.Context) error {
	nonce := make([]byte, 32)
	if _, err := rand.Read(nonce); err != nil {
		return err
	}
	file, root := filepath.Join(d.p.Dir, "evidence.json"), d.h.RootFile()
	challenge := hex.EncodeToString(nonce)
	if _, err := d.run(d.controlplane(ctx, "evidence", d.guest, "--nonce", challenge, "--out", file)); err != nil {
		return err
	}
	judge := func(wanted int, more ...string) error {
		args := append([]string{"verify", file, "--expected-image", d.image, "--expected-digest", d.digest, "--nonce", challenge}, more...)
		return d.agent(ctx, wanted, args...)
	}
	if err := judge(0, "--allow-emulated-root", root, "--allow-development-image"); err != nil {
		return err
	}
	d.say("And as a verifier of real silicon sees it, who must refuse:")
	return judge(5)
}

func (d *show) results(ctx context.Context) error {
	for _, args := range [][]string{
		{"confidential", "call", "demo", "/quit", "-X", "POST"},
		{"wait", "demo"},
		{"results", "demo", "--out", "opened"},
	} {
		if _, err := d.run(d.t.Command(ctx, args...)); err != nil {
			return err
		}
	}
	raw, err := os.ReadFile(filepath.Join(d.t.Dir, "opened", "summary.json"))
	if err != nil {
		return err
	}
	var summary struct {
		Served int
		Text   string
		Env    map[string]string
	}
	if err := json.Unmarshal(raw, &summary); err != nil {
		return err
	}
	if summary.Served != 1 || summary.Env["API_TOKEN"] != canaryToken || !strings.Contains(summary.Text, canaryModel) {
		return fmt.Errorf("the workload saw something else: %s", raw)
	}
	d.say("the workload saw the model and the secret, and answered %d prompt", summary.Served)
	if _, err := d.run(d.t.Command(ctx, "status", "demo")); err != nil {
		return err
	}
	_, err = d.run(d.controlplane(ctx, "events"))
	return err
}

// canaries searches everything the host and the platform hold for what only
// tenant and guest may know. QEMU's memory is exempt: under emulation nothing
// encrypts it.
func (d *show) canaries(ctx context.Context) error {
	key, err := os.ReadFile(filepath.Join(d.t.Dir, "data.key"))
	if err != nil {
		return err
	}
	found, err := d.p.Search(ctx, [][]byte{[]byte(canaryModel), []byte(canaryToken), bytes.TrimSpace(key)})
	if err != nil {
		return err
	}
	for _, place := range found.Places {
		d.say("%s", place)
	}
	if len(found.Hits) > 0 {
		return fmt.Errorf("plaintext or a key was found in %v", found.Hits)
	}
	d.say("none of them holds the model, the secret or the key")
	d.say("not searched: the guest's own memory. On silicon it is encrypted; under emulation QEMU's is readable.")
	return nil
}

func (d *show) clean(ctx context.Context) error {
	if err := d.h.WaitClean(ctx); err != nil {
		return err
	}
	d.say("no domain, link, process, boot copy or spool; ciphertext stays in the cache until it is evicted")
	return nil
}

// controlplane is a verb of the control plane's program.
func (d *show) controlplane(ctx context.Context, args ...string) *exec.Cmd {
	return d.p.ControlCommand(ctx, args...)
}

// agent runs a verb of the agent's program, on its host.
func (d *show) agent(ctx context.Context, wanted int, args ...string) error {
	_, err := d.runAs(d.h.AgentCommand(ctx, args...), wanted, append([]string{"nodeagent"}, args...)...)
	return err
}
