package psp

import (
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/confidential-node/agent/firmware/measure"
	"github.com/confidential-node/agent/firmware/ovmf"
)

// Limits of what is read from another process.
const (
	maxCmdline    = 1 << 20
	launchItem    = "opt/org.confidential-node/emulated-launch"
	guestFeatures = 0x1 // SEV_FEATURES: SNP alone, as QEMU asks for
)

// launch is what QEMU was really given.
type launch struct {
	pid      int
	digest   [measure.Size]byte
	policy   uint64
	hostData [32]byte
}

// arguments of a QEMU command line that a real PSP would see in some form.
type arguments struct {
	firmware, table, cpu, launch string
	tableGPA                     uint64
	vcpus                        int
	kernel                       bool
}

// measureProcess measures the QEMU with this pid from its command line and
// the files as that process sees them.
func measureProcess(root string, pid int) (*launch, error) {
	proc := filepath.Join(root, "proc", strconv.Itoa(pid))
	raw, err := readLimited(filepath.Join(proc, "cmdline"), maxCmdline)
	if err != nil {
		return nil, fmt.Errorf("reading command line of %d: %w", pid, err)
	}
	args, err := parseArguments(strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00"))
	if err != nil {
		return nil, fmt.Errorf("reading command line of %d: %w", pid, err)
	}
	l := &launch{pid: pid}
	if err := l.parseItem(args.launch); err != nil {
		return nil, err
	}
	firmware, err := readLimited(filepath.Join(proc, "root", args.firmware), ovmf.MaxSize)
	if err != nil {
		return nil, err
	}
	signature, err := measure.CPUSignature(args.cpu)
	if err != nil {
		return nil, err
	}
	var table *[ovmf.HashTableSize]byte
	if args.kernel {
		raw, err := readLimited(filepath.Join(proc, "root", args.table), ovmf.HashTableSize)
		if err != nil {
			return nil, err
		}
		parsed, err := ovmf.Parse(firmware)
		if err != nil {
			return nil, err
		}
		if len(raw) != ovmf.HashTableSize || parsed.HashTable == nil || uint64(parsed.HashTable.Base) != args.tableGPA {
			return nil, fmt.Errorf("hash table of %d bytes at %#x is not where the firmware wants it", len(raw), args.tableGPA)
		}
		table = (*[ovmf.HashTableSize]byte)(raw)
	}
	l.digest, err = measure.DigestWithTable(firmware, table, args.vcpus, signature, guestFeatures)
	return l, err
}

// readLimited reads a whole file of another process.
func readLimited(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // only read from
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return data, err
}

// parseItem reads "policy=0x30000;host-data=HEX".
func (l *launch) parseItem(text string) error {
	policy, hostData, ok := strings.Cut(text, ";")
	policy, okPolicy := strings.CutPrefix(policy, "policy=")
	hostData, okData := strings.CutPrefix(hostData, "host-data=")
	value, err := strconv.ParseUint(policy, 0, 64)
	raw, hexErr := hex.DecodeString(hostData)
	if !ok || !okPolicy || !okData || err != nil || hexErr != nil || len(raw) != len(l.hostData) {
		return fmt.Errorf("launch item %q is not policy=N;host-data=HEX", text)
	}
	l.policy, l.hostData = value, [32]byte(raw)
	return nil
}

func parseArguments(argv []string) (arguments, error) {
	var a arguments
	for i := 0; i+1 < len(argv); i++ {
		value := argv[i+1]
		first, rest, _ := strings.Cut(value, ",")
		options := parseOptions(rest)
		switch argv[i] {
		case "-bios":
			a.firmware = value
		case "-kernel":
			a.kernel = true
		case "-cpu":
			a.cpu = first
		case "-smp":
			n, err := strconv.Atoi(first)
			if err != nil {
				return a, fmt.Errorf("-smp %q", value)
			}
			a.vcpus = n
		case "-fw_cfg":
			if item := parseOptions(value); item["name"] == launchItem {
				a.launch = item["string"]
			}
		case "-device":
			if first != "loader" {
				continue
			}
			gpa, err := strconv.ParseUint(options["addr"], 0, 64)
			if err != nil || a.table != "" {
				return a, fmt.Errorf("-device %q: one loader with an address is understood", value)
			}
			a.table, a.tableGPA = options["file"], gpa
		}
	}
	if a.firmware == "" || a.cpu == "" || a.vcpus == 0 || a.launch == "" {
		return a, fmt.Errorf("not the command line of an emulated guest: %+v", a)
	}
	return a, nil
}

// parseOptions reads key=value,key=value. QEMU doubles a literal comma; none
// of the values that matter here has one.
func parseOptions(text string) map[string]string {
	out := map[string]string{}
	for part := range strings.SplitSeq(text, ",") {
		if key, value, ok := strings.Cut(part, "="); ok {
			out[key] = value
		}
	}
	return out
}
