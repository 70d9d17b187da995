package endorsements

import (
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/confidential-node/agent/firmware/contract"
)

// readOperator reads the operator's folder. It is read anew each time: the
// files may be replaced. What cannot be read is left out, and told.
func readOperator(dir string) (e contract.Endorsements, findings []*contract.Refusal) {
	read := func(file string) []byte {
		path := filepath.Join(dir, file)
		data, err := readFile(path, maxDocument)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			findings = append(findings, contract.Refuse("endorsements.operator-file", "replace the file, or remove it", "%s cannot be read and is not served", path).Because(err))
			return nil
		}
		return data
	}
	return contract.Endorsements{VCEK: read("vcek.der"), ASK: read("ask.der"), ARK: read("ark.der"), CRL: read("crl.der")}, findings
}
