package pin

import (
	"crypto/x509"
	"errors"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

func FuzzTransport(f *testing.F) {
	f.Add("https://broker.example:8443", "", "ab")
	f.Add("https://[fe80::1%25eth0]", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "")
	f.Add("%zz", "", "")
	f.Fuzz(func(_ *testing.T, url, ca, spki string) {
		_, _ = Transport(contract.Endpoint{URL: url, CAPEM: ca, SPKISHA256: spki})
	})
}

// No chain leads to an empty set of roots, whatever the certificates say.
func FuzzVerifyChain(f *testing.F) {
	f.Add([]byte{0x30, 0x03}, "broker.example")
	f.Fuzz(func(t *testing.T, der []byte, host string) {
		certs, err := x509.ParseCertificates(der)
		if err != nil {
			return
		}
		if err := verifyChain(certs, x509.NewCertPool(), host); !errors.Is(err, ErrUnpinned) {
			t.Errorf("%v", err)
		}
	})
}
