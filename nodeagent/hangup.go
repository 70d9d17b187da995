package main

import (
	"context"
	"os"
	"os/signal"
	"reflect"
	"syscall"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/nodeagent/config"
)

// answerHangups answers SIGHUP, which would end the process otherwise and
// which operators send after an edit, until ctx ends.
func answerHangups(ctx context.Context, file string, running config.Config, log hclog.Logger) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangups:
			checkConfig(file, running, log)
		}
	}
}

// checkConfig says whether the configuration on disk would be taken by the
// next start. Nothing is changed under a running agent: a restart is safe at
// any time, and half a change of policy is not.
func checkConfig(file string, running config.Config, log hclog.Logger) {
	next, err := config.Load(file)
	switch {
	case err != nil:
		log.Error("the configuration on disk cannot be used, and the next start would fail; the running one stays", "err", err)
	case reflect.DeepEqual(next, running):
		log.Info("the configuration on disk is the running one")
	default:
		log.Warn("the configuration on disk is sound and differs from the running one; restart the agent to apply it, guests go on running")
	}
}
