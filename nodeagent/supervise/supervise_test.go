package supervise

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
)

var errBroken = errors.New("broken")

func untilEnd(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

func TestTheFirstFailureEndsAllWithItsCause(t *testing.T) {
	t.Parallel()
	g := New(t.Context(), hclog.NewNullLogger())
	var cause error
	g.Go("other", func(ctx context.Context) error { <-ctx.Done(); cause = context.Cause(ctx); return ctx.Err() })
	g.Go("bad", func(context.Context) error { return errBroken })
	err := g.Wait()
	if !errors.Is(err, errBroken) || !strings.HasPrefix(err.Error(), "bad: ") {
		t.Errorf("ended with %v", err)
	}
	if !errors.Is(cause, errBroken) {
		t.Errorf("the others were told %v", cause)
	}
	if g.Go("late", untilEnd) {
		t.Error("a task was begun after the end")
	}
}

func TestAPanicIsAnErrorWithItsStack(t *testing.T) {
	t.Parallel()
	g := New(t.Context(), hclog.NewNullLogger())
	g.Go("bad", func(context.Context) error { panic("oops") })
	p, ok := errors.AsType[*PanicError](g.Wait())
	if !ok || p.Value != "oops" || !strings.Contains(string(p.Stack), "TestAPanicIsAnErrorWithItsStack") {
		t.Errorf("got %v", p)
	}
}

func TestTheEndOfTheContextIsNoFailure(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	g := New(ctx, hclog.NewNullLogger())
	g.Go("a", untilEnd)
	g.Restart("b", untilEnd, Backoff{time.Second, time.Minute})
	cancel()
	if err := g.Wait(); err != nil {
		t.Errorf("ended with %v", err)
	}
}

func TestPassingFailuresAreTriedAgainWithGrowingPauses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := New(t.Context(), hclog.NewNullLogger())
		begun := time.Now()
		var at []time.Duration
		g.Restart("shaky", func(context.Context) error {
			at = append(at, time.Since(begun))
			switch len(at) {
			case 3:
				panic("as bad as an error")
			case 6:
				<-time.After(time.Minute) // long enough to start over
				return errBroken
			case 8:
				return nil
			}
			return errBroken
		}, Backoff{time.Second, 4 * time.Second})
		if err := g.Wait(); err != nil {
			t.Errorf("ended with %v", err)
		}
		want := []int{0, 1, 3, 7, 11, 15, 76, 78}
		if len(at) != len(want) {
			t.Fatalf("begun at %v", at)
		}
		for i := range want {
			if int(at[i].Seconds()) != want[i] {
				t.Errorf("begun at %v, want %v seconds", at, want)
				break
			}
		}
	})
}

func TestAFatalErrorEndsARestartedTask(t *testing.T) {
	t.Parallel()
	g := New(t.Context(), hclog.NewNullLogger())
	g.Restart("store", func(context.Context) error { return Fatal(errBroken) }, Backoff{time.Hour, time.Hour})
	if err := g.Wait(); !errors.Is(err, errBroken) {
		t.Errorf("ended with %v", err)
	}
}

func TestTasksMayBeginTasks(t *testing.T) {
	t.Parallel()
	g := New(t.Context(), hclog.NewNullLogger())
	var n atomic.Int32
	g.Go("parent", func(context.Context) error {
		for range 10 {
			g.Go("child", func(context.Context) error { n.Add(1); return nil })
		}
		return nil
	})
	if err := g.Wait(); err != nil || n.Load() != 10 {
		t.Errorf("%d children, %v", n.Load(), err)
	}
}
