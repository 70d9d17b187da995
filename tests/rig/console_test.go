//go:build emulated

package rig_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// floodingFirmware writes to the serial port for ever, from the first
// instruction on (the reset vector, 16 bytes below 4 GiB).
func floodingFirmware() []byte {
	rom := make([]byte, 1<<20)
	copy(rom[len(rom)-16:], []byte{
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xb0, 'x', //        mov al, 'x'
		0xee,       //       out dx, al
		0xeb, 0xfd, //       jmp to out
	})
	return rom
}

// virtlogd's own limits: max_size and max_backups of virtlogd.conf.
const (
	consoleBytes   = 2 << 20
	consoleBackups = 3
)

// A guest of a debug image has a console, which libvirt's virtlogd writes and
// turns over.
func TestAConsoleFloodIsBoundedOnDisk(t *testing.T) {
	h := newHost(t)
	d := drive(t, h)
	spec := blankSpec(t, h)
	spec.Firmware = write(t, h, "flood", floodingFirmware())
	spec.ConsoleLog = filepath.Join(guestDir, "console.log")
	if err := d.Start(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	const limit = (consoleBackups+1)*consoleBytes + 1<<16
	oldest, turned := uint64(0), 0
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(5 * time.Minute)
	// Until a file was dropped: the flood goes on, the space does not.
	for turned < 2 {
		files, err := filepath.Glob(h.Path(spec.ConsoleLog) + "*")
		if err != nil {
			t.Fatal(err)
		}
		var size int64
		for _, f := range files {
			info, err := os.Stat(f)
			if err != nil {
				continue // turned over meanwhile
			}
			size += info.Size()
			if filepath.Ext(f) == ".2" {
				if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Ino != oldest {
					oldest, turned = stat.Ino, turned+1
				}
			}
		}
		if size > limit {
			t.Fatalf("the console takes %d bytes on disk in %v, limit is %d", size, files, limit)
		}
		select {
		case <-deadline:
			t.Fatalf("the console turned over %d times, %d bytes in %v", turned, size, files)
		case <-tick.C:
		}
	}
	if err := d.Destroy(t.Context(), spec.GuestID); err != nil {
		t.Error(err)
	}
}
