package lifecycle

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/nodeagent/admit"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/platform"
	"github.com/confidential-node/agent/vm"
)

// Names of steps. They are in records and events, and never change.
const (
	stepSpool    = "spool"
	stepGPUs     = "gpus"
	stepBlobs    = "blobs"
	stepCopies   = "boot-copies"
	stepMeasure  = "measure"
	stepTap      = "tap"
	stepMetadata = "metadata"
	stepGPUCheck = "gpu-check"
	stepDomain   = "domain"
)

// step is one acquisition of a launch. Its undo may be repeated, and may come
// when do was cut short anywhere or never begun.
type step struct {
	name string
	do   func(*guest, context.Context) error
	undo func(*guest, context.Context) error
	// left reports whether something of it can still be seen. Nil when there
	// is nothing outside this process.
	left func(*guest, context.Context) (bool, error)
	// gpus says that only a guest with GPUs takes it.
	gpus bool
}

// steps of a launch in order; a guest is taken down in reverse. Reserving slot,
// ports and shares is no step: the record itself holds them. The spool comes
// first because it is needed longest: what is in it is uploaded after all else
// was given back. GPUs are verified last before the domain gets them.
func steps() []step {
	return []step{
		{name: stepSpool, do: (*guest).makeSpool, undo: (*guest).removeSpool, left: (*guest).spoolLeft},
		{name: stepGPUs, do: (*guest).reserveGPUs, undo: (*guest).returnGPUs, left: (*guest).gpusLeft, gpus: true},
		{name: stepBlobs, do: (*guest).fetch, undo: (*guest).release, left: (*guest).blobsLeft},
		{name: stepCopies, do: (*guest).copyImage, undo: (*guest).removeCopies, left: (*guest).copiesLeft},
		{name: stepMeasure, do: (*guest).measure, undo: (*guest).nothing},
		{name: stepTap, do: (*guest).addTap, undo: (*guest).removeTap, left: (*guest).tapLeft},
		{name: stepMetadata, do: (*guest).serve, undo: (*guest).endService},
		{name: stepGPUCheck, do: (*guest).checkGPUs, undo: (*guest).nothing, gpus: true},
		{name: stepDomain, do: (*guest).start, undo: (*guest).destroy, left: (*guest).domainLeft},
	}
}

func (g *guest) nothing(context.Context) error { return nil }

func (g *guest) makeSpool(context.Context) error {
	cmd, _, err := g.command()
	if err != nil {
		return err
	}
	spool, err := g.m.d.Spools.Open(g.id, spoolFiles(cmd), g.record().Limits.ResultBytes)
	if err != nil {
		return fmt.Errorf("opening spool: %w", err)
	}
	if err := g.m.hook("inside:" + stepSpool); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.spool = spool
	return nil
}

func (g *guest) removeSpool(context.Context) error {
	g.mu.Lock()
	g.spool = nil
	g.mu.Unlock()
	return g.m.d.Spools.Remove(g.id)
}

func (g *guest) spoolLeft(context.Context) (bool, error) {
	ids, err := g.m.d.Spools.List()
	return slices.Contains(ids, g.id), err
}

// fetch gets the ciphertext. The guest checks it again, in private memory.
func (g *guest) fetch(ctx context.Context) error {
	cmd, _, err := g.command()
	if err != nil {
		return err
	}
	g.paths = nil
	for _, in := range cmd.GetInputs() {
		path, err := g.m.d.Blobs.Fetch(ctx, Blob{SHA256: [32]byte(in.GetSha256()), Size: int64(in.GetSize()), URL: in.GetUrl()}, g.id)
		if err != nil {
			return fmt.Errorf("fetching input: %w", err)
		}
		g.paths = append(g.paths, path)
	}
	return g.m.hook("inside:" + stepBlobs)
}

func (g *guest) release(context.Context) error { return g.m.d.Blobs.Release(g.id) }

func (g *guest) blobsLeft(context.Context) (bool, error) {
	owners, err := g.m.d.Blobs.Owners()
	return slices.Contains(owners, g.id), err
}

func (g *guest) copyImage(ctx context.Context) error {
	cmd, _, err := g.command()
	if err != nil {
		return err
	}
	image, err := g.image(cmd)
	if err != nil {
		return err
	}
	return g.copyBoot(ctx, image)
}

// image finds the image in the catalogue, which may have changed since the
// launch was accepted.
func (g *guest) image(cmd *api.LaunchGuest) (admit.Image, error) {
	images, err := g.m.d.Images()
	if err != nil {
		return admit.Image{}, fmt.Errorf("listing guest images: %w", err)
	}
	image, refusal := admit.FindImage(images, cmd.GetImage())
	if refusal != nil {
		return admit.Image{}, refusal
	}
	return image, nil
}

func (g *guest) removeCopies(context.Context) error {
	if err := os.RemoveAll(g.dir()); err != nil {
		return fmt.Errorf("removing boot copies: %w", err)
	}
	return nil
}

func (g *guest) copiesLeft(context.Context) (bool, error) {
	_, err := os.Lstat(g.dir())
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return true, err
}

// measure predicts what the silicon will measure of the copies, and refuses
// what would measure otherwise than commanded, before anything starts.
func (g *guest) measure(context.Context) error {
	cmd, _, err := g.command()
	if err != nil {
		return err
	}
	machine := cmd.GetMachine()
	measured, err := g.m.d.Measure(Boot{
		Firmware: filepath.Join(g.dir(), fileFirmware),
		Kernel:   [32]byte(cmd.GetImage().GetKernelSha256()), Initrd: [32]byte(cmd.GetImage().GetInitrdSha256()),
		Cmdline: cmd.GetImage().GetCmdline(), VCPUs: int(machine.GetVcpus()), CPUModel: machine.GetCpuModel(),
		GuestFeatures: machine.GetGuestFeatures(),
	})
	if _, refused := errors.AsType[*contract.Refusal](err); refused {
		return err
	}
	if err != nil {
		return contract.Refuse("launch.not-measurable", "use firmware made for SEV-SNP with kernel hashes, and a CPU model whose signature is known",
			"the launch digest of this guest cannot be predicted").Because(err)
	}
	if !bytes.Equal(measured.Digest[:], cmd.GetLaunchDigest()) {
		return contract.Refuse("launch.digest-mismatch", "predict the digest from the same image, command line, vCPUs, CPU model and features (nodeagent measure)",
			"the guest would measure as %s, commanded is %s", hex.EncodeToString(measured.Digest[:]), hex.EncodeToString(cmd.GetLaunchDigest()))
	}
	g.measured = measured
	return g.m.hook("inside:" + stepMeasure)
}

func (g *guest) addTap(ctx context.Context) error {
	if err := g.m.holdForwarding(); err != nil {
		return err
	}
	if err := g.m.hook("inside:" + stepTap); err != nil {
		return err
	}
	return g.connect(ctx)
}

func (g *guest) removeTap(ctx context.Context) error {
	g.m.d.Relay.Remove(g.id)
	g.m.d.Relay.Drop(g.id)
	return g.m.d.Network.Remove(ctx, g.id)
}

func (g *guest) tapLeft(ctx context.Context) (bool, error) {
	taps, err := g.m.d.Network.Observe(ctx)
	return slices.ContainsFunc(taps, func(t network.Tap) bool { return t.GuestID == g.id }), err
}

func (g *guest) serve(ctx context.Context) error {
	cmd, manifest, err := g.command()
	if err != nil {
		return err
	}
	session, err := g.session(cmd, manifest)
	if err != nil {
		return err
	}
	if err := g.m.hook("inside:" + stepMetadata); err != nil {
		return err
	}
	return g.m.d.Metadata.Open(ctx, session)
}

func (g *guest) endService(context.Context) error { return g.m.d.Metadata.Close(g.id) }

// start starts the domain at most once. What a hypervisor did that fell silent
// meanwhile is found out by looking, never by asking again: a guest that had
// started and ended would start twice.
func (g *guest) start(ctx context.Context) error {
	spec, err := g.spec()
	if err != nil {
		return err
	}
	if _, err := g.see(ctx); err != nil {
		return err
	}
	if err := g.m.hook("inside:" + stepDomain); err != nil {
		return err
	}
	err = g.m.d.Hypervisor.Start(ctx, spec)
	if _, refused := errors.AsType[*contract.Refusal](err); err == nil || refused {
		return err
	}
	g.m.log.Warn("hypervisor lost while the guest was started, looking for what it did", keyGuest, g.id, keyError, err)
	domain, lookErr := g.see(ctx)
	switch {
	case lookErr != nil:
		return errors.Join(err, lookErr)
	case domain == sightOurs:
		return nil
	}
	return contract.Refuse("vm.start-lost", "look at libvirt's log on the host if it repeats, and launch again",
		"the hypervisor was lost while the guest was started, and does not run it").Because(err)
}

func (g *guest) destroy(ctx context.Context) error { return g.m.d.Hypervisor.Destroy(ctx, g.id) }

func (g *guest) domainLeft(ctx context.Context) (bool, error) {
	domains, err := g.m.domains.list(ctx)
	return slices.ContainsFunc(domains, func(o vm.Observed) bool { return o.GuestID == g.id }), err
}

// spec is the domain of a guest whose earlier steps are done.
func (g *guest) spec() (vm.Spec, error) {
	cmd, _, err := g.command()
	if err != nil {
		return vm.Spec{}, err
	}
	rec, machine, dir := g.record(), cmd.GetMachine(), g.dir()
	nic := g.m.c.nic(rec)
	link, err := network.Describe(g.m.c.Network, nic)
	if err != nil {
		return vm.Spec{}, err
	}
	tee, err := g.m.d.TEE(platform.Launch{
		Policy: machine.GetPolicy(), HostData: contract.HostData(cmd.GetManifest()), IDBlock: cmd.GetIdBlock(), IDAuth: cmd.GetIdAuth(),
		Dir: dir, HashTable: g.measured.HashTable, HashTableGPA: g.measured.HashTableGPA,
	})
	if err != nil {
		return vm.Spec{}, err
	}
	spec := vm.Spec{
		GuestID: g.id, Generation: rec.Generation, VCPUs: rec.VCPUs, MemoryMiB: rec.MemoryMiB, CPUModel: machine.GetCpuModel(),
		Firmware: filepath.Join(dir, fileFirmware), Kernel: filepath.Join(dir, fileKernel), Initrd: filepath.Join(dir, fileInitrd),
		Cmdline: cmd.GetImage().GetCmdline(), NIC: vm.NIC{Tap: link.Tap, MAC: nic.MAC.String()}, TEE: tee,
		Devices: g.passthrough.Devices, IOMMUFD: g.passthrough.IOMMUFD, CPUs: g.passthrough.CPUs,
	}
	for i, in := range cmd.GetInputs() {
		// virtio-blk cuts serials at 20 characters.
		spec.Disks = append(spec.Disks, vm.Disk{Path: g.paths[i], Serial: hex.EncodeToString(in.GetSha256())[:20]})
	}
	image, err := g.image(cmd)
	if err != nil {
		return vm.Spec{}, err
	}
	if image.Description.Variant == contract.VariantDebug {
		spec.ConsoleLog = filepath.Join(dir, fileConsole)
	}
	return spec, nil
}
