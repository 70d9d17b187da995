package trial

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/tests/controlplane"
	"github.com/confidential-node/agent/tests/controlplane/client"
	"github.com/confidential-node/agent/tests/outside"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/workload"
)

// Where the outside's services listen, on rig.OutsideAddr.
const (
	natsPort     = "4222"
	apiPort      = "4280"
	storePort    = "9000"
	registryPort = "5000"
	// Repository is where the workload's image is, without tag.
	Repository = rig.RegistryName + ":" + registryPort + "/demo/workload"
	// Bucket is the tenants' in the object store.
	Bucket         = "sealed"
	storeAccessKey = "tenant"
	storeSecretKey = "the-store-of-a-trial-has-one-account"
)

// Platform is the outside of a trial and its hosts.
type Platform struct {
	// Dir holds every file of the outside; Logs is a folder in it.
	Dir, Logs string
	Programs  *Programs
	CA        *rig.CA
	// Control is the control plane, API a client of it, ControlDir its folder.
	Control    *controlplane.Server
	API        *client.Client
	ControlDir string
	Store      *outside.Store
	// Image is the workload's image, pinned by digest.
	Image string

	hosts   []*Host
	tenants []*Tenant
	stop    context.CancelFunc
	// traffic is a file with every NATS message.
	traffic string
	silence func() error
	private bool
}

// New starts the outside; it must run inside rig.Enter. Its services end with
// Close.
func New(ctx context.Context, programs *Programs) (p *Platform, err error) {
	dir, err := os.MkdirTemp("", "trial-")
	if err != nil {
		return nil, fmt.Errorf("starting platform: %w", err)
	}
	p = &Platform{Dir: dir, Logs: filepath.Join(dir, "logs"), Programs: programs, ControlDir: filepath.Join(dir, "controlplane")}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop = stop
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	// Agents on hosts reach files here by their path.
	if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // files in it have modes of their own
		return nil, err
	}
	if err := os.Mkdir(p.Logs, 0o700); err != nil {
		return nil, err
	}
	if p.CA, err = rig.NewCA(); err != nil {
		return nil, err
	}
	if err := os.WriteFile(p.CAFile(), p.CA.PEM, 0o644); err != nil { //nolint:gosec // a CA is public
		return nil, err
	}
	if err := p.startControl(ctx); err != nil {
		return nil, fmt.Errorf("starting control plane: %w", err)
	}
	if err := p.startStore(running); err != nil {
		return nil, fmt.Errorf("starting object store: %w", err)
	}
	if err := p.startRegistry(running); err != nil {
		return nil, fmt.Errorf("starting registry: %w", err)
	}
	return p, nil
}

// CAFile is the certificate of the run's CA.
func (p *Platform) CAFile() string { return filepath.Join(p.Dir, "ca.pem") }

func (p *Platform) startControl(ctx context.Context) error {
	cert, err := p.CA.Issue(rig.ControlName, rig.OutsideAddr)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(p.Logs, "controlplane.log"), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	p.Control, err = controlplane.Start(ctx, controlplane.Config{
		Dir: p.ControlDir, ListenNATS: rig.OutsideAddr + ":" + natsPort, ListenHTTP: rig.OutsideAddr + ":" + apiPort,
		Cert: cert, CAPEM: p.CA.PEM, BeginRetry: 5 * time.Second, Logger: hclog.New(&hclog.LoggerOptions{Name: "controlplane", Output: log}),
	})
	if err != nil {
		return err
	}
	if p.API, err = client.New(p.Control.URL(), p.CA.PEM, p.Control.Token()); err != nil {
		return err
	}
	if p.private {
		return nil
	}
	return p.listen()
}

// listen keeps everything that goes over NATS, for Search.
func (p *Platform) listen() error {
	p.traffic = filepath.Join(p.Dir, "nats-traffic")
	file, err := os.OpenFile(p.traffic, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	stop, err := p.Control.Sniff(func(subject string, header map[string][]string, data []byte) {
		_, _ = fmt.Fprintf(file, "%s %v\n%s\n", subject, header, data) // a full disk shows elsewhere
	})
	p.silence = func() error { return errors.Join(stop(), file.Close()) }
	return err
}

func (p *Platform) startStore(running context.Context) (err error) {
	if p.Store, err = outside.NewStore(storeAccessKey, storeSecretKey, time.Now, Bucket); err != nil {
		return err
	}
	cert, err := p.CA.Issue(rig.StoreName)
	if err != nil {
		return err
	}
	return outside.Serve(running, rig.OutsideAddr+":"+storePort, cert, p.Store)
}

func (p *Platform) startRegistry(running context.Context) error {
	cert, err := p.CA.Issue(rig.RegistryName)
	if err != nil {
		return err
	}
	if err := outside.Serve(running, rig.OutsideAddr+":"+registryPort, cert, outside.Registry()); err != nil {
		return err
	}
	binary, err := os.ReadFile(p.Programs.Workload)
	if err != nil {
		return err
	}
	image, err := workload.BuildImage(binary)
	if err != nil {
		return err
	}
	p.Image, err = outside.Push(running, Repository+":1", image, p.HTTP())
	return err
}

// HTTP returns a client that trusts the run's CA.
func (p *Platform) HTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: p.CA.Pool(), MinVersion: tls.VersionTLS13}}}
}

// issue writes a certificate and its key for a name.
func (p *Platform) issue(dir, name string) (certFile, keyFile string, err error) {
	cert, err := p.CA.Issue(name, rig.OutsideAddr)
	if err != nil {
		return "", "", err
	}
	key, ok := cert.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return "", "", fmt.Errorf("issuing certificate: key is a %T", cert.PrivateKey)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", "", fmt.Errorf("issuing certificate: %w", err)
	}
	certFile, keyFile = filepath.Join(dir, "tls.pem"), filepath.Join(dir, "tls.key")
	return certFile, keyFile, errors.Join(
		os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), 0o600),
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600),
	)
}

// LogTails are the last lines of every program's log, by file name.
func (p *Platform) LogTails(lines int) map[string]string {
	out := map[string]string{}
	files, err := filepath.Glob(filepath.Join(p.Logs, "*.log"))
	if err != nil {
		return out
	}
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil {
			all := strings.Split(strings.TrimSpace(string(text)), "\n")
			out[filepath.Base(file)] = strings.Join(all[max(0, len(all)-lines):], "\n")
		}
	}
	return out
}

// Close ends everything. It reports what did not end well.
func (p *Platform) Close() error {
	var errs []error
	for _, t := range p.tenants {
		errs = append(errs, t.broker.Stop())
	}
	for _, h := range p.hosts {
		errs = append(errs, h.close())
	}
	if p.silence != nil {
		errs = append(errs, p.silence())
	}
	if p.API != nil {
		p.API.Close()
	}
	if p.Control != nil {
		p.Control.Close()
	}
	p.stop()
	return errors.Join(append(errs, os.RemoveAll(p.Dir))...)
}

// ControlCommand is a verb of the program that drives the control plane.
func (p *Platform) ControlCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, p.Programs.ControlPlane, append([]string{"--dir", p.ControlDir}, args...)...)
}

// StopListening makes traffic private: Search does not find it any more. Who
// listens to every subject is interest in every inbox, so that the server
// delivers commands to pull requests of an agent that is dead, and again only
// after the acknowledgement is overdue.
func (p *Platform) StopListening() error {
	err := p.silence()
	p.silence, p.private = nil, true
	return err
}

// RestartControl ends the control plane and starts it again on its folder. Not
// safe for concurrent use.
func (p *Platform) RestartControl(ctx context.Context) error {
	if p.silence != nil {
		if err := p.silence(); err != nil {
			return err
		}
	}
	p.API.Close()
	p.Control.Close()
	return p.startControl(ctx)
}
