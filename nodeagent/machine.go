package main

import (
	"slices"

	"github.com/confidential-node/agent/firmware/snp/host"
	"github.com/confidential-node/agent/nodeagent/kernellog"
	"github.com/confidential-node/agent/vm/diagnosis"
)

// lookAtMachine says what this machine has of SEV-SNP. Where guests cannot be
// started, the kernel's own words of its boot are among the reasons.
func lookAtMachine() host.Report {
	report := host.Judge(host.New("/", host.Linux{}).Facts())
	if report.Enabled {
		return report
	}
	device, err := kernellog.Open("/dev/kmsg")
	if err != nil {
		return report // the log may be for others' eyes
	}
	defer device.Close() //nolint:errcheck // read only
	messages, _ := kernellog.Messages(device)
	return explained(report, messages)
}

// explained adds what the kernel said about SEV-SNP, each cause once.
func explained(report host.Report, messages []string) host.Report {
	for _, message := range messages {
		refusal, _ := diagnosis.Kernel(message)
		if refusal == nil || slices.ContainsFunc(report.Findings, func(f host.Finding) bool { return f.Code == refusal.Code }) {
			continue
		}
		report.Findings = append(report.Findings, host.Finding{
			Code: refusal.Code, Level: host.Blocking, Message: "the kernel's log says: " + refusal.Message, Remedy: refusal.Remedy,
			Observed: message[:min(len(message), 200)],
		})
	}
	return report
}
