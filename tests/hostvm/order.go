package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// portName is the virtio-serial port through which orders come.
const portName = "rig"

// order is what the machine is to do, one JSON object; each is answered by one
// result before the next is read.
type order struct {
	Script string        `json:"script"` // for bash
	Limit  time.Duration `json:"limit"`
}

type result struct {
	Out  string `json:"out"`
	Err  string `json:"err"`
	Code int    `json:"code"` // -1: not started, or killed after Limit
}

// outputLimit is how many bytes of either output are answered, the last ones.
const outputLimit = 1 << 20

// inside carries out orders until the port fails.
func inside(ctx context.Context) error {
	port, err := os.OpenFile("/dev/virtio-ports/"+portName, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	orders, results := json.NewDecoder(port), json.NewEncoder(port)
	for {
		var o order
		if err := orders.Decode(&o); err != nil {
			return err
		}
		if err := results.Encode(carryOut(ctx, o)); err != nil {
			return err
		}
	}
}

func carryOut(ctx context.Context, o order) result {
	ctx, cancel := context.WithTimeout(ctx, o.Limit)
	defer cancel()
	var out, errs strings.Builder
	cmd := exec.CommandContext(ctx, "/bin/bash", "-c", o.Script) //nolint:gosec // that is what it is for
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &errs, time.Second
	err := cmd.Run()
	r := result{Out: tail(out.String()), Err: tail(errs.String())}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		r.Code = exit.ExitCode()
	} else if err != nil {
		r.Code, r.Err = -1, r.Err+err.Error()
	}
	if ctx.Err() != nil {
		r.Code, r.Err = -1, fmt.Sprintf("%s (not done after %s)", r.Err, o.Limit)
	}
	return r
}

func tail(s string) string { return s[max(0, len(s)-outputLimit):] }
