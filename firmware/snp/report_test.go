package snp_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
)

// filled is a report of a version with something in every field it has.
func filled(version uint32) *snp.Report {
	r := &snp.Report{
		Version: version, GuestSVN: 3, Policy: 0x30000, VMPL: 1, SigAlgo: 1, CurrentTCB: 4, PlatformInfo: 5, SignerInfo: 6,
		ReportedTCB: 7, CommittedTCB: 8, LaunchTCB: 9,
		CurrentVersion: snp.Version{Major: 1, Minor: 55, Build: 40}, CommittedVersion: snp.Version{Major: 1, Minor: 54, Build: 39},
	}
	for i, field := range [][]byte{
		r.FamilyID[:], r.ImageID[:], r.ReportData[:], r.Measurement[:], r.HostData[:], r.IDKeyDigest[:], r.AuthorDigest[:],
		r.ReportID[:], r.ReportIDMA[:], r.ChipID[:], r.Signature[:],
	} {
		for j := range field {
			field[j] = byte(i + 1)
		}
	}
	if version >= 3 {
		r.Family, r.Model, r.Stepping = 0x19, 0x11, 1
	}
	if version >= 4 {
		r.LaunchMitigations, r.CurrentMitigations = 0x0b, 0x3f
	}
	return r
}

func TestEveryVersionRoundTrips(t *testing.T) {
	t.Parallel()
	for version := uint32(2); version <= 5; version++ {
		want := filled(version)
		got, err := snp.ParseReport(want.Marshal())
		if err != nil || *got != *want {
			t.Errorf("version %d: %+v (%v), want %+v", version, got, err, want)
		}
	}
}

func TestFieldsAVersionDoesNotHaveMustBeZero(t *testing.T) {
	t.Parallel()
	for name, report := range map[string]*snp.Report{
		"processor in version 2":   {Version: 2, Family: 0x19},
		"mitigations in version 3": {Version: 3, LaunchMitigations: 1},
		"mitigations in version 2": {Version: 2, CurrentMitigations: 1},
		"version 1":                {Version: 1},
		"version 6":                {Version: 6},
		"version 0":                {},
	} {
		if _, err := snp.ParseReport(report.Marshal()); !errors.Is(err, snp.ErrReport) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReservedBytesAndOtherSizesAreRefused(t *testing.T) {
	t.Parallel()
	data := filled(5).Marshal()
	// Reserved ranges of version 5 (AMD 56860, table ATTESTATION_REPORT) and
	// the padding of the signature.
	for _, r := range [][2]int{{0x4C, 0x50}, {0x18B, 0x1A0}, {0x1EB, 0x1EC}, {0x1EF, 0x1F0}, {0x208, 0x2A0}, {0x330, 0x4A0}} {
		for i := r[0]; i < r[1]; i++ {
			bad := slices.Clone(data)
			bad[i] = 0x80
			if _, err := snp.ParseReport(bad); !errors.Is(err, snp.ErrReport) {
				t.Errorf("byte %#x may be set: %v", i, err)
			}
		}
	}
	for _, bad := range [][]byte{nil, data[:len(data)-1], append(slices.Clone(data), 0)} {
		if _, err := snp.ParseReport(bad); !errors.Is(err, snp.ErrReport) {
			t.Errorf("%d bytes: %v", len(bad), err)
		}
	}
}

func TestCapturedReportsReadAsTheirProcessors(t *testing.T) {
	t.Parallel()
	for product, want := range map[string]struct {
		version                 uint32
		family, model, stepping uint8
		current                 snp.Version
		mitigations             uint64
	}{
		"milan": {3, 0x19, 0x01, 1, snp.Version{Major: 1, Minor: 55, Build: 29}, 0},
		"genoa": {3, 0x19, 0x11, 1, snp.Version{Major: 1, Minor: 55, Build: 40}, 0},
		"turin": {5, 0x1a, 0x02, 1, snp.Version{Major: 1, Minor: 55, Build: 65}, 0x3f},
	} {
		t.Run(product, func(t *testing.T) {
			t.Parallel()
			data, _ := captured(t, product)
			r, err := snp.ParseReport(data)
			if err != nil {
				t.Fatal(err)
			}
			if r.Version != want.version || r.Family != want.family || r.Model != want.model || r.Stepping != want.stepping ||
				r.CurrentVersion != want.current || r.CurrentMitigations != want.mitigations {
				t.Errorf("read %+v, want %+v", r, want)
			}
			if !bytes.Equal(r.Marshal(), data) {
				t.Error("encoding changes the report")
			}
		})
	}
}

func FuzzParseReport(f *testing.F) {
	for version := uint32(2); version <= 5; version++ {
		f.Add(filled(version).Marshal())
	}
	for _, product := range []string{"milan", "genoa", "turin"} {
		if data, err := os.ReadFile(filepath.Join("..", "..", "..", "shared", "data", "snp-reports", product+".report.bin")); err == nil {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := snp.ParseReport(data)
		if err != nil {
			if r != nil || !errors.Is(err, snp.ErrReport) {
				t.Errorf("%+v with %v", r, err)
			}
			return
		}
		if !bytes.Equal(r.Marshal(), data) {
			t.Error("two encodings of one report")
		}
		if res := snp.Verify(data, contract.Endorsements{}, snp.Expect{AppraisalPolicy: snp.AppraisalPolicy{Now: now}}); res.OK() {
			t.Error("a report holds without endorsements")
		}
	})
}
