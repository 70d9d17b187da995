package evidence

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/rim"
	"github.com/confidential-node/agent/gpu/spdm"
)

// Policy is what the GPUs of a guest have to be. The zero value of a field is
// strict.
type Policy struct {
	// Model is a name that gpu.Rule knows, Count how many the guest has.
	Model string
	Count int
	// PDIs are the GPUs to accept; any when empty.
	PDIs []spdm.PDI
	// Manifests are NVIDIA's reference values at hand, verified.
	Manifests []*rim.Manifest
	// AllowUnmeasured accepts GPUs without comparing what they measured. Then
	// nothing but the guest says that nobody debugs them.
	AllowUnmeasured bool
	// EmulatedRoots are accepted beside NVIDIA's.
	EmulatedRoots []*x509.Certificate
	Now           time.Time
}

// ReadManifests takes every file of a folder for a manifest of NVIDIA's, or of
// one of EmulatedRoots.
func (p *Policy) ReadManifests(folder fs.FS) (err error) {
	p.Manifests, err = rim.ReadFolder(folder, p.roots(rim.NVIDIARoot()), p.Now)
	return err
}

// roots are NVIDIA's and those the verifier was told to accept.
func (p *Policy) roots(nvidia spdm.Fingerprint) []spdm.Fingerprint {
	out := []spdm.Fingerprint{nvidia}
	for _, root := range p.EmulatedRoots {
		out = append(out, spdm.FingerprintOf(root))
	}
	return out
}

// member is one GPU of the evidence as far as it was read.
type member struct {
	contract.GPUEvidence
	chain  *spdm.Chain
	report *spdm.Report
}

// Judge judges GPU evidence, the container of contract.GPUEvidence, that has
// to answer the nonce. Where certificates or signatures do not hold, nothing
// after them is looked at.
func (p *Policy) Judge(data []byte, nonce [contract.GPUNonceBytes]byte) contract.GPUAppraisal {
	var a contract.GPUAppraisal
	gpus, ok := p.read(&a, data)
	if !ok || !p.authentic(&a, gpus) {
		return a
	}
	p.fresh(&a, gpus, nonce)
	p.identity(&a, gpus)
	mode(&a, gpus, p.Model, p.Count)
	p.firmware(&a, gpus)
	for _, g := range gpus {
		a.GPUs = append(a.GPUs, p.facts(g))
	}
	p.unproven(&a)
	return a
}

// each runs a check over all GPUs: it names the first that does not hold.
func each(a *contract.GPUAppraisal, name string, gpus []*member, held string, check func(*member) (want, got, broken string)) bool {
	for i, g := range gpus {
		if want, got, broken := check(g); broken != "" {
			a.Add(name, false, want, got, "", fmt.Sprintf("GPU %d of %d: %s", i+1, len(gpus), broken))
			return false
		}
	}
	a.Add(name, true, "", "", held, "")
	return true
}

// read judges form and count.
func (p *Policy) read(a *contract.GPUAppraisal, data []byte) ([]*member, bool) {
	if len(data) == 0 {
		a.Add("gpu-evidence", false, p.wanted(), "none", "", "the guest shows no evidence of its GPUs; use a guest image that gathers it")
		return nil, false
	}
	list, err := contract.ParseGPUEvidence(data)
	if err != nil {
		a.Add("gpu-evidence", false, "", "", "", err.Error()+"; use a guest image that writes it in this form")
		return nil, false
	}
	a.Add("gpu-evidence", true, "", "", "evidence of GPUs in the known form", "")
	var gpus []*member
	for _, e := range list {
		gpus = append(gpus, &member{GPUEvidence: e})
	}
	refused := gpu.Rule(p.Model, p.Count)
	why := fmt.Sprintf("the guest shows another number of GPUs than the %s that you expect", p.wanted())
	if refused != nil {
		why = refused.Message + "; " + refused.Remedy
	}
	a.Add("gpu-count", refused == nil && len(gpus) == p.Count, p.wanted(), fmt.Sprintf("%d GPUs", len(gpus)), fmt.Sprintf("%d, as expected", p.Count), why)
	return gpus, true
}

func (p *Policy) wanted() string { return fmt.Sprintf("%d × %s", p.Count, gpu.Canonical(p.Model)) }

// authentic judges who signed.
func (p *Policy) authentic(a *contract.GPUAppraisal, gpus []*member) bool {
	roots := p.roots(spdm.NVIDIARoot())
	return each(a, "gpu-root", gpus, "certified up to a root that you accept", func(g *member) (string, string, string) {
		var err error
		if g.chain, err = spdm.VerifyChain(g.Certificates, roots, p.Now); err != nil {
			return "", "", err.Error() + "; only GPUs that NVIDIA certified count"
		}
		return "", "", ""
	}) && each(a, "gpu-signature", gpus, "signed by the GPU, whose firmware is the certified one", func(g *member) (string, string, string) {
		var err error
		if g.report, err = spdm.Parse(g.Report); err == nil {
			err = g.report.Verify(g.chain)
		}
		if err != nil {
			return "", "", err.Error() + "; the GPU of these certificates did not say this"
		}
		return "", "", ""
	})
}

// fresh judges which question was answered.
func (p *Policy) fresh(a *contract.GPUAppraisal, gpus []*member, nonce [contract.GPUNonceBytes]byte) {
	want := hex.EncodeToString(nonce[:])
	each(a, "gpu-nonce", gpus, "answers your challenge and the guest's keys", func(g *member) (string, string, string) {
		if got := hex.EncodeToString(g.report.Nonce[:]); got != want {
			return want, got, "answered another question; it may have been recorded, or be another guest's"
		}
		if !strings.EqualFold(g.Nonce, want) {
			return want, g.Nonce, "stands under another nonce than it answered"
		}
		return "", "", ""
	})
}

// identity judges which GPUs they are.
func (p *Policy) identity(a *contract.GPUAppraisal, gpus []*member) {
	seen := map[spdm.PDI]bool{}
	each(a, "gpu-distinct", gpus, "every GPU answered for itself only", func(g *member) (string, string, string) {
		if seen[g.chain.PDI] {
			return "", g.chain.PDI.String(), "answered for another one too: one GPU is shown as several"
		}
		seen[g.chain.PDI] = true
		return "", "", ""
	})
	chip, _ := gpu.Chip(p.Model)
	each(a, "gpu-model", gpus, fmt.Sprintf("the chip of %s, %s", gpu.Canonical(p.Model), chip), func(g *member) (string, string, string) {
		switch {
		case chip == "" || g.chain.Product != chip:
			return chip, g.chain.Product, "is not the chip of the model you expect"
		case g.Arch != architecture(chip):
			return architecture(chip), g.Arch, "stands under another architecture than its chip has"
		}
		return "", "", ""
	})
	if len(p.PDIs) == 0 {
		return
	}
	each(a, "gpu-allowed", gpus, "on your list", func(g *member) (string, string, string) {
		if !slices.Contains(p.PDIs, g.chain.PDI) {
			return fmt.Sprint(p.PDIs), g.chain.PDI.String(), "is not on your list of PDIs"
		}
		return "", "", ""
	})
}

// architecture is that of a chip, as evidence names it.
func architecture(chip string) string {
	if strings.HasPrefix(chip, "GH") {
		return contract.ArchHopper
	}
	return contract.ArchBlackwell
}

// firmware judges what runs on them.
func (p *Policy) firmware(a *contract.GPUAppraisal, gpus []*member) {
	first := gpus[0].report.Opaque.Driver
	each(a, "gpu-driver", gpus, "one driver for all, "+first, func(g *member) (string, string, string) {
		switch got := g.report.Opaque.Driver; {
		case got == "":
			return "", "", "does not state its driver"
		case got != first:
			return first, got, "was asked through another driver than the first: they are not of one guest"
		}
		return "", "", ""
	})
	const name = "gpu-measurements"
	switch {
	case len(p.Manifests) > 0:
		each(a, name, gpus, "firmware and state are what NVIDIA's manifests demand; a GPU that is debugged (devtools) measures otherwise", func(g *member) (string, string, string) {
			if err := rim.Compare(g.report, g.chain.Product, p.Manifests); err != nil {
				return "", "", err.Error() + "; do not use it: its firmware is unknown, or it is debugged (devtools)"
			}
			return "", "", ""
		})
	case p.AllowUnmeasured:
		a.Skip(name, "NOT compared, allowed by you: firmware that NVIDIA does not vouch for, or a debugger (devtools), would look the same")
	default:
		a.Add(name, false, "", "", "", "there are no reference manifests to compare with: firmware and debugging (devtools) are not known; get those of driver "+
			first+" and of the VBIOS from NVIDIA's RIM service, or accept GPUs unmeasured")
	}
}

// facts is what the evidence says of one GPU.
func (p *Policy) facts(g *member) contract.AttestedGPU {
	o := g.report.Opaque
	return contract.AttestedGPU{
		Chip: g.chain.Product, PDI: g.chain.PDI.String(), Board: strings.Trim(o.Project+"-"+o.ProjectSKU+"-"+o.ChipSKU, "-"),
		Driver: o.Driver, VBIOS: o.VBIOS, Mode: modeOf(o), Emulated: g.chain.Root != spdm.NVIDIARoot(),
	}
}

// unproven says what no check can.
func (p *Policy) unproven(a *contract.GPUAppraisal) {
	warn := func(name, why string) { a.Warnings = append(a.Warnings, contract.Warning{Name: name, Why: why}) }
	warn("gpu-binding", "no signature ties a GPU to this processor: that they are in one machine, and that no genuine GPU elsewhere answered in their stead, is the word of the measured guest, which asked them")
	warn("gpu-revocation", "whether NVIDIA has revoked a GPU's certificates was not asked: that needs its OCSP service")
	if chip, models := gpu.Chip(p.Model); len(models) > 1 && len(p.PDIs) == 0 {
		warn("gpu-board", fmt.Sprintf("certificates name the chip, %s, not the board: %s have the same; name the boards you know by PDI", chip, strings.Join(models, ", ")))
	}
}
