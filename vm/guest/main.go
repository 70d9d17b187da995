// Command guest is the init of a confidential guest: the first process of a
// measured image. It fetches the launch's manifest, makes sure that it is the
// one the silicon was told (HOST_DATA), proves itself to the tenant's key
// broker, opens the sealed inputs in private memory, runs the image pinned by
// digest apart from itself, answers verifiers, seals and signs the results,
// and powers off. Whatever is not as the manifest says ends the guest with a
// typed refusal.
//
// It trusts the silicon, the manifest and whom the manifest pins. The host is
// asked for hints and carries ciphertext; nothing secret reaches it, nor any
// console. run.go is the one wiring list; flow.go the order of things. The
// program has no options: what it does differently it reads from the measured
// kernel command line or was built with. Its goroutines end with the guest.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/boot"
	"github.com/confidential-node/agent/vm/guest/workload"
)

func main() {
	if os.Args[0] == workload.Stage {
		// It returns only when it failed, and has told the init why.
		if err := workload.Enter(); err != nil {
			os.Exit(1)
		}
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest: this program is the first process of a guest and does nothing else")
		os.Exit(2)
	}
	log := hclog.NewNullLogger()
	mountErr := boot.Mounts()
	variant, err := boot.Variant()
	if err == nil && variant == contract.VariantDebug {
		log = hclog.New(&hclog.LoggerOptions{Name: "guest", Level: hclog.Debug, Output: os.Stderr})
	}
	if mountErr != nil {
		log.Error("mounting", "err", mountErr)
	} else if err := run(context.Background(), log, variant == contract.VariantDebug); err != nil {
		log.Error("guest ended", "err", err)
	}
	if err := boot.PowerOff(); err != nil {
		log.Error("powering off", "err", err)
	}
	// The end of the first process is a kernel panic, and with panic=-1 the
	// end of the machine.
	os.Exit(1)
}
