package floor

import (
	"errors"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

func TestVersionsDecideHowGPUsAreAttached(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		v       Versions
		iommufd bool
		code    string
	}{
		{Versions{"6.17.0-5-generic", "12.2.0", "10.1.0"}, true, ""},
		{Versions{"6.17", "12.10.0", "11.0.1"}, true, ""},
		{Versions{"6.17.1", "12.1.9", "10.1.2"}, false, ""},
		{Versions{"6.17.1", "10.5.0", "10.1.2"}, false, ""},
		{Versions{"6.16.9", "12.2.0", "10.1.0"}, false, "vm.version-too-old"},
		{Versions{"6.17.1", "10.4.0", "10.1.0"}, false, "vm.version-too-old"},
		{Versions{"6.17.1", "12.2.0", "10.0.13"}, false, "vm.version-too-old"},
		{Versions{"", "12.2.0", "10.1.0"}, false, "vm.version-unknown"},
		{Versions{"6.17.1", "12.2.0", "x"}, false, "vm.version-unknown"},
	} {
		iommufd, err := Attach(c.v)
		refusal, _ := errors.AsType[*contract.Refusal](err)
		switch {
		case iommufd != c.iommufd, (err != nil) != (c.code != ""):
			t.Errorf("%v: iommufd %v, %v", c.v, iommufd, err)
		case c.code != "" && (refusal == nil || refusal.Code != c.code || refusal.Remedy == ""):
			t.Errorf("%v: %v, want %s with a remedy", c.v, err, c.code)
		}
	}
}

func FuzzAtLeast(f *testing.F) {
	f.Add("6.17.0-5-generic")
	f.Add("99999999999999999999.1")
	f.Fuzz(func(t *testing.T, version string) {
		if meets, known := AtLeast(version, "0.0"); known != meets {
			t.Errorf("%q: known %v, at least 0.0 %v", version, known, meets)
		}
	})
}
