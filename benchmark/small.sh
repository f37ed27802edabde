#!/usr/bin/env bash
# What docs/results.md shows: width 128 on processor cores, minutes to four hours a run. Not the paper's settings: networks
# of a quarter of its width, pretrained on single steps, and what such networks learn with (rate, buffer, kappa and so on).
#
#   bash benchmark/small.sh --quick                            toy sizes, random data: does all of it run?
#   bash benchmark/small.sh --only ppo_dt__Hopper-medium       some lines; --dry-run shows what would be done
#   SEEDS="1 2" WORKERS=2 bash benchmark/small.sh              one run per core
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATASETS:-datasets}  # Hopper-v5-medium.hdf5 and so on, as benchmark/collect_dataset.py writes them
pretraining=$(cat <<LINES
pretrain_dt__Hopper-medium__small        python pretrain_dt.py --env-id Hopper-v5 --dataset-kind medium --dataset $data/Hopper-v5-medium.hdf5 --small --eval-episodes 20 --save-data
pretrain_dt__Hopper-medium-replay__small python pretrain_dt.py --env-id Hopper-v5 --dataset-kind medium-replay --dataset $data/Hopper-v5-medium-replay.hdf5 --small --eval-episodes 20 --save-data
pretrain_dt__Ant-medium__small           python pretrain_dt.py --env-id Ant-v5 --dataset-kind medium --dataset $data/Ant-v5-medium.hdf5 --small --eval-episodes 20
pretrain_dt__Ant-medium-replay__small    python pretrain_dt.py --env-id Ant-v5 --dataset-kind medium-replay --dataset $data/Ant-v5-medium-replay.hdf5 --small --eval-episodes 20 --save-data
pretrain_dt__Walker2d-medium__small      python pretrain_dt.py --env-id Walker2d-v5 --dataset-kind medium --dataset $data/Walker2d-v5-medium.hdf5 --small --eval-episodes 20
pretrain_dt__Door-human__small           python pretrain_dt.py --env-id AdroitHandDoor-v1 --dataset-kind human --dataset $data/door-human.hdf5 --small --eval-episodes 20
LINES
)
exec "${PYTHON:-python}" benchmark/run.py --needs <(echo "$pretraining") "$@" <<LINES
$pretraining
# From random data, pretrained by the scripts themselves
grpo_dt__Hopper-random__small python grpo_dt_continuous.py --env-id Hopper-v5 --embed-dim 128 --iterations 30
grpo_dt__Hopper-random__small-token-ratio   python grpo_dt_continuous.py --env-id Hopper-v5 --embed-dim 128 --iterations 30 --ratio token
grpo_dt__Hopper-random__small-random-points python grpo_dt_continuous.py --env-id Hopper-v5 --embed-dim 128 --iterations 30 --random-points
grpo_dt__Hopper-random__small-lr2e-4-kappa0.01 python grpo_dt_continuous.py --env-id Hopper-v5 --embed-dim 128 --iterations 250 --lr 2e-4 --buffer-size 512 --kappa-initial 0.01 --eval-every 3
grpo_dt__Ant-random__small    python grpo_dt_continuous.py --env-id Ant-v4 --embed-dim 128 --iterations 50 --eval-every 3
ppo_dt__Hopper-random__small  python ppo_dt_continuous.py --env-id Hopper-v5 --embed-dim 128 --iterations 140
q_guided_grpo_dt__Hopper-random__small python q_guided_grpo_dt.py --env-id Hopper-v5 --small --iterations 120 --eval-every 5
# From medium data
grpo_dt__Hopper-medium__small            python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 48 --lr 5e-4 --buffer-size 512 --eval-every 3
grpo_dt__Hopper-medium__small-kappa0.01            python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 220 --lr 5e-4 --buffer-size 512 --kappa-initial 0.01 --eval-every 3
grpo_dt__Hopper-medium__small-kappa0.01-gamma0.999 python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 120 --lr 5e-4 --buffer-size 512 --kappa-initial 0.01 --gamma 0.999 --eval-every 3
grpo_dt__Hopper-medium__small-kappa-lr1e-2         python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 100 --lr 5e-4 --buffer-size 512 --kappa-lr 1e-2 --eval-every 3
grpo_dt__Hopper-medium__small-steps                python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 1000 --small
grpo_dt__Hopper-medium__annealed                   python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 300 --small --lr 3e-4 --gamma 0.999 --anneal-lr
grpo_dt__Hopper-medium__fresh                      python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 400 --small --gamma 0.999 --anneal-lr --buffer-size 128
grpo_dt__Hopper-medium__fresh-l-eval985            python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 400 --small --gamma 0.999 --anneal-lr --buffer-size 128 --l-eval 985
grpo_dt__Hopper-medium__one-scale-l-eval985        python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 400 --small --gamma 0.999 --anneal-lr --buffer-size 128 --l-eval 985 --one-scale 400
grpo_dt__Hopper-medium__one-scale-delta-r0         python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 400 --small --gamma 0.999 --anneal-lr --buffer-size 128 --l-eval 985 --one-scale 400 --delta-r 0
grpo_dt__Hopper-medium__shipped-l-eval985          python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained benchmark/checkpoints/hopper-medium --iterations 60 --small --gamma 0.999 --buffer-size 128 --l-eval 985
grpo_dt__Hopper-medium__shipped-mixed-groups       python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained benchmark/checkpoints/hopper-medium --iterations 60 --small --gamma 0.999 --buffer-size 128 --l-eval 985 --mixed-groups
grpo_dt__Hopper-medium__shipped-one-scale          python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained benchmark/checkpoints/hopper-medium --iterations 60 --small --gamma 0.999 --buffer-size 128 --l-eval 985 --one-scale 60 --delta-r 0
# its run goes on by Eq. 2: python grpo_dt_continuous.py --resume RUN --lr 2e-4 --anneal-lr --iterations 260
grpo_dt__Ant-medium__small-steps                   python grpo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Ant-medium__small__{seed} --iterations 500 --small
grpo_dt__Ant-medium__one-scale-delta-r0            python grpo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Ant-medium__small__{seed} --iterations 80 --small --gamma 0.999 --buffer-size 128 --l-eval 985 --one-scale 80 --delta-r 0 --eval-every 5
grpo_dt__Ant-medium__l-eval50-delta-r0              python grpo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Ant-medium__small__{seed} --iterations 327 --small --buffer-size 128 --l-eval 50 --delta-r 0
# its run goes on with smaller steps: python grpo_dt_continuous.py --resume RUN --lr 3e-5 --iterations 525
ppo_dt__Hopper-medium__small             python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 84
ppo_dt__Hopper-medium__small-gamma0.995  python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 84 --gamma 0.995
ppo_dt__Ant-medium__small-kappa0.001 python ppo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Ant-medium__small__{seed} --small --kappa-initial 1e-3 --iterations 400 --eval-every 5
ppo_dt__Ant-medium__small-longer     python ppo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Ant-medium__small__{seed} --small --iterations 1000 --eval-every 5
ppo_dt__Hopper-medium__shipped-gamma0.995 python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained benchmark/checkpoints/hopper-medium --iterations 40 --gamma 0.995 --eval-every 5
ppo_dt__Hopper-medium__shipped-small      python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained benchmark/checkpoints/hopper-medium --small --iterations 40 --eval-every 5
ppo_dt__Hopper-medium__shipped-small-kappa0.001 python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained benchmark/checkpoints/hopper-medium --small --kappa-initial 1e-3 --iterations 40 --eval-every 5
ppo_dt__Hopper-medium__shipped-small-longer python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained benchmark/checkpoints/hopper-medium --small --iterations 400 --eval-every 5
ppo_dt__Hopper-medium__shipped-small-hindsight python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium --pretrained benchmark/checkpoints/hopper-medium --small --iterations 40 --eval-every 5 --hindsight
ppo_dt__Walker2d-medium__small-kappa0.001 python ppo_dt_continuous.py --env-id Walker2d-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Walker2d-medium__small__{seed} --small --kappa-initial 1e-3 --iterations 400 --eval-every 5
q_guided_grpo_dt__Hopper-medium__small   python q_guided_grpo_dt.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --small --iterations 150 --eval-every 5
# From medium-replay data
grpo_dt__Hopper-medium-replay__small     python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Hopper-medium-replay__small__{seed} --iterations 100 --lr 5e-4 --buffer-size 512 --eval-every 3
grpo_dt__Hopper-medium-replay__small-kappa0.01 python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Hopper-medium-replay__small__{seed} --iterations 100 --lr 5e-4 --buffer-size 512 --kappa-initial 0.01 --eval-every 3
grpo_dt__Hopper-medium-replay__small-steps     python grpo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Hopper-medium-replay__small__{seed} --iterations 500 --small
grpo_dt__Ant-medium-replay__small        python grpo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Ant-medium-replay__small__{seed} --iterations 50 --lr 2e-4 --buffer-size 512 --eval-every 3
ppo_dt__Hopper-medium-replay__small      python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Hopper-medium-replay__small__{seed} --iterations 100
ppo_dt__Hopper-medium-replay__small-longer python ppo_dt_continuous.py --env-id Hopper-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Hopper-medium-replay__small__{seed} --small --iterations 400 --eval-every 5
ppo_dt__Ant-medium-replay__small-kappa0.001 python ppo_dt_continuous.py --env-id Ant-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Ant-medium-replay__small__{seed} --small --kappa-initial 1e-3 --iterations 700 --eval-every 5
q_guided_grpo_dt__Hopper-medium-replay__small            python q_guided_grpo_dt.py --env-id Hopper-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Hopper-medium-replay__small__{seed} --iterations 250 --lr 5e-5 --tau 0.05
q_guided_grpo_dt__Hopper-medium-replay__small-gamma0.995 python q_guided_grpo_dt.py --env-id Hopper-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Hopper-medium-replay__small__{seed} --iterations 250 --lr 5e-5 --tau 0.05 --gamma 0.995
q_guided_grpo_dt__Ant-medium-replay__small               python q_guided_grpo_dt.py --env-id Ant-v5 --dataset-kind medium-replay --pretrained runs/pretrain_dt__Ant-medium-replay__small__{seed} --iterations 170 --lr 5e-5 --tau 0.05
# From human demonstrations
grpo_dt__Door-human__small               python grpo_dt_continuous.py --env-id AdroitHandDoor-v1 --dataset-kind human --pretrained runs/pretrain_dt__Door-human__small__{seed} --iterations 90 --lr 1e-4 --buffer-size 512 --delta-r 0 --kappa-initial 1e-3 --eval-every 5
LINES
