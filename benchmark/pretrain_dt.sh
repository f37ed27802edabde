#!/usr/bin/env bash
# Pretraining for all 17 datasets: the column "DT" of Table 1 (each run closes with an evaluation), and the checkpoints
# that finetuning begins with. Settings that are not on a line are those of Table 5 and of the task's row in
# docs/pretrain_dt.md; a run prints them and keeps them in args.json. Times: docs/reproduce.md, data: docs/datasets.md.
#
#   bash benchmark/pretrain_dt.sh --quick                      toy sizes, random data: does all of it run?
#   bash benchmark/pretrain_dt.sh --only Hopper-medium__       some lines; --dry-run shows what would be done
#   SEEDS="1 2 3" WORKERS=2 EXTRA="--no-cuda" bash benchmark/pretrain_dt.sh
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATASETS:-datasets}  # files that Minari does not have
exec "${PYTHON:-python}" benchmark/run.py "$@" <<LINES
# MuJoCo (random)
pretrain_dt__Hopper-random           python pretrain_dt.py --env-id Hopper-v5 --dataset-kind random --dataset random --dataset-steps 1000000
pretrain_dt__Walker2d-random         python pretrain_dt.py --env-id Walker2d-v4 --dataset-kind random --dataset random --dataset-steps 1000000
pretrain_dt__Ant-random              python pretrain_dt.py --env-id Ant-v4 --dataset-kind random --dataset random --dataset-steps 1000000
# MuJoCo (medium)
pretrain_dt__Hopper-medium           python pretrain_dt.py --env-id Hopper-v5 --dataset-kind medium --dataset mujoco/hopper/medium-v0
pretrain_dt__Hopper-medium-replay    python pretrain_dt.py --env-id Hopper-v5 --dataset-kind medium-replay --dataset $data/Hopper-v5-medium-replay.hdf5
pretrain_dt__Walker2d-medium         python pretrain_dt.py --env-id Walker2d-v5 --dataset-kind medium --dataset mujoco/walker2d/medium-v0
pretrain_dt__Walker2d-medium-replay  python pretrain_dt.py --env-id Walker2d-v5 --dataset-kind medium-replay --dataset $data/Walker2d-v5-medium-replay.hdf5
pretrain_dt__Ant-medium              python pretrain_dt.py --env-id Ant-v5 --dataset-kind medium --dataset mujoco/ant/medium-v0
pretrain_dt__Ant-medium-replay       python pretrain_dt.py --env-id Ant-v5 --dataset-kind medium-replay --dataset $data/Ant-v5-medium-replay.hdf5 --save-data
# Adroit
pretrain_dt__Door-cloned             python pretrain_dt.py --env-id AdroitHandDoor-v1 --dataset-kind cloned --dataset D4RL/door/cloned-v2
pretrain_dt__Door-human              python pretrain_dt.py --env-id AdroitHandDoor-v1 --dataset-kind human --dataset D4RL/door/human-v2 --drop-last-episode
pretrain_dt__Pen-cloned              python pretrain_dt.py --env-id AdroitHandPen-v1 --dataset-kind cloned --dataset D4RL/pen/cloned-v2
pretrain_dt__Pen-human               python pretrain_dt.py --env-id AdroitHandPen-v1 --dataset-kind human --dataset D4RL/pen/human-v2 --drop-last-episode
pretrain_dt__Hammer-cloned           python pretrain_dt.py --env-id AdroitHandHammer-v1 --dataset-kind cloned --dataset D4RL/hammer/cloned-v2
pretrain_dt__Hammer-human            python pretrain_dt.py --env-id AdroitHandHammer-v1 --dataset-kind human --dataset D4RL/hammer/human-v2 --drop-last-episode
# AntMaze
pretrain_dt__AntMaze-umaze           python pretrain_dt.py --env-id AntMaze_UMaze-v4 --dataset-kind umaze --dataset D4RL/antmaze/umaze-v1
pretrain_dt__AntMaze-diverse         python pretrain_dt.py --env-id AntMaze_UMaze-v4 --dataset-kind diverse --dataset D4RL/antmaze/umaze-diverse-v1
# Fig. 4a
pretrain_dt__Hopper-medium__reinformer python benchmark/reinformer.py pretrain --env-id Hopper-v5 --dataset-kind medium --dataset mujoco/hopper/medium-v0
LINES
