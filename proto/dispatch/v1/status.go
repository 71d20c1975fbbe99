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
