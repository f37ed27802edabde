"""Critic, candidates, loss, buffers and whole runs of q_guided_grpo_dt.py at toy size."""

import ast
import csv
import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import pretrain_dt
import q_guided_grpo_dt as q_guided
from q_guided_grpo_dt import (
    ACTION_LIMIT,
    METRICS,
    ROWS,
    Args,
    Candidates,
    DecisionTransformer,
    QGuidedLearner,
    SquashedGaussian,
    TwinCritic,
    action_variances,
    choose_states,
    collect_episodes,
    distribution,
    fill_from_table,
    lay_out,
    load_checkpoint,
    load_offline,
    main,
    make_env,
    parse_args,
    polyak,
    q_guided_loss,
    rollout_copy,
    sample_candidates,
    squash,
    td_target,
    windows,
)

SIZES = dict(embed_dim=16, n_layers=2, n_heads=2)
KINDS = pytest.mark.parametrize("kind", ["dt", "reinformer"])
CONTEXTS = pytest.mark.parametrize("context", [1, 5])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """One thread, and a folder of its own for what a run drops into the current one."""
    torch.set_num_threads(1)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def toy_args(**changes):
    """The learning rates are high, so that a few updates leave a mark on every weight."""
    toy = dict(env_id="Hopper-v5", iterations=2, n_trajectories=2, replay_size=4, n_sources=3, n_points=2, gamma=0.9)
    toy |= dict(group_size=4, buffer_size=40, delta_r=0.0, g_online=3.0, c_online=1, n_batch=8, epsilon=0.2, lr=1e-2)
    toy |= dict(kappa_initial=0.1, critic_warmup=6, critic_updates=5, critic_batch=16, critic_dim=8, critic_norm=False)
    toy |= dict(lr_critic=1e-2, policy_delay=2, tau=0.1, reward_divisor=1.0, dataset="random", dataset_steps=200)
    toy |= dict(eval_episodes=1, eval_every=1, device="cpu", threads=1, embed_dim=16, reference_every=3)
    return Args(**(toy | changes))


def refused(match):
    """The block ends with `error: ...` on one line, which Python prints on stderr with exit code 1."""
    return pytest.raises(SystemExit, match=rf"\Aerror: [^\n]*{match}[^\n]*\Z")


def draw_model(obs_dim=11, act_dim=3, kind="dt", seed=0, **sizes):
    """A network that heeds all its inputs, returns at their own size, and whose actions are much at random."""
    torch.manual_seed(seed)
    model = DecisionTransformer(obs_dim, act_dim, **(SIZES | sizes), kind=kind).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for head in (model.mean_head, model.log_std_head):
        head.weight.data *= 0.3
    model.log_std_head.bias.data += 0.3
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

# environment, kind: n_batch, c_online, g_online, epsilon of Table 6, trajectories of Appendix B.1; gamma, divisor
TABLE = """
Hopper-v5           medium   256  1   7200  0.2  1  0.99     1
Hopper-v5           random   256  1   7200  0.2  1  0.99     1
Walker2d-v4         medium   256  1  10000  0.3  1  0.99     1
Walker2d-v4         random   256  1  10000  0.3  1  0.99     1
Ant-v4              medium   256  1  12000  0.3  1  0.99     1
Ant-v5              random   256  1  12000  0.3  1  0.99     1
AdroitHandDoor-v1   cloned   512  1   3000  0.3  5  0.99   100
AdroitHandDoor-v1   human    512  1   3000  0.3  5  0.99   100
AdroitHandPen-v1    cloned   512  1   6000  0.3  5  0.99   100
AdroitHandPen-v1    human    512  1   6000  0.3  5  0.99   100
AdroitHandHammer-v1 cloned   512  5   4000  0.3  5  0.99  1000
AdroitHandHammer-v1 human    512  5   4000  0.3  5  0.99  1000
AntMaze_UMaze-v4    umaze    256  1      2  0.2  1  0.998    1
AntMaze_UMaze-v4    diverse  256  5      2  0.2  1  0.998    1
"""
PRINTED = [line.split() for line in TABLE.strip().splitlines()]
NAMES = ["n_batch", "c_online", "g_online", "epsilon", "n_trajectories", "gamma", "reward_divisor"]


@pytest.mark.parametrize("env_id, kind, numbers", [(e, k, n) for e, k, *n in PRINTED], ids=lambda v: str(v)[:20])
def test_rows_are_table_6_and_the_critic_is_that_of_the_family(env_id, kind, numbers):
    args = Args(env_id=env_id)
    line = fill_from_table(args, kind, 100.0)
    assert {name: float(getattr(args, name)) for name in NAMES} == dict(zip(NAMES, map(float, numbers)))
    assert (args.lr, args.kappa_initial, args.delta_r) == (1e-5, 1e-2, 0.0)
    critic = (args.critic_dim, args.critic_norm, args.lr_critic, args.policy_delay)
    locomotion = env_id[:3] in ("Hop", "Wal", "Ant") and "Maze" not in env_id
    assert critic == ((256, False, 1e-3, 2) if locomotion else (512, True, 2e-4, 1))
    assert args.g_eval == args.g_online and f"{kind} data" in line and len(PRINTED) == len(ROWS)


def test_medium_replay_takes_mediums_row_and_a_task_outside_the_table_hoppers():
    args = Args(env_id="Ant-v5")
    assert "row Ant medium (medium-replay data)" in fill_from_table(args, "medium-replay", 0.0)
    args = Args(env_id="Pendulum-v1")
    assert "no row for Pendulum-v1" in fill_from_table(args, "random", -400.0)
    assert (args.g_online, args.critic_dim, args.critic_norm) == (0.0, 256, False)


def test_defaults_are_those_of_the_issue():
    args = Args()
    assert (args.n_sources, args.n_points, args.group_size, args.replay_size, args.buffer_size) == (16, 4, 8, 32, 2048)
    assert (args.critic_warmup, args.critic_updates, args.critic_batch, args.n_minibatches) == (10_000, 300, 256, 8)
    assert (args.tau, args.target_noise, args.target_noise_clip, args.eval_every) == (0.005, 0.2, 0.5, 10)


def test_the_script_needs_no_simulator():
    nodes = ast.walk(ast.parse(Path(q_guided.__file__).read_text()))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert "gymnasium" in imported and not [name for name in imported if "mujoco" in name]
    assert not hasattr(q_guided, "take_snapshot") and not hasattr(q_guided, "SimulatorPool")


# ---------------------------------------------------------------------------------------------------------------------
# Critic
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_the_batched_pass_is_that_of_two_networks(norm):
    model = draw_model(3, 2)
    model.obs_mean[:], model.obs_std[:] = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.1, 3.0])
    critic, observations, actions = TwinCritic(model, 8, norm), torch.randn(7, 3) * 3, torch.rand(7, 2) * 2 - 1
    q = critic(observations, actions)
    assert q.shape == (2, 7) and (q[0] - q[1]).abs().max() > 0.01
    for i in range(2):
        layers = [torch.nn.Linear(*weight.shape[1:]) for weight in critic.weights]
        for layer, weight, bias in zip(layers, critic.weights, critic.biases):
            layer.weight[:], layer.bias[:] = weight[i].T, bias[i, 0]
        h = torch.cat([(observations - model.obs_mean) / model.obs_std, actions], dim=-1)
        for layer in layers[:-1]:
            h = layer(h)
            if norm:
                h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            h = h * torch.sigmoid(h)
        torch.testing.assert_close(q[i], layers[-1](h)[:, 0], rtol=1e-4, atol=1e-5)


def test_the_two_critics_begin_like_layers_of_pytorch_and_apart():
    torch.manual_seed(0)
    critic = TwinCritic(draw_model(30, 6), 256, False)
    for weight, bias in zip(critic.weights, critic.biases):
        bound = weight.shape[1] ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound
        assert not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize("env_id, norm", [("Ant-v5", False), ("AdroitHandPen-v1", True), ("AntMaze_UMaze-v4", True)])
def test_layer_norm_is_off_in_locomotion_only(env_id, norm):
    args = Args(env_id=env_id)
    fill_from_table(args, "medium", 0.0)
    learner = QGuidedLearner(draw_model(), two_trajectories(), args)
    x = learner.critic(torch.randn(500, 11) * 100, torch.zeros(500, 3))
    assert learner.critic.norm is norm
    assert (x.std() < 2) == norm  # normed, the output does not grow with the observation


class Policy:
    """Acts on a window by tanh(mean) for sure; keeps what it was shown."""

    def __init__(self, mean=(0.3,), log_std=-math.inf):
        self.mean, self.log_std = torch.tensor(mean), log_std

    def act(self, observations, returns, actions, real):
        self.seen = [observations, returns, actions, real]
        mean = self.mean.expand(len(returns), -1)
        return SquashedGaussian(mean, torch.full_like(mean, self.log_std)), returns[:, -1]


class Critic:
    """Q1 = 2 s, Q2 = 3 s - 1: the first is the smaller for s > 1. Keeps the actions that it was asked for."""

    def __call__(self, observations, actions):
        self.actions = actions
        return torch.stack([2 * observations[:, 0], 3 * observations[:, 0] - 1])


def two_trajectories(context=1, last=None):
    """Of 2 steps, with a true end, and of 3, with a time limit. Observations 1, 2 and 3, 4, 5; rewards 10, 20, ..."""
    observations, rewards = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    returns, actions = np.array([100.0, 90.0, 200.0, 170.0, 130.0]), np.array([[0.1], [0.2], [0.3], [0.4], [0.5]])
    columns = np.repeat(observations[:, None], 11, 1)
    last = None if last is None else np.repeat(np.array(last)[:, None], 11, 1)
    return lay_out(
        context, np.array([2, 3]), columns, returns, np.repeat(actions, 3, 1), rewards, np.array([True, False]), last
    )


def test_trajectories_lie_between_padding_and_the_state_after_the_last_step():
    data = two_trajectories(3, last=[7.0, 8.0])
    assert data.observations[:, 0].tolist() == [0, 0, 1, 2, 7, 0, 0, 3, 4, 5, 8]
    assert data.returns.tolist() == [0, 0, 100, 90, 70, 0, 0, 200, 170, 130, 80]  # g' = g - r after the last step
    assert data.rewards.tolist() == [0, 0, 10, 20, 0, 0, 0, 30, 40, 50, 0]
    assert data.real.int().tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert data.terminated.int().tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert data.usable.int().tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0]
    torch.testing.assert_close(data.actions[:, 0], torch.tensor([0, 0, 0.1, 0.2, 0, 0, 0, 0.3, 0.4, 0.5, 0]))
    # what follows the time limit is not known: that step can't be learned from, the true end can
    assert two_trajectories(3).usable.int().tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0]


def target(data, index, **changes):
    args = toy_args(**(dict(gamma=0.5, target_noise=0.0) | changes))
    return td_target(data, torch.tensor(index), Policy(), Critic(), args).tolist()


def test_the_target_by_hand_at_a_true_end():
    data = two_trajectories(1, last=[7.0, 8.0])  # slots: 1, 2, 7 | 3, 4, 5, 8
    assert target(data, [1]) == [20.0]  # nothing comes after it, whatever Q says of the state


def test_the_target_by_hand_at_the_time_limit_counts_on_the_state_after_it():
    data = two_trajectories(1, last=[7.0, 8.0])
    assert target(data, [5]) == [50.0 + 0.5 * 16.0]  # min(2 * 8, 3 * 8 - 1)


def test_the_target_by_hand_within_a_trajectory():
    data = two_trajectories(1, last=[0.25, 8.0])
    assert target(data, [0, 3, 4]) == [10.0 + 0.5 * 4.0, 30.0 + 0.5 * 8.0, 40.0 + 0.5 * 10.0]
    data.observations[1] = 0.5  # here the second is the smaller: 3 * 0.5 - 1
    assert target(data, [0]) == [10.0 + 0.5 * 0.5]
    assert target(data, [0], reward_divisor=100.0) == pytest.approx([0.1 + 0.5 * 0.5])


def test_the_target_action_is_sampled_and_smoothed_by_clipped_noise():
    data, index = two_trajectories(1, last=[7.0, 8.0]), torch.zeros(20_000, dtype=torch.long)
    for policy, args, spread in [
        (Policy((0.3, -0.4)), toy_args(), 0.2),
        (Policy((0.3, -0.4)), toy_args(target_noise=1.0), None),
        (Policy((0.3, -0.4), math.log(0.1)), toy_args(target_noise=0.0), 0.1 * (1 - math.tanh(0.3) ** 2)),
    ]:
        torch.manual_seed(0)
        critic = Critic()
        td_target(data, index, policy, critic, args)
        off = critic.actions - torch.tanh(policy.mean)
        if spread is None:  # noise of 1 lies mostly on the bounds
            assert off.abs().max().item() == pytest.approx(0.5) and (off.abs() > 0.4999).float().mean() > 0.6
        else:
            assert off[:, 0].std().item() == pytest.approx(spread, rel=0.03)
            assert off.mean().abs() < 0.01 and off.abs().max() <= 0.5 + 1e-6
    td_target(data, index, Policy((9.0,)), critic, toy_args())
    assert critic.actions.max().item() == np.float32(ACTION_LIMIT) and critic.actions.min() >= 0.5 - 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def write_data(path, lengths, timeouts, seed=0, **arrays):
    """An HDF5 file for Hopper of trajectories of these lengths; the last bool of each says whether a time-out ended it,
    None: not ended at all."""
    rng, total = np.random.default_rng(seed), sum(lengths)
    data = dict(observations=rng.normal(size=(total, 11)), actions=rng.uniform(-0.9, 0.9, size=(total, 3)))
    data |= dict(rewards=rng.normal(size=total), terminals=np.zeros(total, bool), timeouts=np.zeros(total, bool))
    for end, timeout in zip(np.cumsum(lengths) - 1, timeouts):
        if timeout is not None:
            data["timeouts" if timeout else "terminals"][end] = True
    with h5py.File(path, "w") as file:
        for name, array in (data | arrays).items():
            file[name] = array
    return data | arrays


def test_offline_data_are_read_as_transitions(tmp_path):
    raw, path = write_data(tmp_path / "d.hdf5", [4, 3, 5, 2], [True, False, True, None]), tmp_path / "d.hdf5"
    args = toy_args(dataset=str(path), c_online=3)
    data, _ = load_offline(args, {}, make_env("Hopper-v5"))
    steps, at = data.usable.nonzero()[:, 0], [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]  # the last of both time-outs left out
    np.testing.assert_allclose(data.observations[steps], raw["observations"][at], rtol=1e-6)
    assert data.terminated[steps].int().tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    ends = [4, 4, 4, 7, 7, 7, 12, 12, 12, 12]
    realised = [raw["rewards"][h:end].sum() for h, end in zip(at, ends)]
    np.testing.assert_allclose(data.returns[steps], realised, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.rewards[steps], raw["rewards"][at], rtol=1e-6)


def test_offline_actions_are_scaled_from_the_bounds_of_the_environment(tmp_path):
    rng, count = np.random.default_rng(0), 6
    arrays = dict(observations=rng.normal(size=(count, 3)), actions=np.linspace(-2.0, 1.5, count)[:, None])  # in +-2
    write_data(tmp_path / "d.hdf5", [count], [False], **arrays)
    args = toy_args(env_id="Pendulum-v1", dataset=str(tmp_path / "d.hdf5"))
    data, _ = load_offline(args, {}, make_env("Pendulum-v1"))
    expected = np.linspace(-1.0, 0.75, count).clip(-ACTION_LIMIT, ACTION_LIMIT)
    np.testing.assert_allclose(data.actions[data.usable][:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("context", [1, 3])
def test_for_offline_steps_the_target_policy_sees_the_realised_return(context, tmp_path):
    raw = write_data(tmp_path / "d.hdf5", [4, 3], [True, False])
    args = toy_args(dataset=str(tmp_path / "d.hdf5"), c_online=context)
    data, policy = load_offline(args, {}, make_env("Hopper-v5"))[0], Policy((0.0, 0.0, 0.0))
    td_target(data, data.usable.nonzero()[:, 0], policy, Critic(), args)
    observations, returns, actions, real = policy.seen
    for row, (h, start, end) in enumerate([(0, 0, 4), (1, 0, 4), (2, 0, 4), (4, 4, 7), (5, 4, 7)]):
        window = [j for j in range(h + 2 - context, h + 2) if j >= start]  # ends with the state after step h
        assert real[row].tolist() == [False] * (context - len(window)) + [True] * len(window)
        kept = slice(context - len(window), None)
        np.testing.assert_allclose(observations[row, kept], raw["observations"][window], rtol=1e-6)
        realised = [raw["rewards"][j:end].sum() for j in window]
        np.testing.assert_allclose(returns[row, kept], realised, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(actions[row, kept], raw["actions"][window[:-1]], rtol=1e-5)


@pytest.mark.parametrize("kind, context", [("dt", 1), ("dt", 3), ("reinformer", 3)])
def test_for_online_steps_the_target_policy_sees_the_stored_return(kind, context):
    learner, policy = filled_learner(kind, c_online=context), Policy((0.0, 0.0, 0.0))
    data = learner.transitions
    steps = data.usable.nonzero()[:, 0]
    steps = steps[steps >= learner.n_offline]
    assert len(steps) == sum(len(episode.rewards) for episode in learner.replay)
    td_target(data, steps, policy, Critic(), learner.args)
    observations, returns, actions, real = policy.seen
    row = 0
    for episode in learner.replay:
        g = np.append(episode.returns, episode.returns[-1] - episode.rewards[-1])
        seen = np.concatenate([episode.observations, episode.last_observation[None]])
        for h in range(len(episode.rewards)):
            window = slice(h + 1, h + 1 + context)  # of the slots behind the padding
            np.testing.assert_allclose(returns[row], g[window], rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(observations[row], seen[window], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(actions[row], episode.actions[window][: context - 1])
            assert real[row].tolist() == [*episode.real, True][window]
            assert data.rewards[steps[row]].item() == pytest.approx(episode.rewards[h], rel=1e-5)
            last = h == len(episode.rewards) - 1
            assert data.terminated[steps[row]].item() == (last and bool(episode.terminated))
            row += 1
    realised = episode.rewards[::-1].cumsum()[::-1]
    assert np.abs(realised[1:] - g[context:-1]).max() > 0.5  # which is another return than the realised one


def test_in_antmaze_data_the_goal_ends_a_trajectory(monkeypatch):
    rewards = np.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    ends = np.array([0, 0, 0, 0, 1, 0, 0, 1], bool)
    raw = q_guided.RawData(np.zeros((8, 31)), np.zeros((8, 8)), rewards, np.zeros(8, bool), ends)
    monkeypatch.setattr(q_guided, "read_hdf5", lambda path: raw)
    args = toy_args(env_id="AntMaze_UMaze-v4", dataset="maze.hdf5")
    data, _ = load_offline(args, {}, make_env("AntMaze_UMaze-v4"))
    assert data.rewards.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert data.terminated.int().tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert data.usable.int().tolist() == [1, 1, 1, 0, 1, 1, 0, 0]


def test_what_is_rolled_out_stays_for_the_critic_and_leaves_the_replay():
    learner = filled_learner(replay_size=3)
    first, before = list(learner.replay), learner.transitions
    episodes = collected(learner.model, learner.args, 2)
    learner.remember(episodes)
    assert [one is other for one, other in zip(learner.replay, [first[-1], *episodes])] == [True] * 3
    count = sum(len(episode.rewards) for episode in episodes)
    assert learner.transitions.usable.sum() == before.usable.sum() + count
    assert all(torch.equal(new[: len(old)], old) for new, old in zip(learner.transitions, before))


# ---------------------------------------------------------------------------------------------------------------------
# The critic's updates
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def envs_of(env_id):
    return [make_env(env_id) for _ in range(4)]


def collected(model, args, iteration):
    return collect_episodes(rollout_copy(model), envs_of(args.env_id)[: args.n_trajectories], args, iteration)[0]


def filled_learner(kind="dt", dtype=torch.float32, width=16, **changes):
    """A learner that remembers the episodes of one iteration and whose offline data are two short trajectories."""
    args = toy_args(**changes)
    args.g_eval = args.g_online
    model = draw_model(11, 3, kind, embed_dim=width).use_precision(dtype)
    learner = QGuidedLearner(model, two_trajectories(args.c_online), args)
    learner.remember(collected(model, args, 1))
    return learner


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_polyak_moves_by_tau():
    target, source = draw_model(seed=1), draw_model(seed=2)
    expected = 0.75 * weights(target) + 0.25 * weights(source)
    polyak(target, source, 0.25)
    torch.testing.assert_close(weights(target), expected)


@pytest.mark.parametrize("delay", [1, 3])
def test_targets_move_at_every_so_many_updates_of_the_critic(delay):
    learner, index = filled_learner(policy_delay=delay), torch.tensor([0, 1, 3])
    for parameter in learner.model.parameters():
        parameter.data += 0.1  # as if the policy had learned
    policy = weights(learner.model)
    for update in range(1, 7):
        before = weights(learner.target_critic), weights(learner.target_policy)
        learner.update_critic(index)
        after = weights(learner.target_critic), weights(learner.target_policy)
        if update % delay:
            assert all(map(torch.equal, before, after))
        else:
            torch.testing.assert_close(after[0], 0.9 * before[0] + 0.1 * weights(learner.critic))
            torch.testing.assert_close(after[1], 0.9 * before[1] + 0.1 * policy)
    assert torch.equal(weights(learner.model), policy)  # the critic's updates leave the policy alone


def test_the_loss_is_the_sum_of_both_squared_errors():
    learner, index = filled_learner(), torch.tensor([0, 1, 3, 3])
    torch.manual_seed(4)
    y = td_target(learner.transitions, index, learner.target_policy, learner.target_critic, learner.args)
    q = learner.critic(learner.transitions.observations[index], learner.transitions.actions[index])
    torch.manual_seed(4)
    loss, q_mean, q_gap, target_mean = learner.update_critic(index).tolist()
    expected = F.mse_loss(q[0], y) + F.mse_loss(q[1], y)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert (q_mean, target_mean) == pytest.approx((q.mean().item(), y.mean().item()), rel=1e-5)
    assert q_gap == pytest.approx((q[0] - q[1]).abs().mean().item(), rel=1e-5)


def random_states(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 11)), rng.uniform(-0.9, 0.9, size=(count, 3))


def trained_critic(data, updates, **changes):
    settings = dict(critic_batch=64, critic_dim=32, lr_critic=1e-2, policy_delay=1, gamma=0.5) | changes
    learner = QGuidedLearner(draw_model(n_layers=1), data, toy_args(**settings))
    return learner, learner.train_critic(0, updates)


def test_where_every_step_ends_the_episode_q_is_the_reward():
    observations, actions = random_states(2000)
    reward = actions[:, 0] * observations[:, 0] + observations[:, 1]
    ones, ended = np.ones(2000, int), np.ones(2000, bool)
    learner, row = trained_critic(lay_out(1, ones, observations, 0 * reward, actions, reward, ended), 300)
    observations, actions = random_states(500, seed=1)  # not seen in training
    q = learner.critic(torch.from_numpy(observations).float(), torch.from_numpy(actions).float())
    reward = torch.from_numpy(actions[:, 0] * observations[:, 0] + observations[:, 1]).float()
    assert ((q - reward) ** 2).mean() < 0.02 * reward.var()
    assert row["losses/q_mean"] == pytest.approx(row["losses/target_mean"], abs=0.05)


def test_along_a_chain_q_is_the_discounted_sum_and_a_time_limit_cuts_nothing():
    """Trajectories of two steps, rewards 1 and 2. With a true end Q is 1 + 0.5 * 2 and 2. If a time limit ends them and
    leads back to the first state, Q0 = 1 + 0.5 Q1 and Q1 = 2 + 0.5 Q0: 8/3 and 10/3."""
    states, actions = np.tile(np.eye(11)[:2], (300, 1)), random_states(600)[1]
    rewards, lengths = np.tile([1.0, 2.0], 300), np.full(300, 2)
    for ended, expected in ((True, [2.0, 2.0]), (False, [8 / 3, 10 / 3])):
        last = np.tile(states[0], (300, 1))
        data = lay_out(1, lengths, states, 0 * rewards, actions, rewards, np.full(300, ended), last)
        learner, _ = trained_critic(data, 150, tau=0.3)
        q = learner.critic(torch.eye(11)[:2], torch.zeros(2, 3))
        torch.testing.assert_close(q, torch.tensor([expected, expected]), atol=0.05, rtol=0)


def test_transitions_are_drawn_uniformly_from_offline_and_online_alike(monkeypatch):
    learner, drawn = filled_learner(critic_batch=50), []
    monkeypatch.setattr(learner, "update_critic", lambda index: drawn.append(index) or torch.ones(4))
    learner.train_critic(1, 100)
    usable = learner.transitions.usable.nonzero()[:, 0]
    found, counts = torch.cat(drawn).unique(return_counts=True)
    assert torch.equal(found, usable) and (usable < learner.n_offline).sum() == 4
    mean = 5000 / len(usable)
    assert ((counts - mean) ** 2 / mean).sum() < len(usable) + 4 * math.sqrt(2 * len(usable))  # chi squared


def test_progress_lines_tell_of_the_warm_up(capsys):
    filled_learner().train_critic(0, 5, show_every=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert all(
        re.search(r"critic_loss [\d.]+  q_mean \S+  q_gap \S+  target_mean \S+  .* updates/s", line) for line in lines
    )


def test_without_a_warm_up_the_critic_begins_as_it_is():
    learner = filled_learner(critic_warmup=0)
    before = weights(learner.critic)
    assert learner.train_critic(0, 0)["losses/critic_loss"] == 0.0
    assert torch.equal(weights(learner.critic), before)


def test_a_critic_that_is_not_finite_ends_the_run_in_a_line():
    learner = filled_learner()
    learner.transitions.rewards[:] = math.nan
    with refused("the critic is not finite in iteration 3"):
        learner.train_critic(3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Points and candidates
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, context", [("dt", 1), ("dt", 3), ("reinformer", 3)])
@torch.no_grad()
def test_the_variance_of_a_step_is_that_of_its_window(kind, context):
    learner = filled_learner(kind, c_online=context)
    episode = learner.replay[0]
    seen = [windows(torch.from_numpy(field)[None], context) for field in episode[:4]]
    variances = action_variances(learner.model, seen)
    assert variances.shape == episode.rewards.shape
    for h in range(0, len(variances), 3):
        first = max(0, h + 1 - context) + context - 1  # without the padding
        parts = [torch.from_numpy(field[first : h + context])[None] for field in episode[:3]]
        dist, _ = learner.model.act(parts[0], parts[1], parts[2][:, :-1])
        assert variances[h] == pytest.approx((dist.log_std.exp() ** 2).mean().item(), rel=1e-4)


@CONTEXTS
def test_points_are_windows_of_trajectories_drawn_by_length_at_uncertain_steps(context, monkeypatch):
    learner = filled_learner(c_online=context, n_sources=600, n_points=3)
    learner.replay[0] = learner.replay[0]._replace(**shortened(learner.replay[0], 9, context))

    def variances(policy, seen):  # the fourth step of each by far, the others all alike
        return np.where(np.arange(len(seen[0])) == 3, 50.0, 0.0)

    monkeypatch.setattr(q_guided, "action_variances", variances)
    chosen = choose_states(learner.model, learner.replay, learner.args, 1)
    assert [tuple(each.shape) for each in chosen] == [(1800, context, *rest) for rest in ((11,), (), (3,), ())]
    known = {}
    for number, episode in enumerate(learner.replay):
        for h in range(len(episode.rewards)):
            known[episode.observations[h : h + context].tobytes()] = (number, h)
    found = np.array([known[window.numpy().tobytes()] for window in chosen[0]]).reshape(600, 3, 2)
    assert (found[:, :, 0] == found[:, :1, 0]).all() and (found[:, 0, 1] == 3).all()
    assert all(len(set(points)) == 3 for points in found[:, :, 1].tolist())  # without replacement
    lengths = np.array([len(episode.rewards) for episode in learner.replay])
    share = (found[:, 0, 0] == 0).mean()
    assert share == pytest.approx(lengths[0] / lengths.sum(), abs=0.08)
    second = np.unique(found[found[:, 0, 0] == 1][:, 1:, 1])
    assert set(second) == set(range(lengths[1])) - {3}  # the others by chance
    episode, h = learner.replay[found[7, 1, 0]], found[7, 1, 1]
    for field, recorded in zip(chosen, episode[:4]):
        np.testing.assert_array_equal(field[7 * 3 + 1], recorded[h : h + context])


def shortened(episode, steps, context):
    front = {name: getattr(episode, name)[: context - 1 + steps] for name in episode._fields[:4]}
    return front | {"u": episode.u[:steps], "rewards": episode.rewards[:steps]}


def test_a_trajectory_shorter_than_its_points_repeats_them():
    learner = filled_learner(n_sources=4, n_points=5)
    learner.replay = [learner.replay[0]._replace(**shortened(learner.replay[0], 2, 1))]
    observations = choose_states(learner.model, learner.replay, learner.args, 1)[0]
    assert len(observations) == 20 and len({window.numpy().tobytes() for window in observations}) == 2


@pytest.mark.parametrize("kind, context", [("dt", 1), ("dt", 3), ("reinformer", 3)])
@torch.no_grad()
def test_candidates_are_groups_of_the_policys_actions_scored_by_the_smaller_q(kind, context):
    learner = filled_learner(kind, c_online=context, group_size=300, n_sources=2, reward_divisor=10.0)
    for parameter in learner.model.parameters():  # another policy than that of the rollout
        parameter += 0.02 * torch.randn_like(parameter)
    states = choose_states(learner.model, learner.replay, learner.args, 1)
    new, scores = sample_candidates(learner.model, learner.critic, states, learner.args, 1)
    assert new.u.shape == (4 * 300, 1, 3) and scores.shape == (1200,)
    for point in range(4):
        group = slice(300 * point, 300 * point + 300)
        for field, state in zip(new[:1] + new[2:4], states[:1] + states[2:]):
            assert (field[group] == state[point]).all()
        dist, used = learner.model.act(*(each[[point]] for each in (*states[:2], states[2][:, :-1], states[3])))
        torch.testing.assert_close(new.returns[group, -1], used.expand(300))  # reinformer: predicted by this policy
        assert torch.equal(new.returns[group, :-1], states[1][[point], :-1].expand(300, -1))
        z = (new.u[group, 0] - dist.mean) / dist.log_std.exp()
        assert z.mean(0).abs().max() < 0.25 and (z.std(0) - 1).abs().max() < 0.2
        q = learner.critic(new.observations[group, -1], squash(new.u[group, 0]))
        np.testing.assert_allclose(scores[group], 10.0 * q.min(0).values, rtol=1e-4, atol=1e-4)
        assert ((q[0] < q[1]).any() and (q[0] > q[1]).any()) or (q[0] - q[1]).abs().min() > 0


def test_candidates_hang_on_seed_and_iteration():
    learner = filled_learner()
    states = choose_states(learner.model, learner.replay, learner.args, 1)

    def drawn(iteration, **changes):
        args = toy_args(**changes)
        return sample_candidates(learner.model, learner.critic, states, args, iteration)[0].u

    assert torch.equal(drawn(1), drawn(1))
    assert (drawn(1) != drawn(2)).all() and (drawn(1) != drawn(1, seed=2)).all()


def known_scores(learner, scores):
    """The learner's critic says `scores` for one half of the candidates by Q1, for the others by Q2."""
    scores = torch.tensor(scores)
    other = scores + torch.rand(len(scores))
    swap = torch.arange(len(scores)) % 2 == 0
    learner.critic = lambda observations, actions: torch.stack(
        [torch.where(swap, scores, other), torch.where(swap, other, scores)]
    )


def test_advantages_are_relative_to_the_group():
    learner = filled_learner(n_sources=3, n_points=1)
    known_scores(learner, [1.0, 2.0, 3.0, 4.0, 40.0, 10.0, 30.0, 20.0, 5.0, 5.0, 5.0, 5.0])
    row, a = learner.add_candidates(1), 1 / math.sqrt(1.25)
    hand = [-1.5 * a, -0.5 * a, 0.5 * a, 1.5 * a, 1.5 * a, -1.5 * a, 0.5 * a, -0.5 * a]  # the third has no spread
    np.testing.assert_allclose(learner.buffer.advantage[:, 0], hand, rtol=1e-5)
    assert row["rollout/kept"] == pytest.approx(8 / 12) and row["rollout/candidate_q"] == pytest.approx(130 / 12)
    assert row["rollout/group_std"] == pytest.approx(11 * math.sqrt(1.25) / 3)


def test_members_within_delta_r_leave_and_nothing_kept_is_said(capsys):
    learner = filled_learner(n_sources=1, n_points=1, delta_r=1.0)
    known_scores(learner, [0.0, 2.0, 2.5, 3.5])
    learner.add_candidates(1)
    np.testing.assert_allclose(learner.buffer.advantage[:, 0], np.array([-2.0, 1.5]) / math.sqrt(6.5 / 4), rtol=1e-5)
    learner = filled_learner(n_sources=1, n_points=1)
    known_scores(learner, [2.0] * 4)
    assert learner.add_candidates(1)["rollout/kept"] == 0.0 and learner.update(1) == {}
    assert "nothing kept" in capsys.readouterr().out and learner.updates == 0


def test_scores_that_differ_by_rounding_alone_are_no_group_with_spread():
    """Around 123 a float32 is 7.6e-6 from the next one."""
    learner, up = filled_learner(n_sources=2, n_points=1), float(np.nextafter(np.float32(123), np.float32(200)))
    known_scores(learner, [123.0, 123.0, up, 123.0, 123.0, 124.0, 123.0, 124.0])
    assert learner.add_candidates(1)["rollout/kept"] == 0.5
    np.testing.assert_allclose(learner.buffer.advantage[:, 0], [-1.0, 1.0, -1.0, 1.0], rtol=1e-5)


def test_the_buffer_keeps_the_last_candidates():
    learner = filled_learner(n_sources=3, n_points=2, buffer_size=30)
    learner.add_candidates(1)
    first = learner.buffer
    assert len(first.u) == 24
    learner.add_candidates(2)
    assert len(learner.buffer.u) == 30
    assert all(torch.equal(now[:6], before[18:]) for now, before in zip(learner.buffer, first))


# ---------------------------------------------------------------------------------------------------------------------
# Ratio, loss and update
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_candidates(model, rows=12, context=2, seed=0):
    """Random candidates, some at an episode's first step; `model` is the policy that drew them."""
    torch.manual_seed(seed)
    obs_dim, act_dim = model.sizes["obs_dim"], model.act_dim
    real = torch.ones(rows, context, dtype=torch.bool)
    real[::2, : context - 1] = False
    fields = torch.randn(rows, context, obs_dim), 3 * torch.randn(rows, context)
    actions, noise = torch.rand(rows, context, act_dim) * 1.9 - 0.95, torch.randn(rows, 1, act_dim)
    sub = Candidates(*fields, actions, real, noise, torch.zeros(rows, 1), torch.randn(rows, 1))
    sub = sub._replace(u=distribution(model, sub, sub.returns).sample(noise))
    return sub._replace(old_log_prob=distribution(model, sub, sub.returns).log_prob(sub.u))


def laws(model, sub):
    """Normal laws before tanh of each row, one window at a time without its padding."""
    found = []
    for i in range(len(sub.u)):
        seen = sub.real[i].nonzero()[:, 0]
        window = (sub.observations[i, seen], sub.returns[i, seen], sub.actions[i, seen[:-1]])
        dist, _ = model(*(part[None] for part in window))
        found.append(Normal(dist.mean[0, -1].double(), dist.log_std[0, -1].double().exp()))
    return found


@KINDS
@torch.no_grad()
def test_loss_equals_equation_3_written_out(kind):
    old, model, reference = draw_model(4, 2, kind), draw_model(4, 2, kind), draw_model(4, 2, kind, seed=2)
    for parameter in model.parameters():
        parameter.data += 0.003 * torch.randn_like(parameter)
    args, kappa, sub = toy_args(beta=0.3, epsilon=0.1), 0.7, draw_candidates(old, rows=18)
    torch.manual_seed(5)
    noise = torch.randn(sub.u.shape)
    surrogates, kls, entropies, ratios = [], [], [], []
    for i, (law, before, anchor) in enumerate(zip(laws(model, sub), laws(old, sub), laws(reference, sub))):
        u, advantage = sub.u[i, 0].double(), sub.advantage[i].item()
        ratio = math.exp((law.log_prob(u) - before.log_prob(u)).sum())  # the slope of tanh is in both
        ratios.append(ratio)
        surrogates.append(min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage))
        kls.append(kl_divergence(law, anchor).sum().item())
        z = law.mean + law.stddev * noise[i, 0].double()
        entropies.append(-(law.log_prob(z) - torch.log1p(-(torch.tanh(z) ** 2))).sum().item())
    torch.manual_seed(5)
    loss, values = q_guided_loss(model, reference, sub, torch.tensor(kappa), args)
    means = {"surrogate": surrogates, "kl": kls, "entropy": entropies, "ratio_mean": ratios}
    for name, each in means.items():
        assert values[name].item() == pytest.approx(np.mean(each), rel=1e-4, abs=1e-5), name
    assert values["clip_fraction"].item() == pytest.approx(np.mean([abs(ratio - 1) > 0.1 for ratio in ratios]))
    assert 0 < values["clip_fraction"] < 1 and values["ratio_max"].item() == pytest.approx(max(ratios), rel=1e-4)
    expected = -(np.mean(surrogates) - 0.3 * np.mean(kls) + kappa * np.mean(entropies))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("shift, moves", [(0.5, False), (-0.5, True), (0.05, True)])
def test_there_is_no_gradient_where_the_clipped_branch_is_the_smaller(shift, moves):
    """Of two candidates with opposite advantages, both ratios above, below or inside the range: e^shift."""
    model, args = draw_model(4, 2), toy_args(beta=0.0)
    sub, sign = draw_candidates(model, rows=2, context=1), torch.tensor([[1.0], [-1.0]])
    sub = sub._replace(advantage=sign, old_log_prob=sub.old_log_prob - shift * sign)
    loss, _ = q_guided_loss(model, model, sub, torch.tensor(0.0), args)
    loss.backward()
    steepest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert steepest > 1e-3 if moves else steepest < 1e-12
    up, down = math.exp(shift), math.exp(-shift)
    assert loss.item() == pytest.approx(-0.5 * (min(up, 1.2) - max(down, 0.8)), abs=1e-5)


@torch.no_grad()
def ratios(learner):
    sub = learner.buffer
    return (distribution(learner.model, sub, sub.returns).log_prob(sub.u) - sub.old_log_prob).exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CONTEXTS
@KINDS
def test_ratio_is_1_before_the_first_update(kind, context, dtype):
    if dtype == torch.bfloat16 and q_guided.set_up_torch(toy_args())[1] != dtype:
        pytest.skip("no bf16 units")
    learner = filled_learner(kind, dtype, width=64, c_online=context, n_sources=6, n_batch=20, buffer_size=100)
    learner.add_candidates(1)
    assert (ratios(learner) - 1).abs().max() <= 1e-4
    assert learner.update(1)["losses/ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert (ratios(learner) - 1).abs().max() > 1e-3


def test_updates_make_good_candidates_likelier_and_leave_the_critic_alone():
    learner = filled_learner(n_sources=6, beta=0.0, kappa_initial=1e-6, lr=1e-3, n_batch=48, buffer_size=48)
    learner.add_candidates(1)
    critic, target = weights(learner.critic), weights(learner.target_policy)
    learner.update(1)
    gain = (ratios(learner).log() * learner.buffer.advantage).mean()
    assert gain > 1e-3
    assert torch.equal(weights(learner.critic), critic) and torch.equal(weights(learner.target_policy), target)


def test_kappa_rises_while_the_entropy_is_below_minus_the_dimension_of_the_action():
    for bias, direction in ((-9.0, 1), (0.3, -1)):
        learner = filled_learner(kappa_lr=0.01, n_minibatches=1)
        learner.model.log_std_head.weight.data[:] = 0.0
        learner.model.log_std_head.bias.data[:] = bias
        learner.add_candidates(1)
        row = learner.update(1)
        assert (row["losses/entropy"] < -3) == (direction == 1)
        assert learner.log_kappa.item() == pytest.approx(math.log(0.1) + direction * 0.01, abs=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line():
    learner = filled_learner()
    learner.add_candidates(1)
    learner.buffer.advantage[:] = math.nan
    with refused("the loss is not finite in iteration 3"):
        learner.update(3)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """pretrained(env_id, model): a checkpoint of pretrain_dt.py on a few random episodes, made once."""

    @functools.cache
    def make(env_id="Hopper-v5", model="dt", dataset="random"):
        torch.set_num_threads(1)
        steps = {"AntMaze_UMaze-v4": 800}.get(env_id, 300)
        toy = dict(dataset_steps=steps, batch_size=8, c_offline=5, updates=4, warmup=1, lr=1e-2, eval_episodes=1)
        run_dir = tmp_path_factory.mktemp("pretrained") / "run"
        toy |= dict(env_id=env_id, model=model, dataset=dataset, run_dir=str(run_dir), device="cpu", threads=1)
        return str(pretrain_dt.main(pretrain_dt.Args(**(toy | SIZES))) / "checkpoint.pt")

    return make


def table(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def learning_columns(run_dir):
    """metrics.csv as text, without the columns that measure time."""
    drop = {name for name in METRICS if name.startswith("time/")} | {"charts/SPS"}
    return [{name: value for name, value in row.items() if name not in drop} for row in table(run_dir)]


def flat(value, path=""):
    """{path: leaf} of nested dictionaries and lists, tensors as (dtype, bytes)."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value}


def assert_same_run(one, other):
    """The same bytes in the learning columns and in all that a checkpoint holds but for the folder's own name."""
    assert learning_columns(one) == learning_columns(other)
    ours, theirs = (flat(load_checkpoint(run_dir)) for run_dir in (one, other))
    assert [key for key in ours | theirs if ours.get(key) != theirs.get(key)] == ["/args/run_dir"]


def resume(run_dir, *flags):
    return main(parse_args(["--resume", str(run_dir), *map(str, flags)]))


@pytest.fixture(scope="session")
def whole(pretrained, tmp_path_factory):
    """The folder of a run of 4 iterations in one go, at a context of 3; not to be changed."""
    run_dir = str(tmp_path_factory.mktemp("whole") / "run")
    return main(toy_args(iterations=4, c_online=3, pretrained=pretrained(), run_dir=run_dir))


def test_a_run_writes_its_metrics_and_learns(whole, pretrained):
    rows = table(whole)
    assert list(rows[0]) == METRICS and [row["iteration"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0]["eval/return_mean"] != "" and rows[0]["rollout/return"] == ""
    assert all(value != "" and math.isfinite(float(value)) for row in rows[1:] for value in row.values())
    assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    counts = [3, 2, 2, 2]  # the first iteration rolls out as many as it draws
    for i, row in enumerate(rows[1:], 1):
        full = sum(count * float(each["rollout/length"]) for count, each in zip(counts, rows[1 : i + 1]))
        assert float(row["charts/env_steps"]) == float(row["charts/env_steps_full"]) == pytest.approx(full)
        assert int(row["charts/gradient_updates"]) == 8 * i and int(row["charts/critic_updates"]) == 6 + 5 * i
        assert int(row["charts/buffer"]) == min(24 * i, 40) and float(row["rollout/kept"]) == 1.0
        assert float(row["time/critic"]) < float(row["time/update"]) < float(row["time/iteration"])
    before, after = load_checkpoint(Path(pretrained()))["weights"], load_checkpoint(whole)["weights"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before) - {"obs_mean", "obs_std", "return_scale"}


def test_a_checkpoint_holds_what_was_rolled_out_but_not_the_offline_data(whole):
    content = load_checkpoint(whole)
    learner, steps = content["learner"], content["steps"]["full"]
    rewards, usable = learner["online"][4], learner["online"][6]
    assert usable.sum() == steps and len(rewards) == steps + 3 * (3 + 2 + 2 + 2)  # a context of 3: K slots each
    assert len(learner["replay"]) == 4 and len(learner["buffer"][0]) == 40
    assert learner["critic_steps"] == 6 + 4 * 5 and content["script"] == "q_guided_grpo_dt"


@pytest.mark.parametrize(
    "env_id, model, context",
    [("Pendulum-v1", "dt", 1), ("Hopper-v5", "reinformer", 3), ("AdroitHandHammer-v1", "dt", 5)],
)
def test_finetuning_runs_on_other_tasks_and_models(env_id, model, context, pretrained, tmp_path, capsys):
    flags = dict(env_id=env_id, iterations=1, pretrained=pretrained(env_id, model), run_dir=str(tmp_path / "run"))
    flags |= dict(c_online=None if context == 5 else context, gamma=None, critic_norm=None, reward_divisor=None)
    flags |= dict(dataset=None, dataset_steps=250, g_online=None, n_trajectories=1, n_sources=1)
    run_dir = main(toy_args(**flags))
    content, rows = load_checkpoint(run_dir), table(run_dir)
    assert (content["c_online"], content["sizes"]["kind"]) == (context, model)
    assert content["args"]["dataset"] == "random"  # what the checkpoint was pretrained on
    hammer = env_id == "AdroitHandHammer-v1"
    assert (content["args"]["critic_norm"], content["args"]["reward_divisor"]) == (hammer, 1000.0 if hammer else 1.0)
    assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    assert all(math.isfinite(float(rows[1][f"losses/{name}"])) for name in q_guided.CRITIC_LOSSES)
    assert (rows[1]["eval/normalized_score"] == "") == (env_id == "Pendulum-v1")
    printed = capsys.readouterr().out
    assert "iteration 1/1" in printed and f"checkpoint: {run_dir}" in printed and "critic 6/6" in printed


class Aim(gym.Env):
    """One action per episode: the reward is minus its squared distance from a mark that the observation tells."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = self.np_random.uniform(-0.5, 0.5, size=2).astype(np.float32)
        return self.seen, {}

    def step(self, action):
        return self.seen, -float((action[0] / 2 - self.seen[0]) ** 2), True, False, {}


def test_where_the_critic_can_be_exact_the_policy_learns_the_task(tmp_path):
    gym.register("Aim-v0", Aim, max_episode_steps=5)
    flags = dict(env_id="Aim-v0", dataset_steps=500, updates=4, c_offline=1, eval_episodes=1, threads=1, **SIZES)
    start = pretrain_dt.main(pretrain_dt.Args(**flags, run_dir=str(tmp_path / "start")))
    flags = dict(env_id="Aim-v0", pretrained=str(start), iterations=8, eval_every=8, eval_episodes=20, g_online=0.0)
    flags |= dict(n_sources=8, replay_size=8, n_points=1, group_size=8, n_batch=64, buffer_size=256, lr=1e-2)
    flags |= dict(critic_warmup=200, critic_updates=10, critic_batch=64, critic_dim=32, n_trajectories=8)
    first, *_, last = table(main(toy_args(**flags, dataset_steps=1000, run_dir=str(tmp_path / "run"))))
    before, after = float(first["eval/return_mean"]), float(last["eval/return_mean"])
    assert before < -0.05 and after > 0.3 * before, (before, after)
    assert float(last["losses/critic_loss"]) < 0.05


@pytest.mark.slow
def test_on_pendulum_the_return_rises(pretrained, tmp_path):
    flags = dict(env_id="Pendulum-v1", dataset_steps=4000, updates=100, batch_size=64, lr=3e-3, c_offline=1)
    flags |= dict(embed_dim=32, n_layers=2, n_heads=2, eval_episodes=1, threads=1, run_dir=str(tmp_path / "start"))
    start = pretrain_dt.main(pretrain_dt.Args(**flags))
    flags = dict(env_id="Pendulum-v1", pretrained=str(start), iterations=30, eval_every=30, eval_episodes=10, lr=3e-3)
    flags |= dict(n_minibatches=20, n_batch=128, buffer_size=512, dataset_steps=4000, gamma=0.95, threads=1)
    flags |= dict(critic_warmup=1000, critic_updates=200, critic_batch=128, critic_dim=64, tau=0.02)
    first, *_, last = table(main(Args(**flags, run_dir=str(tmp_path / "run"))))
    assert float(last["eval/return_mean"]) > float(first["eval/return_mean"]) + 500


def test_another_seed_gives_another_run(whole, pretrained, tmp_path):
    flags = dict(iterations=1, c_online=3, pretrained=pretrained(), run_dir=str(tmp_path / "other"), seed=2)
    other = main(toy_args(**flags))
    assert table(other)[1]["losses/loss"] != table(whole)[1]["losses/loss"]
    assert table(other)[1]["losses/critic_loss"] != table(whole)[1]["losses/critic_loss"]


def test_a_resumed_run_equals_one_that_never_stopped(whole, pretrained, tmp_path):
    """Which also says that the same seed gives the same run."""
    run_dir = main(toy_args(iterations=1, c_online=3, pretrained=pretrained(), run_dir=str(tmp_path / "split")))
    for iterations in (3, 4):
        resume(run_dir, "--iterations", iterations)
    assert_same_run(run_dir, whole)


def test_a_run_stopped_in_its_first_iteration_keeps_the_warmed_up_critic(whole, pretrained, tmp_path, monkeypatch):
    flags = dict(iterations=4, c_online=3, pretrained=pretrained(), run_dir=str(tmp_path / "run"))

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(q_guided, "collect_episodes", interrupt)
        main(toy_args(**flags))
    content = load_checkpoint(tmp_path / "run")
    assert (content["iteration"], content["learner"]["critic_steps"]) == (0, 6)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("script", [pretrain_dt, q_guided], ids=lambda script: script.__name__)
def test_evaluating_a_saved_run_scores_what_its_last_row_says(script, whole, capsys):
    before = sorted(whole.iterdir())
    script.eval_only(script.parse_args(["--eval-only", str(whole)]))
    printed = re.search(r"evaluation: return_mean ([-\d.,]+), ", capsys.readouterr().out)[1]
    assert printed == f"{float(table(whole)[-1]['eval/return_mean']):,.1f}"
    assert sorted(whole.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, match",
    [
        ({"env_id": "Walker2d-v5"}, "was pretrained in Hopper-v5, not in Walker2d-v5"),
        ({"group_size": 1}, "--group-size is 1: an advantage is relative to a group"),
        ({"critic_updates": 0}, "--critic-updates is 0: give one above 0"),
        ({"lr_critic": math.nan}, "--lr-critic is nan"),
        ({"tau": -0.1}, "--tau is -0.1"),
        ({"dataset": "nowhere.hdf5"}, "dataset nowhere.hdf5 not found"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_written(flags, match, pretrained, tmp_path):
    with refused(match):
        main(toy_args(pretrained=pretrained(), run_dir=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


def test_data_of_the_checkpoint_that_are_gone_are_to_be_named(pretrained, tmp_path):
    path = tmp_path / "gone.hdf5"
    write_data(path, [30, 20], [True, False])
    start = pretrained(dataset=str(path))
    path.unlink()
    with refused(r"gone.hdf5 not found.* say where it is by --dataset"):
        main(toy_args(pretrained=start, dataset=None, run_dir=str(tmp_path / "run")))
    with refused(r"other.hdf5 not found: give the path of an .hdf5 file, a Minari id, or random\.\Z"):
        main(toy_args(pretrained=start, dataset="other.hdf5", run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_data_of_another_environment_are_refused(pretrained, tmp_path):
    write_data(tmp_path / "d.hdf5", [30], [True], observations=np.zeros((30, 17)))
    with refused("has observations of 17 and actions of 3 dimensions, Hopper-v5 has 11 and 3"):
        main(toy_args(pretrained=pretrained(), dataset=str(tmp_path / "d.hdf5"), run_dir=str(tmp_path / "run")))


def test_resuming_refuses_data_that_changed(pretrained, tmp_path):
    path, flags = tmp_path / "d.hdf5", dict(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run"))
    write_data(path, [30, 20], [True, False])
    run_dir = main(toy_args(**flags, dataset=str(path)))
    write_data(path, [30, 20], [True, False], seed=1)
    with refused("the data in .* changed since"):
        resume(run_dir, "--iterations", 2)


@pytest.mark.parametrize("flag", ["--seed 3", "--critic-updates 9", "--dataset other.hdf5", "--tau 0.5"])
def test_resuming_refuses_changed_arguments(flag, whole):
    with refused(f"was made with {flag.split()[0]} "):
        parse_args(["--resume", str(whole), *flag.split()])


def test_resuming_in_another_precision_is_refused(pretrained, tmp_path):
    run_dir = main(toy_args(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run")))
    content = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    torch.save(content | {"precision": "torch.float16"}, run_dir / "checkpoint.pt")
    with refused("the run began in torch.float16, here it is torch"):
        resume(run_dir, "--iterations", 2)


def test_the_command_prints_one_line_on_stderr_and_exits_with_1(whole):
    command = [sys.executable, q_guided.__file__, "--resume", str(whole), "--seed", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]*--seed[^\n]*\n", done.stderr), done.stderr
