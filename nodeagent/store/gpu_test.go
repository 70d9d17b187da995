package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.etcd.io/bbolt"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu"
	"github.com/confidential-node/agent/gpu/ccmode"
	"github.com/confidential-node/agent/gpu/pool"
	"github.com/confidential-node/agent/vfio"
)

func TestGPUsAreRememberedWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	open := func() *Store {
		s, err := Open(path, time.Now, hclog.NewNullLogger())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	if none, err := s.GPUs(); err != nil || len(none) != 0 {
		t.Errorf("%v, %v", none, err)
	}
	at := time.Date(2026, 11, 26, 1, 2, 3, 4, time.UTC)
	want := []pool.Record{
		{
			Address: "0000:41:00.0", Model: gpu.Model{Name: "H100", Board: "SXM"}, State: pool.Quarantined, Since: at, Duty: true, Step: pool.StepVerify, StepAt: at,
			Bindings: []vfio.Binding{{Address: "0000:41:00.0", Vendor: 0x10de, Device: 0x2330, Driver: "nvidia", PowerControl: "auto"}},
			Mode:     ccmode.On, PDI: "2921ce551e4eeda3", BootID: "b",
			Quarantine: &pool.Quarantine{Reason: contract.Refuse("gpu.lost", "do", "what"), At: at, From: pool.Dirty, Guest: "g", Evidence: []string{"seen"}},
		},
		{Address: "0000:42:00.0", State: pool.Attached, Since: at, Guest: "g"},
	}
	if err := s.PutGPUs(want...); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	got, err := s.GPUs()
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read\n%+v, want\n%+v, %v", got, want, err)
	}
	if err := errors.Join(s.DeleteGPU("0000:41:00.0"), s.DeleteGPU("0000:41:00.0")); err != nil {
		t.Error(err)
	}
	// A flipped bit is no GPU.
	if err := s.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte(bucketGPUs))
		raw := append([]byte{}, b.Get([]byte("0000:42:00.0"))...)
		raw[len(raw)-9] ^= 1
		return b.Put([]byte("0000:42:00.0"), raw)
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GPUs(); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	defer s.Close() //nolint:errcheck // read only
	if aside, err := filepath.Glob(path + ".corrupt-*"); err != nil || len(aside) != 1 {
		t.Errorf("a damaged store was not set aside: %v, %v", aside, err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestAStoreIsReadWhileItsAgentDoesNotRun(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	if _, err := ReadGPUs(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no store: %v", err)
	}
	s, err := Open(path, time.Now, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	want := []pool.Record{{Address: "0000:42:00.0", State: pool.Attached, Guest: "g"}}
	if err := s.PutGPUs(want...); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadGPUs(path); err == nil || contract.AsRefusal(err).Code != CodeInUse {
		t.Errorf("its agent runs: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ReadGPUs(path); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read %+v, %v", got, err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("reading changed the file: %v", err)
	}
	if s, err = Open(path, time.Now, hclog.NewNullLogger()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.update(func(tx *bbolt.Tx) error {
		return put(tx.Bucket([]byte("meta")), []byte("schema"), recordSchema, binary.BigEndian.AppendUint32(nil, schemaVersion+1))
	}), s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadGPUs(path); err == nil || contract.AsRefusal(err).Code != "store.newer" {
		t.Errorf("layout of a newer build: %v", err)
	}
}
