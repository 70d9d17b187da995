package ovmf_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/ovmf"
	"github.com/confidential-node/agent/tests/skip"
)

// whole is wellFormed in a size that QEMU loads.
func whole() *layout {
	l := wellFormed()
	l.size = 64 << 10
	return l
}

func TestEachBuildIsToldFromTheOthers(t *testing.T) {
	t.Parallel()
	variables := make([]byte, 64<<10)
	copy(variables[16:], mixed("fff12b8d-7696-4c8b-a985-2747075b4f50"))
	copy(variables[0x28:], "_FVH")
	changed := func(change func(*layout)) []byte {
		l := whole()
		change(l)
		return l.image()
	}
	for name, c := range map[string]struct {
		image []byte
		build ovmf.Build
		code  string
	}{
		"AmdSev":                    {whole().image(), ovmf.BuildAmdSev, ""},
		"OvmfPkgX64":                {changed(func(l *layout) { l.set(hashTable, words(hashTable, 0, 0)); l.sections = l.sections[:4] }), ovmf.BuildX64, ovmf.CodeNotAmdSev},
		"no metadata":               {changed(func(l *layout) { l.drop(metadata) }), ovmf.BuildNoSNP, ovmf.CodeNotAmdSev},
		"no reset block":            {changed(func(l *layout) { l.drop(reset) }), ovmf.BuildNoSNP, ovmf.CodeNotAmdSev},
		"variable store":            {variables, ovmf.BuildVariables, ovmf.CodeNotAmdSev},
		"another BIOS":              {make([]byte, 256<<10), ovmf.BuildOther, ovmf.CodeNotAmdSev},
		"nothing":                   {nil, ovmf.BuildOther, ovmf.CodeNotAmdSev},
		"a text":                    {[]byte("OVMF"), ovmf.BuildOther, ovmf.CodeNotAmdSev},
		"unknown section":           {changed(func(l *layout) { l.sections[0].Type = 9 }), ovmf.BuildDamaged, ovmf.CodeDamaged},
		"hash area elsewhere":       {changed(func(l *layout) { l.set(hashTable, words(hashTable, 0x811c00, 0x400)) }), ovmf.BuildDamaged, ovmf.CodeDamaged},
		"no secrets page":           {changed(func(l *layout) { l.sections = append(l.sections[:1:1], l.sections[2:]...) }), ovmf.BuildDamaged, ovmf.CodeDamaged},
		"two CPUID pages":           {changed(func(l *layout) { l.sections = append(l.sections, l.sections[2]) }), ovmf.BuildDamaged, ovmf.CodeDamaged},
		"a size QEMU does not load": {changed(func(l *layout) { l.size += 4096 }), ovmf.BuildDamaged, ovmf.CodeDamaged},
		"cut off inside a page":     {whole().image()[1:], ovmf.BuildDamaged, ovmf.CodeDamaged},
	} {
		build, f, refusal := ovmf.Describe(c.image)
		if build != c.build || (refusal == nil) != (c.code == "") {
			t.Errorf("%s: is %q, refused as %v, want %q", name, build, refusal, c.build)
			continue
		}
		got, err := ovmf.RequireAmdSev(c.image)
		if c.code == "" {
			if err != nil || got == nil || f == nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		r, refused := errors.AsType[*contract.Refusal](err)
		if !refused || got != nil || r.Code != c.code || strings.Contains(r.Message, "%!") {
			t.Errorf("%s: refused as %v, want %s", name, err, c.code)
			continue
		}
		for _, part := range []string{"ovmf-amdsev", "2026.08+ds-2", "/usr/share/ovmf/OVMF.amdsev.fd"} {
			if !strings.Contains(r.Remedy, part) {
				t.Errorf("%s: the remedy does not name %s", name, part)
			}
		}
		if c.code == ovmf.CodeNotAmdSev && !strings.Contains(r.Message, string(c.build)) {
			t.Errorf("%s: %q does not name the build", name, r.Message)
		}
	}
}

// unpack extracts a package that was downloaded for the tests.
func unpack(t *testing.T, name string) string {
	t.Helper()
	deb := filepath.Join("..", "..", ".cache", "debs", name+".deb")
	if _, err := os.Stat(deb); err != nil {
		skip.Missing(t, "Debian package "+name+" in .cache/debs")
	}
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		skip.Missing(t, "dpkg-deb")
	}
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "dpkg-deb", "-x", deb, dir).CombinedOutput(); err != nil {
		t.Fatalf("unpacking %s: %v\n%s", deb, err, out)
	}
	return dir
}

func describeFile(t *testing.T, path string) (ovmf.Build, *contract.Refusal) {
	t.Helper()
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	build, _, refusal := ovmf.Describe(image)
	return build, refusal
}

func TestTheFileThatTheRemedyNamesIsAccepted(t *testing.T) {
	t.Parallel()
	if build, refusal := describeFile(t, filepath.Join(unpack(t, "ovmf-amdsev"), "usr/share/ovmf/OVMF.amdsev.fd")); build != ovmf.BuildAmdSev || refusal != nil {
		t.Errorf("is %q, refused as %v", build, refusal)
	}
	if build, _, refusal := ovmf.Describe(realFirmware(t)); build != ovmf.BuildAmdSev || refusal != nil {
		t.Errorf("the image beside the checkout is %q, refused as %v", build, refusal)
	}
}

// What a host has anyway is what gets taken by mistake.
func TestOtherFirmwareOfAHostIsNamed(t *testing.T) {
	t.Parallel()
	found := 0
	for pattern, builds := range map[string][]ovmf.Build{
		"/usr/share/seabios/bios-256k.bin":  {ovmf.BuildOther},
		"/usr/share/OVMF/OVMF_VARS*.fd":     {ovmf.BuildVariables},
		"/usr/share/OVMF/OVMF_CODE*.fd":     {ovmf.BuildX64, ovmf.BuildNoSNP},
		"/usr/share/ovmf/OVMF.fd":           {ovmf.BuildX64, ovmf.BuildNoSNP},
		"/usr/share/ovmf/OVMF.inteltdx*.fd": {ovmf.BuildX64, ovmf.BuildNoSNP},
	} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			found++
			build, refusal := describeFile(t, file)
			if refusal == nil || refusal.Code != ovmf.CodeNotAmdSev || !strings.Contains(strings.Join(names(builds), ","), string(build)) {
				t.Errorf("%s is %q, refused as %v", file, build, refusal)
			}
		}
	}
	if found == 0 {
		skip.Missing(t, "other firmware (Debian packages seabios, ovmf)")
	}
}

func names(builds []ovmf.Build) []string {
	out := make([]string, 0, len(builds))
	for _, b := range builds {
		out = append(out, string(b))
	}
	return out
}

// Whatever is called usable keeps every promise of the launch.
func FuzzDescribe(f *testing.F) {
	f.Add(whole().image())
	f.Add(wellFormed().image())
	f.Add([]byte("_FVH"))
	f.Add(make([]byte, 4096))
	f.Fuzz(func(t *testing.T, image []byte) {
		build, fw, refusal := ovmf.Describe(image)
		if (build == ovmf.BuildAmdSev) != (refusal == nil) {
			t.Errorf("%q is refused as %v", build, refusal)
		}
		if refusal == nil && (fw == nil || fw.SupportsKernelHashes() != nil || fw.Size%(64<<10) != 0) {
			t.Errorf("usable as %+v", fw)
		}
		if refusal != nil && (refusal.Remedy == "" || refusal.Message == "") {
			t.Errorf("refused without a word: %+v", refusal)
		}
	})
}
