// Package api is the wire between control plane and node: the protobuf
// messages of node.proto, the rules a signed command must obey before
// anything looks inside it, and the diary of the protocol. It owns no
// connection and no state; everything here is safe for concurrent use.
//
// Commands are verified over their exact bytes first and parsed second.
// Unknown fields are refused in commands and ignored in events. Field
// meanings, units and limits stand at the fields in node.proto; a zero value
// means what the field's comment says. Where it says nothing, the field of a
// command is required, and that of an event is not known.
//
// # Subjects
//
// cmd.<host> carries envelopes to a host, evt.<host>.<kind> events from it;
// kind is the body's field name with dashes ("guest-state").
//
// # Diary
//
// CapabilityVersion increases with every change a control plane may have to
// know about:
//
//   - 1 (2026-11-23): LaunchGuest, StopGuest, RequestEvidence, Cordon,
//     Uncordon, BeginEpoch; CommandRefused, CommandDone, GuestState,
//     EvidenceReady, ResultUploaded, Capability, Heartbeat.
//   - 2 (2026-11-25): Capability says what the machine has of SEV-SNP
//     (sev_snp), whether kernel, libvirt, QEMU and OVMF are new enough without
//     and with GPUs (components), what endorsements are at hand, and is sent
//     again with the names of what changed (changed). Commands are as before.
//   - 3 (2026-11-25): ResultGivenUp; a further StopGuest ends the wait for an
//     object store.
//   - 4 (2026-11-26): Heartbeat says why the host's clock cannot be believed
//     (clock_doubt), which instance speaks (instance, beat, boot_id), what needs
//     attention or runs short (warnings) and how far the audit log is (audit); commands issued
//     before the BeginEpoch of their epoch are refused as replays; published
//     ports may have a server name. The features audit.log, ports.server-name.
//     Results of more than 5 GiB: upload grants with part URLs
//     in a launch, GrantUpload, SettleUpload; UploadGrantWanted, UploadReady.
//     Capability lists GPUs with model, state, CC mode and why one is not
//     offered (gpus); launches whose manifest asks for GPUs are carried out.
package api
