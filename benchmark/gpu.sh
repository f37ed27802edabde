#!/usr/bin/env bash
# On a GPU, within a given time: pretraining of Hopper-medium at the paper's size, then GRPO-DT with the paper's settings
# to the letter for as many iterations as fit, and the speed of the simulators by number of worker processes.
#
#   bash benchmark/gpu.sh Hopper-v5-medium.hdf5 OUT [SECONDS, 480] [UPDATES, 5000] [WIDTH, 512]
#   bash benchmark/gpu.sh Hopper-v5-medium.hdf5 OUT 120 20 32       toy size, on any machine
#
# OUT gets the metrics.csv, args.json and console of both runs and simulators.md. Packages: requirements.txt, or wheels in
# .whl/ where the machine has no network.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 out=$2 seconds=${3:-480} updates=${4:-5000} width=${5:-512} python=${PYTHON:-python3}
end=$((SECONDS + seconds))
work=$(mktemp -d)
mkdir -p "$out"
export PYTHONUNBUFFERED=1
if compgen -G '.whl/*.whl' > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" .whl/*.whl
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
cores=$("$python" -c "import os; print(len(os.sched_getaffinity(0)))")
"$python" -c "import torch; print('torch', torch.__version__, 'cuda', torch.cuda.is_available())" | tee "$out/machine.txt"
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2> /dev/null | tee -a "$out/machine.txt" || true

# a tenth of the time: environment steps per second by number of workers
counts=$(for n in 1 4 8 16; do [ "$n" -gt "$cores" ] || echo "$n"; done)
timeout $((seconds / 10)) "$python" benchmark/speed.py --parts simulators --tasks Hopper-v5 --rounds 2 --workers $counts \
    > "$out/simulators.md" || echo "simulators: not done in time" | tee -a "$out/machine.txt"

hopper=(--env-id Hopper-v5 --dataset-kind medium)
"$python" pretrain_dt.py "${hopper[@]}" --dataset "$data" --embed-dim "$width" --updates "$updates" \
    --run-dir "$work/pretrained" > "$out/pretrain.log"
tail -n 2 "$out/pretrain.log"
timeout --signal=INT --kill-after=20 $((end - SECONDS)) "$python" grpo_dt_continuous.py "${hopper[@]}" \
    --pretrained "$work/pretrained" --eval-every 10 --workers "$cores" --run-dir "$work/grpo" > "$out/grpo.log" || true
tail -n 3 "$out/grpo.log"
for run in pretrained grpo; do
    cp "$work/$run/metrics.csv" "$out/$run.csv"
    cp "$work/$run/args.json" "$out/$run.json"
done
