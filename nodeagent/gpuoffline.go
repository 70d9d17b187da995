package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vfio"
)

// list asks the agent. While it does not run, it is what the agent recorded
// last, beside what the host shows now.
func (f *gpuFlags) list(cmd *cobra.Command) (admin.GPUList, error) {
	list, err := admin.FetchGPUs(cmd.Context(), f.socket)
	if !errors.Is(err, admin.ErrNotRunning) {
		return list, err
	}
	cfg, configErr := config.Load(f.config)
	switch {
	case errors.Is(configErr, fs.ErrNotExist) && !cmd.Flags().Changed("config"):
		return list, err // no host with an agent
	case configErr != nil:
		return list, configErr
	}
	return recordedGPUs(cfg, pciHost("/"))
}

// recordedGPUs reads and changes nothing.
func recordedGPUs(cfg config.Config, host vfio.Host) (admin.GPUList, error) {
	records, err := store.ReadGPUs(storeFile(cfg))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return admin.GPUList{}, err
	}
	silent := hclog.NewNullLogger()
	p, err := pool.New(pool.Deps{
		Records: onRecord(records), Host: host, System: vfio.Kernel{}, Logger: silent,
		UUIDs: func() map[string]vfio.Address { return uuids(host, silent) },
	}, pool.Config{Manage: cfg.GPU.Manage, BootID: "agent not running"})
	if err != nil {
		return admin.GPUList{}, err
	}
	return gpuDoor{p}.List(), nil
}

// onRecord are records that are only read.
type onRecord []pool.Record

func (r onRecord) GPUs() ([]pool.Record, error) { return r, nil }

var errOnlyRead = errors.New("GPU records are only read here")

func (onRecord) PutGPUs(...pool.Record) error { return errOnlyRead }

func (onRecord) DeleteGPU(vfio.Address) error { return errOnlyRead }

func printNotRunning(out io.Writer, running bool) {
	if !running {
		fmt.Fprint(out, "AGENT NOT RUNNING: states as it recorded them last, devices as the host shows them now.\nwhat to do: systemctl start nodeagent\n\n")
	}
}
