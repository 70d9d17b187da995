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
	"github.com/confidential-node/agent/vm/floor"
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
	// GPUs are taken over as they are.
	GPUs []GPU
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
	// GPUs are nil where the bus cannot be seen.
	GPUs []GPU `json:"gpus,omitempty"`
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
	r := Report{Components: []Component{}, GPUs: f.GPUs}
	for _, rule := range floor.Rules() {
		r.Components = append(r.Components, judge(rule, f))
	}
	r.Components = append(r.Components, judgeFirmware(f.Firmware))
	if f.Endorsements != nil {
		e := judgeEndorsements(*f.Endorsements, f.Now)
		r.Endorsements = &e
	}
	return r
}

// askFor is what to do when nothing is known of a component.
func askFor(name string) string {
	if name == "kernel" {
		return "mount proc"
	}
	return "start libvirtd (or virtqemud) and see that libvirt.uri is right"
}

func judge(rule floor.Rule, f Facts) Component {
	observed := rule.Of(floor.Versions{Kernel: f.Kernel, Libvirt: f.Libvirt, QEMU: f.QEMU})
	c := Component{
		Name: rule.Name, Observed: observed, Floor: rule.Plain, FloorGPU: rule.GPU,
		Meets: atLeast(observed, rule.Plain), MeetsGPU: atLeast(observed, rule.GPU),
	}
	switch {
	case c.Meets == Unknown:
		c.Remedy = askFor(rule.Name)
	case c.Meets == No:
		c.Remedy = fmt.Sprintf("%s: at least %s, with GPUs %s", rule.Update, rule.Plain, rule.GPU)
	case c.MeetsGPU == No:
		c.Remedy = fmt.Sprintf("%s before renting out GPUs: at least %s", rule.Update, rule.GPU)
	}
	return c
}

func atLeast(observed, least string) Conclusion {
	meets, known := floor.AtLeast(observed, least)
	if !known {
		return Unknown
	}
	return conclude(meets)
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
