// Command mkimage makes a guest image from an init, a kernel package and a
// firmware package. It unpacks the packages and installs nothing.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/image"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := build(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func build(ctx context.Context, args []string) (err error) {
	flags := flag.NewFlagSet("mkimage", flag.ContinueOnError)
	o := image.Options{}
	flags.StringVar(&o.Init, "init", "", "the guest's init, one static `file`")
	kernel := flags.String("kernel-deb", "", "kernel package `file`")
	firmware := flags.String("firmware-deb", "", "package `file` with OVMF.amdsev.fd")
	flags.StringVar(&o.Variant, "variant", contract.VariantProduction, "production or debug")
	flags.BoolVar(&o.Emulated, "emulated", false, "the init was built with the tag emulated")
	flags.StringVar(&o.GPUDir, "gpu-dir", "", "`folder` with the helper, libraries, modules and firmware for GPUs")
	flags.StringVar(&o.OutDir, "out", "", "`folder` to make")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if o.Init == "" || *kernel == "" || *firmware == "" || o.OutDir == "" {
		return errors.New("--init, --kernel-deb, --firmware-deb and --out are needed")
	}
	dir, err := os.MkdirTemp("", "mkimage-")
	if err != nil {
		return fmt.Errorf("making a folder to unpack in: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := addKernel(ctx, &o, *kernel, filepath.Join(dir, "kernel")); err != nil {
		return err
	}
	if err := addFirmware(ctx, &o, *firmware, filepath.Join(dir, "firmware")); err != nil {
		return err
	}
	o.Name = "guest-" + o.Variant
	if o.Emulated {
		o.Name += "-emulated"
	}
	if o.GPUDir != "" {
		o.Name += "-gpu"
	}
	_, err = image.Build(ctx, o)
	return err
}

// unpack extracts a package and returns "name version".
func unpack(ctx context.Context, file, dir string) (string, error) {
	if _, err := run(ctx, "dpkg-deb", "-x", file, dir); err != nil {
		return "", err
	}
	return run(ctx, "dpkg-deb", "-W", "--showformat=${Package} ${Version}", file)
}

func addKernel(ctx context.Context, o *image.Options, file, dir string) (err error) {
	if o.KernelSource, err = unpack(ctx, file, dir); err != nil {
		return err
	}
	if o.Kernel, err = one(dir, "boot/vmlinuz-*"); err != nil {
		return err
	}
	// Packages of merged-/usr releases have the modules below usr/lib.
	o.ModulesDir, err = one(dir, "lib/modules/*", "usr/lib/modules/*")
	return err
}

func addFirmware(ctx context.Context, o *image.Options, file, dir string) (err error) {
	if o.FirmwareSource, err = unpack(ctx, file, dir); err != nil {
		return err
	}
	o.Firmware, err = one(dir, "usr/share/ovmf/OVMF.amdsev.fd")
	return err
}

// one returns the only path that matches any of the patterns.
func one(dir string, patterns ...string) (string, error) {
	var found []string
	for _, p := range patterns {
		matches, err := filepath.Glob(filepath.Join(dir, p))
		if err != nil {
			return "", fmt.Errorf("looking for %s: %w", p, err)
		}
		found = append(found, matches...)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("the package has %d of %s, want one", len(found), strings.Join(patterns, " or "))
	}
	return found[0], nil
}

// run executes a tool and returns its whole standard output.
func run(ctx context.Context, name string, args ...string) (string, error) {
	var out, problems bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("running %s: %w: %s", name, err, strings.TrimSpace(problems.String()))
	}
	return strings.TrimSpace(out.String()), nil
}
