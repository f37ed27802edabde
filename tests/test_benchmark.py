"""benchmark/speed.py: what it compares does the same."""

import importlib.util
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo_dt_continuous as grpo

PATH = Path(__file__).resolve().parent.parent / "benchmark" / "speed.py"
spec = importlib.util.spec_from_file_location("speed", PATH)
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)


def pair(act_dim=3):
    """Our network and the plain one with the same weights."""
    torch.manual_seed(0)
    ours = grpo.DecisionTransformer(11, act_dim, 32, 2, 2).eval().requires_grad_(False)
    plain = speed.PlainTransformer(11, act_dim, 32, 2, 2).eval().requires_grad_(False)
    for parameter in ours.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_the_plain_network_is_the_same_function():
    ours, plain = pair()
    two = speed.TwoTokens(11, 3, 32, 2, 2).eval().requires_grad_(False)
    two.load_state_dict(ours.state_dict())
    windows = (torch.randn(40, 1, 11), 3 * torch.randn(40, 1), torch.zeros(40, 0, 3))
    a, _ = ours(*windows)
    for other in (plain, two):
        b, _ = other(*windows)
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.log_std, b.log_std, rtol=1e-4, atol=1e-5)
    assert a.mean.std() > 0.1


def test_the_changes_are_measured_one_after_the_other():
    options = types.SimpleNamespace(embed_dim=32, threads=1, rounds=1)
    rows, note = speed.measure_changes("Hopper-v5", options)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.split("\n")]
    assert len(cells) == (5 if grpo.set_up_torch(grpo.Args(threads=1))[1] == torch.bfloat16 else 3)
    assert cells[0][3] == cells[0][5] == "1.00" and all(float(row[2]) > 0 and float(row[4]) > 0 for row in cells)
    assert "padded to 32" in note


def test_what_it_takes_from_the_script_is_there():
    names = set(re.findall(r"\bgrpo\.([A-Za-z_]+)", PATH.read_text()))
    assert len(names) > 15 and all(hasattr(grpo, name) for name in names)


def test_operations_are_those_of_the_matrix_products_counted_by_hand():
    ours, plain = pair()
    width, args = 32, types.SimpleNamespace(device="cpu", c_online=1)
    per_token = 12 * width * width  # query, key, value, projection: 4; up and down: 8
    heads = width + 11 * width + 2 * width * 3  # return and observation in, mean and log std out
    last = per_token + 2 * width * width  # all for the state token, keys and values for the other
    assert speed.flops_of(ours, args) == 2 * (2 * per_token + last + heads)
    assert speed.flops_of(plain, args) > 1.4 * speed.flops_of(ours, args)


def test_the_plain_rollout_steps_every_environment_as_often_as_it_says():
    args = grpo.Args(env_id="Hopper-v5", l_traj=3, l_eval=9, g_online=3.0, c_online=1)
    envs = [grpo.make_env("Hopper-v5", {"terminate_when_unhealthy": False}) for _ in range(2)]
    _, plain = pair()
    (source, *_) = grpo.collect(plain, [grpo.make_env("Hopper-v5")], args, 1)
    members, start = [(source, 0), (source, 5)], []
    for env, (_, h) in zip(envs, members):
        env.reset(seed=0)
        start.append(source.snapshots[h][0])  # the time
    simulated, inferred = speed.plain_rollout(plain, envs, members, args, 4)
    passed = [env.unwrapped.data.time - time for env, time in zip(envs, start)]
    np.testing.assert_allclose(passed, 7 * envs[0].unwrapped.dt, rtol=1e-9)
    assert simulated > 0 and inferred > 0


@pytest.mark.slow
@pytest.mark.parametrize("plain_steps, names", [(0, ["ours", "floor"]), (1, ["ours", "plain", "floor"])])
def test_an_iteration_is_timed_beside_its_yardsticks(plain_steps, names):
    options = types.SimpleNamespace(embed_dim=32, threads=1, steps=2, plain_steps=plain_steps)
    rows, note = speed.measure_iteration("AdroitHandPen-v1", options)
    cells = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows.splitlines()]
    assert [row[:2] for row in cells] == [["AdroitHandPen-v1", name] for name in names]
    for _, _, total, *parts, _ in cells:
        assert float(total) == pytest.approx(sum(map(float, parts)), abs=0.16)
    assert float(cells[-1][-1]) < 1.0 == float(cells[0][-1]) and "environment steps" in note
