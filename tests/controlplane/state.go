package controlplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
)

// commandMemory is how long issued commands are remembered; far longer than
// any is valid.
const commandMemory = 8 * 24 * time.Hour

// state is what the control plane must not forget. It is on disk before any
// command that depends on it is sent: a sequence used twice would be refused,
// or worse, taken for a replay.
type state struct {
	Version  int                       `json:"version"`
	Hosts    map[string]*hostState     `json:"hosts"`
	Guests   map[string]*guestState    `json:"guests"`
	Commands map[string]*issuedCommand `json:"commands"`
	// Revoked identities, by their public key, and when.
	Revoked map[string]time.Time `json:"revoked,omitempty"`
}

// hostState is one enrolled host.
type hostState struct {
	// Epoch is 0 until the first BeginEpoch was issued.
	Epoch uint64 `json:"epoch"`
	// Sequence is the last one used in Epoch.
	Sequence uint64 `json:"sequence"`
	// StoreID (hex) that Epoch was begun for, by which command and when.
	StoreID   string    `json:"store_id,omitempty"`
	BeginID   string    `json:"begin_id,omitempty"`
	BegunAt   time.Time `json:"begun_at,omitzero"`
	Cordoning bool      `json:"cordoning,omitempty"`
	// Identities it was given and that are not revoked, by their public key.
	Identities []string `json:"identities,omitempty"`
	Watched    watched  `json:"watched,omitzero"`
}

// guestState is one guest that was asked for.
type guestState struct {
	Node       string `json:"node"`
	Generation uint64 `json:"generation"`
	CommandID  string `json:"command_id"`
}

// issuedCommand says whose outcome an event may report.
type issuedCommand struct {
	Node  string    `json:"node"`
	Verb  string    `json:"verb"`
	Guest string    `json:"guest,omitempty"`
	Nonce string    `json:"nonce,omitempty"` // hex
	At    time.Time `json:"at"`
}

const (
	stateFile    = "state.json"
	stateVersion = 1
)

func loadState(dir string) (*state, error) {
	s := &state{Version: stateVersion, Hosts: map[string]*hostState{}, Guests: map[string]*guestState{}, Commands: map[string]*issuedCommand{}, Revoked: map[string]time.Time{}}
	data, err := os.ReadFile(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading state: %w", err)
	}
	if err := json.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("reading state: %w", err)
	}
	if s.Version != stateVersion {
		return nil, fmt.Errorf("reading state: version %d, this build knows %d", s.Version, stateVersion)
	}
	return s, nil
}

func (s *state) save(dir string, now time.Time) error {
	maps.DeleteFunc(s.Commands, func(_ string, c *issuedCommand) bool { return now.Sub(c.At) > commandMemory })
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("writing state: %w", err)
	}
	if err := renameio.WriteFile(filepath.Join(dir, stateFile), data, 0o600); err != nil {
		return fmt.Errorf("writing state: %w", err)
	}
	return nil
}
