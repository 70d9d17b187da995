package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// slot is where a device of the host is plugged in.
type slot struct {
	id     string // of the device
	model  string // of fakegpu, "" for a device of QEMU's own
	device string // QEMU's own
	// port is the PCI Express port's address on the root bus. Devices with a
	// place are on a conventional bus below it: they share an IOMMU group, as
	// nobody can tell their requests apart.
	port, place string
	pdi         uint64
}

// slots are what the provider's host has: two Hoppers and a Blackwell to rent
// out, and one more that shares its group with a network card.
func slots() []slot {
	return []slot{
		{id: "h100a", model: "h100", port: "10.0", pdi: 0x2921ce551e4e0001},
		{id: "h100b", model: "h100", port: "11.0", pdi: 0x2921ce551e4e0002},
		{id: "b200", model: "b200", port: "12.0", pdi: 0x51f00d0000b20003},
		{id: "mixed", model: "h100", port: "13.0", place: "01.0", pdi: 0x2921ce551e4e0004},
		{id: "card", device: "e1000", port: "13.0", place: "02.0"},
	}
}

// sysfs is the path of its device below /sys/bus/pci/devices, for the shell.
func (s slot) sysfs() string {
	if s.place != "" {
		return "0000:00:" + s.port + "/0000:*/0000:*:" + s.place
	}
	return "0000:00:" + s.port + "/0000:*:00.0"
}

// machine is the running host.
type machine struct {
	dir  string // sockets, logs, state of the GPUs
	qemu *process
	gpus map[string]*process
	qmp  *qmp

	mu   sync.Mutex // one order at a time
	port net.Conn
	in   *json.Decoder
}

// startLimit is for a machine that other work keeps busy, where a host that
// boots in half a minute was seen to need more than three. A QEMU that ends
// is not waited for.
const startLimit = 10 * time.Minute

// boot starts the GPUs and the host of an image, and returns when the host
// takes orders.
func boot(ctx context.Context, image, programs, dir string) (_ *machine, err error) {
	m := &machine{dir: dir, gpus: map[string]*process{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	for _, s := range slots() {
		if s.model != "" {
			if err := m.startGPU(ctx, programs, s); err != nil {
				return nil, err
			}
		}
	}
	rig := filepath.Join(dir, "rig.img")
	if out, err := exec.CommandContext(ctx, "mke2fs", "-q", "-t", "ext4", "-L", "rig", "-d", programs, rig, "1G").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mke2fs: %w: %s", err, out)
	}
	console, err := os.Create(filepath.Join(dir, "qemu.log"))
	if err != nil {
		return nil, err
	}
	defer console.Close() //nolint:errcheck // QEMU has its own
	// The loader of the tree runs the tree's QEMU: this machine's libraries are older.
	qemu := exec.CommandContext(ctx, filepath.Join(image, "tree/usr/lib64/ld-linux-x86-64.so.2"), arguments(image, dir)...) //nolint:gosec // ours
	qemu.Env = append(os.Environ(), "TMPDIR="+dir, "QEMU_MODULE_DIR="+filepath.Join(image, "tree/usr/lib/x86_64-linux-gnu/qemu"))
	qemu.Stdout, qemu.Stderr = console, console
	if m.qemu, err = start(qemu); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	ctx, ended := context.WithCancelCause(ctx)
	defer context.AfterFunc(m.qemu.done, func() { ended(fmt.Errorf("QEMU ended; see %s", console.Name())) })()
	if m.qmp, err = dialQMP(ctx, filepath.Join(dir, "qmp.sock")); err != nil {
		return nil, fmt.Errorf("%w; see %s", err, console.Name())
	}
	if m.port, err = dial(ctx, filepath.Join(dir, "port.sock")); err != nil {
		return nil, err
	}
	m.in = json.NewDecoder(m.port)
	// The answer comes when the host is up.
	if _, err := m.sh(ctx, startLimit, "true"); err != nil {
		return nil, fmt.Errorf("the host does not come up: %w; see %s", err, filepath.Join(dir, "console.log"))
	}
	return m, nil
}

// arguments are QEMU's, after those of the loader that runs it from its tree.
func arguments(image, dir string) []string {
	tree := filepath.Join(image, "tree")
	in := func(name string) string { return filepath.Join(dir, name) }
	args := []string{
		"--library-path", filepath.Join(tree, "usr/lib/x86_64-linux-gnu"), filepath.Join(tree, "usr/bin/qemu-system-x86_64"),
		"-L", filepath.Join(tree, "usr/share/qemu"), "-L", filepath.Join(tree, "usr/share/seabios"),
		"-name", "provider", "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "4G",
		"-nodefaults", "-display", "none", "-serial", "file:" + in("console.log"),
		"-qmp", "unix:" + in("qmp.sock") + ",server=on,wait=off",
		// Native hot-plug: with ACPI's, no port ever says that its link is up,
		// and a reset by the bus fails.
		"-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
		"-device", "amd-iommu,dma-remap=on",
		"-kernel", filepath.Join(image, "vmlinuz"), "-initrd", filepath.Join(image, "initrd.img"),
		// A starved vCPU ticks too late for the kernel to believe in its timer.
		"-append", "root=LABEL=root rw console=ttyS0 quiet systemd.show_status=0 no_timer_check",
		"-drive", "if=none,id=root,format=raw,snapshot=on,file=" + filepath.Join(image, "disk.img"), "-device", "virtio-blk-pci,drive=root",
		"-drive", "if=none,id=rig,format=raw,readonly=on,file=" + in("rig.img"), "-device", "virtio-blk-pci,drive=rig",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=port,server=on,wait=off,path=" + in("port.sock"),
		"-device", "virtserialport,chardev=port,name=" + portName,
	}
	ports := map[string]bool{}
	for i, s := range slots() {
		if !ports[s.port] {
			ports[s.port] = true
			args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=port-%s,chassis=%d,slot=%d,addr=%s,x-speed=32,x-width=16", s.port, i+1, i+1, s.port))
			if s.place != "" {
				args = append(args, "-device", fmt.Sprintf("pcie-pci-bridge,id=bridge-%[1]s,bus=port-%[1]s", s.port))
			}
		}
		args = append(args, "-device", s.json(dir))
	}
	return args
}

// json is the device for QEMU's command line and for device_add.
func (s slot) json(dir string) string {
	device := map[string]any{"driver": s.device, "id": s.id, "bus": "port-" + s.port}
	if s.place != "" {
		device["bus"], device["addr"] = "bridge-"+s.port, s.place
	}
	if s.model != "" {
		device["driver"], device["socket"] = "vfio-user-pci", map[string]string{"type": "unix", "path": filepath.Join(dir, s.id+".sock")}
		device["x-msg-timeout"] = time.Minute.Milliseconds()
	}
	text, err := json.Marshal(device)
	if err != nil {
		panic(err) // strings and numbers
	}
	return string(text)
}

// startGPU starts the process behind a slot and waits for its socket.
func (m *machine) startGPU(ctx context.Context, programs string, s slot) error {
	log, err := os.Create(filepath.Join(m.dir, s.id+".log"))
	if err != nil {
		return err
	}
	defer log.Close() //nolint:errcheck // the process has its own
	socket := filepath.Join(m.dir, s.id+".sock")
	cmd := exec.CommandContext(ctx, filepath.Join(programs, "fakegpu"), "--model", s.model, "--socket", socket, //nolint:gosec // ours
		"--state", filepath.Join(m.dir, s.id+".json"), "--control", m.control(s.id), "--pdi", fmt.Sprintf("%#x", s.pdi))
	cmd.Stdout, cmd.Stderr = log, log
	if m.gpus[s.id], err = start(cmd); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	return until(ctx, "the socket of "+s.id, func() (bool, error) {
		_, err := os.Stat(socket)
		return err == nil, nil
	})
}

func (m *machine) control(id string) string { return filepath.Join(m.dir, id+".ctl") }

// close ends everything that boot started.
func (m *machine) close() error {
	var errs []error
	if m.port != nil {
		errs = append(errs, m.port.Close())
	}
	if m.qmp != nil {
		errs = append(errs, m.qmp.Close())
	}
	for _, p := range m.gpus {
		errs = append(errs, p.end())
	}
	if m.qemu != nil {
		errs = append(errs, m.qemu.end())
	}
	return errors.Join(errs...)
}

// process is one that runs until it is ended.
type process struct {
	*exec.Cmd
	done context.Context // ends with the process
}

func start(cmd *exec.Cmd) (*process, error) {
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done, ended := context.WithCancel(context.Background())
	go func() {
		defer ended()
		cmd.Wait() //nolint:errcheck // it is killed in the end, and its output is kept
	}()
	return &process{Cmd: cmd, done: done}, nil
}

func (p *process) end() error {
	if err := p.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.done.Done()
	return nil
}

// sh runs a script in the host and returns its output; exitError when it ends
// with another code than 0.
func (m *machine) sh(ctx context.Context, limit time.Duration, script string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return "", err
	}
	// An answer comes whatever the script does; a host that hangs gives none.
	if err := m.port.SetDeadline(time.Now().Add(limit + quick)); err != nil {
		return "", err
	}
	if err := json.NewEncoder(m.port).Encode(order{Script: script, Limit: limit}); err != nil {
		return "", err
	}
	var r result
	if err := m.in.Decode(&r); err != nil {
		return "", fmt.Errorf("%.200s: the host gives no answer: %w", script, err)
	}
	if r.Code != 0 {
		return r.Out, &exitError{script: script, result: r}
	}
	return strings.TrimSpace(r.Out), nil
}

// exitError is a script that failed.
type exitError struct {
	script string
	result
}

func (e *exitError) Error() string {
	return fmt.Sprintf("%.200s: exit code %d\n%s%s", e.script, e.Code, e.Out, e.Err)
}

const look = time.Second // a look costs the host a second of its own

// until looks again and again until done.
func until(ctx context.Context, what string, done func() (bool, error)) error {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func dial(ctx context.Context, path string) (conn net.Conn, err error) {
	return conn, errors.Join(until(ctx, "the socket "+path, func() (bool, error) {
		conn, err = new(net.Dialer).DialContext(ctx, "unix", path)
		return err == nil, nil
	}))
}
