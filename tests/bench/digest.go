package main

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/measure"
	"github.com/confidential-node/agent/firmware/ovmf"
)

const (
	digestRounds  = 15
	digestRepeats = 10 // in a round, of some ten milliseconds each
	digestVCPUs   = 2
	// otherPages are measured besides the firmware's: kernel hashes, the first
	// vCPU's save area, and the one all other vCPUs share.
	otherPages = 3
)

// digest compares predicting a launch digest with hashing its input.
func (l *lab) digest(ctx context.Context) error {
	in, err := digestInput(l.programs.Image)
	if err != nil {
		return err
	}
	pages := append(append([]byte(nil), in.Firmware...), make([]byte, otherPages*ovmf.PageSize)...)
	ways := []struct {
		name string
		do   func() error
	}{
		{"SHA-384 of each page", func() error {
			for at := 0; at < len(pages); at += ovmf.PageSize {
				sha512.Sum384(pages[at : at+ovmf.PageSize])
			}
			return nil
		}},
		{"SHA-384 of all bytes", func() error { sha512.Sum384(pages); return nil }},
		{"launch digest", func() error { _, err := measure.Digest(in); return err }},
	}
	rounds := make([][]float64, len(ways))
	for range digestRounds {
		for i, way := range ways {
			begin := time.Now()
			for range digestRepeats {
				if err := way.do(); err != nil {
					return err
				}
			}
			rounds[i] = append(rounds[i], milliseconds(time.Since(begin))/digestRepeats)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	t := table{
		Title: "Launch digest against bare SHA-384", Unit: "ms", Against: []string{ways[0].name, ways[1].name},
		About: fmt.Sprintf(`Predicting the launch digest of the guest image (%d pages, %d vCPUs, firmware in memory) against SHA-384 of the
			same pages. Below 1.1 of each page is good: the chain adds 2 blocks of SHA-384 to the 33 that each page takes.`, len(pages)/ovmf.PageSize, digestVCPUs),
	}
	for i, way := range ways {
		t.Rows = append(t.Rows, newRow(way.name, rounds[i]...))
	}
	l.show(t)
	return nil
}

// digestInput is what the silicon measures of an image.
func digestInput(dir string) (measure.Input, error) {
	in := measure.Input{VCPUs: digestVCPUs, CPUModel: "EPYC-v4", GuestFeatures: 1}
	raw, err := os.ReadFile(filepath.Join(dir, contract.ImageDescriptionName))
	if err != nil {
		return in, fmt.Errorf("reading guest image: %w", err)
	}
	image, err := contract.ParseImageDescription(raw)
	if err != nil {
		return in, err
	}
	in.Kernel = &measure.KernelDigests{Cmdline: image.Cmdline}
	for text, sum := range map[string]*[32]byte{image.Kernel.SHA256: &in.Kernel.Kernel, image.Initrd.SHA256: &in.Kernel.Initrd} {
		if _, err := hex.Decode(sum[:], []byte(text)); err != nil {
			return in, fmt.Errorf("reading guest image: %w", err)
		}
	}
	if in.Firmware, err = os.ReadFile(filepath.Join(dir, image.Firmware.File)); err != nil {
		return in, fmt.Errorf("reading guest image: %w", err)
	}
	return in, nil
}
