package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/confidential-node/agent/gpu/nvidia"
	"github.com/confidential-node/agent/nodeagent/admin"
	"github.com/confidential-node/agent/nodeagent/output"
)

func TestTheDriversFactsAreShownWithTheGPU(t *testing.T) {
	t.Parallel()
	ecc, temperature := true, uint32(31)
	g := &nvidia.GPU{
		Address: gpuAddress, Name: "NVIDIA H100", UUID: "GPU-1", VBIOS: "96.00.5E.00.01", ECC: &ecc, TemperatureC: &temperature,
		Rows: &nvidia.RemappedRows{Correctable: 1, Uncorrectable: 2, Pending: true, Failed: true}, Xids: []uint64{79},
	}
	want := "NVIDIA H100, GPU-1, VBIOS 96.00.5E.00.01, ECC on, 31 °C, 3 remapped rows (2 uncorrectable), more at the next reset, no spare row left: have it replaced, Xid [79]"
	if got := driverText(g); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := driverText(&nvidia.GPU{Address: gpuAddress}); got != "" {
		t.Errorf("nothing is told, and yet %q", got)
	}
	doc := gpuShown{output.NewHeader("GPU"), true, admin.GPU{Address: gpuAddress, State: "unmanaged", Mode: "unknown"}, g}
	var text bytes.Buffer
	if err := printGPU(&text, doc); err != nil || !strings.Contains(text.String(), want) {
		t.Errorf("%v:\n%s", err, text.String())
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	matchesSchema(t, string(raw))
}
