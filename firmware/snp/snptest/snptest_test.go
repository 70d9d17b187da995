package snptest_test

import (
	"crypto/x509"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/firmware/snp"
	"github.com/confidential-node/agent/firmware/snp/snptest"
)

func TestEveryNameOfAChainSaysEmulated(t *testing.T) {
	t.Parallel()
	chain, err := snptest.NewChain(snptest.ProductEmulated, contract.TCB{SNP: 1}, make([]byte, 64), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, der := range [][]byte{chain.VCEK, chain.ASK, chain.ARK} {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(cert.Subject.CommonName, snp.EmulatedMark) {
			t.Errorf("%s does not say %s", cert.Subject, snp.EmulatedMark)
		}
	}
}

func TestOnlyAWholeReportIsSigned(t *testing.T) {
	t.Parallel()
	chain, err := snptest.NewChain(snptest.ProductEmulated, contract.TCB{}, make([]byte, 8), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := snptest.Sign(make([]byte, snp.ReportSize-1), chain.Key); err == nil {
		t.Error("part of a report is signed")
	}
}

// Whoever can mint evidence is no part of the product: outside tests/ only
// test files may import this package.
func TestNothingShippedImportsThisPackage(t *testing.T) {
	t.Parallel()
	root := filepath.Join("..", "..", "..")
	seen := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() && rel != "." && (rel == "tests" || rel == "bin" || strings.HasPrefix(d.Name(), ".")) {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(rel, ".go") || strings.HasSuffix(rel, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		seen++
		for _, spec := range file.Imports {
			if strings.Contains(spec.Path.Value, "firmware/snp/snptest") {
				t.Errorf("%s imports the package that mints evidence", rel)
			}
		}
		return nil
	})
	if err != nil || seen < 20 {
		t.Errorf("looked at %d files: %v", seen, err)
	}
}
