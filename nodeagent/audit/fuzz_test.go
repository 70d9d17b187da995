package audit

import (
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

func FuzzObserve(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "log")
	l, err := Open(dir, host, time.Now)
	if err != nil {
		f.Fatal(err)
	}
	o, err := l.Offer()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(o.Key, o.Checkpoint, int64(0), []byte{})
	f.Add("", []byte("a\n1\n\n"), int64(1), make([]byte, 64))
	var pinned Witness
	if _, alarm := pinned.Observe(o); alarm != nil {
		f.Fatal(alarm)
	}
	f.Fuzz(func(t *testing.T, key string, checkpoint []byte, from int64, proof []byte) {
		var parts [][]byte
		for len(proof) >= tlog.HashSize {
			parts, proof = append(parts, proof[:tlog.HashSize]), proof[tlog.HashSize:]
		}
		hashes, err := ParseProof(parts)
		if err != nil {
			return
		}
		w := pinned
		if changed, _ := w.Observe(Offer{Key: key, Checkpoint: checkpoint, From: from, Proof: hashes}); changed {
			t.Error("somebody without the key moved the witness on")
		}
		var fresh Witness
		if changed, alarm := fresh.Observe(Offer{Key: key, Checkpoint: checkpoint, From: from, Proof: hashes}); changed == (alarm != nil) {
			t.Errorf("changed %v, alarm %v", changed, alarm)
		}
	})
}

func FuzzEntry(f *testing.F) {
	f.Add([]byte(`{"index":0,"at":"2026-01-01T00:00:00Z","kind":"x"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		if e, err := parseEntry(line, 0); err == nil && (e.Kind == "" || e.Index != 0) {
			t.Errorf("taken: %+v", e)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	l, err := Open(filepath.Join(b.TempDir(), "log"), host, time.Now)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := l.Append(Entry{Kind: KindAccepted, CommandID: "019aaf00-0000-7000-8000-000000000001"}); err != nil {
			b.Fatal(err)
		}
	}
}
