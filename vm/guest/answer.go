package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/tee"
)

// challengePause is waited after a challenge that could not be fetched or
// answered.
const challengePause = time.Second

// answers is what is known about evidence so far.
type answers struct {
	hints hints
	mu    sync.Mutex
	boot  contract.BootComponents
	// given is closed once evidence was given to somebody.
	given     chan struct{}
	givenOnce sync.Once
	initOnce  sync.Once
}

func (a *answers) channel() chan struct{} {
	a.initOnce.Do(func() { a.given = make(chan struct{}) })
	return a.given
}

// gave notes that a verifier has evidence.
func (a *answers) gave() {
	a.givenOnce.Do(func() { close(a.channel()) })
}

// endorsements are the certificates behind a report: the host's hints, and
// what came beside the report where that is better.
func (g *guest) endorsements(ctx context.Context, a tee.Attestation) contract.Endorsements {
	host, err := g.answers.hints.get(ctx, signerOf(a.Report), g.now(), g.host.Endorsements)
	if err != nil {
		g.log.Warn("no newer endorsements", "err", err)
	}
	e, err := endorse(a, host, nil)
	if err != nil {
		g.log.Warn("certificates beside the report are of no use", "err", err)
	}
	return e
}

func (g *guest) bootComponents(ctx context.Context) contract.BootComponents {
	g.answers.mu.Lock()
	defer g.answers.mu.Unlock()
	if g.answers.boot.KernelSHA256 == "" {
		b, err := g.host.Boot(ctx)
		if err != nil {
			g.log.Warn("no boot components", "err", err)
			return contract.BootComponents{}
		}
		g.answers.boot = b
	}
	return g.answers.boot
}

// evidence makes the bundle for a verifier's nonce: a fresh report that binds
// the nonce and the guest's two public keys.
func (g *guest) evidence(ctx context.Context, nonce []byte) ([]byte, error) {
	resultKey, ok := g.resultKey.Public().(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("making evidence: result key is a %T", g.resultKey.Public())
	}
	gpus, err := g.gpus.Evidence(ctx, contract.EvidenceReportData(nonce, g.tls.SPKI, resultKey, nil))
	if err != nil {
		return nil, err
	}
	attested, err := g.tee.Report(ctx, contract.EvidenceReportData(nonce, g.tls.SPKI, resultKey, gpus))
	if err != nil {
		return nil, fmt.Errorf("making evidence: %w", err)
	}
	bundle, err := json.Marshal(contract.Evidence{
		Version: contract.EvidenceVersion, Nonce: nonce, TLSSPKI: g.tls.SPKI, ResultKey: resultKey,
		GPUEvidence: gpus, Report: attested.Report, Manifest: g.manifest, Endorsements: g.endorsements(ctx, attested), Boot: g.bootComponents(ctx),
	})
	if err != nil {
		return nil, fmt.Errorf("encoding evidence: %w", err)
	}
	return bundle, nil
}

// answerChallenges answers what verifiers ask through the host, until ctx
// ends.
func (g *guest) answerChallenges(ctx context.Context) {
	for ctx.Err() == nil {
		if err := g.answerOne(ctx); err != nil {
			g.log.Warn("answering challenge", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(challengePause):
			}
		}
	}
}

func (g *guest) answerOne(ctx context.Context) error {
	challenge, ok, err := g.host.Challenge(ctx)
	if err != nil || !ok {
		return err
	}
	bundle, err := g.evidence(ctx, challenge.Nonce)
	if err != nil {
		return err
	}
	if err := g.host.Evidence(ctx, challenge.ID, bundle); err != nil {
		return err
	}
	g.answers.gave()
	return nil
}

// awaitVerifier gives a verifier that has no evidence yet some time.
func (g *guest) awaitVerifier(ctx context.Context) {
	timer := time.NewTimer(g.linger)
	defer timer.Stop()
	select {
	case <-g.answers.channel():
	case <-g.stopping:
	case <-timer.C:
	case <-ctx.Done():
	}
}
