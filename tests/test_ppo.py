"""Advantages, ratios, loss, value network, buffer and whole runs of ppo_dt_continuous.py at toy size."""

import csv
import functools
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import ppo_dt_continuous as ppo
import pretrain_dt
from ppo_dt_continuous import (
    METRICS,
    ROWS,
    Args,
    DecisionTransformer,
    Episode,
    PPOLearner,
    TokenBatch,
    ValueNetwork,
    collect_episodes,
    distribution,
    fill_from_table,
    gae,
    load_checkpoint,
    main,
    make_env,
    parse_args,
    ppo_loss,
    rollout_copy,
    scale_action,
    squash,
    stream,
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
    toy = dict(env_id="Hopper-v5", iterations=2, n_trajectories=2, replay_iterations=2, c_train=4, gamma=0.9)
    toy |= dict(gae_lambda=0.8, g_online=3.0, c_online=1, n_batch=8, epsilon=0.2, lr=1e-2, kappa_initial=0.1)
    toy |= dict(value_dim=8, value_norm=False, lr_value=1e-2, value_warmup=3, eval_episodes=1, eval_every=1)
    toy |= dict(device="cpu", threads=1, embed_dim=16, reference_every=3)
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
# Table 7
# ---------------------------------------------------------------------------------------------------------------------

# environment, kind: n_batch, c_online, g_online, K_PPO, lr_policy, lr_value, kappa_initial; then c_train
TABLE_7 = """
Hopper-v5           medium   256  1   7200   8  5e-5  1e-3  0.02   20
Hopper-v5           random   256  1   7200   8  5e-5  1e-3  0.04   20
Walker2d-v4         medium   256  1  10000   8  5e-5  1e-3  0.02   20
Walker2d-v4         random   256  1  10000   8  5e-5  1e-3  0.20   20
Ant-v4              medium   256  1  12000   8  5e-5  1e-3  0.02   20
Ant-v5              random   256  1  12000   8  5e-5  1e-3  0.02   20
AdroitHandDoor-v1   cloned   512  1   3000  16  3e-5  2e-4  0.002   5
AdroitHandDoor-v1   human    512  1   3000  16  3e-5  2e-4  0.002   5
AdroitHandPen-v1    cloned   512  1   6000   8  3e-5  2e-4  0.04    5
AdroitHandPen-v1    human    512  1   6000   8  3e-5  2e-4  0.04    5
AdroitHandHammer-v1 cloned   512  5   4000  16  3e-5  2e-4  0.005   5
AdroitHandHammer-v1 human    512  5   4000  16  3e-5  2e-4  0.005   5
AntMaze_UMaze-v4    umaze    256  1      2   8  5e-5  1e-3  0.02    5
AntMaze_UMaze-v4    diverse  256  5      2   8  5e-5  1e-3  0.02    5
"""
PRINTED = [line.split() for line in TABLE_7.strip().splitlines()]
NAMES = ["n_batch", "c_online", "g_online", "n_trajectories", "lr", "lr_value", "kappa_initial", "c_train"]


@pytest.mark.parametrize("env_id, kind, numbers", [(e, k, n) for e, k, *n in PRINTED], ids=lambda v: str(v)[:20])
def test_rows_are_those_of_the_papers_table_7(env_id, kind, numbers):
    args = Args(env_id=env_id)
    line = fill_from_table(args, kind, 100.0)
    assert {name: float(getattr(args, name)) for name in NAMES} == dict(zip(NAMES, map(float, numbers)))
    assert (args.epsilon, args.gamma, args.gae_lambda) == (0.2, 0.99, 0.95)
    locomotion = args.c_train == 20
    assert (args.value_dim, args.value_norm) == ((256, False) if locomotion else (512, True))
    assert args.g_eval == args.g_online and f"{kind} data" in line and "no row" not in line
    assert len(PRINTED) == len(ROWS)


def test_a_task_outside_the_table_takes_hoppers_row_and_twice_the_best_return():
    args, hopper = Args(env_id="Pendulum-v1"), Args(env_id="Hopper-v5")
    assert "no row for Pendulum-v1" in fill_from_table(args, "random", -400.0)
    fill_from_table(hopper, "medium", -400.0)
    assert args.g_online == 0.0 and args.n_batch == hopper.n_batch and args.kappa_initial == hopper.kappa_initial


# ---------------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------------

REWARDS, VALUES = np.array([1.0, 0.0, 2.0]), np.array([0.5, 1.0, -1.0, 4.0])


def test_gae_by_hand_at_a_true_end():
    # gamma 0.5, lambda 0.4: deltas 1 + 0.5 - 0.5, 0 - 0.5 - 1, 2 + 0 + 1; each later one weighs 0.2 of its neighbour
    hand = [1.0 + 0.2 * (-1.5 + 0.2 * 3.0), -1.5 + 0.2 * 3.0, 3.0]
    np.testing.assert_allclose(gae(REWARDS, VALUES, True, 0.5, 0.4), hand, rtol=1e-12)


def test_gae_by_hand_at_the_time_limit_counts_on_the_value_of_the_last_state():
    hand = [1.0 + 0.2 * (-1.5 + 0.2 * 5.0), -1.5 + 0.2 * 5.0, 2.0 + 0.5 * 4.0 + 1.0]
    np.testing.assert_allclose(gae(REWARDS, VALUES, False, 0.5, 0.4), hand, rtol=1e-12)


@pytest.mark.parametrize("terminated", [True, False])
def test_gae_is_the_double_sum_of_equation_4(terminated):
    rng, gamma, lam, steps = np.random.default_rng(0), 0.97, 0.9, 40
    rewards, values = rng.normal(size=steps), rng.normal(size=steps + 1)
    known = [*values[:-1], 0.0 if terminated else values[-1]]
    sums = [
        sum((gamma * lam) ** k * (rewards[h + k] + gamma * known[h + k + 1] - known[h + k]) for k in range(steps - h))
        for h in range(steps)
    ]
    np.testing.assert_allclose(gae(rewards, values, terminated, gamma, lam), sums, rtol=1e-10)


def test_gae_at_lambda_1_is_the_discounted_return_less_the_value():
    returns = [1.0 + 0.5 * (0.0 + 0.5 * 2.0), 0.0 + 0.5 * 2.0, 2.0]
    np.testing.assert_allclose(gae(REWARDS, VALUES, True, 0.5, 1.0) + VALUES[:-1], returns, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Value network
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_the_value_network_written_out(norm):
    model = draw_model(3, 2)
    model.obs_mean[:], model.obs_std[:] = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.1, 3.0])
    value, x = ValueNetwork(model, 8, norm), torch.randn(5, 4, 3) * 3
    value.set_units(torch.tensor([10.0, 30.0]))
    h = (x - model.obs_mean) / model.obs_std
    for layer in value.hidden:
        h = h @ layer.weight.T + layer.bias
        if norm:
            h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = h * torch.sigmoid(h)
    torch.testing.assert_close(value(x), 20.0 + 10.0 * (h @ value.head.weight.T + value.head.bias)[..., 0])


def test_returns_that_are_all_alike_set_no_scale():
    value = ValueNetwork(draw_model(3, 2), 8, False)
    value.set_units(torch.full((7,), 2.5))
    assert (value.center.item(), value.scale.item()) == (2.5, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Collecting
# ---------------------------------------------------------------------------------------------------------------------


def collected(kind="dt", env_id="Hopper-v5", iteration=1, **changes):
    """A network, arguments and the episodes that it plays."""
    args = toy_args(env_id=env_id, **changes)
    envs = [make_env(env_id) for _ in range(args.n_trajectories)]
    model = draw_model(envs[0].observation_space.shape[0], envs[0].action_space.shape[0], kind)
    args.g_eval = args.g_online
    return model, args, collect_episodes(rollout_copy(model), envs, args, iteration)[0]


@pytest.mark.parametrize("kind, context", [("dt", 1), ("dt", 3), ("reinformer", 3)])
@torch.no_grad()
def test_an_episode_is_that_of_playing_it_alone(kind, context):
    model, args, episodes = collected(kind, c_online=context, n_trajectories=3)
    assert len({len(episode.rewards) for episode in episodes}) > 1  # some go on when others have ended
    for i, episode in enumerate(episodes):
        env, g, steps = make_env("Hopper-v5"), 3.0, len(episode.rewards)
        observation, _ = env.reset(seed=stream(args.seed, 1, f"episode {i}"))
        seen, returns, actions = [], [], []
        for h in range(steps):
            seen.append(observation.astype(np.float32))
            returns.append(np.float32(g))
            window = (np.array(seen[-context:]), np.array(returns[-context:]))
            past = np.array(actions[-context:][-(len(window[0]) - 1) :] if len(window[0]) > 1 else []).reshape(-1, 3)
            window = [torch.from_numpy(part.astype(np.float32))[None] for part in (*window, past)]
            dist, used = model.act(*window)
            returns[-1] = used.item()
            position = context - 1 + h
            assert episode.returns[position] == pytest.approx(used.item(), abs=1e-4)
            np.testing.assert_allclose(episode.observations[position], seen[-1], atol=1e-5)
            actions.append(squash(torch.from_numpy(episode.u[h])).numpy())
            np.testing.assert_array_equal(episode.actions[position], actions[-1])
            z = (torch.from_numpy(episode.u[h]) - dist.mean[0]) / dist.log_std[0].exp()
            assert z.abs().max() < 5  # drawn from this very law
            observation, reward, terminated, truncated, _ = env.step(scale_action(actions[-1], env))
            assert episode.rewards[h] == pytest.approx(reward, abs=1e-5)
            assert (terminated or truncated) == (h == steps - 1)
            g -= reward
        assert bool(episode.terminated) == terminated
        np.testing.assert_allclose(episode.last_observation, observation, atol=1e-5)
        assert episode.real.tolist() == [False] * (context - 1) + [True] * steps


def test_the_time_limit_is_no_termination():
    _, _, episodes = collected(env_id="Pendulum-v1")
    assert [len(episode.rewards) for episode in episodes] == [200, 200]
    assert not any(episode.terminated for episode in episodes)
    assert all(episode.terminated for episode in collected()[2])  # Hopper falls


# ---------------------------------------------------------------------------------------------------------------------
# Buffer
# ---------------------------------------------------------------------------------------------------------------------


def filled_learner(kind="dt", dtype=torch.float32, width=16, **changes):
    """A learner that remembers the episodes of one iteration."""
    args = toy_args(**changes)
    envs = [make_env(args.env_id) for _ in range(args.n_trajectories)]
    model = draw_model(11, 3, kind, embed_dim=width).use_precision(dtype)
    args.g_eval = args.g_online
    learner = PPOLearner(model, args)
    learner.remember(collect_episodes(rollout_copy(model), envs, args, 1)[0])
    return learner


@CONTEXTS
@pytest.mark.parametrize("hindsight", [False, True])
@torch.no_grad()
def test_all_steps_are_the_episodes_between_paddings(context, hindsight):
    learner = filled_learner(c_online=context, hindsight=hindsight, n_trajectories=3)
    steps, at = learner.all_steps(0.8), 0
    for episode, old in learner.replay:
        count = len(episode.rewards)
        own = slice(at + context - 1, at + context - 1 + count)
        np.testing.assert_array_equal(steps.observations[own], episode.observations[context - 1 :])
        np.testing.assert_array_equal(steps.u[own], episode.u)
        np.testing.assert_array_equal(steps.old_log_prob[own], old)
        states = np.concatenate([episode.observations[context - 1 :], episode.last_observation[None]])
        values = learner.value(torch.from_numpy(states).float()).double().numpy()
        advantage = gae(episode.rewards, values, episode.terminated, 0.9, 0.8)
        np.testing.assert_allclose(steps.advantage[own], advantage, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(steps.value_target[own], advantage + values[:-1], rtol=1e-4, atol=1e-5)
        reached = [episode.rewards[h:].sum() for h in range(count)]
        expected = reached if hindsight else episode.returns[context - 1 :]
        np.testing.assert_allclose(steps.new_returns[own], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(steps.returns[own], episode.returns[context - 1 :])
        end = at + context - 1 + count + learner.args.c_train - 1
        assert steps.real[at:end].tolist() == [False] * (context - 1) + [True] * count + [False] * 3
        at = end
    assert at == len(steps.real)


@CONTEXTS
def test_sub_trajectories_begin_at_every_step_alike_and_end_with_their_episode(context):
    learner = filled_learner(c_online=context, n_trajectories=2, n_batch=4000)
    steps = learner.all_steps(0.8)
    steps = steps._replace(old_log_prob=torch.arange(len(steps.real)).float())  # to know them by
    sub = learner.draw(steps, np.random.default_rng(0))
    assert sub.real.shape == (4000, context - 1 + 4) and sub.u.shape == (4000, 4, 3)
    first, counts = np.unique(sub.old_log_prob[:, 0].numpy(), return_counts=True)
    assert first.tolist() == steps.real.nonzero()[:, 0].tolist()
    mean = 4000 / len(first)
    assert ((counts - mean) ** 2 / mean).sum() < len(first) + 4 * math.sqrt(2 * len(first))  # chi squared
    lived = [context - 1 + len(episode.rewards) for episode, _ in learner.replay]
    ends = np.cumsum([each + 3 for each in lived]) - 3  # behind each, three steps of padding
    left = np.array([min(end - start for end in ends if end > start) for start in sub.old_log_prob[:, 0].numpy()])
    assert sub.real[:, context - 1 :].sum(1).tolist() == np.minimum(left, 4).tolist()
    row, start = 17, int(sub.old_log_prob[17, 0])
    assert torch.equal(sub.observations[row], steps.observations[start - context + 1 : start + 4])
    assert torch.equal(sub.advantage[row], steps.advantage[start : start + 4])


def test_the_buffer_keeps_the_last_iterations():
    learner = filled_learner(n_trajectories=2, replay_iterations=2)
    first = [episode for episode, _ in learner.replay]
    later = collected(iteration=2)[2] + collected(iteration=3)[2]
    learner.remember(later[:2])
    assert [episode is kept for episode, (kept, _) in zip([*first, *later[:2]], learner.replay)] == [True] * 4
    learner.remember(later[2:])
    assert [episode is kept for episode, (kept, _) in zip(later, learner.replay)] == [True] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Ratio, loss and update
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_sub(model, rows=6, steps=3, context=2, seed=0):
    """Random sub-trajectories of which some end early and some begin an episode; `model` is the policy that acted."""
    torch.manual_seed(seed)
    obs_dim, act_dim, width = model.sizes["obs_dim"], model.act_dim, context - 1 + steps
    real = torch.arange(width) < context - 1 + torch.tensor([steps, 2, 1] * rows)[:rows, None]
    real[::2, : context - 1] = False
    returns, observations = 3 * torch.randn(rows, width), torch.randn(rows, width, obs_dim)
    actions, noise = torch.rand(rows, width, act_dim) * 1.9 - 0.95, torch.randn(rows, steps, act_dim)
    advantage, target, zeros = 5 + torch.randn(rows, steps), torch.randn(rows, steps), torch.zeros(rows, steps)
    sub = TokenBatch(observations, returns, actions, real, returns, noise, zeros, advantage, target)
    sub = sub._replace(u=distribution(model, sub, returns).sample(noise))
    return sub._replace(old_log_prob=distribution(model, sub, returns).log_prob(sub.u))


def own(sub):
    """Which steps of the sub-trajectories there are: (B, L)."""
    return sub.real[:, -sub.u.shape[1] :]


def laws(model, sub, returns):
    """Normal laws before tanh of each row and real step, one window at a time without its padding."""
    rows, steps, _ = sub.u.shape
    context, found = sub.real.shape[1] - steps + 1, {}
    for i in range(rows):
        for h in (h for h in range(steps) if own(sub)[i, h]):
            seen = [j for j in range(h, h + context) if sub.real[i, j]]
            window = (sub.observations[i, seen], returns[i, seen], sub.actions[i, seen[:-1]])
            dist, _ = model(*(part[None] for part in window))
            found[i, h] = Normal(dist.mean[0, -1].double(), dist.log_std[0, -1].double().exp())
    return found


@pytest.mark.parametrize("hindsight", [False, True])
@KINDS
@torch.no_grad()
def test_loss_equals_equation_5_written_out(kind, hindsight):
    old, model, reference = draw_model(4, 2, kind), draw_model(4, 2, kind), draw_model(4, 2, kind, seed=2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    args, kappa, sub = toy_args(beta=0.3, epsilon=0.1), 0.7, draw_sub(old, rows=18)
    sub.old_log_prob[~own(sub)] = -30.0  # what stands after the end must not count
    if hindsight:
        sub = sub._replace(new_returns=sub.returns + torch.randn_like(sub.returns) * 0.1)
    torch.manual_seed(5)
    noise = torch.randn(sub.u.shape)
    new, before = laws(model, sub, sub.new_returns), laws(old, sub, sub.returns)
    anchor = laws(reference, sub, sub.new_returns)
    advantages = np.array([sub.advantage[key].item() for key in new])
    advantages = (advantages - advantages.mean()) / advantages.std()  # over the batch's real steps
    surrogates, kls, entropies, ratios = [], [], [], []
    for key, advantage in zip(new, advantages):
        u, law = sub.u[key].double(), new[key]
        ratio = math.exp((law.log_prob(u) - before[key].log_prob(u)).sum())  # the slope of tanh is in both
        ratios.append(ratio)
        surrogates.append(min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage))
        kls.append(kl_divergence(law, anchor[key]).sum().item())
        z = law.mean + law.stddev * noise[key].double()
        slope = torch.log1p(-(torch.tanh(z) ** 2))
        entropies.append(-(law.log_prob(z) - slope).sum().item())
    torch.manual_seed(5)
    loss, values = ppo_loss(model, reference, sub, torch.tensor(kappa), args)
    assert values["ratio_max"].item() == pytest.approx(max(ratios), rel=1e-4)
    means = {"surrogate": surrogates, "kl": kls, "entropy": entropies, "ratio_mean": ratios}
    for name, each in means.items():
        assert values[name].item() == pytest.approx(np.mean(each), rel=1e-4, abs=1e-5), name
    assert values["clip_fraction"].item() == pytest.approx(np.mean([abs(ratio - 1) > 0.1 for ratio in ratios]))
    assert 0 < values["clip_fraction"] < 1
    expected = -(np.mean(surrogates) - 0.3 * np.mean(kls) + kappa * np.mean(entropies))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("shift, moves", [(0.5, False), (-0.5, True), (0.05, True)])
def test_there_is_no_gradient_where_the_clipped_branch_is_the_smaller(shift, moves):
    """Of two steps with opposite advantages, both ratios above, below or inside the range: e^shift."""
    model, args = draw_model(4, 2), toy_args(beta=0.0)
    sub = draw_sub(model, rows=2, steps=1, context=1)
    sign = torch.tensor([[1.0], [-1.0]])
    sub = sub._replace(advantage=7 + 3 * sign, old_log_prob=sub.old_log_prob - shift * sign)
    loss, values = ppo_loss(model, model, sub, torch.tensor(0.0), args)
    loss.backward()
    steepest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert steepest > 1e-3 if moves else steepest < 1e-12
    up, down = math.exp(shift), math.exp(-shift)
    assert loss.item() == pytest.approx(-0.5 * (min(up, 1.2) - max(down, 0.8)), abs=1e-5)
    assert values["ratio_max"].item() == pytest.approx(max(up, down), rel=1e-5)


@torch.no_grad()
def ratios(learner, sub):
    log_ratio = distribution(learner.model, sub, sub.new_returns).log_prob(sub.u) - sub.old_log_prob
    return log_ratio[own(sub)].exp()


def best_dtype():
    return ppo.set_up_torch(toy_args(device="cpu"))[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CONTEXTS
@KINDS
def test_ratio_is_1_before_the_first_update(kind, context, dtype):
    if dtype == torch.bfloat16 and best_dtype() != dtype:
        pytest.skip("no bf16 units")
    learner = filled_learner(kind, dtype, width=64, c_online=context, n_trajectories=4, n_batch=24)
    steps = learner.all_steps(0.8)
    for seed in range(4):
        sub = learner.draw(steps, np.random.default_rng(seed))
        assert (ratios(learner, sub) - 1).abs().max() <= 1e-4
        assert not own(sub).all()  # episodes' ends among them
    assert learner.update(1)["losses/ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert (ratios(learner, sub) - 1).abs().max() > 1e-3


@CONTEXTS
def test_hindsight_spoils_the_ratio_and_leaves_the_old_log_probability(context):
    """Fig. 1's point: relabelled, the ratio is nowhere near 1 although the policy has not moved."""
    plain, relabelled = (filled_learner(c_online=context, g_online=9.0, hindsight=each) for each in (False, True))
    ours, theirs = plain.all_steps(0.8), relabelled.all_steps(0.8)
    for name in ("observations", "returns", "u", "real", "old_log_prob"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    ours, theirs = (
        learner.draw(steps, np.random.default_rng(0)) for learner, steps in ((plain, ours), (relabelled, theirs))
    )
    assert (ratios(plain, ours) - 1).abs().max() <= 1e-4
    off = (ratios(relabelled, theirs) - 1).abs()
    assert off.mean() > 0.02 and off.max() > 0.2  # some outside the clipping range


@torch.no_grad()
def value_error(learner, steps):
    return ((learner.value(steps.observations) - steps.value_target)[steps.real] ** 2).mean().item()


def test_a_value_update_lowers_equation_6_and_moves_nothing_else():
    learner = filled_learner(n_batch=64)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    steps = learner.all_steps(0.8)
    sub = learner.draw(steps, np.random.default_rng(0))
    with torch.no_grad():
        error = (learner.value(sub.observations) - sub.value_target)[own(sub)]
    assert learner.update_value(sub).item() == pytest.approx((error**2).mean().item(), rel=1e-5)
    for _ in range(30):
        learner.update_value(sub)
    with torch.no_grad():
        assert ((learner.value(sub.observations) - sub.value_target)[own(sub)] ** 2).mean() < 0.8 * (error**2).mean()
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


def test_warming_up_takes_the_units_of_the_returns_and_fits_them():
    cold, warm = (filled_learner(n_trajectories=6, n_batch=64, value_warmup=count) for count in (0, 150))
    steps = cold.all_steps(1.0)  # discounted returns: all of these episodes end truly, so no value is in them
    returns = steps.value_target[steps.real]
    for learner in (cold, warm):
        learner.warm_up_value()
        assert learner.value.center.item() == pytest.approx(returns.mean().item(), rel=1e-5)
        assert learner.value.scale.item() == pytest.approx(returns.std(correction=0).item(), rel=1e-5)
    assert value_error(warm, steps) < 0.5 * value_error(cold, steps)


def test_beyond_the_time_limit_the_warm_up_counts_on_the_network_itself():
    """Reward 1 for 50 steps, then the time limit: with gamma 0.98 every value is 1 / (1 - 0.98) = 50, while the rewards
    seen alone are worth 32 at first and 1 at last, 20 on average."""
    for count, low, high in ((50, 10, 30), (2000, 42, 51)):
        learner = filled_learner(gamma=0.98, n_batch=64, lr_value=3e-2, value_warmup=count)
        episode, old = learner.replay[0]
        fields = [np.resize(f, (50, *f.shape[1:])) for f in (*episode[:5], old)]
        episode = episode._replace(
            **dict(zip(episode._fields, fields[:5])), rewards=np.ones(50), terminated=np.array(False)
        )
        learner.replay = [(episode, fields[5])]
        learner.warm_up_value()
        steps = learner.all_steps(1.0)
        assert low < learner.value(steps.observations)[steps.real].mean().item() < high


def test_only_the_first_iteration_warms_up_and_targets_are_worked_out_anew():
    learner = filled_learner()
    assert math.isfinite(learner.update(1)["losses/explained_variance"])
    center = learner.value.center.item()
    one = learner.all_steps(0.8).advantage
    learner.remember(collected(iteration=2)[2])  # other returns, by which the units would be others
    learner.update(2)
    assert learner.value.center.item() == center and learner.updates == 16
    assert not torch.equal(learner.all_steps(0.8).advantage[: len(one)], one)  # the current value network's


def test_kappa_rises_while_the_entropy_is_below_minus_the_dimension_of_the_action():
    for bias, direction in ((-9.0, 1), (0.3, -1)):
        learner = filled_learner(kappa_lr=0.01, n_minibatches=1)
        learner.model.log_std_head.weight.data[:] = 0.0
        learner.model.log_std_head.bias.data[:] = bias
        row = learner.update(1)
        assert (row["losses/entropy"] < -3) == (direction == 1)
        assert learner.log_kappa.item() == pytest.approx(math.log(0.1) + direction * 0.01, abs=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line():
    learner = filled_learner()
    learner.replay[0][0].rewards[:] = math.nan
    with refused("the loss is not finite in iteration 3"):
        learner.update(3)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
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
    assert [key for key in ours | theirs if ours.get(key) != theirs.get(key)] == ["/args/run_dir"]


def resume(run_dir, *flags):
    return main(parse_args(["--resume", str(run_dir), *map(str, flags)]))


@pytest.fixture(scope="session")
def whole(pretrained, tmp_path_factory):
    """The folder of a run of 4 iterations in one go; not to be changed."""
    return main(toy_args(iterations=4, pretrained=pretrained(), run_dir=str(tmp_path_factory.mktemp("whole") / "run")))


def test_a_run_writes_its_metrics_and_learns(whole, pretrained):
    rows = table(whole)
    assert list(rows[0]) == METRICS and [row["iteration"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0]["eval/return_mean"] != "" and rows[0]["rollout/return"] == ""
    assert all(value != "" and math.isfinite(float(value)) for row in rows[1:] for value in row.values())
    assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    for i, row in enumerate(rows[1:], 1):
        full = sum(2 * float(each["rollout/length"]) for each in rows[1 : i + 1])
        assert float(row["charts/env_steps"]) == float(row["charts/env_steps_full"]) == full
        assert int(row["charts/env_steps_eval"]) == sum(float(each["eval/length_mean"]) for each in rows[1 : i + 1])
        assert int(row["charts/gradient_updates"]) == 8 * i
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
    run_dir = main(toy_args(**flags, c_online=None, g_online=None, epsilon=None, kappa_initial=None, gamma=None))
    content, rows = load_checkpoint(run_dir), table(run_dir)
    assert (content["c_online"], content["sizes"]["kind"], content["script"]) == (context, model, "ppo_dt_continuous")
    assert [row["iteration"] for row in rows] == ["0", "1"] and rows[1]["eval/normalized_score"] != ""
    assert float(rows[1]["losses/ratio_first"]) == pytest.approx(1.0, abs=1e-4)
    length, ended = (float(rows[1][f"rollout/{name}"]) for name in ("length", "terminated"))
    if env_id == "Ant-v4":  # whether an ant falls within 1,000 steps hangs on the rounding of the toy's weights
        assert ended in (0.0, 0.5, 1.0) and (length < 1000) == (ended > 0)
    else:
        assert ended == float(env_id == "Hopper-v5")
    printed = capsys.readouterr().out
    assert "iteration 1/1" in printed and f"checkpoint: {run_dir}" in printed


def test_on_pendulum_the_return_rises(tmp_path):
    flags = dict(env_id="Pendulum-v1", dataset_steps=4000, updates=100, batch_size=64, lr=3e-3, c_offline=1)
    flags |= dict(embed_dim=32, n_layers=2, n_heads=2, eval_episodes=1, threads=1, run_dir=str(tmp_path / "start"))
    start = pretrain_dt.main(pretrain_dt.Args(**flags))
    flags = dict(env_id="Pendulum-v1", pretrained=str(start), iterations=12, eval_every=12, eval_episodes=10, lr=3e-3)
    flags |= dict(n_minibatches=40, n_batch=64, c_train=5, value_dim=64, gamma=0.95, threads=1)
    first, *_, last = table(main(Args(**flags, run_dir=str(tmp_path / "run"))))
    assert float(last["eval/return_mean"]) > float(first["eval/return_mean"]) + 150
    assert float(last["losses/explained_variance"]) > 0.5


def test_hindsight_runs_and_its_first_ratio_is_off(whole, pretrained, tmp_path):
    flags = dict(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run"), hindsight=True)
    rows, plain = table(main(toy_args(**flags))), table(whole)
    assert abs(float(rows[1]["losses/ratio_first"]) - 1.0) > 1e-4
    assert rows[1]["losses/loss"] != plain[1]["losses/loss"] and rows[1]["rollout/return"] == plain[1]["rollout/return"]


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


def progress(run_dir):
    path = run_dir / "checkpoint.pt"
    return load_checkpoint(path)["iteration"] if path.exists() else 0


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(kills, pretrained, tmp_path):
    run_dir, moments = tmp_path / "killed", np.random.default_rng(kills).uniform(0.0, 0.5, size=kills)
    args = toy_args(pretrained=pretrained(), run_dir=str(run_dir))
    given = {name: value for name, value in vars(args).items() if value is not None and not isinstance(value, bool)}
    begin = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    begin, iteration = [*begin, "--value-norm", "False"], 0
    for moment in moments:
        flags = [*(["--resume", str(run_dir)] if iteration else begin), "--iterations", "100000"]
        process = subprocess.Popen([sys.executable, ppo.__file__, *flags], stdout=subprocess.DEVNULL)
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


@pytest.mark.parametrize("script", [pretrain_dt, ppo], ids=lambda script: script.__name__)
def test_evaluating_a_saved_run_scores_what_its_last_row_says(script, whole, capsys):
    args, content = script.parse_args(["--eval-only", str(whole)]), load_checkpoint(whole)
    dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[content["precision"]]
    envs = script.make_eval_envs(args, content["env_kwargs"], whole)
    values = script.run_evaluation(args, script.load_model(content).use_precision(dtype), envs, 4)
    assert all(repr(values[name]) == table(whole)[-1][name] for name in ppo.EVALUATION)
    printed, before = capsys.readouterr().out, sorted(whole.iterdir())
    script.eval_only(args)
    assert capsys.readouterr().out == printed and printed.startswith("evaluation: return_mean ")
    assert sorted(whole.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, match",
    [
        ({"env_id": "Walker2d-v5"}, "was pretrained in Hopper-v5, not in Walker2d-v5"),
        ({"c_train": 0}, "--c-train is 0: give one above 0"),
        ({"lr_value": math.nan}, "--lr-value is nan"),
        ({"gae_lambda": -0.1}, "--gae-lambda is -0.1"),
        ({"value_warmup": -1}, "--value-warmup is -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_written(flags, match, pretrained, tmp_path):
    with refused(match):
        main(toy_args(pretrained=pretrained(), run_dir=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_script_is_not_resumed_by_this_one(pretrained):
    with refused("is a run of pretrain_dt.py: resume it with that script"):
        parse_args(["--resume", pretrained()])


@pytest.mark.parametrize("flag", ["--seed 3", "--c-train 9", "--env-id Ant-v4", "--hindsight"])
def test_resuming_refuses_changed_arguments(flag, whole):
    with refused(f"was made with {flag.split()[0]} "):
        parse_args(["--resume", str(whole), *flag.split()])


def test_resuming_in_another_precision_is_refused(pretrained, tmp_path):
    run_dir = main(toy_args(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run")))
    content = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    torch.save(content | {"precision": "torch.float16"}, run_dir / "checkpoint.pt")
    with refused("the run began in torch.float16, here it is torch"):
        resume(run_dir, "--iterations", 2)


def test_a_reward_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(pretrained, tmp_path, monkeypatch):
    run_dir, real = main(toy_args(iterations=1, pretrained=pretrained(), run_dir=str(tmp_path / "run"))), ppo.d4rl_rules
    monkeypatch.setattr(ppo, "d4rl_rules", lambda *step: (math.nan, real(*step)[1]))
    with refused("a reward or observation is not finite in iteration 2"):
        resume(run_dir, "--iterations", 2)
    assert progress(run_dir) == 1


def test_the_command_prints_one_line_on_stderr_and_exits_with_1(whole):
    done = subprocess.run(
        [sys.executable, ppo.__file__, "--resume", str(whole), "--seed", "9"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]*--seed[^\n]*\n", done.stderr), done.stderr


def test_episode_fields_are_what_a_checkpoint_stores(whole):
    (first, *_), learner = load_checkpoint(whole)["learner"]["replay"], load_checkpoint(whole)["learner"]
    assert len(first) == len(Episode._fields) + 1 and len(learner["replay"]) == 4
