"""benchmark/speed.py: what it compares does the same."""

import importlib.util
import types
from pathlib import Path

import numpy as np
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
    windows = (torch.randn(40, 1, 11), 3 * torch.randn(40, 1), torch.zeros(40, 0, 3))
    (a, _), (b, _) = ours(*windows), plain(*windows)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.log_std, b.log_std, rtol=1e-4, atol=1e-5)
    assert a.mean.std() > 0.1


def test_operations_are_those_of_the_matrix_products_counted_by_hand():
    ours, plain = pair()
    width, args = 32, types.SimpleNamespace(device="cpu")
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
