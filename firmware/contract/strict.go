package contract

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"

	"github.com/gowebpki/jcs"
)

// maxDepth bounds the nesting of any JSON document of this package. The
// deepest legitimate one (evidence) has four levels.
const maxDepth = 16

// UnmarshalStrict decodes exactly one JSON value of at most limit bytes into
// v. It refuses oversize input, unknown fields, duplicate keys, nesting deeper
// than 16 levels and anything after the value.
func UnmarshalStrict(data []byte, limit int, v any) error {
	if len(data) > limit {
		return fmt.Errorf("document has %d bytes, limit is %d", len(data), limit)
	}
	if err := checkKeys(data); err != nil {
		return err
	}
	var tree any
	if err := json.Unmarshal(data, &tree); err != nil {
		return fmt.Errorf("decoding JSON: %w", err)
	}
	if err := checkNames(reflect.TypeOf(v), tree); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("decoding JSON: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("decoding JSON: data after the document")
	}
	return nil
}

// checkNames refuses a key that names a field in another case: encoding/json
// would take "Nonce" for "nonce", and the last of both would win.
func checkNames(typ reflect.Type, tree any) error {
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	switch node := tree.(type) {
	case []any:
		if typ.Kind() != reflect.Slice && typ.Kind() != reflect.Array {
			return nil
		}
		for _, element := range node {
			if err := checkNames(typ.Elem(), element); err != nil {
				return err
			}
		}
	case map[string]any:
		if typ.Kind() == reflect.Map {
			for _, value := range node {
				if err := checkNames(typ.Elem(), value); err != nil {
					return err
				}
			}
		}
		if typ.Kind() != reflect.Struct || reflect.PointerTo(typ).Implements(reflect.TypeFor[json.Unmarshaler]()) {
			return nil
		}
		fields := map[string]reflect.Type{}
		for _, field := range reflect.VisibleFields(typ) {
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			if name == "" {
				name = field.Name
			}
			fields[name] = field.Type
		}
		for key, value := range node {
			field, known := fields[key]
			if !known {
				return fmt.Errorf("decoding JSON: unknown field %q", key)
			}
			if err := checkNames(field, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkKeys walks the tokens because encoding/json silently lets the last of
// two equal keys win, and two readers may then disagree on what was signed.
func checkKeys(data []byte) error {
	type level struct {
		object  bool
		wantKey bool
		keys    map[string]bool
	}
	var stack []level
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	for {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("decoding JSON: %w", err)
		}
		top := len(stack) - 1
		if delim, ok := tok.(json.Delim); ok && (delim == '}' || delim == ']') {
			stack = stack[:top]
			continue
		}
		if top >= 0 && stack[top].object {
			if stack[top].wantKey {
				key, _ := tok.(string)
				if stack[top].keys[key] {
					return fmt.Errorf("decoding JSON: duplicate key %q", key)
				}
				stack[top].keys[key] = true
			}
			stack[top].wantKey = !stack[top].wantKey
		}
		if delim, ok := tok.(json.Delim); ok {
			if len(stack) == maxDepth {
				return fmt.Errorf("decoding JSON: nested deeper than %d", maxDepth)
			}
			stack = append(stack, level{object: delim == '{', wantKey: delim == '{', keys: map[string]bool{}})
		}
	}
}

// Canonical encodes v as RFC 8785 canonical JSON.
func Canonical(v any) ([]byte, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encoding JSON: %w", err)
	}
	out, err := jcs.Transform(raw)
	if err != nil {
		return nil, fmt.Errorf("canonicalising JSON: %w", err)
	}
	return out, nil
}

// unmarshalCanonical is UnmarshalStrict for documents whose bytes are hashed
// or signed: in addition the input must be the canonical encoding of what was
// decoded, so that one meaning has exactly one digest.
func unmarshalCanonical(data []byte, limit int, v any) error {
	if err := UnmarshalStrict(data, limit, v); err != nil {
		return err
	}
	again, err := Canonical(v)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, data) {
		return errors.New("document is not in canonical form (RFC 8785)")
	}
	return nil
}
