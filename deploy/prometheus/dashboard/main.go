// Command dashboard writes the Grafana dashboard of nix-dispatchd to standard
// output, as JSON for Grafana's import. What is on it stands in panels.go.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
)

func main() {
	if err := write(os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "dashboard: %v\n", err)
		os.Exit(1)
	}
}

// write writes the dashboard. The same source gives the same bytes.
func write(w io.Writer) error {
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	out.SetIndent("", "  ")
	return out.Encode(grafana(rows()))
}
