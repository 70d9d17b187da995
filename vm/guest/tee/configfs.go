//go:build !emulated

package tee

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/report"

	"github.com/confidential-node/agent/firmware/contract"
)

// provider is what the kernel calls SEV-SNP in configfs-tsm.
const provider = "sev_guest"

// configfs asks through /sys/kernel/config/tsm/report (Linux 6.7, ABI
// configfs-tsm-report). Each request has a folder of its own, whose generation
// counts the writes: a report counts only when nobody else wrote.
type configfs struct{ files configfsi.Client }

// open makes a request's folder. The caller destroys it.
func (c *configfs) open(files configfsi.Client) (*report.OpenReport, error) {
	r, err := report.CreateOpenReport(files)
	if err != nil {
		return nil, err
	}
	name, err := r.ReadOption("provider")
	if err == nil && strings.TrimSpace(string(name)) != provider {
		err = fmt.Errorf("configfs-tsm's provider is %.20q, want %q", name, provider)
	}
	if err != nil {
		return nil, errors.Join(err, r.Destroy())
	}
	return r, nil
}

func (c *configfs) probe() error {
	r, err := c.open(c.files)
	if err != nil {
		return err
	}
	return r.Destroy()
}

func (c *configfs) get(data [contract.ReportDataSize]byte) (a Attestation, level uint32, err error) {
	files := &watched{Client: c.files}
	defer func() {
		if err != nil && files.err != nil {
			err = fmt.Errorf("%w: %w", err, files.err)
		}
	}()
	r, err := c.open(files)
	if err != nil {
		return a, 0, err
	}
	defer func() { err = errors.Join(err, r.Destroy()) }()
	floor, err := r.PrivilegeLevelFloor()
	if err != nil {
		return a, 0, err
	}
	if floor > maxVMPL {
		return a, 0, fmt.Errorf("the kernel's lowest VMPL is %d, at most %d exist", floor, maxVMPL)
	}
	r.InBlob, r.GetAuxBlob, r.Privilege = data[:], true, &report.Privilege{Level: floor}
	answer, err := r.Get()
	if err != nil {
		return a, 0, err
	}
	return Attestation{Report: answer.OutBlob, Table: answer.AuxBlob}, uint32(floor), nil
}

// watched is a client of configfs that keeps the kernel's last error, which
// the library's own errors do not wrap.
type watched struct {
	configfsi.Client
	err error
}

func (w *watched) MkdirTemp(dir, pattern string) (string, error) {
	name, err := w.Client.MkdirTemp(dir, pattern)
	w.err = err
	return name, err
}

func (w *watched) ReadFile(name string) ([]byte, error) {
	data, err := w.Client.ReadFile(name)
	w.err = err
	return data, err
}

func (w *watched) WriteFile(name string, contents []byte) error {
	w.err = w.Client.WriteFile(name, contents)
	return w.err
}
