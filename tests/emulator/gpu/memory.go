package gpu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/confidential-node/agent/gpu/gputest"
)

// Keep makes the device's knobs those of the file at path, and the file those
// of the device from then on. A file that is not there is a device as it
// leaves the factory. Failed is told of knobs that could not be stored.
func Keep(e *gputest.Emulator, path string, failed func(error)) error {
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var knobs map[uint16]uint16
	if err == nil {
		if err := json.Unmarshal(data, &knobs); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	e.Persist(knobs, func(knobs map[uint16]uint16) {
		if err := store(path, knobs); err != nil {
			failed(err)
		}
	})
	return nil
}

// store replaces the file: a process killed in between leaves the old one.
func store(path string, knobs map[uint16]uint16) error {
	data, err := json.Marshal(knobs)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
