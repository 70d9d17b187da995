package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Entropy refuses a machine whose keys the host could know, then waits until
// the kernel's generator is seeded. The host chooses every device and when it
// speaks; only the processor's own generator is out of its reach.
func Entropy() error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("reading command line: %w", err)
	}
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return fmt.Errorf("reading processor: %w", err)
	}
	source, err := os.ReadFile("/sys/class/misc/hw_random/rng_current")
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("reading entropy device: %w", err)
	}
	if err := sources(string(cmdline), string(cpu), string(source)); err != nil {
		return err
	}
	for {
		_, err := unix.Getrandom(make([]byte, 1), 0) // waits for the seed
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("waiting for randomness: %w", err)
		}
	}
}

// sources checks where randomness comes from: the command line's rules (the
// last of equal parameters wins, so each may be there once), the processor's
// instruction, and no device.
func sources(cmdline, cpuinfo, device string) error {
	words := strings.Fields(cmdline)
	for _, name := range []string{"random.trust_cpu=on", "random.trust_bootloader=off"} {
		key, _, _ := strings.Cut(name, "=")
		set := slices.DeleteFunc(slices.Clone(words), func(w string) bool { return w != key && !strings.HasPrefix(w, key+"=") })
		if !slices.Equal(set, []string{name}) {
			return fmt.Errorf("the kernel was started with %q, want %s", set, name)
		}
	}
	if slices.Contains(words, "nordrand") {
		return errors.New("the kernel was started with nordrand")
	}
	// The kernel takes the flag away from a processor that fails its test.
	if !slices.ContainsFunc(strings.Split(cpuinfo, "\n"), func(line string) bool {
		name, flags, _ := strings.Cut(line, ":")
		return strings.TrimSpace(name) == "flags" && slices.Contains(strings.Fields(flags), "rdrand")
	}) {
		return errors.New("the processor has no RDRAND, or one that failed the kernel's test")
	}
	if device = strings.TrimSpace(device); device != "" && device != "none" {
		return fmt.Errorf("the entropy device %.40q belongs to the host", device)
	}
	return nil
}
