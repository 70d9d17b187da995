package lifecycle

import (
	"context"
	"io"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/network"
	"github.com/confidential-node/agent/network/relay"
	"github.com/confidential-node/agent/nodeagent/admit"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/blob"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/config"
	"github.com/confidential-node/agent/nodeagent/headroom"
	"github.com/confidential-node/agent/nodeagent/metadata"
	"github.com/confidential-node/agent/nodeagent/platform"
	"github.com/confidential-node/agent/nodeagent/store"
	"github.com/confidential-node/agent/vm"
)

// Records is the store. A nil error means that it survives a power failure.
type Records interface {
	PutGuest(g store.Guest, events ...*api.Event) error
	Guest(id string) (store.Guest, error)
	Guests() ([]store.Guest, error)
	DeleteGuest(id string) error

	SetCordon(reason string, on bool, events ...*api.Event) error
	Cordon() (reason string, on bool, err error)
}

// Hypervisor starts and finds domains; *libvirt.Driver is one. An error from
// List means that nothing is known; one from Start that is no refusal leaves
// open whether the domain was started.
type Hypervisor interface {
	Start(ctx context.Context, spec vm.Spec) error
	Shutdown(ctx context.Context, guestID string) error
	Destroy(ctx context.Context, guestID string) error
	List(ctx context.Context) ([]vm.Observed, error)
	Subscribe() (events <-chan vm.Event, cancel func())
	// CheckDevices refuses a domain that has other devices of the host than
	// these.
	CheckDevices(ctx context.Context, guestID string, want []vm.PCIDevice) error
}

// GPUs are the host's.
type GPUs interface {
	// Available refuses what cannot be had at the moment, and reserves nothing.
	Available(model string, count int) *contract.Refusal
	// Reserve promises all of them to a guest, or none.
	Reserve(ctx context.Context, guestID, model string, count int) error
	// Attach reads the modes of what is reserved back, before a domain is
	// started with it, and says how a guest of so many vCPUs gets it.
	Attach(ctx context.Context, guestID string, vcpus int) (Passthrough, error)
	// Held are the devices a guest has or is promised.
	Held(guestID string) ([]vm.PCIDevice, error)
	// Return takes back what a guest has; it ends when each device is clean
	// or quarantined. Nothing to take back is no error.
	Return(ctx context.Context, guestID string) error
	// Guests have one, or are promised one; Abandon takes back what one has
	// that is gone, and does not wait.
	Guests() []string
	Abandon(guestID string) error
	// Settle says which guests of an earlier run are still there.
	Settle(keep func(guestID string) bool) error
}

// Passthrough is the devices of a guest, and how they are attached.
type Passthrough struct {
	Devices []vm.PCIDevice
	IOMMUFD bool
	// CPUs are those near the devices, none where that would not help.
	CPUs []int
}

// Network gives guests their taps and rules; *network.Host is one.
type Network interface {
	Adopt(ctx context.Context, guests []network.Guest) error
	Remove(ctx context.Context, guestID string) error
	Observe(ctx context.Context) ([]network.Tap, error)
	Sweep(ctx context.Context, keep map[string]bool) error
	// Listening returns the TCP ports that processes of the host listen on.
	Listening() (map[uint16]bool, error)

	HoldForwarding() error
	ReturnForwarding() error
}

// Relay takes connections to guests that the kernel cannot; *relay.Router is
// one.
type Relay interface {
	Set(ctx context.Context, guestID string, routes []relay.Route) error
	Remove(guestID string)
	Drop(guestID string)
}

// Metadata serves guests; *metadata.Server is one.
type Metadata interface {
	Open(ctx context.Context, s metadata.Session) error
	Close(guestID string) error
	Challenge(ctx context.Context, guestID string, nonce []byte) ([]byte, error)
}

// Blob is one sealed input and where it can be fetched.
type Blob struct {
	SHA256 [32]byte
	Size   int64
	// URL is a credential.
	URL string
}

// Blobs is the cache of ciphertext. What an owner fetched stays until it is
// released.
type Blobs interface {
	// Fetch returns the path of the blob, which QEMU's user can read.
	Fetch(ctx context.Context, b Blob, owner string) (path string, err error)
	Release(owner string) error
	// Owners that hold something.
	Owners() ([]string, error)
}

// Entry is one complete file of a spool.
type Entry struct {
	Name   string
	SHA256 [32]byte
	Size   int64
}

// Spools hold what guests deliver until it is uploaded.
type Spools interface {
	// Open makes a guest's spool for files of these names, each with its most
	// bytes, quota bytes together, or opens the one that is there.
	Open(guestID string, most map[string]int64, quota int64) (Spool, error)
	// Upload puts one complete file of a guest's spool to a presigned URL. A
	// *contract.Refusal is final, any other error may pass.
	Upload(ctx context.Context, guestID string, e Entry, putURL string) error
	// UploadParts puts the parts of one complete file that are not there yet,
	// and returns the ETags of all. A *blob.WantedError wants another grant; the
	// rest is as of Upload.
	UploadParts(ctx context.Context, guestID string, e Entry, g blob.Grant) (etags []string, err error)
	// Remove removes a guest's spool. None is no error.
	Remove(guestID string) error
	// List returns the ids of the guests that have one.
	List() ([]string, error)
}

// Spool is one guest's.
type Spool interface {
	// Receive takes one file whole or not at all. The same name again
	// replaces the file.
	Receive(ctx context.Context, name string, r io.Reader) (Entry, error)
	// Entries are the complete files.
	Entries() ([]Entry, error)
}

// Deps are what a Manager is made of. All are required unless said otherwise.
type Deps struct {
	Records    Records
	Hypervisor Hypervisor
	Network    Network
	Relay      Relay
	Metadata   Metadata
	Blobs      Blobs
	Spools     Spools
	// Images is the host's catalogue at the moment.
	Images func() ([]admit.Image, error)
	// Measure predicts launch digests: Predict.
	Measure func(Boot) (Measured, error)
	// Headroom is what the host has left at the moment: (*headroom.Gauge).Left.
	Headroom func(context.Context) headroom.Left
	// TEE is how guests are started.
	TEE platform.TEE
	// GPURule says which GPUs one guest may have at all: gpu.Rule.
	GPURule func(model string, count int) *contract.Refusal
	// GPUs is nil on a host that manages none.
	GPUs GPUs
	// Endorsements are handed to guests as hints.
	Endorsements func() contract.Endorsements
	Logger       hclog.Logger
	// Clock is the agent's time: (*clock.Clock).Now.
	Clock func() clock.Instant
	// Doubt, unless nil, says why nothing may be launched by that time.
	Doubt func() *contract.Refusal
	// Turned, if set, is called at every turn of the loop that compares guests
	// with domains.
	Turned func()
	// Hook, if set, is called at every boundary between an intent, its effect
	// and its record, and inside every step: (*failpoint.Points).Hit. Tests end
	// the agent there.
	Hook func(point string) error
}

// Config is how a Manager works. The zero value of a duration is its default.
type Config struct {
	HostID string
	// BootID is the kernel's (/proc/sys/kernel/random/boot_id).
	BootID string
	// GuestsDir holds one folder of boot copies per guest.
	GuestsDir string
	Policy    config.Policy
	// Capacity is what guests may use together, the host's reserve taken off.
	Capacity admit.Capacity
	// Network decides addresses, tap names and published ports; TapUser and
	// TapGroup open taps.
	Network           network.Config
	TapUser, TapGroup uint32
	// SharedTLS is the port that guests share by name.
	SharedTLS config.SharedTLS
	// DNS servers and MTU handed to guests as hints.
	DNS []string
	MTU int
	// Emulated says that guests run under the emulated TEE.
	Emulated bool

	// PowerOffGrace is how long a guest may take to power off after its last
	// word. Default 1 minute.
	PowerOffGrace time.Duration
	// CollectTimeout bounds the delivery of results. Default 6 hours.
	CollectTimeout time.Duration
	// UploadWindow bounds the delivery of results by grants in parts, and to a
	// URL that does not say when it expires. Default 24 hours.
	UploadWindow time.Duration
	// Poll is how often domains are listed although no event came. Default
	// 15 seconds.
	Poll time.Duration
	// Retry is the first pause after something that may pass failed; it
	// doubles up to 30 times itself. Default 1 second.
	Retry time.Duration
	// EvidenceTimeout bounds one challenge. Default 1 minute.
	EvidenceTimeout time.Duration
	// Keep is how long the id of a guest that has ended is remembered, at
	// least. Default 30 days.
	Keep time.Duration
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, to time.Duration) {
		if *d == 0 {
			*d = to
		}
	}
	set(&c.PowerOffGrace, time.Minute)
	set(&c.CollectTimeout, 6*time.Hour)
	set(&c.UploadWindow, 24*time.Hour)
	set(&c.Poll, 15*time.Second)
	set(&c.Retry, time.Second)
	set(&c.EvidenceTimeout, time.Minute)
	set(&c.Keep, 30*24*time.Hour)
	return c
}
