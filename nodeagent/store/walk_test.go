package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.etcd.io/bbolt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/clock"
	"github.com/confidential-node/agent/nodeagent/inbox"
)

// lived is the file of an agent that has worked: commands of all kinds on
// several pages, guests in all stages, an event larger than a page, and free
// pages.
func lived(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.db")
	s := reopen(t, path)
	at := clock.Instant{Wall: noon(), BootID: "boot", Up: time.Hour}
	done(t, s.BeginEpoch(3, noon()))
	done(t, s.SaveLastSeen(at))
	done(t, s.SaveReport(&api.Capability{Protocol: 3, Kernel: "6.12"}))
	for i := range 24 {
		c := inbox.Command{
			ID: fmt.Sprintf("00000000-0000-7000-8000-%012d", i), Epoch: 3, Sequence: uint64(i + 1), ExpiresAt: noon().Add(time.Hour), ReceivedAt: at,
			Verb: "cordon", Payload: bytes.Repeat([]byte{byte(i)}, 100),
		}
		if i%8 == 0 {
			c.Verb, c.Guest, c.Generation = "stop_guest", "g", 1
		}
		if _, err := s.AddCommand(c); err != nil {
			t.Fatal(err)
		}
		if i < 20 {
			done(t, s.FinishCommand(c.ID, api.NewDone("host-1", c.ID, noon())))
		}
	}
	done(t, s.DropEvents(15))
	done(t, s.AppendEvents(&api.Event{HostId: string(bytes.Repeat([]byte{'x'}, 5000))}))
	for i := range 5 {
		g := Guest{
			ID: fmt.Sprintf("guest-%d", i), Generation: 1, BootID: "boot", Launch: bytes.Repeat([]byte("launch"), 200), AcceptedAt: at,
			Steps:  []Step{{Name: "blobs", BegunAt: noon(), DoneAt: noon()}, {Name: "domain", BegunAt: noon()}},
			Phases: map[contract.GuestPhase]clock.Instant{contract.PhaseBooted: at}, Stop: &Stop{CommandID: "s", Deadline: at},
		}
		done(t, s.PutGuest(g))
	}
	done(t, s.DeleteGuest("guest-1"))
	done(t, s.SetCordon("disk change", true))
	done(t, s.Close())
	data, err := os.ReadFile(path)
	done(t, err)
	return data
}

// dump is everything a store says, by bucket and key.
func (s *Store) dump() (map[string]string, error) {
	all := map[string]string{}
	err := s.view(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			all[string(name)] = ""
			return b.ForEach(func(key, raw []byte) error {
				payload, err := unseal(kindOf(string(name), key), key, raw)
				all[fmt.Sprintf("%s %x", name, key)] = string(payload)
				return err
			})
		})
	})
	return all, err
}

const (
	windows = 256
	// The heads of pages say what the rest means, and are looked at more often.
	headBytes, headWindows = 128, 32
)

// window chooses the bytes of a walk and how each is changed: all with
// FAULT_ALL=1, otherwise one window of many, which changes with the hour;
// FAULT_WINDOW=n is one of them again.
func window(t *testing.T) (chosen func(at int) bool, masks []byte) {
	t.Helper()
	if os.Getenv("FAULT_ALL") == "1" {
		return func(int) bool { return true }, []byte{0x01, 0x80, 0xFF}
	}
	n, err := strconv.Atoi(os.Getenv("FAULT_WINDOW"))
	if err != nil {
		n = int(time.Now().Unix() / 3600 % windows)
	}
	t.Logf("some of the bytes, window %d; again: FAULT_WINDOW=%d; all: make test-full", n, n)
	return func(at int) bool {
		of := uint32(windows)
		switch {
		case testing.Short():
			of *= 4
		case at%os.Getpagesize() < headBytes:
			of = headWindows
		}
		return crc32.ChecksumIEEE(binary.BigEndian.AppendUint32(nil, uint32(at)))%of == uint32(n)%of
	}, []byte{0x01, 0x80}
}

// Whatever byte of the file changes, the store says what it said before or is
// set aside, and the process lives. The new one is in no epoch, under another
// id: nobody can make a command take effect twice by damaging the file.
func TestWhateverByteChangesNothingWrongIsServed(t *testing.T) {
	t.Parallel()
	good := lived(t)
	chosen, masks := window(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "state.db")
	done(t, os.WriteFile(path, good, 0o600))
	s := reopen(t, path)
	before, err := s.dump()
	epoch, epochErr := s.Epoch()
	done(t, errors.Join(err, epochErr, s.Close()))
	cases, aside := 0, 0
	for at := range good {
		if !chosen(at) {
			continue
		}
		for _, mask := range masks {
			cases++
			bad := bytes.Clone(good)
			bad[at] ^= mask
			done(t, os.WriteFile(path, bad, 0o600))
			s, err := Open(path, noon, hclog.NewNullLogger())
			if err != nil {
				t.Fatalf("byte %d ^ %#x: no store: %v", at, mask, err)
			}
			moved, err := filepath.Glob(path + ".corrupt-*")
			e, epochErr := s.Epoch()
			after, dumpErr := s.dump()
			if err := errors.Join(err, epochErr, dumpErr); err != nil {
				t.Fatalf("byte %d ^ %#x: %v", at, mask, err)
			}
			switch {
			case len(moved) == 0 && !reflect.DeepEqual(before, after):
				t.Errorf("byte %d ^ %#x: served as something else", at, mask)
			case len(moved) == 0:
				done(t, s.AppendEvents(&api.Event{})) // it can be written, too
			case e.Number != 0 || e.StoreID == epoch.StoreID || len(after) != len(buckets())+3:
				t.Errorf("byte %d ^ %#x: begun anew as %+v with %d records", at, mask, e, len(after))
			default:
				aside++
				kept, err := os.ReadFile(moved[0])
				if err != nil || !bytes.Equal(kept, bad) {
					t.Errorf("byte %d ^ %#x: what was set aside is not the file: %v", at, mask, err)
				}
				done(t, os.Remove(moved[0]))
			}
			done(t, s.Close())
		}
	}
	t.Logf("%d bytes, %d changes, %d set aside, the others mean nothing", len(good), cases, aside)
	if aside == 0 {
		t.Error("no damage was found: the walk changes the wrong bytes")
	}
}
