package e2e_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/tests/trial"
)

// Commands that must not be believed, sent to a real agent over the real link
// by a control plane that would carry out anything.
func TestCommandsNobodyMayBelieveStartNothing(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{})
	h := hosts[0]
	_, stranger, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	launch := func(change func(*api.Command)) *api.Command {
		cmd, err := w.Control.NewCommand(h.ID, &api.Command_LaunchGuest{LaunchGuest: &api.LaunchGuest{
			GuestId: api.NewID(), Generation: 1, Manifest: []byte("{}"), LaunchDigest: make([]byte, 48),
			Image:   &api.BootImage{FirmwareSha256: make([]byte, 32), KernelSha256: make([]byte, 32), InitrdSha256: make([]byte, 32), Cmdline: "x"},
			Machine: &api.Machine{Vcpus: 1, MemoryMib: 512, CpuModel: "EPYC-v4", GuestFeatures: 1, Policy: 0x30000},
			Results: &api.ResultTarget{},
		}})
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(cmd)
		}
		return cmd
	}
	sign := func(cmd *api.Command) []byte {
		raw, err := w.Control.Sign(cmd)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	forged, err := api.SealUnchecked(launch(nil), stranger)
	if err != nil {
		t.Fatal(err)
	}
	cordon, err := w.Control.NewCommand(h.ID, &api.Command_Cordon{Cordon: &api.Cordon{Reason: "once"}})
	if err != nil {
		t.Fatal(err)
	}
	hour := time.Hour
	for _, c := range []struct {
		name, code string
		raw        []byte
	}{
		{"forged", api.CodeForged, forged},
		{"not a command", api.CodeMalformed, []byte("launch, please")},
		{"oversize", api.CodeOversize, bytes.Repeat([]byte("x"), api.MaxCommandBytes+1)},
		{"for another host", api.CodeWrongAudience, sign(launch(func(c *api.Command) { c.Audience = "provider9" }))},
		{"expired", api.CodeExpired, sign(launch(func(c *api.Command) {
			c.NotBefore, c.ExpiresAt = timestamppb.New(time.Now().Add(-2*hour)), timestamppb.New(time.Now().Add(-hour))
		}))},
		{"not yet valid", api.CodeNotYetValid, sign(launch(func(c *api.Command) {
			c.NotBefore, c.ExpiresAt = timestamppb.New(time.Now().Add(hour)), timestamppb.New(time.Now().Add(2*hour))
		}))},
		{"valid for too long", api.CodeWindowTooLong, sign(launch(func(c *api.Command) { c.ExpiresAt = timestamppb.New(time.Now().Add(48 * hour)) }))},
		{"with an unknown feature", api.CodeFeatureUnknown, sign(launch(func(c *api.Command) { c.RequiredFeatures = []string{"quantum.teleport"} }))},
		{"of an unknown epoch", api.CodeEpochUnknown, sign(launch(func(c *api.Command) { c.IssuerEpoch = 99 }))},
		{"from the future's protocol", api.CodeCapabilityTooLow, sign(launch(func(c *api.Command) { c.MinCapability = 1 << 20 }))},
		{"a valid envelope around nonsense", "admit.manifest-malformed", sign(launch(nil))},
	} {
		if err := w.Control.Publish(w.ctx, h.ID, c.raw); err != nil {
			t.Fatal(err)
		}
		r := w.refusal(c.code)
		if r.GetMessage() == "" || r.GetRemedy() == "" {
			t.Errorf("%s: refused without words: %v", c.name, r)
		}
	}
	w.replayed(h, sign(cordon))
	status, err := h.Status(w.ctx)
	if err != nil || len(status.Guests) > 0 {
		t.Errorf("guests %v, %v", status.Guests, err)
	}
	if left, err := h.Leftovers(w.ctx); err != nil || len(left) > 0 {
		t.Errorf("something was started: %v, %v", left, err)
	}
}

// refusal waits for an event that refuses with a code.
func (w *world) refusal(code string) (r *api.Refusal) {
	w.t.Helper()
	err := trial.Await(w.ctx, "a refusal with "+code, func() (bool, error) {
		events, err := w.API.Events(w.ctx, 0, 1000, false)
		for _, e := range events {
			event, decodeErr := e.Decode()
			if decodeErr != nil {
				return false, decodeErr
			}
			if got := event.GetCommandRefused().GetRefusal(); got.GetCode() == code {
				r = got
			}
		}
		return r != nil, err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// replayed sends a command again after its effect was undone by another. A
// known id is acknowledged and forgotten: it is no refusal, and no effect.
func (w *world) replayed(h *trial.Host, cordon []byte) {
	w.t.Helper()
	cordoned := func(want bool) {
		w.t.Helper()
		err := trial.Await(w.ctx, "the cordon", func() (bool, error) {
			s, err := h.Status(w.ctx)
			return s.Cordoned == want, err
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	if err := w.Control.Publish(w.ctx, h.ID, cordon); err != nil {
		w.t.Fatal(err)
	}
	cordoned(true)
	if _, err := w.API.Uncordon(w.ctx, h.ID); err != nil {
		w.t.Fatal(err)
	}
	cordoned(false)
	// The transport takes a second copy for the first unless it differs; a
	// hostile one would not. White space around the envelope does it.
	if err := w.Control.Publish(w.ctx, h.ID, append(cordon, '\n')); err != nil {
		w.t.Fatal(err)
	}
	// Commands are judged in order: once this one is refused, the copy was seen.
	if err := w.Control.Publish(w.ctx, h.ID, []byte(strings.Repeat(" ", 7)+"x")); err != nil {
		w.t.Fatal(err)
	}
	err := trial.Await(w.ctx, "both to be settled", func() (bool, error) {
		n, err := w.Control.Unsettled(w.ctx, h.ID)
		return n == 0, err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	cordoned(false)
}
