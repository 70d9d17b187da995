package tenant

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// Exit codes of the tenant command.
const (
	ExitOK           = 0
	ExitFailed       = 1
	ExitUsage        = 2
	ExitUnreachable  = 3
	ExitNotFound     = 4
	ExitPrecondition = 5
	ExitConflict     = 6
	ExitTimeout      = 7
)

// Codes of refusals that callers tell apart.
const (
	codeNotFound       = "tenant.not-found"
	codeNameInUse      = "tenant.name-in-use"
	codeUsage          = "tenant.usage"
	codeGuestEnded     = "tenant.guest-ended"
	codeNotSealed      = "tenant.not-sealed"
	codeAlreadySealed  = "tenant.already-sealed"
	codeFormatGPG      = "tenant.format-gpg"
	codeUnverified     = "tenant.evidence-refused"
	codeObjectNotFound = "tenant.object-not-found"
)

// Usage is a wrong invocation or profile.
func Usage(format string, args ...any) error {
	return contract.Refuse(codeUsage, "see tenant --help and the comments of the sample profile", format, args...)
}

// ExitCode maps an outcome to the command's exit code.
func ExitCode(err error) int {
	if err == nil {
		return ExitOK
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return ExitTimeout
	}
	if refused, ok := errors.AsType[*contract.Refusal](err); ok {
		return refusalExit(refused.Code)
	}
	_, network := errors.AsType[*net.OpError](err)
	_, request := errors.AsType[*url.Error](err) // no answer, or none over TLS with the pinned CA
	if network || request || errors.Is(err, brokeradmin.ErrUnreachable) || errors.Is(err, ErrUnreachable) {
		return ExitUnreachable
	}
	if errors.Is(err, fs.ErrNotExist) {
		return ExitNotFound
	}
	return ExitFailed
}

// Remedy says what to do about an outcome.
func Remedy(err error) string {
	if refused, ok := errors.AsType[*contract.Refusal](err); ok {
		return refused.Remedy
	}
	switch ExitCode(err) {
	case ExitUnreachable:
		return "check that the service runs, and its url and ca_file in the profile; then try again"
	case ExitTimeout:
		return "look with tenant status what has happened, and try again with a longer --timeout"
	case ExitNotFound:
		return "correct the file's name, or make the file"
	}
	return "try again; if it repeats, report it with this message"
}

func refusalExit(code string) int {
	switch {
	case code == codeUsage:
		return ExitUsage
	case strings.HasSuffix(code, "not-found") || code == "control.guest-unknown" || code == "broker.launch-unknown" || code == "broker.resource-unknown":
		return ExitNotFound
	case code == codeNameInUse || strings.HasSuffix(code, "-conflict"):
		return ExitConflict
	case strings.HasSuffix(code, "-timeout"):
		return ExitTimeout
	case code == "internal":
		return ExitFailed
	}
	return ExitPrecondition
}
