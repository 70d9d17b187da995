package tenant

import (
	"context"
	"crypto/x509"
	"errors"
	"os"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// Broker is what the tenant asks of its key broker.
type Broker interface {
	PutLaunch(ctx context.Context, launchID string, l *brokeradmin.Launch) error
	Launch(ctx context.Context, launchID string) (*brokeradmin.Status, error)
	DeleteLaunch(ctx context.Context, launchID string) error
	PutResource(ctx context.Context, launchID string, r contract.Resource, value []byte) error
	DeleteResource(ctx context.Context, launchID string, r contract.Resource) error
}

// Tenant carries out the verbs.
type Tenant struct {
	profile *Profile
	state   *stateDir
	report  Reporter
	now     func() time.Time
	roots   []*x509.Certificate
	// answerWithin is how long Deploy waits for the node's answer.
	answerWithin time.Duration

	// What a verb does not need may be nil.
	control  ControlPlane
	broker   Broker
	store    ObjectStore
	registry resolver
	brokerCA []byte
	imageCA  []byte
}

// Option replaces a part, for embedding.
type Option func(*Tenant)

// WithControlPlane uses another client than the profile's.
func WithControlPlane(c ControlPlane) Option { return func(t *Tenant) { t.control = c } }

// WithObjectStore uses another store than the profile's.
func WithObjectStore(s ObjectStore) Option { return func(t *Tenant) { t.store = s } }

// WithClock uses another clock.
func WithClock(now func() time.Time) Option { return func(t *Tenant) { t.now = now } }

// Open prepares everything the profile names. Parts the profile leaves out
// are missing only for the verbs that need them.
func Open(p *Profile, report Reporter, options ...Option) (*Tenant, error) {
	state, err := openState(p.StateDir)
	if err != nil {
		return nil, err
	}
	t := &Tenant{profile: p, state: state, report: report, now: time.Now, answerWithin: 30 * time.Second}
	for _, o := range options {
		o(t)
	}
	if t.roots, err = readRoots(p.Verify.AllowEmulatedRoots); err != nil {
		return nil, err
	}
	return t, errors.Join(t.openBroker(), t.openRegistry(), t.openStore(), t.openControl())
}

func (t *Tenant) openBroker() error {
	p := t.profile.Broker
	if p.URL == "" {
		return nil
	}
	if err := need(map[string]string{"broker.ca_file": p.CAFile, "broker.admin_token_file": p.AdminTokenFile}); err != nil {
		return err
	}
	var err error
	if t.brokerCA, err = readSmall(p.CAFile); err != nil {
		return err
	}
	token, err := readSecret(p.AdminTokenFile)
	if err != nil {
		return err
	}
	url := p.AdminURL
	if url == "" {
		url = p.URL
	}
	t.broker, err = brokeradmin.NewClient(url, t.brokerCA, token)
	return err
}

func (t *Tenant) openRegistry() error {
	if t.profile.Registry.URL == "" {
		return nil
	}
	r, err := newRegistry(&t.profile.Registry)
	if err != nil {
		return err
	}
	t.registry = r
	t.imageCA, err = os.ReadFile(t.profile.Registry.CAFile)
	return err
}

func (t *Tenant) openStore() error {
	if t.profile.Store.Endpoint == "" || t.store != nil {
		return nil
	}
	var err error
	t.store, err = newS3(&t.profile.Store)
	return err
}

func (t *Tenant) openControl() error {
	if t.profile.ControlPlane.URL == "" || t.control != nil {
		return nil
	}
	var err error
	t.control, err = newControlClient(&t.profile.ControlPlane)
	return err
}

func (t *Tenant) needStore() error {
	if t.store == nil || t.profile.Store.Bucket == "" {
		return Usage("the profile lacks [store]")
	}
	return nil
}

func (t *Tenant) needControl() error {
	if t.control == nil {
		return Usage("the profile lacks [control_plane]")
	}
	return nil
}

func (t *Tenant) needBroker() error {
	if t.broker == nil {
		return Usage("the profile lacks [broker]")
	}
	return nil
}

// wait pauses before the next question; it fails when ctx ends.
func wait(ctx context.Context) error {
	timer := time.NewTimer(pollInterval)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
