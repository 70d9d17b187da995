package contract

import (
	"crypto/sha256"
	"fmt"
	"path"
)

// ImageVersion is the version of ImageDescription.
const ImageVersion = 1

// MaxImageDescriptionBytes bounds image.json.
const MaxImageDescriptionBytes = 256 << 10

// ImageDescriptionName is the file that describes a guest image, beside it.
const ImageDescriptionName = "image.json"

// Guest image variants. Each measures differently.
const (
	VariantProduction = "production" // no console
	VariantDebug      = "debug"      // console on ttyS0; never for secrets
)

// ImageDescription is image.json: what a guest image is made of, so that
// anybody can rebuild it and compute its launch digest.
type ImageDescription struct {
	// Version is ImageVersion.
	Version int `json:"version"`
	// Name identifies the build, for people.
	Name    string `json:"name"`
	Variant string `json:"variant"`
	// Emulated images carry the emulated TEE channel and no other; they can
	// never satisfy a verifier that was not told to accept emulation.
	Emulated bool `json:"emulated"`
	// AMLDefence says whether the guest is immune to AML from the host
	// (ACPI tables are outside the launch digest).
	AMLDefence bool `json:"aml_defence"`
	// GPUEvidence says whether the guest can gather evidence of GPUs; without,
	// it refuses a manifest that asks for any.
	GPUEvidence bool      `json:"gpu_evidence,omitempty"`
	Firmware    ImageFile `json:"firmware"`
	Kernel      ImageFile `json:"kernel"`
	Initrd      ImageFile `json:"initrd"`
	// Cmdline is the exact kernel command line, without the trailing NUL.
	Cmdline string `json:"cmdline"`
	// Modules are the kernel modules in load order.
	Modules []ImageFile `json:"modules,omitempty"`
}

// ImageFile is one component.
type ImageFile struct {
	// File is a plain name in image.json's folder (for modules: in the initrd).
	File   string `json:"file"`
	SHA256 string `json:"sha256"`
	Size   int64  `json:"size"`
	// Source says where it came from: a package name and version.
	Source string `json:"source,omitempty"`
}

// ParseImageDescription decodes and validates image.json.
func ParseImageDescription(data []byte) (*ImageDescription, error) {
	var d ImageDescription
	if err := UnmarshalStrict(data, MaxImageDescriptionBytes, &d); err != nil {
		return nil, fmt.Errorf("parsing %s: %w", ImageDescriptionName, err)
	}
	if d.Version != ImageVersion {
		return nil, fmt.Errorf("parsing %s: version %d is not supported, this build knows %d", ImageDescriptionName, d.Version, ImageVersion)
	}
	if d.Variant != VariantProduction && d.Variant != VariantDebug {
		return nil, fmt.Errorf("parsing %s: unknown variant %q", ImageDescriptionName, d.Variant)
	}
	for _, f := range []ImageFile{d.Firmware, d.Kernel, d.Initrd} {
		if f.File == "" || path.Base(f.File) != f.File || !isHex(f.SHA256, sha256.Size) || f.Size <= 0 {
			return nil, fmt.Errorf("parsing %s: component %q is malformed", ImageDescriptionName, f.File)
		}
	}
	return &d, nil
}
