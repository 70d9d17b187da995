package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/broker"
	"github.com/confidential-node/agent/vm/guest/pin"
	"github.com/confidential-node/agent/vm/guest/results"
	"github.com/confidential-node/agent/vm/guest/rootfs"
	"github.com/confidential-node/agent/vm/guest/serve"
	"github.com/confidential-node/agent/vm/guest/workload"
)

// defaultPath is what a workload whose image says nothing searches.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// imageShare is the part of memory an image may take, as the root file
// system's own limit.
const imageShare = 60

// secrets are what the broker released, by resource URI.
type secrets map[string][]byte

func (s secrets) wipe() {
	for _, secret := range s {
		clear(secret)
	}
}

// attest proves the guest to the tenant's broker and fetches every secret the
// manifest names, so that the broker is asked in one session.
func (g *guest) attest(ctx context.Context) error {
	transport, err := pin.Transport(g.m.Broker)
	if err != nil {
		return err
	}
	client, err := broker.New(g.m.Broker.URL, transport)
	if err != nil {
		return err
	}
	if err := client.Attest(ctx, g.gpus.Evidence, func(ctx context.Context, data [contract.ReportDataSize]byte) (contract.BrokerEvidence, error) {
		attested, err := g.tee.Report(ctx, data)
		if err != nil {
			return contract.BrokerEvidence{}, err
		}
		return contract.BrokerEvidence{Report: attested.Report, Manifest: g.manifest, Endorsements: g.endorsements(ctx, attested)}, nil
	}); err != nil {
		return err
	}
	// The broker has judged them: no secret is in the guest before.
	if err := g.gpus.Ready(ctx); err != nil {
		return err
	}
	wanted := slices.Sorted(maps.Values(g.m.SecretEnv))
	for _, in := range g.m.Inputs {
		wanted = append(wanted, in.Key)
	}
	g.secrets = secrets{}
	for _, uri := range wanted {
		if g.secrets[uri] != nil {
			continue
		}
		resource, err := contract.ParseResource(uri)
		if err != nil {
			return err
		}
		if g.secrets[uri], err = client.Resource(ctx, resource); err != nil {
			return err
		}
	}
	return nil
}

// openInputs verifies every input and opens them only then.
func (g *guest) openInputs(ctx context.Context) error {
	if err := g.inputs.Verify(ctx, g.m.Inputs); err != nil {
		return err
	}
	return g.inputs.Open(ctx, g.m.Inputs, func(_ context.Context, in contract.Input) ([]byte, error) {
		return slices.Clone(g.secrets[in.Key]), nil
	})
}

// pullImage unpacks the workload's image and writes down how to run it.
func (g *guest) pullImage(ctx context.Context) error {
	transport, err := pin.Transport(g.m.Registry)
	if err != nil {
		return err
	}
	img, err := rootfs.Pull(ctx, g.m.Image, transport)
	if err != nil {
		return err
	}
	how, err := rootfs.Configuration(img, g.m.Command)
	if err != nil {
		return err
	}
	unpacker := &rootfs.Unpacker{Shift: g.idShift, IDs: g.ids, MaxBytes: int64(g.memory / 100 * imageShare)}
	if err := unpacker.Unpack(ctx, img, g.rootDir); err != nil {
		return err
	}
	uid, gid, err := rootfs.User(how.User, g.rootDir, g.ids)
	if err != nil {
		return err
	}
	env, err := g.environment(how.Env)
	if err != nil {
		return err
	}
	g.spec = workload.Spec{
		Root: g.rootDir, Inputs: g.inputs.Plain, Results: g.resultsDir,
		Args: how.Args, Env: env, Dir: how.Dir, UID: uid, GID: gid, Devices: g.gpus.Nodes(), Driver: g.driver(),
	}
	// The workload owns its root and its results, within its own ids.
	return errors.Join(
		chown(g.rootDir, g.idShift, g.idShift),
		chown(g.resultsDir, g.idShift+uid, g.idShift+gid),
	)
}

// driver is the folder with the GPUs' libraries, for a workload that has GPUs.
func (g *guest) driver() string {
	if g.gpus == nil {
		return ""
	}
	return g.driverFolder
}

func chown(path string, uid, gid int) error {
	if err := os.Chown(path, uid, gid); err != nil {
		return fmt.Errorf("handing %s to the workload: %w", path, err)
	}
	return nil
}

// environment is the image's, overlaid with the manifest's.
func (g *guest) environment(image []string) ([]string, error) {
	vars := map[string]string{}
	for _, e := range append([]string{defaultPath}, image...) {
		if k, v, ok := strings.Cut(e, "="); ok {
			vars[k] = v
		}
	}
	maps.Copy(vars, g.m.Env)
	for k, uri := range g.m.SecretEnv {
		if strings.ContainsRune(string(g.secrets[uri]), 0) {
			return nil, contract.Refuse("guest.secret-malformed", "register a secret without NUL bytes", "the secret of variable %s cannot be an environment variable", k)
		}
		vars[k] = string(g.secrets[uri])
	}
	var env []string
	for _, k := range slices.Sorted(maps.Keys(vars)) {
		env = append(env, k+"="+vars[k])
	}
	return env, nil
}

// runWorkload starts the workload, serves its ports and waits for its end.
func (g *guest) runWorkload(ctx context.Context) (err error) {
	listeners, err := g.open(ctx)
	if err != nil {
		return err
	}
	p, err := g.start(ctx, g.spec)
	if err != nil {
		for _, l := range listeners {
			err = errors.Join(err, l.Close())
		}
		return err
	}
	g.spec.Env = nil
	g.secrets.wipe()
	defer func() { err = errors.Join(err, p.Close()) }()
	serving, cancel := context.WithCancel(ctx)
	group, serving := errgroup.WithContext(serving)
	handler := serve.NewHandler(func(ctx context.Context, nonce []byte) ([]byte, error) {
		bundle, err := g.evidence(ctx, nonce)
		if err == nil {
			g.answers.gave()
		}
		return bundle, err
	})
	for port, l := range listeners {
		group.Go(func() error {
			return serve.Serve(serving, l, g.tls, handler.Port(func(ctx context.Context) (net.Conn, error) { return p.Dial(ctx, port) }))
		})
	}
	g.tell(ctx, contract.GuestStatus{Phase: contract.PhaseRunning})
	select {
	case <-p.Done():
	case <-serving.Done():
		// A port that cannot be served: the workload is of no use.
		p.Stop(stopGrace)
	case <-g.stopping:
		p.Stop(stopGrace)
	}
	cancel()
	code, exitErr := p.ExitCode()
	g.exitCode = code
	return errors.Join(exitErr, group.Wait())
}

// open listens on every port of the manifest.
func (g *guest) open(ctx context.Context) (map[int]net.Listener, error) {
	out := map[int]net.Listener{}
	for _, port := range g.m.Ports {
		l, err := g.listen(ctx, port)
		if err != nil {
			err = fmt.Errorf("listening on port %d: %w", port, err)
			for _, l := range out {
				err = errors.Join(err, l.Close())
			}
			return nil, err
		}
		out[port] = l
	}
	return out, nil
}

// collect gives a verifier the time to take evidence, then delivers the
// results: the node may end a guest that has delivered.
func (g *guest) collect(ctx context.Context) error {
	g.awaitVerifier(ctx)
	return results.Deliver(ctx, g.host, g.resultsDir, g.m, g.exitCode, g.resultKey)
}
