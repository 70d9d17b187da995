// Command gpuhelper asks NVIDIA's driver for a guest's init, which cannot load
// its library (NVML): how many GPUs there are and in what mode, their evidence
// for a nonce, and at last to take work. It is part of a measured image and
// runs for the guest's life: when the last client goes, the driver ends its
// session with the GPUs and only a reset begins another. It speaks the language
// of package vm/guest/gpu on its standard input and output and has no options.
package main

import (
	"fmt"
	"os"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/confidential-node/agent/vm/guest/gpu"
)

func main() {
	if err := help(); err != nil {
		fmt.Fprintln(os.Stderr, "gpuhelper:", err)
		os.Exit(1)
	}
}

func help() error {
	d, err := open(nvml.New())
	if err != nil {
		return err
	}
	return gpu.Serve(os.Stdin, os.Stdout, d)
}
