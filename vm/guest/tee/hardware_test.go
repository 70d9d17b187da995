//go:build !emulated

package tee

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/vm/guest/tee/teetest"
)

// through are the two interfaces in front of one platform.
func through(t *testing.T, p *teetest.Platform) map[string]source {
	t.Helper()
	level := filepath.Join(t.TempDir(), "vmpl")
	if err := os.WriteFile(level, []byte{'0' + byte(p.VMPL), '\n'}, 0o600); err != nil {
		t.Fatal(err)
	}
	return map[string]source{
		"configfs": &configfs{files: teetest.ConfigFS{Platform: p}},
		"device":   &device{open: func() (ioctler, error) { return &teetest.Device{Platform: p}, nil }, level: level},
	}
}

func TestAReportIsAskedForAtTheKernelsOwnLevel(t *testing.T) {
	t.Parallel()
	host := uint32(0xffffffff)
	for name, c := range map[string]struct {
		platform teetest.Platform
		wrong    string
	}{
		"VMPL 0":          {teetest.Platform{}, ""},
		"below a module":  {teetest.Platform{VMPL: 2}, ""},
		"asked by a host": {teetest.Platform{SaysVMPL: &host}, "names VMPL 4294967295"},
	} {
		for _, way := range []string{"configfs", "device"} {
			t.Run(name+" by "+way, func(t *testing.T) {
				t.Parallel()
				p := c.platform
				p.Provider, p.Table = provider, []byte("table")
				a, err := (&hardware{source: through(t, &p)[way]}).Report(t.Context(), [64]byte{7})
				if c.wrong != "" {
					if err == nil || !strings.Contains(err.Error(), c.wrong) || p.Asked != 1 {
						t.Fatalf("%d requests, %v", p.Asked, err)
					}
					return
				}
				if err != nil || a.Report[offVMPL] != byte(p.VMPL) || a.Report[offReportData] != 7 || !bytes.HasPrefix(a.Table, []byte("table")) {
					t.Errorf("%x %v", a.Report, err)
				}
				if p.Open() != 0 {
					t.Errorf("%d requests are left in configfs", p.Open())
				}
			})
		}
	}
}

func TestOnlyWhatPassesIsTriedAgain(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		platform teetest.Platform
		way      string
		asked    int
		wrong    error // nil: it succeeds
	}{
		"busy, then not":        {teetest.Platform{Busy: 3}, "configfs", 1, nil},
		"host busy, then not":   {teetest.Platform{Busy: 3}, "device", 1, nil},
		"busy without end":      {teetest.Platform{Busy: 1000}, "configfs", 0, unix.EBUSY},
		"host busy without end": {teetest.Platform{Busy: 1000}, "device", 0, unix.EIO},
		"another one's write":   {teetest.Platform{Disturbed: 2}, "configfs", 3, nil},
		"no key":                {teetest.Platform{Wiped: true, Busy: 1}, "configfs", 0, unix.ENOTTY},
		"no key at the device":  {teetest.Platform{Wiped: true, Busy: 1}, "device", 0, unix.ENOTTY},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := c.platform
				p.Provider = provider
				_, err := (&hardware{source: through(t, &p)[c.way]}).Report(t.Context(), [64]byte{7})
				if !errors.Is(err, c.wrong) || p.Asked != c.asked || p.Open() != 0 {
					t.Errorf("%d requests, %d open, %v", p.Asked, p.Open(), err)
				}
				if errors.Is(c.wrong, unix.ENOTTY) && p.Busy != 1 {
					t.Error("a platform without a key was asked again")
				}
			})
		})
	}
}

func TestAHostWithMoreCertificatesThanFitStillGetsAReportOut(t *testing.T) {
	t.Parallel()
	p := teetest.Platform{Table: make([]byte, MaxTableBytes+1)}
	a, err := (&hardware{source: through(t, &p)["device"]}).Report(t.Context(), [64]byte{7})
	if err != nil || len(a.Report) != reportSize || a.Table != nil {
		t.Errorf("%d bytes beside the report (%v)", len(a.Table), err)
	}
}

func TestTheInterfaceThatAnswersIsTaken(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		provider string
		level    bool
		want     string
	}{
		"configfs":                   {provider, true, "configfs"},
		"no provider":                {"", true, "device"},
		"another provider":           {"tdx_guest", true, "device"},
		"a level that is not known":  {"", false, ""},
		"configfs without that file": {provider, false, "configfs"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := &teetest.Platform{Provider: c.provider}
			ways := through(t, p)
			if !c.level {
				ways["device"] = &device{open: func() (ioctler, error) { return &teetest.Device{Platform: p}, nil }, level: filepath.Join(t.TempDir(), "none")}
			}
			r, err := choose(ways["configfs"], ways["device"])
			if c.want == "" {
				if !errors.Is(err, ErrUnavailable) {
					t.Errorf("%v", err)
				}
				return
			}
			if h, ok := r.(*hardware); err != nil || !ok || h.source != ways[c.want] || p.Open() != 0 {
				t.Errorf("%T, %d open, %v", r, p.Open(), err)
			}
		})
	}
}
