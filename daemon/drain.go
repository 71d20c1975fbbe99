package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// drainedFile is the file in the state directory that holds the drained machines.
const drainedFile = "drained.json"

// maxDrainedFile bounds it, in bytes.
const maxDrainedFile = 4 << 20

// A drain says that a machine is to take no builds.
type drain struct {
	URI string `json:"uri"`
	// Since when, and who wanted it so.
	Since time.Time `json:"since"`
	By    string    `json:"by"`
}

func (d drain) String() string {
	return "since " + moment(d.Since) + ", by " + d.By
}

// moment is a time as messages show it.
func moment(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

// readDrained reads the drained machines. A missing file means none.
func readDrained(stateDir string) (map[string]drain, error) {
	drained := make(map[string]drain)
	f, err := os.Open(filepath.Join(stateDir, drainedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return drained, nil
	}
	if err != nil {
		return drained, fmt.Errorf("read the drained machines: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxDrainedFile+1))
	if err != nil {
		return drained, fmt.Errorf("read the drained machines: %w", err)
	}
	if err := parseDrained(data, drained); err != nil {
		return make(map[string]drain), fmt.Errorf("read the drained machines: %s: %w; no machine is drained, and the next drain or undrain writes it anew", f.Name(), err)
	}
	return drained, nil
}

func parseDrained(data []byte, into map[string]drain) error {
	if len(data) > maxDrainedFile {
		return fmt.Errorf("larger than %d bytes", maxDrainedFile)
	}
	var list []drain
	if err := json.Unmarshal(data, &list); err != nil {
		return err
	}
	for _, d := range list {
		if d.URI == "" {
			return errors.New("an entry has no uri")
		}
		into[d.URI] = d
	}
	return nil
}

// writeDrained replaces the file at once or not at all.
func writeDrained(stateDir string, drained map[string]drain) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write down the drained machines: %w", err)
		}
	}()
	list := make([]drain, 0, len(drained))
	for _, uri := range slices.Sorted(maps.Keys(drained)) {
		list = append(list, drained[uri])
	}
	data, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return err
	}
	if len(data) >= maxDrainedFile { // it could not be read back
		return fmt.Errorf("they take %d bytes, more than %d", len(data), maxDrainedFile)
	}
	f, err := os.CreateTemp(stateDir, drainedFile+".")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // unless it was renamed
	_, err = f.Write(append(data, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), filepath.Join(stateDir, drainedFile))
}

// setDrained drains a machine, or ends that, and tells the scheduler. It returns
// the machine's URI.
func (d *Daemon) setDrained(name string, drained bool, by caller) (string, error) {
	d.drainMu.Lock() // one file is written at a time
	defer d.drainMu.Unlock()
	uri, err := d.machines.named(name)
	if err != nil {
		return "", err
	}
	next := d.machines.drains()
	switch _, already := next[uri]; {
	case already == drained:
		return uri, nil
	case drained:
		next[uri] = drain{URI: uri, Since: time.Now().Round(time.Second), By: by.String()}
	default:
		delete(next, uri)
	}
	if err := writeDrained(d.opts.StateDir, next); err != nil {
		return "", &localError{doing: "drain", err: err}
	}
	d.machines.setDrains(next)
	d.drainFault.Store(nil)
	d.log.Info("machine drained or not", "machine", uri, "drained", drained, "caller", by)
	d.syncStates(uri)
	return uri, nil
}

// drains are the drained machines, in a map of the caller's own.
func (s *machines) drains() map[string]drain {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.drained)
}

func (s *machines) setDrains(drained map[string]drain) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drained = drained
}

// errNoSuchMachine and errAmbiguous are what a machine's name may fail with.
var (
	errNoSuchMachine = errors.New("no such machine")
	errAmbiguous     = errors.New("several machines have that name")
)

// named finds the URI of a machine by it, or by its host's name if no other
// machine has that. A machine that is drained is known by its URI though it is
// not listed.
func (s *machines) named(name string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.drained[name]; ok {
		return name, nil
	}
	var uris []string
	for _, e := range s.byID {
		switch {
		case e.line.StoreURI == name:
			return name, nil
		case e.line.Ref.Host == name && !slices.Contains(uris, e.line.StoreURI):
			uris = append(uris, e.line.StoreURI)
		}
	}
	slices.Sort(uris)
	switch len(uris) {
	case 0:
		return "", fmt.Errorf("%w: %q is neither the store URI of a machine nor its host's name", errNoSuchMachine, name)
	case 1:
		return uris[0], nil
	default:
		return "", fmt.Errorf("%w: %q may be any of %q", errAmbiguous, name, uris)
	}
}
