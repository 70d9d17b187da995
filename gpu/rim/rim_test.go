package rim

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/gpu/spdm"
)

// signed is a day on which the sample's certificates held.
func signed() time.Time { return time.Date(2024, 6, 1, 0, 0, 0, 0, time.UTC) }

func nvidia() []spdm.Fingerprint { return []spdm.Fingerprint{NVIDIARoot()} }

func sample(tb testing.TB) []byte {
	tb.Helper()
	data, err := os.ReadFile("testdata/driver-545.swidtag")
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func TestARealManifestOfNVIDIAHolds(t *testing.T) {
	t.Parallel()
	m, err := Parse(sample(t), nvidia(), signed())
	if err != nil {
		t.Fatal(err)
	}
	if m.Product != "GH100" || m.Version != "545.00" || len(m.Golden) != 21 || len(m.Golden[35]) != 2 || !strings.Contains(m.Signer, "HCC RIM L4 Signer") {
		t.Errorf("%s %s by %s: %d measurements, %d alternatives of 35", m.Product, m.Version, m.Signer, len(m.Golden), len(m.Golden[35]))
	}
	if _, unasked := m.Golden[0]; unasked {
		t.Error("an inactive measurement is demanded")
	}
}

// Three bytes of each measurement and as many elsewhere, for time's sake:
// parsing takes milliseconds. The fuzz target goes on from there.
func TestBytesAllOverARealManifestCount(t *testing.T) {
	t.Parallel()
	good := sample(t)
	want, err := Parse(good, nvidia(), signed())
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(good); i += 97 {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		got, err := Parse(bad, nvidia(), signed())
		if err != nil {
			continue
		}
		// White space outside of what is signed, within base64 for instance,
		// may change; what the manifest says may not.
		if got.Product != want.Product || got.Version != want.Version || len(got.Golden) != len(want.Golden) {
			t.Errorf("byte %d (%q) changes what it says", i, good[max(0, i-10):i+10])
		}
		for index, digests := range got.Golden {
			if len(digests) != len(want.Golden[index]) || digests[0] != want.Golden[index][0] {
				t.Errorf("byte %d changes measurement %d", i, index)
			}
		}
	}
}

func TestManifestsThatProveNothingAreRefused(t *testing.T) {
	t.Parallel()
	good := string(sample(t))
	replace := func(old, with string) string {
		t.Helper()
		if !strings.Contains(good, old) {
			t.Fatalf("the sample has no %q", old)
		}
		return strings.Replace(good, old, with, 1)
	}
	end := strings.Index(good, "<ds:Signature ")
	signature := good[end:strings.Index(good, "</SoftwareIdentity>")]
	for name, c := range map[string]struct{ text, want string }{
		"another document":           {"<a/>", "no SWID tag"},
		"no XML":                     {"x", "no SWID tag"},
		"cut":                        {good[:5000], ""},
		"too large":                  {good + strings.Repeat(" ", MaxBytes), "at most"},
		"no signature":               {good[:end] + "</SoftwareIdentity>", "0 elements Signature"},
		"two signatures":             {replace(signature, signature+signature), "2 elements Signature"},
		"a part only":                {replace(`URI=""`, `URI="#a"`), "whole document"},
		"no reference":               {replace(`<ds:Reference URI="">`, `<ds:Reference>`), "whole document"},
		"another canonical form":     {replace(c14n11, "http://www.w3.org/2001/10/xml-exc-c14n#"), "CanonicalizationMethod"},
		"an HMAC":                    {replace(ecdsaSHA384, "http://www.w3.org/2000/09/xmldsig#hmac-sha1"), "SignatureMethod"},
		"a weak digest":              {replace(`DigestMethod Algorithm="`+sha384, `DigestMethod Algorithm="http://www.w3.org/2000/09/xmldsig#sha1`), "DigestMethod"},
		"a further transform":        {replace(`<ds:Transforms>`, `<ds:Transforms><ds:Transform Algorithm="http://www.w3.org/TR/1999/REC-xslt-19991116"/>`), "transforms"},
		"another version":            {replace(`colloquialVersion="545.00"`, `colloquialVersion="550.90.07"`), "not what was signed"},
		"another digest":             {replace("0e0ee161", "0e0ee162"), "not what was signed"},
		"something before it":        {replace("<ns0:Payload ", "<ns0:Payload></ns0:Payload><ns0:Payload "), "not what was signed"},
		"a digest of another":        {replace("Dc2Cm4Yr", "Dc2Cm4Ys"), "not what was signed"},
		"a signature of another":     {replace("/BgnH+hp", "/BgnH+hq"), "signature does not hold"},
		"a document type of its own": {`<!DOCTYPE a [<!ENTITY b "c">]>` + replace("545.00", "&b;"), ""},
	} {
		if _, err := Parse([]byte(c.text), nvidia(), signed()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if _, err := Parse([]byte(good), nvidia(), signed().AddDate(2, 0, 0)); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("after its signer's end: %v", err)
	}
	if _, err := Parse([]byte(good), []spdm.Fingerprint{spdm.NVIDIARoot()}, signed()); err == nil || !strings.Contains(err.Error(), "pinned root") {
		t.Errorf("another root: %v", err)
	}
}

// report is one with these measurements, driver 1 and VBIOS 2.
func report(measurements ...byte) *spdm.Report {
	r := &spdm.Report{Opaque: spdm.Opaque{Driver: "1.0", VBIOS: "96.00.AA"}}
	for _, m := range measurements {
		r.Measurements = append(r.Measurements, spdm.Digest{m})
	}
	return r
}

func manifest(version string, golden map[int][]byte) *Manifest {
	m := &Manifest{Product: "GH100", Version: version, Golden: map[int][]spdm.Digest{}}
	for index, firsts := range golden {
		for _, first := range firsts {
			m.Golden[index] = append(m.Golden[index], spdm.Digest{first})
		}
	}
	return m
}

func TestAReportHasToFitBothManifests(t *testing.T) {
	t.Parallel()
	driver := manifest("1.0", map[int][]byte{1: {11}})
	vbios := manifest("96.00.aa", map[int][]byte{2: {12, 22}})
	for name, c := range map[string]struct {
		report    *spdm.Report
		product   string
		manifests []*Manifest
		want      string
	}{
		"it fits":                   {report(0, 11, 22), "GH100", []*Manifest{driver, vbios}, ""},
		"others are passed over":    {report(0, 11, 12), "GH100", []*Manifest{manifest("9.9", nil), driver, vbios}, ""},
		"a measurement is another":  {report(0, 11, 13), "GH100", []*Manifest{driver, vbios}, "measurement 2 is 0d"},
		"a measurement is missing":  {report(0, 11), "GH100", []*Manifest{driver, vbios}, "no measurement 2"},
		"no manifest of the driver": {report(0, 11, 12), "GH100", []*Manifest{vbios}, "no manifest for driver 1.0"},
		"no manifest of the VBIOS":  {report(0, 11, 12), "GH100", []*Manifest{driver}, "no manifest for VBIOS"},
		"of another chip":           {report(0, 11, 12), "GB100", []*Manifest{driver, vbios}, "no manifest for driver 1.0 of GB100"},
		"two of one":                {report(0, 11, 12), "GH100", []*Manifest{driver, driver, vbios}, "two manifests"},
		"both claim one":            {report(0, 11, 12), "GH100", []*Manifest{driver, manifest("96.00.AA", map[int][]byte{1: {11}})}, "both speak of measurement 1"},
		"no version":                {&spdm.Report{}, "GH100", []*Manifest{driver, vbios}, "does not state its driver"},
	} {
		err := Compare(c.report, c.product, c.manifests)
		if (err == nil) != (c.want == "") || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	// Measurement 35 means nothing while the decoder is off.
	all := make([]byte, 36)
	off := report(all...)
	wants35 := manifest("1.0", map[int][]byte{nvdec0: {7}})
	if err := Compare(off, "GH100", []*Manifest{wants35, manifest("96.00.AA", nil)}); err == nil {
		t.Error("measurement 35 does not count")
	}
	off.Opaque.NVDEC0Disabled = true
	if err := Compare(off, "GH100", []*Manifest{wants35, manifest("96.00.AA", nil)}); err != nil {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sample(f))
	f.Add([]byte(`<SoftwareIdentity xmlns="a"><Signature><SignedInfo/></Signature></SoftwareIdentity>`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Parse(data, nvidia(), signed())
		if err == nil && len(m.Golden) == 0 {
			t.Error("a manifest that demands nothing")
		}
	})
}
