#!/usr/bin/env bash
# The ablations of GRPO-DT: Figs. 1, 2a-e, 4a, 4c, 4d. Each figure's other curve is the line of the same dataset in
# benchmark/grpo_dt.sh; Fig. 4b is benchmark/q_guided_grpo_dt.sh. The paper's text names Hopper and Door for Fig. 1 and
# Ant-medium for Fig. 2a; for the others, and for the lengths of Figs. 4c and 4d, datasets and values are our choice.
#
#   bash benchmark/ablations.sh --quick                        toy sizes, random data: does all of it run?
#   bash benchmark/ablations.sh --only hindsight               some lines; --dry-run shows what would be done
#   SEEDS="1 2 3" WORKERS=2 EXTRA="--no-cuda" bash benchmark/ablations.sh
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" benchmark/run.py --needs <(bash benchmark/pretrain_dt.sh --list) "$@" <<LINES
# Fig. 1: with hindsight relabelling
grpo_dt__Hopper-medium__hindsight            python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --hindsight
grpo_dt__Door-human__hindsight               python grpo_dt_continuous.py --env-id AdroitHandDoor-v1 --dataset-kind human --pretrained runs/pretrain_dt__Door-human__{seed} --iterations 500 --hindsight
# Fig. 2a: full trajectories. A minibatch of 4 episodes has about as many steps as one of 256 sub-trajectories
grpo_dt__Ant-medium__full-trajectories       python grpo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Ant-medium__{seed} --iterations 500 --full-trajectories --n-batch 4
# Fig. 2b: groups of mixed states
grpo_dt__Hopper-medium__mixed-groups         python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --mixed-groups
# Fig. 2c: a ratio per step
grpo_dt__Hopper-medium__token-ratio          python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --ratio token
# Fig. 2d: random reset points
grpo_dt__Hopper-medium__random-points        python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --random-points
# Fig. 2e: the geometric mean of the ratios
grpo_dt__Hopper-medium__geometric-mean       python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --ratio geometric
# Fig. 4a: from a Reinformer
grpo_dt__Hopper-medium__reinformer           python benchmark/reinformer.py finetune --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__reinformer__{seed} --iterations 500
# Fig. 4c: L_traj (15 is the paper's, in benchmark/grpo_dt.sh)
grpo_dt__Hopper-medium__l-traj-1             python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --l-traj 1
grpo_dt__Hopper-medium__l-traj-5             python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --l-traj 5
grpo_dt__Hopper-medium__l-traj-50            python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --l-traj 50
grpo_dt__Hopper-medium__l-traj-100           python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --l-traj 100
# Fig. 4d: L_eval (400 is the paper's)
grpo_dt__Hopper-medium__l-eval-0             python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --l-eval 0
grpo_dt__Hopper-medium__l-eval-30            python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --l-eval 30
grpo_dt__Hopper-medium__l-eval-100           python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --l-eval 100
grpo_dt__Hopper-medium__l-eval-200           python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__{seed} --iterations 500 --l-eval 200
LINES
