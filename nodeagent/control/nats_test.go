package control

import (
	"encoding/json"
	"errors"
	"testing"
)

func TestOnlyAStreamsConfirmationCounts(t *testing.T) {
	t.Parallel()
	if at, err := parseStored([]byte(`{"stream":"EVT","seq":7,"duplicate":true}`)); err != nil || at != 7 {
		t.Errorf("a confirmation: %d, %v", at, err)
	}
	for _, code := range []string{"10071", "10164"} {
		if _, err := parseStored([]byte(`{"stream":"EVT","error":{"code":400,"err_code":` + code + `,"description":"wrong last sequence"}}`)); !errors.Is(err, ErrOvertaken) {
			t.Errorf("code %s: %v", code, err)
		}
	}
	for _, answer := range []string{"", "{}", "+OK", `{"stream":""}`, `{"stream":"EVT","error":{"description":"maximum bytes exceeded"}}`, `[]`} {
		if _, err := parseStored([]byte(answer)); err == nil {
			t.Errorf("%q counts as stored", answer)
		}
	}
}

func FuzzParseStored(f *testing.F) {
	f.Add([]byte(`{"stream":"EVT","seq":7}`))
	f.Add([]byte(`{"error":{"code":503,"description":"x"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := parseStored(data); err == nil && !json.Valid(data) {
			t.Errorf("%q counts as stored", data)
		}
	})
}
