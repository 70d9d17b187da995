// Package verify judges a whole evidence bundle: it derives what the report
// must contain from the verifier's own expectations, lets firmware/snp judge
// the report and the caller's judge the GPUs, and adds what only the bundle can
// tell: the workload image and the guest image's defences. It also reads reports and certificates that come
// without a bundle, and words results for people. It is what `nodeagent
// verify` and the tenant's tool share.
//
// Pure; nothing in a bundle is ever a source of expectations.
package verify

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"fmt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

// Expectations are the verifier's own. The zero value of a field is strict.
type Expectations struct {
	// Image is the workload, REF@sha256:DIGEST. Empty fails.
	Image string
	// Nonce is the verifier's own.
	Nonce []byte
	// SPKI is the key of the TLS connection the bundle came over; nil when it
	// came another way.
	SPKI []byte
	// TrustedImage is an image.json the verifier trusts; nil when there is
	// none, and then nothing is known of the image's defences.
	TrustedImage *contract.ImageDescription
	// AllowDevelopmentImage accepts an image without AML defence, or one
	// nothing is known of.
	AllowDevelopmentImage bool
	// GPUs judges evidence of GPUs that has to answer a nonce; nil when none
	// are expected. gpu/evidence has one.
	GPUs func(evidence []byte, nonce [contract.GPUNonceBytes]byte) contract.GPUAppraisal
	// AppraisalPolicy is what platform and launch have to be. With
	// TrustedImage, give only Measurements taken over that image's files: which
	// files a bundle names is the host's word, the digest is the silicon's.
	snp.AppraisalPolicy
}

// Bundle judges the bytes of a contract.Evidence.
func Bundle(data []byte, x Expectations) snp.Result {
	var res snp.Result
	e, err := contract.ParseEvidence(data)
	if err != nil {
		res.Add("bundle", false, "", "", "", err.Error()+"; this is not evidence")
		return res
	}
	res.Add("bundle", true, "", "", "an evidence bundle", "")
	res.Add("nonce", len(x.Nonce) > 0 && bytes.Equal(x.Nonce, e.Nonce), hex.EncodeToString(x.Nonce), hex.EncodeToString(e.Nonce),
		"answers your challenge", "answers another challenge than yours; challenge the guest yourself and give that nonce")
	res.Add("result-key", len(e.ResultKey) == ed25519.PublicKeySize, fmt.Sprintf("%d bytes", ed25519.PublicKeySize), fmt.Sprintf("%d bytes", len(e.ResultKey)),
		"names the key that signs the results", "names no Ed25519 key to sign results with; use a guest image that does")
	if x.SPKI != nil {
		res.Add("tls-key", bytes.Equal(x.SPKI, e.TLSSPKI), "", "", "the connection ends inside this guest", "the connection ends somewhere else than in this guest; send nothing over it")
	}
	hostData := contract.HostData(e.Manifest)
	reportData := contract.EvidenceReportData(x.Nonce, e.TLSSPKI, e.ResultKey, e.GPUEvidence)
	report := snp.Verify(e.Report, e.Endorsements, snp.Expect{ReportData: reportData[:], HostData: hostData[:], AppraisalPolicy: x.AppraisalPolicy})
	res.Checks = append(res.Checks, report.Checks...)
	res.Signer, res.Warnings = report.Signer, report.Warnings
	manifest(&res, e, x)
	guestImage(&res, e, x)
	return res
}

// manifest checks the workload; that the manifest is the launch's is the
// report's check "host-data".
func manifest(res *snp.Result, e *contract.Evidence, x Expectations) {
	m, err := contract.ParseManifest(e.Manifest)
	if err != nil {
		res.Add("manifest", false, "", "", "", err.Error()+"; write the manifest with this version's tool")
		return
	}
	res.Add("manifest", true, "", m.LaunchID, "a manifest in canonical form, launch "+m.LaunchID, "")
	res.Add("workload-image", x.Image != "" && m.Image == x.Image, x.Image, m.Image, "runs the expected workload image", "runs another workload image, or none was expected; state the reference with its digest")
	gpus(res, e, m.GPU, x)
}

// gpus judges the guest's GPUs where any are expected. Without expectations
// evidence of them proves nothing, and is not taken for more.
func gpus(res *snp.Result, e *contract.Evidence, demanded *contract.GPU, x Expectations) {
	const name = "gpu-evidence"
	switch there := len(e.GPUEvidence) > 0; {
	case demanded == nil && there:
		res.Add(name, false, "none", "", "", "there is GPU evidence although the manifest asks for no GPU; ask for evidence of this launch")
	case demanded == nil && x.GPUs != nil:
		res.Add(name, false, "GPUs", "none", "", "you expect GPUs, and the manifest asks for none: nobody gave this launch any")
	case demanded == nil:
		res.Add(name, true, "", "", "the manifest asks for no GPU and there is no GPU evidence", "")
	case x.GPUs == nil && there:
		res.Skip(name, fmt.Sprintf("NOT judged: the manifest asks for %d × %s and there is evidence, but you did not say what you expect", demanded.Count, demanded.Model))
	case x.GPUs == nil:
		res.Add(name, false, fmt.Sprintf("%d × %s", demanded.Count, demanded.Model), "none", "", "the manifest asks for GPUs and the guest shows no evidence of any; use a guest image that gathers it")
	default:
		a := x.GPUs(e.GPUEvidence, contract.GPUNonce(contract.EvidenceReportData(x.Nonce, e.TLSSPKI, e.ResultKey, nil)))
		res.Checks = append(res.Checks, a.Checks...)
		res.GPUs, res.Warnings = a.GPUs, append(res.Warnings, a.Warnings...)
	}
}

// guestImage needs a description from the verifier: the bundle's own copy is
// the host's word.
func guestImage(res *snp.Result, e *contract.Evidence, x Expectations) {
	const name = "aml-defence"
	switch t := x.TrustedImage; {
	case t != nil && t.AMLDefence && describes(t, e.Boot):
		res.Add(name, true, "", t.Name, "the guest image is immune to ACPI code from the host", "")
	case x.AllowDevelopmentImage:
		res.Skip(name, "NOT checked, allowed by you: ACPI code from the host could read the guest's memory")
	case t == nil:
		res.Add(name, false, "", "", "", "nothing is known of the guest image's defence against ACPI code from the host; give an image.json you trust, or --allow-development-image")
	case !t.AMLDefence:
		res.Add(name, false, "true", "false", "", "the guest image has no defence against ACPI code from the host; use an image that has, or --allow-development-image")
	default:
		res.Add(name, false, t.Initrd.SHA256, e.Boot.InitrdSHA256, "", "the image.json you gave describes other files than the guest was started from; give the one of the image that was launched")
	}
}

func describes(d *contract.ImageDescription, b contract.BootComponents) bool {
	return d.Firmware.SHA256 == b.FirmwareSHA256 && d.Kernel.SHA256 == b.KernelSHA256 && d.Initrd.SHA256 == b.InitrdSHA256 && d.Cmdline == b.Cmdline
}
