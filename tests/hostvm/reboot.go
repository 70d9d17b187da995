package main

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

func mountSysfs() error {
	return errors.Join(os.MkdirAll("/sys", 0o755), unix.Mount("sysfs", "/sys", "sysfs", 0, "")) //nolint:gosec // of a guest that lives for a second
}

func powerOff() error {
	unix.Sync()
	return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
