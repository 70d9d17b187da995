package control_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/confidential-node/agent/nodeagent/api"
	"github.com/confidential-node/agent/nodeagent/control"
	"github.com/confidential-node/agent/nodeagent/control/controltest"
)

func TestTheFakeConforms(t *testing.T) {
	t.Parallel()
	controltest.Suite(t, func(t *testing.T, body func(*testing.T, controltest.Server)) {
		t.Helper()
		t.Parallel()
		synctest.Test(t, func(t *testing.T) { body(t, controltest.NewFake(controltest.Host)) })
	})
}

func TestALostAcknowledgementBringsTheCommandAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := controltest.NewFake(controltest.Host)
		n := controltest.StartNode(t, f, nil)
		f.LoseAcks(1)
		f.Send(t, []byte("a"))
		controltest.Eventually(t, "settled", func() bool { return f.Unsettled(t) == 0 })
		if got := n.Inbox.Times([]byte("a")); got != 2 {
			t.Errorf("delivered %d times, want 2", got)
		}
	})
}

func TestALostPublishAnswerStoresTheEventOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := controltest.NewFake(controltest.Host)
		n := controltest.StartNode(t, f, nil)
		f.LosePublishAnswers(3)
		if err := n.Outbox.AppendEvents(api.NewDone(controltest.Host, "", time.Now())); err != nil {
			t.Fatal(err)
		}
		controltest.Eventually(t, "outbox empty", func() bool { l, err := n.Outbox.OutboxLen(); return err == nil && l == 0 })
		done := 0
		for _, e := range f.Events(t) {
			if e.GetCommandDone() != nil {
				done++
			}
		}
		if done != 1 {
			t.Errorf("stored %d times", done)
		}
	})
}

func TestASilentConnectionIsThrownAwayAfterTheDeadManTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := controltest.NewFake(controltest.Host)
		n := controltest.StartNode(t, f, nil)
		controltest.Eventually(t, "connected", func() bool { return n.Status().State == control.StateConnected })
		f.SetSilent(true)
		began := time.Now()
		controltest.Eventually(t, "dead man", func() bool { return n.Status().State == control.StateSilent })
		if passed := time.Since(began); passed < 10*time.Second || passed > 21*time.Second {
			t.Errorf("noticed after %s", passed)
		}
		controltest.Eventually(t, "dialled anew", func() bool { return f.Dials() >= 2 })
		f.SetSilent(false)
		controltest.Eventually(t, "healed", func() bool { return n.Status().State == control.StateConnected })
	})
}

func TestAQuietLinkIsNotThrownAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := controltest.NewFake(controltest.Host)
		n := controltest.StartNode(t, f, func(d *control.Deps) { d.Interval, d.DeadMan = 10*time.Minute, 5*time.Second })
		<-time.After(time.Hour)
		if f.Dials() != 1 || time.Since(n.Status().LastRoundTrip) > 5*time.Second {
			t.Errorf("%d dials, status %+v", f.Dials(), n.Status())
		}
	})
}

func TestAMissingQueueKeepsEventsFlowingAndHealsWithoutRedial(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := controltest.NewFake(controltest.Host)
		f.RemoveQueue(true)
		n := controltest.StartNode(t, f, nil)
		if err := n.Outbox.AppendEvents(api.NewDone(controltest.Host, "", time.Now())); err != nil {
			t.Fatal(err)
		}
		controltest.Eventually(t, "named", func() bool { return n.Status().State == control.StateConsumerMissing && n.Status().Connected })
		controltest.Eventually(t, "outbox empty", func() bool { l, err := n.Outbox.OutboxLen(); return err == nil && l == 0 })
		f.Send(t, []byte("a"))
		f.RemoveQueue(false)
		controltest.Eventually(t, "settled", func() bool { return f.Unsettled(t) == 0 })
		if st := n.Status(); st.State != control.StateConnected || st.LastError != "" || f.Dials() != 1 {
			t.Errorf("status %+v, %d dials", st, f.Dials())
		}
	})
}

func TestAMissingEventStreamKeepsCommandsFlowingAndLosesNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := controltest.NewFake(controltest.Host)
		f.RemoveStream(true)
		n := controltest.StartNode(t, f, nil)
		if err := n.Outbox.AppendEvents(api.NewDone(controltest.Host, "", time.Now())); err != nil {
			t.Fatal(err)
		}
		f.Send(t, []byte("a"))
		controltest.Eventually(t, "settled", func() bool { return f.Unsettled(t) == 0 })
		controltest.Eventually(t, "named", func() bool { return n.Status().State == control.StateStreamMissing })
		f.RemoveStream(false)
		controltest.Eventually(t, "outbox empty", func() bool { l, err := n.Outbox.OutboxLen(); return err == nil && l == 0 })
		controltest.Eventually(t, "healed", func() bool { return n.Status().State == control.StateConnected })
	})
}

func TestAnEventTooLargeToPublishDoesNotHoldBackTheRest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := controltest.NewFake(controltest.Host)
		f.LimitEvents(4096)
		n := controltest.StartNode(t, f, nil)
		big := api.NewEvidence(controltest.Host, "", time.Now(), "g", make([]byte, 8192))
		bigger := api.NewEvidence(controltest.Host, "", time.Now(), "g", make([]byte, api.MaxEventBytes))
		if err := n.Outbox.AppendEvents(big, bigger, api.NewDone(controltest.Host, "", time.Now())); err != nil {
			t.Fatal(err)
		}
		controltest.Eventually(t, "outbox empty", func() bool { l, err := n.Outbox.OutboxLen(); return err == nil && l == 0 })
		events := f.Events(t)
		if last := events[len(events)-1]; last.GetCommandDone() == nil && last.GetHeartbeat() == nil {
			t.Errorf("last event %v", last)
		}
	})
}

func TestARefusedIdentityIsNamedAndTriedAgainForEver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := controltest.NewFake(controltest.Host)
		f.Refuse(&control.LinkError{State: control.StateAuthExpired, Remedy: "enrol again", Err: errors.New("expired")})
		n := controltest.StartNode(t, f, nil)
		<-time.After(24 * time.Hour)
		if st := n.Status(); st.State != control.StateAuthExpired || st.Connected || st.LastError == "" {
			t.Errorf("status %+v", st)
		}
		f.Refuse(nil)
		began := time.Now()
		controltest.Eventually(t, "connected", func() bool { return n.Status().State == control.StateConnected })
		if time.Since(began) > time.Minute+time.Second {
			t.Errorf("took %s to come back after a day", time.Since(began))
		}
	})
}

func TestABrokenOutboxIsTriedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := controltest.NewFake(controltest.Host)
		n := controltest.StartNode(t, f, nil)
		n.Outbox.FailWith(func(op string) error {
			if op == "NextEvents" || op == "DropEvents" {
				return errors.New("bad page")
			}
			return nil
		})
		if err := n.Outbox.AppendEvents(api.NewDone(controltest.Host, "", time.Now())); err != nil {
			t.Fatal(err)
		}
		<-time.After(5 * time.Minute)
		n.Outbox.FailWith(nil)
		controltest.Eventually(t, "outbox empty", func() bool { l, err := n.Outbox.OutboxLen(); return err == nil && l == 0 })
	})
}

func TestALinkNeedsItsParts(t *testing.T) {
	t.Parallel()
	if _, err := control.New(control.Deps{}); err == nil {
		t.Error("a link of nothing was made")
	}
	for _, servers := range [][]string{nil, {"nats://a:1"}, {"tls://user:secret@a:1"}, {"tls://a"}, {"tls://a:1/x"}} {
		if _, err := control.NewNATS(control.NATSConfig{Servers: servers, HostID: "a"}); err == nil {
			t.Errorf("servers %v were accepted", servers)
		}
	}
}
