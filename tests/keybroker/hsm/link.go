package hsm

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"
)

// maxKeys bounds the AES keys of a token.
const maxKeys = 256

// maxPINBytes bounds the PIN's file.
const maxPINBytes = 256

// link is a session that is logged in, and the wrapping keys it sees.
type link struct {
	slot    uint
	session pkcs11.SessionHandle
	keys    map[string]pkcs11.ObjectHandle
}

// drop forgets session and login. Libraries look for tokens when they are
// initialised, some of them only then.
func (t *Token) drop() {
	if t.link != nil {
		_ = t.lib.Finalize() // what it was is gone either way
		t.link = nil
	}
}

// connect finds the token, logs in and looks at the keys.
func (t *Token) connect() error {
	if t.link != nil {
		return nil
	}
	if t.refused != nil {
		return t.refused
	}
	if err := t.lib.Initialize(); err != nil {
		return explain(err)
	}
	t.link = &link{}
	err := t.find()
	if err == nil {
		err = t.login()
	}
	if err == nil {
		err = t.loadKeys()
	}
	if err != nil {
		t.drop()
		return explain(err)
	}
	return nil
}

// find looks for the one token with the label.
func (t *Token) find() error {
	slots, err := t.lib.GetSlotList(true)
	if err != nil {
		return err
	}
	var flags uint
	found := 0
	for _, slot := range slots {
		info, err := t.lib.GetTokenInfo(slot)
		if err != nil {
			continue // drawn while we look
		}
		if strings.TrimRight(info.Label, " \x00") == t.cfg.Label {
			found, flags, t.link.slot = found+1, info.Flags, slot
		}
	}
	switch {
	case found == 0:
		return refuseMissing(t.cfg.Label)
	case found > 1:
		return refuseAmbiguous("tokens", t.cfg.Label)
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return refuseLocked()
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return refuseLastTry()
	case flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
		return refuseMissing(t.cfg.Label)
	}
	return nil
}

func (t *Token) login() error {
	pin, err := readPIN(t.cfg.PINFile)
	if err != nil {
		return err
	}
	defer clear(pin)
	if t.link.session, err = t.lib.OpenSession(t.link.slot, pkcs11.CKF_SERIAL_SESSION); err != nil {
		return err
	}
	err = t.lib.Login(t.link.session, pkcs11.CKU_USER, string(pin))
	if refusal := loginRefused(err); refusal != nil {
		t.refused = refusal
		return refusal
	}
	return err
}

// readPIN refuses files that others than their owner can reach.
func readPIN(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, refusePINFile(err)
	}
	defer f.Close() //nolint:errcheck // only read from
	info, err := f.Stat()
	if err != nil {
		return nil, refusePINFile(err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, refusePINFile(fmt.Errorf("%s has mode %v", path, info.Mode()))
	}
	if info.Size() > maxPINBytes {
		return nil, refusePINFile(fmt.Errorf("%s has %d bytes", path, info.Size()))
	}
	buffer := make([]byte, maxPINBytes)
	n, err := f.Read(buffer)
	pin := []byte(strings.TrimRight(string(buffer[:n]), "\r\n"))
	clear(buffer)
	if err != nil || len(pin) == 0 {
		return nil, refusePINFile(errors.Join(fmt.Errorf("%s holds no PIN", path), err))
	}
	return pin, nil
}

// loadKeys finds the wrapping keys and holds each against what it must be.
func (t *Token) loadKeys() error {
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
	}
	if err := t.lib.FindObjectsInit(t.link.session, template); err != nil {
		return err
	}
	handles, _, err := t.lib.FindObjects(t.link.session, maxKeys)
	if err := errors.Join(err, t.lib.FindObjectsFinal(t.link.session)); err != nil {
		return err
	}
	t.link.keys = map[string]pkcs11.ObjectHandle{}
	for _, h := range handles {
		attributes, err := t.lib.GetAttributeValue(t.link.session, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
		if err != nil {
			return err
		}
		label := string(attributes[0].Value)
		if generation(t.cfg.Key, label) == 0 {
			continue
		}
		if _, twice := t.link.keys[label]; twice {
			return refuseAmbiguous("wrapping keys", label)
		}
		if err := t.checkKey(label, h); err != nil {
			return err
		}
		t.link.keys[label] = h
	}
	return nil
}

// checkKey asks whether the key was made in a token and can never leave it.
func (t *Token) checkKey(label string, h pkcs11.ObjectHandle) error {
	wanted := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_NEVER_EXTRACTABLE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_ALWAYS_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, keyBytes),
	}
	asked := make([]*pkcs11.Attribute, len(wanted))
	for i, a := range wanted {
		asked[i] = pkcs11.NewAttribute(a.Type, nil)
	}
	got, err := t.lib.GetAttributeValue(t.link.session, h, asked)
	if err != nil {
		return err
	}
	for i, a := range wanted {
		if !slices.Equal(got[i].Value, a.Value) {
			return refuseExtractable(label)
		}
	}
	return nil
}

// Generate makes the key of the next generation, also the first, and returns
// its label.
func (t *Token) Generate() (string, error) {
	// Once asked for, the key is not asked for again: two would be one too many.
	return call(t, func() (string, error) {
		label := fmt.Sprintf("%s-%d", t.cfg.Key, t.link.newestGeneration(t.cfg.Key)+1)
		session, err := t.lib.OpenSession(t.link.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			return "", err
		}
		defer t.lib.CloseSession(session) //nolint:errcheck // the key is made or it is not
		mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}
		_, err = t.lib.GenerateKey(session, mechanism, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
			pkcs11.NewAttribute(pkcs11.CKA_ID, label),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, keyBytes),
		})
		if err != nil {
			return "", refuseFailed(err)
		}
		if err := t.loadKeys(); err != nil {
			return "", explain(err)
		}
		return label, nil
	})
}

// generation reads LABEL-N; 0 is none.
func generation(prefix, label string) int {
	digits, ok := strings.CutPrefix(label, prefix+"-")
	n, err := strconv.Atoi(digits)
	if !ok || err != nil || n < 1 || strconv.Itoa(n) != digits {
		return 0
	}
	return n
}

func (l *link) newestGeneration(prefix string) int {
	newest := 0
	for label := range l.keys {
		newest = max(newest, generation(prefix, label))
	}
	return newest
}

func (l *link) newest(prefix string) (string, error) {
	n := l.newestGeneration(prefix)
	if n == 0 {
		return "", refuseKeyMissing(prefix + "-1")
	}
	return fmt.Sprintf("%s-%d", prefix, n), nil
}

func validLabel(s string) bool {
	return s != "" && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '-' && r != '_'
	})
}
