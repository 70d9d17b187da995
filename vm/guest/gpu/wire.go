package gpu

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/confidential-node/agent/firmware/contract"
)

// Orders to the helper. Each is answered once, before the next is given.
const (
	orderState    = "state"
	orderEvidence = "evidence"
	orderReady    = "ready"
)

// maxLine bounds a line in either direction: the evidence of eight GPUs in
// base64, and what surrounds it.
const maxLine = contract.MaxGPUEvidenceBytes + 4096

// request is one order.
type request struct {
	Order string `json:"order"`
	Nonce string `json:"nonce,omitempty"` // of evidence: 64 hex digits
}

// response is its answer. Error is "" when the order was carried out.
type response struct {
	Error    string                 `json:"error,omitempty"`
	State    *State                 `json:"state,omitempty"`
	Evidence []contract.GPUEvidence `json:"evidence,omitempty"`
}

// State is what the driver says of the whole system.
type State struct {
	// GPUs is how many the driver has.
	GPUs int `json:"gpus"`
	// ConfidentialComputing: CC, or protected PCIe, is in force.
	ConfidentialComputing bool `json:"confidential_computing"`
	// Devtools: profilers and debuggers may look in.
	Devtools bool `json:"devtools"`
	// Ready: the GPUs take work.
	Ready bool `json:"ready"`
}

func writeLine(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(line) >= maxLine {
		return fmt.Errorf("a line of %d bytes, at most %d may be sent", len(line), maxLine-1)
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// newLines reads lines of at most maxLine bytes.
func newLines(r io.Reader) *bufio.Scanner {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	return lines
}

var errEnded = errors.New("it has ended")

// next returns the next line; errEnded when there is none any more.
func next(lines *bufio.Scanner) ([]byte, error) {
	if lines.Scan() {
		return lines.Bytes(), nil
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	return nil, errEnded
}

// parseResponse decodes an answer to an order and demands what belongs to it,
// and nothing else.
func parseResponse(order string, line []byte) (response, error) {
	var r response
	if err := contract.UnmarshalStrict(line, maxLine, &r); err != nil {
		return r, fmt.Errorf("its answer cannot be read: %w", err)
	}
	switch {
	case r.Error != "" && (r.State != nil || r.Evidence != nil):
		return r, errors.New("its answer is an error and something else")
	case r.Error != "":
		return r, nil
	case (r.State != nil) != (order == orderState), (r.Evidence != nil) != (order == orderEvidence):
		return r, fmt.Errorf("its answer does not belong to the order %q", order)
	}
	return r, nil
}

func parseNonce(text string) (nonce [contract.GPUNonceBytes]byte, err error) {
	raw, err := hex.DecodeString(text)
	if err == nil && len(raw) != len(nonce) {
		err = fmt.Errorf("%d bytes", len(raw))
	}
	if err != nil {
		return nonce, fmt.Errorf("nonce: %w", err)
	}
	return [contract.GPUNonceBytes]byte(raw), nil
}
