package tenant

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// deploymentVersion is the version of Deployment.
const deploymentVersion = 1

// Stages of a deployment, as far as this tool has brought it.
const (
	StagePrepared   = "prepared"   // manifest and keys written
	StageRegistered = "registered" // the broker knows the launch
	StageLaunched   = "launched"   // the control plane took the command
)

// Deployment is what the tenant knows of its own deployment. Everything that
// verification relies on comes from here.
type Deployment struct {
	Version   int       `json:"version"`
	Name      string    `json:"name"`
	Stage     string    `json:"stage"`
	CreatedAt time.Time `json:"created_at"`
	LaunchID  string    `json:"launch_id"`
	Node      string    `json:"node,omitempty"`
	GuestID   string    `json:"guest_id,omitempty"`
	CommandID string    `json:"command_id,omitempty"`
	// RequestedImage is what the user wrote, Image its digest at that time.
	RequestedImage string `json:"requested_image"`
	Image          string `json:"image"`
	// LaunchDigests are the tenant's own predictions, hex.
	LaunchDigests []string `json:"launch_digests"`
	// GuestImage is the tenant's own copy of image.json.
	GuestImage *contract.ImageDescription `json:"guest_image"`
	TCBFloor   *contract.TCB              `json:"tcb_floor,omitempty"`
	// Appraisal is what else was demanded, of the broker too.
	Appraisal *brokeradmin.AppraisalPolicy `json:"appraisal_policy,omitempty"`
	GPU       *contract.GPU                `json:"gpu,omitempty"`
	GPUPDIs   []string                     `json:"gpu_pdis,omitempty"`
	Ports     []int                        `json:"ports,omitempty"`
	// DataKey is the broker resource of the inputs' key.
	DataKey string           `json:"data_key"`
	Inputs  []DeployedObject `json:"inputs,omitempty"`
	Results []DeployedObject `json:"results,omitempty"`
	// Nonces are the challenges this tool made, hex, newest last.
	Nonces []string `json:"nonces,omitempty"`
}

// DeployedObject is a sealed object in the store.
type DeployedObject struct {
	Name   string `json:"name"`
	Bucket string `json:"bucket"`
	Key    string `json:"key"`
	SHA256 string `json:"sha256,omitempty"`
	Size   int64  `json:"size,omitempty"`
	// Upload is the one in parts, of a result that goes so.
	Upload *DeployedUpload `json:"upload,omitempty"`
}

// DeployedUpload is an upload in parts at the object store.
type DeployedUpload struct {
	ID       string `json:"id"`
	PartSize int64  `json:"part_size"`
}

// keptNonces bounds Deployment.Nonces.
const keptNonces = 64

// stateDir is the folder of all deployments.
type stateDir struct {
	root string

	mu sync.Mutex // guards objects.json
}

func openState(root string) (*stateDir, error) {
	if err := os.MkdirAll(filepath.Join(root, "deployments"), 0o700); err != nil {
		return nil, fmt.Errorf("creating state folder: %w", err)
	}
	if err := os.Chmod(root, 0o700); err != nil {
		return nil, fmt.Errorf("closing state folder to others: %w", err)
	}
	return &stateDir{root: root}, nil
}

func (s *stateDir) path(name string, file ...string) string {
	return filepath.Join(append([]string{s.root, "deployments", name}, file...)...)
}

func checkName(name string) error {
	if !contract.ValidFileName(name) {
		return Usage("name %q is not 1 to 128 of letters, digits, dot, dash and underscore", name)
	}
	return nil
}

func (s *stateDir) load(name string) (*Deployment, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(s.path(name, "deployment.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, contract.Refuse(codeNotFound, "list them with tenant status, or give the profile it was deployed with",
			"there is no deployment named %q here", name)
	}
	if err != nil {
		return nil, fmt.Errorf("reading deployment: %w", err)
	}
	var d Deployment
	if err := contract.UnmarshalStrict(data, maxProfileBytes, &d); err != nil {
		return nil, fmt.Errorf("reading deployment %s: %w", name, err)
	}
	if d.Version != deploymentVersion {
		return nil, fmt.Errorf("reading deployment %s: version %d is not supported", name, d.Version)
	}
	return &d, nil
}

func (s *stateDir) list() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.root, "deployments"))
	if err != nil {
		return nil, fmt.Errorf("listing deployments: %w", err)
	}
	var names []string
	for _, e := range entries {
		if _, err := os.Stat(s.path(e.Name(), "deployment.json")); err == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// create makes the folder of a new deployment. With replace, an older one of
// the same name steps aside, keys included, so that nothing is lost; aside is
// then its name.
func (s *stateDir) create(name string, replace bool) (aside string, err error) {
	err = os.Mkdir(s.path(name), 0o700)
	if !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	old, loadErr := s.load(name)
	if !replace {
		return "", contract.Refuse(codeNameInUse, "choose another --name, or give --replace to put the old deployment aside",
			"a deployment named %q exists", name)
	}
	aside = name + ".unfinished"
	if loadErr == nil {
		aside = name + "." + old.LaunchID[:min(8, len(old.LaunchID))]
	}
	if err := os.Rename(s.path(name), s.path(aside)); err != nil {
		return "", fmt.Errorf("putting the old deployment aside: %w", err)
	}
	return aside, os.Mkdir(s.path(name), 0o700)
}

// forget removes a deployment and lets the one come back that had stepped
// aside for it.
func (s *stateDir) forget(name, aside string) error {
	if err := os.RemoveAll(s.path(name)); err != nil {
		return fmt.Errorf("removing deployment %s: %w", name, err)
	}
	if aside == "" {
		return nil
	}
	if err := os.Rename(s.path(aside), s.path(name)); err != nil {
		return fmt.Errorf("putting the old deployment back: %w", err)
	}
	return nil
}

func (s *stateDir) save(d *Deployment) error {
	data, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding deployment: %w", err)
	}
	return s.write(d.Name, "deployment.json", append(data, '\n'))
}

func (s *stateDir) write(name, file string, data []byte) error {
	if err := renameio.WriteFile(s.path(name, file), data, 0o600, renameio.WithTempDir(s.path(name))); err != nil {
		return fmt.Errorf("writing %s of deployment %s: %w", file, name, err)
	}
	return nil
}

func (s *stateDir) read(name, file string) ([]byte, error) { return os.ReadFile(s.path(name, file)) }

// issued remembers a challenge before it is sent.
func (s *stateDir) issued(d *Deployment, nonce string) error {
	d.Nonces = append(d.Nonces, nonce)
	if extra := len(d.Nonces) - keptNonces; extra > 0 {
		d.Nonces = slices.Delete(d.Nonces, 0, extra)
	}
	return s.save(d)
}

type objectIndex map[string]DeployedObject

func (s *stateDir) objectsLocked() (objectIndex, error) {
	data, err := os.ReadFile(filepath.Join(s.root, "objects.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return objectIndex{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading object index: %w", err)
	}
	index := objectIndex{}
	if err := contract.UnmarshalStrict(data, 64<<20, &index); err != nil {
		return nil, fmt.Errorf("reading object index: %w", err)
	}
	return index, nil
}

// object returns what this tool itself uploaded under bucket and key.
func (s *stateDir) object(bucket, key string) (DeployedObject, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.objectsLocked()
	if err != nil {
		return DeployedObject{}, false, err
	}
	o, ok := index[bucket+"/"+key]
	return o, ok, nil
}

func (s *stateDir) remember(o DeployedObject) error {
	return s.changeIndex(func(index objectIndex) { index[o.Bucket+"/"+o.Key] = o })
}

func (s *stateDir) forgetObject(bucket, key string) error {
	return s.changeIndex(func(index objectIndex) { delete(index, bucket+"/"+key) })
}

func (s *stateDir) changeIndex(change func(objectIndex)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.objectsLocked()
	if err != nil {
		return err
	}
	change(index)
	data, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding object index: %w", err)
	}
	if err := renameio.WriteFile(filepath.Join(s.root, "objects.json"), data, 0o600, renameio.WithTempDir(s.root)); err != nil {
		return fmt.Errorf("writing object index: %w", err)
	}
	return nil
}
