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
  vendorHash = "sha256-cn/oDrIoViGOsVo+f/k2+i5nRq+t/zFzk0i3f3poIDw=";

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
