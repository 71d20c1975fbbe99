package dispatchv1

// Succeeded tells whether the outputs are valid after a build of this status.
func (s BuildStatus) Succeeded() bool {
	switch s {
	case BuildStatus_BUILD_STATUS_BUILT, BuildStatus_BUILD_STATUS_SUBSTITUTED,
		BuildStatus_BUILD_STATUS_ALREADY_VALID, BuildStatus_BUILD_STATUS_RESOLVES_TO_ALREADY_VALID:
		return true
	default:
		return false
	}
}

// Free is the room that a machine has for builds, in bytes: in its store or in the
// directory that it builds in, wherever there is less; false if it has not told.
func (l *MachineLoad) Free() (bytes uint64, known bool) {
	switch {
	case l == nil || l.StoreFreeBytes == nil && l.BuildDirFreeBytes == nil:
		return 0, false
	case l.BuildDirFreeBytes == nil:
		return l.GetStoreFreeBytes(), true
	case l.StoreFreeBytes == nil:
		return l.GetBuildDirFreeBytes(), true
	default:
		return min(l.GetStoreFreeBytes(), l.GetBuildDirFreeBytes()), true
	}
}
