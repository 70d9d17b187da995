package contract_test

import (
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

func gpus(n int) []contract.GPUEvidence {
	var out []contract.GPUEvidence
	for range n {
		out = append(out, contract.GPUEvidence{Arch: contract.ArchHopper, Nonce: strings.Repeat("ab", 32), Report: []byte("report"), Certificates: []byte("chain")})
	}
	return out
}

func TestGPUEvidenceIsReadBackOrRefused(t *testing.T) {
	t.Parallel()
	data, err := contract.EncodeGPUEvidence(gpus(8))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := contract.ParseGPUEvidence(data); err != nil || len(got) != 8 || string(got[7].Report) != "report" {
		t.Fatalf("%v %v", got, err)
	}
	one := string(data[:strings.Index(string(data), "}")+1]) + "]"
	for name, text := range map[string]string{
		"no GPU":         "[]",
		"null":           "null",
		"an object":      one[1 : len(one)-1],
		"short nonce":    strings.Replace(one, "abab", "", 1),
		"no hex":         strings.Replace(one, "abab", "xyzw", 1),
		"unknown field":  strings.Replace(one, `{"arch"`, `{"more":1,"arch"`, 1),
		"field twice":    strings.Replace(one, `{"arch"`, `{"arch":"HOPPER","arch"`, 1),
		"no report":      strings.Replace(one, "cmVwb3J0", "", 1),
		"no chain":       strings.Replace(one, "Y2hhaW4=", "", 1),
		"no arch":        strings.Replace(one, "HOPPER", "", 1),
		"other arch":     strings.Replace(one, "HOPPER", "AMPERE", 1),
		"data behind it": one + "[]",
		"too long":       "[" + strings.Repeat(" ", contract.MaxGPUEvidenceBytes) + one[1:],
	} {
		if text == one {
			t.Fatalf("%s changes nothing", name)
		}
		if _, err := contract.ParseGPUEvidence([]byte(text)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := contract.EncodeGPUEvidence(gpus(9)); err == nil {
		t.Error("nine GPUs were encoded")
	}
}

func FuzzParseGPUEvidence(f *testing.F) {
	data, err := contract.EncodeGPUEvidence(gpus(2))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		g, err := contract.ParseGPUEvidence(data)
		if err != nil {
			return
		}
		if _, err := contract.EncodeGPUEvidence(g); err != nil {
			t.Errorf("read, and not written again: %v", err)
		}
	})
}
