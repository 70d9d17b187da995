package catalogue_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/confidential-node/agent/firmware/catalogue"
	"github.com/confidential-node/agent/firmware/ovmf"
	"github.com/confidential-node/agent/tests/skip"
)

func put(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestEveryImageOfAHostIsListedOnce(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	put(t, filepath.Join(root, "usr/share/ovmf/OVMF.fd"), []byte("a"))
	put(t, filepath.Join(root, "usr/share/OVMF/OVMF_CODE.fd"), []byte("b"))
	put(t, filepath.Join(root, "usr/share/OVMF/readme.txt"), []byte("c"))
	put(t, filepath.Join(root, "usr/share/qemu/deep/deeper/x.fd"), []byte("d"))
	put(t, filepath.Join(root, "images/job/OVMF.fd"), bytes.Repeat([]byte{1}, ovmf.MaxSize+5))
	for link, to := range map[string]string{"usr/share/qemu/OVMF.fd": "../ovmf/OVMF.fd", "usr/share/OVMF/gone.fd": "nowhere"} {
		path := filepath.Join(root, link)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := catalogue.List(append(catalogue.Dirs(root), filepath.Join(root, "images"), filepath.Join(root, "images")))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		name, err := filepath.Rel(root, e.Path)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
		data, err := os.ReadFile(e.Path)
		if err != nil || e.SHA256 != sha256.Sum256(data) || e.Size != int64(len(data)) || e.Build != ovmf.BuildOther || e.Refusal == nil || e.Firmware != nil {
			t.Errorf("%s: %+v (%v)", name, e, err)
		}
	}
	want := []string{"images/job/OVMF.fd", "usr/share/OVMF/OVMF_CODE.fd", "usr/share/ovmf/OVMF.fd"}
	if len(names) != len(want) || names[0] != want[0] || names[1] != want[1] || names[2] != want[2] {
		t.Errorf("listed %v, want %v", names, want)
	}
}

func TestAHostWithoutFirmwareHasAnEmptyList(t *testing.T) {
	t.Parallel()
	if entries, err := catalogue.List(catalogue.Dirs(t.TempDir())); err != nil || entries == nil || len(entries) != 0 {
		t.Errorf("listed %v, %v", entries, err)
	}
}

func TestWhatCannotBeReadIsAnError(t *testing.T) {
	t.Parallel()
	if _, err := catalogue.Inspect(filepath.Join(t.TempDir(), "none.fd")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err := catalogue.Inspect(t.TempDir()); err == nil {
		t.Error("a folder is firmware")
	}
}

func TestARealAmdSevImageIsUsable(t *testing.T) {
	t.Parallel()
	path := filepath.Join("..", "..", "..", "shared", "data", "firmware", "OVMF.amdsev.fd")
	if _, err := os.Stat(path); err != nil {
		skip.Missing(t, "a real AmdSev OVMF in ../shared/data")
	}
	e, err := catalogue.Inspect(path)
	if err != nil || e.Build != ovmf.BuildAmdSev || e.Refusal != nil || e.Firmware.ResetEIP != 0x80b004 || len(e.Firmware.Sections) != 7 {
		t.Errorf("%+v, %v", e, err)
	}
}
