# A small program, made as packages are: twelve derivations, some in parallel,
# with shared inputs; one asks for a machine with the feature "big". There is no
# nixpkgs here: the builder is Debian's shell. Another round is built again. The
# parts wait for a file, so that the demo can show them running at the same time.
{ round ? "" }:
let
  step = stepFor [ ];
  stepFor = requiredSystemFeatures: name: inputs: script: derivation {
    inherit name inputs requiredSystemFeatures round;
    system = "x86_64-linux";
    builder = "/bin/sh";
    PATH = "/usr/bin:/bin";
    args = [
      "-c"
      ''
        set -e
        mkdir $out
        cat /proc/sys/kernel/hostname > $out/built-on
        for i in $inputs; do
          test -s $i/text
        done
        sleep 1
        ${script}
      ''
    ];
  };
  source = step "source" [ ] "seq 1 1000 > $out/text";
  part = n: step "part-${toString n}" [ source ] ''
    echo "part ${toString n}: compiling"
    until [ -e /run/demo-go ]; do sleep 0.1; done
    sed -n '${toString n}~7p' $inputs/text > $out/text
    echo "part ${toString n}: $(wc -l < $out/text) lines"
  '';
  join = name: inputs: step name inputs ''
    for i in $inputs; do cat $i/text; done | sort -n > $out/text
    echo "$name: joined $(wc -l < $out/text) lines"
  '';
  library = join "library" (map part [ 1 2 3 4 ]);
  plugins = join "plugins" (map part [ 5 6 7 ]);
  tests = stepFor [ "big" ] "tests" [ library plugins ] ''
    for i in $inputs; do wc -l < $i/text; done | tee $out/text
  '';
  program = step "program" [ library plugins tests ] ''
    cat ${library}/text ${plugins}/text | sort -n > $out/text
    cmp $out/text ${source}/text
    echo "program: all parts are in place"
  '';
in
program
