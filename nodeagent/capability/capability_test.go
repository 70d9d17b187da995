package capability

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// component judges facts and returns one component.
func component(t *testing.T, f Facts, name string) Component {
	t.Helper()
	for _, c := range Judge(f).Components {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no component %s", name)
	return Component{}
}

func TestEveryFloorHasItsRow(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		facts      Facts
		name       string
		meets, gpu Conclusion
		remedy     string
	}{
		{Facts{Kernel: "6.10.14-amd64"}, "kernel", No, No, "at least 6.11, with GPUs 6.17"},
		{Facts{Kernel: "6.11.0-8-generic"}, "kernel", Yes, No, "before renting out GPUs: at least 6.17"},
		{Facts{Kernel: "6.17-rc1"}, "kernel", Yes, Yes, ""},
		{Facts{Kernel: "7.0.3"}, "kernel", Yes, Yes, ""},
		{Facts{Kernel: ""}, "kernel", Unknown, Unknown, "mount proc"},
		{Facts{Kernel: "custom"}, "kernel", Unknown, Unknown, "mount proc"},
		{Facts{Libvirt: "10.4.9"}, "libvirt", No, No, "install a newer libvirt"},
		{Facts{Libvirt: "10.5.0"}, "libvirt", Yes, Yes, ""},
		{Facts{Libvirt: ""}, "libvirt", Unknown, Unknown, "start libvirtd"},
		{Facts{QEMU: "9.0.2"}, "qemu", No, No, "at least 9.1, with GPUs 10.1"},
		{Facts{QEMU: "9.1.0"}, "qemu", Yes, No, "before renting out GPUs: at least 10.1"},
		{Facts{QEMU: "10.0.7"}, "qemu", Yes, No, "10.1"},
		{Facts{QEMU: "10.1.0"}, "qemu", Yes, Yes, ""},
		{Facts{QEMU: ""}, "qemu", Unknown, Unknown, "start libvirtd"},
		{Facts{Firmware: []Firmware{{"/a.fd", "OvmfPkgX64", false}, {"/b.fd", "AmdSev", true}}}, "ovmf", Yes, Yes, ""},
		{Facts{Firmware: []Firmware{{"/a.fd", "OvmfPkgX64", false}}}, "ovmf", No, No, "ovmf-amdsev"},
		{Facts{Firmware: []Firmware{}}, "ovmf", No, No, "ovmf-amdsev"},
		{Facts{}, "ovmf", Unknown, Unknown, "firmware list"},
	} {
		got := component(t, c.facts, c.name)
		if got.Meets != c.meets || got.MeetsGPU != c.gpu || !strings.Contains(got.Remedy, c.remedy) || (got.Remedy == "") != (c.remedy == "") {
			t.Errorf("%s of %+v: %+v", c.name, c.facts, got)
		}
		if got.Floor == "" || got.FloorGPU == "" {
			t.Errorf("%s has no floor", c.name)
		}
	}
}

func TestARawFactStandsBesideEveryConclusion(t *testing.T) {
	t.Parallel()
	r := Judge(Facts{Kernel: "6.17.0-5-generic", Libvirt: "11.3.0", QEMU: "10.1.0", Firmware: []Firmware{{"/a.fd", "OvmfPkgX64", false}}})
	want := map[string]string{"kernel": "6.17.0-5-generic", "libvirt": "11.3.0", "qemu": "10.1.0", "ovmf": "/a.fd (OvmfPkgX64)"}
	for _, c := range r.Components {
		if c.Observed != want[c.Name] {
			t.Errorf("%s: observed %q", c.Name, c.Observed)
		}
	}
	if len(r.Components) != len(want) || r.Endorsements != nil {
		t.Errorf("%+v", r)
	}
}

// documents are a certificate and a revocation list that end at those times.
func documents(t *testing.T, certificate, list time.Time) contract.Endorsements {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: certificate.Add(-time.Hour), NotAfter: certificate, SubjectKeyId: []byte{1},
		KeyUsage: x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	crl, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: list.Add(-time.Hour), NextUpdate: list}, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return contract.Endorsements{VCEK: cert, CRL: crl}
}

func TestEndorsementsAreAtHandAndCurrentOrNot(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	later, before := now.Add(time.Hour), now.Add(-time.Hour)
	finding := func(code string) []*contract.Refusal { return []*contract.Refusal{contract.Refuse(code, "r", "m")} }
	for name, c := range map[string]struct {
		facts             EndorsementFacts
		certificate, list Conclusion
	}{
		"all of it":                {EndorsementFacts{documents(t, later, later), nil}, Yes, Yes},
		"nothing":                  {EndorsementFacts{}, No, No},
		"an expired certificate":   {EndorsementFacts{documents(t, before, later), nil}, No, Yes},
		"an old list":              {EndorsementFacts{documents(t, later, before), nil}, Yes, No},
		"no certificate":           {EndorsementFacts{documents(t, later, later), finding("endorsements.vcek-missing")}, No, Yes},
		"no VLEK":                  {EndorsementFacts{documents(t, later, later), finding("endorsements.vlek-missing")}, No, Yes},
		"another chip's":           {EndorsementFacts{documents(t, later, later), finding("endorsements.operator-mismatch")}, No, Yes},
		"a revoked issuer":         {EndorsementFacts{documents(t, later, later), finding("endorsements.revoked")}, No, Yes},
		"only the network is away": {EndorsementFacts{documents(t, later, later), finding("endorsements.unreachable")}, Yes, Yes},
		"what cannot be read":      {EndorsementFacts{Served: contract.Endorsements{VCEK: []byte("x"), CRL: []byte("x")}}, No, No},
	} {
		got := Judge(Facts{Endorsements: &c.facts, Now: now}).Endorsements
		if got.Certificate != c.certificate || got.RevocationList != c.list || len(got.Findings) != len(c.facts.Findings) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
