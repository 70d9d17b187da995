package rim_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/confidential-node/agent/gpu/rim"
	"github.com/confidential-node/agent/gpu/rim/rimtest"
	"github.com/confidential-node/agent/gpu/spdm"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
)

// manifests are those a GPU of the authority fits, and the roots to accept.
func manifests(t *testing.T) (driver, vbios []byte, roots []spdm.Fingerprint) {
	t.Helper()
	a, err := spdmtest.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	g, err := a.NewGPU(spdmtest.Config{PDI: 1})
	if err != nil {
		t.Fatal(err)
	}
	if driver, vbios, err = rimtest.For(a, g); err != nil {
		t.Fatal(err)
	}
	return driver, vbios, []spdm.Fingerprint{rim.NVIDIARoot(), spdm.FingerprintOf(a.Root)}
}

func TestAFolderOfManifestsIsReadWhole(t *testing.T) {
	t.Parallel()
	driver, vbios, roots := manifests(t)
	answer, err := json.Marshal(map[string]any{"id": "NV_GPU_VBIOS_1010", "rim": vbios, "rim_format": "TCG_RIM"})
	if err != nil {
		t.Fatal(err)
	}
	good := fstest.MapFS{"driver.swidtag": {Data: driver}, "vbios.json": {Data: answer}}
	all, err := rim.ReadFolder(good, roots, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || all[0].Version != "595.71.05" || all[1].Version != "96.00.9F.00.04" || all[0].Product != "GH100" || len(all[0].Golden)+len(all[1].Golden) != 63 {
		t.Errorf("%+v", all)
	}
}

func TestAFolderWithAnythingElseIsRefused(t *testing.T) {
	t.Parallel()
	driver, _, roots := manifests(t)
	for name, c := range map[string]struct {
		folder fstest.MapFS
		roots  []spdm.Fingerprint
		want   string
	}{
		"nothing":            {fstest.MapFS{}, roots, "0 files"},
		"nobody's manifest":  {fstest.MapFS{"a": {Data: driver}}, roots[:1], "not to the pinned root"},
		"changed":            {fstest.MapFS{"a": {Data: bytes.Replace(driver, []byte("595.71.05"), []byte("595.71.06"), 1)}}, roots, "not what was signed"},
		"a folder within":    {fstest.MapFS{"a/b": {Data: driver}}, roots, "reading a"},
		"notes":              {fstest.MapFS{"README": {Data: []byte("x")}}, roots, "reading README"},
		"an empty answer":    {fstest.MapFS{"a.json": {Data: []byte(`{"id":"x"}`)}}, roots, "without a manifest"},
		"a broken answer":    {fstest.MapFS{"a.json": {Data: []byte(`{`)}}, roots, "without a manifest"},
		"more than one file": {fstest.MapFS{"a": {Data: driver}, "b": {Data: make([]byte, 3<<20)}}, roots, "at most"},
	} {
		if _, err := rim.ReadFolder(c.folder, c.roots, time.Now()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"rim":"PFNvZnR3YXJlSWRlbnRpdHkvPg==","id":"x"}`))
	f.Add([]byte(`<SoftwareIdentity/>`))
	f.Fuzz(func(t *testing.T, data []byte) {
		out, err := rim.Decode(data)
		if err == nil && len(out) > len(data) {
			t.Error("more comes out than went in")
		}
	})
}
