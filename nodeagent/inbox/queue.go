package inbox

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// queue is the order of the commands that wait, without their payloads. Its
// content is that of the journal, which is the truth. It is safe for
// concurrent use.
type queue struct {
	mu         sync.Mutex // guards below
	stops      []Command
	others     []Command
	challenges []Command
	running    int // challenges
	alone      bool
}

// order puts what had begun first, as it was, then goes by sequence.
func order(a, b Command) int {
	begun := func(c Command) int {
		if c.Begun {
			return 0
		}
		return 1
	}
	return cmp.Or(cmp.Compare(begun(a), begun(b)), cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Sequence, b.Sequence))
}

func (q *queue) reset(pending []Command) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.stops, q.others, q.challenges = nil, nil, nil
	for _, c := range pending {
		lane := q.laneLocked(c)
		*lane = append(*lane, c)
	}
	for _, lane := range [][]Command{q.stops, q.others, q.challenges} {
		slices.SortStableFunc(lane, order)
	}
}

func (q *queue) laneLocked(c Command) *[]Command {
	switch c.Verb {
	case verbStop:
		return &q.stops
	case verbChallenge:
		return &q.challenges
	}
	return &q.others
}

func (q *queue) add(c Command) {
	c.Payload = nil
	q.mu.Lock()
	defer q.mu.Unlock()
	lane := q.laneLocked(c)
	at, _ := slices.BinarySearchFunc(*lane, c, func(e, c Command) int { return cmp.Or(order(e, c), -1) })
	*lane = slices.Insert(*lane, at, c)
}

func (q *queue) len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.stops) + len(q.others) + len(q.challenges)
}

// next is the command to execute: the one that an earlier agent had begun,
// because a stop may have come after it, then stops, then the rest.
func (q *queue) next() (Command, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	lane := &q.others
	if len(q.stops) > 0 && (len(q.others) == 0 || !q.others[0].Begun) {
		lane = &q.stops
	}
	return shift(lane)
}

// nextChallenge is one to execute beside the rest. While a command that the
// agent may have died of has to be tried again, challenges wait, and one of
// their own that had begun runs without others: whoever dies beside a poison
// command must not be taken for one.
func (q *queue) nextChallenge() (Command, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.challenges) == 0 || q.alone || q.running >= maxEvidence || begun(q.stops) || begun(q.others) ||
		begun(q.challenges) && q.running > 0 {
		return Command{}, false
	}
	q.alone = q.challenges[0].Begun
	q.running++
	return shift(&q.challenges)
}

func (q *queue) challengeOver() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.running--
	q.alone = false
}

func begun(lane []Command) bool { return len(lane) > 0 && lane[0].Begun }

func shift(lane *[]Command) (Command, bool) {
	if len(*lane) == 0 {
		return Command{}, false
	}
	c := (*lane)[0]
	(*lane)[0] = Command{} // let its strings go
	*lane = (*lane)[1:]
	return c, true
}

// fences are the stops that no launch may pass, by guest.
type fences struct {
	by    map[string]fence
	swept time.Time
}

type fence struct {
	generation uint64
	until      time.Time
}

func (f *fences) add(c Command, now time.Time) {
	const sweepEvery = time.Minute
	if f.by == nil {
		f.by = map[string]fence{}
	}
	if now.Sub(f.swept) > sweepEvery {
		f.swept = now
		for guest, old := range f.by {
			if old.until.Before(now) {
				delete(f.by, guest)
			}
		}
	}
	old := f.by[c.Guest]
	f.by[c.Guest] = fence{max(old.generation, c.Generation), later(old.until, c.ExpiresAt)}
}

// hold reports whether a launch comes too late.
func (f *fences) hold(launch Command) bool {
	stop, ok := f.by[launch.Guest]
	return ok && launch.Generation <= stop.generation
}
