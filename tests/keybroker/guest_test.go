package keybroker

import (
	"context"
	"strings"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp/snptest"
	"github.com/confidential-node/agent/gpu/spdm/spdmtest"
	"github.com/confidential-node/agent/vm/guest/broker"
)

// evidence is what the guest's client asks the chip for.
func (w *world) evidence(_ context.Context, data [contract.ReportDataSize]byte) (contract.BrokerEvidence, error) {
	r := w.report
	r.ReportData = data
	signed, err := snptest.Sign(r.Marshal(), w.chain.Key)
	return contract.BrokerEvidence{Report: signed, Manifest: w.launch.Manifest, Endorsements: w.chain.Endorsements}, err
}

// The guest's own client, as the init uses it, against this broker.
func TestTheGuestsClientUnderstandsTheBroker(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	boot := func() (*broker.Client, error) {
		c, err := broker.New(w.web.URL, w.web.Client().Transport)
		if err != nil {
			t.Fatal(err)
		}
		return c, c.Attest(t.Context(), broker.NoGPUs, w.evidence)
	}
	first, err := boot()
	if err != nil {
		t.Fatal(err)
	}
	got, err := first.Resource(t.Context(), contract.Resource{Repository: "job", Type: "age", Tag: "data"})
	if err != nil || string(got) != secret {
		t.Fatalf("%q %v", got, err)
	}
	_, err = first.Resource(t.Context(), contract.Resource{Repository: "job", Type: "age", Tag: "none"})
	if r := contract.AsRefusal(err); !strings.Contains(r.Message, "broker.resource-unknown") || r.Remedy == "" {
		t.Fatal(err)
	}
	_, err = boot()
	if r := contract.AsRefusal(err); !strings.Contains(r.Message, "broker.release-exhausted") {
		t.Fatalf("a second boot: %v", err)
	}
}

func TestTheGuestsClientSendsWhatTheBrokerDemandsOfGPUs(t *testing.T) {
	t.Parallel()
	w := newGPUWorld(t, contract.GPU{Model: "B200", Count: 1}, spdmtest.Config{Chip: "GB100", PDI: 5}, nil)
	gpu := newGPU(t, spdmtest.Config{Chip: "GB100", PDI: 5})
	c, err := broker.New(w.web.URL, w.web.Client().Transport)
	if err != nil {
		t.Fatal(err)
	}
	err = c.Attest(t.Context(), func(_ context.Context, data [contract.ReportDataSize]byte) ([]byte, error) {
		return spdmtest.Evidence(contract.GPUNonce(data), gpu)
	}, w.evidence)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Resource(t.Context(), contract.Resource{Repository: "job", Type: "age", Tag: "data"})
	if err != nil || string(got) != secret {
		t.Fatalf("%q %v", got, err)
	}
}
