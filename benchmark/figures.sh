#!/usr/bin/env bash
# The figures of README.md and docs/results.md, from the runs in benchmark/results. Seconds.
#
#   bash benchmark/figures.sh
set -euo pipefail
cd "$(dirname "$0")/results"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# figure NAME PICTURE RUN ...: the picture of report.py that becomes NAME.png
figure() {
    local name=$1 picture=$2
    shift 2
    "${PYTHON:-python}" ../report.py "$@" --out "$out/$name" >"$out/log" || { cat "$out/log"; exit 1; }
    # 255 colours take a third of the space
    "${PYTHON:-python}" -c "import sys; from PIL import Image
Image.open(sys.argv[1]).convert('RGB').quantize(255, dither=Image.Dither.NONE).save(sys.argv[2], optimize=True)" \
        "$out/$name/$picture.png" "../../docs/$name.png"
}

mkdir -p ../../docs/figures
figure overview overview \
    ppo_dt__hopper-medium__shipped-small-longer__1 grpo_dt__hopper-medium__{shipped-one-scale-then-own-scales__*,small-steps-then-gamma0.999-lr3e-5__1} \
    grpo_dt__ant-medium__l-eval50-delta-r0__1 ppo_dt__ant-medium__small-longer__1 \
    ppo_dt__{hopper-medium-replay__small-longer,walker2d-medium__small-kappa0.001,ant-medium-replay__small-kappa0.001}__1 \
    q_guided_grpo_dt__ant-medium-replay__lr5e-5-tau0.05__1 grpo_dt__ant-medium-replay__small__1
figure figures/hopper-medium Ho-M-v2 \
    grpo_dt__hopper-medium__annealed__* \
    grpo_dt__hopper-medium__{small-steps-then-gamma0.999-lr3e-5__1,one-scale-then-delta-r0-then-own-scales-lr4e-5__1} \
    grpo_dt__hopper-medium__{one-scale-delta-r0,shipped-one-scale}-then-own-scales__[123]
figure figures/hopper-random Ho-R-v2 \
    grpo_dt__hopper-random__{from-g-eval__*,small-100-iterations__3,small-lr2e-4-kappa0.01__3} ppo_dt__hopper-random__*
figure figures/ppo Ho-M-v2 \
    ppo_dt__hopper-medium__{paper,gamma0.995,shipped-small}__* ppo_dt__hopper-medium__shipped-small-longer__1
figure figures/hindsight Ho-M-v2 \
    ppo_dt__hopper-medium__shipped-small{,-hindsight}__*
figure figures/mixed-groups Ho-M-v2 \
    grpo_dt__hopper-medium__shipped-{l-eval985,mixed-groups,one-scale}__*
figure figures/baselines Ho-M-v2 \
    odt__hopper-medium__small__* odt_td3__hopper-medium__small-alpha0.01__* iql__hopper-medium__small__* \
    ppo_dt__hopper-medium__shipped-small__* q_guided_grpo_dt__hopper-medium__small__* grpo_dt__hopper-medium__shipped-one-scale-then-own-scales__*
figure figures/baselines-random Ho-R-v2 \
    odt__hopper-random__small__* odt_td3__hopper-random__small-alpha0.01__* iql__hopper-random__small__* \
    q_guided_grpo_dt__hopper-random__small__* ppo_dt__hopper-random__[12] grpo_dt__hopper-random__small-lr2e-4-kappa0.01__3
figure figures/medium-replay overview_steps \
    q_guided_grpo_dt__*-replay__{lr5e-5-tau0.05__1,small-gamma0.995__1} \
    grpo_dt__*-replay__small__1 ppo_dt__*-replay__small__1
