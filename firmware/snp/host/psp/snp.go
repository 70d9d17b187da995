package psp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// Bits of SNP_PLATFORM_STATUS, byte 3 (56860, SNP_PLATFORM_STATUS, table
// STRUCT_PLATFORM_STATUS: IS_RMP_INIT, ALIAS_CHECK_COMPLETE, IS_TIO_EN).
const (
	flagRMPInitialized     = 1 << 0
	flagAliasCheckComplete = 1 << 1
	flagTIOEnabled         = 1 << 3
	flagsKnown             = flagRMPInitialized | flagAliasCheckComplete | flagTIOEnabled
)

// Bits of SNP_PLATFORM_STATUS at offset 8 (same table; names as in UAPI,
// struct sev_user_data_snp_status).
const (
	configMaskChipID       = 1 << 0
	configMaskChipKey      = 1 << 1
	configVLEKEnabled      = 1 << 2
	configFeatureInfo      = 1 << 3
	configRAPLDisabled     = 1 << 4
	configCiphertextHiding = 1 << 5 // the platform can
	configCiphertextHidden = 1 << 6 // and does
	configKnown            = configMaskChipID | configMaskChipKey | configVLEKEnabled | configFeatureInfo |
		configRAPLDisabled | configCiphertextHiding | configCiphertextHidden
)

// SNPStatus is struct sev_user_data_snp_status.
//
// Bits nobody has told us of are kept in UnknownFlags and UnknownConfig
// instead of refusing the answer: newer firmware must stay diagnosable, and
// nothing is decided on them. Package host reports them.
type SNPStatus struct {
	APIMajor uint8         `json:"api_major"`
	APIMinor uint8         `json:"api_minor"`
	State    PlatformState `json:"state"`

	RMPInitialized     bool  `json:"rmp_initialized"`
	AliasCheckComplete bool  `json:"alias_check_complete"`
	TIOEnabled         bool  `json:"tio_enabled"`
	UnknownFlags       uint8 `json:"unknown_flags,omitempty"`

	Build uint32 `json:"build"`

	MaskChipID              bool   `json:"mask_chip_id"`
	MaskChipKey             bool   `json:"mask_chip_key"`
	VLEKLoaded              bool   `json:"vlek_loaded"`
	FeatureInfo             bool   `json:"feature_info"`
	RAPLDisabled            bool   `json:"rapl_disabled"`
	CiphertextHidingCapable bool   `json:"ciphertext_hiding_capable"`
	CiphertextHidingEnabled bool   `json:"ciphertext_hiding_enabled"`
	UnknownConfig           uint32 `json:"unknown_config,omitempty"`

	Guests      uint32 `json:"guests"`
	CurrentTCB  Hex    `json:"current_tcb"`
	ReportedTCB Hex    `json:"reported_tcb"`
}

// Hex is a register or version of 64 bits. In JSON it is a string in hex:
// numbers above 2^53 do not survive every reader.
type Hex uint64

// MarshalText writes 0x and digits.
func (h Hex) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%#x", uint64(h)), nil }

// UnmarshalText is the inverse of MarshalText.
func (h *Hex) UnmarshalText(text []byte) error {
	digits, ok := strings.CutPrefix(string(text), "0x")
	v, err := strconv.ParseUint(digits, 16, 64)
	if !ok || err != nil {
		return fmt.Errorf("decoding %q: want 0x and up to 16 hex digits", text)
	}
	*h = Hex(v)
	return nil
}

func bit[T uint8 | uint32](on bool, mask T) T {
	if on {
		return mask
	}
	return 0
}

// Encode returns the structure's bytes.
func (s SNPStatus) Encode() [SNPStatusSize]byte {
	flags := bit[uint8](s.RMPInitialized, flagRMPInitialized) | bit[uint8](s.AliasCheckComplete, flagAliasCheckComplete) |
		bit[uint8](s.TIOEnabled, flagTIOEnabled) | s.UnknownFlags&^flagsKnown
	config := bit[uint32](s.MaskChipID, configMaskChipID) | bit[uint32](s.MaskChipKey, configMaskChipKey) |
		bit[uint32](s.VLEKLoaded, configVLEKEnabled) | bit[uint32](s.FeatureInfo, configFeatureInfo) |
		bit[uint32](s.RAPLDisabled, configRAPLDisabled) | bit[uint32](s.CiphertextHidingCapable, configCiphertextHiding) |
		bit[uint32](s.CiphertextHidingEnabled, configCiphertextHidden) | s.UnknownConfig&^configKnown
	b := [SNPStatusSize]byte{s.APIMajor, s.APIMinor, byte(s.State), flags}
	binary.LittleEndian.PutUint32(b[4:], s.Build)
	binary.LittleEndian.PutUint32(b[8:], config)
	binary.LittleEndian.PutUint32(b[12:], s.Guests)
	binary.LittleEndian.PutUint64(b[16:], uint64(s.CurrentTCB))
	binary.LittleEndian.PutUint64(b[24:], uint64(s.ReportedTCB))
	return b
}

// DecodeSNPStatus is the inverse of Encode.
func DecodeSNPStatus(b []byte) (SNPStatus, error) {
	if err := wantSize("sev_user_data_snp_status", b, SNPStatusSize); err != nil {
		return SNPStatus{}, err
	}
	if state := PlatformState(b[2]); state > Initialized {
		return SNPStatus{}, fmt.Errorf("decoding sev_user_data_snp_status: state %d is not defined", b[2])
	}
	flags, config := b[3], binary.LittleEndian.Uint32(b[8:])
	return SNPStatus{
		APIMajor: b[0], APIMinor: b[1], State: PlatformState(b[2]),
		RMPInitialized: flags&flagRMPInitialized != 0, AliasCheckComplete: flags&flagAliasCheckComplete != 0,
		TIOEnabled: flags&flagTIOEnabled != 0, UnknownFlags: flags &^ flagsKnown,
		Build:      binary.LittleEndian.Uint32(b[4:]),
		MaskChipID: config&configMaskChipID != 0, MaskChipKey: config&configMaskChipKey != 0,
		VLEKLoaded: config&configVLEKEnabled != 0, FeatureInfo: config&configFeatureInfo != 0,
		RAPLDisabled: config&configRAPLDisabled != 0, CiphertextHidingCapable: config&configCiphertextHiding != 0,
		CiphertextHidingEnabled: config&configCiphertextHidden != 0, UnknownConfig: config &^ configKnown,
		Guests:      binary.LittleEndian.Uint32(b[12:]),
		CurrentTCB:  Hex(binary.LittleEndian.Uint64(b[16:])),
		ReportedTCB: Hex(binary.LittleEndian.Uint64(b[24:])),
	}, nil
}

// Config is struct sev_user_data_snp_config, what SNP_SET_CONFIG sets.
type Config struct {
	// ReportedTCB is the TCB_VERSION that reports state and VCEKs are derived
	// from; 0 means the current one (56860, SNP_CONFIG).
	ReportedTCB Hex
	// MaskChipID zeroes the chip id in reports, MaskChipKey leaves them
	// unsigned. Either makes a host useless for attestation by VCEK.
	MaskChipID, MaskChipKey bool
}

// Encode returns the structure's bytes.
func (c Config) Encode() [ConfigSize]byte {
	var b [ConfigSize]byte
	binary.LittleEndian.PutUint64(b[0:], uint64(c.ReportedTCB))
	binary.LittleEndian.PutUint32(b[8:], bit[uint32](c.MaskChipID, configMaskChipID)|bit[uint32](c.MaskChipKey, configMaskChipKey))
	return b
}

// DecodeConfig is the inverse of Encode.
func DecodeConfig(b []byte) (Config, error) {
	if err := wantSize("sev_user_data_snp_config", b, ConfigSize); err != nil {
		return Config{}, err
	}
	flags := binary.LittleEndian.Uint32(b[8:])
	if flags&^(configMaskChipID|configMaskChipKey) != 0 || len(bytes.Trim(b[12:], "\x00")) != 0 {
		return Config{}, fmt.Errorf("decoding sev_user_data_snp_config: reserved bits are set")
	}
	return Config{
		ReportedTCB: Hex(binary.LittleEndian.Uint64(b[0:])),
		MaskChipID:  flags&configMaskChipID != 0, MaskChipKey: flags&configMaskChipKey != 0,
	}, nil
}
