# Evaluates ../module.nix as NixOS would, with no more of its module system and library
# than the module uses. settings are what a configuration.nix says.
{ settings }:
let
  recursiveUpdate = a: b:
    a // builtins.mapAttrs (name: value:
      if a ? ${name} && builtins.isAttrs a.${name} && builtins.isAttrs value && !(value ? _type)
      then recursiveUpdate a.${name} value
      else value) b;

  lib = {
    mkOption = option: option // { _type = "option"; };
    mkEnableOption = what: { _type = "option"; type = lib.types.bool; default = false; description = "Whether to enable ${what}."; };
    mkIf = condition: content: { _type = "if"; inherit condition content; };
    literalExpression = text: { inherit text; };
    optional = condition: value: if condition then [ value ] else [ ];
    optionalAttrs = condition: set: if condition then set else { };
    escapeShellArgs = args: builtins.concatStringsSep " " (map (a: "'" + builtins.replaceStrings [ "'" ] [ "'\\''" ] a + "'") args);
    cleanSource = path: toString path;
    platforms.linux = [ "x86_64-linux" ];
    licenses.asl20 = { spdxId = "Apache-2.0"; };
    types = {
      package = { check = p: p ? outPath; };
      bool = { check = builtins.isBool; };
      str = { check = builtins.isString; };
      listOf = type: { check = l: builtins.isList l && builtins.all type.check l; };
    };
  };

  # What is built is a name here.
  pkgs = {
    getent = "/nix/store/0-getent";
    callPackage = file: args: import file ({ inherit lib; buildGoModule = attrs: attrs // { outPath = "/nix/store/0-nix-dispatch"; }; } // args);
  };

  host = {
    nix = { package = "/nix/store/0-nix"; distributedBuilds = false; buildMachines = [ ]; };
    programs.ssh.package = "/nix/store/0-openssh";
  };

  module = import ../module.nix { inherit config lib pkgs; };

  defaults = builtins.mapAttrs (_: o: o.default) module.options.services.nix-dispatch;
  config = recursiveUpdate (recursiveUpdate host { services.nix-dispatch = defaults; }) settings;

  # Every option has the type that it says, and a text.
  checked = builtins.all (name:
    let option = module.options.services.nix-dispatch.${name} or (throw "no option ${name}");
    in option.type.check config.services.nix-dispatch.${name} || throw "${name} is not of its type"
  ) (builtins.attrNames config.services.nix-dispatch);
  described = builtins.all (o: o ? description) (builtins.attrValues module.options.services.nix-dispatch);
in
assert checked && described && module.config._type == "if";
{
  config = if module.config.condition then module.config.content else { };
  package = removeAttrs config.services.nix-dispatch.package [ "outPath" ];
}
