# nix-dispatch for nixpkgs: pkgs.callPackage ./package.nix { }
{
  lib,
  buildGoModule,
  version ? "unstable",
}:

buildGoModule {
  pname = "nix-dispatch";
  inherit version;
  src = lib.cleanSource ../..;

  # The hash of what 'go mod vendor' makes; a test compares it.
  vendorHash = "sha256-gnLP4AzKlbCMGW1wJqMAw21xl0qQSko37NMAWs50+eA=";

  subPackages = [
    "cmd/nix-dispatch"
    "cmd/nix-dispatchd"
    "cmd/nix-dispatch-hook"
  ];
  env.CGO_ENABLED = 0;
  tags = [ "grpcnotrace" ];
  ldflags = [
    "-s"
    "-w"
    "-X main.version=${version}"
  ];
  # They want root, real Nix of several versions and a network of their own.
  doCheck = false;

  # Units, manual pages and completions.
  postInstall = ''
    sh deploy/install.sh install $out/bin $out ""
  '';

  meta = {
    description = "Nix builds on remote machines, over connections that stay open";
    license = lib.licenses.asl20;
    mainProgram = "nix-dispatch";
    platforms = lib.platforms.linux;
  };
}
