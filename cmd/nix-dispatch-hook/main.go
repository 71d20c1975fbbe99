// Command nix-dispatch-hook is "nix-dispatch hook" as a program of its own: it
// takes no arguments but Nix's, as Nix 2.8 wants it, and starts in half the time.
package main

import (
	"os"

	"nixdispatch/cmd/internal/buildhook"
)

func main() { os.Exit(buildhook.Main(os.Args[1:])) }
