package vfiouser

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// memory is a device of one region of plain bytes.
type memory struct {
	bytes  [64]byte
	resets int
}

func (m *memory) Region(index int) uint64 {
	if index == 0 {
		return uint64(len(m.bytes))
	}
	return 0
}

func (m *memory) Read(_ int, offset uint64, p []byte) error {
	copy(p, m.bytes[offset:])
	return nil
}

func (m *memory) Write(_ int, offset uint64, p []byte) error {
	if offset == 60 {
		return syscall.EACCES
	}
	copy(m.bytes[offset:], p)
	return nil
}

func (m *memory) Reset() error {
	m.resets++
	return nil
}

func command(id, command uint16, flags uint32, body []byte) []byte {
	out := binary.LittleEndian.AppendUint16(nil, id)
	out = binary.LittleEndian.AppendUint16(out, command)
	return append(append(out, words(uint32(headerSize+len(body)), flags, 0)...), body...)
}

func access(offset uint64, region, count uint32, data ...byte) []byte {
	return append(append(binary.LittleEndian.AppendUint64(nil, offset), words(region, count)...), data...)
}

// ask sends a message and returns flags, error number and payload of the reply.
func ask(t *testing.T, conn net.Conn, message []byte) (flags uint32, errno syscall.Errno, body []byte) {
	t.Helper()
	if _, err := conn.Write(message); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, headerSize)
	if _, err := io.ReadFull(conn, head); err != nil {
		t.Fatal(err)
	}
	if string(head[:4]) != string(message[:4]) {
		t.Fatalf("the reply's id and command are % x, want % x", head[:4], message[:4])
	}
	body = make([]byte, binary.LittleEndian.Uint32(head[4:])-headerSize)
	if _, err := io.ReadFull(conn, body); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint32(head[8:]), syscall.Errno(binary.LittleEndian.Uint32(head[12:])), body
}

// dial serves m and returns a connection that has agreed on a version.
func dial(t *testing.T, m Device) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	listener, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, listener, m) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() }) //nolint:errcheck // each answer was read
	if flags, _, _ := ask(t, conn, command(1, commandVersion, 0, append(make([]byte, 4), "{}\x00"...))); flags != flagReply {
		t.Fatalf("version: flags %#x", flags)
	}
	return conn
}

func TestRegionsAreReadAndWritten(t *testing.T) {
	t.Parallel()
	m := &memory{}
	conn := dial(t, m)
	if _, _, body := ask(t, conn, command(2, commandInfo, 0, words(16, 0, 0, 0))); string(body) != string(words(16, 3, Regions, 5)) {
		t.Errorf("info % x", body)
	}
	if _, _, body := ask(t, conn, command(3, commandRegionInfo, 0, append(words(32, 0, 0, 0), make([]byte, 16)...))); len(body) != 32 || binary.LittleEndian.Uint64(body[16:]) != 64 || body[4] != 3 {
		t.Errorf("region 0: % x", body)
	}
	if _, errno, _ := ask(t, conn, command(4, commandRegionInfo, 0, append(words(32, 0, Regions, 0), make([]byte, 16)...))); errno != syscall.EINVAL {
		t.Errorf("region %d: %v", Regions, errno)
	}
	if _, errno, _ := ask(t, conn, command(5, commandRegionWrite, 0, access(8, 0, 4, 1, 2, 3, 4))); errno != 0 {
		t.Error(errno)
	}
	// A posted write has no answer: the next answer is the next command's.
	if _, err := conn.Write(command(6, commandRegionWrite, flagNoReply, access(12, 0, 1, 5))); err != nil {
		t.Fatal(err)
	}
	if _, _, body := ask(t, conn, command(7, commandRegionRead, 0, access(8, 0, 5))); len(body) != 21 || string(body[16:]) != "\x01\x02\x03\x04\x05" {
		t.Errorf("read % x", body)
	}
	if flags, errno, body := ask(t, conn, command(8, commandRegionWrite, 0, access(60, 0, 4, 0, 0, 0, 0))); flags != flagReply|flagError || errno != syscall.EACCES || len(body) != 0 {
		t.Errorf("a write the device refuses: flags %#x, %v, % x", flags, errno, body)
	}
	if _, errno, _ := ask(t, conn, command(9, commandReset, 0, nil)); errno != 0 || m.resets != 1 {
		t.Errorf("reset: %v, %d resets", errno, m.resets)
	}
}

func TestAccessesOutsideAreRefused(t *testing.T) {
	t.Parallel()
	conn := dial(t, &memory{})
	for name, body := range map[string][]byte{
		"behind the end":    access(64, 0, 1),
		"across the end":    access(60, 0, 5),
		"offset overflows":  access(1<<64-1, 0, 4),
		"no such region":    access(0, Regions, 4),
		"empty region":      access(0, 1, 1),
		"more than allowed": access(0, 0, MaxData+1),
	} {
		if flags, errno, _ := ask(t, conn, command(2, commandRegionRead, 0, body)); flags&flagError == 0 || errno != syscall.EINVAL {
			t.Errorf("%s: flags %#x, %v", name, flags, errno)
		}
	}
	if _, errno, _ := ask(t, conn, command(4, commandIRQInfo, 0, words(16, 0, irqs, 0))); errno != syscall.EINVAL {
		t.Errorf("interrupts of index %d: %v", irqs, errno)
	}
	if _, errno, _ := ask(t, conn, command(3, 99, 0, nil)); errno != syscall.EINVAL {
		t.Errorf("an unknown command: %v", errno)
	}
}

// QEMU maps memory with descriptors and unmaps what it never mapped.
func TestMappingsAreTakenAndTheirDescriptorsClosed(t *testing.T) {
	t.Parallel()
	conn := dial(t, &memory{})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // only read from
	if _, _, err := conn.WriteMsgUnix(command(2, commandDMAMap, 0, make([]byte, 32)), syscall.UnixRights(int(w.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	w.Close() //nolint:errcheck // nothing was written
	if _, err := io.ReadFull(conn, make([]byte, headerSize)); err != nil {
		t.Fatal(err)
	}
	if _, errno, _ := ask(t, conn, command(3, commandDMAUnmap, 0, make([]byte, 24))); errno != 0 {
		t.Error(errno)
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the descriptor is still open: %v", err)
	}
}

func TestWhatIsMalformedEndsTheConnection(t *testing.T) {
	t.Parallel()
	long := command(2, commandInfo, 0, nil)
	binary.LittleEndian.PutUint32(long[4:], maxMessage+1)
	short := command(2, commandInfo, 0, nil)
	binary.LittleEndian.PutUint32(short[4:], headerSize-1)
	for name, message := range map[string][]byte{
		"too long":            long,
		"shorter than itself": short,
		"a reply":             command(2, commandInfo, flagReply, nil),
		"no body":             command(2, commandInfo, 0, nil),
		"data missing":        command(2, commandRegionWrite, 0, access(0, 0, 8, 1)),
		"half a mapping":      command(2, commandDMAMap, 0, make([]byte, 31)),
		"half an unmapping":   command(2, commandDMAUnmap, 0, make([]byte, 23)),
		"half an interrupt":   command(2, commandSetIRQs, 0, make([]byte, 19)),
		"version again":       command(2, commandVersion, 0, make([]byte, 5)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := dial(t, &memory{})
			if _, err := conn.Write(message); err != nil {
				t.Fatal(err)
			}
			if n, err := conn.Read(make([]byte, 1)); err == nil {
				t.Errorf("%d bytes of an answer", n)
			}
		})
	}
}

func TestASocketInUseIsNotTaken(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	first, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), path); err == nil {
		t.Error("taken from under a server")
	}
	first.SetUnlinkOnClose(false)
	first.Close() //nolint:errcheck // the next one tells
	second, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatalf("what an ended server left is in the way: %v", err)
	}
	second.Close() //nolint:errcheck // the test is over
}

func FuzzHandle(f *testing.F) {
	f.Add(command(1, commandVersion, 0, append(make([]byte, 4), "{}\x00"...)), true)
	f.Add(command(1, commandRegionRead, 0, access(0, 0, 4)), true)
	f.Add(command(1, commandRegionWrite, flagNoReply, access(8, 0, 4, 1, 2, 3, 4)), true)
	f.Add(command(1, commandRegionInfo, 0, append(words(32, 0, 7, 0), make([]byte, 16)...)), true)
	f.Add(command(1, commandIRQInfo, 0, words(16, 0, 3, 0)), true)
	f.Fuzz(func(t *testing.T, message []byte, agreed bool) {
		if len(message) < headerSize || len(message) > maxMessage {
			return
		}
		m := &memory{}
		s := session{device: m, agreed: agreed}
		reply, err := s.handle(message)
		if err != nil || reply == nil {
			return
		}
		if len(reply) < headerSize || int(binary.LittleEndian.Uint32(reply[4:])) != len(reply) || string(reply[:4]) != string(message[:4]) {
			t.Errorf("reply % x to % x", reply, message)
		}
	})
}
