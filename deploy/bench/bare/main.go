// Command bare does the two halves of dispatching builds that no program could do
// without, and nothing else: no queue, no locks, no logs, no care for what goes
// wrong. It is for measurements only.
//
//	bare importer                 serves barehook: an output is imported, from memory
//	bare machines HOST... <DRVS   builds derivations, some at a time on each host
//	bare ask HOOK DRV N           asks a hook as Nix does, and tells how long it takes
package main

import (
	"fmt"
	"os"
)

func main() {
	var err error
	switch command(os.Args) {
	case "importer":
		err = importer()
	case "machines":
		err = machines(os.Args[2:])
	case "ask":
		err = ask(os.Args[2:])
	default:
		err = fmt.Errorf("usage: bare importer | bare machines HOST... <DRVS | bare ask HOOK DRV N")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bare:", err)
		os.Exit(1)
	}
}

func command(args []string) string {
	if len(args) < 2 {
		return ""
	}
	return args[1]
}
