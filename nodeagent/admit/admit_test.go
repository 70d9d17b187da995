package admit

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/idblock"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/headroom"
)

func sum(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

// job is a launch every rule allows, on the host of the same name.
func job() (*api.LaunchGuest, *contract.Manifest, Host) {
	cmd := &api.LaunchGuest{
		Image:   &api.BootImage{FirmwareSha256: sum(1), KernelSha256: sum(2), InitrdSha256: sum(3), Cmdline: "quiet"},
		Machine: &api.Machine{Vcpus: 2, MemoryMib: 1024, CpuModel: "EPYC-v4", GuestFeatures: 1, Policy: 0x30000},
		Inputs:  []*api.InputBlob{{Sha256: sum(9), Size: 100, Url: "u"}},
		Results: &api.ResultTarget{Uploads: []*api.ResultUpload{{Name: "out", PutUrl: "u"}, {Name: contract.ResultsManifestName, PutUrl: "u"}}},
		Ports:   []*api.PublishedPort{{GuestPort: 8000}, {GuestPort: 8001, HostPort: 20000}},
	}
	manifest := &contract.Manifest{
		Inputs:  []contract.Input{{Name: "in", SHA256: hex.EncodeToString(sum(9)), Size: 100}},
		Results: []contract.Result{{Name: "out"}}, Ports: []int{8000, 8001},
	}
	description := contract.ImageDescription{Cmdline: "quiet", GPUEvidence: true}
	for i, f := range []*contract.ImageFile{&description.Firmware, &description.Kernel, &description.Initrd} {
		f.SHA256 = hex.EncodeToString(sum(byte(i + 1)))
	}
	host := Host{
		Policy: config.Default().Policy, PublishedPorts: config.PortRange{First: 20000, Last: 20003},
		Capacity: Capacity{VCPUs: 8, MemoryMiB: 4096}, Left: headroom.Left{MemoryMiB: 2048}, Slots: 3,
		Used:    Used{Guests: 1, VCPUs: 4, MemoryMiB: 2048, Slots: map[uint32]bool{0: true}, Ports: map[uint16]bool{20001: true}},
		Images:  []Image{{Dir: "/other"}, {Dir: "/images/a", Description: description}},
		GPURule: func(string, int) *contract.Refusal { return nil },
	}
	return cmd, manifest, host
}

func TestAPlanSaysWhatTheCommandLeavesOpen(t *testing.T) {
	t.Parallel()
	cmd, manifest, host := job()
	plan, err := Decide(cmd, manifest, host)
	if err != nil {
		t.Fatal(err)
	}
	if plan.Slot != 1 || plan.StartTimeout != 15*time.Minute || plan.RunTimeout != 720*time.Hour ||
		plan.ResultBytes != 5<<30 || !slices.Equal(plan.Ports, []Port{{Guest: 8000, Host: 20002}, {Guest: 8001, Host: 20000}}) {
		t.Errorf("plan is %+v", plan)
	}
	cmd.StartTimeout, cmd.RunTimeout, cmd.Results.QuotaBytes = durationpb.New(time.Minute), durationpb.New(time.Hour), 7
	plan, err = Decide(cmd, manifest, host)
	if err != nil || plan.StartTimeout != time.Minute || plan.RunTimeout != time.Hour || plan.ResultBytes != 7 {
		t.Errorf("the command's limits are not the plan's: %+v %v", plan, err)
	}
}

func TestResultsMayBeAsLargeAsTheirUploadsCarry(t *testing.T) {
	t.Parallel()
	cmd, manifest, host := job()
	host.Policy.ResultsQuota = 1 << 40
	for _, c := range []struct {
		parts *api.UploadGrant
		want  int64
	}{
		{nil, 2 * api.MaxPutBytes},
		{&api.UploadGrant{PartSize: api.MinPartBytes}, api.MaxPutBytes + api.MaxParts*api.MinPartBytes},
		{&api.UploadGrant{PartSize: api.MaxPartBytes}, host.Policy.ResultsQuota},
	} {
		if c.parts != nil {
			cmd.Results.Uploads[0] = &api.ResultUpload{Name: "out", Parts: c.parts}
		}
		cmd.Results.QuotaBytes = 0
		if plan, err := Decide(cmd, manifest, host); err != nil || plan.ResultBytes != c.want {
			t.Errorf("%v: %d bytes, %v; want %d", c.parts, plan.ResultBytes, err, c.want)
		}
		cmd.Results.QuotaBytes = uint64(c.want)
		if plan, err := Decide(cmd, manifest, host); err != nil || plan.ResultBytes != c.want {
			t.Errorf("%v: asked for %d, %v", c.parts, c.want, err)
		}
	}
}

// identify gives a command the ID block its image's publisher would sign.
func identify(t *testing.T, cmd *api.LaunchGuest) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cmd.LaunchDigest = bytes.Repeat([]byte{7}, 48)
	pair, err := idblock.Sign(idblock.Block{LaunchDigest: [48]byte(cmd.LaunchDigest), Policy: cmd.Machine.Policy}, key, key)
	if err != nil {
		t.Fatal(err)
	}
	cmd.IdBlock, cmd.IdAuth = pair.RawBlock, pair.RawAuth
}

func TestAPublishersIDBlockIsAdmitted(t *testing.T) {
	t.Parallel()
	cmd, manifest, host := job()
	identify(t, cmd)
	if _, err := Decide(cmd, manifest, host); err != nil {
		t.Error(err)
	}
}

// One row per rule: the smallest change that makes it refuse.
func TestEveryRuleRefusesWithItsCodeAndARemedy(t *testing.T) {
	t.Parallel()
	type world struct {
		cmd      *api.LaunchGuest
		manifest *contract.Manifest
		host     *Host
	}
	rows := []struct {
		name, code string
		change     func(world)
	}{
		{"cordoned", "admit.cordoned", func(w world) { w.host.Cordoned = true }},
		{"compliance", "admit.compliance-unsupported", func(w world) { w.manifest.Compliance = "hipaa" }},
		{"gpu the rule refuses", "gpu.unsupported-model", func(w world) {
			w.manifest.GPU = &contract.GPU{Model: "A100", Count: 1}
			w.host.GPURule = func(model string, _ int) *contract.Refusal {
				return contract.Refuse("gpu.unsupported-model", "another", "%s", model)
			}
		}},
		{"gpu", "gpu.not-managed", func(w world) { w.manifest.GPU = &contract.GPU{Model: "H100", Count: 1} }},
		{"gpu on the emulated TEE", "gpu.emulated-tee", func(w world) {
			w.manifest.GPU, w.host.Emulated = &contract.GPU{Model: "H100", Count: 1}, true
		}},
		{"gpus taken", "gpu.capacity", func(w world) {
			w.manifest.GPU = &contract.GPU{Model: "H100", Count: 8}
			w.host.GPUs = func(model string, count int) *contract.Refusal {
				return contract.Refuse("gpu.capacity", "later", "%d × %s", count, model)
			}
		}},
		{"gpu on an image that gathers no evidence of it", "admit.image-gpu", func(w world) {
			w.manifest.GPU, w.host.Images[1].Description.GPUEvidence = &contract.GPU{Model: "H100", Count: 1}, false
			w.host.GPUs = func(string, int) *contract.Refusal { return nil }
		}},
		{"policy bit 17", "admit.policy", func(w world) { w.cmd.Machine.Policy = 0x10000 }},
		{"policy debug", "admit.policy", func(w world) { w.cmd.Machine.Policy = 0xb0000 }},
		{"policy migration agent", "admit.policy", func(w world) { w.cmd.Machine.Policy = 0x70000 }},
		{"guest features", "admit.guest-features", func(w world) { w.cmd.Machine.GuestFeatures = 0x21 }},
		{"no guest features", "admit.guest-features", func(w world) { w.cmd.Machine.GuestFeatures = 0 }},
		{"ID block on the emulated TEE", "admit.id-block-emulated", func(w world) {
			w.host.Emulated, w.host.Images[1].Description.Emulated = true, true
			identify(t, w.cmd)
		}},
		{"ID block of zeros", "admit.id-block-malformed", func(w world) { w.cmd.IdBlock, w.cmd.IdAuth = make([]byte, 96), make([]byte, 4096) }},
		{"ID block alone", "admit.id-block-malformed", func(w world) { identify(t, w.cmd); w.cmd.IdAuth = nil }},
		{"ID auth alone", "admit.id-block-malformed", func(w world) { identify(t, w.cmd); w.cmd.IdBlock = nil }},
		{"ID block changed after signing", "admit.id-block-signature", func(w world) { identify(t, w.cmd); w.cmd.IdBlock[0x54]++ }},
		{"ID block of another digest", "admit.id-block-digest", func(w world) { identify(t, w.cmd); w.cmd.LaunchDigest = bytes.Repeat([]byte{8}, 48) }},
		{"ID block of another policy", "admit.id-block-policy", func(w world) { identify(t, w.cmd); w.cmd.Machine.Policy = 0x20000 }},
		{"unknown firmware", "admit.image-unknown", func(w world) { w.cmd.Image.FirmwareSha256 = sum(7) }},
		{"unknown kernel", "admit.image-unknown", func(w world) { w.cmd.Image.KernelSha256 = sum(7) }},
		{"unknown initrd", "admit.image-unknown", func(w world) { w.cmd.Image.InitrdSha256 = sum(7) }},
		{"command line", "admit.image-cmdline", func(w world) { w.cmd.Image.Cmdline += " init=/bin/sh" }},
		{"emulated image on silicon", "admit.image-tee", func(w world) { w.host.Images[1].Description.Emulated = true }},
		{"image for silicon, emulated", "admit.image-tee", func(w world) { w.host.Emulated = true }},
		{"input missing", "admit.input-missing", func(w world) { w.cmd.Inputs = nil }},
		{"input of another size", "admit.input-size", func(w world) { w.cmd.Inputs[0].Size = 99 }},
		{"input too many", "admit.input-unknown", func(w world) { w.manifest.Inputs = nil }},
		{"input twice", "admit.input-unknown", func(w world) { w.cmd.Inputs = append(w.cmd.Inputs, w.cmd.Inputs[0]) }},
		{"upload missing", "admit.upload-missing", func(w world) { w.cmd.Results.Uploads = w.cmd.Results.Uploads[1:] }},
		{"upload of the signed list missing", "admit.upload-missing", func(w world) { w.cmd.Results.Uploads = w.cmd.Results.Uploads[:1] }},
		{"upload too many", "admit.upload-unknown", func(w world) { w.manifest.Results = nil }},
		{"start timeout", "admit.start-timeout", func(w world) { w.cmd.StartTimeout = durationpb.New(16 * time.Minute) }},
		{"run timeout", "admit.run-timeout", func(w world) { w.cmd.RunTimeout = durationpb.New(721 * time.Hour) }},
		{"quota", "admit.results-quota", func(w world) { w.cmd.Results.QuotaBytes = 5<<30 + 1 }},
		{"huge quota", "admit.results-quota", func(w world) { w.cmd.Results.QuotaBytes = 1<<64 - 1 }},
		{"quota no upload carries", "admit.results-uncarried", func(w world) {
			w.host.Policy.ResultsQuota, w.cmd.Results.QuotaBytes = 1<<40, 10<<30+1
		}},
		{"quota no grant carries", "admit.results-uncarried", func(w world) {
			w.host.Policy.ResultsQuota, w.cmd.Results.QuotaBytes = 1<<40, 55<<30
			w.cmd.Results.Uploads[0] = &api.ResultUpload{Name: "out", Parts: &api.UploadGrant{PartSize: 5 << 20}}
		}},
		{"vCPUs of one guest", "admit.shape-vcpus", func(w world) { w.cmd.Machine.Vcpus = 65 }},
		{"memory of one guest", "admit.shape-memory", func(w world) { w.cmd.Machine.MemoryMib = 1<<20 + 1 }},
		{"CPU model", "admit.shape-cpu-model", func(w world) { w.cmd.Machine.CpuModel = "host" }},
		{"a full disk", "host.disk-full", func(w world) {
			w.host.Left.Shortages = []*contract.Refusal{contract.Refuse("host.disk-full", "free space", "full")}
		}},
		{"memory others took", "host.memory-low", func(w world) { w.host.Left.MemoryMiB = 1023 }},
		{"nothing said about what is left", "host.memory-low", func(w world) { w.host.Left = headroom.Left{} }},
		{"guests", "admit.capacity-guests", func(w world) { w.host.Used.Guests = 16 }},
		{"memory", "admit.capacity-memory", func(w world) { w.cmd.Machine.MemoryMib, w.host.Left.MemoryMiB = 2049, 4096 }},
		{"memory overcommitted", "admit.capacity-memory", func(w world) { w.host.Used.MemoryMiB = 5000 }},
		{"vCPUs", "admit.capacity-vcpus", func(w world) { w.cmd.Machine.Vcpus = 5 }},
		{"nothing said about capacity", "admit.capacity-memory", func(w world) { w.host.Capacity = Capacity{} }},
		{"addresses", "admit.capacity-addresses", func(w world) { w.host.Slots = 1 }},
		{"port not in the manifest", "admit.port-unknown", func(w world) { w.cmd.Ports[0].GuestPort = 22 }},
		{"host port out of range", "admit.port-range", func(w world) { w.cmd.Ports[1].HostPort = 80 }},
		{"host port in use", "admit.port-in-use", func(w world) { w.cmd.Ports[1].HostPort = 20001 }},
		{"host port twice", "admit.port-in-use", func(w world) { w.cmd.Ports[0].HostPort = 20000 }},
		{"a name where there are none", "admit.name-not-offered", func(w world) { w.cmd.Ports[0].ServerName = "a.guests.example" }},
		{"a name of another domain", "admit.name-domain", func(w world) {
			w.host.SharedTLS = config.SharedTLS{Listen: ":443", Domain: "guests.example"}
			w.cmd.Ports[0].ServerName = "a.other.example"
		}},
		{"a name below a name", "admit.name-domain", func(w world) {
			w.host.SharedTLS = config.SharedTLS{Listen: ":443", Domain: "guests.example"}
			w.cmd.Ports[0].ServerName = "a.b.guests.example"
		}},
		{"a name in use", "admit.name-in-use", func(w world) {
			w.host.SharedTLS, w.host.Used.Names = config.SharedTLS{Listen: ":443", Domain: "guests.example"}, map[string]bool{"a.guests.example": true}
			w.cmd.Ports[0].ServerName = "a.guests.example"
		}},
		{"no name at all", "network.name-malformed", func(w world) {
			w.host.SharedTLS = config.SharedTLS{Listen: ":443", Domain: "guests.example"}
			w.cmd.Ports[0].ServerName = "A.guests.example"
		}},
		{"no host port", "admit.capacity-ports", func(w world) { w.host.PublishedPorts.Last = 20001 }},
	}
	for _, row := range rows {
		cmd, manifest, host := job()
		row.change(world{cmd, manifest, &host})
		plan, err := Decide(cmd, manifest, host)
		if err == nil {
			t.Errorf("%s: admitted as %+v", row.name, plan)
			continue
		}
		if r := contract.AsRefusal(err); r.Code != row.code || r.Remedy == "" || strings.Contains(r.Message, "%!") {
			t.Errorf("%s: refused as %s (%s), want %s", row.name, r.Code, r.Message, row.code)
		}
	}
}

func TestANameTakesNoPortOfTheRange(t *testing.T) {
	t.Parallel()
	cmd, manifest, host := job()
	host.SharedTLS = config.SharedTLS{Listen: ":443", Domain: "guests.example"}
	cmd.Ports[0].ServerName = "job-1.guests.example"
	plan, err := Decide(cmd, manifest, host)
	if err != nil || !slices.Equal(plan.Ports, []Port{{8000, 443, "job-1.guests.example"}, {Guest: 8001, Host: 20000}}) {
		t.Errorf("%+v %v", plan.Ports, err)
	}
}

func TestPortsAtTheEndOfTheRangeAreUsable(t *testing.T) {
	t.Parallel()
	cmd, manifest, host := job()
	host.PublishedPorts = config.PortRange{First: 65534, Last: 65535}
	cmd.Ports[1].HostPort = 0
	plan, err := Decide(cmd, manifest, host)
	if err != nil || !slices.Equal(plan.Ports, []Port{{Guest: 8000, Host: 65534}, {Guest: 8001, Host: 65535}}) {
		t.Errorf("%+v %v", plan.Ports, err)
	}
}
