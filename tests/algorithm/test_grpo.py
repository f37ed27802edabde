"""Table 6, groups, ratios, loss, reset points, rollouts and updates of grpo_dt_continuous.py, against closed forms and
episodes that are played by hand."""

import copy
import math
import types
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import grpo_dt_continuous as grpo
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
    group_metrics,
    grpo_loss,
    hindsight_returns,
    importance_ratio,
    log_prob,
    make_env,
    on_one_scale,
    rollout,
    rollout_groups,
    windows,
)

SIZES = dict(embed_dim=16, n_layers=2, n_heads=2)
CONTEXTS = pytest.mark.parametrize("context", [1, 5])
RATIOS = pytest.mark.parametrize("ratio", ["sequence", "token", "geometric"])


def toy_args(**changes):
    """The learning rate is high, so that a few updates leave a mark on every weight."""
    toy = dict(env_id="Hopper-v5", iterations=2, n_sources=2, n_points=2, group_size=4, buffer_size=40, l_traj=4)
    toy |= dict(l_eval=8, gamma=0.9, delta_r=0.0, g_online=3.0, c_online=1, n_batch=8, epsilon=0.2, lr=1e-2)
    toy |= dict(kappa_initial=0.1, n_trajectories=1, eval_episodes=1, cuda=False, threads=1, workers=0)
    toy |= dict(reference_every=3)  # the 8 updates of an iteration end between two references
    return Args(**(toy | dict(embed_dim=16) | changes))


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
def test_rows_are_those_of_the_papers_table_6(env_id, kind, numbers):
    args = filled(env_id, kind)
    assert {name: float(getattr(args, name)) for name in NAMES} == dict(zip(NAMES, map(float, numbers)))
    assert args.dataset_kind == kind
    assert len(PRINTED) == len(ROWS) and sorted(COLUMNS) == sorted(NAMES)


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
def test_a_task_outside_the_table_takes_hoppers_row_and_twice_the_best_return(best, g_online):
    args = filled("HalfCheetah-v5", "medium", best)
    hopper = filled("Hopper-v5", "medium")
    assert args.g_online == g_online
    assert all(getattr(args, name) == getattr(hopper, name) for name in NAMES if name != "g_online")


def test_flags_override_the_row_and_a_given_kind_that_of_the_checkpoint():
    args = filled("Ant-v4", "medium", dataset_kind="random", l_traj=7, delta_r=0.0, g_online=-5.0)
    assert (args.l_traj, args.delta_r, args.g_online, args.l_eval) == (7, 0.0, -5.0, 200)
    assert (args.dataset_kind, args.kappa_initial) == ("random", 0.20)


# ---- Advantages -----------------------------------------------------------------------------------------------------


def test_advantages_are_those_of_equation_2_by_hand():
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


def test_one_scale_weighs_a_group_by_its_spread():
    scores = np.array([1.0, 3.0, 100.0, 114.0, 5.0, 5.0])  # deviations 1, 7 and 0 around 2, 107 and 5
    advantages = on_one_scale(group_advantages(scores, 2, 0.0)[0], scores, 2)
    root = math.sqrt((1 + 49 + 0) / 3)
    np.testing.assert_allclose(advantages, [-1 / root, 1 / root, -7 / root, 7 / root, 0, 0], rtol=1e-7)
    assert (advantages**2).mean() == pytest.approx(1.0)
    one = np.array([2.0, 4.0, 9.0])  # with a single group it is Eq. 2
    eq2 = group_advantages(one, 3, 0.0)[0]
    np.testing.assert_allclose(on_one_scale(eq2, one, 3), eq2, rtol=1e-7)
    same = np.full(4, 5.0)
    assert on_one_scale(group_advantages(same, 2, 0.0)[0], same, 2).tolist() == [0.0] * 4


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


@RATIOS
def test_the_gradient_is_that_of_every_term_of_the_loss(ratio):
    """Against a central difference, with the same samples for the entropy; nothing is clipped."""
    old, model, reference = draw_model(4, 2), draw_model(4, 2), draw_model(4, 2, seed=2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    sub, args, h = draw_sub(old, rows=18), toy_args(beta=0.3, epsilon=1e3, ratio=ratio), 3e-4
    direction = [torch.randn_like(parameter) for parameter in model.parameters()]

    def loss(moved):
        """Of the model moved that far in the direction, and its slope there."""
        policy = copy.deepcopy(model)
        for parameter, own in zip(policy.parameters(), direction):
            parameter.data += moved * own
        torch.manual_seed(5)
        value = grpo_loss(policy, reference, sub, torch.tensor(0.7), args)[0]
        slopes = torch.autograd.grad(value, [*policy.parameters()])
        return value.item(), sum((slope * own).sum().item() for slope, own in zip(slopes, direction))

    assert loss(0.0)[1] == pytest.approx((loss(h)[0] - loss(-h)[0]) / (2 * h), rel=1e-2)


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


# ---- Reset points ---------------------------------------------------------------------------------------------------


def numbered(index, length, context=1):
    """A trajectory whose entries tell where they stand."""
    steps = np.concatenate([np.zeros(context - 1), 100.0 * index + np.arange(length)])
    observations, actions = np.stack([steps] * 2, 1).astype(np.float32), np.stack([steps / 1e4] * 2, 1)
    snapshots = np.stack([np.full(length, index), np.arange(length)], 1).astype(float)
    real = np.arange(context - 1 + length) >= context - 1
    returns = np.where(real, 1000 - steps, 0).astype(np.float32)
    fields = [observations, returns, actions.astype(np.float32), real, np.zeros((length, 2), np.float32)]
    return Trajectory(*fields, np.ones(length), snapshots, np.array(True), observations[-1])


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
        replay = collect(model, sims, 2, args, rng, snapshots=True)
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
    ended = {bool(trajectory.terminated) for trajectory in trajectories}
    if env_id == "Reacher-v5":
        assert {len(trajectory.rewards) for trajectory in trajectories} == {50} and ended == {False}
    else:
        assert ended == {True}
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
    env, args = make_env(env_id, {}), toy_args(env_id=env_id, c_online=context, eval_episodes=3, g_eval=5.0)
    model, sims = draw_model(*env.observation_space.shape, *env.action_space.shape), Simulators(env, 3, 0)
    with mock.patch.object(sims, "reset", wraps=sims.reset) as reset:
        row = evaluate(model, sims, args, 4)
    rewards = [play(env_id, model, seed, 5.0, context, [])[0] for seed in reset.call_args.args[0].tolist()]
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
    rolled = roll(c_online=context, l_traj=6, l_eval=12, random_points=True, n_sources=2, n_points=3, g_online=15.0)
    steps, ended = rolled.steps, 0
    assert len(rolled.scores) == len(rolled.members) == 24
    for row in range(24):
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
    assert 0 < ended < 24
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
    rolled = roll(l_traj=80, l_eval=3, random_points=True, group_size=2, seed=2)
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
    for parameter in learner.reference.parameters():
        parameter.data += 0.1  # it is not the policy that acted
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
    keep, learner = np.arange(16) % 3 == 1, GRPOLearner(relabelled.model, relabelled.args)
    learner.remember(relabelled.steps, np.zeros(16), keep, reached)
    np.testing.assert_array_equal(learner.buffer.returns.numpy(), reached[keep])


@pytest.mark.parametrize("env_id, l_eval", [("Hopper-v5", 60), ("Reacher-v5", 12), ("Reacher-v5", 27)])
@CONTEXTS
def test_hindsight_relabels_with_the_returns_reached_by_the_time_limit(env_id, l_eval, context):
    """Hopper falls. Reacher's episode has 50 steps: what is left of it is played on for where the score ends before,
    and where that goes on beyond it, the rewards after the limit count for the score only."""
    flags = dict(env_id=env_id, l_eval=l_eval, c_online=context, l_traj=3, gamma=1.0)
    rolled = roll(hindsight=True, n_sources=2, n_points=3, random_points=True, seed=3, **flags)
    steps, limit, horizon, front = rolled.steps, rolled.sims.limit, 3 + l_eval, context - 1
    reached = hindsight_returns(steps, rolled.members, limit, rolled.args)
    assert reached.shape == (24, front + 3)
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


def test_the_values_logged_of_groups_by_hand():
    """Context 3, sub-trajectories of 2 + 1 steps; those before the first one are not lived in them."""
    real = [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    steps = Steps(*[None] * len(Steps._fields))._replace(real=np.array(real, bool))
    scores, keep = np.array([1.0, 3.0, 10.0, 20.0]), np.array([True, False, True, True])
    row = group_metrics(steps, scores, keep, toy_args(c_online=3, group_size=2, l_traj=2, l_eval=1))
    expected = {"sub_score": 8.5, "group_std": (1.0 + 5.0) / 2, "kept": 0.75, "ended_early": 0.5}
    assert row == pytest.approx({f"rollout/{name}": value for name, value in expected.items()})


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


def watch(learner):
    """The updates of an iteration: what each one's loss was given and gave, its gradient, and that of the step."""
    updates, loss, step = [], grpo.grpo_loss, learner.optimizer.step
    weights = [*learner.model.parameters()]

    def spied(model, reference, sub, kappa, args):
        assert not kappa.requires_grad
        log_kappa = learner.log_kappa.item()
        value, values = loss(model, reference, sub, kappa, args)
        slopes = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        gradient = torch.cat([slope.flatten() for slope in slopes if slope is not None])
        updates.append(types.SimpleNamespace(**locals()))
        return value, values

    def stepped():
        updates[-1].taken = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
        step()

    learner.optimizer.step = stepped
    with mock.patch.object(grpo, "grpo_loss", spied):
        learner.update(np.random.default_rng(1))
    return updates


def test_an_update_is_of_policy_and_reference_on_a_minibatch_from_anywhere_in_the_buffer():
    learner = remembered(roll(n_minibatches=20))
    updates = watch(learner)
    assert len(updates) == 20
    for each in updates:
        assert each.model is learner.model and each.reference is learner.reference
        assert len(each.sub.u) == 8
    drawn = [advantage for each in updates for advantage in each.sub.advantage.tolist()]  # each row has its own
    assert set(drawn) == set(learner.buffer.advantage.tolist()) and len(set(drawn)) == 13


def test_the_optimizer_takes_the_gradient_of_the_loss_clipped_to_the_global_norm():
    norms = []
    for each in watch(remembered(roll(n_minibatches=5, max_grad_norm=0.25))):
        norms.append(each.gradient.norm().item())
        torch.testing.assert_close(each.taken, each.gradient * min(1.0, 0.25 / norms[-1]), rtol=1e-4, atol=1e-6)
        assert each.values["grad_norm"].item() == pytest.approx(norms[-1], rel=1e-4)
    assert max(norms) > 0.5


def test_kappa_follows_the_gradient_kappa_times_entropy_minus_target():
    learner = remembered(roll(n_minibatches=5, kappa_initial=0.2, kappa_lr=0.5))
    log_kappa, m, v = math.log(0.2), 0.0, 0.0
    for t, each in enumerate(watch(learner), 1):
        assert each.log_kappa == pytest.approx(log_kappa, abs=1e-4)
        assert each.kappa.item() == each.values["kappa"].item() == pytest.approx(math.exp(log_kappa), rel=1e-3)
        gradient = math.exp(log_kappa) * (each.values["entropy"].item() + 3.0)  # the target is -dim A
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        log_kappa -= 0.5 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert learner.log_kappa.item() == pytest.approx(log_kappa, abs=1e-4)


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


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line(refused):
    learner = remembered(roll())
    learner.buffer.advantage[:] = math.nan
    with refused():
        learner.update(np.random.default_rng(1))
