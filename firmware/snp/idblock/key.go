package idblock

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// Layout of a public key and of a signature (AMD 56860, chapter 10). Numbers
// are little endian in fields wider than P-384 needs.
const (
	keySize       = 0x404
	signatureSize = 0x200
	offCurve      = 0x000
	offX          = 0x004
	offY          = 0x04C
	offR          = 0x000
	offS          = 0x048

	fieldSize = 72
	// scalarSize is what P-384 needs of a field.
	scalarSize = 48
	// curveP384 is the id of the only curve.
	curveP384 = 2
)

// maxKeyBytes bounds the PEM of a key.
const maxKeyBytes = 16 << 10

// KeyDigest is the digest of a key as reports carry it.
func KeyDigest(key *ecdsa.PublicKey) ([DigestSize]byte, error) {
	data, err := encodeKey(key)
	if err != nil {
		return [DigestSize]byte{}, err
	}
	return sha512.Sum384(data), nil
}

// ParsePrivateKey decodes the PEM of a P-384 key, in SEC 1 ("EC PRIVATE KEY")
// or PKCS #8 form. Its errors say nothing of the content.
func ParsePrivateKey(text []byte) (*ecdsa.PrivateKey, error) {
	if len(text) > maxKeyBytes {
		return nil, fmt.Errorf("%w: the key is larger than %d bytes", ErrMalformed, maxKeyBytes)
	}
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return nil, fmt.Errorf("%w: no unencrypted EC private key in PEM", ErrMalformed)
		}
		var key any
		var err error
		switch block.Type {
		case "EC PARAMETERS": // openssl ecparam writes them in front
			continue
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		default:
			continue
		}
		ec, ok := key.(*ecdsa.PrivateKey)
		if err != nil || !ok || ec.Curve != elliptic.P384() {
			return nil, fmt.Errorf("%w: not a private key on P-384", ErrMalformed)
		}
		return ec, nil
	}
}

// encodeKey lays a public key out.
func encodeKey(key *ecdsa.PublicKey) ([]byte, error) {
	if key.Curve != elliptic.P384() {
		return nil, errors.New("the key is not on P-384")
	}
	point, err := key.Bytes() // 4, X, Y, big endian
	if err != nil {
		return nil, err
	}
	data := make([]byte, keySize)
	binary.LittleEndian.PutUint32(data[offCurve:], curveP384)
	putScalar(data[offX:], point[1:1+scalarSize])
	putScalar(data[offY:], point[1+scalarSize:])
	return data, nil
}

// decodeKey reads a laid out public key; one that is not on the curve is
// refused.
func decodeKey(data []byte) (*ecdsa.PublicKey, error) {
	if id := binary.LittleEndian.Uint32(data[offCurve:]); id != curveP384 {
		return nil, fmt.Errorf("%w: curve %d of a key is not supported, want %d", ErrMalformed, id, curveP384)
	}
	if !zero(data[offY+fieldSize:]) {
		return nil, fmt.Errorf("%w: bytes behind a key are not zero", ErrMalformed)
	}
	x, errX := scalar(data[offX:])
	y, errY := scalar(data[offY:])
	if err := errors.Join(errX, errY); err != nil {
		return nil, err
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), slices.Concat([]byte{4}, x, y))
	if err != nil {
		return nil, fmt.Errorf("%w: a key is no point of P-384", ErrMalformed)
	}
	return key, nil
}

// sign signs data; the outcome is laid out.
func sign(key *ecdsa.PrivateKey, data []byte) ([]byte, error) {
	sum := sha512.Sum384(data)
	der, err := key.Sign(nil, sum[:], crypto.SHA384) // no randomness: deterministic
	if err != nil {
		return nil, err
	}
	var rs struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &rs); err != nil {
		return nil, fmt.Errorf("decoding signature: %w", err)
	}
	out := make([]byte, signatureSize)
	putScalar(out[offR:], rs.R.FillBytes(make([]byte, scalarSize)))
	putScalar(out[offS:], rs.S.FillBytes(make([]byte, scalarSize)))
	return out, nil
}

// signedData is data with a signature over it.
type signedData struct {
	key  *ecdsa.PublicKey
	r, s *big.Int
	data []byte
}

// decodeSigned reads a laid out key and signature.
func decodeSigned(key, signature, data []byte) (signedData, error) {
	public, err := decodeKey(key)
	if err != nil {
		return signedData{}, err
	}
	if !zero(signature[offS+fieldSize:]) {
		return signedData{}, fmt.Errorf("%w: bytes behind a signature are not zero", ErrMalformed)
	}
	r, errR := scalar(signature[offR:])
	s, errS := scalar(signature[offS:])
	if err := errors.Join(errR, errS); err != nil {
		return signedData{}, err
	}
	return signedData{public, new(big.Int).SetBytes(r), new(big.Int).SetBytes(s), data}, nil
}

func (d signedData) holds() bool {
	sum := sha512.Sum384(d.data)
	return ecdsa.Verify(d.key, sum[:], d.r, d.s)
}

// putScalar writes a big-endian number of scalarSize bytes into a field.
func putScalar(field, number []byte) {
	copy(field, number)
	slices.Reverse(field[:scalarSize])
}

// scalar reads a field as a big-endian number of scalarSize bytes.
func scalar(field []byte) ([]byte, error) {
	if !zero(field[scalarSize:fieldSize]) {
		return nil, fmt.Errorf("%w: a number does not fit P-384", ErrMalformed)
	}
	number := slices.Clone(field[:scalarSize])
	slices.Reverse(number)
	return number, nil
}
