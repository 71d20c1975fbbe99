package daemon

import (
	"errors"
	"log/slog"
	"os"
	"strings"
)

// sshOptions are the words of the environment's NIX_SSHOPTS, which Nix gives to
// every ssh it starts.
func sshOptions(log *slog.Logger) []string {
	text := os.Getenv("NIX_SSHOPTS")
	words, err := shellSplit(text)
	if err == nil {
		return words
	}
	log.Warn("NIX_SSHOPTS is split at blanks, as Nix did before 2.26", "err", err)
	return strings.Fields(text)
}

// shellSplit splits text into words as Nix does since 2.26 (shellSplitString in
// src/libutil/strings.cc): at blanks, but for quotes and backslashes as a shell
// has them. Unlike there, line ends separate words as well: they did until then.
// The error says which quote has no end.
func shellSplit(text string) ([]string, error) {
	var words []string
	var word strings.Builder
	started := false
	quote := byte(0)
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case c == '\\' && quote != '\'':
			if i++; i == len(text) {
				continue // Nix drops it
			}
			if quote == '"' && !strings.ContainsRune("$`\"\\", rune(text[i])) {
				word.WriteByte('\\')
			}
			word.WriteByte(text[i])
			started = true
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			word.WriteByte(c)
		case c == '"' || c == '\'':
			quote, started = c, true
		case strings.IndexByte(" \t\n\r", c) >= 0:
			if started {
				words = append(words, word.String())
			}
			word.Reset()
			started = false
		default:
			word.WriteByte(c)
			started = true
		}
	}
	switch quote {
	case '"':
		return nil, errors.New("unterminated double quote")
	case '\'':
		return nil, errors.New("unterminated single quote")
	}
	if started {
		words = append(words, word.String())
	}
	return words, nil
}
