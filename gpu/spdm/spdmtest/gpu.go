package spdmtest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/gpu/spdm"
)

// Mode is what a GPU was switched to before its guest began.
type Mode int

// Modes.
const (
	// On is CC mode of a single GPU.
	On Mode = iota
	// DevTools is CC mode that can be debugged. The transcript has no field
	// for it: the GPU measures other firmware states.
	DevTools
	// ProtectedPCIe is that of eight GPUs of Hopper with their NVSwitches.
	ProtectedPCIe
	// MultiPassthrough is CC mode of several GPUs of Blackwell, whose NVLinks
	// are encrypted.
	MultiPassthrough
)

// Config is what a GPU is. Everything but PDI has a sensible zero value.
type Config struct {
	// Chip is "GH100" (the zero value), "GB100", "GB110" or "GB202".
	Chip string
	PDI  spdm.PDI
	Mode Mode
	// Driver is the version in the guest, VBIOS that on the board.
	Driver, VBIOS string
	// Switches are those a GPU in ProtectedPCIe sees, at most 18.
	Switches []spdm.PDI
}

// GPU is one that can be asked.
type GPU struct {
	Config
	// Certificates are its chain in PEM, leaf first.
	Certificates []byte
	// Measurements are what it will sign; Measurements(Config.Chip) where its
	// firmware is production firmware that nobody debugs.
	Measurements []spdm.Digest

	key  *ecdsa.PrivateKey
	fwid spdm.Digest
}

// chipHopper is the chip of all boards of Hopper; those of Blackwell begin
// with "GB".
const chipHopper = "GH100"

const (
	measurements = 64
	// FirstDriver is the first measurement that a driver's manifest speaks of.
	FirstDriver = 1
	// FirstVBIOS is the first that a VBIOS' manifest speaks of, to the last.
	FirstVBIOS = 40
	// debugged is the first measurement that differs in a GPU with DevTools.
	debugged = 9
)

// Measurements are those of production firmware of a chip.
func Measurements(chip string) []spdm.Digest {
	out := make([]spdm.Digest, measurements)
	for i := FirstDriver; i < measurements; i++ {
		out[i] = sha512.Sum384(fmt.Appendf(nil, "%s firmware of %s, measurement %d", emulated, chip, i))
	}
	return out
}

// NewGPU certifies a GPU and starts it.
func (a *Authority) NewGPU(c Config) (*GPU, error) {
	if c.Chip == "" {
		c.Chip = chipHopper
	}
	if c.Driver == "" {
		c.Driver = "595.71.05"
	}
	if c.VBIOS == "" {
		c.VBIOS = "96.00.9F.00.04"
	}
	g := &GPU{Config: c, Measurements: Measurements(c.Chip)}
	if c.Mode == DevTools {
		for i := debugged; i < debugged+3; i++ {
			g.Measurements[i] = sha512.Sum384([]byte("debugged"))
		}
	}
	g.fwid = sha512.Sum384([]byte(emulated + " firmware of " + c.Chip))
	extension, err := firmwareID(c.Chip, g.fwid)
	if err != nil {
		return nil, err
	}
	g.Certificates, g.key, err = a.chain(c.Chip, c.PDI, extension)
	return g, err
}

// fwid is DICE's FWID: the hash algorithm and the digest.
type fwid struct {
	Algorithm asn1.ObjectIdentifier
	Digest    []byte
}

// firmwareID is the leaf's extension: Hopper's has the FWID beside a key,
// Blackwell's in the list of its TcbInfo (TCG DICE Attestation Architecture
// 1.1, section 6.1).
func firmwareID(chip string, digest spdm.Digest) (*pkix.Extension, error) {
	id := fwid{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}, digest[:]}
	if chip == chipHopper {
		value, err := asn1.Marshal(struct {
			Version int
			Key     struct{ Algorithm, Curve asn1.ObjectIdentifier }
			FWID    fwid
		}{1, struct{ Algorithm, Curve asn1.ObjectIdentifier }{asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}, asn1.ObjectIdentifier{1, 3, 132, 0, 34}}, id})
		if err != nil {
			return nil, fmt.Errorf("encoding FWID: %w", err)
		}
		return &pkix.Extension{Id: asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1}, Value: value}, nil
	}
	list, err := asn1.MarshalWithParams([]fwid{id}, "tag:6")
	if err != nil {
		return nil, fmt.Errorf("encoding FWID: %w", err)
	}
	value, err := asn1.Marshal(struct {
		Vendor string `asn1:"utf8,tag:0"`
		FWIDs  asn1.RawValue
	}{"NVIDIA", asn1.RawValue{FullBytes: list}})
	if err != nil {
		return nil, fmt.Errorf("encoding TcbInfo: %w", err)
	}
	return &pkix.Extension{Id: asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1, 1}, Value: value}, nil
}

// Arch is the architecture as evidence names it.
func (g *GPU) Arch() string {
	if g.Chip == chipHopper {
		return contract.ArchHopper
	}
	return contract.ArchBlackwell
}

// Report answers a nonce with the transcript of GET_MEASUREMENTS (DMTF
// DSP0274 1.1): request, response and signature.
func (g *GPU) Report(nonce [contract.GPUNonceBytes]byte) ([]byte, error) {
	size := len(g.Measurements) * (7 + spdm.DigestSize)
	out := slices.Concat([]byte{0x11, 0xe0, 0x01, 0xff}, nonce[:], []byte{0},
		[]byte{0x11, 0x60, 0, 0, byte(len(g.Measurements)), byte(size), byte(size >> 8), byte(size >> 16)})
	for i, m := range g.Measurements {
		out = append(out, byte(i+1), 1, spdm.DigestSize+3, 0, 1, spdm.DigestSize, 0)
		out = append(out, m[:]...)
	}
	own := make([]byte, spdm.NonceSize)
	if _, err := rand.Read(own); err != nil {
		return nil, fmt.Errorf("choosing a nonce: %w", err)
	}
	opaque, err := g.opaque()
	if err != nil {
		return nil, err
	}
	out = append(out, own...)
	out = append(binary.LittleEndian.AppendUint16(out, uint16(len(opaque))), opaque...)
	digest := sha512.Sum384(out)
	r, s, err := ecdsa.Sign(rand.Reader, g.key, digest[:])
	if err != nil {
		return nil, fmt.Errorf("signing GPU report: %w", err)
	}
	half := elliptic.P384().Params().BitSize / 8
	return append(append(out, r.FillBytes(make([]byte, half))...), s.FillBytes(make([]byte, half))...), nil
}

// opaque are the fields in the order of captured transcripts.
func (g *GPU) opaque() ([]byte, error) {
	vbios, err := hex.DecodeString(strings.ReplaceAll(g.VBIOS, ".", ""))
	if err != nil || len(vbios) != 5 {
		return nil, fmt.Errorf("VBIOS %q is not of the form 96.00.9F.00.04", g.VBIOS)
	}
	slices.Reverse(vbios[:4])
	fields := []struct {
		kind  uint16
		value []byte
	}{
		{6, append(vbios, 0, 0, 0)},
		{15, []byte("886\x00")},
		{17, []byte("1010\x00")},
		{18, []byte("0210\x00")},
		{3, []byte(g.Driver + "\x00")},
		{11, []byte{0x55}},
		{20, g.fwid[:]},
		{21, []byte{0x55}},
	}
	feature := map[Mode]uint16{MultiPassthrough: 1, ProtectedPCIe: 2}[g.Mode]
	if g.Mode == ProtectedPCIe {
		fields[len(fields)-1].value = []byte{0xaa}
		var switches bytes.Buffer
		for i := range 18 {
			var pdi spdm.PDI
			if i < len(g.Switches) {
				pdi = g.Switches[i]
			}
			switches.Write(binary.LittleEndian.AppendUint64(nil, uint64(pdi)))
		}
		fields = append(fields, struct {
			kind  uint16
			value []byte
		}{22, switches.Bytes()})
	}
	if g.Chip != chipHopper || feature != 0 {
		fields = append(fields, struct {
			kind  uint16
			value []byte
		}{36, binary.LittleEndian.AppendUint16(nil, feature)})
	}
	var out []byte
	for _, f := range fields {
		out = binary.LittleEndian.AppendUint16(out, f.kind)
		out = append(binary.LittleEndian.AppendUint16(out, uint16(len(f.value))), f.value...)
	}
	return out, nil
}

// Evidence is what a guest hands out for its GPUs under a nonce.
func Evidence(nonce [contract.GPUNonceBytes]byte, gpus ...*GPU) ([]byte, error) {
	var list []contract.GPUEvidence
	for _, g := range gpus {
		e, err := g.Evidence(nonce)
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return contract.EncodeGPUEvidence(list)
}

// Evidence is this GPU's element of a guest's evidence.
func (g *GPU) Evidence(nonce [contract.GPUNonceBytes]byte) (contract.GPUEvidence, error) {
	report, err := g.Report(nonce)
	return contract.GPUEvidence{Arch: g.Arch(), Nonce: hex.EncodeToString(nonce[:]), Report: report, Certificates: g.Certificates}, err
}
