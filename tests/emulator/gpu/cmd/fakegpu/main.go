// Command fakegpu is one emulated GPU or NVSwitch for a virtual machine:
//
//	fakegpu --model h100 --socket gpu0.sock --state gpu0.json --control gpu0.ctl
//
// QEMU (11 or newer) takes the socket as a device:
//
//	-device '{"driver":"vfio-user-pci","bus":"rp0","socket":{"type":"unix","path":"gpu0.sock"}}'
//
// The state file keeps the knobs; the control socket takes one JSON object a
// line and answers with the device's state:
//
//	{"do":"state"}
//	{"do":"break","faults":{"FSPSilent":true}}
//	{"do":"vanish"}
//	{"do":"knob","knob":7,"value":0}
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/confidential-node/agent/gpu/gputest"
	"github.com/confidential-node/agent/tests/emulator/gpu"
	"github.com/confidential-node/agent/tests/emulator/gpu/vfiouser"
)

func main() {
	models := gpu.Models()
	name := flag.String("model", "h100", "one of "+strings.Join(slices.Sorted(maps.Keys(models)), ", "))
	socket := flag.String("socket", "", "where the virtual machine connects")
	state := flag.String("state", "", "file that keeps the knobs; without, they go with the process")
	control := flag.String("control", "", "where orders come from; without, nobody breaks the device")
	pdi := flag.Uint64("pdi", 0, "device id, to tell two of one model apart (default: the model's)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	model, ok := models[*name]
	if !ok || *socket == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if *pdi != 0 {
		model.PDI = *pdi
	}
	if err := run(ctx, model, *socket, *state, *control); err != nil {
		fmt.Fprintln(os.Stderr, "fakegpu:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, model gputest.Model, socket, state, control string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	e := gputest.New(model)
	if state != "" {
		if err := gpu.Keep(e, state, func(err error) { cancel(err) }); err != nil {
			return err
		}
	}
	ended, services := make(chan error, 2), 1
	if control != "" {
		listener, err := vfiouser.Listen(ctx, control)
		if err != nil {
			return err
		}
		services++
		go func() { ended <- gpu.Control(ctx, listener, e) }()
	}
	listener, err := vfiouser.Listen(ctx, socket)
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stdout, "%s, PDI %#x, on %s\n", model.Name, model.PDI, socket)
	go func() { ended <- vfiouser.Serve(ctx, listener, gpu.Function{Emulator: e}) }()
	err = <-ended
	cancel(err)
	for range services - 1 { // each takes its socket away as it ends
		err = errors.Join(err, <-ended)
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}
