// Command workload is what demo and tests run inside a guest. `batch` reads
// every input and writes what it saw to the result "summary.json"; `serve`
// answers like an inference server on port 8000 until POST /quit. It stands
// for a tenant's program and is as simple as can be.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// summary is what the program saw.
type summary struct {
	Args   []string          `json:"args"`
	Inputs map[string]string `json:"inputs"` // name to SHA-256 of the plaintext
	Env    map[string]string `json:"env"`
	Served int               `json:"served"`
	Text   string            `json:"text"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	s := summary{Args: args, Inputs: map[string]string{}, Env: map[string]string{}}
	files, err := filepath.Glob("/inputs/*")
	if err != nil {
		return err
	}
	model := sha256.New()
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		model.Write(data)
		sum := sha256.Sum256(data)
		s.Inputs[filepath.Base(file)] = hex.EncodeToString(sum[:])
		s.Text += string(data[:min(len(data), 64)])
	}
	for _, entry := range os.Environ() {
		if key, value, ok := strings.Cut(entry, "="); ok {
			s.Env[key] = value
		}
	}
	if len(args) > 0 && args[0] == "serve" {
		if s.Served, err = serve(hex.EncodeToString(model.Sum(nil))); err != nil {
			return err
		}
	}
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile("/results/summary.json", text, 0o600)
}

// serve answers prompts with a digest of model and prompt.
func serve(model string) (int, error) {
	var served atomic.Int64
	ctx, quit := context.WithCancel(context.Background())
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	mux.HandleFunc("POST /v1/infer", func(w http.ResponseWriter, r *http.Request) {
		prompt, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		served.Add(1)
		sum := sha256.Sum256(append([]byte(model), prompt...))
		_, _ = fmt.Fprintf(w, `{"answer":"%x"}`+"\n", sum)
	})
	mux.HandleFunc("POST /quit", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNoContent)
		quit()
	})
	server := &http.Server{Addr: "127.0.0.1:8000", Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = server.Shutdown(grace)
	}()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return 0, err
	}
	<-answered // ListenAndServe returns before the last answer is out
	return int(served.Load()), nil
}
