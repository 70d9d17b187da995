package api

import (
	"crypto/sha256"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/confidential-node/agent/firmware/contract"
)

// Limits of a command's fields.
const (
	maxHostID       = 64
	maxFeatures     = 64
	maxFeatureName  = 64
	maxReason       = 256
	maxCmdline      = 2048 // COMMAND_LINE_SIZE of x86 Linux
	maxURL          = 8 << 10
	maxHosts        = 64
	maxVCPUs        = 512
	minMemoryMiB    = 256
	launchDigestLen = 48
	storeIDLen      = 16
	idBlockLen      = 96   // AMD 56860, ID_BLOCK
	idAuthLen       = 4096 // AMD 56860, ID_AUTH_INFO page
	maxUploadID     = 1 << 10
)

// What object stores take (S3, "multipart upload limits"), and how many URLs
// of parts one command carries.
const (
	MaxPutBytes  = 5 << 30
	MinPartBytes = 5 << 20
	MaxPartBytes = 5 << 30
	MaxParts     = 10_000
	MaxGrantURLs = 128
	// MaxETagBytes of a part; stores send 34.
	MaxETagBytes = 96
)

// ValidHostID reports whether s can be a host id: 1 to 64 of [a-z0-9-]. It is
// also one token of a subject and the name of a consumer.
func ValidHostID(s string) bool {
	return len(s) <= maxHostID && regexp.MustCompile(`^[a-z0-9-]+$`).MatchString(s)
}

// validUUID reports whether s is a UUID in its canonical lower-case form.
func validUUID(s string, version uuid.Version) bool {
	id, err := uuid.Parse(s)
	return err == nil && id.String() == s && (version == 0 || id.Version() == version)
}

// Check applies every rule of node.proto that concerns the command alone. The
// error is a *contract.Refusal.
func (x *Command) Check() error {
	// First, because a newer issuer says by it why the rest looks odd.
	if x.GetMinCapability() > CapabilityVersion {
		return contract.Refuse(CodeCapabilityTooLow, "upgrade the agent on this host, or send the command to another",
			"the command needs protocol %d, this node speaks %d", x.GetMinCapability(), CapabilityVersion)
	}
	if path := unknownField(x.ProtoReflect()); path != "" {
		return contract.Refuse(CodeUnknownField, "set min_capability, and upgrade the agent on this host or send the command to another",
			"%s has fields this node does not know", path)
	}
	if r := x.checkHeader(); r != nil {
		return r
	}
	if r := x.checkVerb(); r != nil {
		return r
	}
	return nil
}

func (x *Command) checkHeader() *contract.Refusal {
	from, to := x.GetNotBefore(), x.GetExpiresAt()
	switch {
	case !validUUID(x.GetCommandId(), 7):
		return malformed("command_id is not a lower-case UUIDv7")
	case !ValidHostID(x.GetAudience()):
		return malformed("audience is not a host id")
	case x.GetIssuerEpoch() < 1:
		return malformed("issuer_epoch is required")
	case x.GetSequence() < 1:
		return malformed("sequence is required")
	case from == nil || to == nil || from.CheckValid() != nil || to.CheckValid() != nil:
		return malformed("not_before and expires_at are required")
	case !to.AsTime().After(from.AsTime()):
		return malformed("expires_at is not after not_before")
	case len(x.GetRequiredFeatures()) > maxFeatures:
		return malformed("more than %d required features", maxFeatures)
	}
	for _, f := range x.GetRequiredFeatures() {
		if f == "" || len(f) > maxFeatureName {
			return malformed("a required feature's name has not 1 to %d bytes", maxFeatureName)
		}
	}
	return nil
}

func (x *Command) checkVerb() *contract.Refusal {
	switch v := x.GetVerb().(type) {
	case *Command_LaunchGuest:
		return v.LaunchGuest.check()
	case *Command_StopGuest:
		if r := checkGuest(v.StopGuest.GetGuestId(), v.StopGuest.GetGeneration()); r != nil {
			return r
		}
		return checkDuration("grace", v.StopGuest.GetGrace())
	case *Command_RequestEvidence:
		if !validUUID(v.RequestEvidence.GetGuestId(), 0) {
			return malformed("guest_id is not a lower-case UUID")
		}
		if n := len(v.RequestEvidence.GetNonce()); n < contract.MinNonceBytes || n > contract.MaxNonceBytes {
			return malformed("nonce has %d bytes, need %d to %d", n, contract.MinNonceBytes, contract.MaxNonceBytes)
		}
		return nil
	case *Command_Cordon:
		if len(v.Cordon.GetReason()) > maxReason {
			return malformed("reason is longer than %d bytes", maxReason)
		}
		return nil
	case *Command_Uncordon:
		return nil
	case *Command_GrantUpload:
		if r := checkGuest(v.GrantUpload.GetGuestId(), v.GrantUpload.GetGeneration()); r != nil {
			return r
		}
		return v.GrantUpload.GetUpload().check()
	case *Command_SettleUpload:
		return v.SettleUpload.check()
	case *Command_BeginEpoch:
		if v.BeginEpoch.GetEpoch() != x.GetIssuerEpoch() {
			return malformed("epoch is not the command's issuer_epoch")
		}
		if len(v.BeginEpoch.GetStoreId()) != storeIDLen {
			return malformed("store_id is not %d bytes", storeIDLen)
		}
		return nil
	}
	return malformed("there is no verb")
}

func checkGuest(id string, generation uint64) *contract.Refusal {
	if !validUUID(id, 0) {
		return malformed("guest_id is not a lower-case UUID")
	}
	if generation < 1 {
		return malformed("generation is required")
	}
	return nil
}

func checkDuration(field string, d *durationpb.Duration) *contract.Refusal {
	if d != nil && (d.CheckValid() != nil || d.AsDuration() < 0) {
		return malformed("%s is negative or out of range", field)
	}
	return nil
}

func (x *LaunchGuest) check() *contract.Refusal {
	if r := checkGuest(x.GetGuestId(), x.GetGeneration()); r != nil {
		return r
	}
	if n := len(x.GetManifest()); n == 0 || n > contract.MaxManifestBytes {
		return malformed("manifest has %d bytes, need 1 to %d", n, contract.MaxManifestBytes)
	}
	if len(x.GetLaunchDigest()) != launchDigestLen {
		return malformed("launch_digest is not %d bytes", launchDigestLen)
	}
	if block, auth := len(x.GetIdBlock()), len(x.GetIdAuth()); (block != 0 || auth != 0) && (block != idBlockLen || auth != idAuthLen) {
		return malformed("id_block and id_auth must be absent, or %d and %d bytes", idBlockLen, idAuthLen)
	}
	for _, check := range []func() *contract.Refusal{
		x.checkImage, x.checkMachine, x.checkInputs, x.checkResults, x.checkPorts, x.checkHosts,
		func() *contract.Refusal { return checkDuration("start_timeout", x.GetStartTimeout()) },
		func() *contract.Refusal { return checkDuration("run_timeout", x.GetRunTimeout()) },
	} {
		if r := check(); r != nil {
			return r
		}
	}
	return nil
}

func (x *LaunchGuest) checkImage() *contract.Refusal {
	i := x.GetImage()
	for _, sum := range [][]byte{i.GetFirmwareSha256(), i.GetKernelSha256(), i.GetInitrdSha256()} {
		if len(sum) != sha256.Size {
			return malformed("image needs three SHA-256 digests of %d bytes", sha256.Size)
		}
	}
	if len(i.GetCmdline()) > maxCmdline || slices.Contains([]byte(i.GetCmdline()), 0) {
		return malformed("cmdline is longer than %d bytes or contains NUL", maxCmdline)
	}
	return nil
}

func (x *LaunchGuest) checkMachine() *contract.Refusal {
	const mustBeOne, migrationAgent, debug = 1 << 17, 1 << 18, 1 << 19
	m := x.GetMachine()
	switch {
	case m.GetVcpus() < 1 || m.GetVcpus() > maxVCPUs:
		return malformed("vcpus is %d, need 1 to %d", m.GetVcpus(), maxVCPUs)
	case m.GetMemoryMib() < minMemoryMiB:
		return malformed("memory_mib is %d, need at least %d", m.GetMemoryMib(), minMemoryMiB)
	case m.GetCpuModel() == "" || len(m.GetCpuModel()) > 64:
		return malformed("cpu_model is required, up to 64 bytes")
	case m.GetPolicy()&mustBeOne == 0:
		return malformed("policy bit 17 must be one")
	case m.GetPolicy()&(debug|migrationAgent) != 0:
		return malformed("policy allows debugging or a migration agent")
	}
	return nil
}

func (x *LaunchGuest) checkInputs() *contract.Refusal {
	if len(x.GetInputs()) > contract.MaxInputs {
		return malformed("%d inputs, limit is %d", len(x.GetInputs()), contract.MaxInputs)
	}
	for i, in := range x.GetInputs() {
		if len(in.GetSha256()) != sha256.Size || in.GetSize() < 1 || in.GetSize() > contract.MaxInputBytes {
			return malformed("input %d needs a SHA-256 of %d bytes and a size from 1 to %d", i, sha256.Size, int64(contract.MaxInputBytes))
		}
		if n := len(in.GetUrl()); n == 0 || n > maxURL {
			return malformed("the URL of input %d has not 1 to %d bytes", i, maxURL)
		}
	}
	return nil
}

func (x *LaunchGuest) checkResults() *contract.Refusal {
	uploads := x.GetResults().GetUploads()
	if len(uploads) > contract.MaxResults+1 {
		return malformed("%d uploads, limit is %d", len(uploads), contract.MaxResults+1)
	}
	seen := map[string]bool{}
	for _, u := range uploads {
		if seen[u.GetName()] {
			return malformed("upload %q is listed twice", u.GetName())
		}
		seen[u.GetName()] = true
		if r := u.check(); r != nil {
			return r
		}
		if first := u.GetParts().GetFirstPart(); u.GetParts() != nil && first != 1 {
			return malformed("the grant of upload %q begins with part %d", u.GetName(), first)
		}
	}
	return nil
}

func (x *ResultUpload) check() *contract.Refusal {
	switch {
	case !contract.ValidFileName(x.GetName()):
		return malformed("an upload's name is malformed")
	case (x.GetPutUrl() == "") == (x.GetParts() == nil):
		return malformed("upload %q needs either put_url or parts", x.GetName())
	case x.GetParts() != nil:
		return x.GetParts().check(x.GetName())
	case len(x.GetPutUrl()) > maxURL:
		return malformed("the URL of upload %q has more than %d bytes", x.GetName(), maxURL)
	}
	return nil
}

// MaxBytes is the most that one file can have there.
func (x *ResultUpload) MaxBytes() int64 {
	if x.GetParts() == nil {
		return MaxPutBytes
	}
	return int64(x.GetParts().GetPartSize()) * MaxParts
}

func (x *UploadGrant) check(name string) *contract.Refusal {
	first, urls := int(x.GetFirstPart()), x.GetUrls()
	switch {
	case !validUploadID(x.GetUploadId()):
		return malformed("upload_id of upload %q is not 1 to %d printable characters", name, maxUploadID)
	case x.GetPartSize() < MinPartBytes || x.GetPartSize() > MaxPartBytes:
		return malformed("part_size of upload %q is %d, need %d to %d", name, x.GetPartSize(), MinPartBytes, int64(MaxPartBytes))
	case len(urls) == 0 || len(urls) > MaxGrantURLs:
		return malformed("upload %q has %d URLs of parts, need 1 to %d", name, len(urls), MaxGrantURLs)
	case first < 1 || first > MaxParts-len(urls)+1:
		return malformed("the URLs of upload %q from part %d on are not for parts 1 to %d", name, first, MaxParts)
	}
	for _, u := range urls {
		if len(u) == 0 || len(u) > maxURL {
			return malformed("a part's URL of upload %q has not 1 to %d bytes", name, maxURL)
		}
	}
	return nil
}

func (x *SettleUpload) check() *contract.Refusal {
	if r := checkGuest(x.GetGuestId(), x.GetGeneration()); r != nil {
		return r
	}
	if !contract.ValidFileName(x.GetName()) || !validUploadID(x.GetUploadId()) {
		return malformed("name or upload_id is malformed")
	}
	return nil
}

func validUploadID(s string) bool {
	return len(s) >= 1 && len(s) <= maxUploadID && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

func (x *LaunchGuest) checkPorts() *contract.Refusal {
	const maxPort = 1<<16 - 1
	if len(x.GetPorts()) > contract.MaxPorts {
		return malformed("%d ports, limit is %d", len(x.GetPorts()), contract.MaxPorts)
	}
	guest, host, names := map[uint32]bool{}, map[uint32]bool{}, map[string]bool{}
	for _, p := range x.GetPorts() {
		if p.GetGuestPort() < 1 || p.GetGuestPort() > maxPort || p.GetHostPort() > maxPort {
			return malformed("a published port is out of range")
		}
		if name := p.GetServerName(); name != "" && (p.GetHostPort() != 0 || !validHostname(name)) {
			return malformed("a published port has a server name that is none, or a host port beside it")
		}
		if guest[p.GetGuestPort()] || (p.GetHostPort() != 0 && host[p.GetHostPort()]) || names[p.GetServerName()] {
			return malformed("a published port or server name is listed twice")
		}
		guest[p.GetGuestPort()], host[p.GetHostPort()], names[p.GetServerName()] = true, true, p.GetServerName() != ""
	}
	return nil
}

func (x *LaunchGuest) checkHosts() *contract.Refusal {
	if len(x.GetHosts()) > maxHosts {
		return malformed("%d static names, limit is %d", len(x.GetHosts()), maxHosts)
	}
	for name, addr := range x.GetHosts() {
		if !validHostname(name) || !validIPv4(addr) {
			return malformed("a static name is not a host name with an IPv4 address")
		}
	}
	return nil
}

// validHostname follows RFC 1123: labels of letters, digits and dashes. The
// name ends up in a hosts file, so that nothing else may get through.
func validHostname(s string) bool {
	const label = `[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?`
	return len(s) <= 253 && regexp.MustCompile(`^`+label+`(\.`+label+`)*$`).MatchString(s)
}

func validIPv4(s string) bool {
	addr, err := netip.ParseAddr(s)
	return err == nil && addr.Is4()
}
