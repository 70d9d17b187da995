// Package admit decides whether this host takes a guest: a launch command,
// its manifest, the host's policy and what the host has left become a plan or
// a refusal. The control plane can never exceed the host's policy.
//
// It decides and does nothing: no I/O, no clock, no state. The same values
// give the same answer. Safe for concurrent use.
package admit

import (
	"bytes"
	"encoding/hex"
	"errors"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/idblock"
	"github.com/confidential-node/agent/network/relay"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/headroom"
)

// featuresSNP is the only SEV_FEATURES value offered: SNP active. Others
// change what the hypervisor must emulate and are measured.
const featuresSNP = 0x1

// Bits of the guest policy (AMD 56860, guest policy).
const (
	policyOne       = 1 << 17
	policyMigration = 1 << 18
	policyDebug     = 1 << 19
)

// Host is what the decision depends on besides the command.
type Host struct {
	Cordoned     bool
	CordonReason string
	Policy       config.Policy
	// PublishedPorts is the range host ports are taken from.
	PublishedPorts config.PortRange
	// SharedTLS is the port that guests share by name.
	SharedTLS config.SharedTLS
	// Emulated says that guests run under the emulated TEE.
	Emulated bool
	Capacity Capacity
	Used     Used
	// Left is what the host itself has left at the moment, whatever guests hold.
	Left headroom.Left
	// Slots is how many guests have addresses: slots are 0 to Slots-1.
	Slots  uint32
	Images []Image
	// GPURule says which GPUs one guest may have at all.
	GPURule func(model string, count int) *contract.Refusal
	// GPUs says whether that many are free; nil when the host manages none.
	GPUs func(model string, count int) *contract.Refusal
}

// Capacity is what guests may use together. Nothing is nothing, not
// everything.
type Capacity struct {
	VCPUs     int
	MemoryMiB uint64
}

// Used is what guests hold already.
type Used struct {
	Guests    int
	VCPUs     int
	MemoryMiB uint64
	Slots     map[uint32]bool
	Ports     map[uint16]bool
	// Names on the shared TLS port.
	Names map[string]bool
}

// Image is one entry of the host's catalogue.
type Image struct {
	// Dir holds the files that Description names.
	Dir         string
	Description contract.ImageDescription
}

// Plan is what will be done. What it does not say, the command does.
type Plan struct {
	Slot  uint32
	Ports []Port
	// StartTimeout and RunTimeout are the command's, or the host's where it
	// has none; ResultBytes likewise.
	StartTimeout, RunTimeout time.Duration
	ResultBytes              int64
}

// Port is one published TCP port, reached by its own port of the host or, with
// a Name, on the shared one.
type Port struct {
	Guest, Host uint16
	Name        string
}

// decision is a plan in the making.
type decision struct {
	cmd      *api.LaunchGuest
	manifest *contract.Manifest
	host     Host
	plan     Plan
}

// rules in order: what is wrong with the job before what is wrong with the
// host, because the first cannot be cured by another host; the cordon before
// both, because nothing else matters then.
func rules() []func(*decision) *contract.Refusal {
	return []func(*decision) *contract.Refusal{
		cordon, compliance, gpu, policyBits, features, idBlock, image, inputs, uploads, limits,
		shape, resources, capacity, gpuCapacity, slot, ports,
	}
}

// Decide returns the plan for a command that obeys api's rules, or why there
// is none. Every error is a *contract.Refusal.
func Decide(cmd *api.LaunchGuest, manifest *contract.Manifest, host Host) (Plan, error) {
	d := decision{cmd: cmd, manifest: manifest, host: host}
	for _, rule := range rules() {
		if r := rule(&d); r != nil {
			return Plan{}, r
		}
	}
	return d.plan, nil
}

func cordon(d *decision) *contract.Refusal {
	if !d.host.Cordoned {
		return nil
	}
	return contract.Refuse("admit.cordoned", "launch on another host, or send Uncordon",
		"the host takes no guests: %q", d.host.CordonReason)
}

func compliance(d *decision) *contract.Refusal {
	if d.manifest.Compliance == "" {
		return nil
	}
	return contract.Refuse("admit.compliance-unsupported", "choose a host that lists the profile as a feature, or do without it",
		"the host has no compliance profile %q", d.manifest.Compliance)
}

func gpu(d *decision) *contract.Refusal {
	want := d.manifest.GPU
	if want == nil {
		return nil
	}
	if r := d.host.GPURule(want.Model, want.Count); r != nil {
		return r
	}
	if d.host.Emulated {
		return contract.Refuse("gpu.emulated-tee", "launch on a host with SEV-SNP, or without GPUs",
			"the emulated TEE gets no device of the host; %d × %s were asked for", want.Count, want.Model)
	}
	return nil
}

func gpuCapacity(d *decision) *contract.Refusal {
	want := d.manifest.GPU
	switch {
	case want == nil:
		return nil
	case d.host.GPUs == nil:
		return contract.Refuse("gpu.not-managed", "choose a host that offers GPUs, or a job without",
			"this node manages no GPUs; %d × %s were asked for", want.Count, want.Model)
	}
	return d.host.GPUs(want.Model, want.Count)
}

func policyBits(d *decision) *contract.Refusal {
	switch p := d.cmd.GetMachine().GetPolicy(); {
	case p&policyOne == 0:
		return contract.Refuse("admit.policy", "set bit 17 of the guest policy", "guest policy %#x lacks bit 17, which must be one", p)
	case p&(policyMigration|policyDebug) != 0:
		return contract.Refuse("admit.policy", "clear bits 18 and 19 of the guest policy",
			"guest policy %#x lets the host debug the guest or move it by a migration agent", p)
	}
	return nil
}

func features(d *decision) *contract.Refusal {
	if f := d.cmd.GetMachine().GetGuestFeatures(); f != featuresSNP {
		return contract.Refuse("admit.guest-features", "ask for guest_features 0x1 and predict the digest with it",
			"guest features %#x are not offered, only %#x", f, featuresSNP)
	}
	return nil
}

// idBlock refuses what the firmware would refuse only once all of the guest's
// memory was measured.
func idBlock(d *decision) *contract.Refusal {
	block, auth, m := d.cmd.GetIdBlock(), d.cmd.GetIdAuth(), d.cmd.GetMachine()
	if len(block) == 0 && len(auth) == 0 {
		return nil
	}
	if d.host.Emulated {
		return contract.Refuse("admit.id-block-emulated", "launch without ID block, or on a host with SEV-SNP",
			"the emulated TEE checks no ID block")
	}
	const remedy = "make ID block and ID auth with nodeagent measure --id-block from the image, machine and policy of this command"
	pair, err := idblock.Verify(block, auth)
	switch {
	case errors.Is(err, idblock.ErrSignature):
		return contract.Refuse("admit.id-block-signature", remedy, "a signature of the ID block does not hold").Because(err)
	case err != nil:
		return contract.Refuse("admit.id-block-malformed", remedy, "id_block and id_auth are not in the firmware's layout").Because(err)
	case !bytes.Equal(pair.Block.LaunchDigest[:], d.cmd.GetLaunchDigest()):
		return contract.Refuse("admit.id-block-digest", remedy, "the ID block is for launch digest %x, commanded is %x",
			pair.Block.LaunchDigest, d.cmd.GetLaunchDigest())
	case pair.Block.Policy != m.GetPolicy():
		return contract.Refuse("admit.id-block-policy", remedy, "the ID block is for guest policy %#x, commanded is %#x", pair.Block.Policy, m.GetPolicy())
	}
	return nil
}

// FindImage returns the image of a catalogue that has exactly these files and
// this command line.
func FindImage(images []Image, want *api.BootImage) (Image, *contract.Refusal) {
	same := func(f contract.ImageFile, sum []byte) bool { return f.SHA256 == hex.EncodeToString(sum) }
	files := false
	for _, i := range images {
		d := i.Description
		if same(d.Firmware, want.GetFirmwareSha256()) && same(d.Kernel, want.GetKernelSha256()) && same(d.Initrd, want.GetInitrdSha256()) {
			if files = true; d.Cmdline == want.GetCmdline() {
				return i, nil
			}
		}
	}
	if files {
		return Image{}, contract.Refuse("admit.image-cmdline", "use the command line in the image's image.json, unchanged",
			"the kernel command line is not the image's")
	}
	return Image{}, contract.Refuse("admit.image-unknown", "choose an image the node lists in its capability, or install it on the host",
		"no image in the host's catalogue has this firmware, kernel and initrd")
}

func image(d *decision) *contract.Refusal {
	found, r := FindImage(d.host.Images, d.cmd.GetImage())
	switch {
	case r != nil:
		return r
	case found.Description.Emulated != d.host.Emulated:
		return contract.Refuse("admit.image-tee", "choose an image made for the node's TEE",
			"the image is for another TEE than this host's (emulated image: %t, emulated host: %t)", found.Description.Emulated, d.host.Emulated)
	case d.manifest.GPU != nil && !found.Description.GPUEvidence:
		return contract.Refuse("admit.image-gpu", "choose an image whose image.json has gpu_evidence, or leave the GPU out of the manifest",
			"image %q cannot gather evidence of GPUs: its guest would end itself", found.Description.Name)
	}
	return nil
}

func inputs(d *decision) *contract.Refusal {
	const remedy = "send one input with URL for every input of the manifest, with its SHA-256 and size"
	commanded := d.cmd.GetInputs()
	for _, want := range d.manifest.Inputs {
		sum, err := hex.DecodeString(want.SHA256)
		i := slices.IndexFunc(commanded, func(in *api.InputBlob) bool { return err == nil && bytes.Equal(in.GetSha256(), sum) })
		if i < 0 {
			return contract.Refuse("admit.input-missing", remedy, "the command has no ciphertext for input %s", want.Name)
		}
		if commanded[i].GetSize() != uint64(want.Size) {
			return contract.Refuse("admit.input-size", remedy, "input %s has %d bytes in the command, %d in the manifest", want.Name, commanded[i].GetSize(), want.Size)
		}
	}
	for i, in := range commanded {
		sum := hex.EncodeToString(in.GetSha256())
		if !slices.ContainsFunc(d.manifest.Inputs, func(m contract.Input) bool { return m.SHA256 == sum }) {
			return contract.Refuse("admit.input-unknown", remedy, "input %d of the command is not in the manifest", i)
		}
		if slices.ContainsFunc(commanded[:i], func(other *api.InputBlob) bool { return bytes.Equal(other.GetSha256(), in.GetSha256()) }) {
			return contract.Refuse("admit.input-unknown", remedy, "input %d of the command is listed twice", i)
		}
	}
	return nil
}

func uploads(d *decision) *contract.Refusal {
	const remedy = "send one upload for every result of the manifest, and one named " + contract.ResultsManifestName
	want := map[string]bool{contract.ResultsManifestName: true}
	for _, r := range d.manifest.Results {
		want[r.Name] = true
	}
	for _, u := range d.cmd.GetResults().GetUploads() {
		if !want[u.GetName()] {
			return contract.Refuse("admit.upload-unknown", remedy, "upload %s is no result of the manifest, or listed twice", u.GetName())
		}
		delete(want, u.GetName())
	}
	for _, r := range d.manifest.Results {
		if want[r.Name] {
			return contract.Refuse("admit.upload-missing", remedy, "there is no upload for result %s", r.Name)
		}
	}
	if want[contract.ResultsManifestName] {
		return contract.Refuse("admit.upload-missing", remedy, "there is no upload for %s", contract.ResultsManifestName)
	}
	return nil
}

// limits takes the command's limits, which may not exceed the host's.
func limits(d *decision) *contract.Refusal {
	within := func(what string, asked *durationpb.Duration, most config.Duration) (time.Duration, *contract.Refusal) {
		switch asked := asked.AsDuration(); {
		case asked == 0:
			return time.Duration(most), nil
		case asked > time.Duration(most):
			return 0, contract.Refuse("admit."+what+"-timeout", "ask for less, or for 0 to get the most",
				"%s_timeout is %s, the host allows %s", what, asked, time.Duration(most))
		default:
			return asked, nil
		}
	}
	var r *contract.Refusal
	if d.plan.StartTimeout, r = within("start", d.cmd.GetStartTimeout(), d.host.Policy.StartTimeout); r != nil {
		return r
	}
	if d.plan.RunTimeout, r = within("run", d.cmd.GetRunTimeout(), d.host.Policy.RunTimeout); r != nil {
		return r
	}
	most := d.host.Policy.ResultsQuota
	var carried int64
	for _, u := range d.cmd.GetResults().GetUploads() {
		carried += u.MaxBytes()
	}
	switch asked := d.cmd.GetResults().GetQuotaBytes(); {
	case asked == 0:
		d.plan.ResultBytes = min(most, carried)
	case asked > uint64(most):
		return contract.Refuse("admit.results-quota", "ask for less, or for 0 to get the most",
			"a quota of %d bytes of results is asked for, the host allows %d", asked, most)
	case asked > uint64(carried):
		return contract.Refuse("admit.results-uncarried", "ask for less, or grant uploads in parts, or larger ones",
			"a quota of %d bytes of results is asked for, the uploads can carry %d: %d by one PUT, %d parts by a grant", asked, carried, int64(api.MaxPutBytes), api.MaxParts)
	default:
		d.plan.ResultBytes = int64(asked)
	}
	return nil
}

func shape(d *decision) *contract.Refusal {
	const remedy = "ask for a smaller guest, or choose a host whose capability allows it"
	m, p := d.cmd.GetMachine(), d.host.Policy
	switch {
	case int64(m.GetVcpus()) > int64(p.MaxVCPUs):
		return contract.Refuse("admit.shape-vcpus", remedy, "%d vCPUs are asked for, the host allows %d", m.GetVcpus(), p.MaxVCPUs)
	case m.GetMemoryMib() > p.MaxMemoryMiB:
		return contract.Refuse("admit.shape-memory", remedy, "%d MiB are asked for, the host allows %d", m.GetMemoryMib(), p.MaxMemoryMiB)
	case !slices.Contains(p.CPUModels, m.GetCpuModel()):
		return contract.Refuse("admit.shape-cpu-model", "use a CPU model the host offers, and predict the digest with it",
			"CPU model %q is not offered, only %q", m.GetCpuModel(), p.CPUModels)
	}
	return nil
}

// resources refuses what the host could not carry although it was promised: a
// launch that is begun on a full disk ends in the middle.
func resources(d *decision) *contract.Refusal {
	if len(d.host.Left.Shortages) > 0 {
		return d.host.Left.Shortages[0]
	}
	if asked := d.cmd.GetMachine().GetMemoryMib(); asked > d.host.Left.MemoryMiB {
		return contract.Refuse(headroom.CodeMemory, "launch a smaller guest, later, or on another host; see on the host which program takes the memory",
			"%d MiB are asked for, the host has %d MiB available now", asked, d.host.Left.MemoryMiB)
	}
	return nil
}

func capacity(d *decision) *contract.Refusal {
	const remedy = "launch later or on another host"
	m, have, used := d.cmd.GetMachine(), d.host.Capacity, d.host.Used
	// Compared by subtraction: nothing a command says can overflow.
	left := func(have, used uint64) uint64 { return max(have, used) - used }
	switch {
	case used.Guests >= d.host.Policy.MaxGuests:
		return contract.Refuse("admit.capacity-guests", remedy, "the host has %d guests, the most it takes", used.Guests)
	case m.GetMemoryMib() > left(have.MemoryMiB, used.MemoryMiB):
		return contract.Refuse("admit.capacity-memory", remedy, "%d MiB are asked for, %d are free",
			m.GetMemoryMib(), left(have.MemoryMiB, used.MemoryMiB))
	case int64(m.GetVcpus()) > int64(have.VCPUs-used.VCPUs):
		return contract.Refuse("admit.capacity-vcpus", remedy, "%d vCPUs are asked for, %d are free", m.GetVcpus(), max(0, have.VCPUs-used.VCPUs))
	}
	return nil
}

// slot takes the lowest free one.
func slot(d *decision) *contract.Refusal {
	for s := range d.host.Slots {
		if !d.host.Used.Slots[s] {
			d.plan.Slot = s
			return nil
		}
	}
	return contract.Refuse("admit.capacity-addresses", "launch later or on another host; a wider network.guest_cidr holds more guests",
		"no address is free for another guest")
}

// ports publishes what was asked for; explicit host ports first, so that no
// chosen one takes them.
func ports(d *decision) *contract.Refusal {
	taken := map[uint16]bool{}
	for _, p := range d.cmd.GetPorts() {
		host := uint16(p.GetHostPort())
		switch {
		case !slices.Contains(d.manifest.Ports, int(p.GetGuestPort())):
			return contract.Refuse("admit.port-unknown", "publish ports of the manifest only", "port %d is not in the manifest", p.GetGuestPort())
		case p.GetServerName() != "":
			if refused := serverName(d, p.GetServerName()); refused != nil {
				return refused
			}
			continue
		case host == 0:
			continue
		case host < d.host.PublishedPorts.First || host > d.host.PublishedPorts.Last:
			return contract.Refuse("admit.port-range", "ask for host port 0 to get a free one",
				"host port %d is not within %d-%d", host, d.host.PublishedPorts.First, d.host.PublishedPorts.Last)
		case d.host.Used.Ports[host] || taken[host]:
			return contract.Refuse("admit.port-in-use", "ask for host port 0 to get a free one", "host port %d is in use", host)
		}
		taken[host] = true
	}
	next := uint32(d.host.PublishedPorts.First)
	for _, p := range d.cmd.GetPorts() {
		if p.GetServerName() != "" {
			d.plan.Ports = append(d.plan.Ports, Port{uint16(p.GetGuestPort()), d.host.SharedTLS.Port(), p.GetServerName()})
			continue
		}
		host := uint16(p.GetHostPort())
		for ; host == 0 && next <= uint32(d.host.PublishedPorts.Last); next++ {
			if !d.host.Used.Ports[uint16(next)] && !taken[uint16(next)] {
				host = uint16(next)
			}
		}
		if host == 0 {
			return contract.Refuse("admit.capacity-ports", "launch later or on another host", "no host port is free")
		}
		d.plan.Ports = append(d.plan.Ports, Port{Guest: uint16(p.GetGuestPort()), Host: host})
	}
	return nil
}

// serverName says whether a guest may have a name on the shared port.
func serverName(d *decision, name string) *contract.Refusal {
	domain := d.host.SharedTLS.Domain
	switch err := relay.CheckName(name); {
	case domain == "":
		return contract.Refuse("admit.name-not-offered", "publish the port with a host port, or choose a host that offers names",
			"this host has no shared TLS port")
	case err != nil:
		return contract.AsRefusal(err)
	case !relay.Under(name, domain):
		return contract.Refuse("admit.name-domain", "ask for a name such as job-1."+domain, "%s is not one label below %s", name, domain)
	case d.host.Used.Names[name]:
		return contract.Refuse("admit.name-in-use", "ask for another name, or stop the guest that has it", "the name %s is in use", name)
	}
	return nil
}
