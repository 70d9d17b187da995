package tenant

import "github.com/confidential-node/agent/firmware/contract"

// ParseTCB decodes the flag --min-tcb. An empty text is no floor at all.
func ParseTCB(text string) (*contract.TCB, error) {
	if text == "" {
		return nil, nil //nolint:nilnil // no floor is an answer
	}
	tcb, err := contract.ParseTCB(text)
	if err != nil {
		return nil, Usage("--min-tcb: %v", err)
	}
	return &tcb, nil
}
