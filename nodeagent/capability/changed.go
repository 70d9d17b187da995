package capability

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/confidential-node/agent/nodeagent/api"
)

// volatile are fields, by their path in the message, and single findings that
// come and go while nothing about the host changes, or that say another
// field's change in words. Everything else counts, so a field that is added
// counts unless it is named here.
func volatile(path string) bool {
	return slices.Contains([]string{
		"issuer_epoch", "store_id", "changed", // the store's, not the host's
		"kernel", "libvirt_version", "qemu_version", // components say so too
		"components.name", "components.remedy",
		"gpus.state", "gpus.mode", "gpus.why.message", "gpus.why.remedy", // a launch's comings and goings
		"sev_snp.asids.free", "sev_snp.asids.returning", "sev_snp.asids.source",
		"sev_snp.findings.code", "sev_snp.findings.message", "sev_snp.findings.remedy", "sev_snp.findings.observed", "sev_snp.findings.asids.exhausted",
		"endorsements.findings", "endorsements.certificate_not_after", "endorsements.revocation_list_next_update", // the network's and AMD's
	}, path)
}

// Changed names what is different in now, sorted: fields by their path,
// elements of lists by their name or code.
func Changed(last, now *api.Capability) []string {
	before, after := map[string]string{}, map[string]string{}
	flatten("", "", last.ProtoReflect(), before)
	flatten("", "", now.ProtoReflect(), after)
	var names []string
	for name := range before {
		if after[name] != before[name] {
			names = append(names, name)
		}
	}
	for name := range after {
		if _, known := before[name]; !known {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Keep returns now with what could not be asked this time taken from last: an
// unknown is no change, and must not hide the next one.
func Keep(last, now *api.Capability) *api.Capability {
	kept := proto.CloneOf(now)
	if kept.Endorsements == nil {
		kept.Endorsements = last.GetEndorsements()
	}
	for i, c := range kept.GetComponents() {
		known := slices.IndexFunc(last.GetComponents(), func(k *api.Component) bool { return k.GetName() == c.GetName() })
		if c.GetObserved() == "" && known >= 0 {
			kept.Components[i] = last.GetComponents()[known]
		}
	}
	return kept
}

// flatten collects a message's values by name. path is the name without the
// elements of lists.
func flatten(path, name string, m protoreflect.Message, out map[string]string) {
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		path, name := path+string(fd.Name()), name+string(fd.Name())
		switch {
		case volatile(path):
		case fd.IsList():
			for i := range v.List().Len() {
				element(path, name, fd, v.List().Get(i), out)
			}
		case fd.Message() != nil:
			flatten(path+".", name+".", v.Message(), out)
		default:
			out[name] = fmt.Sprint(v.Interface())
		}
		return true
	})
}

// element collects one of a list: under what it calls itself, or else as a
// part of the list's value.
func element(path, name string, fd protoreflect.FieldDescriptor, v protoreflect.Value, out map[string]string) {
	label := ""
	if fd.Message() != nil {
		for _, key := range []protoreflect.Name{"name", "code"} {
			if field := fd.Message().Fields().ByName(key); field != nil {
				label = name + "." + v.Message().Get(field).String()
			}
		}
	}
	switch {
	case label != "" && volatile(label):
	case label != "":
		values := map[string]string{}
		flatten(path+".", label+".", v.Message(), values)
		for k, value := range values {
			out[k] += value + ";" // several findings may have one code
		}
	case fd.Message() != nil:
		values := map[string]string{}
		flatten(path+".", "", v.Message(), values)
		out[name] += fmt.Sprint(values) + ";" // maps print in order
	default:
		out[name] += fmt.Sprint(v.Interface()) + ";"
	}
}
