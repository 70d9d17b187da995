package tenant

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"filippo.io/age"

	"github.com/confidential-node/agent/firmware/contract"
)

const codeResultForged = "tenant.result-forged"

// Results is what was accepted.
type Results struct {
	// ExitCode of the workload, as the attested guest signed it.
	ExitCode int `json:"exit_code"`
	// Files were opened, by name; Missing were promised by the manifest and
	// not delivered by the workload.
	Files   []string `json:"files"`
	Missing []string `json:"missing,omitempty"`
}

func forged(format string, args ...any) error {
	return contract.Refuse(codeResultForged, "do not use these results; deploy again elsewhere and report the node", format, args...)
}

// Results fetches, verifies and opens what the guest produced, into dir.
// Nothing counts that the guest of the verified evidence did not sign.
func (t *Tenant) Results(ctx context.Context, name, dir string) (*Results, error) {
	if err := t.needStore(); err != nil {
		return nil, err
	}
	d, err := t.launched(name)
	if err != nil {
		return nil, err
	}
	v, err := t.VerifyDeployment(name, VerifyOptions{})
	if err != nil {
		return nil, err
	}
	if err := v.refusal(); err != nil {
		return nil, err
	}
	list, err := t.resultManifest(ctx, d, v)
	if err != nil {
		return nil, err
	}
	identity, err := t.resultIdentity(name)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making result folder: %w", err)
	}
	out := &Results{ExitCode: list.ExitCode}
	if out.Files, err = t.openAll(ctx, d, list.Results, identity, dir); err != nil {
		return nil, err
	}
	for _, r := range d.Results {
		if !slices.Contains(out.Files, r.Name) {
			out.Missing = append(out.Missing, r.Name)
		}
	}
	return out, nil
}

// resultManifest fetches the signed list and opens it under the attested key.
func (t *Tenant) resultManifest(ctx context.Context, d *Deployment, v *Verdict) (*contract.ResultManifest, error) {
	r, size, err := t.store.Get(ctx, t.profile.Store.Bucket, t.resultPath(d, contract.ResultsManifestName))
	if noObject(err) {
		return nil, contract.Refuse("tenant.results-not-found", "wait for the guest's end with tenant wait "+d.Name+"; if it has finished, its node kept the results back: deploy again elsewhere",
			"there is no signed list of results of %q in the store", d.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("fetching the signed result list: %w", err)
	}
	defer r.Close() //nolint:errcheck // only read from
	if size > contract.MaxResultManifestBytes {
		return nil, forged("the result list has %d bytes, more than any genuine one", size)
	}
	data, err := io.ReadAll(io.LimitReader(r, contract.MaxResultManifestBytes+1))
	if err != nil {
		return nil, fmt.Errorf("fetching the signed result list: %w", err)
	}
	list, err := contract.OpenResults(data, v.Evidence.ResultKey)
	if err != nil {
		return nil, forged("the result list is not signed by the attested guest: %v", err)
	}
	if list.LaunchID != d.LaunchID {
		return nil, forged("the result list is of launch %s, not of %s", list.LaunchID, d.LaunchID)
	}
	for _, e := range list.Results {
		if !slices.ContainsFunc(d.Results, func(o DeployedObject) bool { return o.Name == e.Name }) {
			return nil, forged("result %q was not asked for", e.Name)
		}
	}
	return list, nil
}

func (t *Tenant) resultIdentity(name string) (age.Identity, error) {
	data, err := t.state.read(name, "results.key")
	if err != nil {
		return nil, fmt.Errorf("reading result key: %w", err)
	}
	ids, err := age.ParseIdentities(bytes.NewReader(data))
	if err != nil || len(ids) != 1 {
		return nil, errors.New("reading result key: not one age identity")
	}
	return ids[0], nil
}

// openAll opens every result beside dir's files and moves them in when all of
// them held: half a result set is none.
func (t *Tenant) openAll(ctx context.Context, d *Deployment, entries []contract.ResultEntry, identity age.Identity, dir string) (names []string, err error) {
	staging, err := os.MkdirTemp(dir, ".opening-*")
	if err != nil {
		return nil, fmt.Errorf("opening results: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(staging)) }()
	for _, entry := range entries {
		if err := t.openResult(ctx, d, entry, identity, staging); err != nil {
			return nil, err
		}
	}
	for _, entry := range entries {
		if err := os.Rename(filepath.Join(staging, entry.Name), filepath.Join(dir, entry.Name)); err != nil {
			return nil, fmt.Errorf("writing result: %w", err)
		}
		names = append(names, entry.Name)
	}
	return names, nil
}

// openResult checks the whole ciphertext before it opens any of it.
func (t *Tenant) openResult(ctx context.Context, d *Deployment, entry contract.ResultEntry, identity age.Identity, dir string) (err error) {
	r, size, err := t.store.Get(ctx, t.profile.Store.Bucket, t.resultPath(d, entry.Name))
	if noObject(err) {
		return contract.Refuse("tenant.result-not-found", "ask the node to upload it; if it does not, deploy again elsewhere",
			"the guest signed result %q, and it is not in the store", entry.Name)
	}
	if err != nil {
		return fmt.Errorf("fetching result %s: %w", entry.Name, err)
	}
	defer r.Close() //nolint:errcheck // only read from
	if size != entry.Size {
		return forged("result %q has %d bytes, the guest signed %d", entry.Name, size, entry.Size)
	}
	sealed, err := os.CreateTemp(t.state.root, "result-*.age")
	if err != nil {
		return fmt.Errorf("fetching result %s: %w", entry.Name, err)
	}
	defer func() { err = errors.Join(err, sealed.Close(), os.Remove(sealed.Name())) }()
	bar := t.report.Transfer("fetching "+entry.Name, size)
	sum, err := copyHashed(sealed, io.TeeReader(io.LimitReader(r, size+1), bar))
	bar.Close() //nolint:errcheck // a bar that stays is no error
	if err != nil {
		return fmt.Errorf("fetching result %s: %w", entry.Name, err)
	}
	if sum.SHA256 != entry.SHA256 || sum.Size != entry.Size {
		return forged("result %q is not the file the guest signed", entry.Name)
	}
	if _, err := sealed.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("opening result %s: %w", entry.Name, err)
	}
	plain, err := age.Decrypt(sealed, identity)
	if err != nil {
		return fmt.Errorf("opening result %s: %w", entry.Name, err)
	}
	return writeAll(filepath.Join(dir, entry.Name), plain)
}

// writeAll writes a new file that only its owner can read.
func writeAll(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("writing result: %w", err)
	}
	_, err = io.Copy(f, r)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("writing result: %w", err)
	}
	return nil
}
