// Command probe is the workload of the init's tests. It tries what a workload
// must not be able to do, writes what it found to /results/report.json, serves
// HTTP on port 8080 and ends with exit code 7 when asked to.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "sleep" {
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("deaf")
		time.Sleep(time.Hour)
	}
	data, err := json.Marshal(map[string]string{
		"args": strings.Join(os.Args, " "), "secret": os.Getenv("SECRET"), "plain": os.Getenv("PLAIN"),
		"dir": try(os.Getwd), "uid": fmt.Sprint(os.Getuid(), os.Getgid()), "pid": fmt.Sprint(os.Getpid()),
		"input":    try(func() (string, error) { b, err := os.ReadFile("/inputs/data"); return string(b), err }),
		"status":   try(func() (string, error) { b, err := os.ReadFile("/proc/self/status"); return string(b), err }),
		"dev":      list("/dev/*"),
		"root":     list("/*"),
		"sys":      list("/sys/*"),
		"links":    links(),
		"env":      fmt.Sprint(len(os.Environ())),
		"gpu":      try(func() (string, error) { b, err := os.ReadFile("/dev/nvidia0"); return fmt.Sprint(len(b)), err }),
		"driver":   try(func() (string, error) { b, err := os.ReadFile("/usr/local/nvidia/lib/cuda"); return string(b), err }),
		"driverRW": fails(os.WriteFile("/usr/local/nvidia/lib/new", nil, 0o600)),
		"inputRW":  fails(os.WriteFile("/inputs/new", nil, 0o600)),
		"userns":   fails(syscall.Unshare(syscall.CLONE_NEWUSER)),
		"mount":    fails(syscall.Mount("tmpfs", "/tmp", "tmpfs", 0, "")),
		"mknod":    fails(syscall.Mknod("/tmp/mem", syscall.S_IFCHR|0o600, 1<<8|1)),
		"sysctl":   fails(os.WriteFile("/proc/sys/kernel/core_pattern", []byte("|/x"), 0)),
		"sysrq":    fails(os.WriteFile("/proc/sysrq-trigger", []byte("x"), 0)),
		"kernel":   fails(os.WriteFile("/proc/sys/kernel/hostname", []byte("x"), 0)),
		"reboot":   fails(syscall.Reboot(syscall.LINUX_REBOOT_CMD_CAD_OFF)),
		"host": try(func() (string, error) {
			_, err := net.DialTimeout("tcp", "[fe80::1%1]:80", time.Second)
			return "", err
		}),
	})
	if err == nil {
		err = os.WriteFile("/results/report.json", data, 0o600)
	}
	if err == nil {
		err = os.Symlink("/proc/1/environ", "/results/link")
	}
	if err != nil {
		panic(err)
	}
	http.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	http.HandleFunc("/quit", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush() // the answer is out before the end
		os.Exit(7)
	})
	panic(http.ListenAndServe("127.0.0.1:8080", nil))
}

func try(f func() (string, error)) string {
	s, err := f()
	if err != nil {
		return "error: " + err.Error()
	}
	return s
}

func fails(err error) string { return fmt.Sprint(err) }

func list(pattern string) string {
	names, _ := filepath.Glob(pattern)
	return strings.Join(names, " ")
}

func links() string {
	all, _ := net.Interfaces()
	var out []string
	for _, i := range all {
		out = append(out, i.Name)
	}
	return strings.Join(out, " ")
}
