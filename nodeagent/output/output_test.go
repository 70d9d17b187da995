package output

import (
	"bytes"
	"encoding/json"
	"io"
	"testing"

	"go.yaml.in/yaml/v3"
)

type doc struct {
	Header
	Name  string   `json:"name"`
	Zeros string   `json:"zeros"`
	Items []string `json:"items"`
}

func TestJSONAndYAMLCarryTheSameKeysAndTypes(t *testing.T) {
	t.Parallel()
	d := doc{NewHeader("Thing"), "a: b", "0012", []string{"true", "x"}}
	fromJSON, fromYAML := map[string]any{}, map[string]any{}
	for _, format := range []Format{"json", "yaml"} {
		var out bytes.Buffer
		if err := format.Print(&out, d, nil); err != nil {
			t.Fatal(err)
		}
		into := &fromJSON
		decode := json.Unmarshal
		if format == "yaml" {
			into, decode = &fromYAML, yaml.Unmarshal
		}
		if err := decode(out.Bytes(), into); err != nil {
			t.Fatalf("%s: %v\n%s", format, err, out.Bytes())
		}
	}
	a, _ := json.Marshal(fromJSON)
	b, _ := json.Marshal(fromYAML)
	if !bytes.Equal(a, b) || !bytes.Contains(a, []byte(`"apiVersion":"nodeagent/v1"`)) || !bytes.Contains(a, []byte(`"zeros":"0012"`)) {
		t.Errorf("json %s\nyaml %s", a, b)
	}
}

func TestTableIsTheDefaultAndUnknownFormatsAreRefused(t *testing.T) {
	t.Parallel()
	var f Format
	called := false
	if err := f.Print(io.Discard, nil, func(io.Writer) error { called = true; return nil }); err != nil || !called {
		t.Errorf("table not printed: %v", err)
	}
	if f.Set("xml") == nil {
		t.Error("format xml is accepted")
	}
}
