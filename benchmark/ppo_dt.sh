#!/usr/bin/env bash
# PPO-DT on all 17 datasets: its column of Table 1. Settings that are not on a line are those of Table 5 and of the row
# of Table 7 that --env-id and --dataset-kind pick; a run prints them and keeps them in args.json. The number of
# iterations is not in the paper. Pretraining that is not finished under runs/ is run first (benchmark/pretrain_dt.sh).
#
#   bash benchmark/ppo_dt.sh --quick                           toy sizes, random data: does all of it run?
#   bash benchmark/ppo_dt.sh --only Hopper-medium__            some lines; --dry-run shows what would be done
#   SEEDS="1 2 3" WORKERS=2 EXTRA="--no-cuda" bash benchmark/ppo_dt.sh
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" benchmark/run.py --needs <(bash benchmark/pretrain_dt.sh --list) "$@" <<LINES
# MuJoCo (random)
ppo_dt__Hopper-random          python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind random --pretrained runs/pretrain_dt__Hopper-random__{seed} --iterations 500
ppo_dt__Walker2d-random        python ppo_dt_continuous.py --env-id Walker2d-v4 --dataset-kind random --pretrained runs/pretrain_dt__Walker2d-random__{seed} --iterations 500
ppo_dt__Ant-random             python ppo_dt_continuous.py --env-id Ant-v4 --dataset-kind random --pretrained runs/pretrain_dt__Ant-random__{seed} --iterations 500
# MuJoCo (medium)
ppo_dt__Hopper-medium          python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500
ppo_dt__Hopper-medium-replay   python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Hopper-medium-replay__{seed} --iterations 500
ppo_dt__Walker2d-medium        python ppo_dt_continuous.py --env-id Walker2d-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Walker2d-medium__{seed} --iterations 500
ppo_dt__Walker2d-medium-replay python ppo_dt_continuous.py --env-id Walker2d-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Walker2d-medium-replay__{seed} --iterations 500
ppo_dt__Ant-medium             python ppo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Ant-medium__{seed} --iterations 500
ppo_dt__Ant-medium-replay      python ppo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Ant-medium-replay__{seed} --iterations 500
# Adroit
ppo_dt__Door-cloned            python ppo_dt_continuous.py --env-id AdroitHandDoor-v1 --dataset-kind cloned --pretrained runs/pretrain_dt__Door-cloned__{seed} --iterations 500
ppo_dt__Door-human             python ppo_dt_continuous.py --env-id AdroitHandDoor-v1 --dataset-kind human --pretrained runs/pretrain_dt__Door-human__{seed} --iterations 500
ppo_dt__Pen-cloned             python ppo_dt_continuous.py --env-id AdroitHandPen-v1 --dataset-kind cloned --pretrained runs/pretrain_dt__Pen-cloned__{seed} --iterations 500
ppo_dt__Pen-human              python ppo_dt_continuous.py --env-id AdroitHandPen-v1 --dataset-kind human --pretrained runs/pretrain_dt__Pen-human__{seed} --iterations 500
ppo_dt__Hammer-cloned          python ppo_dt_continuous.py --env-id AdroitHandHammer-v1 --dataset-kind cloned --pretrained runs/pretrain_dt__Hammer-cloned__{seed} --iterations 500
ppo_dt__Hammer-human           python ppo_dt_continuous.py --env-id AdroitHandHammer-v1 --dataset-kind human --pretrained runs/pretrain_dt__Hammer-human__{seed} --iterations 500
# AntMaze
ppo_dt__AntMaze-umaze          python ppo_dt_continuous.py --env-id AntMaze_UMaze-v4 --dataset-kind umaze --pretrained runs/pretrain_dt__AntMaze-umaze__{seed} --iterations 500
ppo_dt__AntMaze-diverse        python ppo_dt_continuous.py --env-id AntMaze_UMaze-v4 --dataset-kind diverse --pretrained runs/pretrain_dt__AntMaze-diverse__{seed} --iterations 500
LINES
