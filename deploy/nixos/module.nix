# The NixOS module: nix-dispatchd takes the place of Nix's own build hook. The machines
# are those of nix.buildMachines, as before, if nix.distributedBuilds is on. It opens
# nothing: no port in the firewall, metrics on the loopback interface only.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.nix-dispatch;
  # One path without arguments, which every version of Nix takes.
  setting = "build-hook = ${cfg.package}/bin/nix-dispatch-hook";
in
{
  options.services.nix-dispatch = {
    enable = lib.mkEnableOption "nix-dispatchd, through which Nix builds on nix.buildMachines";

    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The package with nix-dispatchd, nix-dispatch and nix-dispatch-hook.";
    };

    extraArgs = lib.mkOption {
      type = lib.types.listOf lib.types.str;
      default = [ ];
      example = [ "--machine-wait=15m" ];
      description = "Further arguments of nix-dispatchd; see nix-dispatchd(8).";
    };

    buildsOnThisHost = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = ''
        Whether machines such as ssh://localhost?remote-store=... or paths, which build in
        processes of nix-dispatchd's own, are to work. Its unit is not hardened then.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    warnings = lib.optional (!config.nix.distributedBuilds) ''
      services.nix-dispatch is enabled, but nix.distributedBuilds is not: Nix's setting
      builders is empty, and so nix-dispatchd has no machines.
    '';

    environment.systemPackages = [ cfg.package ];

    # Its members may submit builds and look at all of them; nix build needs no group.
    users.groups.nix-dispatch = { };

    # The units of the package, with what differs here.
    systemd.packages = [ cfg.package ];
    systemd.sockets.nix-dispatchd.wantedBy = [ "sockets.target" ];
    systemd.services.nix-dispatchd = {
      wantedBy = [ "multi-user.target" ];
      # ssh -G reads the SSH configuration, nix-daemon --stdio opens stores, getent knows
      # groups that are not in /etc/group.
      path = [
        pkgs.getent
        config.nix.package
        config.programs.ssh.package
      ];
      # One restart, for which the socket stays: builds go on, or begin anew.
      stopIfChanged = false;
      serviceConfig = {
        ExecStart = [
          "" # instead of the package's
          "${cfg.package}/bin/nix-dispatchd ${lib.escapeShellArgs cfg.extraArgs}"
        ];
      };
    };
    environment.etc = {
      # Root's own nix builds do not pass nix-daemon; see the link below.
      "nix-dispatch/nix.conf".text = setting + "\n";
    }
    // lib.optionalAttrs cfg.buildsOnThisHost {
      "systemd/system/nix-dispatchd.service.d/builds-on-this-host.conf".source =
        "${cfg.package}/share/doc/nix-dispatch/examples/builds-on-this-host.conf";
    };

    # Nix 2.25 to 2.33 ignore build-hook in /etc/nix/nix.conf; nothing ignores this.
    systemd.services.nix-daemon.environment.NIX_CONFIG = setting;
    # A nix.conf that root has already stays. When the module is off again, the link leads
    # nowhere, which Nix does not mind.
    systemd.tmpfiles.rules = [
      "d /root/.config 0755 root root -"
      "d /root/.config/nix 0755 root root -"
      "L /root/.config/nix/nix.conf - - - - /etc/nix-dispatch/nix.conf"
    ];
  };
}
