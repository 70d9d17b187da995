package snp

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
)

// platform checks versions and facts of the host's processor.
func (res *Result) platform(r *Report, p Product, x *Expect) {
	res.versions(r, p, x)
	provisional := r.CommittedTCB != r.CurrentTCB || r.CommittedVersion != r.CurrentVersion
	committed, current := r.CommittedVersion.String()+", "+p.TCB(r.CommittedTCB).String(), r.CurrentVersion.String()+", "+p.TCB(r.CurrentTCB).String()
	const rollback = "the firmware is provisional and could be rolled back"
	if provisional && x.AllowProvisional {
		res.Skip("committed-is-current", "allowed by you: "+rollback)
		res.warn("committed-is-current", rollback+": committed "+committed+"; current "+current)
	} else {
		res.Add("committed-is-current", !provisional, committed, current, "the firmware is committed and cannot be rolled back", rollback+"; the provider must commit it")
	}
	if missing := x.Platform &^ r.PlatformInfo; x.Platform != 0 {
		res.Add("platform-info", missing == 0, x.Platform.String(), r.PlatformInfo.String(), "the platform states every fact you demand",
			"the platform does not state "+missing.String()+"; the provider must change its BIOS settings or update its firmware")
	}
	if len(x.ChipIDs) > 0 {
		res.Add("chip-allowed", oneOf(x.ChipIDs, r.ChipID[:]),
			"", hex.EncodeToString(r.ChipID[:]), "the chip is on your list", "the chip is not on your list; use a host that is, or add this chip id")
	}
	res.smt(r, x)
	if r.PlatformInfo&PlatformAliasCheck == 0 {
		res.warn("alias-check", "the platform does not say that it looked for aliased memory: a manipulated memory module could read the guest (AMD-SB-3015); demand alias-check, and have the provider update its BIOS")
	}
	if rest := r.PlatformInfo.unknown(); rest != 0 {
		res.warn("platform-info", fmt.Sprintf("the platform states facts this version does not know (%#x); use a newer one", uint64(rest)))
	}
}

// versions checks the four TCB versions and the mitigation vectors.
func (res *Result) versions(r *Report, p Product, x *Expect) {
	floor, mitigations, err := x.floor(r)
	var low, odd []string
	for _, v := range []struct {
		name  string
		value uint64
	}{{"reported", r.ReportedTCB}, {"committed", r.CommittedTCB}, {"current", r.CurrentTCB}, {"launch", r.LaunchTCB}} {
		tcb := p.TCB(v.value)
		if !atLeast(tcb, floor) {
			low = append(low, v.name+" "+tcb.String())
		}
		if p.EncodeTCB(tcb) != v.value {
			odd = append(odd, fmt.Sprintf("%s %#x", v.name, v.value))
		}
	}
	res.Add("tcb-layout", len(odd) == 0, "", strings.Join(odd, "; "), "the TCB versions are in the layout of "+p.Name,
		"a TCB version has something in bytes that "+p.Name+" does not use; its meaning is not known, so use a newer version of this verifier")
	switch {
	case err != nil:
		res.Add("tcb-floor", false, "", "", "", err.Error()+fmt.Sprintf(" (family %#x, model %#x); state one, or a floor for any", r.Family, r.Model))
	case floor == contract.TCB{}:
		const why = "NOT checked: no floor was given, so firmware and microcode of any age are accepted"
		res.Skip("tcb-floor", why)
		res.warn("tcb-floor", why)
	default:
		res.Add("tcb-floor", len(low) == 0, floor.String(), strings.Join(low, "; "), "reported, committed, current and launch TCB reach the floor",
			"the platform's TCB is below the floor; the provider must update firmware or microcode")
	}
	if mitigations != 0 {
		both := r.LaunchMitigations & r.CurrentMitigations
		res.Add("mitigations", mitigations&^both == 0, fmt.Sprintf("%#x", mitigations), fmt.Sprintf("%#x at launch, %#x now", r.LaunchMitigations, r.CurrentMitigations),
			"the mitigations you demand were in force at launch and are now", "a mitigation is missing; the provider must update its firmware and launch the guest again")
	}
}

func (res *Result) smt(r *Report, x *Expect) {
	permitted, active := r.Policy&PolicySMT != 0, r.PlatformInfo&PlatformSMT != 0
	if x.ForbidSMT {
		res.Add("smt", !permitted && !active, "off", fmt.Sprintf("permitted %v, active %v", permitted, active), "no other thread shares a core with the guest",
			"SMT is permitted or active; launch with policy bit 16 clear on a host that has SMT off")
		return
	}
	if active || permitted {
		res.warn("smt", "SMT is permitted: another thread of the core may observe the guest through side channels (AMD-SB-3027 is mitigated fully only without)")
	}
}

// guest checks what was started.
func (res *Result) guest(r *Report, x *Expect) {
	policy := fmt.Sprintf("%#x", uint64(r.Policy))
	res.Add("vmpl", r.VMPL == 0, "0", fmt.Sprint(r.VMPL), "asked for by the guest's most privileged level", "the report was not asked for at VMPL 0; take it from the guest's own kernel, not from the host or a less privileged level")
	res.Add("policy-reserved", r.Policy&PolicyReservedOne != 0 && r.Policy&^policyKnown == 0, "bit 17 and no unknown bit", policy, "a guest policy this version knows",
		"the guest policy has bits whose meaning is not known; launch with a policy of defined bits only")
	res.Add("policy-debug", r.Policy&PolicyDebug == 0, "off", policy, "debugging is off", "the host may read the guest's memory: debugging is on in the guest policy; launch with policy bit 19 clear")
	noAgent := bytes.Equal(r.ReportIDMA[:], bytes.Repeat([]byte{0xFF}, len(r.ReportIDMA)))
	res.Add("policy-migration", r.Policy&PolicyMigrationAgent == 0 && noAgent, "off", policy, "no migration agent", "a migration agent could move the guest's secrets; launch with policy bit 18 clear and without an agent")
	res.Add("policy-cxl", r.Policy&PolicyCXL == 0, "off", policy, "no memory behind CXL", "the guest may be given memory behind CXL, outside the processor's own controllers; launch with policy bit 21 clear")
	res.idBlock(r, x)
	var want []string
	for _, m := range x.Measurements {
		want = append(want, hex.EncodeToString(m))
	}
	res.Add("launch-digest", oneOf(x.Measurements, r.Measurement[:]), strings.Join(want, " or "), hex.EncodeToString(r.Measurement[:]), "firmware, kernel, initrd, command line and vCPUs are the expected ones",
		"something else was started: the launch digest is not an expected one; compare firmware, kernel, initrd, command line, vCPU count and CPU model with what was measured")
	res.Add("host-data", x.HostData != nil && bytes.Equal(x.HostData, r.HostData[:]), hex.EncodeToString(x.HostData), hex.EncodeToString(r.HostData[:]),
		"started with exactly this manifest", "started with another manifest: HOST_DATA differs; launch with the manifest you wrote, and give that one here")
	res.Add("report-data", x.ReportData != nil && bytes.Equal(x.ReportData, r.ReportData[:]), hex.EncodeToString(x.ReportData), hex.EncodeToString(r.ReportData[:]),
		"fresh, and bound to the guest's keys", "not made for this nonce and these keys: a replay, or a swap on the way; challenge the guest again with a fresh nonce")
}

// idBlock checks whose ID block the guest was launched with, where demanded.
func (res *Result) idBlock(r *Report, x *Expect) {
	keys := func(name string, accepted [][]byte, signed bool, got []byte, who string) {
		if len(accepted) == 0 {
			return
		}
		var want []string
		for _, k := range accepted {
			want = append(want, hex.EncodeToString(k))
		}
		// Without an ID block the digests are zero, which is nobody's key.
		holds := signed && oneOf(accepted, got) && len(bytes.Trim(got, "\x00")) > 0
		res.Add(name, holds, strings.Join(want, " or "), hex.EncodeToString(got), "the ID block carries "+who+" you accept",
			"launched without an ID block that carries "+who+" you accept; launch with the publisher's ID block")
	}
	keys("id-key", x.IDKeys, true, r.IDKeyDigest[:], "the signature of an ID key")
	keys("author-key", x.AuthorKeys, r.AuthorKey(), r.AuthorDigest[:], "the signature of an author key")
	if x.MinGuestSVN > 0 {
		res.Add("guest-svn", r.GuestSVN >= x.MinGuestSVN, fmt.Sprintf("at least %d", x.MinGuestSVN), fmt.Sprint(r.GuestSVN), "the image is recent enough by its publisher's count",
			"the image is older than you accept; launch a newer one with its ID block")
	}
	for _, id := range []struct {
		name      string
		want, got []byte
	}{{"family-id", x.FamilyID, r.FamilyID[:]}, {"image-id", x.ImageID, r.ImageID[:]}} {
		if id.want != nil {
			res.Add(id.name, bytes.Equal(id.want, id.got), hex.EncodeToString(id.want), hex.EncodeToString(id.got), "the ID block names the expected "+id.name,
				"the ID block names another "+id.name+", or there is none; launch with the publisher's ID block")
		}
	}
}
