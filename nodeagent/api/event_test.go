package api

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/confidential-node/agent/firmware/contract"
)

func events() []*Event {
	at := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	return []*Event{
		NewRefused("node-a", "", at, contract.Refuse("command.forged", "sign it", "no"), sum(1)),
		NewGuestState("node-a", "c", at, &GuestState{GuestId: guestID}),
		NewEvidence("node-a", "c", at, guestID, []byte("{}")),
		NewResultUploaded("node-a", "", at, &ResultUploaded{GuestId: guestID, Name: "out"}),
		NewEvent("node-a", "", at, &Event_Capability{Capability: &Capability{Protocol: 1}}),
		NewEvent("node-a", "", at, &Event_Heartbeat{Heartbeat: &Heartbeat{}}),
		NewDone("node-a", "c", at),
		NewResultGivenUp("node-a", "", at, &ResultGivenUp{GuestId: guestID, Name: "out"}),
		NewGrantWanted("node-a", "", at, &UploadGrantWanted{GuestId: guestID, Name: "out", FirstPart: 9}),
		NewUploadReady("node-a", "", at, &UploadReady{GuestId: guestID, Name: "out", Etags: []string{"a", "b"}}),
	}
}

func TestEveryEventHasAKindAndSurvivesTheWire(t *testing.T) {
	t.Parallel()
	kinds := []string{
		KindCommandRefused, KindGuestState, KindEvidence, KindResultUploaded, KindCapability, KindHeartbeat, KindCommandDone,
		KindResultGivenUp, KindGrantWanted, KindUploadReady,
	}
	ids := map[string]bool{}
	for i, e := range events() {
		if got := EventKind(e); got != kinds[i] {
			t.Errorf("kind %q, want %q", got, kinds[i])
		}
		if got := EventSubject("node-a", EventKind(e)); got != "evt.node-a."+kinds[i] {
			t.Errorf("subject %q", got)
		}
		raw, err := MarshalEvent(e)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseEvent(raw)
		if err != nil || !proto.Equal(got, e) {
			t.Errorf("got %v, %v, want %v", got, err, e)
		}
		ids[e.GetEventId()] = true
	}
	if len(ids) != len(kinds) {
		t.Error("event ids repeat")
	}
	// The list above is complete: every body has a constant.
	body := (&Event{}).ProtoReflect().Descriptor().Oneofs().ByName("body")
	if body.Fields().Len() != len(kinds) {
		t.Errorf("%d bodies, %d kinds", body.Fields().Len(), len(kinds))
	}
}

// The longest list of parts fits: a node that could not tell it would never be
// done.
func TestTheLongestListOfPartsIsOneEvent(t *testing.T) {
	t.Parallel()
	r := &UploadReady{GuestId: guestID, Name: strings.Repeat("n", 255), Sha256: sum(1), UploadId: strings.Repeat("u", maxUploadID)}
	for range MaxParts {
		r.Etags = append(r.Etags, strings.Repeat("e", MaxETagBytes))
	}
	if _, err := MarshalEvent(NewUploadReady("node-a", "c", time.Now(), r)); err != nil {
		t.Error(err)
	}
}

func TestEventsOfANewerNodeAreReadAsFarAsKnown(t *testing.T) {
	t.Parallel()
	raw, err := MarshalEvent(events()[1])
	if err != nil {
		t.Fatal(err)
	}
	raw = protowire.AppendVarint(protowire.AppendTag(raw, 900, protowire.VarintType), 1)
	if _, err := ParseEvent(raw); err != nil {
		t.Errorf("an unknown field: %v", err)
	}
	newer := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), []byte(NewID()))
	newer = protowire.AppendBytes(protowire.AppendTag(newer, 2, protowire.BytesType), []byte("node-a"))
	newer = protowire.AppendBytes(protowire.AppendTag(newer, 99, protowire.BytesType), []byte("x"))
	e, err := ParseEvent(newer)
	if err != nil || EventKind(e) != "" {
		t.Errorf("an unknown body: %v %v", e, err)
	}
}

func TestEventsThatCannotBeAnybodysAreRefused(t *testing.T) {
	t.Parallel()
	nameless, err := proto.Marshal(&Event{HostId: "node-a"})
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string][]byte{
		"nothing": nil, "garbage": {0xff}, "no id": nameless, "oversize": make([]byte, MaxEventBytes+1),
	} {
		if _, err := ParseEvent(raw); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	big := NewEvidence("node-a", "", time.Now(), guestID, make([]byte, MaxEventBytes))
	if _, err := MarshalEvent(big); err == nil {
		t.Error("an oversize event was encoded")
	}
}

func TestRefusalsCrossTheWireWithoutTheirCause(t *testing.T) {
	t.Parallel()
	r := contract.Refuse("a.b", "do that", "no").Because(bytes.ErrTooLarge)
	got := RefusalFromWire(RefusalToWire(r))
	if got.Code != "a.b" || got.Message != "no" || got.Remedy != "do that" || got.Cause != nil {
		t.Errorf("got %+v", got)
	}
	if RefusalFromWire(nil) != nil || RefusalToWire(nil) != nil {
		t.Error("no refusal became one")
	}
}

func FuzzParseEvent(f *testing.F) {
	for _, e := range events() {
		raw, err := MarshalEvent(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := ParseEvent(raw)
		if err != nil {
			return
		}
		again, err := MarshalEvent(e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseEvent(again); err != nil {
			t.Fatal(err)
		}
	})
}

// A node of protocol 1 says nothing of SEV-SNP: its report reads as "not
// known", never as "no".
func TestAReportOfProtocolOneReadsAsNotKnown(t *testing.T) {
	t.Parallel()
	raw, err := MarshalEvent(NewEvent("node-a", "", time.Now(), &Event_Capability{Capability: &Capability{Protocol: 1, Tee: "sev-snp", QemuVersion: "10.1.0"}}))
	if err != nil {
		t.Fatal(err)
	}
	e, err := ParseEvent(raw)
	if err != nil {
		t.Fatal(err)
	}
	c := e.GetCapability()
	if c.SevSnp != nil || c.Endorsements != nil || len(c.GetComponents()) > 0 || c.GetEndorsements().GetCertificate() != Conclusion_CONCLUSION_UNSPECIFIED || c.GetQemuVersion() != "10.1.0" {
		t.Errorf("%v", c)
	}
}
