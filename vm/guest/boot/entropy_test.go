package boot

import (
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/image"
)

func TestRandomnessIsTheProcessors(t *testing.T) {
	t.Parallel()
	cmdline, err := image.Cmdline(contract.VariantProduction)
	if err != nil {
		t.Fatal(err)
	}
	const cpu = "processor\t: 0\nflags\t\t: fpu rdrand sse\n"
	for name, c := range map[string]struct {
		cmdline, cpu, device string
		holds                bool
	}{
		"the image's own":       {cmdline + "\n", cpu, "", true},
		"no device chosen":      {cmdline, cpu, "none\n", true},
		"no RDRAND":             {cmdline, "flags\t\t: fpu sse\n", "", false},
		"RDRAND in a name only": {cmdline, "model name\t: rdrand\nflags\t\t: fpu\n", "", false},
		"an entropy device":     {cmdline, cpu, "virtio_rng.0\n", false},
		"switched off":          {cmdline + " nordrand", cpu, "", false},
		"CPU not trusted":       {cmdline + " random.trust_cpu=off", cpu, "", false},
		"host's seed trusted":   {cmdline + " random.trust_bootloader=on", cpu, "", false},
		"without the rules":     {"quiet", cpu, "", false},
	} {
		if err := sources(c.cmdline, c.cpu, c.device); (err == nil) != c.holds {
			t.Errorf("%s: %v", name, err)
		}
	}
}
