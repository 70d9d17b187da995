package gpu_test

import (
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
)

func TestRuleTable(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		model string
		count int
		code  string // "" is allowed
	}{
		{"H100", 1, ""},
		{"H100", 8, ""},
		{"h100", 1, ""},
		{"NVIDIA H200", 1, ""},
		{"H20", 8, ""},
		{"H100", 4, "gpu.unsupported-count"},
		{"H100", 2, "gpu.unsupported-count"},
		{"H100", 0, "gpu.unsupported-count"},
		{"B200", 2, ""},
		{"B300", 4, ""},
		{"B200", 3, "gpu.unsupported-count"},
		{"RTX PRO 6000", 1, ""},
		{"RTX PRO 6000", 2, "gpu.unsupported-count"},
		{"A100", 1, "gpu.unsupported-model"},
		{"L40S", 1, "gpu.unsupported-model"},
		{"RTX 4090", 1, "gpu.unsupported-model"},
		{"GH200", 1, "gpu.unsupported-model"},
		{"GB200", 4, "gpu.unsupported-model"},
		{"H1000", 1, "gpu.unknown-model"},
		{"", 1, "gpu.unknown-model"},
	} {
		refusal := gpu.Rule(c.model, c.count)
		switch {
		case refusal == nil && c.code != "":
			t.Errorf("%d × %s is allowed", c.count, c.model)
		case refusal != nil && (refusal.Code != c.code || refusal.Remedy == ""):
			t.Errorf("%d × %s: %+v, want %q", c.count, c.model, refusal, c.code)
		}
	}
}

func TestAWholeBoardIsEightOfHopper(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		model string
		count int
		want  bool
	}{{"H100", 8, true}, {"nvidia h20", 8, true}, {"H100", 1, false}, {"B200", 8, false}, {"RTX PRO 6000", 8, false}, {"", 0, false}} {
		if got := gpu.WholeBoard(c.model, c.count); got != c.want {
			t.Errorf("%d × %s: %v", c.count, c.model, got)
		}
	}
}

func TestADemandIsAModelAndACount(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]contract.GPU{
		"H100": {Model: "H100", Count: 1}, "H100:8": {Model: "H100", Count: 8}, "NVIDIA RTX PRO 6000": {Model: "NVIDIA RTX PRO 6000", Count: 1},
	} {
		if got, err := gpu.ParseDemand(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "H100:", "H100:x", "H100:2", "H100:8:8", ":1", "A100", "H100:-1"} {
		if got, err := gpu.ParseDemand(text); err == nil {
			t.Errorf("%q is taken for %+v", text, got)
		}
	}
}

func TestEveryModelForRentHasAChip(t *testing.T) {
	t.Parallel()
	for model, want := range map[string]string{"H100": "GH100", "nvidia h20": "GH100", "B200": "GB100", "B300": "GB110", "RTX PRO 6000 Server Edition": "GB202", "A100": "", "": ""} {
		if got, _ := gpu.Chip(model); got != want {
			t.Errorf("%s: %q, want %q", model, got, want)
		}
	}
}
