"""Groups, ratios, loss, reset points, rollouts and whole runs of grpo_dt_continuous.py at toy size."""

import contextlib
import copy
import csv
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import grpo_dt_continuous as grpo
import pretrain_dt
from grpo_dt_continuous import (
    COLUMNS,
    ROWS,
    Args,
    DecisionTransformer,
    GRPOLearner,
    Lamb,
    Simulators,
    Steps,
    SubTrajectories,
    Trajectory,
    action_variance,
    choose_points,
    collect,
    distribution,
    evaluate,
    fill_from_table,
    group_advantages,
    grpo_loss,
    hindsight_returns,
    importance_ratio,
    load_checkpoint,
    log_prob,
    main,
    make_env,
    parse_args,
    rollout,
    rollout_groups,
    windows,
)

SIZES = dict(embed_dim=16, n_layers=2, n_heads=2)
CONTEXTS = pytest.mark.parametrize("context", [1, 5])
RATIOS = pytest.mark.parametrize("ratio", ["sequence", "token", "geometric"])


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
    toy |= dict(kappa_initial=0.1, n_trajectories=1, eval_episodes=1, cuda=False, threads=1, workers=0)
    toy |= dict(reference_every=3)  # the 8 updates of an iteration end between two references
    return Args(**(toy | dict(embed_dim=16) | changes))


def words(args):
    """The command line that says `args`."""
    given = [(f"--{name.replace('_', '-')}", value) for name, value in vars(args).items() if value is not None]
    switches = [flag if value else f"--no-{flag[2:]}" for flag, value in given if isinstance(value, bool)]
    return switches + [each for flag, value in given if not isinstance(value, bool) for each in (flag, str(value))]


@contextlib.contextmanager
def refused(*named):
    """The block ends with `error: ...` on one line that names these, which Python prints with exit code 1."""
    with pytest.raises(SystemExit) as stop:
        yield
    line = str(stop.value)
    assert line.startswith("error: ") and "\n" not in line and all(name in line for name in named), line


def draw_model(obs_dim=11, act_dim=3, seed=0, **sizes):
    """A network that heeds all its inputs, returns at their own size, and whose actions are much at random."""
    torch.manual_seed(seed)
    model = DecisionTransformer(obs_dim, act_dim, **(SIZES | sizes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for head in (model.mean_head, model.log_std_head):
        head.weight.data *= 0.3
    model.log_std_head.bias.data += 0.3
    return model


def last_steps(context, observations, returns, actions):
    """The window of K steps, fewer at the start; actions: those before the last step."""
    return observations[-context:], returns[-context:], actions[max(0, len(actions) + 1 - context) :]


@torch.no_grad()
def law(model, observations, returns, actions):
    """The law of u (A,) at the last of these steps, in a window without padding. actions: of the steps before it."""
    unread = [*actions, np.full(model.act_dim, np.nan)]
    window = [torch.from_numpy(np.array(part, np.float32))[None] for part in (observations, returns, unread)]
    dist = model(*window, torch.ones(1, len(returns), dtype=torch.bool))
    return Normal(dist.mean[0].double(), dist.stddev[0].double())


# ---- Arguments ------------------------------------------------------------------------------------------------------

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
NAMES = ["n_batch", "c_online", "g_online", "l_traj", "l_eval", "gamma", "epsilon", "delta_r", "lr", "kappa_initial"]
NAMES += ["n_trajectories"]


def filled(env_id, kind, best=100.0, **given):
    args = Args(env_id=env_id, **given)
    fill_from_table(args, kind, best)
    return args


@pytest.mark.parametrize("env_id, kind, numbers", [(e, k, n) for e, k, *n in PRINTED], ids=lambda v: str(v)[:20])
def test_rows_are_those_of_the_papers_table_6(env_id, kind, numbers, capsys):
    args = filled(env_id, kind)
    assert {name: float(getattr(args, name)) for name in NAMES} == dict(zip(NAMES, map(float, numbers)))
    assert args.dataset_kind == kind
    assert len(PRINTED) == len(ROWS) and sorted(COLUMNS) == sorted(NAMES)
    printed = capsys.readouterr().out
    assert kind in printed and all(f"{name} {getattr(args, name):g}" in printed for name in NAMES)


@pytest.mark.parametrize("task", ["Hopper-v5", "Walker2d-v5", "Ant-v4"])
def test_medium_replay_shares_the_row_of_medium(task):
    replay, medium = filled(task, "medium-replay"), filled(task, "medium")
    assert replay.dataset_kind == "medium-replay"
    assert all(getattr(replay, name) == getattr(medium, name) for name in NAMES)


def test_random_data_of_adroit_and_antmaze_take_cloned_and_umaze():
    for task, kind in (("AdroitHandDoor-v1", "cloned"), ("AntMaze_UMaze-v4", "umaze")):
        random, row = filled(task, "random"), filled(task, kind)
        assert all(getattr(random, name) == getattr(row, name) for name in NAMES)


@pytest.mark.parametrize("best, g_online", [(1500.0, 3000.0), (-40.0, 0.0)])
def test_a_task_outside_the_table_takes_hoppers_row_and_twice_the_best_return(best, g_online, capsys):
    args = filled("HalfCheetah-v5", "medium", best)
    assert "outside the table" in capsys.readouterr().out
    hopper = filled("Hopper-v5", "medium")
    assert args.g_online == g_online
    assert all(getattr(args, name) == getattr(hopper, name) for name in NAMES if name != "g_online")


def test_flags_override_the_row_and_a_given_kind_that_of_the_checkpoint():
    args = filled("Ant-v4", "medium", dataset_kind="random", l_traj=7, delta_r=0.0, g_online=-5.0)
    assert (args.l_traj, args.delta_r, args.g_online, args.l_eval) == (7, 0.0, -5.0, 200)
    assert (args.dataset_kind, args.kappa_initial) == ("random", 0.20)


def test_help_shows_the_comment_and_the_default_of_every_field():
    env = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, grpo.__file__, "--help"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = " ".join(re.sub(r"[^\x20-\x7e]", " ", done.stdout).split())
    source = Path(grpo.__file__).read_text().split("class Args:")[1].split("\n# Table 6")[0]
    fields = dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", source, re.M))
    assert list(fields) == list(vars(Args()))
    for name, comment in fields.items():
        flag, default = "--" + name.replace("_", "-"), getattr(Args(), name)
        assert f" {flag}" in shown and " ".join(comment.split()) in shown, name
        after = shown.split(" ".join(comment.split()), 1)[1]
        assert after.startswith(f" (default: {default}"), (name, after[:40])


# ---- Advantages -----------------------------------------------------------------------------------------------------


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
    assert not group_advantages(np.array([5e3, 5e3 + 1e-9] * 2), 4, 0.0)[1].any()  # rounding is no reward


def test_the_order_of_groups_and_members_does_not_matter():
    rng = np.random.default_rng(1)
    scores, groups = rng.normal(size=(6, 4)), rng.permutation(6)
    members = rng.permuted(np.tile(np.arange(4), (6, 1)), axis=1)
    one = [each.reshape(6, 4) for each in group_advantages(scores.ravel(), 4, 0.3)]
    shuffled = np.take_along_axis(scores[groups], members, 1)
    other = [each.reshape(6, 4) for each in group_advantages(shuffled.ravel(), 4, 0.3)]
    for ours, theirs in zip(one, other):
        np.testing.assert_allclose(np.take_along_axis(ours[groups], members, 1), theirs, rtol=1e-12)


# ---- Ratio and loss -------------------------------------------------------------------------------------------------

LOG_RATIO = torch.tensor([[0.1, -0.3, 0.5], [0.2, 0.4, 9.0], [-0.7, 7.0, -8.0]])
REAL = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


def test_ratio_of_a_sub_trajectory_is_the_product_over_its_real_steps():
    ratio = importance_ratio(LOG_RATIO, REAL, "sequence")
    torch.testing.assert_close(ratio, torch.tensor([[0.3], [0.6], [-0.7]]).exp())


def test_geometric_mean_is_over_the_real_steps():
    ratio = importance_ratio(LOG_RATIO, REAL, "geometric")
    torch.testing.assert_close(ratio, torch.tensor([[0.1], [0.3], [-0.7]]).exp())


def test_token_ratio_is_one_per_step_and_1_where_there_is_none():
    ratio = importance_ratio(LOG_RATIO, REAL, "token")
    torch.testing.assert_close(ratio, torch.where(REAL, LOG_RATIO, 0.0).exp())


def test_the_three_ratios_agree_at_one_step():
    log_ratio, real = torch.linspace(-2, 2, 5)[:, None], torch.ones(5, 1, dtype=torch.bool)
    one, *others = (importance_ratio(log_ratio, real, kind) for kind in ("sequence", "token", "geometric"))
    assert all(torch.equal(one, other) for other in others)
    torch.testing.assert_close(one, log_ratio.exp())


def test_the_log_ratio_is_kept_within_20_after_the_sum():
    real = torch.ones(3, 2, dtype=torch.bool)
    log_ratio = torch.tensor([[60.0, 40.0], [-60.0, -40.0], [30.0, -29.0]])
    ratio = importance_ratio(log_ratio, real, "sequence")
    torch.testing.assert_close(ratio.log(), torch.tensor([[20.0], [-20.0], [1.0]]))
    torch.testing.assert_close(importance_ratio(log_ratio, real, "geometric").log()[2], torch.tensor([0.5]))
    torch.testing.assert_close(importance_ratio(log_ratio, real, "token").log(), log_ratio.sign() * 20)


@torch.no_grad()
def draw_sub(model, rows=6, steps=3, context=2, seed=0):
    """Random sub-trajectories of which some end early and some begin at the start of an episode, with `model` as the
    policy that acted."""
    torch.manual_seed(seed)
    obs_dim, act_dim, width = len(model.obs_mean), model.act_dim, context - 1 + steps
    real = torch.arange(width) < context - 1 + torch.tensor([steps, 2, 1] * rows)[:rows, None]
    real[::2, : context - 1] = False
    returns = 3 * torch.randn(rows, width)
    observations, actions = torch.randn(rows, width, obs_dim), torch.rand(rows, width, act_dim) * 1.9 - 0.95
    u, advantage = torch.randn(rows, steps, act_dim), torch.linspace(-2, 2, rows)
    sub = SubTrajectories(observations, returns, actions, real, u, advantage, torch.zeros(rows, steps))
    dist = distribution(model, sub)
    sub = sub._replace(u=dist.mean + dist.stddev * u)
    return sub._replace(old_log_prob=log_prob(dist, sub.u))


def sampled(sub):
    """Which of the sampled steps were lived: (B, L)."""
    return sub.real[:, -sub.u.shape[1] :]


@pytest.mark.parametrize("value, advantage, moves", [(1.3, 1, 0), (0.7, -1, 0), (0.7, 1, 1), (1.3, -1, 1), (1.1, 1, 1)])
@RATIOS
def test_there_is_no_gradient_where_the_clipped_branch_is_the_smaller(value, advantage, moves, ratio):
    model, args = draw_model(4, 2), toy_args(beta=0.0, epsilon=0.2, ratio=ratio)
    sub = draw_sub(model, rows=1)
    shift = math.log(value) / (sampled(sub).sum().item() if ratio == "sequence" else 1)
    sub = sub._replace(old_log_prob=sub.old_log_prob - shift, advantage=torch.tensor([float(advantage)]))
    loss, values = grpo_loss(model, model, sub, torch.tensor(0.0), args)
    assert values["ratio_mean"].item() == pytest.approx(value, abs=1e-5)
    bound = value if moves else 1 + 0.2 * advantage
    assert loss.item() == pytest.approx(-bound * advantage, abs=1e-5)
    loss.backward()
    steepest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert steepest > 1e-3 if moves else steepest == 0.0
    assert values["clip_fraction"].item() == (abs(value - 1) > 0.2)


def laws(model, sub):
    """Normal laws before tanh of each row and lived step, one window at a time without its padding."""
    rows, steps, _ = sub.u.shape
    context, found = sub.real.shape[1] - steps + 1, {}
    for i in range(rows):
        for h in (h for h in range(steps) if sampled(sub)[i, h]):
            seen = [j for j in range(h, h + context) if sub.real[i, j]]
            parts = sub.observations[i, seen], sub.returns[i, seen], sub.actions[i, seen[:-1]]
            found[i, h] = law(model, *(part.numpy() for part in parts))
    return found


@pytest.mark.parametrize("context", [1, 2, 3])
@RATIOS
@torch.no_grad()
def test_loss_equals_equation_3_written_out(ratio, context):
    """At context 3 the returns of the buffer are others than those that the old policy saw, as under --hindsight."""
    old, model, reference = draw_model(4, 2), draw_model(4, 2), draw_model(4, 2, seed=2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    args, kappa = toy_args(beta=0.3, epsilon=0.1, ratio=ratio), 0.7
    acted = draw_sub(old, rows=18, context=context)
    sub = acted._replace(returns=acted.returns + (0.1 * torch.randn_like(acted.returns) if context == 3 else 0.0))
    torch.manual_seed(5)
    noise = torch.randn(sub.u.shape)
    new, before, anchor = laws(model, sub), laws(old, acted), laws(reference, sub)
    surrogates, kls, entropies, ratios = [], [], [], []
    for i in range(len(sub.u)):
        steps, advantage = [h for h in range(sub.u.shape[1]) if sampled(sub)[i, h]], sub.advantage[i].item()
        log_ratios = []
        for h in steps:
            ours, theirs = (each[i, h].log_prob(sub.u[i, h].double()).sum().item() for each in (new, before))
            log_ratios.append(ours - theirs)  # the slope of tanh is in both
            kls.append(kl_divergence(new[i, h], anchor[i, h]).sum().item())
            sample = new[i, h].mean + new[i, h].stddev * noise[i, h]
            squashed = TransformedDistribution(new[i, h], TanhTransform())
            entropies.append(-squashed.log_prob(sample.tanh()).sum().item())
        if ratio == "token":
            own = [math.exp(each) for each in log_ratios]
        else:
            own = [math.exp(sum(log_ratios) / (len(steps) if ratio == "geometric" else 1))]
        terms = [min(r * advantage, max(0.9, min(1.1, r)) * advantage) for r in own]
        surrogates.append(sum(terms) / len(terms))
        ratios += own
    expected = -(np.mean(surrogates) - 0.3 * np.mean(kls) + kappa * np.mean(entropies))
    torch.manual_seed(5)
    loss, values = grpo_loss(model, reference, sub, torch.tensor(kappa), args)
    assert min(ratios) < 0.9 and max(ratios) > 1.1  # both sides are clipped somewhere
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    logged = {"loss": expected, "surrogate": surrogates, "kl": kls, "entropy": entropies, "ratio_mean": ratios}
    logged["clip_fraction"] = [abs(each - 1) > 0.1 for each in ratios]
    for name, value in logged.items():
        assert values[name].item() == pytest.approx(np.mean(value), rel=1e-3), name
    assert values["ratio_max"].item() == pytest.approx(max(ratios), rel=1e-3)


def test_steps_after_the_end_and_padding_do_not_touch_the_loss():
    model = draw_model(4, 2)
    sub = draw_sub(model)
    garbage = {"u": 5.0, "observations": 3.0, "returns": -9.0, "actions": 0.9, "old_log_prob": 4.0}
    other = sub._replace(**{name: getattr(sub, name).clone() for name in garbage})
    for name, value in garbage.items():
        field = getattr(other, name)
        field[~(sampled(sub) if field.shape[1] == sub.u.shape[1] else sub.real)] = value
    for ratio in ("sequence", "token", "geometric"):
        losses, args = [], toy_args(beta=0.3, ratio=ratio)
        for each in (sub, other):
            torch.manual_seed(0)
            losses.append(grpo_loss(model, draw_model(4, 2, seed=3), each, torch.tensor(0.2), args)[0].item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_log_prob_is_the_density_of_the_squashed_action():
    dist, u = Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 1.2])), torch.tensor([[0.2, 0.4], [-1.0, 2.0]])
    expected = TransformedDistribution(dist, TanhTransform()).log_prob(u.tanh()).sum(-1)
    torch.testing.assert_close(log_prob(dist, u), expected, rtol=1e-4, atol=1e-4)
    assert log_prob(dist, torch.tensor([[40.0, -40.0]])).isfinite().all()
    assert grpo.squash(torch.tensor([-40.0, 0.5, 40.0])).tolist() == pytest.approx([1e-6 - 1, math.tanh(0.5), 1 - 1e-6])
    assert grpo.squash(torch.tensor(40.0)) < 1


# ---- Reset points ---------------------------------------------------------------------------------------------------


def numbered(index, length, context=1):
    """A trajectory whose entries tell where they stand."""
    steps = np.concatenate([np.zeros(context - 1), 100.0 * index + np.arange(length)])
    observations, actions = np.stack([steps] * 2, 1).astype(np.float32), np.stack([steps / 1e4] * 2, 1)
    snapshots = np.stack([np.full(length, index), np.arange(length)], 1).astype(float)
    real = np.arange(context - 1 + length) >= context - 1
    returns = np.where(real, 1000 - steps, 0).astype(np.float32)
    return Trajectory(observations, returns, actions.astype(np.float32), real, np.ones(length), snapshots)


def members_of(replay, variance, **flags):
    """(trajectory, step) of the N members, when the policy's variance is `variance(trajectory)`."""
    with mock.patch.object(grpo, "action_variance", lambda policy, trajectory, context: variance(trajectory)):
        members = choose_points(None, replay, toy_args(**flags), np.random.default_rng(1))
    return np.array([trajectory.snapshots[h] for trajectory, h in members]).astype(int)


def drawn(replay, variance, **flags):
    """(trajectory, step) of the points, each of which is that of a whole group."""
    size = flags.setdefault("group_size", 2)
    members = members_of(replay, variance, **flags).reshape(-1, size, 2)
    assert (members == members[:, :1]).all()
    return members[:, 0]


def assert_frequencies(counts, probabilities):
    """Within 5 standard deviations of binomial counts."""
    n, p = counts.sum(), np.asarray(probabilities)
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-9).all(), (counts / n, p)


def test_points_are_drawn_by_the_softmax_of_the_variance():
    logits = np.array([0.0, 1.0, -1.0, 2.0, 1.5])
    found = drawn([numbered(0, 5)], lambda t: logits, n_sources=6000, n_points=1)
    assert_frequencies(np.bincount(found[:, 1], minlength=5), np.exp(logits) / np.exp(logits).sum())


def test_points_of_a_trajectory_are_drawn_one_after_the_other_without_replacement():
    logits = np.array([0.0, 1.0, 2.0])
    found = drawn([numbered(0, 3)], lambda t: logits, n_sources=6000, n_points=2)
    p = np.exp(logits) / np.exp(logits).sum()
    pairs = found[:, 1].reshape(-1, 2)
    expected = [[p[i] * p[j] / (1 - p[i]) if i != j else 0.0 for j in range(3)] for i in range(3)]
    assert_frequencies(np.bincount(3 * pairs[:, 0] + pairs[:, 1], minlength=9), np.ravel(expected))


def test_a_variance_of_54_still_leaves_as_many_points_as_asked():
    found = drawn([numbered(0, 6)], lambda t: np.array([54.0] + [0.0] * 5), n_sources=50, n_points=4)
    assert all(len(set(steps)) == 4 and 0 in steps for steps in found[:, 1].reshape(50, 4).tolist())


def test_trajectories_are_drawn_in_proportion_to_their_length():
    replay = [numbered(0, 2), numbered(1, 6), numbered(2, 12)]
    found = drawn(replay, lambda t: np.zeros(len(t.rewards)), n_sources=6000, n_points=1)
    assert_frequencies(np.bincount(found[:, 0], minlength=3), [0.1, 0.3, 0.6])


def test_random_points_are_uniform_whatever_the_variance():
    flags = dict(n_sources=6000, n_points=1, random_points=True)
    found = drawn([numbered(0, 4)], lambda t: np.array([0.0, 9.0, 0.0, 0.0]), **flags)
    assert_frequencies(np.bincount(found[:, 1], minlength=4), [0.25] * 4)


def test_a_trajectory_shorter_than_the_number_of_points_repeats_its_own():
    found = drawn([numbered(0, 3)], lambda t: np.zeros(3), n_sources=5, n_points=4)
    for steps in found[:, 1].reshape(5, 4).tolist():
        assert set(steps) == {0, 1, 2} and steps[3] == steps[0]
    assert drawn([numbered(0, 1)], lambda t: np.zeros(1), n_points=4)[:, 1].tolist() == [0] * 8


def test_full_trajectories_start_at_their_first_step():
    found = drawn([numbered(0, 9)], lambda t: np.zeros(9), full_trajectories=True)
    assert found[:, 1].tolist() == [0, 0, 0, 0]


def test_mixed_groups_have_a_point_for_each_member():
    found = members_of([numbered(0, 30), numbered(1, 30)], lambda t: np.zeros(30), mixed_groups=True, n_sources=4)
    assert found.shape == (32, 2)
    groups, points = found.reshape(8, 4, 2).tolist(), [tuple(each) for each in found.tolist()]
    assert all(len({tuple(member) for member in group}) > 1 for group in groups)
    assert any(len({trajectory for trajectory, _ in group}) > 1 for group in groups)  # not one source after the other
    counts = [points.count(point) for point in set(points)]
    assert len(counts) >= 16 and max(counts) <= 4  # 2 points x 4 members of each source, without replacement


def test_other_draws_give_other_points():
    replay, args = [numbered(0, 50)], toy_args(random_points=True)
    found = [[h for _, h in choose_points(None, replay, args, np.random.default_rng(i))] for i in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_windows_are_every_run_of_k_steps_in_order():
    steps = torch.arange(10.0).reshape(2, 5)
    assert windows(steps, 3).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [5, 6, 7], [6, 7, 8], [7, 8, 9]]
    assert windows(steps, 1).tolist() == [[float(i)] for i in range(10)]
    vectors = torch.stack([steps, -steps], dim=-1)  # (2, 5, 2)
    assert torch.equal(windows(vectors, 3)[..., 1], -windows(steps, 3))
    assert windows(vectors, 3).shape == (6, 3, 2)


@pytest.mark.parametrize("context", [1, 3])
def test_variance_is_the_mean_over_dimensions_before_tanh_of_each_step(context):
    policy, rng = draw_model(4, 2), np.random.default_rng(0)
    length = context - 1 + 40
    trajectory = numbered(0, 40, context)._replace(
        observations=rng.normal(size=(length, 4)).astype(np.float32),
        returns=rng.normal(size=length).astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, size=(length, 2)).astype(np.float32),
    )
    variance = action_variance(policy, trajectory, context)
    assert variance.shape == (40,)
    for h in range(40):
        seen = slice(max(context - 1, h), h + context)  # without the padding
        dist = law(policy, trajectory.observations[seen], trajectory.returns[seen], trajectory.actions[seen][:-1])
        assert variance[h] == pytest.approx((dist.stddev**2).mean().item(), rel=1e-4)
    assert variance.std() > 1e-3


# ---- Rollouts -------------------------------------------------------------------------------------------------------


class Rail:
    """Simulators of a made-up task: an action moves a cart along a rail, for 10 times the way; beyond 2 its episode
    ends, below -2 it is cut."""

    def __init__(self, positions):
        self.states = np.array(positions, float)[:, None]

    def step(self, rows, actions):
        self.states[rows] += actions
        x = self.states[rows, 0]
        return x[:, None].copy(), 10.0 * actions[:, 0].astype(np.float64), x > 2.0, x < -2.0


class Driver:
    """A policy on the rail, which heeds all of the window but the last action."""

    act_dim, obs_mean = 1, torch.zeros(1)

    @staticmethod
    def mean(observations, returns, actions):
        """Of the law of u, from the lists of what is real."""
        return 0.3 * sum(observations) + 0.02 * sum(returns) + 0.4 * sum(actions) + 0.1 * len(returns)

    def __call__(self, observations, returns, actions, real):
        mean = 0.3 * (observations[..., 0] * real).sum(1) + 0.02 * (returns * real).sum(1)
        mean = mean + 0.4 * (actions[..., 0] * real)[:, :-1].sum(1) + 0.1 * real.sum(1)
        return Normal(mean[:, None], torch.full_like(mean[:, None], 0.5))

    def conditioned_on(self, observations, returns, actions, real):
        return returns


def past_on_the_rail(context):
    """The K - 1 steps before, for 5 rows: row i has i of them, the others are padding. Observation, return, action."""
    rng = np.random.default_rng(2)
    shape = (5, context - 1)
    real = np.arange(context - 1) >= context - 1 - np.arange(5)[:, None]
    fields = [rng.normal(size=shape) for _ in range(3)]
    observations, returns, actions = (np.where(real, field, 0.0).astype(np.float32) for field in fields)
    return [observations[..., None], returns, actions[..., None], real]


@pytest.mark.parametrize("context", [1, 3])
def test_rollout_is_what_a_loop_over_rows_and_steps_plays(context):
    starts, g, last = [0.1, -0.4, 1.6, -1.7, 0.0], np.array([3.0, -2.0, 5.0, -60.0, 0.5]), np.array([7, 2, 7, 7, 1])
    noise, rail = np.random.default_rng(0).standard_normal((5, 3, 1), dtype=np.float32), Rail(starts)
    past, given = past_on_the_rail(context), [np.array(starts)[:, None], g, noise, last]
    before = copy.deepcopy([given, past])
    steps = rollout(Driver(), rail, *given, past, context, snapshots=True)
    for ours, theirs in zip(before[0] + before[1], given + past):  # the caller's arrays stay as they are
        np.testing.assert_array_equal(ours, theirs)
    front, ends = context - 1, []
    assert steps.real.shape == (5, front + 7) and steps.u.shape == (5, 7, 1)
    for i in range(5):
        observations, returns, actions = ([*field[i][past[3][i]].ravel().tolist()] for field in past[:3])
        x, now, played, terminated = starts[i], g[i], 0, False
        for t in range(last[i]):
            observations.append(x)
            returns.append(now)
            mean = Driver.mean(*last_steps(context, observations, returns, actions))
            u = mean + (0.5 * noise[i, t, 0] if t < 3 else 0.0)
            actions.append(math.tanh(u))
            at = [steps.observations[i, front + t, 0], steps.returns[i, front + t], steps.actions[i, front + t, 0]]
            at += [steps.u[i, t, 0], steps.rewards[i, t], steps.snapshots[i, t, 0]]
            np.testing.assert_allclose(at, [x, now, actions[-1], u, 10 * actions[-1], x], atol=1e-4)
            x, now, played, terminated = x + actions[-1], now - 10 * actions[-1], t + 1, x + actions[-1] > 2
            if terminated or x < -2:
                break
        ends.append((played, terminated))
        assert steps.real[i].tolist() == [*past[3][i].tolist()] + [True] * played + [False] * (7 - played)
        for field, offset in ((steps.observations, front), (steps.returns, front), (steps.actions, front)):
            assert not field[i, offset + played :].any()
        assert not steps.rewards[i, played:].any() and not steps.u[i, played:].any()
        assert steps.terminated[i] == terminated
        np.testing.assert_allclose([steps.last_observation[i, 0], rail.states[i, 0]], x, atol=1e-4)
    for field, earlier in zip(steps, past):
        np.testing.assert_array_equal(field[:, :front], earlier)
    assert [played for played, _ in ends][1] == 2 and [played for played, _ in ends][4] == 1  # `last`
    assert {ended for _, ended in ends} == {True, False} and (steps.last_observation < -2).any()  # ended, cut
    assert steps.returns.min() < 0 < steps.returns.max()  # g is not clamped


def test_rollout_without_a_past_has_padding_before_it_and_no_snapshots_unless_asked():
    given = np.zeros((2, 1)), np.ones(2), np.zeros((2, 0, 1), np.float32), np.array([3, 3])
    steps = rollout(Driver(), Rail([0.0, 0.5]), *given, context=4)
    assert steps.snapshots.shape == (2, 0, 0)
    assert not steps.real[:, :3].any() and not steps.observations[:, :3].any() and not steps.returns[:, :3].any()
    padding = [np.zeros((2, 3, 1)), np.zeros((2, 3)), np.zeros((2, 3, 1)), np.zeros((2, 3), bool)]
    for ours, theirs in zip(steps, rollout(Driver(), Rail([0.0, 0.5]), *given, padding, context=4)):
        np.testing.assert_array_equal(ours, theirs)


def test_rollout_keeps_the_return_that_the_action_was_conditioned_on():
    """A policy that puts a return of its own in place sees it in the windows that follow."""

    class Predicts(Driver):
        def conditioned_on(self, observations, returns, actions, real):
            windows.append(returns.tolist())
            return torch.cat([returns[:, :-1], returns[:, -1:] + 100], dim=1)

    windows = []
    given = np.zeros((1, 1)), np.ones(1), np.zeros((1, 0, 1), np.float32), np.array([3])
    steps = rollout(Predicts(), Rail([0.0]), *given, context=2)
    asked = 1 - np.concatenate([[0.0], steps.rewards[0].cumsum()[:-1]])  # falls by the rewards from what was asked for
    np.testing.assert_allclose(steps.returns[0, 1:], asked + 100, atol=1e-4)
    expected = [[0, asked[0]], [asked[0] + 100, asked[1]], [asked[1] + 100, asked[2]]]
    np.testing.assert_allclose(np.array(windows)[:, 0], expected, atol=1e-4)


def roll(width=16, bf16=False, **flags):
    """Two full trajectories, points in them and a rollout of groups, all with one random network."""
    args = toy_args(**flags)
    env = make_env(args.env_id, {})
    model = draw_model(*env.observation_space.shape, *env.action_space.shape, embed_dim=width)
    model.bf16 = bf16
    sims = Simulators(env, args.n_sources * args.n_points * args.group_size, 0)
    rng, draw, noise = np.random.default_rng([args.seed, 1]), grpo.draw_noise, []
    with mock.patch.object(grpo, "draw_noise", lambda *given: noise.append(draw(*given)) or noise[-1]):
        replay = collect(model, sims, 2, args, rng)
        members = choose_points(model, replay, args, rng)
        before = copy.deepcopy(replay)
        steps, scores = rollout_groups(model, sims, members, args, rng)
    for ours, theirs in zip(before, replay):  # a rollout leaves its sources as they are
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs))
    lived = steps.real[:, args.c_online - 1 :].sum(1)
    return types.SimpleNamespace(**{name: value for name, value in locals().items() if name not in ("env", "rng")})


def play(env_id, model, seed, g, context, noise):
    """An episode alone in gymnasium, sampled with noise (T, A) and by the mean action after that: rewards, returns."""
    env = make_env(env_id, {})
    observation, _ = env.reset(seed=seed)
    observations, returns, actions, rewards, ended = [observation], [g], [], [], False
    while not ended:
        dist = law(model, *last_steps(context, observations, returns, actions))
        h = len(actions)
        u = dist.mean + dist.stddev * torch.from_numpy(noise[h]) if h < len(noise) else dist.mean
        actions.append(np.tanh(u.numpy()).astype(np.float32))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        returns.append(returns[-1] - reward)
        ended = terminated or truncated
    return np.array(rewards), np.array(returns[:-1])


@pytest.mark.parametrize("env_id, context", [("Hopper-v5", 1), ("Hopper-v5", 5), ("Reacher-v5", 3)])
def test_full_trajectories_are_those_of_playing_each_alone(env_id, context):
    """Hopper falls, Reacher runs into its limit of 50 steps."""
    env, args = make_env(env_id, {}), toy_args(env_id=env_id, c_online=context, g_online=3.0)
    model, noise = draw_model(*env.observation_space.shape, *env.action_space.shape), []
    sims, draw = Simulators(env, 3, 0), grpo.draw_noise
    with (
        mock.patch.object(sims, "reset", wraps=sims.reset) as reset,
        mock.patch.object(grpo, "draw_noise", lambda *given: noise.append(draw(*given)) or noise[-1]),
    ):
        trajectories = collect(model, sims, 3, args, np.random.default_rng(4))
    seeds = reset.call_args.args[0].tolist()
    assert len(set(seeds)) == len(trajectories) == 3
    for trajectory, seed, own in zip(trajectories, seeds, noise[0]):
        rewards, returns = play(env_id, model, seed, 3.0, context, own)
        np.testing.assert_allclose(trajectory.rewards, rewards, atol=1e-3)
        np.testing.assert_allclose(trajectory.returns[context - 1 :], returns, atol=1e-3)
        steps = len(rewards)
        assert trajectory.real.tolist() == [False] * (context - 1) + [True] * steps
        for field in trajectory[:3]:
            assert len(field) == context - 1 + steps and not field[: context - 1].any()
    if env_id == "Reacher-v5":
        assert {len(trajectory.rewards) for trajectory in trajectories} == {50}
    else:
        assert len({len(trajectory.rewards) for trajectory in trajectories}) > 1  # of different lengths, side by side
        assert min(trajectory.returns[-1] for trajectory in trajectories) < 0  # not clamped


@CONTEXTS
def test_full_trajectories_fall_by_each_reward_and_replay_from_their_snapshots(context):
    rolled, row = roll(c_online=context, g_online=3.0), np.array([1])
    for trajectory in rolled.replay:
        steps, front = len(trajectory.rewards), context - 1
        assert len(trajectory.snapshots) == steps > 5
        g = 3.0 - np.concatenate([[0.0], trajectory.rewards.cumsum()[:-1]])
        np.testing.assert_allclose(trajectory.returns[front:], g, atol=1e-4)
        for first in (0, steps // 2):
            rolled.sims.states[row] = trajectory.snapshots[first]
            for h in range(first, steps):
                observation, reward, terminated, _ = rolled.sims.step(row, trajectory.actions[front + h][None])
                assert abs(reward[0] - trajectory.rewards[h]) < 1e-9
                assert terminated[0] == (h == steps - 1)
                if h + 1 < steps:
                    np.testing.assert_allclose(observation[0], trajectory.observations[front + h + 1], atol=1e-5)


@pytest.mark.parametrize("env_id, context", [("Hopper-v5", 1), ("Reacher-v5", 3)])
def test_evaluations_are_those_of_playing_each_episode_alone(env_id, context):
    env, args = make_env(env_id, {}), toy_args(env_id=env_id, c_online=context, eval_episodes=3)
    model, sims = draw_model(*env.observation_space.shape, *env.action_space.shape), Simulators(env, 3, 0)
    with mock.patch.object(sims, "reset", wraps=sims.reset) as reset:
        row = evaluate(model, sims, args, 4)
    rewards = [play(env_id, model, seed, 3.0, context, [])[0] for seed in reset.call_args.args[0].tolist()]
    returns = [each.sum() for each in rewards]
    assert len({*returns}) == 3
    assert row["eval/return_mean"] == pytest.approx(np.mean(returns), abs=1e-3)
    assert row["eval/return_std"] == pytest.approx(np.std(returns), abs=1e-3)
    assert row["eval/length_mean"] == np.mean([len(each) for each in rewards])
    if env_id == "Hopper-v5":
        score = 100 * (np.mean(returns) + 20.272305) / (3234.3 + 20.272305)  # D4RL's
        assert row["eval/normalized_score"] == pytest.approx(score, abs=1e-3)
    else:
        assert math.isnan(row["eval/normalized_score"])
    again, later = evaluate(model, sims, args, 4), evaluate(model, sims, args, 5)
    assert again["eval/return_mean"] == row["eval/return_mean"] != later["eval/return_mean"]


def play_member(rolled, row):
    """Sub-trajectory `row` again in gymnasium's own environment, one step at a time, with the recorded noise and then
    the mean action: discounted score, length, and the windows and u of the sampled steps."""
    args, (trajectory, first) = rolled.args, rolled.members[row]
    past = args.c_online - 1  # padding before the first step
    env = make_env(args.env_id, {})
    env.reset(seed=0)
    nq, nv = env.unwrapped.model.nq, env.unwrapped.model.nv
    snapshot = trajectory.snapshots[first]  # time, positions, velocities, ...
    env.unwrapped.set_state(snapshot[1 : 1 + nq], snapshot[1 + nq : 1 + nq + nv])
    observations, returns, actions = (list(field[past : past + first + 1]) for field in trajectory[:3])
    actions.pop()
    g, score, played = float(returns[-1]), 0.0, []
    for k in range(args.l_traj + args.l_eval):
        window = last_steps(args.c_online, observations, returns, actions)
        dist = law(rolled.model, *window)
        u = dist.mean.numpy()
        if k < args.l_traj:
            u = u + dist.stddev.numpy() * rolled.noise[1][row, k]
            played.append((*window, u))
        actions.append(np.tanh(u).astype(np.float32))
        observation, reward, terminated, _, _ = env.step(actions[-1])
        score, g = score + args.gamma**k * reward, g - reward
        observations.append(observation)
        returns.append(g)
        if terminated:
            break
    return score, k + 1, played


@pytest.mark.parametrize("context", [1, 3])
def test_scores_windows_and_ends_are_those_of_playing_each_sub_trajectory_alone(context):
    rolled = roll(c_online=context, l_traj=6, l_eval=12, random_points=True, n_sources=3, n_points=3)
    steps, ended = rolled.steps, 0
    assert len(rolled.scores) == len(rolled.members) == 36
    for row in range(36):
        score, length, played = play_member(rolled, row)
        assert rolled.scores[row] == pytest.approx(score, abs=1e-3)
        assert rolled.lived[row] == length
        ended += length < 6
        for k, (observations, returns, actions, u) in enumerate(played):
            real = len(returns)
            assert steps.real[row, k : k + context].tolist() == [False] * (context - real) + [True] * real
            seen = slice(k + context - real, k + context)
            np.testing.assert_allclose(steps.observations[row, seen], observations, atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(steps.returns[row, seen], returns, atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(steps.actions[row, seen][:-1], np.reshape(actions, (real - 1, 3)), atol=1e-4)
            np.testing.assert_allclose(steps.u[row, k], u, atol=1e-3)
    assert 0 < ended < 36
    assert steps.returns[steps.real].min() < 0 < steps.returns[steps.real].max()  # g is not clamped
    assert len({h for _, h in rolled.members}) > 3


@CONTEXTS
def test_members_of_a_group_start_from_the_same_window_and_part_ways(context):
    rolled = roll(c_online=context, n_sources=3)
    for group in range(6):
        (trajectory, h), *others = rolled.members[4 * group : 4 * group + 4]
        assert all(other is trajectory and step == h for other, step in others)
        for ours, theirs, name in zip(rolled.steps, trajectory[:4], Steps._fields):
            seen = context - 1 if name == "actions" else context  # the action is new
            for member in range(4 * group, 4 * group + 4):
                np.testing.assert_array_equal(ours[member, :seen], theirs[h : h + seen])
        members = slice(4 * group, 4 * group + 4)
        assert len(set(rolled.steps.u[members, 0, 0].tolist())) == len(set(rolled.scores[members])) == 4


def test_where_all_fall_before_l_traj_the_rest_is_no_step():
    rolled = roll(l_traj=80, l_eval=3, random_points=True, seed=2)
    assert rolled.lived.max() < 80 and rolled.steps.u.shape[1] == 83
    real = rolled.steps.real
    assert all(row.tolist() == [True] * length + [False] * (83 - length) for row, length in zip(real, rolled.lived))
    assert not rolled.steps.u[~real].any() and rolled.steps.terminated.all()
    learner = remembered(rolled, 0)
    assert learner.buffer.u.shape[1] == 80 and sampled(learner.buffer).sum(1).tolist() == rolled.lived.tolist()


def test_the_time_limit_does_not_end_sub_trajectories():
    rolled = roll(env_id="Reacher-v5", l_traj=3, l_eval=17, n_sources=4, random_points=True)
    assert max(h for _, h in rolled.members) > 40  # of 50
    assert (rolled.lived == 20).all() and not rolled.steps.terminated.any()


def remembered(rolled, drop=3):
    """A learner with all sub-trajectories but the last `drop` in its buffer."""
    learner, n = GRPOLearner(rolled.model, rolled.args), len(rolled.scores)
    keep, args = np.arange(n) < n - drop, rolled.args
    reached = hindsight_returns(rolled.steps, rolled.members, rolled.sims.limit, args) if args.hindsight else None
    learner.remember(rolled.steps, np.linspace(-1, 1, n), keep, reached)
    assert len(learner.buffer.u) == n - drop
    return learner


@CONTEXTS
@torch.no_grad()
def test_the_updates_forward_sees_the_law_that_the_rollout_sampled_from(context):
    rolled = roll(c_online=context, l_traj=6, n_sources=4, buffer_size=64)
    sub = remembered(rolled, 0).buffer
    dist = distribution(rolled.model, sub)
    recovered = (sub.u - dist.mean) / dist.stddev
    torch.testing.assert_close(
        recovered[sampled(sub)], torch.from_numpy(rolled.noise[1])[sampled(sub)], atol=2e-3, rtol=0
    )


@CONTEXTS
def test_the_buffer_keeps_the_last_ones_and_their_sampled_steps(context):
    rolled = roll(c_online=context, buffer_size=5, n_batch=2, n_sources=2, random_points=True)
    learner, advantages, steps = GRPOLearner(rolled.model, rolled.args), np.arange(16.0), rolled.steps
    width = context - 1 + 4  # of the K - 1 + L_traj + L_eval steps
    for kept, stay in (([0, 1, 2], [0, 1, 2]), ([3, 5, 6], [1, 2, 3, 5, 6]), (range(16), range(11, 16))):
        learner.remember(steps, advantages, np.isin(np.arange(16), list(kept)))
        buffer, stay = learner.buffer, list(stay)
        assert buffer.advantage.tolist() == stay
        assert buffer.u.untyped_storage().nbytes() == buffer.u.nbytes  # no view, which would keep and save all
        for name in ("observations", "returns", "actions", "real"):
            np.testing.assert_array_equal(getattr(buffer, name).numpy(), getattr(steps, name)[stay, :width])
        np.testing.assert_array_equal(buffer.u.numpy(), steps.u[stay, :4])
        for (i, h), each in laws(rolled.model, buffer).items():
            slope = torch.log1p(-(torch.tanh(buffer.u[i, h].double()) ** 2)).sum()
            expected = each.log_prob(buffer.u[i, h].double()).sum() - slope
            assert buffer.old_log_prob[i, h].item() == pytest.approx(expected.item(), abs=1e-3)


@torch.no_grad()
def ratios(learner, sub):
    log_ratio = log_prob(distribution(learner.model, sub), sub.u) - sub.old_log_prob
    return importance_ratio(log_ratio, sampled(sub), learner.args.ratio)[:, 0]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@CONTEXTS
def test_ratio_is_1_before_the_first_update(context, bf16):
    if bf16 and not grpo.has_bf16(torch.device("cpu")):
        pytest.skip("no bf16 units")
    flags = dict(c_online=context, l_traj=15, l_eval=1, n_sources=4, n_points=2, group_size=8, n_batch=24)
    learner = remembered(roll(64, bf16, buffer_size=64, **flags))
    rng = np.random.default_rng(0)
    for batch in (24, 7, 1):  # others than those in which the old log-probabilities were worked out
        for _ in range(4):
            index = torch.from_numpy(rng.integers(len(learner.buffer.u), size=batch))
            assert (ratios(learner, learner.buffer.take(index)) - 1).abs().max() <= 1e-4
    assert not sampled(learner.buffer).all()  # early ends among them
    assert learner.update(rng)["losses/ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert (ratios(learner, learner.buffer) - 1).abs().max() > 1e-3


def test_hindsight_moves_the_ratio_and_leaves_the_old_log_probability():
    plain, relabelled = roll(l_traj=6), roll(l_traj=6, hindsight=True)
    ours, theirs = remembered(plain, 0), remembered(relabelled, 0)
    for name in ("observations", "actions", "u", "real", "old_log_prob", "advantage"):
        assert torch.equal(getattr(ours.buffer, name), getattr(theirs.buffer, name)), name
    assert (ratios(ours, ours.buffer) - 1).abs().max() <= 1e-4
    assert (ratios(theirs, theirs.buffer) - 1).abs().min() > 1e-3
    assert np.array_equal(plain.scores, relabelled.scores)
    reached = hindsight_returns(relabelled.steps, relabelled.members, 1000, relabelled.args)
    np.testing.assert_array_equal(theirs.buffer.returns.numpy(), reached)


@pytest.mark.parametrize("env_id, l_eval", [("Hopper-v5", 60), ("Reacher-v5", 12), ("Reacher-v5", 27)])
@CONTEXTS
def test_hindsight_relabels_with_the_returns_reached_by_the_time_limit(env_id, l_eval, context):
    """Hopper falls. Reacher's episode has 50 steps: what is left of it is played on for where the score ends before,
    and where that goes on beyond it, the rewards after the limit count for the score only."""
    flags = dict(env_id=env_id, l_eval=l_eval, c_online=context, l_traj=3, gamma=1.0)
    rolled = roll(hindsight=True, n_sources=3, n_points=4, random_points=True, seed=3, **flags)
    steps, limit, horizon, front = rolled.steps, rolled.sims.limit, 3 + l_eval, context - 1
    reached = hindsight_returns(steps, rolled.members, limit, rolled.args)
    assert reached.shape == (48, front + 3)
    first = np.array([h for _, h in rolled.members])
    if env_id == "Reacher-v5":
        assert rolled.lived.tolist() == np.maximum(limit - first, horizon).tolist()
        assert (first + horizon > limit).any() and (first + horizon < limit).any()
    for row, (source, h) in enumerate(rolled.members):
        rewards = steps.rewards[row].tolist()
        assert rolled.scores[row] == pytest.approx(sum(rewards[:horizon]))
        rewards = rewards[: limit - h]
        earlier = source.rewards[max(0, h - front) : h].tolist()
        whole = [0.0] * (front - len(earlier)) + earlier + rewards
        expected = [sum(whole[j:]) for j in range(front + 3)]
        lived = steps.real[row, : front + 3]
        np.testing.assert_allclose(reached[row][lived], np.array(expected)[lived], rtol=1e-4, atol=1e-4)
        if env_id == "Reacher-v5" and h + horizon < limit:
            assert reached[row, front] < rolled.scores[row]  # every reward of Reacher is negative


# ---- Updates --------------------------------------------------------------------------------------------------------


def test_lamb_by_hand_for_two_steps():
    rng = np.random.default_rng(0)
    shapes, lr, decay = [(2, 3), (4,)], 0.05, 0.1
    values = [rng.normal(size=shapes[0]), np.zeros(shapes[1])]
    slopes = [[rng.normal(size=shape) for shape in shapes] for _ in range(2)]
    tensors = [torch.nn.Parameter(torch.tensor(value)) for value in values]
    idle = torch.nn.Parameter(torch.ones(2))
    optimizer = Lamb([*tensors, idle], lr, decay)
    m, v = ([np.zeros(shape) for shape in shapes] for _ in range(2))
    for step, slope in enumerate(slopes, 1):
        for i, (tensor, own) in enumerate(zip(tensors, slope)):
            tensor.grad = torch.tensor(own)
            m[i], v[i] = 0.9 * m[i] + 0.1 * own, 0.999 * v[i] + 0.001 * own**2
            direction = (m[i] / (1 - 0.9**step)) / (np.sqrt(v[i] / (1 - 0.999**step)) + 1e-8) + decay * values[i]
            norm = np.linalg.norm(values[i])
            trust = norm / np.linalg.norm(direction) if norm > 0 else 1.0  # a zero tensor takes a plain step
            values[i] = values[i] - lr * trust * direction
        optimizer.step()
        for tensor, value in zip(tensors, values):
            np.testing.assert_allclose(tensor.detach().numpy(), value, rtol=1e-6)
    assert torch.equal(idle, torch.ones(2))  # no gradient, no step


def test_the_reference_is_the_policy_of_every_fourth_update():
    weights, rolled = {}, roll()
    for count in (4, 5, 8, 9):
        args = toy_args(n_minibatches=count, reference_every=4)
        learner = remembered(types.SimpleNamespace(**vars(rolled) | dict(model=copy.deepcopy(rolled.model), args=args)))
        learner.update(np.random.default_rng(1))
        weights[count] = learner.model.state_dict(), learner.reference.state_dict()
        assert learner.updates == count
    for name, first in rolled.model.state_dict().items():
        assert torch.equal(weights[4][1][name], first)
        assert torch.equal(weights[5][1][name], weights[4][0][name])
        assert torch.equal(weights[8][1][name], weights[4][0][name])
        assert torch.equal(weights[9][1][name], weights[8][0][name])
    assert not torch.equal(weights[4][0]["mean_head.weight"], rolled.model.mean_head.weight)


def test_there_is_no_dropout_in_finetuning():
    model = draw_model(4, 2, dropout=0.5)
    sub = draw_sub(model)
    GRPOLearner(model.train(), toy_args())
    assert torch.equal(distribution(model, sub).mean, distribution(model, sub).mean)
    assert torch.equal(log_prob(distribution(model, sub), sub.u), sub.old_log_prob)


def test_an_update_raises_the_density_of_what_scored_above_its_group():
    rolled = roll(n_minibatches=4, kappa_initial=1e-9, n_sources=4, buffer_size=64)
    learner = GRPOLearner(rolled.model, rolled.args)
    advantages, keep = group_advantages(rolled.scores, 4, 0.0)
    learner.remember(rolled.steps, advantages, keep)
    learner.update(np.random.default_rng(0))
    log_ratio, advantage = ratios(learner, learner.buffer).log(), learner.buffer.advantage
    assert (log_ratio * advantage).mean() > 1e-3


def test_kappa_rises_while_the_entropy_is_below_minus_the_dimension_of_the_action():
    for bias, direction in ((-9.0, 1), (0.3, -1)):
        rolled = roll(kappa_lr=0.01, n_minibatches=1)
        rolled.model.log_std_head.weight.data[:] = 0.0
        rolled.model.log_std_head.bias.data[:] = bias
        learner = remembered(rolled)
        row = learner.update(np.random.default_rng(1))
        assert (row["losses/entropy"] < -3) == (direction == 1)
        assert row["losses/kappa"] == pytest.approx(0.1)
        assert learner.log_kappa.item() == pytest.approx(math.log(0.1) + direction * 0.01, abs=1e-5)


def test_the_values_logged_are_means_over_the_updates_and_the_first_and_largest_ratio():
    learner = remembered(roll(n_minibatches=5))
    logged, loss = [], grpo.grpo_loss
    with mock.patch.object(grpo, "grpo_loss", lambda *given: logged.append(loss(*given)) or logged[-1]):
        row = learner.update(np.random.default_rng(1))
    values = [{name: value.item() for name, value in values.items()} for _, values in logged]
    for name in ("loss", "surrogate", "kl", "entropy", "ratio_mean", "clip_fraction", "kappa", "grad_norm"):
        assert row[f"losses/{name}"] == pytest.approx(np.mean([each[name] for each in values]), rel=1e-5)
    assert row["losses/ratio_max"] == pytest.approx(max(each["ratio_max"] for each in values))
    assert row["losses/ratio_first"] == pytest.approx(values[0]["ratio_mean"]) != row["losses/ratio_mean"]


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line():
    learner = remembered(roll())
    learner.buffer.advantage[:] = math.nan
    with refused():
        learner.update(np.random.default_rng(1))


# ---- Whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """pretrained(env_id): a checkpoint of pretrain_dt.py on a few random episodes, made once."""

    @functools.cache
    def make(env_id="Hopper-v5"):
        torch.set_num_threads(1)
        steps = {"AntMaze_UMaze-v4": 800}.get(env_id, 300)
        toy = dict(dataset_steps=steps, batch_size=8, c_offline=5, updates=4, warmup=1, lr=1e-2, eval_episodes=1)
        run_dir = tmp_path_factory.mktemp("pretrained") / "run"
        toy |= dict(env_id=env_id, run_dir=str(run_dir), device="cpu", threads=1)
        return str(pretrain_dt.main(pretrain_dt.Args(**(toy | SIZES))) / "checkpoint.pt")

    return make


def table(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(row):
    """Of a line of metrics.csv, without the columns that measure time."""
    return {name: float(value) for name, value in row.items() if value != "" and not name.startswith("time/")}


def learning_columns(run_dir):
    """metrics.csv as text, without the columns that measure time."""
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in table(run_dir)]


def flat(value, path=""):
    """{path: leaf} of nested dictionaries and lists, tensors as (dtype, bytes)."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value}


def assert_same_run(one, other):
    """The same bytes in the learning columns and in all that a checkpoint holds but for times and the folder's name."""
    assert learning_columns(one) == learning_columns(other)
    ours, theirs = (flat(load_checkpoint(run_dir)) for run_dir in (one, other))
    different = [key for key in ours | theirs if ours.get(key) != theirs.get(key) and "/time/" not in key]
    assert different == ["/args/run_dir"]


def resume(run_dir, *flags):
    return main(parse_args(["--resume", str(run_dir), *map(str, flags)]))


@pytest.fixture(scope="session")
def whole(pretrained, tmp_path_factory):
    """The folder of a run of 4 iterations in one go; not to be changed."""
    return main(toy_args(iterations=4, pretrained=pretrained(), run_dir=str(tmp_path_factory.mktemp("whole") / "run")))


@pytest.fixture
def split(pretrained, tmp_path):
    """split(iterations): the folder of a run like `whole` that stopped then."""

    def begin(iterations, **flags):
        return main(toy_args(iterations=iterations, pretrained=pretrained(), run_dir=str(tmp_path / "split"), **flags))

    return begin


def tensorboard(run_dir):
    """{name: {iteration: value}}; fails if there are two values for one iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    found = {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert all(len({step for step, _ in each}) == len(each) for each in found.values())
    return {name: dict(each) for name, each in found.items()}


def assert_same_in_tensorboard(run_dir):
    found = tensorboard(run_dir)
    rows = {int(row["iteration"]): numbers(row) for row in table(run_dir)}
    names = {name for row in rows.values() for name in row}
    assert {name for name in found if not name.startswith("time/")} == names
    for name in names:
        expected = {i: row[name] for i, row in rows.items() if name in row}
        assert found[name].keys() == expected.keys() and found[name] == pytest.approx(expected, rel=1e-5)


def test_a_run_writes_its_metrics_and_learns(whole, pretrained):
    rows, content = table(whole), load_checkpoint(whole)
    assert [row["iteration"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert {name for name in numbers(rows[0]) if name != "iteration"} == {
        name for name in rows[0] if "eval/" in name[:5]
    }
    assert all(value != "" and math.isfinite(float(value)) for row in rows[1:] for value in row.values())
    assert {name.split("/")[0] for name in rows[0]} == {"iteration", "eval", "rollout", "losses", "charts", "time"}
    assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    lengths = [len(each[4]) for each in content["replay"]]
    assert len(lengths) == 2 + 1 + 1 + 1  # departure (8)
    for i, row in enumerate(rows[1:], 1):
        assert float(row["charts/env_steps"]) == sum(float(each["rollout/env_steps"]) for each in rows[1 : i + 1])
        assert int(row["charts/gradient_updates"]) == 8 * i
        own = lengths[:2] if i == 1 else lengths[i : i + 1]
        assert float(row["rollout/length"]) == np.mean(own)
        assert 16 * 4 < float(row["rollout/env_steps"]) - sum(own) <= 16 * 12  # L_traj and L_eval
    kept = sum(round(16 * float(row["rollout/kept"])) for row in rows[1:])
    assert len(content["learner"]["buffer"][0]) == min(40, kept)
    before, after = load_checkpoint(pretrained())["weights"], content["weights"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {"obs_mean", "obs_std", "return_scale"}
    unused = {"embed_action.weight", "embed_action.bias"}  # at context 1: not even weight decay moves them
    assert moved == set(before) - statistics - unused
    facts = json.loads((whole / "args.json").read_text())
    assert facts["args"]["l_traj"] == 4 and facts["script"] == "grpo_dt_continuous.py" and "torch" in facts["versions"]
    assert_same_in_tensorboard(whole)


@pytest.mark.parametrize("env_id, context", [("Hopper-v5", 1), ("AdroitHandHammer-v1", 5), ("AntMaze_UMaze-v4", 1)])
def test_finetuning_runs_on_a_task_of_each_family(env_id, context, pretrained, tmp_path, capsys):
    flags = dict(env_id=env_id, iterations=1, pretrained=pretrained(env_id), run_dir=str(tmp_path / "run"))
    flags |= dict(c_online=None, g_online=None, gamma=None, epsilon=None, kappa_initial=None)
    run_dir = main(toy_args(**flags))
    content, rows = load_checkpoint(run_dir), table(run_dir)
    assert (content["c_online"], content["script"]) == (context, "grpo_dt_continuous")
    assert content["g_eval"] == {"Hopper-v5": 7200, "AdroitHandHammer-v1": 4000, "AntMaze_UMaze-v4": 2}[env_id]
    assert [row["iteration"] for row in rows] == ["0", "1"] and rows[1]["eval/normalized_score"] != ""
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 110 for line in printed if re.match(r" *\d+/1 ", line))
    assert len([line for line in printed if re.match(r" *[01]/1 ", line)]) == 2
    if env_id.startswith("AntMaze"):  # random walks reach no goal: groups of equal scores
        assert rows[1]["rollout/kept"] == "0.0" and "losses/loss" not in rows[1]
        assert content["env_kwargs"] == {"maze_map": pretrain_dt.UMAZE}
    else:
        assert math.isfinite(float(rows[1]["losses/loss"])) and int(rows[1]["charts/gradient_updates"]) == 8
        assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)


ABLATIONS = [{name: True} for name in ("hindsight", "full_trajectories", "mixed_groups", "random_points")]
ABLATIONS += [{"ratio": kind} for kind in ("token", "geometric")]


@pytest.mark.parametrize("flag", ABLATIONS, ids=lambda flag: "-".join(map(str, *flag.items())))
def test_every_ablation_runs_and_changes_what_is_learned(flag, whole, pretrained, tmp_path):
    full = "full_trajectories" in flag
    sizes = dict(n_sources=1, n_batch=2, n_minibatches=2, l_traj=None, l_eval=None) if full else {}
    run_dir = main(toy_args(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run"), **sizes, **flag))
    (first, row), (first_plain, plain, *_) = table(run_dir), table(whole)
    assert all(math.isfinite(float(value)) for name, value in row.items() if name.startswith("losses/"))
    assert row["losses/loss"] != plain["losses/loss"] and first["eval/return_mean"] == first_plain["eval/return_mean"]
    assert (abs(float(row["losses/ratio_first"]) - 1.0) > 1e-4) == ("hindsight" in flag)
    assert (row["rollout/return"] == plain["rollout/return"]) == (not full)
    other_points = full or "mixed_groups" in flag or "random_points" in flag
    assert (row["rollout/sub_score"] != plain["rollout/sub_score"]) == other_points
    if "hindsight" in flag:  # on to the time limit
        assert float(row["rollout/env_steps"]) > float(plain["rollout/env_steps"]) + 10
    if full:
        args = load_checkpoint(run_dir)["args"]
        assert (args["l_traj"], args["l_eval"], row["rollout/ended_early"]) == (1000, 0, "1.0")
        resume(run_dir, "--iterations", 2)


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_does_not(whole, pretrained, tmp_path):
    flags = dict(iterations=4, pretrained=pretrained())
    assert_same_run(main(toy_args(**flags, run_dir=str(tmp_path / "again"))), whole)
    other = main(toy_args(**flags | {"iterations": 1, "seed": 2}, run_dir=str(tmp_path / "other")))
    ours, theirs = table(other), table(whole)
    assert ours[0]["eval/return_mean"] != theirs[0]["eval/return_mean"]
    for name in ("losses/loss", "rollout/return", "rollout/sub_score"):
        assert ours[1][name] != theirs[1][name]


@pytest.mark.parametrize("stops", [[2], [1, 3]])
def test_a_resumed_run_equals_one_that_never_stopped(stops, whole, split):
    run_dir = split(stops[0])
    for iterations in [*stops[1:], 4]:
        resume(run_dir, "--iterations", iterations)
    assert_same_run(run_dir, whole)
    assert_same_in_tensorboard(run_dir)


@pytest.mark.parametrize("harm", ["later rows", "no metrics.csv", "no pretrained checkpoint"])
def test_resuming_needs_the_checkpoint_alone(harm, whole, pretrained, tmp_path):
    start, run_dir = tmp_path / "start.pt", tmp_path / "split"
    start.write_bytes(Path(pretrained()).read_bytes())
    main(toy_args(iterations=2, pretrained=str(start), run_dir=str(run_dir)))
    if harm == "later rows":
        with open(run_dir / "metrics.csv", "a") as file:
            file.write("".join(f"{i},0.01,1.0,2.0\n" for i in range(3, 8)) + "8,0.0")
    else:
        {"no metrics.csv": run_dir / "metrics.csv"}.get(harm, start).unlink()
    resume(run_dir / "checkpoint.pt", "--iterations", 4)
    assert learning_columns(run_dir) == learning_columns(whole)


def test_a_finished_run_that_is_resumed_has_the_rows_of_its_checkpoint(split):
    run_dir = split(1)
    text = (run_dir / "metrics.csv").read_text()
    for harm in ("", text + "2,0.01,1.0,2.0\n"):
        (run_dir / "metrics.csv").write_text(harm)
        resume(run_dir)
        assert (run_dir / "metrics.csv").read_text() == text


def test_evaluations_and_their_number_do_not_touch_what_is_learned(whole, split):
    run_dir = split(3, eval_every=2, eval_episodes=2)
    rows = [numbers(row) for row in table(run_dir)]
    assert ["eval/return_mean" in row for row in rows] == [True, False, True, True]
    for ours, theirs in zip(rows[1:], map(numbers, table(whole)[1:])):
        assert all(theirs[name] == value for name, value in ours.items() if not name.startswith("eval/"))
    weights = load_checkpoint(run_dir)["weights"]
    run_dir = resume(run_dir, "--iterations", 4)
    assert not all(torch.equal(value, weights[name]) for name, value in load_checkpoint(run_dir)["weights"].items())
    ours, theirs = (load_checkpoint(each)["weights"] for each in (run_dir, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_replay_keeps_the_last_full_trajectories(whole, split):
    replays = [load_checkpoint(run_dir)["replay"] for run_dir in (whole, split(2, replay_size=2))]
    ours, theirs = flat(replays[1]), flat(replays[0][1:3])
    assert len(replays[1]) == 2 and ours == theirs


def test_a_learning_rate_given_with_resume_holds_from_there_on(split):
    run_dir = split(1)
    before = load_checkpoint(run_dir)
    args = parse_args(["--resume", str(run_dir), "--lr", "1e-9", "--weight-decay", "0", "--kappa-lr", "0.5"])
    assert (args.lr, args.weight_decay, args.kappa_lr, args.iterations, args.gamma) == (1e-9, 0, 0.5, 1, 0.9)
    resume(run_dir, "--iterations", 2, "--lr", 1e-9, "--weight-decay", 0, "--kappa-lr", 0.5)
    after = load_checkpoint(run_dir)
    for each in (after["args"], json.loads((run_dir / "args.json").read_text())["args"]):
        assert (each["lr"], each["weight_decay"], each["kappa_lr"], each["iterations"]) == (1e-9, 0, 0.5, 2)
    group, dual = (after["learner"][name]["param_groups"][0] for name in ("optimizer", "dual"))
    assert (group["lr"], group["weight_decay"], dual["lr"]) == (1e-9, 0, 0.5)
    for name, value in after["weights"].items():  # before, an update moved each tensor by a hundredth of its norm
        torch.testing.assert_close(value, before["weights"][name], rtol=1e-5, atol=1e-7)
    assert (after["learner"]["log_kappa"] - before["learner"]["log_kappa"]).abs() > 0.5
    assert after["learner"]["updates"] == 16


def test_other_flags_given_with_resume_hold_from_there_on(whole, split):
    run_dir = split(1)
    resume(run_dir, "--iterations", 2, "--gamma", 1.0, "--n-minibatches", 3, "--group-size", 8, "--g-online", 50)
    rows, theirs = table(run_dir), table(whole)
    assert learning_columns(run_dir)[1] == learning_columns(whole)[1]
    assert rows[2]["charts/gradient_updates"] == "11"
    assert rows[2]["rollout/sub_score"] != theirs[2]["rollout/sub_score"]
    content = load_checkpoint(run_dir)
    assert content["g_eval"] == 50 and content["replay"][-1][1][0] == 50 and content["replay"][0][1][0] == 3


def progress(run_dir):
    path = run_dir / "checkpoint.pt"
    return load_checkpoint(path)["iteration"] if path.exists() else 0


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(kills, pretrained, tmp_path):
    run_dir, moments = tmp_path / "killed", np.random.default_rng(kills).uniform(0.0, 0.5, size=kills)
    begin = words(toy_args(pretrained=pretrained(), run_dir=str(run_dir), iterations=100_000))
    iteration = 0
    for moment in moments:
        flags = ["--resume", str(run_dir), "--iterations", "100000"] if iteration else begin
        process = subprocess.Popen([sys.executable, grpo.__file__, *flags], stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None and progress(run_dir) <= iteration:
                time.sleep(0.05)
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


def test_where_nothing_is_kept_no_update_is_made_and_the_run_goes_on(pretrained, tmp_path):
    flags = dict(pretrained=pretrained(), delta_r=1e9)
    run_dir = main(toy_args(**flags, iterations=1, run_dir=str(tmp_path / "run")))
    resume(run_dir, "--iterations", 2)
    rows = table(run_dir)
    assert all(row["charts/gradient_updates"] == "0" and row["rollout/kept"] == "0.0" for row in rows[1:])
    assert not any(name.startswith("losses/") for name in rows[0])
    before, after = load_checkpoint(pretrained())["weights"], load_checkpoint(run_dir)["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_same_run(run_dir, main(toy_args(**flags, iterations=2, run_dir=str(tmp_path / "whole"))))
    resume(run_dir, "--iterations", 3, "--delta-r", 0)
    assert math.isfinite(float(table(run_dir)[3]["losses/loss"])) and table(run_dir)[2]["losses/loss"] == ""


def test_a_simulation_that_becomes_unstable_stops_the_run_and_keeps_the_checkpoint(whole, split, monkeypatch):
    def thrown(policy, sims, members, args, rng):
        source, h = members[0]
        return groups(policy, sims, [(source._replace(snapshots=source.snapshots + 1e12), h), *members[1:]], args, rng)

    groups = grpo.rollout_groups
    run_dir = split(1)
    monkeypatch.setattr(grpo, "rollout_groups", thrown)
    with refused("--seed"):
        resume(run_dir, "--iterations", 4)
    assert progress(run_dir) == 1
    monkeypatch.setattr(grpo, "rollout_groups", groups)
    resume(run_dir, "--iterations", 4)
    assert_same_run(run_dir, whole)


def test_evaluating_a_saved_run_scores_what_its_last_row_says(whole, capsys):
    args, rows, scored = parse_args(["--eval-only", str(whole)]), table(whole), []
    assert (args.g_online, args.c_online, args.eval_episodes, args.workers) == (3.0, 1, 1, None)
    args.threads, before = 1, {path: path.read_bytes() for path in whole.iterdir()}
    capsys.readouterr()
    with mock.patch.object(grpo, "evaluate", lambda *given: scored.append(evaluate(*given)) or scored[-1]):
        grpo.eval_only(args)
        grpo.eval_only(parse_args(["--eval-only", str(whole), "--g-online", "400", "--workers", "0"]))
    for name in ("return_mean", "return_std", "length_mean", "normalized_score"):
        assert repr(scored[0][f"eval/{name}"]) == rows[-1][f"eval/{name}"]
    printed = capsys.readouterr().out.splitlines()
    assert f"return_mean {float(rows[-1]['eval/return_mean']):,.1f}" in printed[0] and "400" in printed[1]
    assert scored[1]["eval/return_mean"] != scored[0]["eval/return_mean"]
    assert before == {path: path.read_bytes() for path in whole.iterdir()}


def test_a_run_of_full_trajectories_is_evaluated_as_well(split, capsys):
    flags = dict(n_sources=1, n_batch=2, n_minibatches=2, l_traj=None, l_eval=None)
    run_dir = split(1, full_trajectories=True, **flags)
    grpo.eval_only(parse_args(["--eval-only", str(run_dir), "--workers", "0"]))
    assert f"return_mean {float(table(run_dir)[1]['eval/return_mean']):,.1f}" in capsys.readouterr().out


def test_a_pretrained_checkpoint_is_evaluated_at_its_own_return(pretrained):
    content = load_checkpoint(pretrained())
    args = parse_args(["--eval-only", pretrained()])
    assert (args.g_online, args.c_online, args.eval_episodes) == (content["g_eval"], content["c_online"], 1)
    grpo.eval_only(parse_args(["--eval-only", pretrained(), "--workers", "0", "--threads", "1"]))


# ---- Pretraining on random data where --pretrained is left out ------------------------------------------------------


@pytest.fixture
def pretraining(monkeypatch, pretrained):
    """Stands in for the process that pretrains: parses its flags, writes a checkpoint, keeps count."""
    calls, real = [], subprocess.run

    def run(command, returncode=0, **kwargs):
        if command[0] == "git":
            return real(command, **kwargs)
        assert command[0] == sys.executable and Path(command[1]) == Path(pretrain_dt.__file__)
        calls.append(pretrain_dt.parse_args(command[2:]))  # ends the test with exit code 1 on a flag it does not know
        target = Path(calls[-1].run_dir)
        target.mkdir(parents=True)
        (target / "checkpoint.pt").write_bytes(Path(pretrained()).read_bytes())
        return types.SimpleNamespace(returncode=returncode)

    monkeypatch.setattr(grpo.subprocess, "run", run)
    return calls


def test_without_a_checkpoint_one_is_made_on_random_data_once_and_kept(pretraining):
    args = toy_args(c_online=None, seed=7, threads=2)
    path = grpo.pretrained_on_random(args)
    assert load_checkpoint(path)["script"] == "pretrain_dt" and len(pretraining) == 1
    made = pretraining[0]
    assert (made.env_id, made.dataset, made.seed, made.threads) == ("Hopper-v5", "random", 7, 2)
    assert (made.embed_dim, made.n_layers, made.n_heads, made.device) == (16, 4, 4, "cpu")
    assert made.c_offline == made.c_online == 1 and made.bf16
    assert grpo.pretrained_on_random(args) == path and len(pretraining) == 1
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing half made beside it
    grpo.pretrained_on_random(toy_args(seed=8, bf16=False, cuda=True))
    assert len(pretraining) == 2 and not pretraining[1].bf16 and pretraining[1].device == "auto"


def test_a_run_without_a_checkpoint_takes_it_and_goes_on(whole, pretraining, tmp_path):
    run_dir = main(toy_args(iterations=1, run_dir=str(tmp_path / "run")))
    assert len(pretraining) == 1
    resume(run_dir, "--iterations", 4)
    assert len(pretraining) == 1 and learning_columns(run_dir) == learning_columns(whole)


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
    monkeypatch.setattr(grpo.subprocess, "run", lambda command, **kwargs: fake(command, returncode=1, **kwargs))
    with refused("--pretrained"):
        grpo.pretrained_on_random(toy_args())
    assert not list(Path("runs/pretrained").iterdir())


@pytest.mark.slow
def test_a_command_without_a_checkpoint_pretrains_and_finetunes(tmp_path):
    flags = words(toy_args(iterations=1, run_dir=str(tmp_path / "run")))
    done = subprocess.run([sys.executable, grpo.__file__, *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert progress(tmp_path / "run") == 1
    assert len(list((tmp_path / "runs" / "pretrained").glob("*/checkpoint.pt"))) == 1


# ---- Errors ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"env_id": "Walker2d-v5"}, ["Hopper-v5", "Walker2d-v5"]),
    ({"group_size": 1}, ["--group-size"]),
    ({"full_trajectories": True, "l_traj": None}, ["--full-trajectories", "--l-eval"]),
    ({"full_trajectories": True, "l_eval": None}, ["--full-trajectories", "--l-traj"]),
    ({"full_trajectories": True, "mixed_groups": True}, ["--full-trajectories", "--mixed-groups"]),
    ({"full_trajectories": True, "random_points": True}, ["--full-trajectories", "--random-points"]),
    ({"n_sources": 0}, ["--n-sources"]),
    ({"iterations": -1}, ["--iterations"]),
    ({"epsilon": math.nan}, ["--epsilon"]),
    ({"g_online": math.inf}, ["--g-online"]),
    ({"lr": 0.0}, ["--lr"]),
    ({"delta_r": -1.0}, ["--delta-r"]),
    ({"workers": -1}, ["--workers"]),
    ({"pretrained": "nowhere"}, ["nowhere"]),
]


@pytest.mark.parametrize("flags, named", REFUSED, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_written(flags, named, pretrained, tmp_path):
    with refused(*named):
        main(toy_args(**{"pretrained": pretrained(), "run_dir": str(tmp_path / "run")} | flags))
    assert not (tmp_path / "run").exists() and not list(Path().iterdir())


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "PointMaze_UMaze-v3", "CartPole-v1", "Nothing-v0"])
def test_what_cannot_be_reset_is_refused_before_pretraining(env_id, pretraining):
    with refused(env_id):
        main(toy_args(env_id=env_id))
    assert not pretraining and not list(Path().iterdir())


def test_zeros_that_have_a_meaning_are_taken(split):
    rows = table(split(1, l_eval=0, beta=0.0, weight_decay=0.0, kappa_lr=0.0, g_online=-5.0, seed=0))
    assert math.isfinite(float(rows[1]["losses/loss"])) and float(rows[1]["losses/kappa"]) == pytest.approx(0.1)


def test_a_folder_that_holds_a_run_is_refused(whole, pretrained, pretraining):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    for start in (pretrained(), None):
        with refused(str(whole), "--resume"):
            main(toy_args(pretrained=start, run_dir=str(whole)))
    assert before == {path: path.read_bytes() for path in whole.iterdir()} and not pretraining


def test_a_folder_is_one_runs_alone_while_that_is_at_work(split, pretrained, tmp_path):
    run_dir, other = split(1), tmp_path / "new"
    begin = functools.partial(main, toy_args(pretrained=pretrained(), run_dir=str(other)))
    go_on = functools.partial(resume, run_dir, "--iterations", 2)
    for folder, start in ((run_dir, go_on), (other, begin)):
        with grpo.claim(folder, toy_args(resume=str(folder))):
            before = {path: path.read_bytes() for path in folder.iterdir()}
            with refused(str(folder)):
                start()
            assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert progress(resume(run_dir, "--iterations", 2)) == 2  # the lock went with its holder


def test_two_runs_that_were_started_at_once_do_not_share_a_folder(whole, tmp_path):
    """The second one looked before the first one's checkpoint was there, and claims the folder after its end."""
    run_dir = tmp_path / "run"
    grpo.choose_run_dir(toy_args(run_dir=str(run_dir)))
    run_dir.mkdir()
    (run_dir / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    with refused(str(run_dir)):
        grpo.claim(run_dir, toy_args(run_dir=str(run_dir)))


def test_a_run_of_pretrain_dt_is_not_resumed_by_this_script(pretrained):
    with refused("pretrain_dt.py"):
        parse_args(["--resume", pretrained()])


CHANGED = ["--env-id Ant-v4", "--pretrained other", "--dataset-kind expert", "--embed-dim 32", "--c-online 5"]
CHANGED += ["--l-traj 9", "--kappa-initial 0.5", "--run-dir other", "--hindsight", "--full-trajectories"]
CHANGED += ["--mixed-groups", "--ratio token", "--random-points"]


def test_resuming_refuses_what_the_saved_state_hangs_on(whole):
    assert {flag.split()[0][2:].replace("-", "_") for flag in CHANGED} == set(grpo.FIXED)
    for flag in CHANGED:
        with refused(flag.split()[0], str(whole)):
            parse_args(["--resume", str(whole), *flag.split()])
    for flag in ("--env-id Ant-v4", "--c-online 5"):
        with refused(flag.split()[0], str(whole)):
            parse_args(["--eval-only", str(whole), *flag.split()])
    with refused("--eval-only"):
        parse_args(["--resume", str(whole), "--eval-only", str(whole)])
    with refused("--iterations", str(whole)):
        resume(whole, "--iterations", 3)
    assert progress(whole) == len(table(whole)) - 1 == 4


def changed_checkpoint(path, folder, **changes):
    """A copy of a checkpoint with other entries."""
    content = load_checkpoint(path)
    content |= changes
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "checkpoint.pt")
    return folder


def test_a_damaged_checkpoint_is_refused(whole, tmp_path):
    good, path = (whole / "checkpoint.pt").read_bytes(), tmp_path / "damaged.pt"
    weights = load_checkpoint(whole)["weights"]["mean_head.weight"].numpy().tobytes()
    flipped = bytearray(good)
    flipped[good.index(weights) + 5] ^= 1  # torch would read it without a word
    for content in (bytes(flipped), good[: len(good) // 2], good[:-1], b"", b"# no checkpoint"):
        path.write_bytes(content)
        with refused(str(path)):
            load_checkpoint(path)
    torch.save({"weights": 3}, path)
    with refused(str(path)):
        load_checkpoint(path)
    path.write_bytes(good)
    assert load_checkpoint(path)["iteration"] == 4


def test_a_run_of_an_older_version_is_not_resumed(whole, tmp_path):
    content = load_checkpoint(whole)
    del content["env_steps"]
    torch.save(content, tmp_path / "checkpoint.pt")
    with refused(str(tmp_path)):
        parse_args(["--resume", str(tmp_path)])


@pytest.mark.parametrize("changed", [{"kind": "reinformer"}, {"embed_dim": 32}, {"width": 3}])
def test_a_network_of_another_kind_or_size_is_refused(changed, pretrained, tmp_path):
    sizes = load_checkpoint(pretrained())["sizes"] | changed
    path = changed_checkpoint(pretrained(), tmp_path / "other", sizes=sizes)
    with refused(*map(str, changed.values())):
        main(toy_args(pretrained=str(path), run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_a_module_that_a_checkpoint_names_is_imported_only_if_the_command_names_it_too(
    flag, whole, tmp_path, monkeypatch
):
    (tmp_path / "own_task.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    name, saved = "own_task:Cart-v0", load_checkpoint(whole)["args"]
    path = str(changed_checkpoint(whole, tmp_path / "run", env_id=name, args=saved | {"env_id": name}))
    for given in ([], ["--env-id", "Hopper-v5"], ["--env-id", "own_task:Other-v0"]):
        with refused("--env-id", name):
            parse_args([flag, path, *given])
    args = parse_args([flag, path, "--env-id", name])
    assert args.env_id == name
    with refused(name):  # it cannot be imported
        main(args) if flag == "--resume" else grpo.eval_only(args)


def test_no_module_that_the_checkpoints_arguments_name_is_imported_unasked(whole, tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    saved = load_checkpoint(whole)["args"] | {"env_id": "own_task:Hopper-v5"}
    path = str(changed_checkpoint(whole, tmp_path / "run", args=saved))
    with contextlib.suppress(SystemExit):
        grpo.eval_only(parse_args(["--eval-only", path, "--workers", "0"]))
    assert not Path("imported").exists()


def test_the_command_prints_one_line_on_stderr_and_exits_with_1(whole):
    command = [sys.executable, grpo.__file__, "--resume", str(whole), "--l-traj", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]*--l-traj[^\n]*\n", done.stderr), done.stderr
