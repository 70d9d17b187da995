package gpu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/confidential-node/agent/firmware/contract"
)

// Driver is the helper's other side: NVIDIA's driver, or its stand-in.
type Driver interface {
	State() (State, error)
	// Evidence is that of every GPU, in the order of their PCI addresses.
	Evidence(nonce [contract.GPUNonceBytes]byte) ([]contract.GPUEvidence, error)
	// Ready has the GPUs take work. There is no way back before a reset.
	Ready() error
}

// Serve is the helper: it carries out orders until in ends.
func Serve(in io.Reader, out io.Writer, driver Driver) error {
	lines := newLines(in)
	for {
		line, err := next(lines)
		if errors.Is(err, errEnded) {
			return nil
		}
		if err != nil {
			return err
		}
		r, err := carryOut(line, driver)
		if err != nil {
			r = response{Error: err.Error()}
		}
		if err := writeLine(out, r); err != nil {
			return err
		}
	}
}

func carryOut(line []byte, driver Driver) (r response, err error) {
	var q request
	if err := json.Unmarshal(line, &q); err != nil {
		return r, err
	}
	switch q.Order {
	case orderState:
		state, err := driver.State()
		return response{State: &state}, err
	case orderEvidence:
		nonce, err := parseNonce(q.Nonce)
		if err != nil {
			return r, err
		}
		r.Evidence, err = driver.Evidence(nonce)
		if err == nil && r.Evidence == nil {
			return r, errors.New("the driver has no GPU")
		}
		return r, err
	case orderReady:
		return r, driver.Ready()
	}
	return r, fmt.Errorf("unknown order %.40q", q.Order)
}
