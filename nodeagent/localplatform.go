package main

import (
	"context"
	"encoding/hex"
	"fmt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/endorsements"
)

// localPlatform is nil where there is nothing to ask: under emulation, whose
// certificates come with the emulator.
func localPlatform(cfg config.Config) endorsements.Platform {
	if cfg.TEE == config.TEEEmulated {
		return nil
	}
	return snpPlatform{host.New("/", host.Linux{})}
}

// snpPlatform asks the firmware of this machine.
type snpPlatform struct{ reader *host.Reader }

// Identity is what reports of this machine are signed for: the chip of the
// first socket, whose security processor signs for all, and the reported TCB.
// A loaded VLEK is the default of guests that do not choose.
func (p snpPlatform) Identity(context.Context) (endorsements.Identity, error) {
	r := host.Judge(p.reader.Facts())
	if r.ReportedTCB == nil || len(r.Facts.ChipIDs) == 0 {
		return endorsements.Identity{}, noSNP(r)
	}
	vlek := r.Facts.SNPFirmware.VLEKLoaded
	if r.Facts.SNPFirmware.MaskChipID && !vlek {
		return endorsements.Identity{}, contract.Refuse("platform.chip-id-masked", "clear MASK_CHIP_ID with `nodeagent platform configure`, or load a VLEK",
			"reports of this machine carry no chip id, so that no VCEK fits them: MASK_CHIP_ID is set")
	}
	chipID, err := hex.DecodeString(r.Facts.ChipIDs[0])
	if err != nil {
		return endorsements.Identity{}, fmt.Errorf("decoding chip id: %w", err)
	}
	id, err := snp.NewIdentity(r.Processor.Product, chipID, r.ReportedTCB.Parts)
	if err != nil {
		return endorsements.Identity{}, contract.Refuse("platform.bad-identity", "update the BIOS, which carries the SEV firmware; if it repeats, report it with `nodeagent capability -o json`",
			"the firmware's chip id and TCB are none of the product line %s", r.Processor.Product).Because(err)
	}
	return endorsements.Identity{Identity: id, VLEK: vlek}, nil
}

// noSNP says why there is no identity: what could not be asked for want of
// rights is not yet a machine without SNP.
func noSNP(r host.Report) *contract.Refusal {
	for _, f := range r.Findings {
		if f.Code == "unread.dev.sev" {
			return contract.Refuse("platform.not-asked", f.Remedy,
				"the SEV firmware of this machine could not be asked: %s", f.Observed)
		}
	}
	why := r.Why()
	if why == "" {
		why = "the firmware tells no chip id or TCB"
	}
	return contract.Refuse("platform.no-snp", "run `nodeagent capability` for each reason and its remedy",
		"SEV-SNP is not in use on this machine: %s", why)
}
