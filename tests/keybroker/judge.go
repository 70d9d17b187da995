package keybroker

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// remedy tells the reader of a refusal what to do about a failed check of
// package snp.
func remedy(check string) string {
	switch check {
	case "launch-digest":
		return "boot exactly the firmware, kernel, initrd, command line, vCPU count and CPU model that were registered, or register the digest of these"
	case "host-data":
		return "launch with the manifest that was registered; its SHA-256 is HOST_DATA"
	case "report-data":
		return "get a fresh report over this session's nonce and the key sent with it"
	case "root", "chain":
		return "use a processor whose key AMD has signed; emulated roots count only where the broker was started with --allow-emulated-root"
	case "revocation":
		return "have the host fetch AMD's current revocation list, and use another processor line if AMD revoked this one's intermediate"
	case "tcb-floor", "tcb-binding", "committed-is-current":
		return "update the host's firmware and microcode and commit it, or let the tenant lower the floor knowingly"
	case "policy-debug", "policy-migration", "policy-cxl", "policy-reserved":
		return "launch with a guest policy that forbids debugging, migration and CXL, and sets no other bit than SMT"
	case "product":
		return "use a host with an EPYC of the Genoa generation or later; the broker accepts another line only where it was started with --allow-product"
	case "smt":
		return "launch with policy bit 16 clear on a host that has SMT off, or register the launch without that demand"
	case "mitigations", "platform-info":
		return "use a host whose firmware does what the tenant demands, or register the launch without that demand"
	case "id-key", "author-key", "guest-svn":
		return "launch with the ID block of the image's publisher, whose keys the tenant registered"
	case "gpu-evidence", "gpu-nonce", "gpu-distinct", "gpu-driver":
		return "use a guest image that asks every GPU itself, under the nonce of this session"
	case "gpu-root", "gpu-signature":
		return "use GPUs that NVIDIA has certified; emulated roots count only where the broker was started with --allow-emulated-root"
	case "gpu-count", "gpu-model":
		return "give the guest the GPUs that its manifest asks for"
	case "gpu-mode", "gpu-switches":
		return "have the host switch the GPUs to CC mode (eight of Hopper to Protected PCIe, with their switches) and reset them"
	case "gpu-measurements":
		return "have the host switch devtools off and use a driver and VBIOS of whose manifests the broker knows (--rim-dir)"
	case "gpu-allowed":
		return "deploy to a host whose GPUs are on the launch's list, or add their PDIs to it"
	case "chip-allowed":
		return "deploy to a host on the launch's list, or add this chip id to it"
	}
	return "do not use this host until the named check holds"
}

// judge decides whether a guest may have the keys of its launch: first what
// the tenant registered, then everything the report must say. The nonce is
// the session's own.
func (s *Server) judge(a *attestation, nonce string, r *record) (*brokeradmin.Release, *contract.Refusal) {
	if a.nonce != nonce {
		return nil, contract.Refuse("broker.nonce-mismatch", sessionRemedy, "the answer is to another nonce than this session's")
	}
	if !bytes.Equal(a.evidence.Manifest, r.Launch.Manifest) {
		return nil, contract.Refuse("broker.manifest-mismatch", "launch with the manifest that was registered",
			"the manifest is not the one registered for launch %s", r.LaunchID)
	}
	if refused := s.judgeImage(r.Launch.Image); refused != nil {
		return nil, refused
	}
	if refused := shown(a); refused != nil {
		return nil, refused
	}
	x, refused := s.expect(a, r)
	if refused != nil {
		return nil, refused
	}
	result := snp.Verify(a.evidence.Report, a.evidence.Endorsements, x)
	if refused := refuseChecks(result); refused != nil {
		return nil, refused
	}
	gpus, refused := s.judgeGPUs(a, r)
	if refused != nil {
		return nil, refused
	}
	report, err := snp.ParseReport(a.evidence.Report)
	if err != nil {
		return nil, contract.Refuse("broker.report-malformed", "do not use this host", "the report cannot be parsed").Because(err)
	}
	return &brokeradmin.Release{
		At: s.cfg.Now().UTC(), ChipID: hex.EncodeToString(report.ChipID[:]), Measurement: hex.EncodeToString(report.Measurement[:]), GPUs: gpus,
		Emulated: slices.ContainsFunc(s.cfg.EmulatedRoots, func(root *x509.Certificate) bool { return bytes.Equal(root.Raw, a.evidence.Endorsements.ARK) }) ||
			slices.ContainsFunc(gpus, func(g contract.AttestedGPU) bool { return g.Emulated }),
	}, nil
}

// judgeImage refuses guest images that cannot keep a secret from the host.
func (s *Server) judgeImage(image *contract.ImageDescription) *contract.Refusal {
	if s.cfg.AllowDevelopmentImage {
		return nil
	}
	if image.Variant != contract.VariantProduction {
		return contract.Refuse("broker.image-debug", "use the production variant of the guest image, or start the broker with --allow-development-image for a trial without secrets",
			"guest image %q is the %s variant, which has a console the host reads", image.Name, image.Variant)
	}
	if !image.AMLDefence {
		return contract.Refuse("broker.image-aml-defence", "use a guest image whose image.json says aml_defence true, or start the broker with --allow-development-image for a trial without secrets",
			"guest image %q runs ACPI code of the host, which could read the guest's private memory", image.Name)
	}
	return nil
}

func (s *Server) expect(a *attestation, r *record) (snp.Expect, *contract.Refusal) {
	reportData, err := contract.BrokerReportData(a.additions, a.nonce, a.rawKey)
	if err != nil {
		return snp.Expect{}, contract.Refuse("broker.request-malformed", protocolRemedy, "the runtime data cannot be canonicalised").Because(err)
	}
	host := contract.HostData(r.Launch.Manifest)
	x := snp.Expect{
		ReportData: reportData[:], HostData: host[:],
		AppraisalPolicy: snp.AppraisalPolicy{
			MinTCB:        floor(a.manifest.TCBFloor, r.Launch.TCBFloor),
			AllowProducts: s.cfg.AllowProducts,
			EmulatedRoots: s.cfg.EmulatedRoots,
			Now:           s.cfg.Now(),
		},
	}
	if x.Measurements, err = decodeAll(r.Launch.LaunchDigests); err != nil {
		return x, contract.AsRefusal(err)
	}
	if x.ChipIDs, err = decodeAll(r.Launch.ChipIDs); err != nil {
		return x, contract.AsRefusal(err)
	}
	if err := r.Launch.AppraisalPolicy.Demand(&x.AppraisalPolicy); err != nil {
		return x, contract.AsRefusal(err)
	}
	return x, nil
}

func decodeAll(values []string) (out [][]byte, err error) {
	for _, v := range values {
		raw, err := hex.DecodeString(v)
		if err != nil {
			return nil, fmt.Errorf("decoding registered value: %w", err)
		}
		out = append(out, raw)
	}
	return out, nil
}

// floor takes the higher of two floors, component by component.
func floor(floors ...*contract.TCB) (out contract.TCB) {
	for _, f := range floors {
		if f != nil {
			out = out.Max(*f)
		}
	}
	return out
}

// refuseChecks turns the failed checks into one refusal, coded by the first.
func refuseChecks(result snp.Result) *contract.Refusal {
	if result.OK() {
		return nil
	}
	first := result.Failed()
	if first == nil {
		return contract.Refuse("broker.evidence-incomplete", "do not use this host", "the evidence was not verified completely")
	}
	var failed []string
	for _, c := range result.Checks {
		if c.Status == snp.Fail {
			failed = append(failed, c.Name)
		}
	}
	why := first.Why
	if first.Want != "" || first.Got != "" {
		why += fmt.Sprintf(" (expected %.200s, found %.200s)", first.Want, first.Got)
	}
	return contract.Refuse("broker."+first.Name, remedy(first.Name), "evidence refused, failed checks: %s; %s", strings.Join(failed, ", "), why)
}
