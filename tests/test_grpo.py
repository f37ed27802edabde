"""Groups, ratios, loss, reset points, rollouts and whole runs of grpo_dt_continuous.py at toy size."""

import csv
import functools
import math
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import grpo_dt_continuous as grpo
import pretrain_dt
from grpo_dt_continuous import (
    METRICS,
    ROWS,
    Args,
    DecisionTransformer,
    Groups,
    GRPOLearner,
    SubTrajectories,
    Trajectory,
    action_variance,
    choose_points,
    collect,
    distribution,
    fill_from_table,
    group_advantages,
    grpo_loss,
    importance_ratio,
    load_checkpoint,
    main,
    make_env,
    make_pool,
    parse_args,
    rollout_copy,
    rollout_groups,
    scale_action,
    simulator_of,
    squash,
    stream,
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
    """The learning rate is high, so that a few updates leave a mark on every weight."""
    toy = dict(env_id="Hopper-v5", iterations=2, n_sources=2, n_points=2, group_size=4, buffer_size=40, l_traj=4)
    toy |= dict(l_eval=8, gamma=0.9, delta_r=0.0, g_online=3.0, c_online=1, n_batch=8, epsilon=0.2, lr=1e-2)
    toy |= dict(kappa_initial=0.1, n_trajectories=1, eval_episodes=1, device="cpu", threads=1)
    toy |= dict(reference_every=3)  # the 8 updates of an iteration end between two references
    return Args(**(toy | dict(embed_dim=16) | changes))


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
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

# environment, kind: n_batch, c_online, g_online, L_traj, L_eval, gamma, epsilon, Delta_r, lr_policy, kappa_initial;
# then the full trajectories per iteration of Appendix B.1
TABLE_6 = """
Hopper-v5           medium  256  1   7200  15  400  0.995  0.2  2.0  5e-5  0.20  1
Hopper-v5           random  256  1   7200  15  400  0.995  0.2  2.0  5e-5  0.20  1
Walker2d-v4         medium  256  1  10000  15  400  0.995  0.3  2.0  5e-5  0.04  1
Walker2d-v4         random  256  1  10000  15  400  0.995  0.3  2.0  5e-5  0.20  1
Ant-v4              medium  256  1  12000  15  200  0.995  0.3  2.0  5e-5  0.04  1
Ant-v5              random  256  1  12000  15  200  0.995  0.3  2.0  5e-5  0.20  1
AdroitHandDoor-v1   cloned  512  1   3000  10  100  0.99   0.3  0.5  3e-5  0.10  5
AdroitHandDoor-v1   human   512  1   3000  10  100  0.99   0.3  0.4  3e-5  0.04  5
AdroitHandPen-v1    cloned  512  1   6000   3   30  0.99   0.3  0    3e-5  0.02  5
AdroitHandPen-v1    human   512  1   6000   3   30  0.99   0.3  0    3e-5  0.02  5
AdroitHandHammer-v1 cloned  512  5   4000  10  100  0.99   0.3  0    3e-5  0.05  5
AdroitHandHammer-v1 human   512  5   4000  10  100  0.99   0.3  0.8  3e-5  0.05  5
AntMaze_UMaze-v4    umaze   256  1      2  10  200  1.0    0.2  0    5e-5  0.05  1
AntMaze_UMaze-v4    diverse 256  5      2  10  200  1.0    0.2  0    5e-5  0.05  1
"""
PRINTED = [line.split() for line in TABLE_6.strip().splitlines()]
NAMES = [
    "n_batch",
    "c_online",
    "g_online",
    "l_traj",
    "l_eval",
    "gamma",
    "epsilon",
    "delta_r",
    "lr",
    "kappa_initial",
    "n_trajectories",
]


def filled(env_id, kind, best=100.0, **given):
    args = Args(env_id=env_id, **given)
    line = fill_from_table(args, kind, best)
    return args, line


@pytest.mark.parametrize("env_id, kind, numbers", [(e, k, n) for e, k, *n in PRINTED], ids=lambda v: str(v)[:20])
def test_rows_are_those_of_the_papers_table_6(env_id, kind, numbers):
    args, line = filled(env_id, kind)
    assert {name: float(getattr(args, name)) for name in NAMES} == dict(zip(NAMES, map(float, numbers)))
    assert args.g_eval == args.g_online and args.dataset_kind == kind
    assert f"{kind} data" in line and "no row" not in line
    assert len(PRINTED) == len(ROWS)


@pytest.mark.parametrize("task", ["Hopper-v5", "Walker2d-v5", "Ant-v4"])
def test_medium_replay_shares_the_row_of_medium(task):
    replay, medium = filled(task, "medium-replay")[0], filled(task, "medium")[0]
    assert replay.dataset_kind == "medium-replay"
    assert all(getattr(replay, name) == getattr(medium, name) for name in NAMES)


def test_random_data_of_adroit_and_antmaze_take_cloned_and_umaze():
    for task, kind in (("AdroitHandDoor-v1", "cloned"), ("AntMaze_UMaze-v4", "umaze")):
        random, row = filled(task, "random")[0], filled(task, kind)[0]
        assert all(getattr(random, name) == getattr(row, name) for name in NAMES)


@pytest.mark.parametrize("best, g_online", [(1500.0, 3000.0), (-40.0, 0.0)])
def test_a_task_outside_the_table_takes_hoppers_row_and_twice_the_best_return(best, g_online):
    args, line = filled("HalfCheetah-v5", "medium", best)
    hopper, _ = filled("Hopper-v5", "medium")
    assert args.g_online == args.g_eval == g_online
    assert all(getattr(args, name) == getattr(hopper, name) for name in NAMES if name != "g_online")
    assert "no row for HalfCheetah" in line


def test_flags_override_the_row_and_a_given_kind_that_of_the_checkpoint():
    args, _ = filled("Ant-v4", "medium", dataset_kind="random", l_traj=7, delta_r=0.0, g_eval=5.0)
    assert (args.l_traj, args.delta_r, args.g_eval, args.g_online) == (7, 0.0, 5.0, 12000.0)
    assert (args.dataset_kind, args.kappa_initial) == ("random", 0.20)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    advantages, keep = group_advantages(np.array([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 8.0]), 4, 0.0)
    root = math.sqrt(1.25)  # population: mean squared distance of 1, 2, 3, 4 from 2.5
    hand = [-1.5 / root, -0.5 / root, 0.5 / root, 1.5 / root, *[-2 / math.sqrt(12)] * 3, 6 / math.sqrt(12)]
    np.testing.assert_allclose(advantages, hand, rtol=1e-7)
    assert keep.all()


def test_advantages_have_mean_0_and_population_std_1_in_each_group():
    scores = np.random.default_rng(0).normal(size=(16, 8)) * np.arange(1, 17)[:, None] + 50
    advantages = group_advantages(scores.ravel(), 8, 0.0)[0].reshape(16, 8)
    np.testing.assert_allclose(advantages.mean(1), 0.0, atol=1e-12)
    np.testing.assert_allclose(advantages.std(1), 1.0, atol=1e-7)


def test_members_within_delta_r_of_the_mean_leave_and_the_statistics_are_from_before():
    scores = np.array([0.0, 9.0, 11.0, 20.0])
    std = math.sqrt(202 / 4)
    for delta_r, stay in ((0.99, [1, 1, 1, 1]), (1.0, [1, 0, 0, 1]), (9.9, [1, 0, 0, 1]), (10.0, [0, 0, 0, 0])):
        advantages, keep = group_advantages(scores, 4, delta_r)
        assert keep.tolist() == [bool(each) for each in stay]
        np.testing.assert_allclose(advantages, [-10 / std, -1 / std, 1 / std, 10 / std], rtol=1e-7)


def test_groups_of_equal_rewards_leave_and_so_does_a_member_at_the_mean():
    advantages, keep = group_advantages(np.array([7.0, 7.0, 7.0, 1.0, 2.0, 3.0, 0.1, 0.1, 0.1]), 3, 0.0)
    assert keep.tolist() == [False] * 3 + [True, False, True] + [False] * 3  # the mean of 0.1, 0.1, 0.1 is not 0.1
    assert np.isfinite(advantages).all()


def test_the_order_of_groups_and_members_does_not_matter():
    rng = np.random.default_rng(1)
    scores, groups = rng.normal(size=(6, 4)), rng.permutation(6)
    members = rng.permuted(np.tile(np.arange(4), (6, 1)), axis=1)
    one = [each.reshape(6, 4) for each in group_advantages(scores.ravel(), 4, 0.3)]
    shuffled = np.take_along_axis(scores[groups], members, 1)
    other = [each.reshape(6, 4) for each in group_advantages(shuffled.ravel(), 4, 0.3)]
    for ours, theirs in zip(one, other):
        np.testing.assert_allclose(np.take_along_axis(ours[groups], members, 1), theirs, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Ratio and loss
# ---------------------------------------------------------------------------------------------------------------------

LOG_RATIO = torch.tensor([[0.1, -0.3, 0.5], [0.2, 0.4, 9.0], [-0.7, 7.0, -8.0]])
REAL = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


def test_ratio_of_a_sub_trajectory_is_the_product_over_its_real_steps():
    ratio = importance_ratio(LOG_RATIO, REAL, toy_args())
    torch.testing.assert_close(ratio, torch.tensor([[0.3], [0.6], [-0.7]]).exp())


def test_geometric_mean_is_over_the_real_steps():
    ratio = importance_ratio(LOG_RATIO, REAL, toy_args(geometric_mean=True))
    torch.testing.assert_close(ratio, torch.tensor([[0.1], [0.3], [-0.7]]).exp())


def test_token_ratio_is_one_per_step_and_1_where_there_is_none():
    ratio = importance_ratio(LOG_RATIO, REAL, toy_args(token_ratio=True))
    torch.testing.assert_close(ratio, torch.where(REAL, LOG_RATIO, 0.0).exp())


def test_the_three_ratios_agree_at_one_step():
    log_ratio, real = torch.linspace(-2, 2, 5)[:, None], torch.ones(5, 1, dtype=torch.bool)
    flags = ({}, {"token_ratio": True}, {"geometric_mean": True})
    one, *others = (importance_ratio(log_ratio, real, toy_args(**each)) for each in flags)
    assert all(torch.equal(one, other) for other in others)
    torch.testing.assert_close(one, log_ratio.exp())


def test_the_log_ratio_is_kept_within_20_after_the_sum():
    real = torch.ones(3, 2, dtype=torch.bool)
    ratio = importance_ratio(torch.tensor([[60.0, 40.0], [-60.0, -40.0], [30.0, -29.0]]), real, toy_args())
    torch.testing.assert_close(ratio.log(), torch.tensor([[20.0], [-20.0], [1.0]]))


@torch.no_grad()
def draw_sub(model, rows=6, steps=3, context=2, seed=0):
    """Random sub-trajectories of which some end early and some begin at the start of an episode, with `model` as the
    policy that acted."""
    torch.manual_seed(seed)
    obs_dim, act_dim, width = model.sizes["obs_dim"], model.act_dim, context - 1 + steps
    real = torch.arange(width) < context - 1 + torch.tensor([steps, 2, 1] * rows)[:rows, None]
    real[::2, : context - 1] = False
    returns = 3 * torch.randn(rows, width)
    observations, actions = torch.randn(rows, width, obs_dim), torch.rand(rows, width, act_dim) * 1.9 - 0.95
    u, advantage = torch.randn(rows, steps, act_dim), torch.linspace(-2, 2, rows)
    sub = SubTrajectories(observations, returns, actions, real, u, returns, torch.zeros(rows, steps), advantage)
    sub = sub._replace(u=distribution(model, sub, returns).sample(u))
    return sub._replace(old_log_prob=distribution(model, sub, returns).log_prob(sub.u))


def sampled(sub):
    """Which of the sampled steps were lived: (B, L)."""
    return sub.real[:, -sub.u.shape[1] :]


@pytest.mark.parametrize("ratio, advantage, moves", [(1.3, 1, 0), (0.7, -1, 0), (0.7, 1, 1), (1.3, -1, 1), (1.1, 1, 1)])
@pytest.mark.parametrize("flag", ["", "token_ratio", "geometric_mean"])
def test_there_is_no_gradient_where_the_clipped_branch_is_the_smaller(ratio, advantage, moves, flag):
    model, args = draw_model(4, 2), toy_args(beta=0.0, epsilon=0.2, **({flag: True} if flag else {}))
    sub = draw_sub(model, rows=1)
    shift = math.log(ratio) / (1 if flag else sampled(sub).sum().item())
    sub = sub._replace(old_log_prob=sub.old_log_prob - shift, advantage=torch.tensor([float(advantage)]))
    loss, values = grpo_loss(model, model, sub, torch.tensor(0.0), args)
    assert values["ratio_mean"].item() == pytest.approx(ratio, abs=1e-5)
    bound = {0: 1 + 0.2 * advantage, 1: ratio}[moves]
    assert loss.item() == pytest.approx(-bound * advantage, abs=1e-5)
    loss.backward()
    steepest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert steepest > 1e-3 if moves else steepest == 0.0
    assert values["clip_fraction"].item() == (abs(ratio - 1) > 0.2)


def laws(model, sub, returns):
    """Normal laws before tanh of each row and lived step, one window at a time without its padding."""
    rows, steps, _ = sub.u.shape
    context, found = sub.real.shape[1] - steps + 1, {}
    for i in range(rows):
        for h in (h for h in range(steps) if sampled(sub)[i, h]):
            seen = [j for j in range(h, h + context) if sub.real[i, j]]
            window = (sub.observations[i, seen], returns[i, seen], sub.actions[i, seen[:-1]])
            dist, _ = model(*(part[None] for part in window))
            found[i, h] = Normal(dist.mean[0, -1].double(), dist.log_std[0, -1].double().exp())
    return found


@pytest.mark.parametrize("flag", ["", "token_ratio", "geometric_mean", "hindsight"])
@KINDS
@torch.no_grad()
def test_loss_equals_equation_3_written_out(kind, flag):
    old, model, reference = draw_model(4, 2, kind), draw_model(4, 2, kind), draw_model(4, 2, kind, seed=2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    args, kappa = toy_args(beta=0.3, epsilon=0.1, **({flag: True} if flag else {})), 0.7
    sub = draw_sub(old, rows=18)
    if flag == "hindsight":
        sub = sub._replace(new_returns=sub.returns + torch.randn_like(sub.returns) * 0.1)
    torch.manual_seed(5)
    noise = torch.randn(sub.u.shape)
    new, before, anchor = (
        laws(*each)
        for each in ((model, sub, sub.new_returns), (old, sub, sub.returns), (reference, sub, sub.new_returns))
    )
    surrogates, kls, entropies, ratios = [], [], [], []
    for i in range(len(sub.u)):
        steps, advantage = [h for h in range(sub.u.shape[1]) if sampled(sub)[i, h]], sub.advantage[i].item()
        log_ratios = []
        for h in steps:
            log_probs = [law[i, h].log_prob(sub.u[i, h].double()).sum().item() for law in (new, before)]
            log_ratios.append(log_probs[0] - log_probs[1])  # the slope of tanh is in both
            kls.append(kl_divergence(new[i, h], anchor[i, h]).sum().item())
            sample = new[i, h].mean + new[i, h].stddev * noise[i, h]
            squashed = TransformedDistribution(new[i, h], TanhTransform())
            entropies.append(-squashed.log_prob(sample.tanh()).sum().item())
        if flag == "token_ratio":
            own = [math.exp(each) for each in log_ratios]
        else:
            own = [math.exp(sum(log_ratios) / (len(steps) if flag == "geometric_mean" else 1))]
        terms = [min(r * advantage, max(0.9, min(1.1, r)) * advantage) for r in own]
        surrogates.append(sum(terms) / len(terms))
        ratios += own
    expected = -(np.mean(surrogates) - 0.3 * np.mean(kls) + kappa * np.mean(entropies))
    torch.manual_seed(5)
    loss, values = grpo_loss(model, reference, sub, torch.tensor(kappa), args)
    assert min(ratios) < 0.9 and max(ratios) > 1.1  # both sides are clipped somewhere
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    logged = {"surrogate": surrogates, "kl": kls, "entropy": entropies, "ratio_mean": ratios}
    logged["clip_fraction"] = [abs(each - 1) > 0.1 for each in ratios]
    for name, value in logged.items():
        assert values[name].item() == pytest.approx(np.mean(value), rel=1e-3), name
    assert values["ratio_max"].item() == pytest.approx(max(ratios), rel=1e-3)


def test_steps_after_the_end_do_not_touch_the_loss():
    model = draw_model(4, 2)
    sub = draw_sub(model)
    garbage = {"u": 5.0, "observations": 3.0, "returns": -9.0, "new_returns": -9.0, "old_log_prob": 4.0}
    other = sub._replace(**{name: getattr(sub, name).clone() for name in garbage})
    for name, value in garbage.items():
        field = getattr(other, name)
        field[~(sampled(sub) if field.shape[1] == sub.u.shape[1] else sub.real)] = value
    for flags in ({}, {"token_ratio": True}, {"geometric_mean": True}):
        losses, args = [], toy_args(beta=0.3, **flags)
        for each in (sub, other):
            torch.manual_seed(0)
            losses.append(grpo_loss(model, draw_model(4, 2, seed=3), each, torch.tensor(0.2), args)[0].item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Reset points
# ---------------------------------------------------------------------------------------------------------------------


def numbered(index, length, context=1):
    """A trajectory whose entries tell where they stand."""
    steps = np.concatenate([np.zeros(context - 1), 100.0 * index + np.arange(length)])
    observations, actions = np.stack([steps] * 2, 1).astype(np.float32), np.stack([steps / 1e4] * 2, 1)
    snapshots = np.stack([np.full(length, index), np.arange(length)], 1).astype(float)
    real = np.arange(context - 1 + length) >= context - 1
    returns = np.where(real, 1000 - steps, 0).astype(np.float32)
    return Trajectory(observations, returns, actions.astype(np.float32), real, np.ones(length), snapshots)


def drawn(monkeypatch, replay, variance, **flags):
    """(trajectory, step) of the points, when the policy's variance is `variance(trajectory)`."""
    monkeypatch.setattr(grpo, "action_variance", lambda policy, trajectory, context: variance(trajectory))
    points = choose_points(types.SimpleNamespace(act_dim=2), replay, toy_args(**flags), 1)
    assert all(trajectory.snapshots[h, 1] == h for trajectory, h in points)
    return np.array([trajectory.snapshots[h] for trajectory, h in points]).astype(int)


def assert_frequencies(counts, probabilities):
    """Within 5 standard deviations of binomial counts."""
    n, p = counts.sum(), np.asarray(probabilities)
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-9).all(), (counts / n, p)


def test_points_are_drawn_by_the_softmax_of_the_variance(monkeypatch):
    logits = np.array([0.0, 1.0, -1.0, 2.0, 54.0 - 52.5])
    found = drawn(monkeypatch, [numbered(0, 5)], lambda t: logits, n_sources=8000, n_points=1)
    assert_frequencies(np.bincount(found[:, 1], minlength=5), np.exp(logits) / np.exp(logits).sum())


def test_points_of_a_trajectory_are_drawn_one_after_the_other_without_replacement(monkeypatch):
    logits = np.array([0.0, 1.0, 2.0])
    found = drawn(monkeypatch, [numbered(0, 3)], lambda t: logits, n_sources=8000, n_points=2)
    p = np.exp(logits) / np.exp(logits).sum()
    pairs = found[:, 1].reshape(-1, 2)
    expected = [[p[i] * p[j] / (1 - p[i]) if i != j else 0.0 for j in range(3)] for i in range(3)]
    assert_frequencies(np.bincount(3 * pairs[:, 0] + pairs[:, 1], minlength=9), np.ravel(expected))


def test_a_variance_of_54_still_leaves_as_many_points_as_asked(monkeypatch):
    found = drawn(monkeypatch, [numbered(0, 6)], lambda t: np.array([54.0] + [0.0] * 5), n_sources=50, n_points=4)
    assert all(len(set(steps)) == 4 and 0 in steps for steps in found[:, 1].reshape(50, 4).tolist())


def test_trajectories_are_drawn_in_proportion_to_their_length(monkeypatch):
    replay = [numbered(0, 2), numbered(1, 6), numbered(2, 12)]
    found = drawn(monkeypatch, replay, lambda t: np.zeros(len(t.rewards)), n_sources=6000, n_points=1)
    assert_frequencies(np.bincount(found[:, 0], minlength=3), [0.1, 0.3, 0.6])


def test_random_points_are_uniform_whatever_the_variance(monkeypatch):
    flags = dict(n_sources=6000, n_points=1, random_points=True)
    found = drawn(monkeypatch, [numbered(0, 4)], lambda t: np.array([0.0, 9.0, 0.0, 0.0]), **flags)
    assert_frequencies(np.bincount(found[:, 1], minlength=4), [0.25] * 4)


def test_a_trajectory_shorter_than_the_number_of_points_repeats_its_own(monkeypatch):
    found = drawn(monkeypatch, [numbered(0, 3)], lambda t: np.zeros(3), n_sources=5, n_points=4)
    for steps in found[:, 1].reshape(5, 4).tolist():
        assert set(steps) == {0, 1, 2} and steps[3] == steps[0]
    assert drawn(monkeypatch, [numbered(0, 1)], lambda t: np.zeros(1), n_points=4)[:, 1].tolist() == [0] * 8


def test_full_trajectories_start_at_their_first_step(monkeypatch):
    found = drawn(monkeypatch, [numbered(0, 9)], lambda t: np.zeros(9), full_trajectories=True)
    assert found[:, 1].tolist() == [0, 0, 0, 0]


def test_mixed_groups_have_a_point_for_each_member(monkeypatch):
    found = drawn(monkeypatch, [numbered(0, 30)], lambda t: np.zeros(30), mixed_groups=True)
    assert found.shape == (16, 2)
    assert all(len(set(steps)) == 8 for steps in found[:, 1].reshape(2, 8).tolist())  # 2 points x 4 members


def test_other_iterations_draw_other_points():
    replay, policy = [numbered(0, 50)], types.SimpleNamespace(act_dim=2)
    args = toy_args(random_points=True)
    first, again, other = ([h for _, h in choose_points(policy, replay, args, i)] for i in (1, 1, 2))
    assert first == again != other


def test_windows_are_every_run_of_k_steps_in_order():
    steps = torch.arange(10.0).reshape(2, 5)
    assert windows(steps, 3).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [5, 6, 7], [6, 7, 8], [7, 8, 9]]
    assert windows(steps, 1).tolist() == [[float(i)] for i in range(10)]
    vectors = torch.stack([steps, -steps], dim=-1)  # (2, 5, 2)
    assert torch.equal(windows(vectors, 3)[..., 1], -windows(steps, 3))
    assert windows(vectors, 3).shape == (6, 3, 2)


@KINDS
@pytest.mark.parametrize("context", [1, 3])
@torch.no_grad()
def test_variance_is_the_mean_over_dimensions_before_tanh_of_each_step(kind, context):
    policy, rng = rollout_copy(draw_model(4, 2, kind)), np.random.default_rng(0)
    length = context - 1 + 300
    trajectory = numbered(0, 300, context)._replace(
        observations=rng.normal(size=(length, 4)).astype(np.float32),
        returns=rng.normal(size=length).astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, size=(length, 2)).astype(np.float32),
    )
    variance = action_variance(policy, trajectory, context)
    assert variance.shape == (300,)
    for h in (0, 1, 2, 5, 255, 256, 299):
        seen = slice(max(context - 1, h), h + context)  # without the padding
        parts = (trajectory.observations[seen], trajectory.returns[seen], trajectory.actions[seen][:-1])
        dist, _ = policy.act(*(torch.from_numpy(part)[None] for part in parts))
        assert variance[h] == pytest.approx((dist.log_std[0].exp() ** 2).mean().item(), rel=1e-4)
    assert variance.std() > 1e-3


def test_the_buffer_keeps_the_last_ones():
    model = draw_model(4, 2)
    sub, args = draw_sub(model, rows=10), toy_args(buffer_size=5, n_batch=2)
    learner, advantages = GRPOLearner(model, args), np.arange(10.0)
    for kept, stay in (
        ([0, 1, 2], [0, 1, 2]),
        ([], [0, 1, 2]),
        ([3, 5, 6], [1, 2, 3, 5, 6]),
        (range(10), range(5, 10)),
    ):
        keep = np.isin(np.arange(10), list(kept))
        learner.remember(Groups(sub._replace(advantage=torch.zeros(10)), None, None, 0, 0.0), advantages, keep)
        assert learner.buffer.advantage.tolist() == list(stay) and learner.size() == len(stay)
        for name in ("observations", "returns", "actions", "real", "u", "new_returns"):
            assert torch.equal(getattr(learner.buffer, name), getattr(sub, name)[list(stay)])
        torch.testing.assert_close(learner.buffer.old_log_prob, sub.old_log_prob[list(stay)])


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts
# ---------------------------------------------------------------------------------------------------------------------


def roll(kind="dt", dtype=torch.float32, threads=1, width=16, **flags):
    """Two full trajectories, points in them and a rollout of groups, all with one random network."""
    args = toy_args(**flags)
    env = make_env(args.env_id)
    model = draw_model(*env.observation_space.shape, *env.action_space.shape, kind, embed_dim=width)
    policy = rollout_copy(model.use_precision(dtype))
    envs = [make_env(args.env_id) for _ in range(2)]
    replay = collect(policy, envs, args, 1)
    points = choose_points(policy, replay, args, 1)
    pool = make_pool(env, args.n_sources * args.n_points * args.group_size, threads)
    groups = rollout_groups(policy, pool, points, args, 1)
    return types.SimpleNamespace(**{name: value for name, value in locals().items() if name != "env"})


@CONTEXTS
@KINDS
def test_full_trajectories_fall_by_each_reward_and_replay_from_their_snapshots(kind, context):
    rolled, zero = roll(kind, c_online=context, g_online=3.0, seed=4), np.zeros(1, int)
    assert len({len(trajectory.rewards) for trajectory in rolled.replay}) == 2  # of different lengths, side by side
    for trajectory in rolled.replay:
        steps, pool = len(trajectory.rewards), make_pool(make_env("Hopper-v5"), 1, 1)
        assert len(trajectory.snapshots) == steps > 5
        assert trajectory.real.tolist() == [False] * (context - 1) + [True] * steps
        for field in trajectory[:3]:
            assert len(field) == context - 1 + steps and not field[: context - 1].any()
        trajectory = trajectory._replace(
            **{name: getattr(trajectory, name)[context - 1 :] for name in ("observations", "returns", "actions")}
        )
        if kind == "dt":
            g = 3.0 - np.concatenate([[0.0], trajectory.rewards.cumsum()[:-1]])
            np.testing.assert_allclose(trajectory.returns, g, atol=1e-4)
            assert trajectory.returns[-1] < 0  # not clamped
        for first in (0, steps // 2):
            pool.restore(zero, trajectory.snapshots[first][None])
            for h in range(first, steps):
                observation, reward, terminated = pool.step(zero, scale_action(trajectory.actions[h], pool.env)[None])
                assert abs(reward[0] - trajectory.rewards[h]) < 1e-9
                assert terminated[0] == (h == steps - 1)
                if h + 1 < steps:
                    np.testing.assert_allclose(observation[0], trajectory.observations[h + 1], atol=1e-5)


@torch.no_grad()
def play_by_hand(rolled, row, point):
    """Sub-trajectory `row` again in gymnasium's own environment, one step at a time: the recorded actions, then the
    mean one. Score, length, and the windows of the sampled steps."""
    args, sub, (trajectory, first) = rolled.args, rolled.groups.sub, rolled.points[point]
    past = args.c_online - 1  # padding before the first step
    env = make_env(args.env_id)
    env.reset(seed=0)
    nq, nv = env.unwrapped.model.nq, env.unwrapped.model.nv
    snapshot = trajectory.snapshots[first]  # time, positions, velocities, ...
    env.unwrapped.set_state(snapshot[1 : 1 + nq], snapshot[1 + nq : 1 + nq + nv])
    observations, actions = (
        list(field[past : past + first + 1]) for field in (trajectory.observations, trajectory.actions)
    )
    returns, score, windows = list(trajectory.returns[past : past + first + 1]), 0.0, []
    g = float(returns[-1])
    actions.pop()
    for k in range(args.l_traj + args.l_eval):
        last = slice(-args.c_online, None)
        seen = actions[1 - args.c_online :] if args.c_online > 1 else []
        window = (np.array(observations[last]), np.array(returns[last]), np.array(seen).reshape(-1, 3))
        window = tuple(torch.from_numpy(part.astype(np.float32)) for part in window)
        dist, used = rolled.policy.act(*(part[None] for part in window))
        returns[-1] = used.item()
        window[1][-1] = used.item()
        if k < args.l_traj:
            windows.append(window)
        action = squash(sub.u[row, k] if k < args.l_traj else dist.mean[0]).numpy()
        observation, reward, terminated, _, _ = env.step(action)
        score, g = score + args.gamma**k * reward, g - reward
        observations.append(observation.astype(np.float32))
        actions.append(action)
        returns.append(g)
        if terminated:
            break
    return score, k + 1, windows


@pytest.mark.parametrize("kind, context", [("dt", 1), ("dt", 3), ("reinformer", 3)])
def test_scores_windows_and_ends_are_those_of_playing_each_sub_trajectory_alone(kind, context):
    rolled = roll(kind, c_online=context, l_traj=6, l_eval=12, random_points=True, n_sources=3, n_points=3)
    groups, sub, ended = rolled.groups, rolled.groups.sub, 0
    for row in range(len(groups.scores)):
        score, length, windows = play_by_hand(rolled, row, row // 4)
        assert groups.scores[row] == pytest.approx(score, abs=1e-3)
        assert groups.lengths[row] == length
        ended += length < 6
        assert sampled(sub)[row].tolist() == [k < length for k in range(6)]
        for k, (observations, returns, actions) in enumerate(windows):
            real = len(returns)
            assert sub.real[row, k : k + context].tolist() == [False] * (context - real) + [True] * real
            seen = slice(k + context - real, k + context)
            torch.testing.assert_close(sub.observations[row, seen], observations, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(sub.returns[row, seen], returns, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(sub.actions[row, seen][:-1], actions, atol=1e-6, rtol=0)
    assert 0 < ended < len(groups.scores)
    assert groups.env_steps == groups.lengths.sum()
    assert kind != "dt" or sub.returns[sub.real].min() < 0 < sub.returns[sub.real].max()  # g is not clamped
    assert len({h for _, h in rolled.points}) > 3


@CONTEXTS
def test_members_of_a_group_start_from_the_same_window_and_part_ways(context):
    rolled = roll(c_online=context, n_sources=3)
    sub = rolled.groups.sub
    for group in range(6):
        members, (trajectory, h) = slice(4 * group, 4 * group + 4), rolled.points[group]
        for ours, theirs in zip(sub[:4], trajectory[:4]):
            past, now = slice(0, context - 1), slice(0, 0 if ours is sub.actions else context)  # the action is new
            for each in (past, now):
                expected = torch.from_numpy(theirs[h + each.start : h + each.stop]).expand_as(ours[members, each])
                assert torch.equal(ours[members, each], expected)
        assert len(set(sub.u[members, 0, 0].tolist())) == len(set(rolled.groups.scores[members])) == 4


def test_members_of_mixed_groups_start_from_different_points():
    rolled = roll(mixed_groups=True, n_sources=3)
    starts = [tuple(each) for each in rolled.groups.sub.observations[:, 0].tolist()]
    points = [tuple(trajectory.observations[h].tolist()) for trajectory, h in rolled.points]
    assert len(points) == len(starts) == 24
    assert sorted(starts) == sorted(points) and starts != points  # not those of one source in a row
    assert all(len(set(starts[i : i + 4])) > 1 for i in range(0, 24, 4))


def test_where_all_fall_before_l_traj_the_rest_is_no_step():
    rolled = roll(l_traj=80, l_eval=3, random_points=True, seed=2)
    sub, lengths = rolled.groups.sub, rolled.groups.lengths
    assert lengths.max() < 80 and sub.u.shape[1] == 80
    assert sampled(sub).sum(1).tolist() == lengths.tolist()
    assert not sub.u[~sampled(sub)].any()


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v4", "Ant-v4", "Ant-v5", "AdroitHandDoor-v1"])
def test_a_pool_steps_no_row_as_well(env_id):
    env = make_env(env_id)
    observations, rewards, terminated = make_pool(env, 2, 2).step(np.arange(0), np.zeros((0, *env.action_space.shape)))
    assert observations.shape == (0, *env.observation_space.shape) and rewards.shape == terminated.shape == (0,)


def test_rollouts_do_not_depend_on_the_number_of_threads():
    flags = dict(l_traj=6, l_eval=20, c_online=3, n_sources=5, random_points=True)
    one, two = (roll(threads=threads, **flags) for threads in (1, 2))
    assert one.pool.threads == 1 and two.pool.threads == 2
    assert np.array_equal(one.groups.scores, two.groups.scores)
    assert np.array_equal(one.groups.lengths, two.groups.lengths) and len(set(one.groups.lengths)) > 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one.groups.sub, two.groups.sub))


@CONTEXTS
@KINDS
@torch.no_grad()
def test_the_updates_forward_sees_the_law_that_the_rollout_sampled_from(kind, context):
    rolled = roll(kind, c_online=context, l_traj=6, n_sources=4)
    sub, args = rolled.groups.sub, rolled.args
    rng = torch.Generator().manual_seed(stream(args.seed, 1, "actions of sub-trajectories"))
    noise = torch.randn(args.l_traj, len(sub.u), 3, generator=rng).transpose(0, 1)
    dist = distribution(rolled.model, sub, sub.returns)
    recovered = (sub.u - dist.mean) / dist.log_std.exp()
    torch.testing.assert_close(recovered[sampled(sub)], noise[sampled(sub)], atol=2e-3, rtol=0)


def remembered(rolled, drop=3):
    """A learner with all sub-trajectories but the last `drop` in its buffer."""
    learner, n = GRPOLearner(rolled.model, rolled.args), len(rolled.groups.scores)
    keep = np.arange(n) < n - drop
    learner.remember(rolled.groups, np.linspace(-1, 1, n), keep)
    assert len(learner.buffer.u) == n - drop
    return learner


@torch.no_grad()
def ratios(learner, sub):
    log_ratio = distribution(learner.model, sub, sub.new_returns).log_prob(sub.u) - sub.old_log_prob
    return importance_ratio(log_ratio, sampled(sub), learner.args)[:, 0]


def best_dtype():
    return grpo.set_up_torch(toy_args(device="cpu"))[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CONTEXTS
@KINDS
def test_ratio_is_1_before_the_first_update(kind, context, dtype):
    if dtype == torch.bfloat16 and best_dtype() != dtype:
        pytest.skip("no bf16 units")
    flags = dict(c_online=context, l_traj=15, l_eval=1, n_sources=4, n_points=2, group_size=8, n_batch=24)
    learner = remembered(roll(kind, dtype, width=64, buffer_size=64, **flags))
    rng = np.random.default_rng(0)
    for batch in (24, 7, 1):  # others than those in which the old log-probabilities were worked out
        for _ in range(4):
            index = torch.from_numpy(rng.integers(len(learner.buffer.u), size=batch))
            assert (ratios(learner, learner.buffer.take(index)) - 1).abs().max() <= 1e-4
    assert not sampled(learner.buffer).all()  # early ends among them
    assert learner.update(1)["losses/ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert (ratios(learner, learner.buffer) - 1).abs().max() > 1e-3


@KINDS
def test_hindsight_moves_the_ratio_and_leaves_the_old_log_probability(kind):
    plain, relabelled = roll(kind, l_traj=6), roll(kind, l_traj=6, hindsight=True)
    ours, theirs = remembered(plain, 0), remembered(relabelled, 0)
    for name in ("observations", "returns", "u", "real", "old_log_prob"):
        assert torch.equal(getattr(ours.buffer, name), getattr(theirs.buffer, name)), name
    assert (ratios(ours, ours.buffer) - 1).abs().max() <= 1e-4
    assert (ratios(theirs, theirs.buffer) - 1).abs().min() > 1e-3
    assert np.array_equal(plain.groups.scores, relabelled.groups.scores)
    assert np.array_equal(plain.groups.lengths, relabelled.groups.lengths)


def test_hindsight_relabels_with_the_returns_reached_at_the_end_of_the_episode():
    rolled = roll(env_id="Pusher-v5", hindsight=True, l_traj=3, l_eval=2, gamma=1.0, n_sources=3, random_points=True)
    groups, sub, steps = rolled.groups, rolled.groups.sub, np.repeat([h for _, h in rolled.points], 4)
    assert groups.env_steps == np.maximum(100 - steps, 5).sum() > 2 * groups.lengths.sum()  # to the limit of 100 steps
    assert (groups.lengths == 5).all()
    fall, relabelled = (each[:, :-1] - each[:, 1:] for each in (sub.returns, sub.new_returns))
    torch.testing.assert_close(fall, relabelled, atol=1e-3, rtol=0)  # either way by the reward of the step
    assert (sub.new_returns[:, 0].numpy() < groups.scores).all()  # every reward of Pusher is negative


def test_hindsight_counts_no_reward_beyond_the_time_limit():
    """Pusher's 100 steps, scores over 60: where fewer are left, the return reached is less than the undiscounted score
    by what came after the limit, and the same where at least 60 are left and none are played on."""
    flags = dict(l_traj=3, l_eval=57, gamma=1.0, n_sources=6, random_points=True)
    rolled = roll(env_id="Pusher-v5", hindsight=True, **flags)
    left = 100 - np.repeat([h for _, h in rolled.points], 4)
    reached, scores = rolled.groups.sub.new_returns[:, 0].numpy(), rolled.groups.scores
    assert (left < 60).any() and (left > 60).any()
    assert (reached[left < 60] > scores[left < 60] + 0.01).all()  # every reward of Pusher is negative
    assert (reached[left > 60] < scores[left > 60] - 0.01).all()


@CONTEXTS
def test_hindsight_relabels_sub_trajectories_that_fall_and_the_steps_before_their_reset_point(context):
    falling = roll(hindsight=True, gamma=1.0, l_eval=60, n_sources=4, random_points=True, c_online=context)
    groups, before = falling.groups, context - 1
    ended = groups.lengths < 64
    assert ended.sum() > 4
    reached = groups.sub.new_returns[ended].numpy()
    np.testing.assert_allclose(reached[:, before], groups.scores[ended], rtol=1e-5)
    for row, (source, h) in enumerate(np.repeat(np.array(falling.points, object), 4, axis=0)[ended]):
        for j in range(1, min(before, h) + 1):  # what the source got on the way to the reset point comes on top
            assert reached[row, before - j] == pytest.approx(
                reached[row, before] + source.rewards[h - j : h].sum(), rel=1e-4
            )


def test_the_reference_is_the_policy_of_every_fourth_update():
    weights = {}
    for count in (4, 5, 9):
        learner = remembered(roll(n_minibatches=count, reference_every=4))
        start = {name: value.clone() for name, value in learner.model.state_dict().items()}
        learner.update(1)
        weights[count] = start, learner.model.state_dict(), learner.reference.state_dict()
    eight = remembered(roll(n_minibatches=8, reference_every=4))
    eight.update(1)
    for name, reference in weights[4][2].items():
        assert torch.equal(reference, weights[4][0][name])
        assert torch.equal(weights[5][2][name], weights[4][1][name])
        assert torch.equal(weights[9][2][name], eight.model.state_dict()[name])
    assert not torch.equal(weights[4][1]["mean_head.weight"], weights[4][0]["mean_head.weight"])


def test_kappa_rises_while_the_entropy_is_below_minus_the_dimension_of_the_action():
    for bias, direction in ((-9.0, 1), (0.3, -1)):
        rolled = roll(kappa_lr=0.01, n_minibatches=1)
        rolled.model.log_std_head.weight.data[:] = 0.0
        rolled.model.log_std_head.bias.data[:] = bias
        learner = remembered(rolled)
        row = learner.update(1)
        assert (row["losses/entropy"] < -3) == (direction == 1)
        assert learner.log_kappa.item() == pytest.approx(math.log(0.1) + direction * 0.01, abs=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line():
    learner = remembered(roll())
    learner.buffer.advantage[:] = math.nan
    with refused("the loss is not finite in iteration 3"):
        learner.update(3)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """pretrained(env_id, model): a checkpoint of pretrain_dt.py on a few random episodes, made once."""

    @functools.cache
    def make(env_id="Hopper-v5", model="dt"):
        torch.set_num_threads(1)
        steps = {"Ant-v4": 1100, "AntMaze_UMaze-v4": 800}.get(env_id, 300)
        toy = dict(dataset_steps=steps, batch_size=8, c_offline=5, updates=4, warmup=1, lr=1e-2, eval_episodes=1)
        run_dir = tmp_path_factory.mktemp("pretrained") / "run"
        toy |= dict(env_id=env_id, model=model, run_dir=str(run_dir), device="cpu", threads=1)
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
    different = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    assert different == ["/args/run_dir"]


def resume(run_dir, *flags):
    return main(parse_args(["--resume", str(run_dir), *map(str, flags)]))


@pytest.fixture(scope="session")
def whole(pretrained, tmp_path_factory):
    """The folder of a run of 4 iterations in one go and what it printed; not to be changed."""
    return main(toy_args(iterations=4, pretrained=pretrained(), run_dir=str(tmp_path_factory.mktemp("whole") / "run")))


def test_a_run_writes_its_metrics_and_learns(whole, pretrained):
    rows = table(whole)
    assert list(rows[0]) == METRICS and [row["iteration"] for row in rows] == ["0", "1", "2", "3", "4"]
    empty = {name for name, value in rows[0].items() if value == ""}
    assert not any(name.startswith("eval/") for name in empty) and rows[0]["rollout/return"] == ""
    assert all(value != "" and math.isfinite(float(value)) for row in rows[1:] for value in row.values())
    assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    for i, row in enumerate(rows[1:], 1):
        full, sub = (float(row[f"charts/env_steps_{source}"]) for source in ("full", "sub"))
        assert float(row["charts/env_steps"]) == full + sub
        counts = [2] + [1] * 3  # departure (8): as many full trajectories as are drawn, then one in each iteration
        assert full == sum(n * float(each["rollout/length"]) for n, each in zip(counts, rows[1 : i + 1]))
        assert int(row["charts/env_steps_eval"]) == sum(float(each["eval/length_mean"]) for each in rows[1 : i + 1])
        assert int(row["charts/gradient_updates"]) == 8 * i
    kept = [round(16 * float(row["rollout/kept"])) for row in rows[1:]]
    assert [int(row["charts/buffer"]) for row in rows[1:]] == [min(40, sum(kept[: i + 1])) for i in range(4)]
    before, after = load_checkpoint(Path(pretrained()))["weights"], load_checkpoint(whole)["weights"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {"obs_mean", "obs_std", "return_scale"}
    assert moved == set(before) - statistics - {"embed_action.weight", "embed_action.bias"}  # context 1 has no action


@pytest.mark.parametrize(
    "env_id, model, context",
    [
        ("Hopper-v5", "reinformer", 1),
        ("Ant-v4", "dt", 1),
        ("AdroitHandHammer-v1", "dt", 5),
        ("AntMaze_UMaze-v4", "dt", 1),
    ],
)
def test_finetuning_runs_on_a_task_of_each_family(env_id, model, context, pretrained, tmp_path, capsys):
    flags = dict(env_id=env_id, iterations=1, pretrained=pretrained(env_id, model), run_dir=str(tmp_path / "run"))
    flags |= dict(c_online=None, g_online=None, gamma=None, epsilon=None, kappa_initial=None)
    run_dir = main(toy_args(**flags))
    content, rows = load_checkpoint(run_dir), table(run_dir)
    assert (content["c_online"], content["sizes"]["kind"], content["script"]) == (context, model, "grpo_dt_continuous")
    assert [row["iteration"] for row in rows] == ["0", "1"] and rows[1]["eval/normalized_score"] != ""
    printed = capsys.readouterr().out
    assert "iteration 1/1" in printed and f"checkpoint: {run_dir}" in printed
    if env_id.startswith("AntMaze"):  # random walks reach no goal: groups of equal scores
        assert rows[1]["rollout/kept"] == "0.0" and "nothing kept" in printed
        assert content["env_kwargs"] == {"maze_map": pretrain_dt.UMAZE}
    else:
        assert math.isfinite(float(rows[1]["losses/loss"])) and int(rows[1]["charts/gradient_updates"]) == 8
        assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)


ABLATIONS = ["hindsight", "full_trajectories", "mixed_groups", "token_ratio", "random_points", "geometric_mean"]


@pytest.mark.parametrize("flag", ABLATIONS)
def test_every_ablation_runs_and_changes_what_is_learned(flag, whole, pretrained, tmp_path):
    sizes = dict(n_sources=1, n_batch=2, n_minibatches=2) if flag == "full_trajectories" else {}
    sizes |= dict(l_traj=None, l_eval=None) if flag == "full_trajectories" else {}
    args = toy_args(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run"), **sizes, **{flag: True})
    rows, plain = table(main(args)), table(whole)
    assert all(math.isfinite(float(rows[1][f"losses/{name}"])) for name in grpo.LOSSES)
    assert rows[1]["losses/loss"] != plain[1]["losses/loss"]
    assert rows[0]["eval/return_mean"] == plain[0]["eval/return_mean"]
    if flag == "hindsight":
        assert abs(float(rows[1]["losses/ratio_first"]) - 1.0) > 1e-4
    else:
        assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    if flag == "full_trajectories":
        assert (args.l_traj, args.l_eval) == (1000, 0)
        assert float(rows[1]["rollout/ended_early"]) > 0


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_does_not(whole, pretrained, tmp_path):
    flags = dict(iterations=4, pretrained=pretrained())
    assert_same_run(main(toy_args(**flags, run_dir=str(tmp_path / "again"))), whole)
    other = main(toy_args(**flags | {"iterations": 1, "seed": 2}, run_dir=str(tmp_path / "other")))
    assert table(other)[1]["losses/loss"] != table(whole)[1]["losses/loss"]


@pytest.mark.parametrize("stops", [[2], [1, 3]])
def test_a_resumed_run_equals_one_that_never_stopped(stops, whole, pretrained, tmp_path):
    run_dir = main(toy_args(iterations=stops[0], pretrained=pretrained(), run_dir=str(tmp_path / "split")))
    for iterations in [*stops[1:], 4]:
        resume(run_dir, "--iterations", iterations)
    assert_same_run(run_dir, whole)


def test_rows_written_after_the_checkpoint_are_cut_off_on_resuming(whole, pretrained, tmp_path):
    run_dir = main(toy_args(iterations=2, pretrained=pretrained(), run_dir=str(tmp_path / "split")))
    with open(run_dir / "metrics.csv", "a") as file:
        file.write("3,0.01,1.0,2.0\n4,0.0")
    resume(run_dir, "--iterations", 4)
    assert_same_run(run_dir, whole)


def test_resuming_needs_the_pretrained_checkpoint_no_more(whole, pretrained, tmp_path):
    start = tmp_path / "start.pt"
    start.write_bytes(Path(pretrained()).read_bytes())
    run_dir = main(toy_args(iterations=2, pretrained=str(start), run_dir=str(tmp_path / "split")))
    start.unlink()
    resume(run_dir, "--iterations", 4)
    assert learning_columns(run_dir) == learning_columns(whole)


def progress(run_dir):
    path = run_dir / "checkpoint.pt"
    return load_checkpoint(path)["iteration"] if path.exists() else 0


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(kills, pretrained, tmp_path):
    run_dir, moments = tmp_path / "killed", np.random.default_rng(kills).uniform(0.0, 0.5, size=kills)
    args = toy_args(pretrained=pretrained(), run_dir=str(run_dir))
    given = {name: value for name, value in vars(args).items() if value is not None and not isinstance(value, bool)}
    begin = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    iteration = 0
    for moment in moments:
        flags = [*(["--resume", str(run_dir)] if iteration else begin), "--iterations", "100000"]
        process = subprocess.Popen([sys.executable, grpo.__file__, *flags], stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None and progress(run_dir) <= iteration:
                time.sleep(0.02)
            time.sleep(moment)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        reached = progress(run_dir)
        assert reached > iteration
        iteration = reached
    resume(run_dir, "--iterations", iteration + 1)
    run = main(toy_args(iterations=iteration + 1, pretrained=pretrained(), run_dir=str(tmp_path / "whole")))
    assert_same_run(run_dir, run)


def test_where_nothing_is_kept_no_update_is_made_and_the_run_says_so_and_goes_on(pretrained, tmp_path, capsys):
    flags = dict(pretrained=pretrained(), delta_r=1e9)
    run_dir = main(toy_args(**flags, iterations=1, run_dir=str(tmp_path / "run")))
    resume(run_dir, "--iterations", 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("nothing kept")]
    assert len(lines) == 2 and all("further than Delta_r = 1000000000.0" in line for line in lines)
    rows = table(run_dir)
    assert all(row["charts/gradient_updates"] == "0" and row["losses/loss"] == "" for row in rows[1:])
    before, after = load_checkpoint(Path(pretrained()))["weights"], load_checkpoint(run_dir)["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_same_run(run_dir, main(toy_args(**flags, iterations=2, run_dir=str(tmp_path / "whole"))))


def test_a_full_trajectory_that_mujoco_had_to_reset_is_not_kept():
    class Thrown(gym.Wrapper):
        def step(self, action):
            simulator_of(self).data.qvel[3] = 1e12
            return self.env.step(action)

    args = toy_args()
    policy, env = rollout_copy(draw_model(11, 3)), make_env("Hopper-v5")
    collect(policy, [env], args, 1)
    with refused("a simulation became unstable in iteration 2"):
        collect(policy, [env, Thrown(env)], args, 2)


def test_a_simulation_that_became_unstable_stops_the_run_and_keeps_the_checkpoint(pretrained, tmp_path, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(grpo.SimulatorPool, "unstable", lambda pool: next(answers))
    with refused("unstable in iteration 2"):
        main(toy_args(pretrained=pretrained(), run_dir=str(tmp_path / "run")))
    assert progress(tmp_path / "run") == 1


@pytest.mark.parametrize("script", [pretrain_dt, grpo], ids=lambda script: script.__name__)
def test_evaluating_a_saved_run_scores_what_its_last_row_says(script, whole, capsys):
    args, content = script.parse_args(["--eval-only", str(whole)]), load_checkpoint(whole)
    assert (args.g_eval, args.c_online, args.eval_episodes) == (3.0, 1, 1)
    dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[content["precision"]]
    envs = script.make_eval_envs(args, content["env_kwargs"], whole)
    values = script.run_evaluation(args, script.load_model(content).use_precision(dtype), envs, 4)
    for name in grpo.EVALUATION:
        assert repr(values[name]) == table(whole)[-1][name]
    printed, before = capsys.readouterr().out, sorted(whole.iterdir())
    script.eval_only(args)
    assert capsys.readouterr().out == printed and printed.startswith("evaluation: return_mean ")
    assert sorted(whole.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining on random data where --pretrained is left out
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretraining(monkeypatch, pretrained):
    """Stands in for the process that pretrains: parses its flags, writes a checkpoint, keeps count."""
    calls = []

    def run(command, returncode=0, **kwargs):
        assert command[0] == sys.executable and Path(command[1]) == Path(pretrain_dt.__file__)
        calls.append(pretrain_dt.parse_args(command[2:]))  # ends the test with exit code 1 on a flag it does not know
        target = Path(calls[-1].run_dir)
        target.mkdir(parents=True)
        (target / "checkpoint.pt").write_bytes(Path(pretrained()).read_bytes())
        return types.SimpleNamespace(returncode=returncode)

    monkeypatch.setattr(grpo.subprocess, "run", run)
    return calls


def test_without_a_checkpoint_one_is_made_on_random_data_once_and_kept(pretraining, capsys):
    args = toy_args(c_online=None, seed=7, threads=2)
    path = grpo.pretrained_on_random(args)
    assert load_checkpoint(path)["script"] == "pretrain_dt" and len(pretraining) == 1
    made = pretraining[0]
    assert (made.env_id, made.dataset, made.seed, made.threads) == ("Hopper-v5", "random", 7, 2)
    assert (made.embed_dim, made.n_layers, made.n_heads, made.device) == (16, 4, 4, "cpu")
    assert made.c_offline == made.c_online == 1 and made.bf16
    assert "pretrained on random data" in capsys.readouterr().out
    assert grpo.pretrained_on_random(args) == path and len(pretraining) == 1
    grpo.pretrained_on_random(toy_args(seed=8, bf16=False))
    assert len(pretraining) == 2 and not pretraining[1].bf16


def test_nothing_half_made_stays_beside_the_kept_checkpoint(pretraining):
    path = grpo.pretrained_on_random(toy_args())
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing half made beside it


def test_other_seeds_sizes_and_contexts_have_checkpoints_of_their_own(pretraining):
    changes = [{}, {"seed": 2}, {"embed_dim": 32}, {"c_online": 5}, {"env_id": "Ant-v4"}]
    changes += [{"env_id": "AdroitHandHammer-v1", "c_online": None}]
    changes += [{"env_id": "AntMaze_UMaze-v4", "c_online": None, "dataset_kind": kind} for kind in ("umaze", "diverse")]
    paths = {grpo.pretrained_on_random(toy_args(**each)) for each in changes}
    assert len(paths) == len(pretraining) == len(changes)
    assert [made.c_online for made in pretraining] == [1, 1, 1, 5, 1, 5, 1, 5]


def test_of_two_runs_that_pretrain_at_once_the_first_ones_checkpoint_stays(pretraining, monkeypatch):
    args = toy_args()
    first = grpo.pretrained_on_random(args)
    first.rename(first.with_name("hidden"))  # as it was when the second one looked
    fake, before = grpo.subprocess.run, first.with_name("hidden").stat().st_ino

    def slower(command, **kwargs):
        done = fake(command)
        first.with_name("hidden").rename(first)
        return done

    monkeypatch.setattr(grpo.subprocess, "run", slower)
    assert grpo.pretrained_on_random(args) == first and (first / "checkpoint.pt").exists()
    assert first.stat().st_ino == before
    assert len(pretraining) == 2 and len(list(first.parent.iterdir())) == 1


def test_pretraining_that_fails_is_one_line(pretraining, monkeypatch):
    fake = grpo.subprocess.run
    monkeypatch.setattr(grpo.subprocess, "run", lambda command, **kwargs: fake(command, returncode=1))
    with refused("pretraining on random data failed, see above"):
        grpo.pretrained_on_random(toy_args())


@pytest.mark.slow
def test_a_command_without_a_checkpoint_pretrains_and_finetunes(tmp_path):
    args = toy_args(iterations=1, run_dir=str(tmp_path / "run"))
    given = {name: value for name, value in vars(args).items() if value is not None and not isinstance(value, bool)}
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([sys.executable, grpo.__file__, *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert progress(tmp_path / "run") == 1
    assert len(list((tmp_path / "runs" / "pretrained").glob("*/checkpoint.pt"))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, match",
    [
        ({"env_id": "Walker2d-v5"}, "was pretrained in Hopper-v5, not in Walker2d-v5"),
        ({"group_size": 1}, "--group-size is 1: .* give 2 or more"),
        ({"full_trajectories": True, "mixed_groups": True}, "--full-trajectories .*--mixed-groups"),
        ({"full_trajectories": True, "random_points": True}, "--full-trajectories .*--random-points"),
        ({"full_trajectories": True}, "--full-trajectories sets L_traj and L_eval: leave --l-traj"),
        ({"token_ratio": True, "geometric_mean": True}, "--token-ratio .*--geometric-mean"),
        ({"n_sources": 0}, "--n-sources is 0: give one above 0"),
        ({"epsilon": math.nan}, "--epsilon is nan"),
        ({"delta_r": -1.0}, "--delta-r is -1.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_written(flags, match, pretrained, tmp_path):
    with refused(match):
        main(toy_args(pretrained=pretrained(), run_dir=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "PointMaze_UMaze-v3"])
def test_what_cannot_be_reset_is_refused_before_pretraining(env_id, pretraining):
    with refused(f"{env_id} is no MuJoCo environment to reset to a state"):
        main(toy_args(env_id=env_id))
    assert not pretraining


def test_a_run_goes_on_from_its_folder_and_from_the_checkpoint_in_it(whole, pretrained, tmp_path):
    run_dir = main(toy_args(iterations=2, pretrained=pretrained(), run_dir=str(tmp_path / "split")))
    resume(run_dir / "checkpoint.pt", "--iterations", 4)
    assert_same_run(run_dir, whole)


def test_a_run_of_pretrain_dt_is_not_resumed_by_this_script(pretrained):
    with refused("is a run of pretrain_dt.py: resume it with that script"):
        parse_args(["--resume", pretrained()])


@pytest.mark.parametrize("flag", ["--seed 3", "--l-traj 9", "--env-id Ant-v4", "--hindsight"])
def test_resuming_refuses_changed_arguments(flag, whole):
    with refused(f"was made with {flag.split()[0]} "):
        parse_args(["--resume", str(whole), *flag.split()])


def test_resuming_in_another_precision_is_refused(pretrained, tmp_path):
    run_dir = main(toy_args(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run")))
    content = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    content["precision"] = "torch.float16"
    torch.save(content, run_dir / "checkpoint.pt")
    with refused("the run began in torch.float16, here it is torch"):
        resume(run_dir, "--iterations", 2)


def test_a_folder_that_holds_a_run_is_refused(whole, pretrained):
    with refused("holds a run already: go on with --resume"):
        main(toy_args(pretrained=pretrained(), run_dir=str(whole)))


def test_the_command_prints_one_line_on_stderr_and_exits_with_1(whole):
    done = subprocess.run(
        [sys.executable, grpo.__file__, "--resume", str(whole), "--seed", "9"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]*--seed[^\n]*\n", done.stderr), done.stderr
