package tenant

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/network/relay"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// DeployOptions are the flags of `tenant deploy confidential`.
type DeployOptions struct {
	Name, Image, Node string
	// GPU is a model without vendor, empty for none; GPUCount 0 means 1.
	GPU      string
	GPUCount int
	// GPUPDIs, 16 hex digits each, are the GPUs to accept; empty for any.
	GPUPDIs []string
	// Datasets and Models are [NAME=]URL, see parseSource.
	Datasets, Models []string
	// EncryptionKey is file://PATH; empty makes a key of this deployment.
	EncryptionKey string
	// KeyManagement is "file" or "hsm".
	KeyManagement string
	Ports         []int
	// ServerNames are the names, by port, under which the node routes TLS to
	// the guest on its shared port. A port without one gets its own.
	ServerNames  map[int]string
	Compliance   string
	AuditLogging bool
	// Confidential and AttestationRequired cannot be turned off.
	Confidential, AttestationRequired bool

	// VCPUs, MemoryMiB and CPUModel have defaults when zero.
	VCPUs     int
	MemoryMiB uint64
	CPUModel  string
	Env       map[string]string
	// SecretEnv maps a variable to the file that holds its value.
	SecretEnv map[string]string
	// Results are the names of files the workload may leave.
	Results []string
	// ResultsQuota in bytes of all results together, 0 for the host's. Above
	// what one PUT carries results go up in parts, of PartSize bytes if that is
	// set.
	ResultsQuota, PartSize int64
	Command                []string
	// Releases is how often the broker may give the keys; 0 means 1.
	Releases int
	TCBFloor *contract.TCB
	ChipIDs  []string
	// Appraisal is what else platform and launch have to be, for the broker
	// and for this tool.
	Appraisal brokeradmin.AppraisalPolicy
	IDBlock   IDBlockFiles
	// StartTimeout and RunTimeout; 0 leaves them to the host's policy.
	StartTimeout, RunTimeout time.Duration
	// Replace puts an older deployment of this name aside.
	Replace bool
}

// check refuses what silicon, format or this version forbids, before anything
// is sealed or sent.
func (o *DeployOptions) check() error {
	if err := checkName(o.Name); err != nil {
		return err
	}
	if o.Image == "" {
		return Usage("--image is required")
	}
	if !o.Confidential {
		return contract.Refuse("tenant.confidential-mandatory", "leave --confidential on; plain machines are not offered here",
			"this tool deploys confidential machines only")
	}
	if !o.AttestationRequired {
		return contract.Refuse("tenant.attestation-mandatory", "leave --attestation-required on",
			"keys are released to attested guests only, so attestation cannot be turned off")
	}
	switch o.KeyManagement {
	case "", "file":
	case "hsm":
		return contract.Refuse("tenant.key-management-unsupported", "use --key-management file until a later version supports hardware modules",
			"key management by an HSM is not supported yet")
	default:
		return Usage("--key-management %q is not file or hsm", o.KeyManagement)
	}
	if o.Compliance != "" && !contract.ValidFileName(o.Compliance) {
		return Usage("--compliance %q is not a profile's name", o.Compliance)
	}
	if err := o.checkGPUs(); err != nil {
		return err
	}
	for _, port := range o.Ports {
		if port < 1 || port > 65535 {
			return Usage("--port %d is not 1 to 65535", port)
		}
	}
	for port, name := range o.ServerNames {
		if !slices.Contains(o.Ports, port) {
			return Usage("--server-name %d=%s is for no --port", port, name)
		}
		if err := relay.CheckName(name); err != nil {
			return err
		}
	}
	for _, name := range o.Results {
		if !contract.ValidFileName(name) {
			return Usage("--result %q is not a file name", name)
		}
	}
	if err := o.checkUploads(); err != nil {
		return err
	}
	if err := o.checkAppraisal(); err != nil {
		return err
	}
	_, err := o.sources()
	return err
}

// sources are datasets and models, each under a name of its own.
func (o *DeployOptions) sources() ([]source, error) {
	var out []source
	for _, text := range slices.Concat(o.Datasets, o.Models) {
		s, err := parseSource(text)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(out, func(other source) bool { return other.name == s.name }) {
			return nil, Usage("two inputs are named %q; write NAME=URL for one of them", s.name)
		}
		out = append(out, s)
	}
	return out, nil
}

func (o *DeployOptions) defaults() {
	if o.VCPUs == 0 {
		o.VCPUs = defaultVCPUs
	}
	if o.MemoryMiB == 0 {
		o.MemoryMiB = defaultMemoryMiB
	}
	if o.CPUModel == "" {
		o.CPUModel = defaultCPUModel
	}
}

// plan is a deployment in the making.
type plan struct {
	o         *DeployOptions
	d         *Deployment
	image     *guestImage
	key       *dataKey
	recipient string // of the results
	resources map[string][]byte
	secretEnv map[string]string
	manifest  []byte
	signed    *signedLaunch
	aside     string   // the deployment that had this name
	unsure    bool     // the broker may know the launch although it did not say so
	uploads   []string // objects in the store that this deployment makes
	sent      bool     // the command may have reached the control plane
}

// Deploy brings a confidential guest up to the accepted command. It registers
// policy and keys at the broker before it asks the control plane, and returns
// when the node has answered: a launch it refuses leaves nothing behind. A
// node that stays silent may still answer; then the deployment stays.
func (t *Tenant) Deploy(ctx context.Context, o DeployOptions) (*Deployment, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if err := errors.Join(t.needBroker(), t.needStore(), t.needControl()); err != nil {
		return nil, err
	}
	if t.registry == nil || t.profile.ImageDir == "" {
		return nil, Usage("the profile lacks [registry] or image_dir")
	}
	o.defaults()
	p, err := t.prepare(ctx, &o)
	if err != nil {
		return nil, err
	}
	if err := t.carryOut(ctx, p); err != nil {
		return nil, errors.Join(err, t.undo(ctx, p))
	}
	return p.d, nil
}

func (t *Tenant) carryOut(ctx context.Context, p *plan) error {
	if err := t.resultKey(p); err != nil {
		return err
	}
	if err := t.seal(ctx, p); err != nil {
		return err
	}
	if err := t.writeManifest(p); err != nil {
		return err
	}
	if err := t.register(ctx, p); err != nil {
		return err
	}
	return t.launch(ctx, p)
}

// prepare does what may fail without a trace first, then opens the state.
func (t *Tenant) prepare(ctx context.Context, o *DeployOptions) (*plan, error) {
	p := &plan{o: o, resources: map[string][]byte{}, secretEnv: map[string]string{}}
	var err error
	if p.key, err = t.deployKey(o); err != nil {
		return nil, err
	}
	for name, file := range o.SecretEnv {
		value, err := readSmall(file)
		if err != nil {
			return nil, fmt.Errorf("reading secret variable %s: %w", name, err)
		}
		r := contract.Resource{Repository: o.Name, Type: "env", Tag: name}
		p.resources[r.Path()], p.secretEnv[name] = value, r.String()
	}
	t.report.Step("predicting the launch digest")
	if p.image, err = loadImage(t.profile.ImageDir); err != nil {
		return nil, err
	}
	digest, err := p.image.predict(o.VCPUs, o.CPUModel, guestFeatures)
	if err != nil {
		return nil, err
	}
	if p.signed, err = o.idBlock(digest); err != nil {
		return nil, err
	}
	t.report.Step("resolving the image")
	pinned, err := t.registry.Resolve(ctx, o.Image)
	if err != nil {
		return nil, err
	}
	data := contract.Resource{Repository: o.Name, Type: "age", Tag: "data"}
	p.resources[data.Path()] = p.key.bytes
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return nil, fmt.Errorf("making launch id: %w", err)
	}
	p.d = &Deployment{
		Version: deploymentVersion, Name: o.Name, Stage: StagePrepared, CreatedAt: t.now().UTC(), LaunchID: hex.EncodeToString(id),
		Node: o.Node, RequestedImage: o.Image, Image: pinned, LaunchDigests: []string{digest}, GuestImage: p.image.desc,
		TCBFloor: o.TCBFloor, Appraisal: o.appraisal(), Ports: o.Ports, DataKey: data.String(),
	}
	if p.d.Node == "" {
		p.d.Node = t.profile.Node
	}
	if o.GPU != "" {
		p.d.GPU, p.d.GPUPDIs = &contract.GPU{Model: o.GPU, Count: max(o.GPUCount, 1)}, o.GPUPDIs
	}
	if p.aside, err = t.state.create(o.Name, o.Replace); err != nil {
		return nil, err
	}
	return p, nil
}

func (t *Tenant) deployKey(o *DeployOptions) (*dataKey, error) {
	if o.EncryptionKey != "" {
		return readKeyURL(o.EncryptionKey)
	}
	for _, s := range slices.Concat(o.Datasets, o.Models) {
		if strings.Contains(s, "encrypted://") {
			return nil, Usage("%s is sealed already: --encryption-key must say with which key", s)
		}
	}
	raw, err := Keygen(KeyX25519)
	if err != nil {
		return nil, err
	}
	return parseKey(raw)
}

// resultKey makes the identity that opens the results. It never leaves.
func (t *Tenant) resultKey(p *plan) error {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return fmt.Errorf("making result key: %w", err)
	}
	p.recipient = id.Recipient().String()
	return errors.Join(
		t.state.write(p.d.Name, "results.key", []byte(id.String()+"\n")),
		t.state.write(p.d.Name, "data.key", p.key.bytes),
		t.state.save(p.d),
	)
}

// seal brings every input into the store as ciphertext.
func (t *Tenant) seal(ctx context.Context, p *plan) error {
	prefix := p.d.Name + "/" + p.d.LaunchID + "/inputs/"
	sources, err := p.o.sources()
	if err != nil {
		return err
	}
	for _, s := range sources {
		t.report.Step("input " + s.name)
		if key := s.objectKey(prefix); key != "" {
			p.uploads = append(p.uploads, key) // before: an upload may fail half way
		}
		object, err := t.input(ctx, prefix, s, p.key)
		if err != nil {
			return err
		}
		p.d.Inputs = append(p.d.Inputs, object)
	}
	for _, name := range p.o.Results {
		p.d.Results = append(p.d.Results, DeployedObject{Name: name, Bucket: t.profile.Store.Bucket, Key: t.resultPath(p.d, name)})
	}
	return t.state.save(p.d)
}

func (t *Tenant) resultPath(d *Deployment, name string) string {
	return d.Name + "/" + d.LaunchID + "/results/" + name
}

func (t *Tenant) writeManifest(p *plan) error {
	m := &contract.Manifest{
		Version: contract.ManifestVersion, LaunchID: p.d.LaunchID, Image: p.d.Image, Command: p.o.Command,
		Env: p.o.Env, SecretEnv: p.secretEnv, Ports: p.o.Ports,
		Broker:   contract.Endpoint{URL: t.profile.Broker.URL, CAPEM: string(t.brokerCA)},
		Registry: contract.Endpoint{URL: t.profile.Registry.URL, CAPEM: string(t.imageCA)},
		GPU:      p.d.GPU, TCBFloor: p.o.TCBFloor, Compliance: p.o.Compliance,
	}
	for _, in := range p.d.Inputs {
		m.Inputs = append(m.Inputs, contract.Input{Name: in.Name, SHA256: in.SHA256, Size: in.Size, Format: contract.FormatAge, Key: p.d.DataKey})
	}
	for _, r := range p.d.Results {
		m.Results = append(m.Results, contract.Result{Name: r.Name, Recipients: []string{p.recipient}})
	}
	raw, err := m.Encode()
	if err != nil {
		return Usage("%v", err)
	}
	if len(raw) > contract.MaxManifestBytes {
		return Usage("the manifest has %d bytes, the limit is %d; shorten environment or command", len(raw), contract.MaxManifestBytes)
	}
	p.manifest = raw
	return t.state.write(p.d.Name, "manifest.json", raw)
}

func (t *Tenant) register(ctx context.Context, p *plan) error {
	t.report.Step("registering policy and keys at the broker")
	err := t.broker.PutLaunch(ctx, p.d.LaunchID, &brokeradmin.Launch{
		LaunchDigests: p.d.LaunchDigests, Manifest: p.manifest, Image: p.d.GuestImage, Releases: p.o.Releases,
		TCBFloor: p.o.TCBFloor, ChipIDs: p.o.ChipIDs, GPUPDIs: p.d.GPUPDIs, AppraisalPolicy: p.d.Appraisal, Resources: p.resources,
	})
	if err != nil {
		p.unsure = !unsent(err)
		return fmt.Errorf("registering at the broker: %w", err)
	}
	p.d.Stage = StageRegistered
	return t.state.save(p.d)
}

func (t *Tenant) launch(ctx context.Context, p *plan) error {
	command, err := t.command(ctx, p)
	if err != nil {
		return err
	}
	t.report.Step("asking the control plane for the guest")
	launched, err := t.control.Launch(ctx, p.d.Node, command, p.o.features())
	if err != nil {
		// A refusal is an answer; anything else is not.
		_, refused := errors.AsType[*contract.Refusal](err)
		p.sent = !refused
		return fmt.Errorf("asking for the guest: %w", err)
	}
	p.sent = true
	p.d.Stage, p.d.GuestID, p.d.CommandID, p.d.Node = StageLaunched, launched.GuestID, launched.CommandID, launched.Node
	if err := t.state.save(p.d); err != nil {
		return err
	}
	return t.answer(ctx, p)
}

// answer waits for the node's word on the launch.
func (t *Tenant) answer(ctx context.Context, p *plan) error {
	t.report.Step("waiting for the node's answer")
	within, cancel := context.WithTimeout(ctx, t.answerWithin)
	defer cancel()
	for {
		g, err := t.control.Guest(within, p.d.GuestID)
		if err == nil && (g.ended() || g.Status != api.GuestStatus_GUEST_STATUS_UNSPECIFIED) {
			p.sent = !g.Refused // what was refused needs no keys
			return t.outcome(ctx, p.d, g)
		}
		if wait(within) == nil {
			continue
		}
		if ctx.Err() != nil {
			return fmt.Errorf("waiting for the node's answer, the launch is on its way: %w", ctx.Err())
		}
		t.report.Step("the node has not answered yet; tenant status " + p.d.Name + " shows when it does")
		return nil
	}
}

func (t *Tenant) command(ctx context.Context, p *plan) (*api.LaunchGuest, error) {
	digest, err := hex.DecodeString(p.d.LaunchDigests[0])
	if err != nil {
		return nil, fmt.Errorf("encoding launch digest: %w", err)
	}
	firmware := sha256.Sum256(p.image.firmware)
	l := &api.LaunchGuest{
		Generation: 1, Manifest: p.manifest, LaunchDigest: digest,
		Image: &api.BootImage{FirmwareSha256: firmware[:], KernelSha256: p.image.kernel[:], InitrdSha256: p.image.initrd[:], Cmdline: p.image.desc.Cmdline},
		Machine: &api.Machine{
			Vcpus: uint32(p.o.VCPUs), MemoryMib: p.o.MemoryMiB, CpuModel: p.o.CPUModel, GuestFeatures: guestFeatures, Policy: p.o.policy(),
		},
		IdBlock: p.signed.block, IdAuth: p.signed.auth,
		Results: &api.ResultTarget{QuotaBytes: uint64(p.o.ResultsQuota)}, Hosts: t.profile.Hosts,
	}
	if p.o.StartTimeout > 0 {
		l.StartTimeout = durationpb.New(p.o.StartTimeout)
	}
	if p.o.RunTimeout > 0 {
		l.RunTimeout = durationpb.New(p.o.RunTimeout)
	}
	for _, port := range p.o.Ports {
		l.Ports = append(l.Ports, &api.PublishedPort{GuestPort: uint32(port), ServerName: p.o.ServerNames[port]})
	}
	valid := t.profile.presignFor()
	for _, in := range p.d.Inputs {
		sum, err := hex.DecodeString(in.SHA256)
		if err != nil {
			return nil, fmt.Errorf("encoding input digest: %w", err)
		}
		url, err := t.store.PresignGet(ctx, in.Bucket, in.Key, valid)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(l.Inputs, func(b *api.InputBlob) bool { return string(b.GetSha256()) == string(sum) }) {
			l.Inputs = append(l.Inputs, &api.InputBlob{Sha256: sum, Size: uint64(in.Size), Url: url})
		}
	}
	if err := t.beginUploads(ctx, p); err != nil {
		return nil, err
	}
	list := DeployedObject{Name: contract.ResultsManifestName, Bucket: t.profile.Store.Bucket, Key: t.resultPath(p.d, contract.ResultsManifestName)}
	for _, r := range append(slices.Clone(p.d.Results), list) {
		upload, err := t.upload(ctx, r, 1, p.o.firstURLs())
		if err != nil {
			return nil, err
		}
		l.Results.Uploads = append(l.Results.Uploads, upload)
	}
	return l, nil
}

// ParseServerNames parses PORT=NAME; names do not depend on case.
func ParseServerNames(pairs []string) (map[int]string, error) {
	out := map[int]string{}
	for _, p := range pairs {
		number, name, ok := strings.Cut(p, "=")
		port, err := strconv.Atoi(number)
		if _, twice := out[port]; !ok || err != nil || name == "" || twice {
			return nil, Usage("--server-name %q is not PORT=NAME, or its port is given twice", p)
		}
		out[port] = strings.ToLower(name)
	}
	return out, nil
}

// Pairs decodes repeated NAME=VALUE flags.
func Pairs(flag string, pairs []string) (map[string]string, error) {
	out := map[string]string{}
	for _, p := range pairs {
		k, v, ok := strings.Cut(p, "=")
		if _, twice := out[k]; !ok || k == "" || twice {
			return nil, Usage("--%s %q is not NAME=VALUE, or is given twice", flag, p)
		}
		out[k] = v
	}
	return out, nil
}
