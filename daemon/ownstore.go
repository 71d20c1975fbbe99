package daemon

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"sync"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
)

// checkStore refuses a machine whose store is this host's. What is certain is
// that a path made here a moment ago, of random bytes, is valid in no other
// store; so it holds whatever names, addresses and jump hosts lead there. If
// this host's store cannot be asked it is asked again with the next build.
func (m *machine) checkStore(ctx context.Context, r *remote, local *localStore) error {
	if m.others.has(local.key) {
		return nil
	}
	same, err := hasMark(ctx, r, local, local.marks.usual(local.Dir))
	if same {
		// The daemon's usual mark may have been copied there with everything else.
		same, err = hasMark(ctx, r, local, newMark(local.Dir))
	}
	switch {
	case err != nil:
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, local := errors.AsType[*localError](err); local {
			if !m.storeUnknown.Swap(true) {
				m.log.Warn("not known whether the machine's store is this host's own", "err", err)
			}
			return nil
		}
		return explain(r.stderr, err)
	case same:
		return errOwnStore
	}
	m.others.add(local.key)
	return nil
}

// hasMark puts a mark into this host's store and tells whether it is valid in the
// machine's.
func hasMark(ctx context.Context, r *remote, local *localStore, mark storeMark) (bool, error) {
	conn, err := local.open(ctx)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	info := mark.info
	if err := conn.AddTempRoots([]nix.StorePath{info.Path}); err != nil {
		return false, &localError{doing: "take a temporary root", err: err}
	}
	write := func(_ *nix.PathInfo, w io.Writer) error {
		_, err := w.Write(mark.nar)
		return err
	}
	if err := conn.AddToStoreNar(&info, false, write); err != nil {
		return false, &localError{doing: "add a path", err: err}
	}
	conn.clean = true
	missing, err := r.missing([]nix.StorePath{info.Path}, false)
	return err == nil && len(missing) == 0, err
}

// knownOthers are the keys of stores. The zero value is empty. Safe for concurrent
// use.
type knownOthers struct {
	mu   sync.Mutex
	keys map[string]bool
}

func (k *knownOthers) has(key string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.keys[key]
}

// add forgets all when there are too many: they are found out again.
func (k *knownOthers) add(key string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.keys == nil || len(k.keys) > maxStores {
		k.keys = make(map[string]bool)
	}
	k.keys[key] = true
}

func (k *knownOthers) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys = nil
}

// A storeMark is a path that no store has unless it is put there.
type storeMark struct {
	info nix.PathInfo
	nar  []byte
}

// storeMarks keep the mark that is asked for first: to make another for every
// connection would litter the store. Safe for concurrent use.
type storeMarks struct {
	once sync.Once
	mark storeMark
}

func (s *storeMarks) usual(storeDir string) storeMark {
	s.once.Do(func() { s.mark = newMark(storeDir) })
	return s.mark
}

// markName is the name of marks.
const markName = "nix-dispatch-mark"

// newMark makes up a text file of a store.
func newMark(storeDir string) storeMark {
	return markOf(storeDir, "nix-dispatch asks a machine for this file, to tell the machine's store from this one: "+rand.Text()+"\n", markName)
}

// markOf is a text file of a store. Its content address lets anybody add it.
func markOf(storeDir, text, name string) storeMark {
	hash := sha256.Sum256([]byte(text))
	// As makeStorePath and makeFixedOutputPathFromCA in src/libstore/store-dir-config.cc (Nix 2.34.8).
	digest := sha256.Sum256([]byte("text:sha256:" + hex.EncodeToString(hash[:]) + ":" + storeDir + ":" + name))
	nar := narOfText(text)
	return storeMark{nar: nar, info: nix.PathInfo{
		Path:    nix.StorePath(storeDir + "/" + storeHash(digest) + "-" + name),
		NarHash: sha256.Sum256(nar),
		NarSize: uint64(len(nar)),
		CA:      "text:" + nix.NarHash(hash).String(),
	}}
}

// storeHash is the hash in a store path's name: the digest, folded to 20 bytes,
// in base 32 (compressHash in src/libutil/hash.cc).
func storeHash(digest [sha256.Size]byte) string {
	var folded [20]byte
	for i, b := range digest {
		folded[i%len(folded)] ^= b
	}
	// NarHash writes the last byte's bits first, as Nix does: the 20 bytes are the
	// last 32 characters of it.
	var h nix.NarHash
	copy(h[:], folded[:])
	text := h.Base32()
	return text[len(text)-32:]
}

// narOfText is the NAR of a file that is not executable.
func narOfText(text string) []byte {
	var buf bytes.Buffer
	w := wire.NewWriter(&buf)
	for _, word := range []string{"nix-archive-1", "(", "type", "regular", "contents", text, ")"} {
		w.String(word)
	}
	_ = w.Flush() // into memory
	return buf.Bytes()
}
