// Package psp plays AMD's security processor for guests that run under
// software emulation, as swtpm plays a TPM: a process of its own that measures
// what QEMU was really given and signs reports with a chain whose names say
// EMULATED. QEMU connects to its socket at start; the process behind the
// connection is found by its credentials, and its command line, not the
// agent's plan, is what is measured.
//
// Nothing it signs is evidence of anything. Framing on the socket, both ways:
// a big-endian uint32 length, then that many bytes of JSON (64 KiB at most).
package psp

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
)

// Fault is a way the PSP misbehaves on request.
type Fault string

// Faults.
const (
	FaultNone             Fault = ""
	FaultWrongMeasurement Fault = "wrong-measurement"
	FaultWrongHostData    Fault = "wrong-host-data"
	FaultBadSignature     Fault = "bad-signature"
	FaultSilent           Fault = "silent"
)

// maxFrame bounds a request.
const maxFrame = 64 << 10

// Processor the reports name: Genoa, whose TCB layout is used.
const family, model, stepping = 0x19, 0x11, 1

// Config of a PSP.
type Config struct {
	// TCB is put in all four TCB fields and in the VCEK.
	TCB contract.TCB
	// PolicyOverride replaces the launch's policy when not 0.
	PolicyOverride uint64
	// Fault as wished.
	Fault  Fault
	Logger hclog.Logger
}

// PSP signs reports of one emulated chip.
type PSP struct {
	cfg   Config
	chain *snptest.Chain
	chip  [64]byte
	tcb   uint64
	root  string // of the file system /proc is read from
}

// New makes a chip with a fresh identity and its certificate chain.
func New(cfg Config) (*PSP, error) {
	if !slices.Contains([]Fault{FaultNone, FaultWrongMeasurement, FaultWrongHostData, FaultBadSignature, FaultSilent}, cfg.Fault) {
		return nil, fmt.Errorf("fault %q is not known", cfg.Fault)
	}
	p := &PSP{cfg: cfg, root: "/"}
	if _, err := rand.Read(p.chip[:]); err != nil {
		return nil, err
	}
	var err error
	if p.chain, err = snptest.NewChain(snptest.ProductEmulated, cfg.TCB, p.chip[:], time.Now()); err != nil {
		return nil, err
	}
	p.tcb = snp.GenoaTCB(cfg.TCB)
	return p, nil
}

// WriteEndorsements writes vcek.der, ask.der and ark.der as the agent reads
// them, and root.pem for verifiers that are told to accept it.
func (p *PSP) WriteEndorsements(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		"vcek.der": p.chain.VCEK, "ask.der": p.chain.ASK, "ark.der": p.chain.ARK,
		"root.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.chain.ARK}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil { //nolint:gosec // certificates are public
			return fmt.Errorf("writing endorsements: %w", err)
		}
	}
	return nil
}

// Serve answers on the listener until ctx ends.
func (p *PSP) Serve(ctx context.Context, listener *net.UnixListener) error {
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	for {
		conn, err := listener.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accepting: %w", err)
		}
		go p.serve(ctx, conn)
	}
}

func (p *PSP) serve(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close() //nolint:errcheck // the guest is gone
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	launch, err := p.measurePeer(conn)
	if err != nil {
		p.cfg.Logger.Error("cannot measure what connected", "err", err)
		return
	}
	p.cfg.Logger.Info("measured a guest", "pid", launch.pid, "launch_digest", hex.EncodeToString(launch.digest[:]))
	in := bufio.NewReader(conn)
	for {
		if err := p.answer(in, conn, launch); err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				p.cfg.Logger.Warn("conversation ended", "pid", launch.pid, "err", err)
			}
			return
		}
	}
}

func (p *PSP) measurePeer(conn *net.UnixConn) (*launch, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	if credErr != nil {
		return nil, fmt.Errorf("asking who connected: %w", credErr)
	}
	return measureProcess(p.root, int(cred.Pid))
}

type request struct {
	ReportData []byte `json:"report_data"`
}

type response struct {
	Report []byte `json:"report,omitempty"`
	Error  string `json:"error,omitempty"`
}

func (p *PSP) answer(in io.Reader, out io.Writer, l *launch) error {
	var size [4]byte
	if _, err := io.ReadFull(in, size[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxFrame {
		return fmt.Errorf("request of %d bytes", n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(in, body); err != nil {
		return err
	}
	if p.cfg.Fault == FaultSilent {
		return nil
	}
	var req request
	var resp response
	if err := contract.UnmarshalStrict(body, maxFrame, &req); err != nil {
		resp.Error = err.Error()
	} else if resp.Report, err = p.Report(l, req.ReportData); err != nil {
		resp.Error = err.Error()
	}
	text, err := json.Marshal(resp)
	if err != nil {
		return err
	}
	binary.BigEndian.PutUint32(size[:], uint32(len(text)))
	_, err = out.Write(append(size[:], text...))
	return err
}

// Report signs a report of the launch over the caller's 64 bytes.
func (p *PSP) Report(l *launch, reportData []byte) ([]byte, error) {
	if len(reportData) != contract.ReportDataSize {
		return nil, fmt.Errorf("report data has %d bytes, want %d", len(reportData), contract.ReportDataSize)
	}
	r := &snp.Report{
		Version: 3, Policy: snp.Policy(l.policy), SigAlgo: 1, Family: family, Model: model, Stepping: stepping,
		CurrentTCB: p.tcb, ReportedTCB: p.tcb, CommittedTCB: p.tcb, LaunchTCB: p.tcb,
		ReportData: [contract.ReportDataSize]byte(reportData), Measurement: l.digest, HostData: l.hostData, ChipID: p.chip,
		ReportIDMA: [32]byte(bytes.Repeat([]byte{0xFF}, 32)),
	}
	if _, err := rand.Read(r.ReportID[:]); err != nil {
		return nil, err
	}
	if p.cfg.PolicyOverride != 0 {
		r.Policy = snp.Policy(p.cfg.PolicyOverride)
	}
	switch p.cfg.Fault {
	case FaultWrongMeasurement:
		r.Measurement[0] ^= 1
	case FaultWrongHostData:
		r.HostData[0] ^= 1
	case FaultNone, FaultBadSignature, FaultSilent:
	}
	report, err := snptest.Sign(r.Marshal(), p.chain.Key)
	if err == nil && p.cfg.Fault == FaultBadSignature {
		report[snp.ReportSize-400] ^= 1
	}
	return report, err
}
