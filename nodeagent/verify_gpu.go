package main

import (
	"os"

	"github.com/spf13/pflag"

	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/evidence"
	"github.com/confidential-node/agent/gpu/spdm"
)

// expectedGPUs are those flags of `nodeagent verify` that say what GPUs a guest
// has to have.
type expectedGPUs struct {
	expected, manifests string
	pdis                []string
	unmeasured          bool
}

func (g *expectedGPUs) register(flags *pflag.FlagSet) {
	flags.StringVar(&g.expected, "expected-gpu", "", "GPUs of the guest, `MODEL[:COUNT]`, for instance H100 or B200:4 (bundles)")
	flags.StringVar(&g.manifests, "rim-dir", "", "`DIR` with NVIDIA's reference manifests of the GPUs' driver and VBIOS, as files or as the RIM service answered (bundles)")
	flags.StringSliceVar(&g.pdis, "expected-pdi", nil, "GPU to accept by its PDI, `HEX`; any of the model when not given, may be repeated (bundles)")
	flags.BoolVar(&g.unmeasured, "allow-unmeasured-gpu", false, "accept GPUs without comparing what they measured: firmware and debugging stay unknown (bundles)")
}

// gpuFlagNames are all of them.
func gpuFlagNames() []string {
	return []string{"expected-gpu", "rim-dir", "expected-pdi", "allow-unmeasured-gpu"}
}

// policy is nil when no GPUs are expected.
func (g *expectedGPUs) policy(set *pflag.FlagSet, a *snp.AppraisalPolicy) (*evidence.Policy, error) {
	if !set.Changed("expected-gpu") {
		for _, name := range gpuFlagNames() {
			if set.Changed(name) {
				return nil, usageError("--%s needs --expected-gpu", name)
			}
		}
		return nil, nil //nolint:nilnil // no expectation is an answer
	}
	demand, err := gpu.ParseDemand(g.expected)
	if err != nil {
		return nil, usageError("--expected-gpu: %w", err)
	}
	p := &evidence.Policy{Model: demand.Model, Count: demand.Count, AllowUnmeasured: g.unmeasured, EmulatedRoots: a.EmulatedRoots, Now: a.Now}
	if p.PDIs, err = spdm.ParsePDIs(g.pdis); err != nil {
		return nil, usageError("--expected-pdi: %w", err)
	}
	if g.manifests == "" {
		return p, nil
	}
	folder, err := os.OpenRoot(g.manifests)
	if err != nil {
		return nil, err
	}
	defer folder.Close() //nolint:errcheck // nothing was written
	if err := p.ReadManifests(folder.FS()); err != nil {
		return nil, usageError("--rim-dir %s: %w", g.manifests, err)
	}
	return p, nil
}
