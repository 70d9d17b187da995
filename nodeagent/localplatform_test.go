package main

import (
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/firmware/snp/host/hosttest"
	"github.com/confidential-node/agent/nodeagent/config"
)

func TestTheFirmwareTellsTheIdentityOfTheMachine(t *testing.T) {
	t.Parallel()
	heldBack := hosttest.Genoa()
	heldBack.Firmware.ReportedTCB = 0x541700000000000a
	provider := hosttest.Genoa()
	provider.Firmware.VLEKLoaded, provider.Firmware.MaskChipID = true, true
	for name, c := range map[string]struct {
		setup        hosttest.Setup
		product, tcb string
		hwid         string
		vlek         bool
	}{
		"Genoa":                         {hosttest.Genoa(), "Genoa", "fmc=0 boot-loader=10 tee=0 snp=27 microcode=86", "a1b2" + strings.Repeat("00", 61) + "01", false},
		"eight bytes of the first chip": {hosttest.Turin(), "Turin", "fmc=1 boot-loader=1 tee=1 snp=4 microcode=81", "0102030405060708", false},
		"the reported TCB counts":       {heldBack, "Genoa", "fmc=0 boot-loader=10 tee=0 snp=23 microcode=84", "a1b2" + strings.Repeat("00", 61) + "01", false},
		"a VLEK needs no chip id":       {provider, "Genoa", "fmc=0 boot-loader=10 tee=0 snp=27 microcode=86", "a1b2" + strings.Repeat("00", 61) + "01", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := hosttest.Boot(t, c.setup)
			id, err := snpPlatform{host.New(m.Root, m)}.Identity(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if id.Product.Name != c.product || id.TCB.String() != c.tcb || hex.EncodeToString(id.HWID) != c.hwid || id.VLEK != c.vlek {
				t.Errorf("%s %s %x VLEK %v", id.Product.Name, id.TCB, id.HWID, id.VLEK)
			}
		})
	}
}

func TestAMachineWithoutAnIdentityIsRefusedByName(t *testing.T) {
	t.Parallel()
	passthrough := hosttest.Genoa()
	passthrough.Cmdline = "iommu=pt"
	masked := hosttest.Genoa()
	masked.Firmware.MaskChipID = true
	long := hosttest.Turin()
	long.ChipIDs[0][63] = 1
	noDevice := hosttest.Genoa()
	noDevice.NoCCP = true
	for name, c := range map[string]struct {
		setup      hosttest.Setup
		code, want string
	}{
		"SNP is off":               {passthrough, "platform.no-snp", "iommu.passthrough"},
		"no way to the firmware":   {noDevice, "platform.no-snp", "firmware.no-device"},
		"nobody can find the VCEK": {masked, "platform.chip-id-masked", "MASK_CHIP_ID"},
		"no chip id of this line":  {long, "platform.bad-identity", "Turin"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := hosttest.Boot(t, c.setup)
			_, err := snpPlatform{host.New(m.Root, m)}.Identity(t.Context())
			refusal, ok := errors.AsType[*contract.Refusal](err)
			if !ok || refusal.Code != c.code || !strings.Contains(refusal.Error(), c.want) || refusal.Remedy == "" {
				t.Errorf("%v", err)
			}
		})
	}
}

// denied is a kernel that lets nobody talk to the firmware.
type denied struct{ *hosttest.Machine }

func (d denied) Ioctl(file *os.File, request uint, arg uintptr) (int, error) {
	if filepath.Base(file.Name()) == "sev" {
		return 0, unix.EPERM
	}
	return d.Machine.Ioctl(file, request, arg)
}

func TestAFirmwareThatMayNotBeAskedIsNoMachineWithoutSNP(t *testing.T) {
	t.Parallel()
	m := hosttest.Boot(t, hosttest.Genoa())
	_, err := snpPlatform{host.New(m.Root, denied{m})}.Identity(t.Context())
	refusal, ok := errors.AsType[*contract.Refusal](err)
	if !ok || refusal.Code != "platform.not-asked" || !strings.Contains(refusal.Remedy, "run this as root") {
		t.Errorf("%v", err)
	}
}

func TestEmulationHasNoPlatformToAsk(t *testing.T) {
	t.Parallel()
	cfg := config.Default()
	if localPlatform(cfg) == nil {
		t.Error("sev-snp has no platform")
	}
	cfg.TEE = config.TEEEmulated
	if localPlatform(cfg) != nil {
		t.Error("emulation asks the machine")
	}
}
