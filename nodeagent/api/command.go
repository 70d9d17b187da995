package api

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/confidential-node/agent/firmware/contract"
)

// CommandPayloadType is the DSSE payload type of a serialised Command.
const CommandPayloadType = "application/vnd.nodeagent.command.v1+protobuf"

// MaxCommandBytes bounds the envelope. The largest command is a launch with
// 64 KiB of manifest, 33 presigned URLs, 4 KiB of ID auth, and as many URLs of
// parts as the rest holds, about 200; base64 adds a third.
const MaxCommandBytes = 256 << 10

// MaxWindow bounds expires_at - not_before. Ids are remembered until expiry,
// so this bounds what a node keeps.
const MaxWindow = 24 * time.Hour

// maxDepth bounds the nesting of a payload; a command has four levels.
const maxDepth = 16

// CommandVerb is the verb of a command: one of the Command_… wrappers.
type CommandVerb = isCommand_Verb

// SealCommand signs a command that obeys Check.
func SealCommand(cmd *Command, key ed25519.PrivateKey) ([]byte, error) {
	if err := cmd.Check(); err != nil {
		return nil, fmt.Errorf("sealing command: %w", err)
	}
	return SealUnchecked(cmd, key)
}

// SealUnchecked signs a command whatever it says. It exists so that tests can
// send what an honest issuer never would.
func SealUnchecked(cmd *Command, key ed25519.PrivateKey) ([]byte, error) {
	payload, err := proto.Marshal(cmd)
	if err != nil {
		return nil, fmt.Errorf("sealing command: %w", err)
	}
	raw, err := contract.SealEnvelope(CommandPayloadType, payload, key)
	if err != nil {
		return nil, fmt.Errorf("sealing command: %w", err)
	}
	return raw, nil
}

// OpenCommand verifies an envelope over its exact bytes, then parses the
// command and checks every rule of node.proto that needs no knowledge of the
// host. Every error is a *contract.Refusal. The audience, the window, the
// epoch and the features are the caller's to judge.
func OpenCommand(raw []byte, keys []ed25519.PublicKey) (*Command, error) {
	cmd, err := VerifyCommand(raw, keys)
	if err != nil {
		return nil, err
	}
	if err := cmd.Check(); err != nil {
		return nil, err
	}
	return cmd, nil
}

// VerifyCommand is the first half of OpenCommand: what it returns was signed
// by an issuer, but need not make sense. It lets a caller name the command it
// refuses.
func VerifyCommand(raw []byte, keys []ed25519.PublicKey) (*Command, error) {
	if len(raw) > MaxCommandBytes {
		return nil, contract.Refuse(CodeOversize, "split the launch or shorten its URLs",
			"the envelope has %d bytes, the limit is %d", len(raw), MaxCommandBytes)
	}
	payload, err := contract.OpenEnvelope(raw, CommandPayloadType, MaxCommandBytes, keys)
	if errors.Is(err, contract.ErrUnsigned) {
		return nil, contract.Refuse(CodeForged,
			"sign with a key listed in the node's control.issuer_keys; if nobody sent this, somebody writes to the node's stream",
			"no signature by an accepted issuer key").Because(err)
	}
	if err != nil {
		return nil, malformed("the envelope is not a DSSE envelope of type %s", CommandPayloadType).Because(err)
	}
	return ParseCommand(payload)
}

// ParseCommand decodes the payload of an envelope that was verified before,
// for instance one read back from the store. It checks no rule.
func ParseCommand(payload []byte) (*Command, error) {
	cmd := &Command{}
	if err := (proto.UnmarshalOptions{RecursionLimit: maxDepth}).Unmarshal(payload, cmd); err != nil {
		return nil, malformed("the payload is not a serialised Command").Because(err)
	}
	// Protobuf lets the last of two verbs win and merges repeated messages
	// silently. What was understood must be all that was signed.
	if size := proto.Size(cmd); size != len(payload) {
		return nil, malformed("the payload has %d bytes, what it says has %d", len(payload), size)
	}
	return cmd, nil
}

func malformed(format string, args ...any) *contract.Refusal {
	return contract.Refuse(CodeMalformed, "correct the issuer; node.proto states the rules at the fields", format, args...)
}

// unknownField returns the path of a message in m that carries fields this
// build does not know, or "".
func unknownField(m protoreflect.Message) string {
	name := string(m.Descriptor().Name())
	if len(m.GetUnknown()) > 0 {
		return name
	}
	var found string
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			if fd.MapValue().Message() == nil {
				return true
			}
			v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
				found = unknownField(v.Message())
				return found == ""
			})
		case fd.Message() == nil:
		case fd.IsList():
			for i := range v.List().Len() {
				if found = unknownField(v.List().Get(i).Message()); found != "" {
					break
				}
			}
		default:
			found = unknownField(v.Message())
		}
		return found == ""
	})
	if found == "" {
		return ""
	}
	return name + "." + found
}
