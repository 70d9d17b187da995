package fault

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/failpoint"
	"github.com/confidential-node/agent/nodeagent/lifecycle"
	"github.com/confidential-node/agent/tests/controlplane/client"
	"github.com/confidential-node/agent/tests/outside"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/trial"
)

const (
	// faultsFile is where the host's agent looks for its faults.
	faultsFile = "/run/faults"
	storePort  = "9443"
	storeURL   = "https://" + rig.StoreName + ":" + storePort + "/"
	// Recovery is how long an agent may take to undo or adopt.
	Recovery = 60 * time.Second
	blobSize = 200 << 10
)

// Field is one platform with one host, for many launches.
type Field struct {
	*trial.Platform
	Host *trial.Host

	// waiting is what tenants use, delivering a guest that does nothing but
	// deliver a result.
	waiting, delivering *bootable
	store               *objects
	stop                context.CancelFunc
}

// New builds the programs and starts the platform.
func New(ctx context.Context) (f *Field, err error) {
	programs, err := trial.Build(ctx)
	if err != nil {
		return nil, err
	}
	f = &Field{store: &objects{files: map[string][]byte{}}}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	f.stop = stop
	if f.Platform, err = trial.New(ctx, programs); err != nil {
		stop()
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := f.StopListening(); err != nil {
		return nil, err
	}
	if f.waiting, err = readImage(programs.Image); err != nil {
		return nil, err
	}
	if f.delivering, err = readImage(programs.Stranger); err != nil {
		return nil, err
	}
	cert, err := f.CA.Issue(rig.StoreName)
	if err != nil {
		return nil, err
	}
	if err := outside.Serve(running, rig.OutsideAddr+":"+storePort, cert, f.store); err != nil {
		return nil, err
	}
	if f.Host, err = f.AddHost(ctx, trial.HostOptions{}); err != nil {
		return nil, err
	}
	f.Host.Agent().Kill()
	return f, f.StartAgent(ctx)
}

// Close ends the platform.
func (f *Field) Close() error {
	f.stop()
	return f.Platform.Close()
}

// StartAgent starts the host's agent with the faults of SetFaults.
func (f *Field) StartAgent(ctx context.Context) error {
	return f.Host.StartAgentWith(ctx, []string{failpoint.FileEnv + "=" + faultsFile}, "--log-level", "debug")
}

// SetFaults arms faults, lines of POINT=FAULT, in place of all others.
func (f *Field) SetFaults(lines ...string) error {
	path := f.Host.Path(faultsFile)
	if err := os.WriteFile(path+".new", []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		return fmt.Errorf("arming faults: %w", err)
	}
	return os.Rename(path+".new", path)
}

// bootable is a guest image as a launch names it.
type bootable struct {
	image  *api.BootImage
	boot   lifecycle.Boot
	digest [48]byte
}

func readImage(dir string) (*bootable, error) {
	text, err := os.ReadFile(filepath.Join(dir, contract.ImageDescriptionName))
	if err != nil {
		return nil, fmt.Errorf("reading image: %w", err)
	}
	i, err := contract.ParseImageDescription(text)
	if err != nil {
		return nil, err
	}
	b := &bootable{boot: lifecycle.Boot{
		Firmware: filepath.Join(dir, i.Firmware.File), Kernel: [32]byte(unhex(i.Kernel.SHA256)),
		Initrd: [32]byte(unhex(i.Initrd.SHA256)), Cmdline: i.Cmdline, VCPUs: 1, CPUModel: "EPYC-v4", GuestFeatures: 1,
	}}
	b.image = &api.BootImage{
		FirmwareSha256: unhex(i.Firmware.SHA256), KernelSha256: b.boot.Kernel[:], InitrdSha256: b.boot.Initrd[:], Cmdline: i.Cmdline,
	}
	measured, err := lifecycle.Predict(b.boot)
	b.digest = measured.Digest
	return b, err
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic("an image's description holds no digest: " + s)
	}
	return b
}

// Order is a launch before it is sent.
type Order struct {
	*api.LaunchGuest
	blob string
}

// Order makes a launch of its own id, with one sealed input nobody fetched
// before.
func (f *Field) Order() (*Order, error) { return f.order(f.waiting, nil) }

// order may add to the manifest.
func (f *Field) order(b *bootable, more func(*contract.Manifest)) (*Order, error) {
	data, err := sealed()
	if err != nil {
		return nil, err
	}
	sum, launchID := sha256.Sum256(data), make([]byte, 16)
	if _, err := rand.Read(launchID); err != nil {
		return nil, err
	}
	name := hex.EncodeToString(sum[:])
	m := contract.Manifest{
		Version: contract.ManifestVersion, LaunchID: hex.EncodeToString(launchID), Image: f.Image,
		Inputs:   []contract.Input{{Name: "in", SHA256: name, Size: int64(len(data)), Format: contract.FormatAge, Key: "kbs:///a/b/c"}},
		Broker:   contract.Endpoint{URL: "https://broker.example", CAPEM: string(f.CA.PEM)},
		Registry: contract.Endpoint{URL: "https://" + strings.TrimSuffix(trial.Repository, "/demo/workload"), CAPEM: string(f.CA.PEM)},
	}
	if more != nil {
		more(&m)
	}
	manifest, err := m.Encode()
	if err != nil {
		return nil, fmt.Errorf("making a launch: %w", err)
	}
	f.store.put(name, data)
	return &Order{blob: name, LaunchGuest: &api.LaunchGuest{
		GuestId: api.NewID(), Generation: 1, Manifest: manifest, LaunchDigest: b.digest[:], Image: b.image,
		Machine: &api.Machine{Vcpus: 1, MemoryMib: 512, CpuModel: b.boot.CPUModel, GuestFeatures: 1, Policy: 0x30000},
		Inputs:  []*api.InputBlob{{Sha256: sum[:], Size: uint64(len(data)), Url: storeURL + name}},
		Results: &api.ResultTarget{Uploads: []*api.ResultUpload{{Name: contract.ResultsManifestName, PutUrl: storeURL + "put"}}},
	}}, nil
}

// Corrupt spoils the input in the store.
func (f *Field) Corrupt(o *Order) { f.store.corrupt(o.blob) }

// Send sends a launch. Sent again after an answer that was lost, it is refused
// by the guest's id, so it is at most one.
func (f *Field) Send(ctx context.Context, o *Order) error {
	_, err := f.API.Launch(ctx, f.Host.ID, o.LaunchGuest)
	return err
}

func sealed() ([]byte, error) {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, identity.Recipient())
	if err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	_, err = io.CopyN(w, rand.Reader, blobSize)
	return out.Bytes(), errors.Join(err, w.Close())
}

// Ended waits for the guest's last state.
func (f *Field) Ended(ctx context.Context, id string) (*client.Guest, error) {
	return f.API.WaitGuest(ctx, id, (*client.Guest).Ended)
}

// Started waits until the guest's domain runs, or the guest has ended.
func (f *Field) Started(ctx context.Context, id string) (*client.Guest, error) {
	return f.API.WaitGuest(ctx, id, func(g *client.Guest) bool {
		s, err := g.GuestState()
		return err == nil && (g.Ended() || s.GetStatus() >= api.GuestStatus_GUEST_STATUS_STARTED)
	})
}

// objects is an object store that asks for no credential.
type objects struct {
	mu    sync.Mutex
	files map[string][]byte
}

func (o *objects) put(name string, data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.files[name] = data
}

func (o *objects) corrupt(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	data := bytes.Clone(o.files[name])
	data[len(data)/2] ^= 1
	o.files[name] = data
}

func (o *objects) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut {
		_, _ = io.Copy(io.Discard, r.Body) // what guests deliver is nobody's here
		w.Header().Set("ETag", `"1"`)
		return
	}
	o.mu.Lock()
	data, known := o.files[strings.TrimPrefix(r.URL.Path, "/")]
	o.mu.Unlock()
	if !known {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("ETag", `"1"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}
