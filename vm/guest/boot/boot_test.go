package boot

import (
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/image"
)

func TestTheInitReadsWhatTheImageBuilderWrites(t *testing.T) {
	t.Parallel()
	for _, want := range []string{contract.VariantProduction, contract.VariantDebug} {
		cmdline, err := image.Cmdline(want)
		if err != nil {
			t.Fatal(err)
		}
		if got := variant(cmdline + "\n"); got != want {
			t.Errorf("%s is read as %q", want, got)
		}
	}
	if got := variant("quiet xnodeagent.variant=debug"); got != "" {
		t.Errorf("a foreign parameter is read as %q", got)
	}
	if paramVariant != image.ParamVariant || modulesFolder != "/"+image.ModulesFolder || modulesList != "/"+image.ModulesList || gpuModules != "/"+image.GPUModulesList || GPUFolder != "/"+image.GPUFolder {
		t.Error("init and builder disagree on the initrd's layout")
	}
}

func TestHintsOfTheHostCannotSmuggleLines(t *testing.T) {
	t.Parallel()
	got := string(hostsFile(map[string]string{
		"b.example": "192.0.2.1", "a.example": "2001:db8::1", "localhost": "192.0.2.9", "x y": "192.0.2.2", "n\nl": "192.0.2.3", "c.example": "1.2.3.4 evil",
	}))
	want := "127.0.0.1 localhost\n::1 localhost\n2001:db8::1 a.example\n192.0.2.1 b.example\n"
	if got != want {
		t.Errorf("%q", got)
	}
	if got := string(resolvFile([]string{"192.0.2.53", "not an address", "192.0.2.54\noptions x"})); got != "nameserver 192.0.2.53\n" {
		t.Errorf("%q", got)
	}
}
