#!/usr/bin/env bash
# Try cxrfast on one GPU, in two calls of at most five minutes each; the first needs no DALI.
#
#   bench/gpu_trial.sh 1 [OUT]   versions, the ladder, training with host, deterministic, in fp16, compiled
#   bench/gpu_trial.sh 2 [OUT]   training with dali, doctor --deep, bench step and bench load with both engines
#
# The most valuable steps come first; each has a timeout of its own, and none starts once the call's time is over.
# OUT (default: the environment's OUT, else bench/results/gpu-trial) gets trial.md, trial.json and all.tar.gz with the output
# of each step and the results of the benchmarks; the second call's include the first's. Exit code 1 if a step failed.
#
#   TREE=DIR            source tree in the layout of MIMIC-CXR-JPG, for 512 and 256 px [phantoms]
#   MAKE_TREE=COMMAND   makes that tree while the first steps run [it exists]
#   PACKAGES=DIR        archives *.tar.xz of Python packages that the machine lacks; unpacked first [none]
#   TRIAL_WORK=DIR      shard sets, runs and results, kept from the first call to the second [/tmp/cxrfast-trial]
#   TRIAL_REHEARSAL=1   the same on a CPU, at 64 and 32 px, in a few minutes
#   PYTHON=FILE         [python3]
set -u
refuse() { echo "gpu_trial.sh: $*" >&2; exit 2; }
call=${1:-} out=$(realpath -m "${2:-${OUT:-$(dirname "$0")/results/gpu-trial}}")
[[ $call == [12] ]] || refuse "usage: bench/gpu_trial.sh 1|2 [OUT]"
[[ ${TREE:-} ]] && TREE=$(realpath -m "$TREE")
[[ ${PACKAGES:-} ]] && PACKAGES=$(realpath -m "$PACKAGES")
python=$(command -v "${PYTHON:-python3}") || refuse "${PYTHON:-python3} is not a program: give PYTHON"
work=$(realpath -m "${TRIAL_WORK:-/tmp/cxrfast-trial}")
results=$work/results sets=$work/sets runs=$work/runs packages=$work/packages
cd "$(dirname "$0")/.." || exit 2
[[ ! -e $work || -e $work/.gpu-trial ]] || refuse "$work holds something else: give another TRIAL_WORK"
mkdir -p "$results" "$sets" "$runs" "$packages" "$out" && touch "$work/.gpu-trial" "$out/.written" && rm "$out/.written" ||
  refuse "$work or $out cannot be written: give another TRIAL_WORK or OUT"
for part in shards pipelines bench; do [[ -e cxrfast/$part ]] || ln -s "../$part" "cxrfast/$part"; done # copies may lose links
export PYTHONPATH=$packages:$PWD PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore::DeprecationWarning
trap 'kill -- "-$(<"$work/sets.pid")" 2>/dev/null; exit 1' INT TERM

if [[ ${TRIAL_REHEARSAL:-} ]]; then
  device=cpu call_seconds=3600 patience=5 # a busy CPU takes its time
  small=32 large=64 images=160 side=64 batches="--epochs 1" rounds="--rounds 1 --seconds 0.1"
else
  device=cuda call_seconds=300 patience=1
  small=256 large=2048 images=240 side=2048 batches="--epochs 2 --global-batch 64 --micro-batch 32" rounds="--rounds 2 --seconds 1.5"
fi
end=$((SECONDS + call_seconds))

cxrfast() { echo "$python" -m cxrfast "$@"; }

step() { # NAME SECONDS COMMAND…: run it for at most SECONDS, keep its output, note how it ended
  local name=$1 limit=$(($2 * patience)) start=$SECONDS code=skipped
  shift 2
  ((limit > end - SECONDS)) && limit=$((end - SECONDS))
  if ((limit >= 15)); then
    timeout -k 5 "$limit" "$@" >"$results/$name.txt" 2>&1
    code=$?
  fi
  printf '%s\t%s\t%s\t%s\t%s\n' "$call" "$name" "$code" "$((SECONDS - start))" "$*" >>"$results/steps.tsv"
  printf '== %s: %s, %s s\n' "$name" "$code" "$((SECONDS - start))"
  [[ $code == 0 || $code == skipped ]] || tail -n 5 "$results/$name.txt"
}

bench() { # NAME SECONDS ARGUMENTS…: a benchmark, limited to the time left because it writes its results only at its end
  local name=$1 seconds=$2
  shift 2
  ((seconds > end - SECONDS - 45)) && seconds=$((end - SECONDS - 45))
  [[ ${TRIAL_REHEARSAL:-} ]] && seconds=3
  ((seconds > 0)) || seconds=0
  local minutes limit=$((seconds >= 3 ? seconds + 55 : 0))
  printf -v minutes '%d.%02d' $((seconds / 60)) $((seconds % 60 * 100 / 60))
  step "$name" $limit $(cxrfast bench "$@" --device $device --minutes "$minutes" --out "$results/$name")
}

train() { # NAME SECONDS OPTIONS…
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" $(cxrfast train --shards "$sets/small" --runs "$runs" --name "$name" --scale $small --device $device \
    --weights none "$@")
}
short="--epochs 1 --limit 64 --global-batch 32 --micro-batch 16 --engine host"

make_sets() { # on half of the cores, at low priority
  local cores=$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1)) tree=${TREE:-}
  [[ ${MAKE_TREE:-} ]] && $MAKE_TREE
  [[ $tree ]] || { tree=$work/films && $(cxrfast synth "$tree" --images 600 --size $((2 * small)) --workers $cores); }
  $(cxrfast shard --data "$tree" --out "$sets/small" --scale $small --scale $((2 * small)) --workers $cores)
  $(cxrfast synth "$work/large-films" --images $images --size $side --workers $cores)
  $(cxrfast shard --data "$work/large-films" --out "$sets/large" --scale $large --scale $((large / 2)) --workers $cores)
}

begin_sets() { # in a session of its own, since it may continue into the second call
  export -f make_sets cxrfast
  export python work sets small large images side TREE MAKE_TREE
  setsid nice -n 19 bash -c make_sets >"$results/sets.txt" 2>&1 &
  echo $! >"$work/sets.pid"
}

wait_for() { # SET: until it exists, or nothing makes it any more
  while [[ ! -e $1/SHA256SUMS ]] && ((SECONDS < end - 60)) && kill -0 "$(<"$work/sets.pid")" 2>/dev/null; do sleep 1; done
  [[ -e $1/SHA256SUMS ]] && return
  echo "$1 could not be made; sets.txt in the results ends:"
  tail -n 5 "$results/sets.txt"
  return 1
}

first() {
  rm -rf "$results" "$runs" && mkdir -p "$results" "$runs"
  begin_sets
  step versions 20 "$python" -c "import torch, torchvision, cv2, numpy; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), torchvision.__version__, cv2.__version__, numpy.__version__)"
  local rungs="--seconds 0.5 --only channels-last --only ours"
  bench ladder-$large 60 ladder --scale $large $rungs --only recompute
  wait_for "$sets/small" || return 1
  train train-host 60 $batches --engine host
  train deterministic-1 30 $short --deterministic
  train deterministic-2 30 $short --deterministic
  bench ladder-$small 45 ladder --scale $small $rungs
  if [[ $device == cuda ]]; then # compiling takes minutes on a CPU
    train fp16 60 $short --precision fp16
    bench compiled-$small 60 ladder --scale $small --seconds 0.5 --only ours --only compile
    bench compiled-$large 75 ladder --scale $large --seconds 0.5 --only ours --only compile
  fi
  bench ladder-large-batch 15 ladder --scale $small --micro-batch 128 --seconds 0.5 --only ours
  return 0
}

second() {
  kill -0 "$(cat "$work/sets.pid" 2>/dev/null)" 2>/dev/null || [[ -e $sets/large/SHA256SUMS ]] || begin_sets
  wait_for "$sets/small" || return 1
  train train-dali 60 $batches --engine dali
  wait_for "$sets/large" || return 1
  local loads="--engines --no-peers --only dali --only dali-unproven --rounds 1 --seconds 0.4"
  step checkup-$large 75 $(cxrfast doctor --deep --shards "$sets/large" --scale $large)
  bench step-$large 70 step --shards "$sets/large" --scale $large --each-engine $rounds
  bench step-$small 60 step --shards "$sets/small" --scale $small --each-engine $rounds
  bench load-$large 55 load --shards "$sets/large" --scale $large $loads
  bench load-$small 55 load --shards "$sets/small" --scale $small $loads
  step checkup-$small 75 $(cxrfast doctor --deep --shards "$sets/small")
}

if [[ ${PACKAGES:-} ]]; then
  for archive in "$PACKAGES"/*.tar.xz; do
    "$python" -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter='tar')" "$archive" "$packages" ||
      refuse "$archive cannot be unpacked: PACKAGES is a folder of archives *.tar.xz"
  done
fi
[[ -d $packages/nvidia/cu13/lib ]] && export LD_LIBRARY_PATH=$packages/nvidia/cu13/lib:${LD_LIBRARY_PATH:-}
code=0
if [[ $call == 1 ]]; then first || code=1; else second || code=1; fi
"$python" -m cxrfast.bench.trial "$results" "$runs" || code=1
cp "$results"/trial.* "$out" && tar -C "$results" -czf "$out/all.tar.gz" . || code=1
exit $code
