package control

import (
	"encoding/json"
	"testing"
)

func TestOnlyAStreamsConfirmationCounts(t *testing.T) {
	t.Parallel()
	if err := parseStored([]byte(`{"stream":"EVT","seq":7,"duplicate":true}`)); err != nil {
		t.Errorf("a confirmation: %v", err)
	}
	for _, answer := range []string{"", "{}", "+OK", `{"stream":""}`, `{"stream":"EVT","error":{"description":"maximum bytes exceeded"}}`, `[]`} {
		if parseStored([]byte(answer)) == nil {
			t.Errorf("%q counts as stored", answer)
		}
	}
}

func FuzzParseStored(f *testing.F) {
	f.Add([]byte(`{"stream":"EVT","seq":7}`))
	f.Add([]byte(`{"error":{"code":503,"description":"x"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := parseStored(data); err == nil && !json.Valid(data) {
			t.Errorf("%q counts as stored", data)
		}
	})
}
