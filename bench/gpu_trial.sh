#!/usr/bin/env bash
# Try cxrfast on one GPU, in two calls of at most five minutes each; the first needs no DALI.
#
#   bench/gpu_trial.sh 1 [OUT]   versions, doctor --deep, the ladder, training with host, compiled, deterministic, in fp16
#   bench/gpu_trial.sh 2 [OUT]   doctor --deep with DALI, training with dali, bench step and bench load with both engines
#
# Steps stand in the order of their worth, each under a timeout of its own, and none is begun once the call's time is over.
# OUT (default: the environment's OUT, else bench/results/gpu-trial) gets trial.md, trial.json and all.tar.gz, which holds what
# each step printed and the results of the benchmarks; the second call's hold the first's, too. Exit code 1 if a step failed.
#
#   TREE=DIR            source tree in the layout of MIMIC-CXR-JPG, for 512 and 256 px [phantoms]
#   MAKE_TREE=COMMAND   makes that tree, while the first steps run [it is there]
#   PACKAGES=DIR        archives *.tar.xz of Python packages that the machine lacks, unpacked first [none]
#   TRIAL_WORK=DIR      shard sets, runs and results, kept from the first call to the second [/tmp/cxrfast-trial]
#   TRIAL_REHEARSAL=1   the same on a CPU, at 64 and 32 px, in a few minutes
#   PYTHON=FILE         [python3]
set -u
call=${1:?usage: bench/gpu_trial.sh 1|2 [OUT]} out=${2:-${OUT:-bench/results/gpu-trial}}
cd "$(dirname "$0")/.." || exit 2
for part in shards pipelines bench; do [[ -e cxrfast/$part ]] || ln -s "../$part" "cxrfast/$part"; done # copies may lose links
python=${PYTHON:-python3} work=${TRIAL_WORK:-/tmp/cxrfast-trial}
results=$work/results sets=$work/sets runs=$work/runs packages=$work/packages
mkdir -p "$results" "$sets" "$runs" "$packages" "$out"
export PYTHONPATH=$packages:$PWD PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore::DeprecationWarning

if [[ ${TRIAL_REHEARSAL:-} ]]; then
  device=cpu call_seconds=3600 patience=5 # a busy CPU takes its time
  small=32 large=64 images=160 side=64 epochs=1 minutes=0.05 ways="--rounds 1 --seconds 0.05"
else
  device=cuda call_seconds=$((call == 1 ? 310 : 250)) patience=1
  small=256 large=2048 images=240 side=2048 epochs=2 minutes="" ways="--rounds 2 --seconds 0.5"
fi
end=$((SECONDS + call_seconds))

step() { # NAME SECONDS COMMAND…: run it for so long at most, keep what it prints, note how it ended
  local name=$1 limit=$(($2 * patience)) begun=$SECONDS code=skipped
  shift 2
  ((limit > end - SECONDS)) && limit=$((end - SECONDS))
  if ((limit >= 5)); then
    timeout -k 5 "$limit" "$@" >"$results/$name.txt" 2>&1
    code=$?
  fi
  printf '%s\t%s\t%s\t%s\t%s\n' "$call" "$name" "$code" "$((SECONDS - begun))" "$*" >>"$results/steps.tsv"
  printf '== %s: %s, %s s\n' "$name" "$code" "$((SECONDS - begun))"
  [[ $code == 0 || $code == skipped ]] || tail -n 5 "$results/$name.txt"
}

cxrfast() { echo "$python" -m cxrfast "$@"; }
budget() { echo "--minutes ${minutes:-$1}"; } # of a benchmark, at most
wait_for() { while [[ ! -e $1/SHA256SUMS ]] && ((SECONDS < end - 60)); do sleep 1; done; }

make_sets() { # in a session of its own and on half of the cores, since it goes on while other steps run
  local cores=$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1)) tree=${TREE:-}
  [[ ${MAKE_TREE:-} ]] && $MAKE_TREE
  [[ $tree ]] || { tree=$work/films && $(cxrfast synth "$tree" --images 600 --size $((2 * small)) --workers $cores); }
  $(cxrfast shard --data "$tree" --out "$sets/small" --scale $small --scale $((2 * small)) --workers $cores)
  $(cxrfast synth "$work/large-films" --images $images --size $side --workers $cores)
  $(cxrfast shard --data "$work/large-films" --out "$sets/large" --scale $large --scale $((large / 2)) --workers $cores)
}

train() { # NAME SECONDS OPTIONS…
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" $(cxrfast train --shards "$sets/small" --runs "$runs" --name "$name" --scale $small --device $device \
    --weights none "$@")
}
short="--epochs 1 --limit 64 --global-batch 32 --micro-batch 16 --engine host"

ladder() { # NAME SECONDS MINUTES OPTIONS…
  local name=$1 limit=$2 given=$3
  shift 3
  step "$name" "$limit" $(cxrfast bench ladder --device $device --seconds 0.5 $(budget "$given") --out "$results/$name" "$@")
}

first() {
  rm -rf "$results" "$runs" && mkdir -p "$results" "$runs"
  export -f make_sets cxrfast
  export python work sets small large images side TREE MAKE_TREE
  setsid bash -c make_sets >"$results/sets.txt" 2>&1 &
  step versions 20 "$python" -c "import torch, torchvision, cv2, numpy; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), torchvision.__version__, cv2.__version__, numpy.__version__)"
  step doctor 30 $(cxrfast doctor)
  local scales="--scale $small --scale $large"
  [[ $device == cuda ]] && scales="--scale 256 --scale 512 --scale 1024 --scale 2048"
  ladder ladder 120 1.7 $scales --only channels-last --only ours --only recompute
  wait_for "$sets/small"
  step checkup-host 75 $(cxrfast doctor --deep --shards "$sets/small")
  train train-host 60 --engine host --epochs $epochs
  train deterministic-1 30 $short --deterministic
  train deterministic-2 30 $short --deterministic
  ladder ladder-large-batch 40 0.4 --scale $small --micro-batch 128 --only ours
  if [[ $device == cuda ]]; then # compiling takes minutes on a CPU, and fp16 is of GPUs
    train fp16 30 $short --precision fp16
    ladder compiled-512 100 1.5 --scale 512 --only ours --only compile
    ladder compiled-2048 100 1.5 --scale 2048 --only ours --only compile
    ladder compiled-256 100 1.5 --scale 256 --only ours --only compile
  fi
}

second() {
  step doctor-dali 30 $(cxrfast doctor)
  wait_for "$sets/small"
  step checkup-dali 75 $(cxrfast doctor --deep --shards "$sets/small")
  train train-dali 60 --engine dali --epochs $epochs
  wait_for "$sets/large"
  for scale in $large $small; do
    local set=$sets/large
    [[ $scale == "$small" ]] && set=$sets/small
    step "step-$scale" 80 $(cxrfast bench step --shards "$set" --scale $scale --each-engine --device $device $(budget 1) --out "$results/step-$scale")
    step "load-$scale" 60 $(cxrfast bench load --shards "$set" --scale $scale --engines --no-peers --device $device $ways $(budget 0.7) --out "$results/load-$scale")
  done
  step checkup-large 45 $(cxrfast doctor --deep --shards "$sets/large" --scale $large)
}

if [[ ${PACKAGES:-} ]]; then
  for archive in "$PACKAGES"/*.tar.xz; do
    "$python" -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter='tar')" "$archive" "$packages"
  done
fi
[[ -d $packages/nvidia/cu13/lib ]] && export LD_LIBRARY_PATH=$packages/nvidia/cu13/lib:${LD_LIBRARY_PATH:-}
if [[ $call == 1 ]]; then first; else second; fi
"$python" -m cxrfast.bench.trial "$results" "$runs"
code=$?
cp "$results"/trial.* "$out"
tar -C "$results" -czf "$out/all.tar.gz" .
exit $code
