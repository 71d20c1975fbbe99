package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// maxDetachedFile bounds the file of a detached build, in bytes, when it is written and
// when it is read. It holds maxDetachedSize in JSON, some failures, and what earlier
// versions have written.
const maxDetachedFile = 4 * maxMessage

// A detachedFile is a detached build on disk.
type detachedFile struct {
	ID      uint64          `json:"id"`
	Request json.RawMessage `json:"request"`
	UID     uint32          `json:"uid"`
	GID     uint32          `json:"gid"`
	Since   time.Time       `json:"since"`
	Starts  int             `json:"starts"`
	// The rest is of one that has ended.
	Ended    time.Time         `json:"ended,omitzero"`
	Planned  int               `json:"planned,omitempty"`
	Built    int               `json:"built,omitempty"`
	Failed   int               `json:"failed,omitempty"`
	Error    string            `json:"error,omitempty"`
	Summary  json.RawMessage   `json:"summary,omitempty"`
	Failures []json.RawMessage `json:"failures,omitempty"`
}

func (s *detachedBuilds) file(id uint64) string {
	return filepath.Join(s.dir, strconv.FormatUint(id, 10)+".json")
}

// save writes down what has become of a build. One that was cut off stays as it is,
// for the next daemon.
func (s *detachedBuilds) save(j *detachedBuild) {
	s.files.Lock()
	defer s.files.Unlock()
	if s.find(j.id) != j {
		return // it is forgotten already
	}
	if !j.endedAt().IsZero() {
		if j.cut {
			return
		}
		j.forgetDetails()
	}
	if err := s.write(j); err != nil {
		s.log.Error("a detached build is not written down", "build_id", j.id, "err", err)
	}
}

// write writes the build's file, whole or not at all.
func (s *detachedBuilds) write(j *detachedBuild) error {
	data, err := j.marshal()
	if err != nil {
		return err
	}
	if len(data) > maxDetachedFile { // it could not be read back
		return fmt.Errorf("it has %d bytes, more than %d", len(data), maxDetachedFile)
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(s.dir, ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), s.file(j.id))
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the disk is full, or worse
	}
	return err
}

func (j *detachedBuild) marshal() ([]byte, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	f := detachedFile{
		ID: j.id, UID: j.caller.uid, GID: j.caller.gid, Since: j.since, Starts: j.starts,
		Ended: j.ended, Planned: j.planned, Built: j.built, Failed: j.failed, Error: j.err,
	}
	var errs [2]error
	f.Request, errs[0] = protojson.Marshal(j.request)
	if j.summary != nil {
		f.Summary, errs[1] = protojson.Marshal(j.summary)
	}
	if !j.ended.IsZero() {
		for _, e := range j.news.finished {
			data, err := protojson.Marshal(e)
			if err != nil {
				return nil, err
			}
			f.Failures = append(f.Failures, data)
		}
	}
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	return json.Marshal(f)
}

// load reads all files. A damaged one is set aside.
func (s *detachedBuilds) load(d *Daemon) []*detachedBuild {
	s.mu.Lock()
	defer s.mu.Unlock()
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Error("cannot tell which builds are detached", "err", err)
	}
	var list []*detachedBuild
	for _, entry := range entries {
		name := filepath.Join(s.dir, entry.Name())
		if strings.HasPrefix(entry.Name(), ".new-") {
			_ = os.Remove(name) // one that was not finished
		}
		if !strings.HasSuffix(entry.Name(), ".json") {
			continue
		}
		j, err := d.readDetached(name)
		if err != nil || s.file(j.id) != name {
			s.log.Error("the file of a detached build is damaged; it is set aside", "file", name, "err", err)
			_ = os.Rename(name, name+".damaged") // else it is found again
			continue
		}
		s.all[j.id] = j
		list = append(list, j)
	}
	return list
}

func (d *Daemon) readDetached(name string) (*detachedBuild, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxDetachedFile+1))
	if err != nil {
		return nil, err
	}
	return d.parseDetached(data)
}

// parseDetached reads what marshal made.
func (d *Daemon) parseDetached(data []byte) (*detachedBuild, error) {
	var f detachedFile
	if len(data) > maxDetachedFile {
		return nil, fmt.Errorf("it is larger than %d bytes", maxDetachedFile)
	}
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, err
	}
	req := new(dispatchv1.BuildRequest)
	if err := protojson.Unmarshal(f.Request, req); err != nil {
		return nil, err
	}
	j := d.newDetached(f.ID, keptRequest(req), caller{uid: f.UID, gid: f.GID}, f.Since)
	j.starts = f.Starts
	if f.Ended.IsZero() {
		return j, nil
	}
	j.ended, j.planned, j.built, j.failed, j.err = f.Ended, f.Planned, f.Built, f.Failed, f.Error
	if f.Summary != nil {
		j.summary = new(dispatchv1.Summary)
		if err := protojson.Unmarshal(f.Summary, j.summary); err != nil {
			return nil, err
		}
	}
	for _, data := range f.Failures {
		e := new(dispatchv1.BuildEvent)
		if err := protojson.Unmarshal(data, proto.Message(e)); err != nil {
			return nil, err
		}
		j.news.finished = append(j.news.finished, e)
	}
	return j, nil
}

// keepOutputs has Nix keep the outputs from its garbage collector, for as long as
// the build is known.
func (s *detachedBuilds) keepOutputs(j *detachedBuild, conn *localConn, outputs []*dispatchv1.Output) error {
	dir, err := filepath.Abs(s.dir)
	if err != nil {
		return err
	}
	for n, out := range outputs {
		link := filepath.Join(dir, fmt.Sprintf("%d-%d", j.id, n))
		_ = os.Remove(link) // of a daemon that did not come to the end
		if err := os.Symlink(out.GetPath(), link); err != nil {
			return err
		}
		if err := conn.AddIndirectRoot(link); err != nil {
			return err
		}
	}
	return nil
}

// forget removes all there is of a build.
func (s *detachedBuilds) forget(j *detachedBuild) {
	s.files.Lock()
	defer s.files.Unlock()
	s.mu.Lock()
	delete(s.all, j.id)
	s.mu.Unlock()
	links, _ := filepath.Glob(filepath.Join(s.dir, fmt.Sprintf("%d-*", j.id))) // no bad pattern
	for _, name := range append(links, s.file(j.id)) {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			s.log.Warn("a detached build is not forgotten", "build_id", j.id, "err", err)
		}
	}
}
