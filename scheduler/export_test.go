package scheduler

// Requirements returns how many requirement classes are in memory.
func (q *Queue) Requirements() int { return len(q.requirements) + len(q.reaches) }

// Sizes returns how much the Queue keeps of builds.
func (q *Queue) Sizes() (builds, callers, systems, waiting int) {
	return len(q.builds), len(q.callers), len(q.systems), len(q.waiting)
}
