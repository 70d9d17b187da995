package tenant

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

func TestProfileIsStrictAndRelativeToItsFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(text string) string {
		path := filepath.Join(dir, "tenant.toml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	p, err := LoadProfile(write("state_dir = \"state\"\n[store]\nendpoint = \"https://s3.example\"\nca_file = \"/etc/ca.pem\"\n"))
	if err != nil || p.StateDir != filepath.Join(dir, "state") || p.Store.CAFile != "/etc/ca.pem" {
		t.Fatalf("%+v %v", p, err)
	}
	for text, want := range map[string]string{
		"state_dir = \"s\"\nnonsense = 1\n":                      "line 2",
		"state_dir = 1\n":                                        "line 1",
		"image_dir = \"x\"\n":                                    "state_dir",
		"state_dir = \"s\"\n[broker]\nurl = \"http://x\"\n":      "broker.url",
		"state_dir = \"s\"\npresign_hours = 1000\n":              "presign_hours",
		"state_dir = \"s\"\n[verify]\nallow_everything = true\n": "allow_everything",
	} {
		if _, err := LoadProfile(write(text)); err == nil || !strings.Contains(err.Error(), want) || ExitCode(err) != ExitUsage {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestVerbsWithoutTheirProfilePartAreUsageErrors(t *testing.T) {
	t.Parallel()
	tn, err := Open(&Profile{StateDir: t.TempDir()}, &steps{})
	if err != nil {
		t.Fatal(err)
	}
	o := DeployOptions{Name: "n", Image: "i", Confidential: true, AttestationRequired: true}
	if _, err := tn.Deploy(t.Context(), o); ExitCode(err) != ExitUsage {
		t.Error(err)
	}
	if _, err := tn.Upload(t.Context(), "x", ""); ExitCode(err) != ExitUsage {
		t.Error(err)
	}
	if _, err := tn.Wait(t.Context(), "n"); ExitCode(err) != ExitUsage {
		t.Error(err)
	}
}

func TestExitCodes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, ExitOK},
		{errors.New("x"), ExitFailed},
		{Usage("x"), ExitUsage},
		{brokeradmin.ErrUnreachable, ExitUnreachable},
		{ErrUnreachable, ExitUnreachable},
		{fs.ErrNotExist, ExitNotFound},
		{contract.Refuse("broker.launch-unknown", "r", "m"), ExitNotFound},
		{contract.Refuse("gpu.no-cc", "r", "m"), ExitPrecondition},
		{contract.Refuse("guest.start-timeout", "r", "m"), ExitTimeout},
		{contract.Refuse("internal", "r", "m"), ExitFailed},
		{context.DeadlineExceeded, ExitTimeout},
	} {
		if got := ExitCode(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}

func TestSourcesAndFloors(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]source{
		"encrypted://b/dir/m.age": {name: "m", scheme: "encrypted", bucket: "b", key: "dir/m.age"},
		"s3://b/data.csv":         {name: "data.csv", scheme: "s3", bucket: "b", key: "data.csv"},
		"x=file:///tmp/y":         {name: "x", scheme: "file", path: "/tmp/y"},
	} {
		if got, err := parseSource(text); err != nil || got != want {
			t.Errorf("%s: %+v %v", text, got, err)
		}
	}
	for _, text := range []string{"", "file", "s3://b", "s3:///k", "s3://b/k/", "=s3://b/k", "a/b=s3://b/k", "ftp://x/y"} {
		if _, err := parseSource(text); ExitCode(err) != ExitUsage {
			t.Errorf("%q: %v", text, err)
		}
	}
	if tcb, err := ParseTCB("snp=27, microcode=0x10"); err != nil || *tcb != (contract.TCB{SNP: 27, Microcode: 16}) {
		t.Error(tcb, err)
	}
	for _, text := range []string{"x=1", "snp=256", "snp"} {
		if _, err := ParseTCB(text); ExitCode(err) != ExitUsage {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzParseProfile(f *testing.F) {
	f.Add([]byte("state_dir = \"s\"\n[broker]\nurl = \"https://b\"\n"))
	f.Add([]byte("state_dir = \"s\"\nx = 1\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := parseProfile(data); (p == nil) == (err == nil) {
			t.Fatal(p, err)
		}
	})
}

func FuzzOpenPGP(f *testing.F) {
	f.Add("x", []byte("\x85\x01\x0c\x03"))
	f.Add("x.gpg", []byte(nil))
	f.Fuzz(func(_ *testing.T, name string, head []byte) { isOpenPGP(name, head) })
}

func TestSampleProfileNamesEveryKey(t *testing.T) {
	t.Parallel()
	p, err := LoadProfile("tenant.toml")
	if err != nil {
		t.Fatal(err)
	}
	sample, err := os.ReadFile("tenant.toml")
	if err != nil {
		t.Fatal(err)
	}
	var check func(typ reflect.Type)
	check = func(typ reflect.Type) {
		for f := range typ.Fields() {
			if key := f.Tag.Get("toml"); !strings.Contains(string(sample), "\n"+key+" = ") && !strings.Contains(string(sample), "\n["+key+"]\n") {
				t.Errorf("the sample lacks %s", key)
			}
			if f.Type.Kind() == reflect.Struct {
				check(f.Type)
			}
		}
	}
	check(reflect.TypeOf(*p))
}
