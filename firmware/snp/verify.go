package snp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Status is the outcome of one check.
type Status string

// Outcomes. Skip never counts as held on its own behalf and never fails.
const (
	Pass Status = "pass"
	Fail Status = "fail"
	Skip Status = "skip"
)

// Check is one named finding. Names are stable.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	// Want and Got are the compared values, "" where there are none.
	Want string `json:"want,omitempty"`
	Got  string `json:"got,omitempty"`
	// Why is one sentence for people: what holds, or what to do.
	Why string `json:"why,omitempty"`
}

// Result is every check that was made.
type Result struct{ Checks []Check }

// OK reports whether at least one check was made and none failed.
func (res *Result) OK() bool {
	return len(res.Checks) > 0 && !slices.ContainsFunc(res.Checks, func(c Check) bool { return c.Status == Fail })
}

// Failed returns the first failed check, nil when there is none.
func (res *Result) Failed() *Check {
	for i := range res.Checks {
		if res.Checks[i].Status == Fail {
			return &res.Checks[i]
		}
	}
	return nil
}

// Add appends a check: holds with its sentence, or not with the other one.
func (res *Result) Add(name string, holds bool, want, got, held, broken string) {
	c := Check{name, Pass, want, got, held}
	if !holds {
		c.Status, c.Why = Fail, broken
	}
	res.Checks = append(res.Checks, c)
}

// Expect is a relying party's policy. The zero value of a field is strict.
type Expect struct {
	// ReportData, HostData and one of Measurements must be in the report.
	// Nil ReportData or HostData and empty Measurements fail.
	ReportData   []byte
	HostData     []byte
	Measurements [][]byte
	// MinTCB is compared component by component with the reported, committed,
	// current and launch TCB.
	MinTCB contract.TCB
	// ChipIDs limits the processors, 64 bytes each; empty means any.
	ChipIDs [][]byte
	// AllowMilan accepts EPYC 7003, whose root seed can be extracted.
	AllowMilan bool
	// EmulatedRoots are accepted beside AMD's when their subject says EMULATED.
	EmulatedRoots []*x509.Certificate
	// Now is when the certificates must be valid. Required.
	Now time.Time
}

// Verify judges a report with its endorsements. It never stops at the first
// failure unless nothing after it could be said.
func Verify(report []byte, e contract.Endorsements, x Expect) Result {
	var res Result
	r, err := ParseReport(report)
	if err != nil {
		res.Add("report", false, "", "", "", err.Error()+"; this is not evidence, or it was changed on the way")
		return res
	}
	res.Add("report", true, "", fmt.Sprint(r.Version), fmt.Sprintf("an attestation report of version %d", r.Version), "")
	res.endorsed(r, report, e, x)
	res.guest(r, x)
	return res
}

// endorsed checks who signed: root, chain, leaf binding, signature, TCB.
func (res *Result) endorsed(r *Report, raw []byte, e contract.Endorsements, x Expect) {
	res.Add("signing-key", r.SigAlgo == signatureAlgorithm && r.SigningKey() == SignerVCEK && !r.ChipKeyMasked(), "VCEK, ECDSA P-384", fmt.Sprintf("signer info %#x, algorithm %d", r.SignerInfo, r.SigAlgo),
		"signed by the chip's own key (VCEK)", "the report is not signed by the chip's own key; the provider must neither mask it (MASK_CHIP_KEY) nor force a VLEK")
	root, emulated, err := findRoot(e.ARK, x.EmulatedRoots)
	if err != nil {
		res.Add("root", false, "", "", "", err.Error())
		return
	}
	kind := "AMD's pinned root " + root.Subject.CommonName
	if emulated {
		kind = "an EMULATED root, allowed by you: no silicon stands behind this"
	}
	res.Add("root", true, "", root.Subject.CommonName, kind, "")
	l, err := parseLeaf(e.VCEK)
	if err != nil {
		res.Add("chain", false, "", "", "", fmt.Sprintf("the chip's certificate cannot be used: %v; fetch the VCEK of this chip from AMD's key service", err))
		return
	}
	err = verifyChain(l, e.ASK, root, x.Now)
	res.Add("chain", err == nil, "", l.cert.Subject.CommonName, "certificate chain from the chip to the root holds", fmt.Sprintf("the certificate chain does not hold: %v; fetch VCEK and ASK anew, and compare this machine's clock", err))
	res.Add("signature", signatureHolds(r, raw, l), "", "", "the report is signed by that chip", "the signature does not match: the report was changed or another chip made it; do not use this host until it shows a report and a VCEK that match")
	product, err := productOf(r, l, emulated)
	if err != nil {
		res.Add("product", false, "", l.product, "", err.Error()+"; use a host of the Genoa or Turin line")
		return
	}
	res.Add("product", product.Name != ProductMilan || x.AllowMilan, "", product.Name, "processor line "+product.Name,
		"EPYC 7003 (Milan) is excluded: its attestation root can be extracted in software, so its reports can be forged; use a Genoa or Turin host, or allow Milan knowingly")
	res.bound(r, l, product)
	res.platform(r, product, x)
}

// productOf takes the processor from the report (version 3 and later) and
// demands that the certificate agrees; before, only the certificate knows.
func productOf(r *Report, l *leaf, emulated bool) (Product, error) {
	if r.Version < version3 {
		return ProductByName(l.product)
	}
	p, err := productByCPUID(r.Family, r.Model)
	if err != nil {
		return p, err
	}
	if l.product != p.Name && (!emulated || l.product != "Emulated") {
		return p, fmt.Errorf("the report is from a %s, its certificate for a %s", p.Name, l.product)
	}
	return p, nil
}

// signatureHolds checks ECDSA over the signed part; R and S are little endian.
func signatureHolds(r *Report, raw []byte, l *leaf) bool {
	key, ok := l.cert.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return false
	}
	sum := sha512.Sum384(raw[:signedSize])
	component := func(b []byte) *big.Int {
		b = slices.Clone(b)
		slices.Reverse(b)
		return new(big.Int).SetBytes(b)
	}
	return ecdsa.Verify(key, sum[:], component(r.Signature[:componentSize]), component(r.Signature[componentSize:]))
}

// bound checks that the certificate was made for this chip at this TCB.
func (res *Result) bound(r *Report, l *leaf, p Product) {
	id, rest := r.ChipID[:p.hwidSize], r.ChipID[p.hwidSize:]
	res.Add("chip-id", bytes.Equal(l.hwid, id) && len(bytes.Trim(rest, "\x00")) == 0 && len(bytes.Trim(id, "\x00")) > 0,
		hex.EncodeToString(l.hwid), hex.EncodeToString(r.ChipID[:]), "the certificate is this chip's",
		"the certificate is for another chip, or the host masks its chip id (MASK_CHIP_ID)")
	reported := p.TCB(r.ReportedTCB)
	res.Add("tcb-binding", reported == l.tcb && p.hasFMC == l.hasFMC, l.tcb.String(), reported.String(), "the certificate is for the reported TCB",
		"the certificate is for another TCB; the host must fetch the one for the TCB it reports")
}

// platform checks versions: floors on all four, and no provisional firmware.
func (res *Result) platform(r *Report, p Product, x Expect) {
	var low []string
	for _, v := range []struct {
		name  string
		value uint64
	}{{"reported", r.ReportedTCB}, {"committed", r.CommittedTCB}, {"current", r.CurrentTCB}, {"launch", r.LaunchTCB}} {
		if tcb := p.TCB(v.value); !atLeast(tcb, x.MinTCB) {
			low = append(low, v.name+" "+tcb.String())
		}
	}
	res.Add("tcb-floor", len(low) == 0, x.MinTCB.String(), strings.Join(low, "; "), "reported, committed, current and launch TCB reach the floor",
		"the platform's TCB is below the floor; the provider must update firmware or microcode")
	res.Add("committed-is-current", r.CommittedTCB == r.CurrentTCB && r.CommittedVersion == r.CurrentVersion,
		p.TCB(r.CommittedTCB).String(), p.TCB(r.CurrentTCB).String(), "the firmware is committed and cannot be rolled back",
		"the firmware is provisional and could be rolled back; the provider must commit it")
	if len(x.ChipIDs) > 0 {
		res.Add("chip-allowed", slices.ContainsFunc(x.ChipIDs, func(id []byte) bool { return bytes.Equal(id, r.ChipID[:]) }),
			"", hex.EncodeToString(r.ChipID[:]), "the chip is on your list", "the chip is not on your list; use a host that is, or add this chip id")
	}
}

// guest checks what was started.
func (res *Result) guest(r *Report, x Expect) {
	res.Add("vmpl", r.VMPL == 0, "0", fmt.Sprint(r.VMPL), "asked for by the guest's most privileged level", "the report was not asked for at VMPL 0; take it from the guest's own kernel, not from the host or a less privileged level")
	res.Add("policy-debug", r.Policy&PolicyDebug == 0, "off", fmt.Sprintf("%#x", uint64(r.Policy)), "debugging is off", "the host may read the guest's memory: debugging is on in the guest policy; launch with policy bit 19 clear")
	noAgent := bytes.Equal(r.ReportIDMA[:], bytes.Repeat([]byte{0xFF}, len(r.ReportIDMA)))
	res.Add("policy-migration", r.Policy&PolicyMigrationAgent == 0 && noAgent, "off", fmt.Sprintf("%#x", uint64(r.Policy)), "no migration agent", "a migration agent could move the guest's secrets; launch with policy bit 18 clear and without an agent")
	var want []string
	found := false
	for _, m := range x.Measurements {
		want = append(want, hex.EncodeToString(m))
		found = found || bytes.Equal(m, r.Measurement[:])
	}
	res.Add("launch-digest", found, strings.Join(want, " or "), hex.EncodeToString(r.Measurement[:]), "firmware, kernel, initrd, command line and vCPUs are the expected ones",
		"something else was started: the launch digest is not an expected one; compare firmware, kernel, initrd, command line, vCPU count and CPU model with what was measured")
	res.Add("host-data", x.HostData != nil && bytes.Equal(x.HostData, r.HostData[:]), hex.EncodeToString(x.HostData), hex.EncodeToString(r.HostData[:]),
		"started with exactly this manifest", "started with another manifest: HOST_DATA differs; launch with the manifest you wrote, and give that one here")
	res.Add("report-data", x.ReportData != nil && bytes.Equal(x.ReportData, r.ReportData[:]), hex.EncodeToString(x.ReportData), hex.EncodeToString(r.ReportData[:]),
		"fresh, and bound to the guest's keys", "not made for this nonce and these keys: a replay, or a swap on the way; challenge the guest again with a fresh nonce")
}
