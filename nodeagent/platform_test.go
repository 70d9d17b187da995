package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/host/hosttest"
	"github.com/confidential-node/agent/firmware/snp/host/psp"
	"github.com/confidential-node/agent/nodeagent/audit"
	"github.com/confidential-node/agent/nodeagent/config"
)

// platformVerb runs `nodeagent platform` on a machine.
func platformVerb(t *testing.T, m *hosttest.Machine, args ...string) (code int, stdout, stderr string, err error) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(m.Root, "var/lib/nodeagent"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := newPlatformCommand(m.Root, m)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	var out, errOut bytes.Buffer
	cmd.SetArgs(append(args, "--state-dir", "/var/lib/nodeagent"))
	cmd.SetOut(&out)
	cmd.SetErr(&errOut)
	if err = cmd.ExecuteContext(t.Context()); err != nil {
		code = exitCode(err)
	}
	return code, out.String(), errOut.String(), err
}

// vlekFile holds the hashstick that was wrapped for the machine.
func vlekFile(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vlek.bin")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestWithoutConsentThePlatformIsWarnedAboutAndLeftAlone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"commit"}, "THIS CANNOT BE UNDONE"},
		{[]string{"configure", "--mask-chip-key"}, "every verifier refuses them"},
		{[]string{"load-vlek", vlekFile(t, hosttest.Genoa().VLEK)}, "No command takes a VLEK out again"},
	} {
		m := hosttest.Boot(t, hosttest.Genoa())
		before := m.Firmware()
		code, out, stderr, err := platformVerb(t, m, c.args...)
		if code != exitPrecondition || contract.AsRefusal(err).Code != "platform.not-accepted" || out != "" || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit %d, %v, %s", c.args, code, err, stderr)
		}
		if m.Committed() || m.Firmware() != before {
			t.Errorf("%v was done all the same", c.args)
		}
	}
}

func TestWithConsentThePlatformChangesAndIsReadBack(t *testing.T) {
	t.Parallel()
	heldBack := hosttest.Genoa()
	heldBack.Firmware.ReportedTCB = 0x541700000000000a
	masked := heldBack
	masked.Firmware.MaskChipID, masked.Firmware.MaskChipKey = true, true
	for name, c := range map[string]struct {
		setup  hosttest.Setup
		args   []string
		expect func(*psp.SNPStatus)
	}{
		"commit reports the current TCB": {heldBack, []string{"commit"}, func(s *psp.SNPStatus) { s.ReportedTCB = s.CurrentTCB }},
		"a lower reported TCB": {
			hosttest.Genoa(),
			[]string{"configure", "--reported-tcb", "boot-loader=10,tee=0,snp=23,microcode=84"},
			func(s *psp.SNPStatus) { s.ReportedTCB = 0x541700000000000a },
		},
		"Turin's layout": {
			hosttest.Turin(),
			[]string{"configure", "--reported-tcb", "fmc=1,boot-loader=1,tee=1,snp=3,microcode=80"},
			func(s *psp.SNPStatus) { s.ReportedTCB = 0x5000000003010101 },
		},
		"the current TCB":                   {heldBack, []string{"configure", "--reported-tcb", "current"}, func(s *psp.SNPStatus) { s.ReportedTCB = s.CurrentTCB }},
		"what is not named stays":           {masked, []string{"configure", "--mask-chip-id=false"}, func(s *psp.SNPStatus) { s.MaskChipID = false }},
		"a mask leaves the TCB held back":   {heldBack, []string{"configure", "--mask-chip-key"}, func(s *psp.SNPStatus) { s.MaskChipKey = true }},
		"a VLEK wrapped for this very chip": {hosttest.Genoa(), []string{"load-vlek", vlekFile(t, hosttest.Genoa().VLEK)}, func(s *psp.SNPStatus) { s.VLEKLoaded = true }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := hosttest.Boot(t, c.setup)
			want := m.Firmware()
			c.expect(&want)
			code, out, stderr, err := platformVerb(t, m, append(c.args, "--accept-consequences", "-o", "json")...)
			if err != nil || code != exitOK || !strings.HasPrefix(stderr, "WARNING: ") {
				t.Fatalf("exit %d, %v, %s", code, err, stderr)
			}
			if m.Firmware() != want || m.Committed() != (c.args[0] == "commit") {
				t.Errorf("firmware is %+v, want %+v", m.Firmware(), want)
			}
			matchesSchema(t, out)
			var doc platformChange
			if err := json.Unmarshal([]byte(out), &doc); err != nil {
				t.Fatal(err)
			}
			if doc.After.ReportedTCB.Raw != want.ReportedTCB || doc.After.MaskChipID != want.MaskChipID || doc.After.VLEKLoaded != want.VLEKLoaded || reflect.DeepEqual(doc.Before, doc.After) {
				t.Errorf("%+v", doc)
			}
		})
	}
}

func TestWhatTheFirmwareOrTheMachineRefusesIsTyped(t *testing.T) {
	t.Parallel()
	off, noDevice := hosttest.Genoa(), hosttest.Genoa()
	off.Cmdline, noDevice.NoCCP = "iommu=pt", true
	stick := bytes.Repeat([]byte("x"), psp.HashstickSize)
	for name, c := range map[string]struct {
		setup hosttest.Setup
		args  []string
		exit  int
		code  string
	}{
		"SNP is off":               {off, []string{"commit"}, exitPrecondition, "platform.no-snp"},
		"no device":                {noDevice, []string{"commit"}, exitPrecondition, "platform.no-snp"},
		"a TCB above the current":  {hosttest.Genoa(), []string{"configure", "--reported-tcb", "boot-loader=10,tee=0,snp=28,microcode=86"}, exitPrecondition, "psp.invalid-parameter"},
		"another chip's VLEK":      {hosttest.Genoa(), []string{"load-vlek", vlekFile(t, stick)}, exitPrecondition, "psp.bad-measurement"},
		"a certificate for a VLEK": {hosttest.Genoa(), []string{"load-vlek", vlekFile(t, stick[1:])}, exitPrecondition, "psp.bad-hashstick"},
		"nothing to set":           {hosttest.Genoa(), []string{"configure"}, exitUsage, ""},
		"half a TCB":               {hosttest.Genoa(), []string{"configure", "--reported-tcb", "snp=23"}, exitUsage, ""},
		"FMC before Turin":         {hosttest.Genoa(), []string{"configure", "--reported-tcb", "fmc=1,boot-loader=10,tee=0,snp=23,microcode=84"}, exitUsage, ""},
		"zero by mistake":          {hosttest.Genoa(), []string{"configure", "--reported-tcb", "boot-loader=0,tee=0,snp=0,microcode=0"}, exitUsage, ""},
		"no such file":             {hosttest.Genoa(), []string{"load-vlek", filepath.Join(t.TempDir(), "none")}, exitNotFound, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := hosttest.Boot(t, c.setup)
			before := m.Firmware()
			exit, out, _, err := platformVerb(t, m, append(c.args, "--accept-consequences")...)
			if exit != c.exit || out != "" || c.code != "" && contract.AsRefusal(err).Code != c.code {
				t.Errorf("exit %d, %v, %s", exit, err, out)
			}
			if c.code != "" && contract.AsRefusal(err).Remedy == "" {
				t.Error("no remedy")
			}
			if m.Firmware() != before || m.Committed() {
				t.Errorf("firmware changed to %+v", m.Firmware())
			}
		})
	}
}

func TestThePlatformTableShowsBeforeAndAfter(t *testing.T) {
	t.Parallel()
	heldBack := hosttest.Genoa()
	heldBack.Firmware.ReportedTCB = 0x541700000000000a
	_, out, _, err := platformVerb(t, hosttest.Boot(t, heldBack), "commit", "--accept-consequences")
	if err != nil || !strings.Contains(out, "SNP_COMMIT done") || !strings.Contains(out, "snp=23 microcode=84  fmc=0 boot-loader=10 tee=0 snp=27 microcode=86") {
		t.Errorf("%v\n%s", err, out)
	}
}

// dying is a machine whose power fails when a command reaches its firmware.
type dying struct{ *hosttest.Machine }

func (d dying) Ioctl(file *os.File, request uint, arg uintptr) (int, error) {
	command := make([]byte, 4)
	local := []unix.Iovec{{Base: &command[0]}}
	local[0].SetLen(len(command))
	if _, err := unix.ProcessVMReadv(os.Getpid(), local, []unix.RemoteIovec{{Base: arg, Len: len(command)}}, 0); err != nil {
		return 0, err
	}
	if request == psp.IssueCommand && psp.Command(binary.LittleEndian.Uint32(command)) == psp.SNPCommitCommand {
		panic("power failed")
	}
	return d.Machine.Ioctl(file, request, arg)
}

func TestWhatIsDoneToThePlatformIsNotedBeforeItIsDone(t *testing.T) {
	t.Parallel()
	m := hosttest.Boot(t, hosttest.Genoa())
	agents := auditDir(filepath.Join(m.Root, config.Default().StateDir))
	log, err := audit.Open(agents, "node-a", time.Now) // an agent runs beside the verbs
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // every entry is on disk
	if code, _, _, err := platformVerb(t, m, "configure", "--mask-chip-id", "--accept-consequences"); code != exitOK {
		t.Fatal(err)
	}
	if code, _, _, _ := platformVerb(t, m, "configure", "--reported-tcb", "boot-loader=10,tee=0,snp=28,microcode=86", "--accept-consequences"); code == exitOK {
		t.Fatal("a TCB above the current one was taken")
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("power did not fail")
			}
		}()
		cmd := newPlatformCommand(m.Root, dying{m})
		cmd.SetArgs([]string{"commit", "--accept-consequences", "--state-dir", "/var/lib/nodeagent"})
		cmd.SetErr(io.Discard)
		_ = cmd.ExecuteContext(t.Context())
	}()
	code, out, _, err := platformVerb(t, m, "history", "-o", "json")
	if code != exitOK {
		t.Fatal(err)
	}
	matchesSchema(t, out)
	var doc platformHistory
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range doc.Changes {
		got = append(got, c.Command+" "+c.Outcome)
	}
	if want := []string{"SNP_SET_CONFIG done", "SNP_SET_CONFIG failed", "SNP_COMMIT unknown"}; !slices.Equal(got, want) {
		t.Errorf("history %q, want %q", got, want)
	}
	got = nil
	if err := audit.List(agents, func(e audit.Entry) error { got = append(got, e.Detail+" "+e.Status); return nil }); err != nil {
		t.Fatal(err)
	}
	want := []string{"SNP_SET_CONFIG unknown", "SNP_SET_CONFIG done", "SNP_SET_CONFIG unknown", "SNP_SET_CONFIG failed", "SNP_COMMIT unknown"}
	if !slices.Equal(got[1:], want) {
		t.Errorf("audit log %q, want %q", got, want)
	}
	if _, table, _, _ := platformVerb(t, m, "history"); !strings.Contains(table, "SNP_COMMIT") || !strings.Contains(table, "may have happened") {
		t.Errorf("table\n%s", table)
	}
}

// vanishing is a machine whose /dev/sev is gone once SNP_COMMIT was carried out.
type vanishing struct{ *hosttest.Machine }

func (v vanishing) Ioctl(file *os.File, request uint, arg uintptr) (int, error) {
	n, err := v.Machine.Ioctl(file, request, arg)
	if v.Committed() {
		v.Remove("dev/sev")
	}
	return n, err
}

func TestAChangeThatCannotBeReadBackIsNotedAsDone(t *testing.T) {
	t.Parallel()
	m := hosttest.Boot(t, hosttest.Genoa())
	if _, _, _, err := platformVerb(t, m, "history"); err != nil {
		t.Fatal(err)
	}
	cmd := newPlatformCommand(m.Root, vanishing{m})
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs([]string{"commit", "--accept-consequences", "--state-dir", "/var/lib/nodeagent"})
	cmd.SetErr(io.Discard)
	if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "SNP_COMMIT was carried out, but reading the platform back: ") {
		t.Errorf("the operator hears %v", err)
	}
	code, out, _, err := platformVerb(t, m, "history", "-o", "json")
	if code != exitOK {
		t.Fatal(err)
	}
	matchesSchema(t, out)
	var doc platformHistory
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Changes) != 1 || doc.Changes[0].Outcome != "done" || doc.Changes[0].After != nil || doc.Changes[0].Error == "" {
		t.Errorf("history %+v", doc.Changes)
	}
}

func TestTheHistoryIsInTheConfiguredFolder(t *testing.T) {
	t.Parallel()
	m := hosttest.Boot(t, hosttest.Genoa())
	file := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(file, []byte("state_dir = \"/srv/agent\"\n"+soundConfig(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(m.Root, "srv/agent"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := newPlatformCommand(m.Root, m)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs([]string{"commit", "--accept-consequences", "--config", file})
	cmd.SetOut(io.Discard)
	cmd.SetErr(io.Discard)
	if err := cmd.ExecuteContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(m.Root, "srv/agent/platform-history.jsonl")); err != nil {
		t.Error(err)
	}
}
