package contract_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

// vectors reads the blocks of the document that other verifiers are written
// from: lines of NAME: VALUE.
func vectors(t *testing.T) []map[string]string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var out []map[string]string
	for _, block := range strings.Split(string(text), "```vector\n")[1:] {
		body, _, closed := strings.Cut(block, "```\n")
		if !closed {
			t.Fatal("a vector does not end")
		}
		v := map[string]string{}
		for line := range strings.Lines(body) {
			name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
			if _, twice := v[name]; !ok || twice {
				t.Fatalf("%q is no NAME: VALUE", line)
			}
			v[name] = strings.TrimPrefix(value, " ")
		}
		out = append(out, v)
	}
	return out
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	raw, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestTheDocumentsVectorsAreWhatThisPackageComputes(t *testing.T) {
	t.Parallel()
	seen := map[string]int{}
	for _, v := range vectors(t) {
		seen[v["purpose"]]++
		switch v["purpose"] {
		case "host-data":
			m, err := contract.ParseManifest([]byte(v["manifest"]))
			if err != nil {
				t.Fatal(err)
			}
			canonical, err := m.Encode()
			if err != nil || string(canonical) != v["manifest"] {
				t.Errorf("the manifest encodes as %s (%v)", canonical, err)
			}
			if got := contract.HostData(canonical); hex.EncodeToString(got[:]) != v["host_data"] {
				t.Errorf("HOST_DATA is %x, the document says %s", got, v["host_data"])
			}
		case "evidence":
			got := contract.EvidenceReportData(unhex(t, v["nonce"]), unhex(t, v["tls_spki"]), unhex(t, v["result_key"]), unhex(t, v["gpu_evidence"]))
			if hex.EncodeToString(got[:]) != v["report_data"] {
				t.Errorf("REPORT_DATA is %x, the document says %s", got, v["report_data"])
			}
			if sum := sha512.Sum512(unhex(t, v["hashed"])); sum != got {
				t.Errorf("the document hashes to %x", sum)
			}
		case "broker":
			var additional string
			if err := json.Unmarshal([]byte(v["additional_evidence"]), &additional); err != nil {
				t.Fatal(err)
			}
			got, err := contract.BrokerReportData(additional, v["nonce"], json.RawMessage(v["tee_pubkey"]))
			if err != nil || hex.EncodeToString(got[:]) != v["report_data"] {
				t.Errorf("REPORT_DATA is %x (%v), the document says %s", got, err, v["report_data"])
			}
			if sum := sha512.Sum384([]byte(v["hashed"])); !bytes.Equal(sum[:], got[:len(sum)]) {
				t.Errorf("the document hashes to %x", sum)
			}
		case "gpu-nonce":
			if got := contract.GPUNonce([contract.ReportDataSize]byte(unhex(t, v["report_data"]))); hex.EncodeToString(got[:]) != v["gpu_nonce"] {
				t.Errorf("the GPU nonce is %x, the document says %s", got, v["gpu_nonce"])
			}
			if sum := sha256.Sum256(unhex(t, v["hashed"])); hex.EncodeToString(sum[:]) != v["gpu_nonce"] {
				t.Errorf("the document hashes to %x", sum)
			}
		default:
			t.Errorf("vector for %q", v["purpose"])
		}
	}
	for _, purpose := range []string{"host-data", "evidence", "broker", "gpu-nonce"} {
		if seen[purpose] == 0 {
			t.Errorf("no vector for %s", purpose)
		}
	}
}
