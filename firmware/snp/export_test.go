package snp

import "github.com/confidential-node/agent/firmware/contract"

// WithEndorsements is Verify with its two halves apart: certificates are
// judged once and then many reports, as flipping every bit needs it.
func WithEndorsements(e contract.Endorsements, x Expect) func(report []byte) Result {
	s := endorse(e, &x.AppraisalPolicy)
	return func(report []byte) Result {
		r, err := ParseReport(report)
		if err != nil {
			return Verify(report, e, x)
		}
		return judge(r, report, s, &x)
	}
}

// ChainHolds tells whether the certificates hold, without any report.
func ChainHolds(e contract.Endorsements, a AppraisalPolicy) bool {
	s := endorse(e, &a)
	return s.chain && s.OK()
}
