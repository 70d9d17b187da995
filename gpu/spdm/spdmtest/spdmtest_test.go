package spdmtest_test

import (
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/spdm"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
)

func authority(t *testing.T) (*spdmtest.Authority, []spdm.Fingerprint) {
	t.Helper()
	a, err := spdmtest.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a, []spdm.Fingerprint{spdm.NVIDIARoot(), spdm.FingerprintOf(a.Root)}
}

func TestAnEmulatedGPUSaysWhatItIs(t *testing.T) {
	t.Parallel()
	a, roots := authority(t)
	nonce := [contract.GPUNonceBytes]byte{1, 2, 3}
	for name, c := range map[string]struct {
		config    spdmtest.Config
		arch      string
		feature   *spdm.Feature
		protected bool
		debugged  bool
	}{
		"Hopper":    {spdmtest.Config{PDI: 0x2921ce551e4eeda3}, contract.ArchHopper, nil, false, false},
		"PPCIe":     {spdmtest.Config{PDI: 2, Mode: spdmtest.ProtectedPCIe, Switches: []spdm.PDI{7, 8, 9, 10}}, contract.ArchHopper, new(spdm.ProtectedPCIe), true, false},
		"devtools":  {spdmtest.Config{PDI: 3, Mode: spdmtest.DevTools}, contract.ArchHopper, nil, false, true},
		"Blackwell": {spdmtest.Config{Chip: "GB100", PDI: 4, VBIOS: "97.00.D9.00.35"}, contract.ArchBlackwell, new(spdm.SinglePassthrough), false, false},
		"MPT":       {spdmtest.Config{Chip: "GB110", PDI: 5, Mode: spdmtest.MultiPassthrough}, contract.ArchBlackwell, new(spdm.MultiPassthrough), false, false},
	} {
		g, err := a.NewGPU(c.config)
		if err != nil {
			t.Fatal(err)
		}
		data, err := spdmtest.Evidence(nonce, g)
		if err != nil {
			t.Fatal(err)
		}
		list, err := contract.ParseGPUEvidence(data)
		if err != nil || len(list) != 1 || list[0].Arch != c.arch {
			t.Fatalf("%s: %v %v", name, list, err)
		}
		chain, err := spdm.VerifyChain(list[0].Certificates, roots, time.Now())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		r, err := spdm.Parse(list[0].Report)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := r.Verify(chain); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if chain.PDI != c.config.PDI || chain.Product != g.Chip || chain.Root != roots[1] || r.Nonce != nonce || r.Opaque.Driver != g.Driver || r.Opaque.VBIOS != g.VBIOS {
			t.Errorf("%s: chip %s, PDI %s, %+v", name, chain.Product, chain.PDI, r.Opaque)
		}
		if f := r.Opaque.Feature; (f == nil) != (c.feature == nil) || f != nil && *f != *c.feature || r.Opaque.ProtectedPCIe != c.protected || len(r.Opaque.Switches) != len(c.config.Switches) {
			t.Errorf("%s: mode %+v", name, r.Opaque)
		}
		same := true
		for i, m := range spdmtest.Measurements(g.Chip) {
			same = same && r.Measurements[i] == m
		}
		if same == c.debugged {
			t.Errorf("%s: measures production firmware: %v", name, same)
		}
	}
}

func TestNobodyTakesAnEmulatedGPUForARealOne(t *testing.T) {
	t.Parallel()
	a, _ := authority(t)
	g, err := a.NewGPU(spdmtest.Config{PDI: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := spdm.VerifyChain(g.Certificates, []spdm.Fingerprint{spdm.NVIDIARoot()}, time.Now()); err == nil || !strings.Contains(err.Error(), "EMULATED") {
		t.Error(err)
	}
}
