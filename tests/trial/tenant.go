package trial

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/confidential-node/agent/tests/controlplane"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/tenant"
)

// firstBrokerPort is the first tenant's broker's.
const firstBrokerPort = 8443

// TenantOptions are what differs between tenants.
type TenantOptions struct {
	// Strict leaves out --allow-development-image, as with real secrets.
	Strict bool
	// Image is the guest image the tenant trusts; empty means Programs.Image.
	Image string
}

// Tenant is one tenant with a key broker of its own.
type Tenant struct {
	// Dir is the tenant's own machine, in a manner of speaking.
	Dir string
	// Profile is the file the tenant's tool reads.
	Profile string
	p       *Platform
	broker  *Process
}

// AddTenant starts a tenant's broker and writes its profile. Hosts that are
// added later are not trusted. Not safe for concurrent use.
func (p *Platform) AddTenant(ctx context.Context, name string, o TenantOptions) (*Tenant, error) {
	t := &Tenant{Dir: filepath.Join(p.Dir, name), p: p}
	t.Profile = filepath.Join(t.Dir, "tenant.toml")
	if err := os.Mkdir(t.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("making tenant: %w", err)
	}
	port := fmt.Sprint(firstBrokerPort + len(p.tenants))
	token := make([]byte, 32)
	if _, err := rand.Read(token); err != nil {
		return nil, err
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(t.Dir, "broker-token"), []byte(hex.EncodeToString(token)), 0o600),
		os.WriteFile(filepath.Join(t.Dir, "store-secret"), []byte(storeSecretKey), 0o600),
		t.writeProfile(port, o),
	); err != nil {
		return nil, fmt.Errorf("making tenant: %w", err)
	}
	if err := t.startBroker(ctx, name, port, o); err != nil {
		return nil, err
	}
	p.tenants = append(p.tenants, t)
	return t, nil
}

func (t *Tenant) writeProfile(port string, o TenantOptions) error {
	image := o.Image
	if image == "" {
		image = t.p.Programs.Image
	}
	profile := tenant.Profile{
		StateDir: "state", ImageDir: image, PresignHours: 1,
		Hosts:        map[string]string{rig.BrokerName: rig.OutsideAddr, rig.RegistryName: rig.OutsideAddr},
		ControlPlane: tenant.ControlPlaneProfile{URL: t.p.Control.URL(), CAFile: t.p.CAFile(), TokenFile: filepath.Join(t.p.ControlDir, controlplane.TokenFile)},
		Broker:       tenant.BrokerProfile{URL: "https://" + rig.BrokerName + ":" + port, CAFile: t.p.CAFile(), AdminTokenFile: "broker-token"},
		Registry:     tenant.EndpointProfile{URL: "https://" + rig.RegistryName + ":" + registryPort, CAFile: t.p.CAFile()},
		Store: tenant.StoreProfile{
			Endpoint: "https://" + rig.StoreName + ":" + storePort, CAFile: t.p.CAFile(), Region: "us-east-1", Bucket: Bucket,
			AccessKey: storeAccessKey, SecretKeyFile: "store-secret",
		},
		Verify: tenant.VerifyProfile{AllowDevelopmentImage: !o.Strict},
	}
	for _, h := range t.p.hosts {
		profile.Verify.AllowEmulatedRoots = append(profile.Verify.AllowEmulatedRoots, h.RootFile())
		profile.GuestHost = h.Addr.String()
	}
	text, err := toml.Marshal(profile)
	if err != nil {
		return err
	}
	return os.WriteFile(t.Profile, text, 0o600)
}

func (t *Tenant) startBroker(ctx context.Context, name, port string, o TenantOptions) error {
	cert, key, err := t.p.issue(t.Dir, rig.BrokerName)
	if err != nil {
		return err
	}
	listen := rig.OutsideAddr + ":" + port
	args := []string{
		"--listen", listen, "--cert", cert, "--key", key, "--state-dir", filepath.Join(t.Dir, "broker"),
		"--admin-token-file", filepath.Join(t.Dir, "broker-token"), "--issuer", "https://" + rig.BrokerName + ":" + port,
	}
	for _, h := range t.p.hosts {
		args = append(args, "--allow-emulated-root", h.RootFile())
	}
	if !o.Strict {
		args = append(args, "--allow-development-image")
	}
	if t.broker, err = start(name+"-broker", t.p.Logs, exec.CommandContext(context.WithoutCancel(ctx), t.p.Programs.Broker, args...)); err != nil {
		return err
	}
	return t.broker.up(ctx, func(ctx context.Context) bool {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", listen)
		if err != nil {
			return false
		}
		return conn.Close() == nil
	})
}

// Command is a verb of the tenant's tool, in the tenant's folder.
func (t *Tenant) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, t.p.Programs.Tenant, args...)
	cmd.Dir = t.Dir
	return cmd
}

// Answer is what a verb printed and how it ended.
type Answer struct {
	Stdout, Stderr string
	Code           int
}

// String is for failures.
func (a Answer) String() string { return fmt.Sprintf("exit code %d\n%s%s", a.Code, a.Stdout, a.Stderr) }

// Run runs a verb of the tenant's tool.
func (t *Tenant) Run(ctx context.Context, args ...string) (Answer, error) {
	return Ask(t.Command(ctx, args...), nil)
}

// Ask runs a command to its end. Its exit code is no error.
func Ask(cmd *exec.Cmd, stdin io.Reader) (Answer, error) {
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errs
	err := cmd.Run()
	a := Answer{Stdout: out.String(), Stderr: errs.String(), Code: cmd.ProcessState.ExitCode()}
	if _, exit := errors.AsType[*exec.ExitError](err); exit && a.Code >= 0 {
		err = nil
	}
	if err != nil {
		return a, fmt.Errorf("running %s: %w: %s", strings.Join(cmd.Args, " "), err, a.Stderr)
	}
	return a, nil
}
