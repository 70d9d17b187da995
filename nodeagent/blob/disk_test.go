package blob

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/confidential-node/agent/firmware/contract"
)

// A disk that fails is not an object store that cannot be reached: it is not
// asked eight times, and the operator is not sent to the network.
func TestWhatIsTheDisksFaultIsNotTheStores(t *testing.T) {
	t.Parallel()
	for errno, code := range map[syscall.Errno]string{
		syscall.ENOSPC: codeDiskFull, syscall.EDQUOT: codeDiskFull, syscall.EROFS: "host.disk-read-only", syscall.EIO: "host.disk-failing", syscall.EMFILE: "host.descriptors",
	} {
		if r, refused := errors.AsType[*contract.Refusal](diskError(fmt.Errorf("writing part: %w", errno))); !refused || r.Code != code || r.Remedy == "" {
			t.Errorf("%v is %v, want %s", errno, r, code)
		}
	}
	for _, err := range []error{nil, syscall.ECONNRESET, contract.Refuse("blob.not-found", "upload it", "gone").Because(syscall.EIO)} {
		if got := diskError(err); !errors.Is(got, err) || contract.AsRefusal(got).Code == "host.disk-failing" {
			t.Errorf("%v becomes %v", err, got)
		}
	}
}
