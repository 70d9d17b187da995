package libvirt

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"libvirt.org/go/libvirt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm"
)

const (
	failedGuest = "01234567-89ab-cdef-0123-456789abcdef"
	secret      = "/srv/CANARY"
)

func qemuError(text string) error {
	return libvirt.Error{Code: libvirt.ERR_INTERNAL_ERROR, Domain: libvirt.FROM_QEMU, Message: text}
}

// A start that fails is told by its cause; what was said stays in the cause,
// which does not leave the host.
func TestAFailedStartIsToldByItsCause(t *testing.T) {
	t.Parallel()
	const (
		header    = "2026-11-25 18:00:00.000+0000: starting up libvirt version: 11.3.0, qemu version: 10.0.2\nLC_ALL=C /usr/bin/qemu-system-x86_64 -bios " + secret + "\n"
		signature = "2026-11-25T18:00:01.000000Z qemu-system-x86_64: SNP_LAUNCH_FINISH ret=-5 fw_error=10 'Bad signature'\n"
		broken    = "Unable to read from monitor: Connection reset by peer " + secret
	)
	began := time.Now()
	for name, c := range map[string]struct {
		said, log string
		logged    time.Time
		code      string
	}{
		"libvirt says it":                {"process exited while connecting to monitor: " + secret + ": -accel kvm: vm-type SEV-SNP not supported by KVM", "", began, "host.snp-unavailable"},
		"libvirt says it, the log other": {"vm-type SEV-SNP not supported by KVM " + secret, header + signature, began, "host.snp-unavailable"},
		"only QEMU's log says it":        {broken, header + signature, began, "vm.id-block-signature"},
		"the log is of an earlier start": {broken, header + signature, began.Add(-time.Hour), "vm.start-failed"},
		"an earlier start in the log":    {broken, header + signature + header + "something else\n", began, "vm.start-failed"},
		"the end of a long log":          {broken, header + strings.Repeat("x\n", lastWordsBytes) + signature, began, "vm.id-block-signature"},
		"nobody says it":                 {broken, "", began, "vm.start-failed"},
	} {
		d := New("", hclog.NewNullLogger())
		d.logs = t.TempDir()
		if c.log != "" {
			file := filepath.Join(d.logs, vm.NamePrefix+failedGuest+".log")
			if err := os.WriteFile(file, []byte(c.log), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(file, c.logged, c.logged); err != nil {
				t.Fatal(err)
			}
		}
		r, refused := errors.AsType[*contract.Refusal](d.startError(failedGuest, began, qemuError(c.said)))
		if !refused || r.Code != c.code || r.Remedy == "" {
			t.Errorf("%s: %+v, want %s", name, r, c.code)
			continue
		}
		if strings.Contains(r.Message+r.Remedy, "CANARY") {
			t.Errorf("%s: what was said leaves the host: %s, %s", name, r.Message, r.Remedy)
		}
		if !strings.Contains(r.Error(), "CANARY") {
			t.Errorf("%s: what was said is not for the local log: %v", name, r)
		}
	}
}

func TestAFailedStartOfALostDaemonIsNoRefusal(t *testing.T) {
	t.Parallel()
	d := New("", hclog.NewNullLogger())
	err := d.startError(failedGuest, time.Now(), libvirt.Error{Code: libvirt.ERR_SYSTEM_ERROR, Domain: libvirt.FROM_RPC, Message: "SEV-SNP does not support SMM."})
	if _, refused := errors.AsType[*contract.Refusal](err); refused {
		t.Errorf("a lost connection is an answer: %v", err)
	}
}
