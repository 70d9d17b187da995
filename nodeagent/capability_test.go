package main

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/firmware/snp/host/hosttest"
	"github.com/confidential-node/agent/nodeagent/capability"
)

func TestCapabilityWorksOnWhateverMachineThisIs(t *testing.T) {
	t.Parallel()
	code, out, stderr := run(t, "capability", "-o", "json")
	if code != exitOK || stderr != "" {
		t.Fatalf("exit %d, %s", code, stderr)
	}
	matchesSchema(t, out)
	var doc capabilityDocument
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if !doc.SEVSNP.Enabled && doc.SEVSNP.Why() == "" {
		t.Error("not enabled, and no reason")
	}
	for _, f := range doc.SEVSNP.Findings {
		if f.Level != "note" && f.Remedy == "" {
			t.Errorf("%s has no remedy", f.Code)
		}
	}
	if code, out, _ := run(t, "capability", "-o", "yaml"); code != exitOK || !strings.Contains(out, "kind: Capability") {
		t.Errorf("exit %d, %s", code, out)
	}
}

// capabilityOf is the document of a machine whose software is as on a good
// host, except for an older QEMU.
func capabilityOf(t *testing.T, s hosttest.Setup) capabilityDocument {
	t.Helper()
	m := hosttest.Boot(t, s)
	machine := host.Judge(host.New(m.Root, m).Facts())
	now := time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC)
	return newCapability(machine, capability.Facts{
		Kernel: machine.Facts.Kernel.Release, Libvirt: "11.3.0", QEMU: "10.0.2", Now: now,
		Firmware:     []capability.Firmware{{Path: "/usr/share/ovmf/OVMF.amdsev.fd", Build: "AmdSev", Usable: true}},
		Endorsements: &capability.EndorsementFacts{Findings: []*contract.Refusal{contract.Refuse("endorsements.vcek-missing", "r", "m")}},
	})
}

func TestCapabilityDocumentsMatchTheirSchema(t *testing.T) {
	t.Parallel()
	broken := hosttest.Genoa()
	broken.Cmdline, broken.NoMiscController, broken.Unprivileged = "iommu=pt", true, true
	odd := hosttest.Turin()
	odd.Firmware.UnknownFlags, odd.Firmware.UnknownConfig, odd.Firmware.Guests = 0x80, 1<<31, 2
	for _, s := range []hosttest.Setup{hosttest.Genoa(), hosttest.Turin(), broken, odd} {
		raw, err := json.Marshal(capabilityOf(t, s))
		if err != nil {
			t.Fatal(err)
		}
		matchesSchema(t, string(raw))
	}
}

// Every field that the types have is in the schema, and nothing else is.
func TestTheCapabilitySchemaNamesEveryField(t *testing.T) {
	t.Parallel()
	text, err := schemas.ReadFile("schemas/Capability.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	compareFields(t, "Capability", reflect.TypeFor[capabilityDocument](), schema)
}

func compareFields(t *testing.T, at string, typ reflect.Type, schema map[string]any) {
	t.Helper()
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
		if typ.Kind() == reflect.Slice {
			schema, _ = schema["items"].(map[string]any)
		}
		typ = typ.Elem()
	}
	if typ.Kind() != reflect.Struct || typ == reflect.TypeFor[time.Time]() {
		return
	}
	properties, _ := schema["properties"].(map[string]any)
	named := 0
	for _, field := range reflect.VisibleFields(typ) {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if field.Anonymous || name == "-" {
			continue
		}
		property, ok := properties[name].(map[string]any)
		if !ok {
			t.Errorf("%s.%s is not in the schema", at, name)
			continue
		}
		named++
		compareFields(t, at+"."+name, field.Type, property)
	}
	if named != len(properties) {
		t.Errorf("%s: the schema has %d fields, the type %d", at, len(properties), named)
	}
}

func TestTheCapabilityTableSaysItInWords(t *testing.T) {
	t.Parallel()
	table := func(s hosttest.Setup) string {
		var out bytes.Buffer
		if err := printCapability(&out, capabilityOf(t, s)); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	good := hosttest.Turin()
	good.Firmware.Guests, good.Firmware.VLEKLoaded = 3, true
	bad := hosttest.Genoa()
	bad.Cmdline = "iommu=pt"
	uncounted := bad
	uncounted.NoMiscController = true
	for name, c := range map[string]struct {
		table string
		want  []string
	}{
		"a good host": {table(good), []string{
			"sev-snp       usable\n", "Turin, Zen 5, product line Turin", "family 0x1a model 0x2", "1.58.12, initialized", "snp=4 microcode=81 fmc=1", "0x5100000004010101",
			"96 of 99 free, 0 starting, ending or SEV-ES", "segmented, covers memory: yes", "vlek          loaded", "VM types 0x15",
			"for the reported TCB: no, revocation list current: no", "endorsements.vcek-missing", "yes         no         10.0.2", "before renting out GPUs: at least 10.1", "sev_es=N sev_snp=Y", "NOTE  sev-es.off",
		}},
		"nobody counts": {table(uncounted), []string{"99, how many are free is unknown"}},
		"a bad host": {table(bad), []string{
			"not usable: kvm.no-snp", "cmdline.trap", "SNP parameters: iommu=pt", "BLOCKING  iommu.passthrough", "silently disables SNP", "what to do: remove iommu=pt", "seen: SYSCFG = ",
			"99 of 99 free", "vlek          unknown",
		}},
	} {
		for _, want := range c.want {
			if !strings.Contains(c.table, want) {
				t.Errorf("%s: no %q in\n%s", name, want, c.table)
			}
		}
	}
}
