package verify

// Explain says in one sentence what a check protects from, "" for a name that
// is no check's.
func Explain(check string) string { return explanations()[check] }

func explanations() map[string]string {
	return map[string]string{
		"bundle":         "evidence that was cut off, or that hides something in fields a verifier does not look at",
		"nonce":          "evidence recorded earlier, from a guest that may be gone or broken into since",
		"result-key":     "results that nobody in the guest signed",
		"tls-key":        "a host that shows genuine evidence and ends the connection itself",
		"manifest":       "a manifest that two parties read differently",
		"workload-image": "a genuine guest that runs somebody else's program on your data",
		"gpu-evidence":   "a guest without confidential GPUs, or with ones that nobody asked",
		"aml-defence":    "ACPI code of the host, which is outside the launch digest and which the guest's kernel would run",
		"own-manifest":   "a guest that was started for another deployment than yours",
		"gpu-demand":     "a launch that asks for another GPU than you pay for",

		"gpu-count":        "fewer GPUs than you pay for, or one more that nobody looks at",
		"gpu-root":         "a GPU that NVIDIA did not make, or a program that plays one",
		"gpu-signature":    "evidence that was changed, or that another GPU or other firmware made",
		"gpu-nonce":        "evidence recorded earlier, or for another guest",
		"gpu-distinct":     "one GPU that is shown as several",
		"gpu-model":        "a cheaper GPU of another kind than you pay for",
		"gpu-allowed":      "GPUs other than those you know to stand where you want them",
		"gpu-mode":         "a GPU that takes data in clear, from the guest or from its neighbours",
		"gpu-switches":     "GPUs of several boards, whose links lead through somebody else's switches",
		"gpu-driver":       "GPUs of several guests, collected into one",
		"gpu-measurements": "firmware with known holes or a back door, and a GPU that the host debugs (devtools)",

		"report":               "bytes that look like a report; what a field a verifier does not know might mean",
		"signing-key":          "reports without a signature, or signed by a key that stands for no single chip",
		"root":                 "a chain that somebody made to look like AMD's",
		"chain":                "a key that AMD never certified, or no longer",
		"revocation":           "an intermediate key that AMD knows to be lost",
		"signature":            "a report that was changed, or that no processor made",
		"product":              "processors whose attestation is known to be broken, and certificates of another line",
		"chip-id":              "a genuine certificate of another, perhaps broken, chip",
		"tcb-binding":          "a platform that claims newer firmware than its key was made for",
		"tcb-layout":           "security versions that are read from the wrong bytes",
		"tcb-floor":            "firmware and microcode with published holes through which a host reads guests",
		"mitigations":          "platforms on which a published attack still works although their versions look new",
		"committed-is-current": "a provider that rolls firmware back to one with holes after you looked",
		"platform-info":        "memory modules that lie about their size (BadRAM), and other hardware states you ruled out",
		"chip-allowed":         "processors other than those you know to stand where you want them",
		"smt":                  "another tenant or the host on the same core, observing through shared caches",

		"vmpl":             "a report that less privileged software, or the host, asked for",
		"policy-reserved":  "permissions for the host that a newer firmware may give and this verifier cannot name",
		"policy-debug":     "a host that reads and writes the guest's memory through the debug interface",
		"policy-migration": "a migration agent that takes the guest's state elsewhere",
		"policy-cxl":       "memory outside the processor's own controllers",
		"id-key":           "an image that its publisher never signed",
		"author-key":       "an image signing key that its publisher never endorsed",
		"guest-svn":        "an old image of the same publisher with known holes",
		"family-id":        "another kind of image of the same publisher",
		"image-id":         "another image of the same publisher",
		"launch-digest":    "firmware, kernel or init other than those that keep your secrets",
		"host-data":        "a host that starts the right image with its own manifest: its program, its keys, its broker",
		"report-data":      "a replayed report, or one of another guest than the one that holds the keys you talk to",
	}
}
