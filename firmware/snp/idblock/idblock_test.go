package idblock

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"slices"
	"strings"
	"testing"
)

func unhex(tb testing.TB, text string) []byte {
	tb.Helper()
	data, err := hex.DecodeString(text)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

// reversed is a number as the firmware lays it out, without its padding.
func reversed(tb testing.TB, text string) []byte {
	tb.Helper()
	data := unhex(tb, text)
	slices.Reverse(data)
	return data
}

// The key, and its signature of "sample", of RFC 6979 A.2.6 (P-384, SHA-384).
const (
	rfcScalar = "6b9d3dad2e1b8c1c05b19875b6659f4de23c3b667bf297ba9aa47740787137d896d5724e4c70a825f872c9ea60d2edf5"
	rfcX      = "ec3a4e415b4e19a4568618029f427fa5da9a8bc4ae92e02e06aae5286b300c64def8f0ea9055866064a254515480bc13"
	rfcY      = "8015d9b72d7d57244ea8ef9ac0c621896708a59367f9dfb9f54ca84b3f1c9db1288b231c3ae0d4fe7344fd2533264720"
	rfcR      = "94edbb92a5ecb8aad4736e56c691916b3f88140666ce9fa73d64c4ea95ad133c81a648152e44acf96e36dd1e80fabe46"
	rfcS      = "99ef4aeb15f178cea1fe40db2603138f130e740a19624526203b6351d0a3a94fa329c145786e679e7b82c71a38628ac8"
)

func rfcKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P384(), unhex(tb, rfcScalar))
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// Vector of sev-snp-measure's tests: names zero, SVN 0, policy 0x30000.
const (
	vectorDigest = "B28FLQi9p6cAqipgjFyqawDrrSl7bWioWkWx5mmlWLZ+G5HShKMB/mPE+gdQRn7t"
	vectorBlock  = vectorDigest + "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABAAAAAAAAAAAAAwAAAAAA"
)

func vector(tb testing.TB) Block {
	tb.Helper()
	digest, err := base64.StdEncoding.DecodeString(vectorDigest)
	if err != nil {
		tb.Fatal(err)
	}
	return Block{LaunchDigest: [DigestSize]byte(digest), Policy: 0x30000}
}

func TestBlockIsTheVector(t *testing.T) {
	t.Parallel()
	if got := base64.StdEncoding.EncodeToString(vector(t).Marshal()); got != vectorBlock {
		t.Errorf("block is %s, want %s", got, vectorBlock)
	}
}

func TestEveryFieldOfABlockHasItsPlace(t *testing.T) {
	t.Parallel()
	b := Block{GuestSVN: 0x04030201, Policy: 0x0807060504030201}
	for i := range b.LaunchDigest {
		b.LaunchDigest[i] = byte(i + 1)
	}
	copy(b.FamilyID[:], "family-id-0123456")
	copy(b.ImageID[:], "image-id-0123456")
	want := slices.Concat(b.LaunchDigest[:], []byte("family-id-012345"), []byte("image-id-0123456"),
		[]byte{1, 0, 0, 0}, []byte{1, 2, 3, 4}, []byte{1, 2, 3, 4, 5, 6, 7, 8})
	if got := b.Marshal(); !bytes.Equal(got, want) {
		t.Errorf("block is\n%x, want\n%x", got, want)
	}
	if again, err := ParseBlock(b.Marshal()); err != nil || again != b {
		t.Errorf("decoded %+v, %v", again, err)
	}
}

// Vectors of sev-snp-measure's tests.
func TestKeyDigestsAreTheVectors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ x, y, want string }{
		{
			"b20fd1a1c2bd2b65183a76e2390ac805f6d8e5e2af725e5a8e93cf87ec029f9d45eb326b04b92beb714e14fa986f8a9a",
			"2c94a0b8ab30cc76352675944876891e954ff6ef5826a6231ba6d6d7f6ebfb68ce330e1e59394efb7080883ddc69364b",
			"870b7e35c53f8a72d0d322f75ab2af8262792aaf6579622ce4131c3f21f289e77cb0560a5e3b90b3932e674ec709cb14",
		},
		{
			"06811fc62409bf2d9ae51c07423254d893c6c23fbf164af3383b0f813a627e6168d9067a7f4bd97990588c18411210a0",
			"32b420a22656d271dcfd4e25668c72fd58bb5f6851fe472f9d160f880b14df4c3623068962cde4d608e737342da912c9",
			"63111c34bbfc0a4938f9a009bd074980d8172323e61599c9fd336da8673248e1dca98d0be8f76376a106b8afd4c0a057",
		},
	} {
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), slices.Concat([]byte{4}, unhex(t, c.x), unhex(t, c.y)))
		if err != nil {
			t.Fatal(err)
		}
		if digest, err := KeyDigest(key); err != nil || hex.EncodeToString(digest[:]) != c.want {
			t.Errorf("digest is %x (%v), want %s", digest, err, c.want)
		}
	}
}

func TestASignatureIsTheStandardsLaidOutLittleEndian(t *testing.T) {
	t.Parallel()
	got, err := sign(rfcKey(t), []byte("sample"))
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 512)
	copy(want, reversed(t, rfcR))
	copy(want[72:], reversed(t, rfcS))
	if !bytes.Equal(got, want) {
		t.Errorf("signature is\n%x, want\n%x", got, want)
	}
}

func TestIDAuthHasEverythingInItsPlace(t *testing.T) {
	t.Parallel()
	author := newKey(t)
	s, err := Sign(vector(t), rfcKey(t), author)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.RawAuth) != 4096 || base64.StdEncoding.EncodeToString(s.RawBlock) != vectorBlock {
		t.Errorf("ID auth has %d bytes, the block is %x", len(s.RawAuth), s.RawBlock)
	}
	at := func(what string, offset int, want []byte) {
		t.Helper()
		if got := s.RawAuth[offset : offset+len(want)]; !bytes.Equal(got, want) {
			t.Errorf("%s at %#x is %x, want %x", what, offset, got, want)
		}
	}
	at("algorithms and reserved", 0, append([]byte{1, 0, 0, 0, 1, 0, 0, 0}, make([]byte, 56)...))
	at("curve of the ID key", 0x240, []byte{2, 0, 0, 0})
	at("X", 0x244, append(reversed(t, rfcX), make([]byte, 24)...))
	at("Y", 0x28C, append(reversed(t, rfcY), make([]byte, 24)...))
	at("rest of the ID key, and reserved", 0x2D4, make([]byte, 0x680-0x2D4))
	at("curve of the author key", 0x880, []byte{2, 0, 0, 0})
	at("the end", 0x914, make([]byte, 0x1000-0x914))
	for what, c := range map[string]struct {
		key               *ecdsa.PublicKey
		data              []byte
		signature, offset int
		digest            [48]byte
	}{
		"ID key":     {&rfcKey(t).PublicKey, s.RawBlock, 0x040, 0x240, s.IDKeyDigest},
		"author key": {&author.PublicKey, s.RawAuth[0x240:0x644], 0x680, 0x880, s.AuthorKeyDigest},
	} {
		sum := sha512.Sum384(c.data)
		number := func(offset int) []byte {
			n := slices.Clone(s.RawAuth[c.signature+offset : c.signature+offset+72])
			slices.Reverse(n)
			return n
		}
		if !ecdsa.VerifyASN1(c.key, sum[:], der(number(0), number(72))) {
			t.Errorf("the signature by the %s does not hold", what)
		}
		if want := sha512.Sum384(s.RawAuth[c.offset : c.offset+1028]); c.digest != want {
			t.Errorf("digest of the %s is %x, want %x", what, c.digest, want)
		}
	}
}

// der is SEQUENCE { INTEGER r, INTEGER s } of two numbers of 72 bytes.
func der(r, s []byte) []byte {
	integer := func(n []byte) []byte {
		n = bytes.TrimLeft(n, "\x00")
		if n[0] >= 0x80 {
			n = append([]byte{0}, n...)
		}
		return append([]byte{2, byte(len(n))}, n...)
	}
	body := append(integer(r), integer(s)...)
	return append([]byte{0x30, byte(len(body))}, body...)
}

func TestTheSameInputsGiveTheSameBytes(t *testing.T) {
	t.Parallel()
	id, author := newKey(t), newKey(t)
	one, err := Sign(vector(t), id, author)
	if err != nil {
		t.Fatal(err)
	}
	two, err := Sign(vector(t), id, author)
	if err != nil || !bytes.Equal(one.RawAuth, two.RawAuth) {
		t.Errorf("two signatures differ (%v)", err)
	}
}

func TestWithoutAnAuthorThereIsNothingOfOne(t *testing.T) {
	t.Parallel()
	s, err := Sign(vector(t), newKey(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	if s.HasAuthorKey || s.AuthorKeyDigest != [48]byte{} || !zero(s.RawAuth[4:0x40]) || !zero(s.RawAuth[0x680:]) {
		t.Errorf("something of an author key is in %+v", s)
	}
	if _, err := Sign(vector(t), nil, newKey(t)); err == nil {
		t.Error("signed without an ID key")
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, keys := range [][2]*ecdsa.PrivateKey{{p256, nil}, {newKey(t), p256}} {
		if _, err := Sign(vector(t), keys[0], keys[1]); err == nil {
			t.Error("signed with a key on P-256")
		}
	}
}

// Not one bit of a pair is without meaning.
func TestEveryChangedByteIsRefused(t *testing.T) {
	t.Parallel()
	for name, author := range map[string]*ecdsa.PrivateKey{"with author key": newKey(t), "without": nil} {
		s, err := Sign(vector(t), newKey(t), author)
		if err != nil {
			t.Fatal(err)
		}
		pair := slices.Concat(s.RawBlock, s.RawAuth)
		for i := range pair {
			pair[i] ^= 1 << (i % 8)
			if _, err := Verify(pair[:BlockSize], pair[BlockSize:]); !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrSignature) {
				t.Errorf("%s, byte %#x changed: %v", name, i, err)
			}
			pair[i] ^= 1 << (i % 8)
		}
	}
}

func TestWhatIsNoPairIsRefused(t *testing.T) {
	t.Parallel()
	s, err := Sign(vector(t), newKey(t), newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	other, err := Sign(vector(t), newKey(t), newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(block, auth []byte) ([]byte, []byte)
		want   error
	}{
		"nothing":          {func(_, _ []byte) ([]byte, []byte) { return nil, nil }, ErrMalformed},
		"short block":      {func(b, a []byte) ([]byte, []byte) { return b[:95], a }, ErrMalformed},
		"long auth":        {func(b, a []byte) ([]byte, []byte) { return b, append(a, 0) }, ErrMalformed},
		"no auth":          {func(b, _ []byte) ([]byte, []byte) { return b, nil }, ErrMalformed},
		"zeros":            {func(_, _ []byte) ([]byte, []byte) { return make([]byte, BlockSize), make([]byte, AuthSize) }, ErrMalformed},
		"version 2":        {func(b, a []byte) ([]byte, []byte) { b[0x50] = 2; return b, a }, ErrMalformed},
		"another policy":   {func(b, a []byte) ([]byte, []byte) { b[0x58] ^= 1; return b, a }, ErrSignature},
		"another digest":   {func(b, a []byte) ([]byte, []byte) { b[0] ^= 1; return b, a }, ErrSignature},
		"another's author": {func(b, a []byte) ([]byte, []byte) { copy(a[0x680:], other.RawAuth[0x680:]); return b, a }, ErrSignature},
		"signature zero":   {func(b, a []byte) ([]byte, []byte) { clear(a[0x40:0x240]); return b, a }, ErrSignature},
		"number too wide":  {func(b, a []byte) ([]byte, []byte) { a[0x40+48] = 1; return b, a }, ErrMalformed},
		"key off curve":    {func(b, a []byte) ([]byte, []byte) { a[0x244] ^= 1; return b, a }, ErrMalformed},
		"key at infinity":  {func(b, a []byte) ([]byte, []byte) { clear(a[0x244:0x644]); return b, a }, ErrMalformed},
		"curve P-256":      {func(b, a []byte) ([]byte, []byte) { a[0x240] = 1; return b, a }, ErrMalformed},
		"author hidden":    {func(b, a []byte) ([]byte, []byte) { a[4] = 0; return b, a }, ErrMalformed},
	} {
		block, auth := c.change(slices.Clone(s.RawBlock), slices.Clone(s.RawAuth))
		if got, err := Verify(block, auth); !errors.Is(err, c.want) || got != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPrivateKeysAreReadInBothForms(t *testing.T) {
	t.Parallel()
	key := newKey(t)
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	parameters := block("EC PARAMETERS", unhex(t, "06052b81040022"))
	for name, text := range map[string][]byte{
		"SEC 1": block("EC PRIVATE KEY", sec1), "PKCS #8": block("PRIVATE KEY", pkcs8),
		"behind parameters": append(parameters, block("EC PRIVATE KEY", sec1)...),
	} {
		if got, err := ParsePrivateKey(text); err != nil || !got.Equal(key) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := x509.MarshalECPrivateKey(p256)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaDER, err := x509.MarshalPKCS8PrivateKey(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"nothing": nil, "raw DER": sec1, "P-256": block("EC PRIVATE KEY", other), "RSA": block("PRIVATE KEY", rsaDER),
		"encrypted": block("ENCRYPTED PRIVATE KEY", pkcs8), "public": block("PUBLIC KEY", pkcs8), "torn": block("EC PRIVATE KEY", sec1[:40]),
		"parameters alone": parameters, "too large": append(bytes.Repeat([]byte(" "), maxKeyBytes), block("PRIVATE KEY", pkcs8)...),
	} {
		_, err := ParsePrivateKey(text)
		if !errors.Is(err, ErrMalformed) || strings.Contains(err.Error(), "asn1") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whatever is accepted is what signing makes of it, byte for byte.
func FuzzVerify(f *testing.F) {
	for _, author := range []*ecdsa.PrivateKey{nil, rfcKey(f)} {
		s, err := Sign(vector(f), rfcKey(f), author)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(s.RawBlock, s.RawAuth)
	}
	f.Add(make([]byte, BlockSize), make([]byte, AuthSize))
	f.Fuzz(func(t *testing.T, block, auth []byte) {
		s, err := Verify(block, auth)
		if err != nil {
			if s != nil {
				t.Error("a pair and an error")
			}
			return
		}
		if !bytes.Equal(s.Block.Marshal(), block) || binary.LittleEndian.Uint32(auth) != 1 || s.HasAuthorKey == (s.AuthorKeyDigest == [48]byte{}) {
			t.Errorf("accepted as %+v", s)
		}
	})
}

func FuzzParsePrivateKey(f *testing.F) {
	sec1, err := x509.MarshalECPrivateKey(rfcKey(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		key, err := ParsePrivateKey(text)
		if err == nil {
			if _, err := KeyDigest(&key.PublicKey); err != nil {
				t.Error(err)
			}
		}
	})
}
