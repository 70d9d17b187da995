package tenant

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/rim/rimtest"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
)

// rented deploys "job" with one H100, limited to a PDI; the node gives it a
// GPU of the config. The profile has the manifests that such a GPU fits.
func rented(t *testing.T, c spdmtest.Config) *world {
	t.Helper()
	w := newWorld(t)
	authority, err := spdmtest.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	g, err := authority.NewGPU(c)
	if err != nil {
		t.Fatal(err)
	}
	driver, vbios, err := rimtest.For(authority, g)
	if err != nil {
		t.Fatal(err)
	}
	w.profile.RIMDir = filepath.Join(w.dir, "rims")
	if err := os.Mkdir(w.profile.RIMDir, 0o700); err != nil {
		t.Fatal(err)
	}
	w.file("rims/driver", string(driver))
	w.file("rims/vbios", string(vbios))
	w.profile.Verify.AllowEmulatedRoots = append(w.profile.Verify.AllowEmulatedRoots, w.file("gpu-root.pem", string(authority.RootPEM())))
	w.reopen()
	image, _ := w.push(0)
	o := w.options(image)
	o.GPU, o.GPUPDIs = "H100", []string{"431d480fe5e87274"}
	if _, err := w.tenant.Deploy(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	w.guest().GPUs = []*spdmtest.GPU{g}
	return w
}

func TestARentedGPUHasToProveItself(t *testing.T) {
	t.Parallel()
	w := rented(t, spdmtest.Config{PDI: 0x431d480fe5e87274})
	v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{})
	if err != nil || !v.OK() || len(v.GPUs) != 1 || v.GPUs[0].PDI != "0x431d480fe5e87274" {
		t.Fatalf("%v %+v %+v", err, v.Failed(), v.GPUs)
	}
	if !slices.ContainsFunc(v.Checks, func(c contract.Check) bool { return c.Name == "gpu-measurements" && c.Status == contract.Pass }) {
		t.Errorf("%+v", v.Checks)
	}
	for name, c := range map[string]struct {
		check string
		o     VerifyOptions
	}{
		"another model":  {"gpu-model", VerifyOptions{ExpectedGPU: "B200"}},
		"more of them":   {"gpu-count", VerifyOptions{ExpectedGPU: "H100:8"}},
		"another demand": {"gpu-demand", VerifyOptions{ExpectedGPU: "H200"}},
		"another device": {"gpu-allowed", VerifyOptions{ExpectedPDIs: []string{"2921ce551e4eeda3"}}},
	} {
		if v, err := w.tenant.VerifyDeployment("job", c.o); err != nil || !failed(v, c.check) {
			t.Errorf("%s: %v, %+v", name, err, v)
		}
	}
	for name, o := range map[string]VerifyOptions{"GPUs": {ExpectedGPU: "A100"}, "PDIs": {ExpectedPDIs: []string{"1"}}, "manifests": {RIMDir: w.dir}, "folder": {RIMDir: "none"}} {
		if v, err := w.tenant.VerifyDeployment("job", o); err == nil {
			t.Errorf("%s that cannot be read: %+v", name, v)
		}
	}
	w.profile.RIMDir = ""
	w.reopen()
	if v, err := w.tenant.VerifyDeployment("job", VerifyOptions{}); err != nil || !failed(v, "gpu-measurements") {
		t.Errorf("no manifests: %v, %+v", err, v)
	}
	if v, err := w.tenant.VerifyDeployment("job", VerifyOptions{AllowUnmeasuredGPUs: true}); err != nil || !v.OK() {
		t.Errorf("unmeasured, allowed: %v, %+v", err, v)
	}
}

func TestAnotherGPUThanTheRentedOneDoesNotHold(t *testing.T) {
	t.Parallel()
	for check, c := range map[string]spdmtest.Config{
		"gpu-allowed":      {PDI: 0x2921ce551e4eeda3},
		"gpu-measurements": {PDI: 0x431d480fe5e87274, Mode: spdmtest.DevTools},
	} {
		w := rented(t, c)
		if v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{}); err != nil || !failed(v, check) {
			t.Errorf("%s: %v, %+v", check, err, v)
		}
	}
	w := rented(t, spdmtest.Config{PDI: 0x431d480fe5e87274})
	w.guest().GPUs = nil
	if v, err := w.tenant.Attest(t.Context(), "job", VerifyOptions{}); err != nil || !failed(v, "gpu-evidence") {
		t.Errorf("none: %v, %+v", err, v)
	}
}

func TestTheBrokerIsToldWhichGPUsCount(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, change := range map[string]func(*DeployOptions){
		"PDIs of no GPU": func(o *DeployOptions) { o.GPUPDIs = []string{"431d480fe5e87274"} },
		"no PDI":         func(o *DeployOptions) { o.GPU, o.GPUPDIs = "H100", []string{"431d"} },
	} {
		o := w.options("x")
		change(&o)
		if _, err := w.tenant.Deploy(t.Context(), o); err == nil {
			t.Errorf("%s: deployed", name)
		}
	}
	image, _ := w.push(0)
	o := w.options(image)
	o.GPU, o.GPUPDIs = "H100", []string{"431d480fe5e87274"}
	d, err := w.tenant.Deploy(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := os.ReadFile(filepath.Join(w.dir, "broker", "launches", d.LaunchID+".json"))
	if err != nil || !slices.Contains(d.GPUPDIs, "431d480fe5e87274") || !strings.Contains(string(stored), `"gpu_pdis":["431d480fe5e87274"]`) {
		t.Errorf("%v %s", err, stored)
	}
}
