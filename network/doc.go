// Package network gives each guest a network of its own: a persistent tap, a
// /30 out of the operator's range, and the firewall that makes the tap the
// only thing the guest can reach the host and the world by. It also publishes
// ports of guests on the host and says when something else on the host stands
// in the way.
//
// It owns links named nt, nv and na with 8 hex digits that carry its alias, and
// the nft table of one name in the families inet and netdev. It touches no
// other link, table or route, and never answers another table's drop by
// changing that table: it reports a Finding. The table has no owner flag, so
// rules outlive the agent, as guests do.
//
// A tap's rules are in the kernel before the tap is up, and the tap is gone
// before its rules are. Frames pass between a tap and the host's IP only by the
// table's forwarding, so that no table means no way. When the table cannot be
// restored after somebody changed it, the taps are taken down until it can.
//
// What is decided is pure (Describe, plan); what acts is Host, through three
// small interfaces. All methods of Host are safe for concurrent use; changes
// are serialised by one mutex.
package network
