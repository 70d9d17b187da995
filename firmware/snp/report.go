// Package snp reads SEV-SNP attestation reports and judges them: layout and
// reserved fields, TCB in the layout of its processor, the certificate chain
// up to a pinned AMD root, the binding of the leaf to chip and TCB, the
// signature, and a relying party's policy. The outcome is a list of named
// checks, never a bare boolean.
//
// It verifies with what it is given and fetches nothing; all functions are
// pure and safe for concurrent use. Reports and certificates come from
// parties that are not trusted.
//
// Specification: AMD 56860 rev. 1.58 (SEV-SNP firmware ABI), table
// ATTESTATION_REPORT; AMD 57230 (VCEK certificate and KDS interface).
package snp

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/confidential-node/agent/firmware/contract"
)

// Sizes and offsets of ATTESTATION_REPORT.
const (
	// ReportSize is the size of a report in bytes.
	ReportSize = 0x4A0
	// signedSize is how much of it the signature covers.
	signedSize = 0x2A0
	// componentSize is the size of R and S, little endian.
	componentSize = 72

	minVersion = 2
	maxVersion = 5

	offVersion      = 0x000
	offGuestSVN     = 0x004
	offPolicy       = 0x008
	offFamilyID     = 0x010
	offImageID      = 0x020
	offVMPL         = 0x030
	offSigAlgo      = 0x034
	offCurrentTCB   = 0x038
	offPlatformInfo = 0x040
	offSignerInfo   = 0x048
	offReportData   = 0x050
	offMeasurement  = 0x090
	offHostData     = 0x0C0
	offIDKey        = 0x0E0
	offAuthorKey    = 0x110
	offReportID     = 0x140
	offReportIDMA   = 0x160
	offReportedTCB  = 0x180
	offCPUID        = 0x188
	offChipID       = 0x1A0
	offCommittedTCB = 0x1E0
	offCurrentVer   = 0x1E8
	offCommittedVer = 0x1EC
	offLaunchTCB    = 0x1F0
	offLaunchMit    = 0x1F8
	offCurrentMit   = 0x200
	offSignature    = 0x2A0
)

// signatureAlgorithm is ECDSA P-384 with SHA-384.
const signatureAlgorithm = 1

// Key that signed a report (SIGNER_INFO bits 4:2).
const (
	SignerVCEK = 0
	SignerVLEK = 1
)

// Version3 adds the processor's family, model and stepping.
const version3 = 3

// Version is a firmware version.
type Version struct{ Major, Minor, Build uint8 }

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Build) }

// Report is one attestation report, decoded.
type Report struct {
	Version      uint32
	GuestSVN     uint32
	Policy       Policy
	FamilyID     [16]byte
	ImageID      [16]byte
	VMPL         uint32
	SigAlgo      uint32
	CurrentTCB   uint64
	PlatformInfo PlatformInfo
	SignerInfo   uint32
	ReportData   [contract.ReportDataSize]byte
	Measurement  [48]byte
	HostData     [32]byte
	IDKeyDigest  [48]byte
	AuthorDigest [48]byte
	ReportID     [32]byte
	ReportIDMA   [32]byte
	ReportedTCB  uint64
	// Family, Model and Stepping are zero before version 3.
	Family, Model, Stepping uint8
	ChipID                  [64]byte
	CommittedTCB            uint64
	CurrentVersion          Version
	CommittedVersion        Version
	LaunchTCB               uint64
	LaunchMitigations       uint64
	CurrentMitigations      uint64
	// Signature is R then S, 72 bytes each, little endian.
	Signature [2 * componentSize]byte
}

// SigningKey is the kind of key that signed (SignerVCEK, SignerVLEK or what
// else the field holds).
func (r *Report) SigningKey() uint32 { return r.SignerInfo >> 2 & 7 }

// AuthorKey reports whether an author key signed the ID key.
func (r *Report) AuthorKey() bool { return r.SignerInfo&1 != 0 }

// ChipKeyMasked reports whether the report is not signed at all.
func (r *Report) ChipKeyMasked() bool { return r.SignerInfo&2 != 0 }

// signerInfoKnown are the bits of SIGNER_INFO that mean something.
const signerInfoKnown = 0x1F

// ErrReport means that bytes are no report this build understands.
var ErrReport = errors.New("malformed attestation report")

// ParseReport decodes a report. It refuses any other size, an unknown
// version, and anything but zeros in reserved fields, so that every byte
// either means something or is refused.
func ParseReport(data []byte) (*Report, error) {
	if len(data) != ReportSize {
		return nil, fmt.Errorf("%w: %d bytes, want %d", ErrReport, len(data), ReportSize)
	}
	var r Report
	if r.Version = binary.LittleEndian.Uint32(data); r.Version < minVersion || r.Version > maxVersion {
		return nil, fmt.Errorf("%w: version %d is not supported, this build knows %d to %d", ErrReport, r.Version, minVersion, maxVersion)
	}
	r.decode(data)
	// Whatever the struct does not hold must be zero: encoding it again shows.
	again := r.Marshal()
	for i, b := range data {
		if again[i] != b {
			return nil, fmt.Errorf("%w: reserved byte %#x is %#x, want 0", ErrReport, i, b)
		}
	}
	return &r, nil
}

func (r *Report) decode(data []byte) {
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(data[at:]) }
	u64 := func(at int) uint64 { return binary.LittleEndian.Uint64(data[at:]) }
	r.GuestSVN, r.Policy, r.VMPL, r.SigAlgo = u32(offGuestSVN), Policy(u64(offPolicy)), u32(offVMPL), u32(offSigAlgo)
	r.CurrentTCB, r.PlatformInfo, r.SignerInfo = u64(offCurrentTCB), PlatformInfo(u64(offPlatformInfo)), u32(offSignerInfo)
	r.ReportedTCB, r.CommittedTCB, r.LaunchTCB = u64(offReportedTCB), u64(offCommittedTCB), u64(offLaunchTCB)
	for _, f := range r.arrays() {
		copy(f.bytes, data[f.at:])
	}
	if r.Version >= version3 {
		r.Family, r.Model, r.Stepping = data[offCPUID], data[offCPUID+1], data[offCPUID+2]
	}
	if r.Version > version3 {
		r.LaunchMitigations, r.CurrentMitigations = u64(offLaunchMit), u64(offCurrentMit)
	}
	r.CurrentVersion = Version{Build: data[offCurrentVer], Minor: data[offCurrentVer+1], Major: data[offCurrentVer+2]}
	r.CommittedVersion = Version{Build: data[offCommittedVer], Minor: data[offCommittedVer+1], Major: data[offCommittedVer+2]}
}

type array struct {
	at    int
	bytes []byte
}

func (r *Report) arrays() []array {
	return []array{
		{offFamilyID, r.FamilyID[:]},
		{offImageID, r.ImageID[:]},
		{offReportData, r.ReportData[:]},
		{offMeasurement, r.Measurement[:]},
		{offHostData, r.HostData[:]},
		{offIDKey, r.IDKeyDigest[:]},
		{offAuthorKey, r.AuthorDigest[:]},
		{offReportID, r.ReportID[:]},
		{offReportIDMA, r.ReportIDMA[:]},
		{offChipID, r.ChipID[:]},
		{offSignature, r.Signature[:]},
	}
}

// Marshal encodes the report.
func (r *Report) Marshal() []byte {
	data := make([]byte, ReportSize)
	p32 := func(at int, v uint32) { binary.LittleEndian.PutUint32(data[at:], v) }
	p64 := func(at int, v uint64) { binary.LittleEndian.PutUint64(data[at:], v) }
	p32(offVersion, r.Version)
	p32(offGuestSVN, r.GuestSVN)
	p64(offPolicy, uint64(r.Policy))
	p32(offVMPL, r.VMPL)
	p32(offSigAlgo, r.SigAlgo)
	p64(offCurrentTCB, r.CurrentTCB)
	p64(offPlatformInfo, uint64(r.PlatformInfo))
	p32(offSignerInfo, r.SignerInfo)
	p64(offReportedTCB, r.ReportedTCB)
	p64(offCommittedTCB, r.CommittedTCB)
	p64(offLaunchTCB, r.LaunchTCB)
	p64(offLaunchMit, r.LaunchMitigations)
	p64(offCurrentMit, r.CurrentMitigations)
	copy(data[offCPUID:], []byte{r.Family, r.Model, r.Stepping})
	copy(data[offCurrentVer:], []byte{r.CurrentVersion.Build, r.CurrentVersion.Minor, r.CurrentVersion.Major})
	copy(data[offCommittedVer:], []byte{r.CommittedVersion.Build, r.CommittedVersion.Minor, r.CommittedVersion.Major})
	for _, f := range r.arrays() {
		copy(data[f.at:], f.bytes)
	}
	return data
}

// ParseChipID reads a chip id in hex: 64 bytes as CHIP_ID has it, or Turin's 8
// without the zeros behind them.
func ParseChipID(text string) ([64]byte, error) {
	var id [64]byte
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw) != len(id) && len(raw) != 8 {
		return id, fmt.Errorf("chip id %q is not 128 hex digits, or 16 of a Turin", text)
	}
	copy(id[:], raw)
	return id, nil
}
