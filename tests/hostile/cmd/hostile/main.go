// Command hostile is the init of a guest that tries what a guest must not be
// able to do, and posts what it found. Then it waits to be ended. Or it does
// nothing but deliver a result. For tests.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"filippo.io/age"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv6"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/hostile"
	"github.com/confidential-node/agent/vm/guest/boot"
	"github.com/confidential-node/agent/vm/guest/metadata"
)

// tryTimeout bounds one try.
const tryTimeout = 2 * time.Second

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "hostile: this program is the first process of a test's guest and does nothing else")
		os.Exit(2)
	}
	// Nobody can be told of an error; the test misses the report.
	_ = attack(context.Background())
	_ = boot.PowerOff()
	os.Exit(1)
}

func attack(ctx context.Context) error {
	if err := boot.Mounts(); err != nil {
		return err
	}
	if _, err := boot.Modules(); err != nil {
		return err
	}
	device, err := boot.LinkUp(ctx)
	if err != nil {
		return err
	}
	host := metadata.New(device)
	raw, err := host.Manifest(ctx)
	if err != nil {
		return err
	}
	m, err := contract.ParseManifest(raw)
	if err != nil {
		return err
	}
	facts, err := host.Network(ctx)
	if err != nil {
		return err
	}
	if err := errors.Join(boot.Configure(device, facts), host.Status(ctx, contract.GuestStatus{Phase: contract.PhaseBooted})); err != nil {
		return err
	}
	if result := m.Env[hostile.EnvResult]; result != "" {
		return deliver(ctx, host, result)
	}
	if err := listen(ctx); err != nil {
		return err
	}
	stop := make(chan struct{})
	go func() { _ = boot.PowerButton(ctx, func() { close(stop) }) }()
	for {
		if err := post(ctx, m.Env[hostile.EnvCollector], report(ctx, m, facts, device)); err != nil {
			return err
		}
		select {
		case <-stop:
			return nil
		case <-time.After(tryTimeout):
		}
	}
}

// deliver delivers NAME:BYTES as a workload's result, as a guest does that is done.
func deliver(ctx context.Context, host *metadata.Client, result string) error {
	name, size, _ := strings.Cut(result, ":")
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return err
	}
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, identity.Recipient())
	if err != nil {
		return err
	}
	if _, err := w.Write(make([]byte, n)); err != nil {
		return err
	}
	return errors.Join(w.Close(), host.PutResult(ctx, name, &sealed), host.PutResultManifest(ctx, []byte("{}")),
		host.Status(ctx, contract.GuestStatus{Phase: contract.PhaseDone}))
}

// listen accepts connections for as long as the guest lives.
func listen(ctx context.Context) error {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", fmt.Sprintf(":%d", hostile.Port))
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	return nil
}

func report(ctx context.Context, m *contract.Manifest, facts contract.NetworkFacts, device string) hostile.Report {
	r := hostile.Report{LaunchID: m.LaunchID, Address: facts.Address, Reached: map[string]string{}, Disks: disks(), Neighbours: neighbours(device), LinkLocal: linkLocal(device)}
	var mu sync.Mutex // guards r.Reached
	var tries sync.WaitGroup
	for entry := range strings.SplitSeq(m.Env[hostile.EnvTargets], ",") {
		if name, target, ok := strings.Cut(entry, "="); ok {
			tries.Go(func() {
				what := reach(ctx, target)
				mu.Lock()
				defer mu.Unlock()
				r.Reached[name] = what
			})
		}
	}
	tries.Wait()
	for _, address := range []string{contract.MetadataAddr + "%25" + device, facts.Gateway, "169.254.169.254"} {
		try, cancel := context.WithTimeout(ctx, tryTimeout)
		raw, err := metadata.At("http://" + net.JoinHostPort(address, strconv.Itoa(contract.MetadataPort))).Manifest(try)
		cancel()
		if err != nil {
			continue
		}
		if seen, err := contract.ParseManifest(raw); err == nil {
			r.Metadata = append(r.Metadata, seen.LaunchID)
		}
	}
	return r
}

func reach(ctx context.Context, target string) string {
	conn, err := (&net.Dialer{Timeout: tryTimeout}).DialContext(ctx, "tcp", target)
	if err != nil {
		return err.Error()
	}
	_ = conn.Close()
	return hostile.Open
}

func linkLocal(device string) string {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return err.Error()
	}
	addrs, err := link.Addrs()
	if err != nil {
		return err.Error()
	}
	for _, a := range addrs {
		if ip, _, err := net.ParseCIDR(a.String()); err == nil && ip.IsLinkLocalUnicast() {
			return ip.String()
		}
	}
	return ""
}

func disks() []string {
	files, err := filepath.Glob("/sys/block/*/serial")
	if err != nil {
		return []string{err.Error()}
	}
	var out []string
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			text = []byte(err.Error())
		}
		out = append(out, string(bytes.TrimSpace(text)))
	}
	return out
}

// neighbours pings all nodes of the link.
func neighbours(device string) []string {
	conn, err := icmp.ListenPacket("ip6:ipv6-icmp", "::")
	if err != nil {
		return []string{err.Error()}
	}
	defer conn.Close() //nolint:errcheck // only read from
	message := icmp.Message{Type: ipv6.ICMPTypeEchoRequest, Body: &icmp.Echo{ID: 7, Seq: 1, Data: []byte("anybody")}}
	packet, err := message.Marshal(nil)
	if err == nil {
		_, err = conn.WriteTo(packet, &net.IPAddr{IP: net.IPv6linklocalallnodes, Zone: device})
	}
	if err == nil {
		err = conn.SetReadDeadline(time.Now().Add(tryTimeout))
	}
	if err != nil {
		return []string{err.Error()}
	}
	seen := map[string]bool{}
	buffer := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			break
		}
		if m, err := icmp.ParseMessage(58, buffer[:n]); err == nil && m.Type == ipv6.ICMPTypeEchoReply {
			host, _, _ := strings.Cut(from.String(), "%")
			seen[host] = true
		}
	}
	var out []string
	for address := range seen {
		out = append(out, address)
	}
	return out
}

func post(ctx context.Context, url string, r hostile.Report) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(text))
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<10))
	return errors.Join(err, resp.Body.Close())
}
