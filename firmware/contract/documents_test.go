package contract_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

func evidence() *contract.Evidence {
	return &contract.Evidence{
		Version: 1, Nonce: bytes.Repeat([]byte{1}, 32), TLSSPKI: []byte("spki"), ResultKey: bytes.Repeat([]byte{2}, 32),
		Report: bytes.Repeat([]byte{3}, 1184), Manifest: []byte("{}"),
		Endorsements: contract.Endorsements{VCEK: []byte("vcek"), ASK: []byte("ask"), ARK: []byte("ark"), CRL: []byte("crl")},
		Boot:         contract.BootComponents{Cmdline: "quiet", VCPUs: 2, CPUModel: "EPYC-v4", GuestFeatures: 1, Image: json.RawMessage(`{"version":1}`)},
	}
}

func imageDescription() *contract.ImageDescription {
	file := func(name string) contract.ImageFile {
		return contract.ImageFile{File: name, SHA256: strings.Repeat("a", 64), Size: 1, Source: "package 1.0"}
	}
	return &contract.ImageDescription{
		Version: 1, Name: "guest", Variant: contract.VariantProduction, Firmware: file("OVMF.fd"), Kernel: file("vmlinuz"), Initrd: file("initrd"),
		Cmdline: "quiet", Modules: []contract.ImageFile{file("virtio.ko")},
	}
}

func resultManifest() *contract.ResultManifest {
	return &contract.ResultManifest{
		Version: 1, LaunchID: strings.Repeat("0a", 16), ExitCode: 3,
		Results: []contract.ResultEntry{{Name: "out", SHA256: strings.Repeat("a", 64), Size: 3}, {Name: "log", SHA256: strings.Repeat("b", 64)}},
	}
}

// encode is for documents that are not canonical.
func encode(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestEvidenceSurvivesTheWire(t *testing.T) {
	t.Parallel()
	got, err := contract.ParseEvidence(encode(t, evidence()))
	if err != nil || !reflect.DeepEqual(got, evidence()) {
		t.Errorf("%+v (%v)", got, err)
	}
}

func TestEachRuleOfEvidenceRefuses(t *testing.T) {
	t.Parallel()
	good := string(encode(t, evidence()))
	with := func(change func(*contract.Evidence)) string {
		e := evidence()
		change(e)
		return string(encode(t, e))
	}
	for name, bad := range map[string]string{
		"nothing":        "",
		"null":           "null",
		"another kind":   "[]",
		"version 0":      with(func(e *contract.Evidence) { e.Version = 0 }),
		"version 2":      with(func(e *contract.Evidence) { e.Version = 2 }),
		"no nonce":       with(func(e *contract.Evidence) { e.Nonce = nil }),
		"short nonce":    with(func(e *contract.Evidence) { e.Nonce = make([]byte, contract.MinNonceBytes-1) }),
		"long nonce":     with(func(e *contract.Evidence) { e.Nonce = make([]byte, contract.MaxNonceBytes+1) }),
		"too large":      with(func(e *contract.Evidence) { e.GPUEvidence = make([]byte, contract.MaxEvidenceBytes) }),
		"padded to size": good + strings.Repeat(" ", contract.MaxEvidenceBytes),
		"unknown field":  strings.Replace(good, `{`, `{"extra":1,`, 1),
		"unknown inside": strings.Replace(good, `"vcek"`, `"vcekk"`, 1),
		"duplicate key":  strings.Replace(good, `{`, `{"version":1,`, 1),
		"two documents":  good + good,
		"cut off":        good[:len(good)-1],
		"not base64":     strings.Replace(good, base64.StdEncoding.EncodeToString([]byte("spki")), "!!!!", 1),
	} {
		if e, err := contract.ParseEvidence([]byte(bad)); err == nil || e != nil {
			t.Errorf("%s is accepted", name)
		}
	}
	for _, n := range []int{contract.MinNonceBytes, contract.MaxNonceBytes} {
		if _, err := contract.ParseEvidence([]byte(with(func(e *contract.Evidence) { e.Nonce = make([]byte, n) }))); err != nil {
			t.Errorf("nonce of %d bytes: %v", n, err)
		}
	}
}

func TestImageDescriptionsSurviveTheFile(t *testing.T) {
	t.Parallel()
	got, err := contract.ParseImageDescription(encode(t, imageDescription()))
	if err != nil || !reflect.DeepEqual(got, imageDescription()) {
		t.Errorf("%+v (%v)", got, err)
	}
}

func TestEachRuleOfAnImageDescriptionRefuses(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*contract.ImageDescription){
		"version":            func(d *contract.ImageDescription) { d.Version = 2 },
		"unknown variant":    func(d *contract.ImageDescription) { d.Variant = "test" },
		"no variant":         func(d *contract.ImageDescription) { d.Variant = "" },
		"no firmware":        func(d *contract.ImageDescription) { d.Firmware = contract.ImageFile{} },
		"no kernel":          func(d *contract.ImageDescription) { d.Kernel.File = "" },
		"path to initrd":     func(d *contract.ImageDescription) { d.Initrd.File = "../initrd" },
		"absolute kernel":    func(d *contract.ImageDescription) { d.Kernel.File = "/boot/vmlinuz" },
		"upper-case digest":  func(d *contract.ImageDescription) { d.Kernel.SHA256 = strings.Repeat("A", 64) },
		"short digest":       func(d *contract.ImageDescription) { d.Initrd.SHA256 = strings.Repeat("a", 62) },
		"empty component":    func(d *contract.ImageDescription) { d.Firmware.Size = 0 },
		"negative component": func(d *contract.ImageDescription) { d.Firmware.Size = -1 },
		"far too large":      func(d *contract.ImageDescription) { d.Name = strings.Repeat("x", contract.MaxImageDescriptionBytes) },
	} {
		d := imageDescription()
		change(d)
		if _, err := contract.ParseImageDescription(encode(t, d)); err == nil || !strings.Contains(err.Error(), contract.ImageDescriptionName) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := contract.ParseImageDescription([]byte(`{"version":1,"aml_defense":true}`)); err == nil {
		t.Error("a misspelt field is ignored")
	}
}

func TestEachRuleOfAResultManifestRefuses(t *testing.T) {
	t.Parallel()
	key := fuzzKey()
	pub, _ := key.Public().(ed25519.PublicKey)
	for name, change := range map[string]func(*contract.ResultManifest){
		"version":          func(m *contract.ResultManifest) { m.Version = 2 },
		"launch id":        func(m *contract.ResultManifest) { m.LaunchID = "0a" },
		"path":             func(m *contract.ResultManifest) { m.Results[0].Name = "a/b" },
		"hidden":           func(m *contract.ResultManifest) { m.Results[0].Name = ".a" },
		"twice":            func(m *contract.ResultManifest) { m.Results[1].Name = m.Results[0].Name },
		"digest":           func(m *contract.ResultManifest) { m.Results[0].SHA256 = "aa" },
		"negative size":    func(m *contract.ResultManifest) { m.Results[0].Size = -1 },
		"too many results": func(m *contract.ResultManifest) { m.Results = slices.Repeat(m.Results, contract.MaxResults) },
	} {
		m := resultManifest()
		change(m)
		data, err := contract.SealResults(m, key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := contract.OpenResults(data, pub); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	canonical, err := contract.Canonical(resultManifest())
	if err != nil {
		t.Fatal(err)
	}
	for name, payload := range map[string]string{
		"white space":   string(canonical) + " ",
		"unknown field": strings.Replace(string(canonical), "{", `{"a":1,`, 1),
		"nothing":       "",
	} {
		data, err := contract.SealEnvelope(contract.ResultsPayloadType, []byte(payload), key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := contract.OpenResults(data, pub); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	other, err := contract.SealEnvelope("application/json", canonical, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := contract.OpenResults(other, pub); !errors.Is(err, contract.ErrEnvelope) {
		t.Errorf("another payload type: %v", err)
	}
}

func TestEachRuleOfAnEnvelopeRefuses(t *testing.T) {
	t.Parallel()
	key := fuzzKey()
	pub, _ := key.Public().(ed25519.PublicKey)
	const kind = "application/x"
	signature := func(sig string) string { return fmt.Sprintf(`{"keyid":%q,"sig":%q}`, contract.KeyID(pub), sig) }
	envelope := func(payload string, signatures ...string) string {
		return fmt.Sprintf(`{"payloadType":%q,"payload":%q,"signatures":[%s]}`, kind, payload, strings.Join(signatures, ","))
	}
	zero := base64.StdEncoding.EncodeToString(make([]byte, ed25519.SignatureSize))
	for name, c := range map[string]struct {
		data string
		want error
	}{
		"no signature":             {envelope("eA=="), contract.ErrEnvelope},
		"five signatures":          {envelope("eA==", slices.Repeat([]string{signature(zero)}, 5)...), contract.ErrEnvelope},
		"short signature":          {envelope("eA==", signature("AAAA")), contract.ErrEnvelope},
		"signature is not base64":  {envelope("eA==", signature("!")), contract.ErrEnvelope},
		"payload is not base64":    {envelope("!", signature(zero)), contract.ErrEnvelope},
		"stray bits in the base64": {envelope("eB==", signature(zero)), contract.ErrEnvelope},
		"unknown field":            {strings.Replace(envelope("eA==", signature(zero)), "{", `{"x":1,`, 1), contract.ErrEnvelope},
		"data after it":            {envelope("eA==", signature(zero)) + "x", contract.ErrEnvelope},
		"not JSON":                 {"DSSE", contract.ErrEnvelope},
		"zero signature":           {envelope("eA==", signature(zero)), contract.ErrUnsigned},
	} {
		if payload, err := contract.OpenEnvelope([]byte(c.data), kind, 1<<12, []ed25519.PublicKey{pub}); !errors.Is(err, c.want) || payload != nil {
			t.Errorf("%s: %q, %v", name, payload, err)
		}
	}
}

// A good signature among others of keys nobody accepts is enough, and it is
// over type and payload together.
func TestOneAcceptedSignatureIsEnough(t *testing.T) {
	t.Parallel()
	key := fuzzKey()
	pub, _ := key.Public().(ed25519.PublicKey)
	sealed, err := contract.SealEnvelope("t", []byte("p"), key)
	if err != nil {
		t.Fatal(err)
	}
	stranger := fmt.Sprintf(`"signatures":[{"keyid":"x","sig":%q},`, base64.StdEncoding.EncodeToString(make([]byte, 64)))
	two := strings.Replace(string(sealed), `"signatures":[`, stranger, 1)
	if got, err := contract.OpenEnvelope([]byte(two), "t", 1<<12, []ed25519.PublicKey{pub}); err != nil || string(got) != "p" {
		t.Errorf("%q, %v", got, err)
	}
	retyped := strings.Replace(string(sealed), `"payloadType":"t"`, `"payloadType":"u"`, 1)
	if _, err := contract.OpenEnvelope([]byte(retyped), "u", 1<<12, []ed25519.PublicKey{pub}); !errors.Is(err, contract.ErrUnsigned) {
		t.Errorf("the type is not signed: %v", err)
	}
}

// DSSE v1's own example of the pre-authentication encoding, through a
// signature made over it by hand.
func TestSignaturesAreOverDSSEsPreAuthenticationEncoding(t *testing.T) {
	t.Parallel()
	key := fuzzKey()
	pub, _ := key.Public().(ed25519.PublicKey)
	sig := ed25519.Sign(key, []byte("DSSEv1 29 http://example.com/HelloWorld 11 hello world"))
	data := fmt.Sprintf(`{"payloadType":"http://example.com/HelloWorld","payload":"aGVsbG8gd29ybGQ=","signatures":[{"keyid":%q,"sig":%q}]}`,
		contract.KeyID(pub), base64.StdEncoding.EncodeToString(sig))
	if got, err := contract.OpenEnvelope([]byte(data), "http://example.com/HelloWorld", 1<<12, []ed25519.PublicKey{pub}); err != nil || string(got) != "hello world" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestStrictDecodingRefuses(t *testing.T) {
	t.Parallel()
	type document struct {
		A int            `json:"a"`
		M map[string]int `json:"m"`
		D any            `json:"d"`
	}
	for name, c := range map[string]struct {
		data string
		ok   bool
	}{
		"plain":                     {`{"a":1,"m":{"a":1,"A":2},"d":[]}`, true},
		"same key in two objects":   {`{"a":1,"m":{"a":1}}`, true},
		"16 levels":                 {`{"d":` + strings.Repeat("[", 15) + strings.Repeat("]", 15) + `}`, true},
		"white space around":        {" {} \n", true},
		"17 levels":                 {`{"d":` + strings.Repeat("[", 16) + strings.Repeat("]", 16) + `}`, false},
		"duplicate key":             {`{"a":1,"a":1}`, false},
		"duplicate key, escaped":    {`{"a":1,"\u0061":1}`, false},
		"duplicate key in a map":    {`{"m":{"x":1,"x":2}}`, false},
		"duplicate key in an array": {`{"d":[{"x":1,"x":2}]}`, false},
		"unknown field":             {`{"b":1}`, false},
		"second document":           {`{}{}`, false},
		"garbage behind":            {`{}x`, false},
		"bracket behind":            {`{}]`, false},
		"only an end":               {`}`, false},
		"empty":                     {``, false},
		"overflow":                  {`{"a":9223372036854775808}`, false},
		"fraction":                  {`{"a":1.5}`, false},
		"trailing comma":            {`{"a":1,}`, false},
		"comment":                   {`{/**/}`, false},
	} {
		var d document
		if err := contract.UnmarshalStrict([]byte(c.data), 1<<10, &d); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := contract.UnmarshalStrict([]byte(`{}`), 1, &struct{}{}); err == nil {
		t.Error("oversize is accepted")
	}
	if err := contract.UnmarshalStrict([]byte(`{}`), 2, &struct{}{}); err != nil {
		t.Errorf("exactly the limit: %v", err)
	}
}

func TestImagesAndResourcesComeApart(t *testing.T) {
	t.Parallel()
	digest := "sha256:" + strings.Repeat("b", 64)
	for ref, want := range map[string][2]string{
		"registry.example/app@" + digest:                {"registry.example", "app"},
		"registry.example:5000/team/app@" + digest:      {"registry.example:5000", "team/app"},
		"[2001:db8::1]:5000/app@" + digest:              {"[2001:db8::1]:5000", "app"},
		"registry.example/a-b_c.d/e@" + digest:          {"registry.example", "a-b_c.d/e"},
		"registry.example/app:1@" + digest:              {},
		"registry.example/app:1":                        {},
		"app@" + digest:                                 {},
		"registry.example/App@" + digest:                {},
		"registry.example/../app@" + digest:             {},
		"registry.example//app@" + digest:               {},
		"registry.example/app@sha512:" + digest[7:]:     {},
		"registry.example/app@" + digest[:70]:           {},
		"evil.example\n/app@" + digest:                  {},
		"u@registry.example/app@" + digest:              {},
		"registry.example/app@" + digest + "@" + digest: {},
	} {
		host, repository, got, err := contract.SplitImage(ref)
		if want == ([2]string{}) {
			if err == nil {
				t.Errorf("%q is accepted as %q %q", ref, host, repository)
			}
			continue
		}
		if err != nil || host != want[0] || repository != want[1] || got != digest {
			t.Errorf("%q: %q %q %q %v", ref, host, repository, got, err)
		}
	}
	r, err := contract.ParseResource("kbs:///default/key/model")
	if err != nil || r.String() != "kbs:///default/key/model" || r.Path() != "default/key/model" {
		t.Errorf("%+v %v", r, err)
	}
	for _, bad := range []string{"", "kbs:///a/b", "kbs:///a/b/c/d", "kbs://host/a/b/c", "https:///a/b/c", "kbs:///a/../c", "kbs:///a/b/", "kbs:///a/b/c?d"} {
		if r, err := contract.ParseResource(bad); err == nil {
			t.Errorf("%q is %+v", bad, r)
		}
	}
}

func TestFileNamesAreSafeEverywhere(t *testing.T) {
	t.Parallel()
	for _, good := range []string{"a", "A-1_b.tar.age", strings.Repeat("x", 128)} {
		if !contract.ValidFileName(good) {
			t.Errorf("%q is refused", good)
		}
	}
	for _, bad := range []string{"", ".", "..", ".a", "a/b", `a\b`, "a b", "a\x00", "ä", "a%2f", strings.Repeat("x", 129)} {
		if contract.ValidFileName(bad) {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// Worked vectors: a verifier in another language computes these from the
// documentation alone.
func TestReportDataMatchesTheWorkedVectors(t *testing.T) {
	t.Parallel()
	nonce, key := bytes.Repeat([]byte{0x11}, 32), bytes.Repeat([]byte{0x22}, 32)
	byHand := func(gpu []byte) string {
		h := sha512.New()
		h.Write([]byte("\x00\x00\x00\x15nodeagent evidence v1"))
		h.Write(append([]byte{0, 0, 0, 32}, nonce...))
		h.Write([]byte("\x00\x00\x00\x04spki"))
		h.Write(append([]byte{0, 0, 0, 32}, key...))
		h.Write(append([]byte{0, 0, 0, byte(len(gpu))}, gpu...))
		return hex.EncodeToString(h.Sum(nil))
	}
	plain := contract.EvidenceReportData(nonce, []byte("spki"), key, nil)
	if hex.EncodeToString(plain[:]) != byHand(nil) || plain != contract.EvidenceReportData(nonce, []byte("spki"), key, []byte{}) {
		t.Errorf("without GPU: %x, want %s", plain, byHand(nil))
	}
	digest := sha512.Sum384([]byte("gpu"))
	if with := contract.EvidenceReportData(nonce, []byte("spki"), key, []byte("gpu")); hex.EncodeToString(with[:]) != byHand(digest[:]) {
		t.Errorf("with GPU: %x, want %s", with, byHand(digest[:]))
	}
	if got := contract.HostData([]byte("{}")); hex.EncodeToString(got[:]) != "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a" {
		t.Errorf("HOST_DATA of {} is %x", got)
	}
	if _, err := contract.BrokerReportData("", "n", json.RawMessage(`{`)); err == nil {
		t.Error("report data over a key that is not JSON")
	}
}

// The purposes never collide: one fills 64 bytes, the other ends in zeros.
func TestThePurposesOfReportDataAreApart(t *testing.T) {
	t.Parallel()
	broker, err := contract.BrokerReportData("a", "n", json.RawMessage(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	other, err := contract.BrokerReportData("", "n", json.RawMessage(`{}`))
	if err != nil || other == broker {
		t.Errorf("additional evidence is not bound (%v)", err)
	}
	ours := contract.EvidenceReportData([]byte("n"), nil, nil, nil)
	if !bytes.Equal(broker[48:], make([]byte, 16)) || bytes.Equal(ours[48:], make([]byte, 16)) {
		t.Error("the tails do not tell the purposes apart")
	}
}

func TestRefusalsSayMessageAndCode(t *testing.T) {
	t.Parallel()
	r := contract.Refuse("a.b", "do this", "no %d", 1)
	if r.Error() != "no 1 (a.b)" || r.Because(errors.New("why")).Error() != "no 1 (a.b): why" {
		t.Errorf("%v", r)
	}
	if got := contract.AsRefusal(fmt.Errorf("starting: %w", r)); got != r {
		t.Errorf("a wrapped refusal is lost: %v", got)
	}
}

func TestTCBsAreReadStrictly(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]contract.TCB{
		"snp=27,microcode=86":           {SNP: 27, Microcode: 86},
		"fmc=1, boot-loader=0x0a tee=2": {FMC: 1, BootLoader: 10, TEE: 2},
		(contract.TCB{SNP: 9}).String(): {SNP: 9},
	} {
		if got, err := contract.ParseTCB(text); err != nil || got != want {
			t.Errorf("%q: %v %v", text, got, err)
		}
	}
	for _, text := range []string{"", ",", "snp", "snp=", "snp=256", "snp=-1", "SNP=1", "snp=1,snp=2", "svn=1", "snp = 1"} {
		if got, err := contract.ParseTCB(text); err == nil || got != (contract.TCB{}) {
			t.Errorf("%q: %v %v", text, got, err)
		}
	}
}
