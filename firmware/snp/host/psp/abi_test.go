package psp_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/snp/host/psp"
)

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The bytes are written by hand from the documents, never by the code.
func TestStructuresHaveTheDocumentsBytes(t *testing.T) {
	t.Parallel()
	issue := psp.Issue{Command: psp.SNPPlatformStatusCommand, Data: 0x1122334455667788, Error: 0x16}
	legacy := psp.PlatformStatus{APIMajor: 1, APIMinor: 55, State: psp.Working, Flags: 0x101, Build: 49, Guests: 3}
	id := psp.GetID2{Address: 0x1122334455667788, Length: 128}
	status := psp.SNPStatus{
		APIMajor: 1, APIMinor: 55, State: psp.Initialized, RMPInitialized: true, AliasCheckComplete: true, Build: 49,
		VLEKLoaded: true, FeatureInfo: true, Guests: 7, CurrentTCB: 0x561b00000000000a, ReportedTCB: 0x541700000000000a,
	}
	masks := psp.SNPStatus{MaskChipID: true, MaskChipKey: true, TIOEnabled: true, RAPLDisabled: true, CiphertextHidingCapable: true, CiphertextHidingEnabled: true, UnknownFlags: 0x04, UnknownConfig: 1 << 31}
	config := psp.Config{ReportedTCB: 0x541700000000000a, MaskChipKey: true}
	load := psp.VLEKLoad{Address: 0x1122334455667788}
	for _, c := range []struct {
		name, golden string
		encoded      func() []byte
		decoded      func([]byte) (any, error)
		want         any
	}{
		{"sev_issue_cmd", "09000000 8877665544332211 16000000", func() []byte { b := issue.Encode(); return b[:] }, func(b []byte) (any, error) { return psp.DecodeIssue(b) }, issue},
		{"sev_user_data_status", "01 37 02 01010000 31 03000000", func() []byte { b := legacy.Encode(); return b[:] }, func(b []byte) (any, error) { return psp.DecodePlatformStatus(b) }, legacy},
		{"sev_user_data_get_id2", "8877665544332211 80000000", func() []byte { b := id.Encode(); return b[:] }, func(b []byte) (any, error) { return psp.DecodeGetID2(b) }, id},
		{"sev_user_data_snp_status", "01 37 01 03 31000000 0c000000 07000000 0a00000000001b56 0a00000000001754", func() []byte { b := status.Encode(); return b[:] }, func(b []byte) (any, error) { return psp.DecodeSNPStatus(b) }, status},
		{"sev_user_data_snp_status, other bits", "00 00 00 0c 00000000 73000080 00000000 0000000000000000 0000000000000000", func() []byte { b := masks.Encode(); return b[:] }, func(b []byte) (any, error) { return psp.DecodeSNPStatus(b) }, masks},
		{"sev_user_data_snp_config", "0a00000000001754 02000000" + strings.Repeat("00", 52), func() []byte { b := config.Encode(); return b[:] }, func(b []byte) (any, error) { return psp.DecodeConfig(b) }, config},
		{"sev_user_data_snp_vlek_load", "10000000 00 000000 8877665544332211", func() []byte { b := load.Encode(); return b[:] }, func(b []byte) (any, error) { return psp.DecodeVLEKLoad(b) }, load},
	} {
		golden := unhex(t, c.golden)
		if got := c.encoded(); !bytes.Equal(got, golden) {
			t.Errorf("%s encodes to %x, want %x", c.name, got, golden)
		}
		if got, err := c.decoded(golden); err != nil || got != c.want {
			t.Errorf("%s decodes to %+v (%v), want %+v", c.name, got, err, c.want)
		}
		for _, wrong := range [][]byte{golden[1:], append(golden, 0), nil} {
			if _, err := c.decoded(wrong); err == nil {
				t.Errorf("%s: %d bytes are accepted", c.name, len(wrong))
			}
		}
	}
}

func TestWhatIsNotDefinedIsRefused(t *testing.T) {
	t.Parallel()
	flip := func(golden string, at int, to byte) []byte {
		b := unhex(t, golden)
		b[at] = to
		return b
	}
	zeros := func(n int) string { return strings.Repeat("00", n) }
	for name, decode := range map[string]func() error{
		"legacy state 3":       func() error { _, err := psp.DecodePlatformStatus(flip(zeros(12), 2, 3)); return err },
		"SNP state 2":          func() error { _, err := psp.DecodeSNPStatus(flip(zeros(32), 2, 2)); return err },
		"config bit 2":         func() error { _, err := psp.DecodeConfig(flip(zeros(64), 8, 4)); return err },
		"config reserved byte": func() error { _, err := psp.DecodeConfig(flip(zeros(64), 63, 1)); return err },
		"VLEK length":          func() error { _, err := psp.DecodeVLEKLoad(flip("10"+zeros(15), 0, 17)); return err },
		"VLEK version":         func() error { _, err := psp.DecodeVLEKLoad(flip("10"+zeros(15), 4, 1)); return err },
		"VLEK reserved byte":   func() error { _, err := psp.DecodeVLEKLoad(flip("10"+zeros(15), 7, 1)); return err },
	} {
		if decode() == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

// What decodes encodes to the same bytes: no bit gets lost on the way.
func FuzzDecode(f *testing.F) {
	for _, size := range []int{psp.PlatformStatusSize, psp.IssueSize, psp.SNPStatusSize, psp.ConfigSize} {
		f.Add(make([]byte, size))
		f.Add(bytes.Repeat([]byte{0x01}, size))
	}
	f.Add([]byte("\x10\x00\x00\x00\x00\x00\x00\x00address!"))
	f.Fuzz(func(t *testing.T, b []byte) {
		same := func(what string, encoded []byte, err error) {
			if err == nil && !bytes.Equal(encoded, b) {
				t.Errorf("%s: %x decodes and encodes to %x", what, b, encoded)
			}
		}
		issue, err := psp.DecodeIssue(b)
		e1 := issue.Encode()
		same("issue", e1[:], err)
		legacy, err := psp.DecodePlatformStatus(b)
		e2 := legacy.Encode()
		same("status", e2[:], err)
		id, err := psp.DecodeGetID2(b)
		e3 := id.Encode()
		same("id", e3[:], err)
		status, err := psp.DecodeSNPStatus(b)
		e4 := status.Encode()
		same("SNP status", e4[:], err)
		config, err := psp.DecodeConfig(b)
		e5 := config.Encode()
		same("config", e5[:], err)
		load, err := psp.DecodeVLEKLoad(b)
		e6 := load.Encode()
		same("VLEK load", e6[:], err)
	})
}

func TestHexSurvivesJSONWhole(t *testing.T) {
	t.Parallel()
	for _, v := range []psp.Hex{0, 0x561b00000000000a, ^psp.Hex(0)} {
		text, err := json.Marshal(v)
		var back psp.Hex
		if err != nil || json.Unmarshal(text, &back) != nil || back != v || !strings.HasPrefix(string(text), `"0x`) {
			t.Errorf("%#x: %s, back %#x (%v)", uint64(v), text, uint64(back), err)
		}
	}
	for _, text := range []string{`"12"`, `"0x"`, `"0x1_0"`, `"0x11112222333344445"`, `12`} {
		if json.Unmarshal([]byte(text), new(psp.Hex)) == nil {
			t.Errorf("%s is accepted", text)
		}
	}
}
