// Package output prints what a verb found, for people (table) or programs
// (JSON, YAML). Every machine-readable document carries apiVersion and kind,
// and its schema is printed by `nodeagent schema KIND`. Fields are added,
// never renamed or removed, within one apiVersion.
//
// It writes to the given writer and keeps no state.
package output

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// APIVersion of every document.
const APIVersion = "nodeagent/v1"

// formats are the values of -o.
func formats() []string { return []string{"table", "json", "yaml"} }

// Format is how to print.
type Format string

// Set implements pflag.Value.
func (f *Format) Set(s string) error {
	if !slices.Contains(formats(), s) {
		return fmt.Errorf("unknown format %q, use %s", s, strings.Join(formats(), ", "))
	}
	*f = Format(s)
	return nil
}

// String implements pflag.Value.
func (f *Format) String() string { return string(*f) }

// Type implements pflag.Value.
func (f *Format) Type() string { return "table|json|yaml" }

// Header starts every document; embed it first.
type Header struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
}

// NewHeader returns the header of a document of this kind.
func NewHeader(kind string) Header { return Header{APIVersion, kind} }

// Print writes doc in the format; table prints it for people.
func (f *Format) Print(w io.Writer, doc any, table func(io.Writer) error) error {
	if *f == "table" || *f == "" {
		return table(w)
	}
	raw, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding output: %w", err)
	}
	if *f == "yaml" {
		// Through JSON, so that both formats have the same keys.
		var v yaml.Node
		if err := yaml.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("encoding output: %w", err)
		}
		blockStyle(&v)
		if raw, err = yaml.Marshal(&v); err != nil {
			return fmt.Errorf("encoding output: %w", err)
		}
	} else {
		raw = append(raw, '\n')
	}
	_, err = w.Write(raw)
	return err
}

// blockStyle undoes the flow style that JSON input gives YAML nodes.
func blockStyle(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle
	if n.Kind == yaml.ScalarNode && n.Tag == "!!str" {
		n.Style &^= yaml.DoubleQuotedStyle
	}
	for _, c := range n.Content {
		blockStyle(c)
	}
}
