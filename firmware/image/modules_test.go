package image

import "testing"

func TestNamesAreTheKernels(t *testing.T) {
	t.Parallel()
	for file, want := range map[string]string{"kernel/x/sev-guest.ko.xz": "sev_guest", "virtio_net.ko": "virtio_net", "crc32c-intel": "crc32c_intel"} {
		if got := canonicalName(file); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
}

func FuzzDependencies(f *testing.F) {
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = dependencies(data) })
}
