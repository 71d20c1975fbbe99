# 60 derivations: shared inputs, fixed outputs, several outputs that refer to
# each other, structured attributes. Every builder tells when it starts and ends.
#
# salt makes store paths nobody has; sources is a directory to add to the store,
# whose NAR hash is sourcesHash.
{ salt, sources, sourcesHash }:
let
  inherit (builtins) concatStringsSep elemAt genList hashString length toFile toString;
  pick = list: i: elemAt list (i - length list * (i / length list));
  lines = concatStringsSep "\n";

  make = name: attrs: script: derivation ({
    name = "${name}-${salt}";
    system = "x86_64-linux";
    builder = "/bin/bash";
    PATH = "/usr/bin:/bin";
    args = [ "-c" ''
      set -e
      echo start ${name} >> /srv/builds
      ${script}
      echo end ${name} >> /srv/builds
    '' ];
  } // attrs);

  shared = toFile "shared-${salt}" "shared by many\n";
  tree = builtins.path { path = sources; name = "sources-${salt}"; };

  flat = genList (i: make "flat${toString i}" {
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = hashString "sha256" "${salt} ${toString i}\n";
  } "echo ${salt} ${toString i} > $out") 8;

  recursive = genList (i: make "recursive${toString i}" {
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
    outputHash = sourcesHash;
  } "cp -r ${tree} $out") 2;

  base = genList (i: make "base${toString i}" { } ''
    cat ${shared} ${pick flat i} ${tree}/dir/file ${pick recursive i}/dir/file > $out
    echo ${toString i} ${pick flat i} >> $out
  '') 16;

  # foo comes before out in the alphabet and refers to it; dev refers to both.
  multi = genList (i: make "multi${toString i}" { outputs = [ "out" "dev" "foo" ]; } ''
    mkdir $out $foo $dev
    echo ${pick base i} ${pick base (i + 1)} > $out/bases
    ln -s $out/bases $out/self
    echo $out > $foo/out
    ln -s $foo/out $dev/foo
    echo $out > $dev/out
  '') 8;

  attrs = genList (i: make "attrs${toString i}" {
    __structuredAttrs = true;
    outputs = [ "out" "doc" ];
    words = [ "two words" "${pick base i}" "it's" ];
    table.a = { b = i; };
  } ''
    . "''${NIX_ATTRS_SH_FILE:-.attrs.sh}"
    export PATH=/usr/bin:/bin
    printf '%s\n' "''${words[@]}" "${(pick multi i).foo}" > "''${outputs[out]}"
    grep -q '"table"' "''${NIX_ATTRS_JSON_FILE:-.attrs.json}"
    echo "''${outputs[out]}" > "''${outputs[doc]}"
  '') 4;

  # The pauses make that all slots are used at once.
  mid = genList (i: make "mid${toString i}" { } ''
    sleep 0.5
    cat ${pick base i} ${pick base (i * 3 + 1)} ${(pick multi i).foo}/out ${(pick multi (i + 3)).dev}/foo > $out
    echo ${pick attrs i} ${(pick attrs (i + 1)).doc} >> $out
  '') 20;
in
map (name: make name { } ''
  cat > $out <<END
  ${lines (map toString (mid ++ multi ++ map (d: d.dev) multi ++ map (d: d.doc) attrs))}
  END
'') [ "top0" "top1" ]
