#!/usr/bin/env bash
# The baselines of Table 1 on all 17 datasets, and lines at width 128 beside small.sh's. Settings that are not on a line
# are those of the task's row in docs/baselines.md; a run prints them and keeps them in args.json. The pretraining that a
# line needs is run first if it is not finished under runs/.
#
#   bash benchmark/baselines.sh --quick                            toy sizes, random data: does all of it run?
#   bash benchmark/baselines.sh --only odt__Hopper-medium__        some lines; --dry-run shows what would be done
#   SEEDS="1 2 3" WORKERS=2 EXTRA="--no-cuda" bash benchmark/baselines.sh
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATASETS:-datasets}  # files that Minari does not have

# dataset, task and kind, what pretraining learns from, contexts where they are not pretrain_dt.py's, ODT's weight decay
# where it is not Hopper's
million="random --dataset-steps 1000000"
cells=$(cat <<CELLS
Hopper-random          | --env-id Hopper-v5 --dataset-kind random           | --dataset $million --c-online 5
Walker2d-random        | --env-id Walker2d-v4 --dataset-kind random         | --dataset $million --c-online 5 --weight-decay 1e-3
Ant-random             | --env-id Ant-v4 --dataset-kind random              | --dataset $million --c-online 5 --weight-decay 1e-4
Hopper-medium          | --env-id Hopper-v5 --dataset-kind medium           | --dataset mujoco/hopper/medium-v0 --c-online 5
Hopper-medium-replay   | --env-id Hopper-v5 --dataset-kind medium-replay    | --dataset $data/Hopper-v5-medium-replay.hdf5 --c-online 5
Walker2d-medium        | --env-id Walker2d-v5 --dataset-kind medium         | --dataset mujoco/walker2d/medium-v0 --c-online 5 --weight-decay 1e-3
Walker2d-medium-replay | --env-id Walker2d-v5 --dataset-kind medium-replay  | --dataset $data/Walker2d-v5-medium-replay.hdf5 --c-online 5 --weight-decay 1e-3
Ant-medium             | --env-id Ant-v5 --dataset-kind medium              | --dataset mujoco/ant/medium-v0 --c-online 5 --weight-decay 1e-4
Ant-medium-replay      | --env-id Ant-v5 --dataset-kind medium-replay       | --dataset $data/Ant-v5-medium-replay.hdf5 --c-online 5 --weight-decay 1e-4
Door-cloned            | --env-id AdroitHandDoor-v1 --dataset-kind cloned   | --dataset D4RL/door/cloned-v2 --weight-decay 1e-4
Door-human             | --env-id AdroitHandDoor-v1 --dataset-kind human    | --dataset D4RL/door/human-v2 --drop-last-episode --weight-decay 1e-4
Pen-cloned             | --env-id AdroitHandPen-v1 --dataset-kind cloned    | --dataset D4RL/pen/cloned-v2 --c-online 5 --weight-decay 1e-4
Pen-human              | --env-id AdroitHandPen-v1 --dataset-kind human     | --dataset D4RL/pen/human-v2 --drop-last-episode --c-online 5 --weight-decay 1e-4
Hammer-cloned          | --env-id AdroitHandHammer-v1 --dataset-kind cloned | --dataset D4RL/hammer/cloned-v2 --c-online 1 --weight-decay 1e-4
Hammer-human           | --env-id AdroitHandHammer-v1 --dataset-kind human  | --dataset D4RL/hammer/human-v2 --drop-last-episode --c-online 1 --weight-decay 1e-4
AntMaze-umaze          | --env-id AntMaze_UMaze-v4 --dataset-kind umaze     | --dataset D4RL/antmaze/umaze-v1 --c-offline 1 --weight-decay 1e-4
AntMaze-diverse        | --env-id AntMaze_UMaze-v4 --dataset-kind diverse   | --dataset D4RL/antmaze/umaze-diverse-v1 --c-online 1 --weight-decay 1e-4
CELLS
)
# lines NAME COMMAND: a line per cell, @cell, @task and @data in it filled in
each_cell() {
    local cell task data
    while IFS='|' read -r cell task data; do
        cell=$(xargs <<< "$cell") task=$(xargs <<< "$task") data=$(xargs <<< "$data")
        sed "s#@cell#$cell#g; s#@task#$task#g; s#@data#$data#g" <<< "$1"
    done <<< "$cells"
}
pretraining=$(
    each_cell "pretrain_dt__@cell__odt python benchmark/baselines/odt.py pretrain @task @data --save-data"
    each_cell "pretrain_dt__@cell__odt-td3 python benchmark/baselines/odt.py pretrain --td3 @task @data --save-data"
    bash benchmark/small.sh --list
)
exec "${PYTHON:-python}" benchmark/run.py --needs <(echo "$pretraining") "$@" <<LINES
$(each_cell "odt__@cell python benchmark/baselines/odt.py @task --pretrained runs/pretrain_dt__@cell__odt__{seed} --iterations 1500")
$(each_cell "odt_td3__@cell python benchmark/baselines/odt.py --td3 @task --pretrained runs/pretrain_dt__@cell__odt-td3__{seed} --iterations 1500")
$(each_cell "iql__@cell python benchmark/baselines/iql.py @task --pretrained runs/pretrain_dt__@cell__odt__{seed} --iterations 1000")
# Width 128 on processor cores, from the policies that the other methods of small.sh begin with
odt__Hopper-random__small python benchmark/baselines/odt.py --env-id Hopper-v5 --small --iterations 60 --eval-every 5
odt__Hopper-medium__small python benchmark/baselines/odt.py --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 100 --eval-every 5
odt_td3__Hopper-random__small-alpha0.01 python benchmark/baselines/odt.py --td3 --env-id Hopper-v5 --small --iterations 60 --eval-every 5 --alpha 0.01 --tau 0.05 --critic-norm True --replay-size 100
odt_td3__Hopper-medium__small python benchmark/baselines/odt.py --td3 --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 60 --eval-every 5
odt_td3__Hopper-medium__small-alpha0.01 python benchmark/baselines/odt.py --td3 --env-id Hopper-v5 --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 60 --eval-every 5 --alpha 0.01 --tau 0.05 --critic-norm True --replay-size 100
iql__Hopper-random__small python benchmark/baselines/iql.py --env-id Hopper-v5 --small --iterations 100 --eval-every 5
iql__Hopper-medium__small python benchmark/baselines/iql.py --env-id Hopper-v5 --small --dataset-kind medium --pretrained runs/pretrain_dt__Hopper-medium__small__{seed} --iterations 100 --eval-every 5
LINES
