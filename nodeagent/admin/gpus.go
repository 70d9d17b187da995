package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/nodeagent/output"
)

// GPU is one device that the agent manages: a GPU or an NVSwitch.
type GPU struct {
	Address string `json:"address"`
	Model   string `json:"model"`
	Board   string `json:"board,omitempty"`
	// State is one of gpu/pool's.
	State string    `json:"state"`
	Since time.Time `json:"since"`
	// Step is under way since StepSince.
	Step      string    `json:"step,omitempty"`
	StepSince time.Time `json:"step_since,omitzero"`
	// Configured says that gpu.manage names it; only then it is offered.
	Configured bool `json:"configured"`
	// OnDuty says that it is to be offered once it is clean; false after a
	// release.
	OnDuty bool `json:"on_duty"`
	// Leaving says that it was released and is on its way to its driver.
	Leaving bool   `json:"leaving"`
	Guest   string `json:"guest,omitempty"`
	// Mode is the CC mode that was read back last.
	Mode string `json:"mode"`
	PDI  string `json:"pdi,omitempty"`
	UUID string `json:"uuid,omitempty"`
	FSP  string `json:"fsp_version,omitempty"`
	// OriginalDriver had it before; empty: none.
	OriginalDriver string      `json:"original_driver,omitempty"`
	Quarantine     *Quarantine `json:"quarantine,omitempty"`
	// Finding is what it waits for.
	Finding *Reason `json:"finding,omitempty"`
}

// Quarantine is why a device is withheld.
type Quarantine struct {
	Reason
	At       time.Time `json:"at"`
	From     string    `json:"from"`
	Step     string    `json:"step,omitempty"`
	Guest    string    `json:"guest,omitempty"`
	Evidence []string  `json:"evidence"`
}

// GPUProblem is why something of gpu.manage cannot be had.
type GPUProblem struct {
	About string `json:"about"`
	Reason
}

// Reason is a refusal that is told about a device.
type Reason struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Remedy  string `json:"remedy"`
}

// ReasonOf tells a refusal; nil stays nil.
func ReasonOf(r *contract.Refusal) *Reason {
	if r == nil {
		return nil
	}
	return &Reason{r.Code, r.Message, r.Remedy}
}

// Refusal is the reason as an error.
func (r Reason) Refusal() *contract.Refusal {
	return &contract.Refusal{Code: r.Code, Message: r.Message, Remedy: r.Remedy}
}

// GPUList is the answer of `nodeagent gpu list`.
type GPUList struct {
	output.Header
	// AgentRunning is false for what an agent recorded that does not run.
	AgentRunning bool `json:"agent_running"`

	GPUs     []GPU        `json:"gpus"`
	Problems []GPUProblem `json:"problems"`
}

// Resting says that the agent has nothing more to do with the device.
func (g GPU) Resting() bool {
	switch {
	case g.Step != "", g.Leaving:
		return false
	case g.State == "unmanaged":
		return !g.OnDuty
	}
	return g.State == "clean" || g.State == "quarantined" || g.State == "reserved" || g.State == "attached"
}

// GPUOrder is what an operator orders for one device.
type GPUOrder struct {
	// Verb is "release", "reset" or "quarantine".
	Verb string `json:"verb"`
	// Anyway releases a device even if CC cannot be switched off.
	Anyway bool `json:"anyway,omitempty"`
	// Reason of a quarantine.
	Reason string `json:"reason,omitempty"`
}

// GPUs is the part of the agent that answers for its GPUs.
type GPUs interface {
	List() GPUList
	// Order records an intent, which is carried out after it returned.
	Order(address string, order GPUOrder) error
}

// maxOrderBytes bounds an order.
const maxOrderBytes = 64 << 10

func handleGPUs(mux *http.ServeMux, gpus GPUs) {
	mux.HandleFunc("GET /v1/gpus", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		list := gpus.List()
		list.AgentRunning = true
		_ = json.NewEncoder(w).Encode(list)
	})
	mux.HandleFunc("POST /v1/gpus/{address}", func(w http.ResponseWriter, r *http.Request) {
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxOrderBytes))
		decoder.DisallowUnknownFields()
		var order GPUOrder
		err := decoder.Decode(&order)
		if err != nil {
			err = contract.Refuse("gpu.order-malformed", "use the nodeagent of the running agent's version", "the order cannot be read: %v", err)
		} else {
			err = gpus.Order(r.PathValue("address"), order)
		}
		if err != nil {
			refuse(w, err)
			return
		}
		w.WriteHeader(http.StatusAccepted)
	})
}

// FetchGPUs asks the agent behind the socket for its GPUs.
func FetchGPUs(ctx context.Context, socket string) (GPUList, error) {
	var list GPUList
	body, err := ask(ctx, socket, http.MethodGet, "/v1/gpus", nil)
	if err == nil {
		err = json.Unmarshal(body, &list)
	}
	if err != nil {
		return GPUList{}, fmt.Errorf("asking for GPUs: %w", err)
	}
	return list, nil
}

// OrderGPU gives an order to the agent behind the socket. What the agent
// refuses is a *contract.Refusal.
func OrderGPU(ctx context.Context, socket, address string, order GPUOrder) error {
	text, err := json.Marshal(order)
	if err != nil {
		return err
	}
	body, err := ask(ctx, socket, http.MethodPost, "/v1/gpus/"+address, text)
	if err = refusalIn(body, err); errors.Is(err, errAnswer) {
		return fmt.Errorf("ordering %s of %s: %w", order.Verb, address, err)
	}
	return err
}

// refuse answers with the error as a refusal.
func refuse(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusConflict)
	_ = json.NewEncoder(w).Encode(contract.AsRefusal(err))
}

// refusalIn is what the agent answered instead of carrying an order out.
func refusalIn(body []byte, err error) error {
	if !errors.Is(err, errAnswer) {
		return err
	}
	var refusal contract.Refusal
	if json.Unmarshal(body, &refusal) == nil && refusal.Code != "" {
		return &refusal
	}
	return fmt.Errorf("%w: %s", err, bytes.TrimSpace(body))
}

// errAnswer means that the agent answered, and not with success.
var errAnswer = errors.New("the agent refuses")

// ask returns the body of an answer, also together with errAnswer.
func ask(ctx context.Context, socket, method, path string, request []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, bytes.NewReader(request))
	if err != nil {
		return nil, err
	}
	resp, err := dial(socket).Do(req)
	if err != nil {
		return nil, unreachable(err, socket)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReplyBytes))
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	if resp.StatusCode >= http.StatusBadRequest {
		return body, errAnswer
	}
	return body, nil
}
