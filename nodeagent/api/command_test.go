package api

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/confidential-node/agent/firmware/contract"
)

const guestID = "0b9c1a5e-7d33-4f53-8f0e-2f6f3c1f9a10"

func issuer(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func public(key ed25519.PrivateKey) []ed25519.PublicKey {
	return []ed25519.PublicKey{ed25519.PublicKey(key[32:])}
}

func sum(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

func launch() *LaunchGuest {
	return &LaunchGuest{
		GuestId: guestID, Generation: 1, Manifest: []byte(`{}`), LaunchDigest: bytes.Repeat([]byte{7}, 48),
		Image:   &BootImage{FirmwareSha256: sum(1), KernelSha256: sum(2), InitrdSha256: sum(3), Cmdline: "quiet"},
		Machine: &Machine{Vcpus: 2, MemoryMib: 512, CpuModel: "EPYC-v4", GuestFeatures: 1, Policy: 0x30000},
		Inputs:  []*InputBlob{{Sha256: sum(4), Size: 9, Url: "https://store.example/in?sig=1"}},
		Results: &ResultTarget{Uploads: []*ResultUpload{
			{Name: "out", PutUrl: "https://store.example/out?sig=2"},
			{Name: contract.ResultsManifestName, PutUrl: "https://store.example/m?sig=3"},
		}},
		Ports: []*PublishedPort{{GuestPort: 8000}, {GuestPort: 8001}},
		Hosts: map[string]string{"broker.example": "198.51.100.1"},
	}
}

// inParts is the grant of the last parts of the largest object.
func inParts() *ResultUpload {
	return &ResultUpload{Name: "out", Parts: &UploadGrant{
		UploadId: "u-1", PartSize: MaxPartBytes, FirstPart: MaxParts - 1, Urls: []string{"https://store.example/out?partNumber=9999", "https://store.example/out?partNumber=10000"},
	}}
}

func command(verb isCommand_Verb) *Command {
	from := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	return &Command{
		CommandId: "019aaf00-0000-7000-8000-000000000001", Audience: "node-a", IssuerEpoch: 3, Sequence: 5,
		NotBefore: timestamppb.New(from), ExpiresAt: timestamppb.New(from.Add(time.Hour)), Verb: verb,
	}
}

func verbs() map[string]isCommand_Verb {
	return map[string]isCommand_Verb{
		"launch":   &Command_LaunchGuest{LaunchGuest: launch()},
		"stop":     &Command_StopGuest{StopGuest: &StopGuest{GuestId: guestID, Generation: 1, Grace: durationpb.New(time.Minute)}},
		"evidence": &Command_RequestEvidence{RequestEvidence: &RequestEvidence{GuestId: guestID, Nonce: sum(9)}},
		"cordon":   &Command_Cordon{Cordon: &Cordon{Reason: "disk"}},
		"uncordon": &Command_Uncordon{Uncordon: &Uncordon{}},
		"grant":    &Command_GrantUpload{GrantUpload: &GrantUpload{GuestId: guestID, Generation: 1, Upload: inParts()}},
		"settle":   &Command_SettleUpload{SettleUpload: &SettleUpload{GuestId: guestID, Generation: 1, Name: "out", UploadId: "u-1"}},
		"epoch":    &Command_BeginEpoch{BeginEpoch: &BeginEpoch{Epoch: 3, StoreId: bytes.Repeat([]byte{1}, 16)}},
	}
}

func codeOf(err error) string {
	if r, ok := errors.AsType[*contract.Refusal](err); ok {
		return r.Code
	}
	return fmt.Sprint("untyped: ", err)
}

func TestEveryVerbSurvivesSealAndOpen(t *testing.T) {
	t.Parallel()
	for name, verb := range verbs() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := command(verb)
			raw, err := SealCommand(want, issuer(1))
			if err != nil {
				t.Fatal(err)
			}
			got, err := OpenCommand(raw, public(issuer(1)))
			if err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(got, want) {
				t.Fatalf("got %v, want %v", got, want)
			}
		})
	}
}

func TestEnvelopesOfNoIssuerAreRefused(t *testing.T) {
	t.Parallel()
	key := issuer(1)
	good, err := SealCommand(command(verbs()["cordon"]), key)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := proto.Marshal(command(verbs()["cordon"]))
	if err != nil {
		t.Fatal(err)
	}
	otherType, err := contract.SealEnvelope("application/vnd.nodeagent.results.v1+json", payload, key)
	if err != nil {
		t.Fatal(err)
	}
	otherPayload := strings.Replace(string(good), base64.StdEncoding.EncodeToString(payload),
		base64.StdEncoding.EncodeToString(append([]byte{8, 1}, payload...)), 1)
	forged, err := SealCommand(command(verbs()["cordon"]), issuer(2))
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		raw  []byte
		code string
	}{
		"nothing":          {nil, CodeMalformed},
		"not json":         {[]byte("hello"), CodeMalformed},
		"trailing bytes":   {append(bytes.Clone(good), '{'), CodeMalformed},
		"another type":     {otherType, CodeMalformed},
		"another key":      {forged, CodeForged},
		"changed payload":  {[]byte(otherPayload), CodeForged},
		"one byte too big": {append(bytes.Clone(good), bytes.Repeat([]byte{' '}, MaxCommandBytes-len(good)+1)...), CodeOversize},
	} {
		if _, err := OpenCommand(tc.raw, public(key)); codeOf(err) != tc.code {
			t.Errorf("%s: got %v, want %s", name, err, tc.code)
		}
	}
	padded := append(bytes.Clone(good), bytes.Repeat([]byte{' '}, MaxCommandBytes-len(good))...)
	if _, err := OpenCommand(padded, public(key)); err != nil {
		t.Errorf("an envelope of exactly the limit: %v", err)
	}
	if _, err := OpenCommand(good, nil); codeOf(err) != CodeForged {
		t.Errorf("no keys configured: %v", err)
	}
}

func TestPayloadsThatSayMoreThanIsUnderstoodAreRefused(t *testing.T) {
	t.Parallel()
	key := issuer(1)
	unknown := protowire.AppendVarint(protowire.AppendTag(nil, 900, protowire.VarintType), 1)
	cordon, err := proto.Marshal(command(verbs()["cordon"]))
	if err != nil {
		t.Fatal(err)
	}
	stop := protowire.AppendBytes(protowire.AppendTag(nil, 17, protowire.BytesType), nil)
	nested := func(edit func(*Command)) []byte {
		cmd := command(&Command_LaunchGuest{LaunchGuest: launch()})
		edit(cmd)
		raw, err := proto.Marshal(cmd)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	for name, tc := range map[string]struct {
		payload []byte
		code    string
	}{
		"not protobuf":         {[]byte{0xff, 0xff}, CodeMalformed},
		"two verbs":            {append(bytes.Clone(cordon), stop...), CodeMalformed},
		"field given twice":    {append(bytes.Clone(cordon), protowire.AppendVarint(protowire.AppendTag(nil, 4, protowire.VarintType), 9)...), CodeMalformed},
		"unknown at the top":   {append(bytes.Clone(cordon), unknown...), CodeUnknownField},
		"unknown in the verb":  {nested(func(c *Command) { c.GetLaunchGuest().ProtoReflect().SetUnknown(unknown) }), CodeUnknownField},
		"unknown in a list":    {nested(func(c *Command) { c.GetLaunchGuest().GetInputs()[0].ProtoReflect().SetUnknown(unknown) }), CodeUnknownField},
		"unknown in timestamp": {nested(func(c *Command) { c.GetNotBefore().ProtoReflect().SetUnknown(unknown) }), CodeUnknownField},
		"unknown of a newer protocol": {nested(func(c *Command) {
			c.MinCapability = CapabilityVersion + 1
			c.ProtoReflect().SetUnknown(unknown)
		}), CodeCapabilityTooLow},
	} {
		raw, err := contract.SealEnvelope(CommandPayloadType, tc.payload, key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenCommand(raw, public(key)); codeOf(err) != tc.code {
			t.Errorf("%s: got %v, want %s", name, err, tc.code)
		}
	}
}

func TestFieldsOutOfRangeAreRefused(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*Command){
		"no id":                 func(c *Command) { c.CommandId = "" },
		"upper-case id":         func(c *Command) { c.CommandId = strings.ToUpper(c.GetCommandId()) },
		"id of version 4":       func(c *Command) { c.CommandId = guestID },
		"no audience":           func(c *Command) { c.Audience = "" },
		"audience with a dot":   func(c *Command) { c.Audience = "a.b" },
		"audience wildcard":     func(c *Command) { c.Audience = "*" },
		"no epoch":              func(c *Command) { c.IssuerEpoch = 0 },
		"no sequence":           func(c *Command) { c.Sequence = 0 },
		"no beginning":          func(c *Command) { c.NotBefore = nil },
		"no end":                func(c *Command) { c.ExpiresAt = nil },
		"impossible end":        func(c *Command) { c.ExpiresAt = &timestamppb.Timestamp{Nanos: -1} },
		"end before beginning":  func(c *Command) { c.ExpiresAt, c.NotBefore = c.GetNotBefore(), c.GetExpiresAt() },
		"empty feature":         func(c *Command) { c.RequiredFeatures = []string{""} },
		"no verb":               func(c *Command) { c.Verb = nil },
		"guest id":              func(c *Command) { c.GetLaunchGuest().GuestId = "../x" },
		"generation":            func(c *Command) { c.GetLaunchGuest().Generation = 0 },
		"manifest":              func(c *Command) { c.GetLaunchGuest().Manifest = nil },
		"big manifest":          func(c *Command) { c.GetLaunchGuest().Manifest = make([]byte, contract.MaxManifestBytes+1) },
		"digest":                func(c *Command) { c.GetLaunchGuest().LaunchDigest = sum(1) },
		"no image":              func(c *Command) { c.GetLaunchGuest().Image = nil },
		"cmdline with NUL":      func(c *Command) { c.GetLaunchGuest().GetImage().Cmdline = "a\x00b" },
		"no machine":            func(c *Command) { c.GetLaunchGuest().Machine = nil },
		"no vcpus":              func(c *Command) { c.GetLaunchGuest().GetMachine().Vcpus = 0 },
		"policy without bit 17": func(c *Command) { c.GetLaunchGuest().GetMachine().Policy = 0x10000 },
		"policy with debug":     func(c *Command) { c.GetLaunchGuest().GetMachine().Policy |= 1 << 19 },
		"policy with migration": func(c *Command) { c.GetLaunchGuest().GetMachine().Policy |= 1 << 18 },
		"input without URL":     func(c *Command) { c.GetLaunchGuest().GetInputs()[0].Url = "" },
		"input without size":    func(c *Command) { c.GetLaunchGuest().GetInputs()[0].Size = 0 },
		"upload twice":          func(c *Command) { c.GetLaunchGuest().GetResults().GetUploads()[1].Name = "out" },
		"upload elsewhere":      func(c *Command) { c.GetLaunchGuest().GetResults().GetUploads()[1].Name = "../out" },
		"negative timeout":      func(c *Command) { c.GetLaunchGuest().StartTimeout = durationpb.New(-time.Second) },
		"port twice":            func(c *Command) { c.GetLaunchGuest().GetPorts()[1].GuestPort = 8000 },
		"name that is none":     func(c *Command) { c.GetLaunchGuest().GetPorts()[1].ServerName = "a_b.example" },
		"name and host port": func(c *Command) {
			c.GetLaunchGuest().GetPorts()[1].ServerName, c.GetLaunchGuest().GetPorts()[1].HostPort = "a.example", 20000
		},
		"name twice": func(c *Command) {
			c.GetLaunchGuest().GetPorts()[0].ServerName, c.GetLaunchGuest().GetPorts()[1].ServerName = "a.example", "a.example"
		},
		"port out of range":    func(c *Command) { c.GetLaunchGuest().GetPorts()[1].HostPort = 65536 },
		"hosts file injection": func(c *Command) { c.GetLaunchGuest().Hosts = map[string]string{"a\n198.51.100.9 b": "198.51.100.1"} },
		"hosts with IPv6":      func(c *Command) { c.GetLaunchGuest().Hosts = map[string]string{"a": "2001:db8::1"} },
		"ID block alone":       func(c *Command) { c.GetLaunchGuest().IdBlock = make([]byte, 96) },
		"stop: generation":     func(c *Command) { c.Verb = &Command_StopGuest{StopGuest: &StopGuest{GuestId: guestID}} },
		"stop: grace": func(c *Command) {
			c.Verb = &Command_StopGuest{StopGuest: &StopGuest{GuestId: guestID, Generation: 1, Grace: durationpb.New(-1)}}
		},
		"evidence: short nonce": func(c *Command) {
			c.Verb = &Command_RequestEvidence{RequestEvidence: &RequestEvidence{GuestId: guestID, Nonce: make([]byte, 15)}}
		},
		"cordon: reason": func(c *Command) {
			c.Verb = &Command_Cordon{Cordon: &Cordon{Reason: strings.Repeat("x", 257)}}
		},
		"epoch: another": func(c *Command) {
			c.Verb = &Command_BeginEpoch{BeginEpoch: &BeginEpoch{Epoch: 4, StoreId: make([]byte, 16)}}
		},
		"epoch: store id": func(c *Command) { c.Verb = &Command_BeginEpoch{BeginEpoch: &BeginEpoch{Epoch: 3}} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := command(&Command_LaunchGuest{LaunchGuest: launch()})
			if err := cmd.Check(); err != nil {
				t.Fatalf("before the edit: %v", err)
			}
			edit(cmd)
			if _, err := SealCommand(cmd, issuer(1)); err == nil {
				t.Error("an issuer could seal it")
			}
			raw, err := SealUnchecked(cmd, issuer(1))
			if err != nil {
				t.Fatal(err)
			}
			_, err = OpenCommand(raw, public(issuer(1)))
			if codeOf(err) != CodeMalformed {
				t.Fatalf("got %v, want %s", err, CodeMalformed)
			}
			if r := contract.AsRefusal(err); r.Remedy == "" || strings.Contains(r.Message, "sig=") {
				t.Errorf("refusal without remedy, or with a credential: %+v", r)
			}
		})
	}
}

func TestFeaturesLeaveOutWhatTheNodeCannotDo(t *testing.T) {
	t.Parallel()
	for _, f := range Features() {
		if strings.HasPrefix(f, "compliance.") {
			t.Errorf("feature %q is claimed", f)
		}
	}
}

func FuzzOpenCommand(f *testing.F) {
	key := issuer(1)
	for _, verb := range verbs() {
		raw, err := SealCommand(command(verb), key)
		if err != nil {
			f.Fatal(err)
		}
		payload, err := proto.Marshal(command(verb))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, payload)
	}
	f.Add([]byte(`{"payloadType":"`+CommandPayloadType+`","payload":"","signatures":[{"keyid":"","sig":""}]}`), []byte{0xff})
	f.Fuzz(func(t *testing.T, raw, payload []byte) {
		if _, err := OpenCommand(raw, public(key)); err != nil && codeOf(err) != contract.AsRefusal(err).Code {
			t.Fatalf("untyped error: %v", err)
		}
		// Behind a valid signature anything may stand.
		sealed, err := contract.SealEnvelope(CommandPayloadType, payload, key)
		if err != nil {
			t.Fatal(err)
		}
		cmd, err := OpenCommand(sealed, public(key))
		if err != nil {
			if strings.HasPrefix(codeOf(err), "untyped") {
				t.Fatal(err)
			}
			return
		}
		if again, err := SealCommand(cmd, key); err != nil {
			t.Fatalf("what was opened cannot be sealed: %v", err)
		} else if _, err := OpenCommand(again, public(key)); err != nil {
			t.Fatalf("what was opened cannot be opened again: %v", err)
		}
	})
}

func TestGrantsThatContradictThemselvesAreRefused(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*ResultUpload){
		"both":             func(u *ResultUpload) { u.PutUrl = "https://store.example/out" },
		"neither":          func(u *ResultUpload) { u.Parts = nil },
		"name":             func(u *ResultUpload) { u.Name = "../out" },
		"no upload":        func(u *ResultUpload) { u.Parts.UploadId = "" },
		"long upload id":   func(u *ResultUpload) { u.Parts.UploadId = strings.Repeat("u", maxUploadID+1) },
		"upload id's form": func(u *ResultUpload) { u.Parts.UploadId = "u\n1" },
		"small parts":      func(u *ResultUpload) { u.Parts.PartSize = MinPartBytes - 1 },
		"large parts":      func(u *ResultUpload) { u.Parts.PartSize = MaxPartBytes + 1 },
		"part 0":           func(u *ResultUpload) { u.Parts.FirstPart = 0 },
		"part 10,001":      func(u *ResultUpload) { u.Parts.FirstPart = MaxParts },
		"huge part":        func(u *ResultUpload) { u.Parts.FirstPart = math.MaxUint32 },
		"no URLs":          func(u *ResultUpload) { u.Parts.Urls = nil },
		"too many URLs":    func(u *ResultUpload) { u.Parts.FirstPart, u.Parts.Urls = 1, make([]string, MaxGrantURLs+1) },
		"empty URL":        func(u *ResultUpload) { u.Parts.Urls[1] = "" },
		"long URL":         func(u *ResultUpload) { u.Parts.Urls[0] = strings.Repeat("u", maxURL+1) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			upload := inParts()
			edit(upload)
			cmd := command(&Command_GrantUpload{GrantUpload: &GrantUpload{GuestId: guestID, Generation: 1, Upload: upload}})
			if err := cmd.Check(); codeOf(err) != CodeMalformed {
				t.Errorf("a grant: %v", err)
			}
			upload = inParts()
			upload.Parts.FirstPart = 1
			l := launch()
			l.Results.Uploads[0] = upload
			cmd = command(&Command_LaunchGuest{LaunchGuest: l})
			if err := cmd.Check(); err != nil {
				t.Fatalf("before the edit: %v", err)
			}
			edit(upload)
			if err := cmd.Check(); codeOf(err) != CodeMalformed {
				t.Errorf("a launch: %v", err)
			}
		})
	}
	if err := command(&Command_GrantUpload{GrantUpload: &GrantUpload{GuestId: guestID, Generation: 1}}).Check(); codeOf(err) != CodeMalformed {
		t.Errorf("no upload at all: %v", err)
	}
	l := launch()
	l.Results.Uploads[0] = inParts()
	if err := command(&Command_LaunchGuest{LaunchGuest: l}).Check(); codeOf(err) != CodeMalformed {
		t.Errorf("a launch that begins with a later part: %v", err)
	}
	for _, s := range []*SettleUpload{
		{GuestId: guestID, Generation: 1, Name: "out"}, {GuestId: guestID, Generation: 1, Name: "a/b", UploadId: "u"}, {GuestId: guestID, Name: "out", UploadId: "u"},
	} {
		if err := command(&Command_SettleUpload{SettleUpload: s}).Check(); codeOf(err) != CodeMalformed {
			t.Errorf("%v: %v", s, err)
		}
	}
}
