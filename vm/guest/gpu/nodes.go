package gpu

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
)

// Minor numbers of NVIDIA's driver (its documentation, "Installing the NVIDIA
// driver", manual creation of device files).
const (
	minorControl = 255
	minorUVM     = 0
)

// node is one device file. The driver makes none by itself.
type node struct {
	name         string
	major, minor uint32
}

// planNodes reads the driver's major numbers from the text of /proc/devices
// and returns the files that so many GPUs need, and no other; nothing when the
// driver, or its part for memory, is not there.
func planNodes(devices string, gpus int) []node {
	majors := map[string]uint32{}
	lines := bufio.NewScanner(strings.NewReader(devices))
	for lines.Scan() && lines.Text() != "Block devices:" {
		number, name, ok := strings.Cut(strings.TrimSpace(lines.Text()), " ")
		if major, err := strconv.ParseUint(number, 10, 12); ok && err == nil {
			majors[name] = uint32(major)
		}
	}
	major, ok := majors["nvidia"]
	if !ok {
		major, ok = majors["nvidia-frontend"] // before driver 5xx
	}
	uvm, hasUVM := majors["nvidia-uvm"]
	if !ok || !hasUVM {
		return nil
	}
	nodes := []node{{"nvidiactl", major, minorControl}, {"nvidia-uvm", uvm, minorUVM}}
	for i := range gpus {
		nodes = append(nodes, node{"nvidia" + strconv.Itoa(i), major, uint32(i)})
	}
	return nodes
}

// makeNodes makes the device files of so many GPUs. Whoever is let see them
// may use the GPUs.
func (m Machine) makeNodes(gpus int) (names []string, err error) {
	devices, err := os.ReadFile(filepath.Join(m.Proc, "devices"))
	if err != nil {
		return nil, fmt.Errorf("looking for NVIDIA's driver: %w", err)
	}
	nodes := planNodes(string(devices), gpus)
	if nodes == nil {
		return nil, contract.Refuse("guest.gpu-driver", "use a guest image with NVIDIA's driver that fits its kernel, nvidia-uvm too",
			"NVIDIA's driver did not come up in the guest").Because(m.Driver)
	}
	for _, n := range nodes {
		path := filepath.Join(m.Dev, n.name)
		err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(n.major, n.minor)))
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("making %s: %w", path, err)
		}
		if err := os.Chmod(path, 0o666); err != nil { //nolint:gosec // who sees it may use it
			return nil, fmt.Errorf("making %s: %w", path, err)
		}
		names = append(names, path)
	}
	return names, nil
}
