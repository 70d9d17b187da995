package vfiouser

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
)

// Serve answers clients of listener, one after the other as QEMU connects,
// until ctx ends. It closes listener.
func Serve(ctx context.Context, listener *net.UnixListener, device Device) error {
	return Accept(ctx, listener, func(conn *net.UnixConn) error {
		if err := serve(ctx, conn, device); err != nil && !errors.Is(err, errMalformed) {
			return err
		}
		return nil
	})
}

// Accept hands each client of listener to take until ctx ends or take fails.
// It closes listener.
func Accept(ctx context.Context, listener *net.UnixListener, take func(*net.UnixConn) error) error {
	stop := context.AfterFunc(ctx, func() { listener.Close() }) //nolint:errcheck // Accept tells
	defer stop()
	for {
		conn, err := listener.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if err := take(conn); err != nil {
			return err
		}
	}
}

// serve answers one client until it goes.
func serve(ctx context.Context, conn *net.UnixConn, device Device) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() }) //nolint:errcheck // reading ends
	defer stop()
	defer conn.Close() //nolint:errcheck // each answer was written
	s := session{device: device}
	for {
		message, err := receive(conn)
		if err != nil {
			if errors.Is(err, errMalformed) {
				return err
			}
			return nil // the client went
		}
		reply, err := s.handle(message)
		if err != nil {
			return err
		}
		if reply == nil {
			continue
		}
		if _, err := conn.Write(reply); err != nil {
			return nil
		}
	}
}

// receive reads one message. Descriptors that come along (of memory that the
// device could reach by DMA) are closed.
func receive(conn *net.UnixConn) ([]byte, error) {
	head, oob := make([]byte, headerSize), make([]byte, syscall.CmsgSpace(4*16))
	n, oobn, _, _, err := conn.ReadMsgUnix(head, oob)
	drop(oob[:oobn])
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	if _, err := io.ReadFull(conn, head[n:]); err != nil {
		return nil, err
	}
	h, err := parseHeader(head)
	if err != nil {
		return nil, err
	}
	message := make([]byte, h.size)
	copy(message, head)
	_, err = io.ReadFull(conn, message[headerSize:])
	return message, err
}

func drop(oob []byte) {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	for _, m := range messages {
		files, err := syscall.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, f := range files {
			syscall.Close(f) //nolint:errcheck // nothing was written
		}
	}
}

// session is what one connection has agreed on.
type session struct {
	device Device
	agreed bool
}

// handle carries out one message and returns the reply, nothing when none is
// wanted. Errors end the connection.
func (s *session) handle(message []byte) ([]byte, error) {
	h, err := parseHeader(message)
	if err != nil {
		return nil, err
	}
	if s.agreed == (h.command == commandVersion) {
		return nil, fmt.Errorf("%w: command %d out of turn", errMalformed, h.command)
	}
	payload, err := s.execute(h.command, message[headerSize:])
	if errors.Is(err, errMalformed) {
		return nil, err
	}
	if h.flags&flagNoReply != 0 {
		return nil, nil
	}
	return answer(h, payload, err), nil
}

func (s *session) execute(command uint16, body []byte) ([]byte, error) {
	switch command {
	case commandVersion:
		return s.version(body)
	case commandInfo:
		const reset, pci = 1 << 0, 1 << 1
		return words(16, reset|pci, Regions, irqs), sized(body, 16)
	case commandRegionInfo:
		return s.regionInfo(body)
	case commandIRQInfo:
		if err := sized(body, 16); err != nil {
			return nil, err
		}
		index := binary.LittleEndian.Uint32(body[8:])
		if index >= irqs {
			return nil, syscall.EINVAL
		}
		return words(16, 0, index, 0), nil
	case commandSetIRQs:
		return nil, sized(body, 20)
	case commandDMAMap:
		return nil, sized(body, 32)
	case commandDMAUnmap:
		return body, sized(body, 24)
	case commandRegionRead:
		return s.read(body)
	case commandRegionWrite:
		return s.write(body)
	case commandReset:
		return nil, s.device.Reset()
	}
	return nil, syscall.EINVAL
}

func sized(body []byte, size int) error {
	if len(body) < size {
		return fmt.Errorf("%w: %d bytes where %d are due", errMalformed, len(body), size)
	}
	return nil
}

func (s *session) version(body []byte) ([]byte, error) {
	if err := sized(body, 4); err != nil {
		return nil, err
	}
	if major := binary.LittleEndian.Uint16(body); major != 0 {
		return nil, syscall.ENOTSUP
	}
	s.agreed = true
	capabilities := fmt.Sprintf(`{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":%d}}`, MaxData)
	return append(make([]byte, 4), capabilities+"\x00"...), nil
}

func (s *session) regionInfo(body []byte) ([]byte, error) {
	if err := sized(body, 32); err != nil {
		return nil, err
	}
	index := binary.LittleEndian.Uint32(body[8:])
	if index >= Regions {
		return nil, syscall.EINVAL
	}
	const read, write = 1 << 0, 1 << 1
	size, flags := s.device.Region(int(index)), uint32(0)
	if size > 0 {
		flags = read | write
	}
	out := words(32, flags, index, 0)
	out = binary.LittleEndian.AppendUint64(out, size)
	return binary.LittleEndian.AppendUint64(out, 0), nil
}

// access is the part that reads and writes of a region share.
func (s *session) access(body []byte) (index int, offset uint64, count int, err error) {
	if err := sized(body, 16); err != nil {
		return 0, 0, 0, err
	}
	offset = binary.LittleEndian.Uint64(body)
	region, length := binary.LittleEndian.Uint32(body[8:]), binary.LittleEndian.Uint32(body[12:])
	if region >= Regions || length > MaxData {
		return 0, 0, 0, syscall.EINVAL
	}
	size := s.device.Region(int(region))
	if offset > size || uint64(length) > size-offset {
		return 0, 0, 0, syscall.EINVAL
	}
	return int(region), offset, int(length), nil
}

func (s *session) read(body []byte) ([]byte, error) {
	index, offset, count, err := s.access(body)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 16+count)
	copy(out, body[:16])
	return out, s.device.Read(index, offset, out[16:])
}

func (s *session) write(body []byte) ([]byte, error) {
	index, offset, count, err := s.access(body)
	if err != nil {
		return nil, err
	}
	if len(body) != 16+count {
		return nil, fmt.Errorf("%w: %d bytes of data where %d are announced", errMalformed, len(body)-16, count)
	}
	return body[:16], s.device.Write(index, offset, body[16:])
}

// Listen listens on a socket of this path; one that an ended server left is replaced.
func Listen(ctx context.Context, path string) (*net.UnixListener, error) {
	if conn, err := new(net.Dialer).DialContext(ctx, "unix", path); err == nil {
		conn.Close() //nolint:errcheck // nothing was written
		return nil, fmt.Errorf("vfiouser: somebody serves %s already", path)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		if err := syscall.Unlink(path); err != nil {
			return nil, err
		}
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil && strings.Contains(err.Error(), "invalid argument") {
		return nil, fmt.Errorf("%w (a socket's path has at most 107 bytes)", err)
	}
	return listener, err
}
