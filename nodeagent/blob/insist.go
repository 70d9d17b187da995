package blob

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/confidential-node/agent/firmware/contract"
)

// insist does what may fail and pass, as often as is worth while and not
// before the store wants it. No try begins after the URL has expired.
func insist(ctx context.Context, presigned, what string, now func() time.Time, log hclog.Logger, do func() error) error {
	for attempt := 0; ; attempt++ {
		err := do()
		if err == nil || lasting(err) || ctx.Err() != nil || attempt == attempts-1 {
			return err
		}
		pause := max(retryPause<<attempt, RetryAfter(err))
		if until := Expiry(presigned); !until.IsZero() && now().Add(pause).After(until) {
			return contract.Refuse(codeURLExpired, again, "the URL expires before the object store takes or gives %s", what).Because(err)
		}
		log.Debug("failed, trying again", "what", what, "attempt", attempt, "pause", pause.String(), "err", err)
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

// lasting errors are the same at every try.
func lasting(err error) bool {
	_, refused := errors.AsType[*contract.Refusal](err)
	return refused || errors.Is(err, errReplaced)
}

// RetryAfter is how long the object store asked to be left alone with this
// error; 0 when it did not ask.
func RetryAfter(err error) time.Duration {
	if busy, told := errors.AsType[*busyError](err); told {
		return busy.after
	}
	return 0
}
