package tenant

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
)

// Rotation is what RotateKey did.
type Rotation struct {
	// KeyFile holds the new key.
	KeyFile string `json:"key_file"`
	// Inputs are the re-sealed objects.
	Inputs []DeployedObject `json:"inputs"`
}

// RotateKey gives the inputs of a deployment a new data key: every object is
// opened and sealed again in memory under a new name, the new key is written
// to keyFile, and the old key is withdrawn at the broker, so that no later
// boot of the old launch gets it. A guest that runs keeps what it has. The
// manifest pins ciphertext, so the new objects are for the next deploy.
func (t *Tenant) RotateKey(ctx context.Context, name, keyFile string) (*Rotation, error) {
	if err := errors.Join(t.needStore(), t.needBroker()); err != nil {
		return nil, err
	}
	d, err := t.state.load(name)
	if err != nil {
		return nil, err
	}
	oldKey, err := readKeyFile(t.state.path(name, "data.key"))
	if err != nil {
		return nil, err
	}
	raw, err := Keygen(KeyX25519)
	if err != nil {
		return nil, err
	}
	newKey, err := parseKey(raw)
	if err != nil {
		return nil, err
	}
	// The key is on disk before anything is sealed with it.
	if err := WriteKey(keyFile, raw); err != nil {
		return nil, err
	}
	out := &Rotation{KeyFile: keyFile}
	for _, in := range d.Inputs {
		t.report.Step("re-sealing " + in.Name)
		moved, err := t.reseal(ctx, in, oldKey, newKey)
		if err != nil {
			return nil, err
		}
		out.Inputs = append(out.Inputs, moved)
	}
	r, err := contract.ParseResource(d.DataKey)
	if err != nil {
		return nil, fmt.Errorf("reading deployment: %w", err)
	}
	err = t.broker.DeleteResource(ctx, d.LaunchID, r)
	if code := contract.AsRefusal(err).Code; err != nil && code != "broker.resource-unknown" && code != "broker.launch-unknown" {
		return out, fmt.Errorf("withdrawing the old key: %w", err)
	}
	return out, nil
}

func (t *Tenant) reseal(ctx context.Context, in DeployedObject, from, to *dataKey) (DeployedObject, error) {
	r, size, err := t.store.Get(ctx, in.Bucket, in.Key)
	if err != nil {
		return DeployedObject{}, err
	}
	defer r.Close() //nolint:errcheck // only read from
	sum := newSummer(r)
	plain, err := age.Decrypt(sum, from.identity)
	if err != nil {
		return DeployedObject{}, fmt.Errorf("opening %s: %w", in.Name, err)
	}
	bar := t.report.Transfer("re-sealing "+in.Name, size)
	file, err := sealToTemp(t.state.root, io.TeeReader(plain, bar), to.recipient)
	bar.Close() //nolint:errcheck // a bar that stays is no error
	if err != nil {
		return DeployedObject{}, err
	}
	if sum.sum() != in.SHA256 {
		return DeployedObject{}, errors.Join(contract.Refuse("tenant.object-changed", "restore the object, or deploy again from the source",
			"object %s/%s is not the one this deployment pinned", in.Bucket, in.Key), file.Close())
	}
	out := DeployedObject{Name: in.Name, Bucket: t.profile.Store.Bucket, Key: rotatedName(in.Key, file.SHA256), SHA256: file.SHA256, Size: file.Size}
	err = t.put(ctx, out, file.file)
	return out, errors.Join(err, file.Close())
}

// rotatedName marks an object name with the head of its digest.
func rotatedName(key, sha256 string) string {
	base := strings.TrimSuffix(key, ".age")
	if i := strings.LastIndex(base, ".r-"); i > 0 && len(base)-i == 11 {
		base = base[:i]
	}
	return base + ".r-" + sha256[:8] + ".age"
}

// RotateResource replaces the value of one broker resource in every
// deployment that is registered with it, and returns their names. Guests that
// attest later get the new value.
func (t *Tenant) RotateResource(ctx context.Context, uri string, value []byte) ([]string, error) {
	if err := t.needBroker(); err != nil {
		return nil, err
	}
	r, err := contract.ParseResource(uri)
	if err != nil {
		return nil, Usage("%v", err)
	}
	names, err := t.state.list()
	if err != nil {
		return nil, err
	}
	var changed []string
	for _, name := range names {
		d, err := t.state.load(name)
		if err != nil {
			return changed, err
		}
		has, err := t.registered(ctx, d, r)
		if err != nil {
			return changed, err
		}
		if !has {
			continue
		}
		if d.DataKey == uri {
			return changed, contract.Refuse("tenant.data-key-rotation", "run tenant rotate-key "+name+", which re-seals the inputs",
				"%s opens sealed inputs; with another value they would not open", uri)
		}
		if err := t.broker.PutResource(ctx, d.LaunchID, r, value); err != nil {
			return changed, fmt.Errorf("rotating %s of %s: %w", uri, name, err)
		}
		changed = append(changed, name)
	}
	if len(changed) == 0 {
		return nil, contract.Refuse("tenant.resource-not-found", "see tenant status for what is registered", "no deployment has a resource %s", uri)
	}
	return changed, nil
}

// registered reports whether the broker holds the resource for a deployment.
func (t *Tenant) registered(ctx context.Context, d *Deployment, r contract.Resource) (bool, error) {
	if d.Stage == StagePrepared {
		return false, nil
	}
	s, err := t.broker.Launch(ctx, d.LaunchID)
	if refused := contract.AsRefusal(err); err != nil && refused.Code == "broker.launch-unknown" {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("asking the broker for %s: %w", d.Name, err)
	}
	for _, name := range s.Resources {
		if name == r.Path() {
			return true, nil
		}
	}
	return false, nil
}
