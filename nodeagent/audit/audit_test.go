package audit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/confidential-node/agent/firmware/contract"
)

const host = "node-a"

func open(t *testing.T, dir string) *Log {
	t.Helper()
	l, err := Open(dir, host, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { done(t, l.Close()) })
	return l
}

func done(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func fill(t *testing.T, l *Log, n int) {
	t.Helper()
	for i := range n {
		done(t, l.Append(Entry{Kind: KindAccepted, CommandID: fmt.Sprint("command ", i), Verb: "cordon"}))
	}
}

func offer(t *testing.T, l *Log) Offer {
	t.Helper()
	o, err := l.Offer()
	done(t, err)
	return o
}

// shown observes and confirms, as a heartbeat that arrives does.
func shown(t *testing.T, w *Witness, l *Log) *contract.Refusal {
	t.Helper()
	o := offer(t, l)
	_, alarm := w.Observe(o)
	if alarm == nil {
		done(t, l.Confirmed(o.Checkpoint))
	}
	return alarm
}

func copyDir(t *testing.T, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "log")
	done(t, os.CopyFS(to, os.DirFS(from)))
	return to
}

func kinds(t *testing.T, dir string) (out []string) {
	t.Helper()
	done(t, List(dir, func(e Entry) error { out = append(out, e.Kind+" "+e.CommandID); return nil }))
	return out
}

func TestTheLogGrowsAndIsFoundAgain(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	for range 3 {
		l := open(t, dir)
		fill(t, l, 5)
		done(t, l.Close())
	}
	got := kinds(t, dir)
	if len(got) != 16 || got[0] != KindBegun+" " || got[15] != KindAccepted+" command 4" {
		t.Errorf("entries %q", got)
	}
	r, err := Verify(dir)
	if err != nil || r.Entries != 16 || r.Signed != 0 || !strings.HasPrefix(r.Name, "nodeagent/"+host+"/") {
		t.Errorf("%+v, %v", r, err)
	}
	for _, name := range []string{keyFile, entriesFile, hashesFile} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, info.Mode(), err)
		}
	}
}

func TestTheWitnessFollowsALogThatOnlyGrows(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	var w Witness
	l := open(t, dir)
	for round := range 20 {
		fill(t, l, round)
		if alarm := shown(t, &w, l); alarm != nil {
			t.Fatalf("round %d: %v", round, alarm)
		}
		if round%5 == 4 {
			done(t, l.Close())
			l = open(t, dir)
		}
	}
	if w.Size != l.State().Size {
		t.Errorf("the witness is at %d of %d", w.Size, l.State().Size)
	}
	if changed, alarm := w.Observe(offer(t, l)); changed || alarm != nil {
		t.Errorf("shown again: %v %v", changed, alarm)
	}
}

// Whether an offer without an answer arrived is not known; neither may alarm.
func TestALostAnswerIsNoAlarm(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	var w Witness
	l := open(t, dir)
	for round := range 6 {
		fill(t, l, 3)
		o := offer(t, l)
		if round%2 == 0 { // it arrived, its answer did not
			if _, alarm := w.Observe(o); alarm != nil {
				t.Fatal(alarm)
			}
		}
		fill(t, l, 2)
		if round%3 == 0 { // the agent dies before it knows
			done(t, l.Close())
			l = open(t, dir)
		}
		if alarm := shown(t, &w, l); alarm != nil {
			t.Fatalf("round %d: %v", round, alarm)
		}
	}
}

func TestADiskRolledBackIsSeenByTheWitness(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	var w Witness
	l := open(t, dir)
	fill(t, l, 3)
	done(t, errOf(shown(t, &w, l)))
	backup := copyDir(t, dir)
	fill(t, l, 3)
	done(t, errOf(shown(t, &w, l)))
	if _, err := Verify(backup); err != nil {
		t.Fatalf("a backup is intact by itself: %v", err)
	}
	restored := open(t, backup)
	_, alarm := w.Observe(offer(t, restored))
	wantCode(t, alarm, CodeRolledBack)
	// It grows beyond what was seen before anybody looks.
	again := w
	fill(t, restored, 9)
	done(t, restored.Confirmed(offer(t, restored).Checkpoint))
	_, alarm = again.Observe(offer(t, restored))
	wantCode(t, alarm, CodeUnproven)
}

func errOf(r *contract.Refusal) error {
	if r == nil {
		return nil
	}
	return r
}

func wantCode(t *testing.T, got *contract.Refusal, want string) {
	t.Helper()
	if got == nil || got.Code != want || got.Remedy == "" {
		t.Errorf("alarm %v, want %s", got, want)
	}
}

func TestAForkIsSeenByTheWitness(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	var w Witness
	l := open(t, dir)
	fill(t, l, 4)
	done(t, errOf(shown(t, &w, l)))
	fork := open(t, copyDir(t, dir))
	done(t, l.Append(Entry{Kind: KindAccepted, CommandID: "seen"}))
	done(t, fork.Append(Entry{Kind: KindAccepted, CommandID: "hidden"}))
	done(t, errOf(shown(t, &w, l)))
	_, alarm := w.Observe(offer(t, fork))
	wantCode(t, alarm, CodeForked) // as long, other entries
	fill(t, fork, 5)
	done(t, fork.Confirmed(offer(t, fork).Checkpoint))
	longer := offer(t, fork)
	_, alarm = w.Observe(longer)
	wantCode(t, alarm, CodeForked) // longer, and the proof is of the fork
	longer.Proof[0][0] ^= 1
	_, alarm = w.Observe(longer)
	wantCode(t, alarm, CodeForked)
	longer.Checkpoint = bytes.Replace(longer.Checkpoint, []byte("\n11\n"), []byte("\n12\n"), 1)
	_, alarm = w.Observe(longer)
	wantCode(t, alarm, CodeForged)
	other := open(t, filepath.Join(t.TempDir(), "log"))
	_, alarm = w.Observe(offer(t, other))
	wantCode(t, alarm, CodeReplaced)
}

func TestEveryFlippedBitIsFound(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, dir)
	fill(t, l, 2)
	done(t, l.Confirmed(offer(t, l).Checkpoint))
	fill(t, l, 1)
	offer(t, l)
	fill(t, l, 2) // not signed for yet
	done(t, l.Close())
	flipped := 0
	for _, name := range []string{keyFile, entriesFile, hashesFile, checkpointFile, witnessedFile} {
		path := filepath.Join(dir, name)
		whole, err := os.ReadFile(path)
		done(t, err)
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		done(t, err)
		for bit := range len(whole) * 8 {
			at := bit / 8
			if underRace && bit%8 != at%8 { // checking signatures is ten times slower then
				continue
			}
			put := func(b byte) {
				_, err := f.WriteAt([]byte{b}, int64(at))
				done(t, err)
			}
			put(whole[at] ^ 1<<(bit%8))
			flipped++
			if _, err := Verify(dir); !errors.Is(err, ErrDamaged) {
				t.Errorf("%s: bit %d of byte %d is not found: %v", name, bit%8, at, err)
			}
			put(whole[at])
		}
		done(t, f.Close())
	}
	if _, err := Verify(dir); err != nil {
		t.Errorf("put back: %v", err)
	}
	t.Logf("%d bits", flipped)
}

func TestMissingFilesAreFound(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, dir)
	fill(t, l, 2)
	done(t, l.Confirmed(offer(t, l).Checkpoint))
	done(t, l.Close())
	for _, name := range []string{keyFile, entriesFile, hashesFile, checkpointFile} {
		broken := copyDir(t, dir)
		done(t, os.Remove(filepath.Join(broken, name)))
		if _, err := Open(broken, host, time.Now); !errors.Is(err, ErrDamaged) {
			t.Errorf("without %s: %v", name, err)
		}
		if _, err := Verify(broken); !errors.Is(err, ErrDamaged) {
			t.Errorf("without %s it verifies: %v", name, err)
		}
	}
}

// An agent may die after any byte of an entry and after any byte of its
// hashes, before or after the checkpoint: what was confirmed is there, what
// was not is there whole or not at all, and the witness has nothing to say.
func TestADeathBetweenAppendAndCheckpointLosesNothing(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	var w Witness
	l := open(t, dir)
	fill(t, l, 2)
	done(t, errOf(shown(t, &w, l)))
	before := l.at
	done(t, l.Append(Entry{Kind: KindAccepted, CommandID: "torn"}))
	after := l.at
	done(t, l.Close())
	beforeHashes, afterHashes := tlog.StoredHashCount(before.size)*tlog.HashSize, tlog.StoredHashCount(after.size)*tlog.HashSize
	die := func(entries, hashes int64) {
		t.Helper()
		crashed := copyDir(t, dir)
		done(t, os.WriteFile(filepath.Join(crashed, ".checkpoint123"), []byte("half"), 0o600))
		done(t, os.Truncate(filepath.Join(crashed, entriesFile), entries))
		done(t, os.Truncate(filepath.Join(crashed, hashesFile), hashes))
		if _, err := Verify(crashed); err != nil {
			t.Errorf("at %d, %d: %v", entries, hashes, err)
		}
		back := open(t, crashed)
		want := before.size
		if entries >= after.bytes {
			want++
		}
		if left, err := filepath.Glob(filepath.Join(crashed, ".*")); err != nil || len(left) > 0 {
			t.Errorf("left over: %v %v", left, err)
		}
		if got := back.State().Size; got != want {
			t.Errorf("at %d, %d: %d entries, want %d", entries, hashes, got, want)
		}
		fill(t, back, 1)
		watch := w
		if alarm := shown(t, &watch, back); alarm != nil {
			t.Errorf("at %d, %d: %v", entries, hashes, alarm)
		}
		done(t, back.Close())
		if r, err := Verify(crashed); err != nil || r.Entries != want+1 || r.TornBytes != 0 {
			t.Errorf("at %d, %d: %+v, %v", entries, hashes, r, err)
		}
	}
	for entries := before.bytes; entries < after.bytes; entries += 3 {
		die(entries, beforeHashes)
	}
	for hashes := beforeHashes; hashes <= afterHashes; hashes++ {
		die(after.bytes, hashes)
	}
	// What was signed for cannot have been lost by a crash.
	lost := copyDir(t, dir)
	done(t, os.Truncate(filepath.Join(lost, entriesFile), before.bytes-1))
	done(t, os.Truncate(filepath.Join(lost, hashesFile), beforeHashes))
	if _, err := Open(lost, host, time.Now); !errors.Is(err, ErrDamaged) {
		t.Errorf("a signed entry was cut: %v", err)
	}
}

func TestAFullLogAndAFailingDiskTakeNothing(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, dir)
	fill(t, l, 30)
	l.limit = l.at.bytes // what runs can be stopped, and its end told, a tenth beyond
	full := func(e Entry) bool {
		t.Helper()
		err := l.Append(e)
		if err != nil && contract.AsRefusal(err).Code != CodeFull {
			t.Errorf("not typed: %v", err)
		}
		return err != nil
	}
	if !full(Entry{Kind: KindAccepted, Verb: "launch_guest"}) {
		t.Error("a launch is taken on")
	}
	if full(Entry{Kind: KindAccepted, Verb: "stop_guest"}) || full(Entry{Kind: "guest-state"}) {
		t.Error("what runs cannot end")
	}
	l.limit = l.at.bytes * 10 / 11
	if !full(Entry{Kind: "guest-state"}) {
		t.Error("there is no end to it")
	}
	l.limit = MaxBytes
	writable := l.hashes
	readOnly, err := os.Open(filepath.Join(dir, hashesFile))
	done(t, err)
	l.hashes = readOnly
	if err := l.Append(Entry{Kind: KindAccepted}); err == nil {
		t.Error("taken without its hash")
	}
	done(t, readOnly.Close())
	l.hashes = writable
	fill(t, l, 1)
	done(t, l.Close())
	if got := kinds(t, dir); len(got) != 34 {
		t.Errorf("entries %q", got)
	}
	if err := l.Append(Entry{Kind: KindAccepted}); err == nil {
		t.Error("a closed log took an entry")
	}
}

func TestTwoProcessesWriteOneLog(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	var wait sync.WaitGroup
	const each = 25
	for range 4 {
		l := open(t, dir)
		wait.Go(func() {
			for range each {
				if err := l.Append(Entry{Kind: KindPlatform}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()
	if r, err := Verify(dir); err != nil || r.Entries != 1+4*each {
		t.Errorf("%+v, %v", r, err)
	}
}

// tiles reads an export as any client of tlog-tiles does.
type tiles struct{ dir string }

func (r tiles) Height() int                     { return tileHeight }
func (r tiles) SaveTiles([]tlog.Tile, [][]byte) {}
func (r tiles) ReadTiles(want []tlog.Tile) (data [][]byte, err error) {
	for _, t := range want {
		d, err := os.ReadFile(filepath.Join(r.dir, "tile", fmt.Sprint(t.L), tileName(t.N, int64(t.W))))
		if err != nil {
			return nil, err
		}
		data = append(data, d)
	}
	return data, nil
}

func TestAnExportIsReadByOthers(t *testing.T) {
	t.Parallel()
	dir, to := filepath.Join(t.TempDir(), "log"), filepath.Join(t.TempDir(), "export")
	l := open(t, dir)
	if _, err := Export(dir, filepath.Join(t.TempDir(), "early")); !errors.Is(err, ErrUnsigned) {
		t.Errorf("exported: %v", err)
	}
	fill(t, l, 300)
	size := offer(t, l).Size
	fill(t, l, 3) // not signed for
	r, err := Export(dir, to)
	if err != nil || r.Entries != size {
		t.Fatalf("%+v, %v", r, err)
	}
	key, errKey := os.ReadFile(filepath.Join(to, "key.pub"))
	text, errText := os.ReadFile(filepath.Join(to, "checkpoint"))
	done(t, errors.Join(errKey, errText))
	verifier, err := note.NewVerifier(strings.TrimSpace(string(key)))
	done(t, err)
	head, err := openTree(text, verifier)
	done(t, err)
	reader := tlog.TileHashReader(tlog.Tree{N: head.size, Hash: head.root}, tiles{to})
	index := int64(0)
	for _, name := range []string{"000", fmt.Sprintf("001.p/%d", size-256)} {
		bundle, err := os.ReadFile(filepath.Join(to, "tile", "entries", name))
		done(t, err)
		for len(bundle) > 0 {
			n := binary.BigEndian.Uint16(bundle)
			proof, err := tlog.ProveRecord(head.size, index, reader)
			done(t, err)
			if err := tlog.CheckRecord(proof, head.size, head.root, index, tlog.RecordHash(bundle[2:2+n])); err != nil {
				t.Errorf("entry %d: %v", index, err)
			}
			bundle, index = bundle[2+n:], index+1
		}
	}
	if index != size {
		t.Errorf("%d entries exported of %d", index, size)
	}
	if got := tileName(1234067, 256); got != "x001/x234/067" {
		t.Errorf("path %s", got)
	}
}
