package hook

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Settings are those of Nix's settings that a hook needs. The rest of what Nix
// sends, access tokens among them, is not kept here.
type Settings struct {
	// Builders is the builders setting, verbatim.
	Builders               string
	BuildersUseSubstitutes bool
	// Store is the store setting, verbatim.
	Store string
	// Systems are the local machine's: system, then extra-platforms.
	Systems []string
	// SystemFeatures are the local machine's.
	SystemFeatures []string
	// MaxJobs is the number of builds that may run locally at once.
	MaxJobs uint64
	// Timeout and MaxSilentTime are 0 where there is no limit.
	Timeout, MaxSilentTime time.Duration
	// MaxBuildLogSize is in bytes, 0 where there is no limit.
	MaxBuildLogSize uint64
	KeepFailed      bool
}

// CouldBuildLocally tells whether the local machine can build t at all, once a
// job slot is free. "builtin" builders run everywhere.
//
// See couldBuildLocally in src/nix/build-remote/build-remote.cc, which lacks
// the rule for "builtin".
func (s *Settings) CouldBuildLocally(t *Try) bool {
	if s.MaxJobs == 0 || t.System != "builtin" && !slices.Contains(s.Systems, t.System) {
		return false
	}
	for _, f := range t.RequiredFeatures {
		if !slices.Contains(s.SystemFeatures, f) {
			return false
		}
	}
	return true
}

// setters say which settings are kept, and how each is read.
var setters = map[string]func(*Settings, string) error{
	"builders": func(s *Settings, v string) error { s.Builders = v; return nil },
	"store":    func(s *Settings, v string) error { s.Store = v; return nil },
	"system": func(s *Settings, v string) error {
		s.Systems = append([]string{v}, s.Systems...)
		return nil
	},
	"extra-platforms": func(s *Settings, v string) error {
		s.Systems = append(s.Systems, strings.Fields(v)...)
		return nil
	},
	"system-features": func(s *Settings, v string) error {
		s.SystemFeatures = strings.Fields(v)
		return nil
	},
	"builders-use-substitutes": func(s *Settings, v string) error {
		return parseBool(&s.BuildersUseSubstitutes, v)
	},
	"keep-failed":        func(s *Settings, v string) error { return parseBool(&s.KeepFailed, v) },
	"max-build-log-size": func(s *Settings, v string) error { return parseUint(&s.MaxBuildLogSize, v) },
	"timeout":            func(s *Settings, v string) error { return parseSeconds(&s.Timeout, v) },
	"max-silent-time":    func(s *Settings, v string) error { return parseSeconds(&s.MaxSilentTime, v) },
	"max-jobs": func(s *Settings, v string) error {
		if v == "auto" {
			s.MaxJobs = uint64(runtime.NumCPU())
			return nil
		}
		return parseUint(&s.MaxJobs, v)
	},
}

func (s *Settings) set(name, value string) error {
	set, ok := setters[name]
	if !ok {
		return nil
	}
	if err := set(s, value); err != nil {
		return fmt.Errorf("setting %s: %w", name, err)
	}
	return nil
}

// parseBool takes the words that BaseSetting<bool>::parse in
// src/libutil/configuration.cc takes.
func parseBool(p *bool, v string) error {
	switch v {
	case "true", "yes", "1":
		*p = true
	case "false", "no", "0":
		*p = false
	default:
		return fmt.Errorf("%q is not a truth value", v)
	}
	return nil
}

func parseUint(p *uint64, v string) error {
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		return fmt.Errorf("%q is not a number", v)
	}
	*p = n
	return nil
}

// maxSeconds is 100 years: more is no limit, and does not overflow a Duration.
const maxSeconds = 100 * 366 * 24 * 3600

func parseSeconds(p *time.Duration, v string) error {
	var n uint64
	if err := parseUint(&n, v); err != nil {
		return err
	}
	if n <= maxSeconds {
		*p = time.Duration(n) * time.Second
	}
	return nil
}
