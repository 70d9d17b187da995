package main

import (
	"crypto/x509"
	"time"

	"github.com/spf13/pflag"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/verify"
)

// policyFlags are those flags of `nodeagent verify` that say what platform
// and launch have to be.
type policyFlags struct {
	digests, chipIDs, idKeys, authorKeys []string
	familyID, imageID                    string
	guestSVN                             uint32
	minTCB, platform, crl                string
	floors, allow, exclude, roots        []string
	vlek, provisional, noSMT, requireCRL bool
}

func (p *policyFlags) register(flags *pflag.FlagSet) {
	flags.StringSliceVar(&p.digests, "expected-digest", nil, "launch digest in hex, may be repeated (required)")
	flags.StringVar(&p.minTCB, "min-tcb", "", "lowest TCB of any platform, for instance snp=27,microcode=86,boot-loader=10")
	flags.StringArrayVar(&p.floors, "floor", nil, "floor of one kind of processor, `FAMILY/MODEL[-MODEL]:COMPONENTS`, for instance 19/10-1f:snp=27,microcode=86,mitigations=0x7; may be repeated")
	flags.StringSliceVar(&p.allow, "allow-product", nil, "processor `LINE` to accept although it is excluded by default (milan: its root can be extracted in software)")
	flags.StringSliceVar(&p.exclude, "exclude-product", nil, "processor `LINE` to refuse: milan, genoa (also Bergamo and Siena) or turin")
	flags.BoolVar(&p.vlek, "allow-vlek", false, "accept a cloud provider's VLEK, which names no chip")
	flags.BoolVar(&p.provisional, "allow-provisional", false, "accept firmware that is not committed and can be rolled back")
	flags.BoolVar(&p.noSMT, "forbid-smt", false, "refuse guests and platforms with SMT")
	flags.StringVar(&p.platform, "require-platform", "", "`FACTS` the platform must state, of tsme,ecc,rapl-disabled,ciphertext-hiding,alias-check,iommu-write-safe")
	flags.StringSliceVar(&p.chipIDs, "chip-id", nil, "chip to accept, `HEX`; any when not given, may be repeated")
	flags.StringSliceVar(&p.idKeys, "id-key", nil, "digest of an ID key to accept, `HEX`; may be repeated")
	flags.StringSliceVar(&p.authorKeys, "author-key", nil, "digest of an author key to accept, `HEX`; may be repeated")
	flags.Uint32Var(&p.guestSVN, "min-guest-svn", 0, "lowest guest SVN of the ID block")
	flags.StringVar(&p.familyID, "family-id", "", "family id of the ID block, `HEX`")
	flags.StringVar(&p.imageID, "image-id", "", "image id of the ID block, `HEX`")
	flags.StringVar(&p.crl, "crl", "", "revocation list of the product line, PEM or DER `FILE`, instead of the evidence's own")
	flags.BoolVar(&p.requireCRL, "require-crl", false, "fail when there is no revocation list")
	flags.StringArrayVar(&p.roots, "allow-emulated-root", nil, "certificate of an EMULATED root to accept; no silicon stands behind it")
}

func (p *policyFlags) policy() (snp.AppraisalPolicy, error) {
	a := snp.AppraisalPolicy{
		AllowVLEK: p.vlek, AllowProvisional: p.provisional, ForbidSMT: p.noSMT, RequireCRL: p.requireCRL, MinGuestSVN: p.guestSVN, Now: time.Now(),
	}
	if err := p.launch(&a); err != nil {
		return a, err
	}
	if err := p.processor(&a); err != nil {
		return a, err
	}
	for _, name := range p.roots {
		root, err := readRoot(name)
		if err != nil {
			return a, err
		}
		a.EmulatedRoots = append(a.EmulatedRoots, root)
	}
	if p.crl == "" {
		return a, nil
	}
	data, err := readLimited(p.crl, verify.MaxCRLBytes)
	if err != nil {
		return a, err
	}
	if a.CRL, err = verify.DecodeCRL(data); err != nil {
		return a, usageError("--crl %s: %w", p.crl, err)
	}
	return a, nil
}

// launch decodes what is compared with the launch and its ID block.
func (p *policyFlags) launch(a *snp.AppraisalPolicy) error {
	for _, list := range []struct {
		flag string
		text []string
		size int
		to   *[][]byte
	}{
		{"expected-digest", p.digests, 48, &a.Measurements},
		{"id-key", p.idKeys, 48, &a.IDKeys},
		{"author-key", p.authorKeys, 48, &a.AuthorKeys},
	} {
		for _, text := range list.text {
			raw, err := decodeHex(list.flag, text, list.size)
			if err != nil {
				return err
			}
			*list.to = append(*list.to, raw)
		}
	}
	for _, id := range []struct {
		flag, text string
		to         *[]byte
	}{{"family-id", p.familyID, &a.FamilyID}, {"image-id", p.imageID, &a.ImageID}} {
		if id.text == "" {
			continue
		}
		raw, err := decodeHex(id.flag, id.text, 16)
		if err != nil {
			return err
		}
		*id.to = raw
	}
	return nil
}

// processor decodes what is compared with the platform.
func (p *policyFlags) processor(a *snp.AppraisalPolicy) (err error) {
	if p.minTCB != "" {
		if a.MinTCB, err = contract.ParseTCB(p.minTCB); err != nil {
			return usageError("--min-tcb: %w", err)
		}
	}
	for _, text := range p.floors {
		f, err := snp.ParseFloor(text)
		if err != nil {
			return usageError("--floor: %w", err)
		}
		a.Floors = append(a.Floors, f)
	}
	if a.AllowProducts, err = snp.ParseProducts(p.allow); err != nil {
		return usageError("--allow-product: %w", err)
	}
	if a.Exclude, err = snp.ParseProducts(p.exclude); err != nil {
		return usageError("--exclude-product: %w", err)
	}
	if p.platform != "" {
		if a.Platform, err = snp.ParsePlatformInfo(p.platform); err != nil {
			return usageError("--require-platform: %w", err)
		}
	}
	for _, text := range p.chipIDs {
		id, err := snp.ParseChipID(text)
		if err != nil {
			return usageError("--chip-id: %w", err)
		}
		a.ChipIDs = append(a.ChipIDs, id[:])
	}
	return nil
}

func readRoot(name string) (*x509.Certificate, error) {
	data, err := readLimited(name, 64<<10)
	if err != nil {
		return nil, err
	}
	root, err := snp.ParseEmulatedRoot(data)
	if err != nil {
		return nil, usageError("--allow-emulated-root %s: %w", name, err)
	}
	return root, nil
}
