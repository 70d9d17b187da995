// Package attester plays an attested guest towards its verifiers: it has the
// keys of a guest's init and a chip that signs reports, and answers
// challenges with evidence bundles. Tests change what it is made of to see
// who notices. Its chip is EMULATED; no verifier accepts it unless told.
//
// It owns its keys and nothing else; a Guest that nobody changes is safe for
// concurrent use.
package attester

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/idblock"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
)

// TCB is the platform's version that every report of a chip states.
func TCB() contract.TCB { return contract.TCB{BootLoader: 10, SNP: 27, Microcode: 86} }

// chipID is that of every chip.
func chipID() []byte { return bytes.Repeat([]byte{7}, 64) }

// NewChip issues a chip's chain, valid from an hour before now.
func NewChip(now time.Time) (*snptest.Chain, error) {
	return snptest.NewChain(snptest.ProductEmulated, TCB(), chipID(), now)
}

// Guest is one attested guest.
type Guest struct {
	Chip *snptest.Chain
	// Manifest, Measurement and Policy are what it was launched with.
	Manifest    []byte
	Measurement []byte
	Policy      snp.Policy
	// IDBlock is the publisher's pair it was launched with; nil for none.
	IDBlock *idblock.Signed
	// Boot is the host's hint that it passes on.
	Boot contract.BootComponents
	// GPUs are those it was given.
	GPUs []*spdmtest.GPU
	// TLSKey ends its connections, ResultKey signs its results.
	TLSKey    *ecdsa.PrivateKey
	ResultKey ed25519.PrivateKey
}

// New boots a guest with fresh keys.
func New(chip *snptest.Chain, manifest, measurement []byte) (*Guest, error) {
	tlsKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making TLS key: %w", err)
	}
	_, resultKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making result key: %w", err)
	}
	return &Guest{
		Chip: chip, Manifest: manifest, Measurement: measurement, Policy: snp.PolicySMT | snp.PolicyReservedOne,
		TLSKey: tlsKey, ResultKey: resultKey,
	}, nil
}

// report is the chip's, signed, over the guest and what it asks to bind.
func (g *Guest) report(data [contract.ReportDataSize]byte) ([]byte, error) {
	version := snp.GenoaTCB(TCB())
	r := snp.Report{
		Version: 3, Policy: g.Policy, SigAlgo: 1, Family: 0x19, Model: 0x11, Stepping: 1,
		CurrentTCB: version, ReportedTCB: version, CommittedTCB: version, LaunchTCB: version,
		HostData: contract.HostData(g.Manifest), ReportData: data,
		ChipID: [64]byte(chipID()), ReportIDMA: [32]byte(bytes.Repeat([]byte{0xff}, 32)),
	}
	copy(r.Measurement[:], g.Measurement)
	if s := g.IDBlock; s != nil {
		r.GuestSVN, r.FamilyID, r.ImageID = s.Block.GuestSVN, s.Block.FamilyID, s.Block.ImageID
		r.IDKeyDigest = s.IDKeyDigest
		if s.HasAuthorKey {
			r.SignerInfo, r.AuthorDigest = 1, s.AuthorKeyDigest
		}
	}
	return snptest.Sign(r.Marshal(), g.Chip.Key)
}

// GPUEvidence asks its GPUs for what REPORT_DATA were without them; nil where
// there are none.
func (g *Guest) GPUEvidence(_ context.Context, withoutGPUs [contract.ReportDataSize]byte) ([]byte, error) {
	if len(g.GPUs) == 0 {
		return nil, nil
	}
	return spdmtest.Evidence(contract.GPUNonce(withoutGPUs), g.GPUs...)
}

// Evidence answers a challenge.
func (g *Guest) Evidence(nonce []byte) (*contract.Evidence, error) {
	spki, err := x509.MarshalPKIXPublicKey(&g.TLSKey.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("encoding TLS key: %w", err)
	}
	resultKey := []byte(g.ResultKey[ed25519.SeedSize:])
	gpus, err := g.GPUEvidence(context.Background(), contract.EvidenceReportData(nonce, spki, resultKey, nil))
	if err != nil {
		return nil, err
	}
	report, err := g.report(contract.EvidenceReportData(nonce, spki, resultKey, gpus))
	if err != nil {
		return nil, err
	}
	return &contract.Evidence{
		Version: contract.EvidenceVersion, Nonce: nonce, TLSSPKI: spki, ResultKey: resultKey, Report: report, GPUEvidence: gpus,
		Manifest: g.Manifest, Endorsements: g.Chip.Endorsements, Boot: g.Boot,
	}, nil
}

// BrokerEvidence is what the guest's broker client asks for.
func (g *Guest) BrokerEvidence(_ context.Context, data [contract.ReportDataSize]byte) (contract.BrokerEvidence, error) {
	report, err := g.report(data)
	return contract.BrokerEvidence{Report: report, Manifest: g.Manifest, Endorsements: g.Chip.Endorsements}, err
}
