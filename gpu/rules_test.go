package gpu_test

import (
	"testing"

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
