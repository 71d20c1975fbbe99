// Package nixos holds the NixOS module and the package expression; its test evaluates
// them with the real Nix, as far as that goes without nixpkgs.
package nixos
