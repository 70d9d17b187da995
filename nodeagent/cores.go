package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// leaveNoCore keeps the process's memory out of core dumps and away from
// other processes of its user, also where it is not systemd that starts it.
// Its memory holds presigned URLs, credentials of the control link, and
// evidence on its way.
func leaveNoCore() error {
	err := errors.Join(
		unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}),
		unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0),
	)
	if err != nil {
		return fmt.Errorf("keeping memory out of core dumps: %w", err)
	}
	return nil
}
