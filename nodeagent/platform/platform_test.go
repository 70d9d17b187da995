package platform

import (
	"bytes"
	"os"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/config"
)

func TestOnlyABuildWithTheTagEmulates(t *testing.T) {
	t.Parallel()
	cfg := config.Default()
	cfg.TEE, cfg.Emulated.PSPSocket = config.TEEEmulated, "/run/psp.sock"
	tee, err := Select(cfg)
	if !EmulatedBuild {
		if err == nil || contract.AsRefusal(err).Code != "platform.emulation-not-built" {
			t.Errorf("not refused: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for range 2 { // a second launch of the same guest replaces the file
		got, err := tee(Launch{Policy: 0x30000, Dir: dir, HashTable: []byte("table"), HashTableGPA: 0x810c00})
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(got.Emulated.HashTable)
		if err != nil || !bytes.Equal(text, []byte("table")) || got.SNP != nil {
			t.Errorf("%+v %q %v", got, text, err)
		}
	}
}

func TestSNPIsTheDefault(t *testing.T) {
	t.Parallel()
	tee, err := Select(config.Default())
	if err != nil {
		t.Fatal(err)
	}
	got, err := tee(Launch{Policy: 0x30000, HostData: [32]byte{7}})
	if err != nil || got.SNP == nil || got.Emulated != nil || got.SNP.HostData[0] != 7 {
		t.Errorf("%+v %v", got, err)
	}
}

func TestAnUnknownTEEIsRefused(t *testing.T) {
	t.Parallel()
	if _, err := Select(config.Config{TEE: "tdx"}); err == nil || contract.AsRefusal(err).Code != "platform.unknown-tee" {
		t.Errorf("not refused: %v", err)
	}
}
