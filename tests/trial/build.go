package trial

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// Programs are the built programs and guest images of a trial.
type Programs struct {
	// Agent, PSP, Broker, ControlPlane, Tenant and Demo are executables.
	Agent, PSP, Broker, ControlPlane, Tenant, Demo string
	// Workload is the program that runs in guests, Hostile the init of a guest
	// that attacks; both static.
	Workload, Hostile string
	// Images is the folder of the host's guest images. Image is the one
	// tenants use, Stranger's init is Hostile.
	Images, Image, Stranger string
	// Debs holds the packages that images are made from.
	Debs string
}

// ErrNoPackages means that the guest's kernel or firmware was not fetched.
var ErrNoPackages = errors.New("the guest's kernel and firmware are missing in .cache/debs: run make setup")

// static are the flags of a program whose bytes depend on its source alone.
func static() []string {
	return []string{"-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid="}
}

// Build builds everything into .cache/trial of the module that the working
// directory belongs to. It is quick when nothing has changed.
func Build(ctx context.Context) (*Programs, error) {
	root, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(root, ".cache", "trial")
	bin := func(name string) string { return filepath.Join(dir, "bin", name) }
	p := &Programs{
		Agent: bin("nodeagent"), PSP: bin("psp"), Broker: bin("keybroker"), ControlPlane: bin("controlplane"), Tenant: bin("tenant"), Demo: bin("demo"),
		Workload: bin("workload"), Hostile: bin("hostile"),
		Images: filepath.Join(dir, "images"), Image: filepath.Join(dir, "images", "emulated"), Stranger: filepath.Join(dir, "images", "hostile"),
		Debs: filepath.Join(root, ".cache", "debs"),
	}
	for _, deb := range []string{"kernel.deb", "ovmf-amdsev.deb"} {
		if _, err := os.Stat(filepath.Join(p.Debs, deb)); err != nil {
			return nil, ErrNoPackages
		}
	}
	goBuild := func(env []string, args ...string) error {
		return run(ctx, root, env, "go", append([]string{"build", "-o", filepath.Join(dir, "bin") + "/"}, args...)...)
	}
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil { //nolint:gosec // programs are public
		return nil, fmt.Errorf("building programs: %w", err)
	}
	err = errors.Join(
		goBuild(nil, "-trimpath", "-tags", "libvirt_dlopen,emulated", "./nodeagent", "./tests/emulator/psp/cmd/psp", "./tests/keybroker/cmd/keybroker",
			"./tests/controlplane/cmd/controlplane", "./tests/tenant/cmd/tenant", "./tests/demo", "./firmware/image/cmd/mkimage"),
		goBuild([]string{"CGO_ENABLED=0"}, append(static(), "-tags", "emulated", "./vm/guest", "./tests/hostile/cmd/hostile", "./tests/workload/cmd/workload")...),
	)
	if err != nil {
		return nil, err
	}
	mkimage := func(init, out string) error {
		return run(ctx, root, nil, bin("mkimage"), "--init", init, "--kernel-deb", filepath.Join(p.Debs, "kernel.deb"),
			"--firmware-deb", filepath.Join(p.Debs, "ovmf-amdsev.deb"), "--variant", contract.VariantProduction, "--emulated", "--out", out)
	}
	return p, errors.Join(mkimage(bin("guest"), p.Image), mkimage(p.Hostile, p.Stranger))
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the module: %w", err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("finding the module: run this inside the repository")
}

// run runs a tool in dir and returns what it said when it fails.
func run(ctx context.Context, dir string, env []string, name string, args ...string) error {
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &said, &said
	cmd.Env = append(append(os.Environ(), "LC_ALL=C"), env...)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running %s %s: %w: %s", filepath.Base(name), args[0], err, strings.TrimSpace(said.String()))
	}
	return nil
}
