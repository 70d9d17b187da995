package e2e_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/hostile"
	"github.com/confidential-node/agent/tests/rig"
	"github.com/confidential-node/agent/tests/tenant"
	"github.com/confidential-node/agent/tests/trial"
)

// collector takes the reports of hostile guests, on the outside.
type collector struct {
	url string

	mu     sync.Mutex
	latest map[string]hostile.Report // by launch id
}

func (w *world) collector() *collector {
	w.t.Helper()
	ln, err := (&net.ListenConfig{}).Listen(w.ctx, "tcp", rig.OutsideAddr+":0")
	if err != nil {
		w.t.Fatal(err)
	}
	c := &collector{url: "http://" + ln.Addr().String() + "/", latest: map[string]hostile.Report{}}
	server := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		var report hostile.Report
		if err := json.NewDecoder(r.Body).Decode(&report); err != nil {
			http.Error(rw, err.Error(), http.StatusBadRequest)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.latest[report.LaunchID] = report
	})}
	go func() { _ = server.Serve(ln) }()
	w.t.Cleanup(func() { _ = server.Close() })
	return c
}

// forget makes await wait for reports that were begun after it.
func (c *collector) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.latest)
}

func (c *collector) of(launchID string) (hostile.Report, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.latest[launchID]
	return r, ok
}

// listenOnHost opens a port of the host, as an operator's own service.
func (w *world) listenOnHost(h *trial.Host, port string) {
	w.t.Helper()
	ln, err := h.Listen(w.ctx, ":"+port)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
}

// Two tenants' guests on one host, both of them attackers who know each
// other's addresses.
func TestGuestsOfTwoTenantsSeeNothingOfEachOther(t *testing.T) {
	w, hosts := newWorld(t, trial.HostOptions{})
	h := hosts[0]
	const operatorPort = "9999"
	w.listenOnHost(h, operatorPort)
	reports := w.collector()
	// Guests get the first two /30 of the host's range, 10.213.0.0/16.
	addresses := []string{"10.213.0.2", "10.213.0.6"}
	targets := []string{
		"collector=" + strings.TrimSuffix(strings.TrimPrefix(reports.url, "http://"), "/"),
		"host-uplink=" + net.JoinHostPort(h.Addr.String(), operatorPort), "host-gateway=10.213.0.1:" + operatorPort, "other-gateway=10.213.0.5:" + operatorPort,
		"host-loopback=127.0.0.1:" + operatorPort, "metadata-of-clouds=169.254.169.254:80", "private=10.0.0.1:80", "private-b=192.168.0.1:80",
		"published-port=" + net.JoinHostPort(h.Addr.String(), "20000"),
	}
	for i, address := range addresses {
		targets = append(targets, fmt.Sprintf("guest%d=%s", i, net.JoinHostPort(address, fmt.Sprint(hostile.Port))))
	}
	var deployed []*tenant.Deployment
	for i, name := range []string{"alice", "bob"} {
		u := w.tenant(name, trial.TenantOptions{Image: w.Programs.Stranger})
		u.write("secret.txt", "the data of "+name)
		args := []string{
			"--dataset", "file://secret.txt", "--env", hostile.EnvCollector + "=" + reports.url, "--env", hostile.EnvTargets + "=" + strings.Join(targets, ","),
			"--result", "out.json", "--port", fmt.Sprint(hostile.Port), "--command", "none",
		}
		d := u.deploy("attack", args...)
		deployed = append(deployed, d)
		w.phase(d.GuestID, contract.PhaseBooted)
		if err := trial.Await(w.ctx, "a report", func() (bool, error) { _, ok := reports.of(d.LaunchID); return ok, nil }); err != nil {
			t.Fatal(err)
		}
		if r, _ := reports.of(d.LaunchID); !strings.HasPrefix(r.Address, addresses[i]+"/") {
			t.Fatalf("%s's guest has the address %s, expected %s", name, r.Address, addresses[i])
		}
	}
	reports.forget()
	for i, d := range deployed {
		var r hostile.Report
		if err := trial.Await(w.ctx, "a report while both run", func() (ok bool, _ error) { r, ok = reports.of(d.LaunchID); return ok, nil }); err != nil {
			t.Fatal(err)
		}
		for name, what := range r.Reached {
			allowed := name == "collector" || name == fmt.Sprintf("guest%d", i)
			if (what == hostile.Open) != allowed {
				t.Errorf("guest %d, target %s: %s", i, name, what)
			}
		}
		if len(r.Reached) != len(targets) {
			t.Errorf("guest %d tried %v, not %v", i, r.Reached, targets)
		}
		if !slices.Equal(r.Metadata, []string{d.LaunchID}) {
			t.Errorf("guest %d was served the manifests of %v, its own is %s", i, r.Metadata, d.LaunchID)
		}
		if !slices.Equal(r.Disks, []string{d.Inputs[0].SHA256[:20]}) {
			t.Errorf("guest %d sees disks %v, its own is %s", i, r.Disks, d.Inputs[0].SHA256)
		}
		if slices.ContainsFunc(r.Neighbours, func(a string) bool { return a != contract.MetadataAddr && a != r.LinkLocal }) {
			t.Errorf("guest %d was answered by %v", i, r.Neighbours)
		}
	}
	// From the host every guest answers, so the silence above was the rules'.
	for _, address := range addresses {
		if _, err := h.Output(w.ctx, "bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/%d", address, hostile.Port)); err != nil {
			t.Errorf("guest %s does not even answer its host: %v", address, err)
		}
	}
	for _, d := range deployed {
		if a, err := trial.Ask(w.ControlCommand(w.ctx, "stop", d.GuestID, "--grace", "1s"), nil); err != nil || a.Code != 0 {
			t.Fatalf("controlplane stop: %v %s", err, a)
		}
		w.ended(d.GuestID)
	}
	w.clean(h)
}
