package controlplane

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// identities are the keys of this control plane. They live in its folder,
// 0600 each, and are made at the first start.
type identities struct {
	operator, system, account nkeys.KeyPair
	issuer                    ed25519.PrivateKey
	token                     string
}

// secret reads a file of the folder, or writes what make returns.
func secret(dir, name string, fresh func() ([]byte, error)) ([]byte, error) {
	path := filepath.Join(dir, name)
	data, err := os.ReadFile(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return data, err
	}
	if data, err = fresh(); err != nil {
		return nil, err
	}
	return data, renameio.WriteFile(path, data, 0o600)
}

func loadIdentities(dir string) (*identities, error) {
	var id identities
	for _, k := range []struct {
		name string
		make func() (nkeys.KeyPair, error)
		into *nkeys.KeyPair
	}{
		{"operator.nk", nkeys.CreateOperator, &id.operator},
		{"system.nk", nkeys.CreateAccount, &id.system},
		{"account.nk", nkeys.CreateAccount, &id.account},
	} {
		seed, err := secret(dir, k.name, func() ([]byte, error) {
			pair, err := k.make()
			if err != nil {
				return nil, err
			}
			return pair.Seed()
		})
		if err == nil {
			*k.into, err = nkeys.FromSeed(seed)
		}
		if err != nil {
			return nil, fmt.Errorf("loading %s: %w", k.name, err)
		}
	}
	random := func(n int) func() ([]byte, error) {
		return func() ([]byte, error) {
			raw := make([]byte, n)
			_, err := rand.Read(raw)
			return []byte(hex.EncodeToString(raw)), err
		}
	}
	seed, err := secret(dir, "issuer.key", random(ed25519.SeedSize))
	if err != nil {
		return nil, fmt.Errorf("loading issuer.key: %w", err)
	}
	raw, err := hex.DecodeString(string(seed))
	if err != nil || len(raw) != ed25519.SeedSize {
		return nil, errors.New("loading issuer.key: not a seed in hex")
	}
	id.issuer = ed25519.NewKeyFromSeed(raw)
	token, err := secret(dir, TokenFile, random(32))
	if err != nil {
		return nil, fmt.Errorf("loading %s: %w", TokenFile, err)
	}
	id.token = string(token)
	return &id, nil
}

// operatorClaims and accounts are what the server trusts.
func (id *identities) operatorClaims() (*jwt.OperatorClaims, error) {
	pub, err := id.operator.PublicKey()
	if err != nil {
		return nil, err
	}
	token, err := jwt.NewOperatorClaims(pub).Encode(id.operator)
	if err != nil {
		return nil, err
	}
	return jwt.DecodeOperatorClaims(token)
}

func (id *identities) accountJWT(pair nkeys.KeyPair, storage bool, revoked map[string]time.Time) (pub, token string, err error) {
	if pub, err = pair.PublicKey(); err != nil {
		return "", "", err
	}
	claims := jwt.NewAccountClaims(pub)
	if storage {
		claims.Limits.DiskStorage, claims.Limits.Streams, claims.Limits.Consumer = jwt.NoLimit, jwt.NoLimit, jwt.NoLimit
	}
	for user, at := range revoked {
		claims.RevokeAt(user, at)
	}
	token, err = claims.Encode(id.operator)
	return pub, token, err
}

// permissions of a host: its own commands and events, nothing else. No
// consumer information and no direct get, which could not be scoped.
func permissions(hostID string) jwt.Permissions {
	var p jwt.Permissions
	p.Pub.Allow.Add("$JS.API.CONSUMER.MSG.NEXT."+CommandStream+"."+hostID, "$JS.ACK."+CommandStream+"."+hostID+".>", "evt."+hostID+".>")
	p.Sub.Allow.Add("_INBOX." + hostID + ".>")
	return p
}

// credentials makes an identity in the account: a credentials file.
func (id *identities) credentials(name string, p jwt.Permissions, expires time.Time, connections ...string) ([]byte, error) {
	_, creds, err := id.identity(name, p, expires, connections...)
	return creds, err
}

// identity is credentials with the public key that names it.
func (id *identities) identity(name string, p jwt.Permissions, expires time.Time, connections ...string) (pub string, creds []byte, err error) {
	user, err := nkeys.CreateUser()
	if err != nil {
		return "", nil, err
	}
	if pub, err = user.PublicKey(); err != nil {
		return "", nil, err
	}
	claims := jwt.NewUserClaims(pub)
	claims.Name, claims.Permissions = name, p
	claims.AllowedConnectionTypes.Add(connections...)
	if !expires.IsZero() {
		claims.Expires = expires.Unix()
	}
	token, err := claims.Encode(id.account)
	if err != nil {
		return "", nil, err
	}
	seed, err := user.Seed()
	if err != nil {
		return "", nil, err
	}
	creds, err = jwt.FormatUserConfig(token, seed)
	return pub, creds, err
}
