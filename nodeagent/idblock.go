package main

import (
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/idblock"
)

// signedIDBlock is what --id-block adds to the document of `measure`.
type signedIDBlock struct {
	Block           string `json:"block"`
	Auth            string `json:"auth"`
	IDKeyDigest     string `json:"id_key_digest"`
	AuthorKeyDigest string `json:"author_key_digest,omitempty"`
	FamilyID        string `json:"family_id"`
	ImageID         string `json:"image_id"`
	GuestSVN        uint32 `json:"guest_svn"`
	Policy          string `json:"policy"`
}

type idBlockFlags struct {
	wanted                                      bool
	idKey, authorKey, familyID, imageID, policy string
	guestSVN                                    uint32
}

// idBlockOptions are the flags that mean something with --id-block only.
func idBlockOptions() []string {
	return []string{"id-key", "author-key", "family-id", "image-id", "guest-svn", "policy"}
}

func (f *idBlockFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.BoolVar(&f.wanted, "id-block", false, "also sign an ID block for the digest")
	flags.StringVar(&f.idKey, "id-key", "", "PEM of the image's ID key, P-384, mode 0600 (required with --id-block)")
	flags.StringVar(&f.authorKey, "author-key", "", "PEM of the key that signs the ID key, P-384, mode 0600")
	flags.StringVar(&f.familyID, "family-id", "", "family of the image, 32 hex digits (default zeros)")
	flags.StringVar(&f.imageID, "image-id", "", "the image in its family, 32 hex digits (default zeros)")
	flags.Uint32Var(&f.guestSVN, "guest-svn", 0, "security version of the image")
	flags.StringVar(&f.policy, "policy", "0x30000", "guest policy the image is to be launched with")
}

// check finds what is wrong with the flags before anything is read.
func (f *idBlockFlags) check(cmd *cobra.Command) error {
	if f.wanted && f.idKey == "" {
		return usageError("--id-block needs --id-key: the firmware takes no unsigned ID block")
	}
	for _, name := range idBlockOptions() {
		if !f.wanted && cmd.Flags().Changed(name) {
			return usageError("--%s means nothing without --id-block", name)
		}
	}
	if _, err := f.block(); err != nil {
		return usageError("%w", err)
	}
	return nil
}

// block is the ID block but for its digest.
func (f *idBlockFlags) block() (idblock.Block, error) {
	const mustBeOne, migrationAgent, debug = 1 << 17, 1 << 18, 1 << 19
	b := idblock.Block{GuestSVN: f.guestSVN}
	var err error
	if b.Policy, err = strconv.ParseUint(f.policy, 0, 64); err != nil {
		return b, fmt.Errorf("--policy %q is not a number", f.policy)
	}
	if b.Policy&mustBeOne == 0 || b.Policy&(migrationAgent|debug) != 0 {
		return b, fmt.Errorf("--policy %#x: no node takes it; set bit 17, clear bits 18 (migration agent) and 19 (debug)", b.Policy)
	}
	for name, id := range map[string]struct {
		text string
		to   []byte
	}{"family-id": {f.familyID, b.FamilyID[:]}, "image-id": {f.imageID, b.ImageID[:]}} {
		raw, err := hex.DecodeString(id.text)
		if err != nil || len(raw) != 0 && len(raw) != len(id.to) {
			return b, fmt.Errorf("--%s %q is not 32 hex digits", name, id.text)
		}
		copy(id.to, raw)
	}
	return b, nil
}

// sign makes the pair for a digest.
func (f *idBlockFlags) sign(digest [idblock.DigestSize]byte) (*signedIDBlock, error) {
	b, err := f.block()
	if err != nil {
		return nil, err
	}
	b.LaunchDigest = digest
	id, err := readSigningKey(f.idKey)
	if err != nil {
		return nil, err
	}
	var author *ecdsa.PrivateKey
	if f.authorKey != "" {
		if author, err = readSigningKey(f.authorKey); err != nil {
			return nil, err
		}
	}
	s, err := idblock.Sign(b, id, author)
	if err != nil {
		return nil, err
	}
	out := &signedIDBlock{
		Block: base64.StdEncoding.EncodeToString(s.RawBlock), Auth: base64.StdEncoding.EncodeToString(s.RawAuth),
		IDKeyDigest: hex.EncodeToString(s.IDKeyDigest[:]), FamilyID: hex.EncodeToString(b.FamilyID[:]), ImageID: hex.EncodeToString(b.ImageID[:]),
		GuestSVN: b.GuestSVN, Policy: fmt.Sprintf("%#x", b.Policy),
	}
	if s.HasAuthorKey {
		out.AuthorKeyDigest = hex.EncodeToString(s.AuthorKeyDigest[:])
	}
	return out, nil
}

// readSigningKey reads a private key. A file that others may read or write is
// refused, not repaired: whoever could read it may have done so already.
func readSigningKey(name string) (*ecdsa.PrivateKey, error) {
	const limit = 16 << 10
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // read only
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading key: %w", err)
	}
	if perm := info.Mode().Perm(); !info.Mode().IsRegular() || perm&^0o600 != 0 {
		return nil, contract.Refuse("key.mode", fmt.Sprintf("run chmod 0600 %s, and make a new key if others may have read it", name),
			"%s is not a file of mode 0600 but %s", name, info.Mode())
	}
	text, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, fmt.Errorf("reading key %s: %w", name, err)
	}
	key, err := idblock.ParsePrivateKey(text)
	if err != nil {
		return nil, fmt.Errorf("reading key %s: %w; make one with openssl ecparam -name secp384r1 -genkey -noout", name, err)
	}
	return key, nil
}

func (s *signedIDBlock) table(w io.Writer) {
	fmt.Fprintf(w, "id-block %s\nid-auth %s\nid-key-digest %s\n", s.Block, s.Auth, s.IDKeyDigest)
	if s.AuthorKeyDigest != "" {
		fmt.Fprintf(w, "author-key-digest %s\n", s.AuthorKeyDigest)
	}
}
