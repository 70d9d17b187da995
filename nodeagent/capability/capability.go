// Package capability concludes from facts what a host can do, and what of it
// changed since it was last said. Judge and Changed are pure: the same facts
// give the same report. It reads nothing itself and knows no control plane;
// what the machine has of SEV-SNP is firmware/snp/host's to judge, and is taken
// over here.
package capability

import (
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
)

// Conclusion is a yes or no that may not be known.
type Conclusion string

// Conclusions.
const (
	Yes     Conclusion = "yes"
	No      Conclusion = "no"
	Unknown Conclusion = "unknown"
)

func conclude(yes bool) Conclusion {
	if yes {
		return Yes
	}
	return No
}

// Facts are what was read. An empty version could not be asked for.
type Facts struct {
	// Kernel is the release, Libvirt and QEMU are major.minor.release.
	Kernel, Libvirt, QEMU string
	// Firmware are the images of the host; nil when they could not be read.
	Firmware []Firmware
	// Endorsements is nil while it is not known what this machine needs.
	Endorsements *EndorsementFacts
	// Now is the time certificates are judged at.
	Now time.Time
}

// Firmware is one OVMF image.
type Firmware struct {
	Path, Build string
	// Usable: it boots SEV-SNP guests.
	Usable bool
}

// EndorsementFacts are what is served to guests, and what is wrong with it.
type EndorsementFacts struct {
	Served   contract.Endorsements
	Findings []*contract.Refusal
}

// Report is what is concluded.
type Report struct {
	Components []Component `json:"components"`
	// Endorsements is nil while it is not known what this machine needs.
	Endorsements *Endorsements `json:"endorsements,omitempty"`
}

// Component is a piece of software and whether it is new enough.
type Component struct {
	Name string `json:"name"`
	// Observed is how it names itself, "" when it could not be asked.
	Observed string     `json:"observed"`
	Floor    string     `json:"floor"`
	FloorGPU string     `json:"floor_gpu"`
	Meets    Conclusion `json:"meets"`
	MeetsGPU Conclusion `json:"meets_gpu"`
	Remedy   string     `json:"remedy,omitempty"`
}

// Endorsements is whether evidence of this machine can be verified offline.
type Endorsements struct {
	// Certificate: a VCEK or VLEK for the reported TCB is at hand.
	Certificate         Conclusion `json:"certificate"`
	CertificateNotAfter time.Time  `json:"certificate_not_after,omitzero"`
	// RevocationList: one is at hand and current.
	RevocationList           Conclusion          `json:"revocation_list"`
	RevocationListNextUpdate time.Time           `json:"revocation_list_next_update,omitzero"`
	Findings                 []*contract.Refusal `json:"findings"`
}

// Judge concludes.
func Judge(f Facts) Report {
	r := Report{Components: []Component{}}
	for _, rule := range versionRules() {
		r.Components = append(r.Components, rule.judge(rule.observed(f)))
	}
	r.Components = append(r.Components, judgeFirmware(f.Firmware))
	if f.Endorsements != nil {
		e := judgeEndorsements(*f.Endorsements, f.Now)
		r.Endorsements = &e
	}
	return r
}

// versionRule is the floor of one component.
type versionRule struct {
	name       string
	observed   func(Facts) string
	floor, gpu string
	// update is what to do below a floor, ask what to do when nothing is known.
	update, ask string
}

const startLibvirt = "start libvirtd (or virtqemud) and see that libvirt.uri is right"

// versionRules are the floors, each for what it first has: kernel 6.11 hosts
// SNP, and NVIDIA supports GPUs from 6.17 on; libvirt 10.5.0 has the launch
// security of SNP, and passes GPUs through as long as the domain does not name
// iommufd, which the agent's does not; QEMU 9.1 has sev-snp-guest, and up to
// 10.0 refuses it together with any VFIO device.
func versionRules() []versionRule {
	return []versionRule{
		{"kernel", func(f Facts) string { return f.Kernel }, "6.11", "6.17", "install a newer kernel and reboot", "mount proc"},
		{"libvirt", func(f Facts) string { return f.Libvirt }, "10.5.0", "10.5.0", "install a newer libvirt", startLibvirt},
		{"qemu", func(f Facts) string { return f.QEMU }, "9.1", "10.1", "install a newer QEMU, for instance from the distribution's backports", startLibvirt},
	}
}

func (rule versionRule) judge(observed string) Component {
	c := Component{
		Name: rule.name, Observed: observed, Floor: rule.floor, FloorGPU: rule.gpu,
		Meets: atLeast(observed, rule.floor), MeetsGPU: atLeast(observed, rule.gpu),
	}
	switch {
	case c.Meets == Unknown:
		c.Remedy = rule.ask
	case c.Meets == No:
		c.Remedy = fmt.Sprintf("%s: at least %s, with GPUs %s", rule.update, rule.floor, rule.gpu)
	case c.MeetsGPU == No:
		c.Remedy = fmt.Sprintf("%s before renting out GPUs: at least %s", rule.update, rule.gpu)
	}
	return c
}

// atLeast compares numbers that dots separate; what follows them is the
// distribution's.
func atLeast(observed, floor string) Conclusion {
	have, want := numbers(observed), numbers(floor)
	if len(have) < 2 {
		return Unknown
	}
	return conclude(slices.Compare(have, want) >= 0 || slices.Equal(have, want[:min(len(have), len(want))]))
}

func numbers(version string) (out []int) {
	for part := range strings.SplitSeq(version, ".") {
		var n int
		if _, err := fmt.Sscanf(part, "%d", &n); err != nil || n < 0 {
			return out
		}
		out = append(out, n)
		if strings.Trim(part, "0123456789") != "" {
			return out
		}
	}
	return out
}

// firmwareFloor: only this build makes the kernel part of the launch digest.
const firmwareFloor = "the AmdSev build"

func judgeFirmware(images []Firmware) Component {
	c := Component{Name: "ovmf", Floor: firmwareFloor, FloorGPU: firmwareFloor, Meets: Unknown, MeetsGPU: Unknown}
	if images == nil {
		c.Remedy = "run `nodeagent firmware list`, which says what could not be read"
		return c
	}
	var usable, all []string
	for _, i := range images {
		all = append(all, i.Path+" ("+i.Build+")")
		if i.Usable {
			usable = append(usable, i.Path)
		}
	}
	c.Meets = conclude(len(usable) > 0)
	c.MeetsGPU = c.Meets
	switch {
	case len(usable) > 0:
		c.Observed = strings.Join(usable, ", ")
	case len(all) > 0:
		c.Observed = strings.Join(all, ", ")
	default:
		c.Observed = "no image"
	}
	if c.Meets == No {
		c.Remedy = "install a guest image, or Debian's package ovmf-amdsev; `nodeagent firmware list` says what each image lacks"
	}
	return c
}

// unfit are the findings that say that the certificate served does not verify
// this machine's reports.
func unfit(code string) bool {
	return slices.Contains([]string{"endorsements.vcek-missing", "endorsements.vlek-missing", "endorsements.operator-mismatch", "endorsements.revoked"}, code)
}

func judgeEndorsements(f EndorsementFacts, now time.Time) Endorsements {
	e := Endorsements{Certificate: No, RevocationList: No, Findings: append([]*contract.Refusal{}, f.Findings...)}
	if cert, err := x509.ParseCertificate(f.Served.VCEK); err == nil {
		e.CertificateNotAfter = cert.NotAfter.UTC()
		fits := !slices.ContainsFunc(f.Findings, func(r *contract.Refusal) bool { return unfit(r.Code) })
		e.Certificate = conclude(fits && now.Before(cert.NotAfter))
	}
	if crl, err := x509.ParseRevocationList(f.Served.CRL); err == nil {
		e.RevocationListNextUpdate = crl.NextUpdate.UTC()
		e.RevocationList = conclude(now.Before(crl.NextUpdate))
	}
	return e
}
