"""benchmark/speed.py: what it compares does the same, and what it counts is right."""

import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo_dt_continuous as grpo

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "benchmark" / "speed.py"
spec = importlib.util.spec_from_file_location("speed", PATH)
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)

A_FEW = pytest.mark.parametrize("env_id", ["Hopper-v5", "AdroitHandPen-v1", "AntMaze_UMaze-v4"])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def states_of(env_id, count):
    return speed.states_of_an_episode(grpo.make_env(env_id, {}), count, np.random.default_rng(0))


def test_what_it_takes_from_the_script_is_there():
    names = set(re.findall(r"\bgrpo\.(\w+)", PATH.read_text()))
    assert len(names) > 10 and all(hasattr(grpo, name) for name in names)


@A_FEW
def test_states_are_spread_over_one_episode(env_id):
    states = states_of(env_id, 5)
    env = grpo.make_env(env_id, {})
    simulation = grpo.Simulation(env)
    assert states.shape == (5, simulation.ends[-1])
    times = states[:, 0]  # first in MuJoCo's integration state
    dt = grpo.simulator_of(env).dt
    steps = (times - times[0]) / dt
    assert times[0] == simulation.data.time and 5 < steps[-1] < env.spec.max_episode_steps
    np.testing.assert_allclose(steps, np.linspace(0, steps[-1], 5).round(6).astype(int), atol=1e-6)


@A_FEW
def test_simulators_loop_and_mj_step_make_the_same_steps(env_id):
    states = states_of(env_id, 2)
    env = grpo.make_env(env_id, {})
    actions = np.random.default_rng(1).uniform(-speed.ACTION, speed.ACTION, (4, 2, *env.action_space.shape))
    with grpo.Simulators(env, 2, 0) as sims:
        found = [speed.time_simulators(sims, states, actions)]
        reached, size = sims.states[:2].copy(), sims.local.ends[0]
        np.testing.assert_allclose(reached[:, 0] - states[:, 0], 4 * grpo.simulator_of(env).dt, rtol=1e-6)
        for function in (speed.time_loop, speed.time_raw):
            found.append(function(sims.local, states, actions))
            last = np.empty(states.shape[1])
            sims.local.take(last)  # of the simulation that was stepped last
            assert last[0] == reached[1, 0]
            np.testing.assert_allclose(last[:size], reached[1, :size], rtol=1e-3, atol=1e-3)
        assert np.abs(reached[:, :size] - states[:, :size]).max() > 0.05  # far from where they began
    assert all(np.isfinite(each) and each > 0 for each in found)


def test_a_row_has_mj_step_the_loop_and_each_number_of_workers():
    options = types.SimpleNamespace(simulations=4, steps=2, rounds=1, workers=[0, 1])
    row = speed.measure_simulators("Hopper-v5", options)
    name, *speeds = [cell.strip() for cell in row.strip("|").split("|")]
    assert name == "Hopper-v5" and len(speeds) == 4 and all(float(each.replace(",", "")) > 0 for each in speeds)


def test_operations_are_those_of_the_matrix_products_counted_by_hand():
    model, width = grpo.DecisionTransformer(11, 3, 32, 2, 2).eval(), 32
    per_token = 12 * width * width  # query, key, value, projection: 4; up and down: 8
    heads = width + 11 * width + 2 * width * 3  # return and observation in, mean and log std out
    last = per_token + 2 * width * width  # all for the state token, keys and values for the other
    counted = speed.flops_of(model, grpo.Args(c_online=1))
    action = 2 * width * 3  # embedded or not: nothing reads it at context 1
    assert counted in (least := 2 * (2 * per_token + last + heads), least + action)
    assert speed.flops_of(model, grpo.Args(c_online=5)) > 5 * counted


@pytest.mark.slow
def test_an_iteration_is_timed_beside_its_floor(tmp_path):
    words = ["--parts", "iteration", "--tasks", "AdroitHandPen-v1", "--embed-dim", "32", "--threads", "1"]
    words += ["--steps", "2"]
    done = subprocess.run([sys.executable, str(PATH), *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (Adroit.*) \|$", done.stdout, re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert [row[:2] for row in cells] == [["AdroitHandPen-v1", name] for name in ("ours", "floor")]
    for _, _, total, *parts, _ in cells:
        assert float(total) == pytest.approx(sum(map(float, parts)), abs=0.16)
    assert float(cells[-1][-1]) < 1.0 == float(cells[0][-1])
    steps = int(re.search(r"([\d,]+) environment steps", done.stdout)[1].replace(",", ""))
    assert 512 * 3 < steps <= 512 * 33  # L_traj and L_eval
