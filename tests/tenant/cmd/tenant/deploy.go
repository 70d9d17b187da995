package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
	"github.com/confidential-node/agent/tests/tenant"
)

type deployFlags struct {
	tenant.DeployOptions
	env, secretEnv []string
	serverNames    []string
	minTCB         string
	wait, running  bool
}

func (d *deployFlags) register(f *pflag.FlagSet) {
	o := &d.DeployOptions
	f.StringVar(&o.Name, "name", "", "name of the deployment (required)")
	f.StringVar(&o.Image, "image", "", "workload image; a tag is resolved to its digest now and kept (required)")
	f.StringVar(&o.Node, "node", "", "host to deploy to; empty lets the control plane choose")
	f.StringVar(&o.GPU, "gpu", "", "GPU model, for instance H100")
	f.IntVar(&o.GPUCount, "count", 0, "number of GPUs; 1 with --gpu alone")
	f.BoolVar(&o.Confidential, "confidential", true, "cannot be turned off")
	f.StringArrayVar(&o.Datasets, "dataset", nil, "input: encrypted://bucket/key (sealed), s3://bucket/key or file://path (sealed here first); NAME=URL sets its name; may be repeated")
	f.StringArrayVar(&o.Models, "model", nil, "like --dataset")
	f.StringVar(&o.EncryptionKey, "encryption-key", "", "file://PATH of the inputs' key; without it a new key is made")
	f.StringVar(&o.KeyManagement, "key-management", "file", "file or hsm")
	f.IntSliceVar(&o.Ports, "port", nil, "port the workload serves behind attested TLS; may be repeated")
	f.StringArrayVar(&d.serverNames, "server-name", nil, "PORT=NAME, a name by which clients reach the port on the node's shared TLS port; may be repeated")
	f.StringVar(&o.Compliance, "compliance", "", "compliance profile the node must have, for instance hipaa")
	f.BoolVar(&o.AttestationRequired, "attestation-required", true, "cannot be turned off")
	f.BoolVar(&o.AuditLogging, "audit-logging", false, "the node must write an audit log")
	f.IntVar(&o.VCPUs, "vcpus", 0, "vCPUs; measured (default 2)")
	f.Uint64Var(&o.MemoryMiB, "memory", 0, "memory in MiB (default 2048)")
	f.StringVar(&o.CPUModel, "cpu-model", "", "QEMU CPU model; measured (default EPYC-v4)")
	f.StringArrayVar(&d.env, "env", nil, "NAME=VALUE for the workload, public; may be repeated")
	f.StringArrayVar(&d.secretEnv, "secret-env", nil, "NAME=FILE, the value goes through the key broker; may be repeated")
	f.StringArrayVar(&o.Results, "result", nil, "name of a file the workload leaves under /results; may be repeated")
	f.Int64Var(&o.ResultsQuota, "results-quota", 0, "`BYTES` of all results together (default the host's policy); above 5 GiB results go up in parts while tenant wait runs")
	f.Int64Var(&o.PartSize, "part-size", 0, "`BYTES` of a part, 5 MiB to 5 GiB; results go up in parts then (default by --results-quota)")
	f.StringArrayVar(&o.Command, "command", nil, "one word of the command that replaces the image's; may be repeated")
	f.IntVar(&o.Releases, "releases", 1, "how often the broker may release the keys")
	f.StringSliceVar(&o.GPUPDIs, "gpu-pdi", nil, "GPU the launch is limited to, by its PDI, 16 hex digits; may be repeated")
	f.StringArrayVar(&o.ChipIDs, "chip-id", nil, "processor the launch is limited to, 128 hex digits; may be repeated")
	f.StringVar(&d.minTCB, "min-tcb", "", "lowest platform TCB, for instance snp=27,microcode=86")
	appraisalFlags(f, &o.Appraisal)
	f.StringVar(&o.IDBlock.Block, "id-block", "", "`FILE` with the publisher's ID block, base64 as nodeagent measure prints it")
	f.StringVar(&o.IDBlock.Auth, "id-auth", "", "`FILE` with the ID auth to it, base64")
	f.DurationVar(&o.StartTimeout, "start-timeout", 0, "from acceptance to the running workload; 0 is the host's policy")
	f.DurationVar(&o.RunTimeout, "run-timeout", 0, "from running to the end of the workload; 0 is the host's policy")
	f.BoolVar(&o.Replace, "replace", false, "put an older deployment of this name aside")
	f.BoolVar(&d.wait, "wait", false, "attest the guest and wait until it has ended")
	f.BoolVar(&d.running, "wait-running", false, "attest the guest and wait until its workload runs")
}

// appraisalFlags say what platform and launch have to be beside the floor.
func appraisalFlags(f *pflag.FlagSet, a *brokeradmin.AppraisalPolicy) {
	f.StringArrayVar(&a.Floors, "floor", nil, "floor of one kind of processor, `FAMILY/MODEL[-MODEL]:COMPONENTS`, for instance 19/10-1f:snp=27,microcode=86,mitigations=0x7; may be repeated")
	f.BoolVar(&a.ForbidSMT, "forbid-smt", false, "refuse guests and platforms with SMT")
	f.BoolVar(&a.RequireCRL, "require-crl", false, "refuse evidence without a revocation list")
	f.StringVar(&a.Platform, "require-platform", "", "`FACTS` the platform must state, of tsme,ecc,rapl-disabled,ciphertext-hiding,alias-check,iommu-write-safe")
	f.StringSliceVar(&a.ExcludeProducts, "exclude-product", nil, "processor `LINE` to refuse: milan, genoa (also Bergamo and Siena) or turin")
	f.StringSliceVar(&a.IDKeyDigests, "id-key-digest", nil, "digest of a key that may have signed the ID block, 96 `HEX` digits; may be repeated")
	f.StringSliceVar(&a.AuthorKeyDigests, "author-key-digest", nil, "digest of a key that may have signed the ID key, 96 `HEX` digits; may be repeated")
	f.Uint32Var(&a.MinGuestSVN, "min-guest-svn", 0, "lowest guest SVN of the ID block")
}

func newDeployConfidential(a *app) *cobra.Command {
	var d deployFlags
	cmd := &cobra.Command{
		Use:   "confidential --name N --image REF",
		Short: "Seal, register and deploy a confidential guest",
		Example: `  tenant deploy confidential --name scan --image registry.example/app:1 --dataset file://records.csv --result report.json --wait
  tenant deploy confidential --name serve --image registry.example/llm:3 --model encrypted://models/llm.age --encryption-key file://llm.key --port 8000`,
		Args: noArgs,
		RunE: a.with(func(ctx context.Context, cmd *cobra.Command, t *tenant.Tenant, _ []string) error {
			var err error
			if d.Env, err = tenant.Pairs("env", d.env); err != nil {
				return err
			}
			if d.SecretEnv, err = tenant.Pairs("secret-env", d.secretEnv); err != nil {
				return err
			}
			if d.ServerNames, err = tenant.ParseServerNames(d.serverNames); err != nil {
				return err
			}
			if d.TCBFloor, err = tenant.ParseTCB(d.minTCB); err != nil {
				return err
			}
			deployed, err := t.Deploy(ctx, d.DeployOptions)
			if err != nil {
				return err
			}
			err = a.print(cmd, "Deployment", deployed, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "name           %s\nguest          %s\nnode           %s\nlaunch         %s\nimage          %s\nlaunch digest  %s\n",
					deployed.Name, deployed.GuestID, deployed.Node, deployed.LaunchID, deployed.Image, deployed.LaunchDigests[0])
				return err
			})
			switch {
			case err != nil:
				return err
			case d.wait:
				_, err = t.Wait(ctx, deployed.Name)
			case d.running:
				_, err = t.WaitRunning(ctx, deployed.Name)
			}
			return err
		}),
	}
	d.register(cmd.Flags())
	return cmd
}
