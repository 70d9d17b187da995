package tenant

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"os"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/evidence"
	"github.com/confidential-node/agent/gpu/spdm"
)

// checkGPUs refuses GPUs that no guest could have.
func (o *DeployOptions) checkGPUs() error {
	if o.GPU == "" && (o.GPUCount > 0 || len(o.GPUPDIs) > 0) {
		return Usage("--count and --gpu-pdi need --gpu")
	}
	if _, err := spdm.ParsePDIs(o.GPUPDIs); err != nil {
		return Usage("--gpu-pdi: %v", err)
	}
	if o.GPU == "" {
		return nil
	}
	if refused := gpu.Rule(o.GPU, max(o.GPUCount, 1)); refused != nil {
		return refused
	}
	return nil
}

// expectedGPUs is what was stated, or else what the deployment asked for; nil
// for none.
func expectedGPUs(d *Deployment, stated string) (*contract.GPU, error) {
	switch {
	case stated != "":
		demand, err := gpu.ParseDemand(stated)
		if err != nil {
			return nil, Usage("--expected-gpu: %v", err)
		}
		return &demand, nil
	case d != nil:
		return d.GPU, nil
	}
	return nil, nil //nolint:nilnil // none is an answer
}

// gpuJudge judges evidence of GPUs against what is expected and what profile
// and deployment say.
func (t *Tenant) gpuJudge(demand *contract.GPU, d *Deployment, o VerifyOptions, roots []*x509.Certificate) (func([]byte, [contract.GPUNonceBytes]byte) contract.GPUAppraisal, error) {
	p := &evidence.Policy{
		Model: demand.Model, Count: demand.Count, AllowUnmeasured: o.AllowUnmeasuredGPUs || t.profile.Verify.AllowUnmeasuredGPUs,
		EmulatedRoots: roots, Now: t.now(),
	}
	pdis := o.ExpectedPDIs
	if len(pdis) == 0 && d != nil {
		pdis = d.GPUPDIs
	}
	var err error
	if p.PDIs, err = spdm.ParsePDIs(pdis); err != nil {
		return nil, Usage("--expected-pdi: %v", err)
	}
	dir := cmp.Or(o.RIMDir, t.profile.RIMDir)
	if dir == "" {
		return p.Judge, nil
	}
	folder, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("reading reference manifests: %w", err)
	}
	defer folder.Close() //nolint:errcheck // nothing was written
	if err := p.ReadManifests(folder.FS()); err != nil {
		return nil, Usage("--rim-dir %s: %v", dir, err)
	}
	return p.Judge, nil
}

// checkDemand compares what the manifest asks for with what is expected.
func checkDemand(v *Verdict, expected *contract.GPU) {
	m, err := contract.ParseManifest(v.Evidence.Manifest)
	if err != nil || expected == nil {
		return // check "manifest" failed already, or nothing is expected
	}
	words := func(g *contract.GPU) string {
		if g == nil {
			return "none"
		}
		return fmt.Sprintf("%d × %s", g.Count, gpu.Canonical(g.Model))
	}
	v.Add("gpu-demand", words(m.GPU) == words(expected), words(expected), words(m.GPU), "the manifest demands the expected GPUs",
		"the manifest does not demand the expected GPUs")
}
