package kernellog

import (
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// ring answers read(2) like the kernel: a whole record or an error.
type ring struct {
	records []string
	errs    map[int]error // before the record of that number, once
	next    int
}

func (r *ring) Read(p []byte) (int, error) {
	if err := r.errs[r.next]; err != nil {
		delete(r.errs, r.next)
		return 0, err
	}
	if r.next == len(r.records) {
		return 0, unix.EAGAIN
	}
	record := r.records[r.next]
	r.next++
	if len(record) > len(p) {
		return 0, unix.EINVAL
	}
	return copy(p, record), nil
}

func TestOnlyTheKernelsWordsCount(t *testing.T) {
	t.Parallel()
	r := &ring{
		records: []string{
			"6,1,0,-;Linux version 6.17\n",
			"4,2,312,-;AMD-Vi: SNP: IOMMU disabled or configured in passthrough mode\n SUBSYSTEM=pci\n DEVICE=+pci:0000:00:00.2\n",
			"12,3,400,-;SEV-SNP: failed to INIT error 0x1\n", // facility 1: a program
			strings.Repeat("6", maxRecord+1),
			"not a record",
			"3,4,500,c,caller=T1;ccp 0000:22:00.1: SEV-SNP: failed to INIT error 0x13\n",
		},
		errs: map[int]error{1: unix.EPIPE, 2: unix.EINTR},
	}
	got, err := Messages(r)
	want := []string{"Linux version 6.17", "AMD-Vi: SNP: IOMMU disabled or configured in passthrough mode", "ccp 0000:22:00.1: SEV-SNP: failed to INIT error 0x13"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
}

func TestAFailureKeepsWhatWasRead(t *testing.T) {
	t.Parallel()
	r := &ring{records: []string{"6,1,0,-;one\n", "6,2,0,-;two\n"}, errs: map[int]error{1: unix.EIO}}
	if got, err := Messages(r); !errors.Is(err, unix.EIO) || !slices.Equal(got, []string{"one"}) {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := Open("/nonexistent/kmsg"); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
}

func FuzzMessages(f *testing.F) {
	f.Add("6,1,0,-;Linux version 6.17\n SUBSYSTEM=x\n")
	f.Fuzz(func(t *testing.T, record string) {
		got, err := Messages(io.Reader(&ring{records: []string{record}}))
		if err != nil || len(got) > 1 || (len(got) == 1 && strings.Contains(got[0], "\n")) {
			t.Errorf("%q: %q, %v", record, got, err)
		}
	})
}
