// Package spdm reads and checks what an NVIDIA GPU says about itself: the
// transcript of one SPDM GET_MEASUREMENTS exchange (DMTF DSP0274 1.1), signed
// by the GPU with a key whose certificates lead to NVIDIA.
//
// Pure. It decides nothing about firmware being good: comparing measurements
// with NVIDIA's reference values is gpu/rim's.
package spdm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// Sizes of the parts of a transcript. Only what NVIDIA's firmware of Hopper
// and Blackwell sends is read: 48-byte digests (SHA-384), ECDSA P-384.
const (
	NonceSize     = 32
	DigestSize    = 48
	SignatureSize = 96
	// MaxReportBytes bounds a transcript.
	MaxReportBytes = 64 << 10

	requestSize  = 4 + NonceSize + 1
	responseHead = 8
	blockSize    = 7 + DigestSize
	// maxBlocks is the highest index the standard has for measurements, 0xEF.
	maxBlocks = 0xef
)

// Digest is one measurement.
type Digest [DigestSize]byte

// Report is a transcript whose form holds. Nothing in it is believed before
// Verify.
type Report struct {
	// Nonce is the requester's, which the GPU answered.
	Nonce [NonceSize]byte
	// ResponderNonce is the GPU's own and binds nothing.
	ResponderNonce [NonceSize]byte
	// Measurements by index, from 0 as reference manifests count; SPDM counts
	// them from 1.
	Measurements []Digest
	Opaque       Opaque

	signed    []byte
	signature []byte
}

// Parse reads a transcript: request and response, as the driver hands it out.
// Any other version, size, slot or order than the known one is refused.
func Parse(data []byte) (*Report, error) {
	if len(data) > MaxReportBytes {
		return nil, fmt.Errorf("GPU report: %d bytes, at most %d are read", len(data), MaxReportBytes)
	}
	if len(data) < requestSize+responseHead+NonceSize+2+SignatureSize {
		return nil, fmt.Errorf("GPU report: %d bytes are too few for a GET_MEASUREMENTS exchange", len(data))
	}
	r := &Report{}
	rest := data
	if err := r.request(rest[:requestSize]); err != nil {
		return nil, err
	}
	rest, err := r.blocks(rest[requestSize:])
	if err != nil {
		return nil, err
	}
	if len(rest) < NonceSize+2+SignatureSize {
		return nil, errors.New("GPU report: it ends within the measurements")
	}
	copy(r.ResponderNonce[:], rest)
	rest = rest[NonceSize:]
	size := int(binary.LittleEndian.Uint16(rest))
	if rest = rest[2:]; len(rest) != size+SignatureSize {
		return nil, fmt.Errorf("GPU report: %d bytes follow the nonce, not %d of opaque data and %d of signature", len(rest), size, SignatureSize)
	}
	if r.Opaque, err = parseOpaque(rest[:size]); err != nil {
		return nil, err
	}
	r.signed, r.signature = data[:len(data)-SignatureSize], rest[size:]
	return r, nil
}

// request is GET_MEASUREMENTS: version 1.1, signature wanted, all blocks.
func (r *Report) request(data []byte) error {
	if !bytes.Equal(data[:4], []byte{0x11, 0xe0, 0x01, 0xff}) {
		return fmt.Errorf("GPU report: it starts with % x, not with an SPDM 1.1 request for all signed measurements", data[:4])
	}
	if slot := data[requestSize-1]; slot != 0 {
		return fmt.Errorf("GPU report: certificate slot %d was asked for, only 0 is known", slot)
	}
	copy(r.Nonce[:], data[4:])
	return nil
}

// blocks reads the head of MEASUREMENTS and every block.
func (r *Report) blocks(data []byte) ([]byte, error) {
	if !bytes.Equal(data[:4], []byte{0x11, 0x60, 0, 0}) {
		return nil, fmt.Errorf("GPU report: the answer starts with % x, not with SPDM 1.1 MEASUREMENTS", data[:4])
	}
	count := int(data[4])
	size := int(data[5]) | int(data[6])<<8 | int(data[7])<<16
	if count == 0 || count > maxBlocks || size != count*blockSize {
		return nil, fmt.Errorf("GPU report: %d measurements in %d bytes, want 1 to %d of %d each", count, size, maxBlocks, blockSize)
	}
	if data = data[responseHead:]; len(data) < size {
		return nil, errors.New("GPU report: it ends within the measurements")
	}
	for i := range count {
		block := data[i*blockSize:][:blockSize]
		// Index, DMTF specification, size; value type with bit 7 for values
		// that are no digests, size.
		if block[0] != byte(i+1) || block[1] != 1 || binary.LittleEndian.Uint16(block[2:]) != blockSize-4 ||
			block[4]&0x80 != 0 || binary.LittleEndian.Uint16(block[5:]) != DigestSize {
			return nil, fmt.Errorf("GPU report: measurement %d has the head % x, want a SHA-384 digest in DMTF form", i+1, block[:7])
		}
		r.Measurements = append(r.Measurements, Digest(block[7:]))
	}
	return data[size:], nil
}
