#!/usr/bin/env bash
# Q-guided GRPO-DT on Ant-medium-replay: Fig. 4b, against grpo_dt__Ant-medium-replay of benchmark/grpo_dt.sh. It needs
# no resets of the simulator, but the data that pretraining saved. Pretraining is run first if it is not finished.
#
#   bash benchmark/q_guided_grpo_dt.sh --quick                 toy sizes, random data: does all of it run?
#   bash benchmark/q_guided_grpo_dt.sh --only Ant            some lines; --dry-run shows what would be done
#   SEEDS="1 2 3" WORKERS=2 EXTRA="--no-cuda" bash benchmark/q_guided_grpo_dt.sh
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" benchmark/run.py --needs <(bash benchmark/pretrain_dt.sh --list) "$@" <<LINES
q_guided_grpo_dt__Ant-medium-replay python q_guided_grpo_dt.py --env-id Ant-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Ant-medium-replay__{seed} --iterations 500
LINES
