"""Critic, candidates, loss, update and buffers of q_guided_grpo_dt.py, by hand."""

import ast
import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import q_guided_grpo_dt as q_guided
from q_guided_grpo_dt import (
    ACTION_LIMIT,
    ROWS,
    Args,
    Candidates,
    DecisionTransformer,
    Environments,
    QGuidedLearner,
    Trajectory,
    TwinCritic,
    choose_states,
    collect,
    critic_loss,
    draw_candidates,
    fill_from_table,
    group_advantages,
    lay_out,
    log_prob,
    make_env,
    polyak,
    q_guided_loss,
    read_data,
    squash,
    td_target,
    transitions_of,
)

SIZES = dict(embed_dim=16, n_layers=2, n_heads=2)
CONTEXTS = pytest.mark.parametrize("context", [1, 5])


def toy_args(**changes):
    """The learning rates are high, so that a few updates leave a mark on every weight."""
    toy = dict(env_id="Hopper-v5", iterations=2, n_trajectories=2, replay_size=4, n_sources=3, n_points=2, gamma=0.9)
    toy |= dict(group_size=4, buffer_size=40, delta_r=0.0, g_online=3.0, c_online=1, n_batch=8, epsilon=0.2, lr=1e-2)
    toy |= dict(kappa_initial=0.1, critic_warmup=6, critic_updates=5, critic_batch=16, critic_dim=8, critic_norm=False)
    toy |= dict(lr_critic=1e-2, policy_delay=2, tau=0.1, reward_divisor=1.0, embed_dim=16, reference_every=3)
    toy |= dict(eval_episodes=1, eval_every=1, cuda=False, threads=1)
    return Args(**(toy | changes))


def refused(match):
    """The block ends with `error: ...` on one line, which Python prints on stderr with exit code 1."""
    return pytest.raises(SystemExit, match=rf"\Aerror: [^\n]*{match}[^\n]*\Z")


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


@torch.no_grad()
def law(model, window, seen):
    """The law of u (A,) at the last step of a window (K, ...), from the steps `seen` of it alone, without padding. The
    last action is not read, whatever it is."""
    observations, returns, actions = (torch.as_tensor(np.array(field))[seen] for field in window[:3])
    actions = torch.cat([actions[:-1], torch.full_like(actions[-1:], torch.nan)])
    window = [field[None].float() for field in (observations, returns, actions)]
    dist = model(*window, torch.ones(1, len(returns), dtype=torch.bool))
    return Normal(dist.mean[0].double(), dist.stddev[0].double())


# ---- Settings -------------------------------------------------------------------------------------------------------

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
def test_rows_are_table_6_and_the_critic_is_that_of_the_family(env_id, kind, numbers, capsys):
    args = Args(env_id=env_id)
    fill_from_table(args, kind, 100.0)
    assert {name: float(getattr(args, name)) for name in NAMES} == dict(zip(NAMES, map(float, numbers)))
    assert (args.lr, args.kappa_initial, args.delta_r) == (1e-5, 1e-2, 0.0)
    critic = (args.critic_dim, args.critic_norm, args.lr_critic, args.policy_delay)
    locomotion = env_id[:3] in ("Hop", "Wal", "Ant") and "Maze" not in env_id
    assert critic == ((256, False, 1e-3, 2) if locomotion else (512, True, 2e-4, 1))
    assert f"{kind} data" in capsys.readouterr().out and len(PRINTED) == len(ROWS)


def test_medium_replay_takes_mediums_row_and_a_task_outside_the_table_hoppers(capsys):
    fill_from_table(Args(env_id="Ant-v5"), "medium-replay", 0.0)
    assert "row Ant medium (medium-replay data)" in capsys.readouterr().out
    args = Args(env_id="Pendulum-v1")
    fill_from_table(args, "random", -400.0)
    assert "outside the table" in capsys.readouterr().out
    assert (args.g_online, args.critic_dim, args.critic_norm) == (0.0, 256, False)


def test_what_the_rows_do_not_say_is_td3s_and_grpo_dts():
    args = Args()
    assert (args.n_sources, args.n_points, args.group_size, args.replay_size, args.buffer_size) == (16, 4, 8, 32, 2048)
    assert (args.critic_warmup, args.critic_updates, args.critic_batch, args.n_minibatches) == (10_000, 300, 256, 8)
    assert (args.tau, args.target_noise, args.target_noise_clip, args.eval_every) == (0.005, 0.2, 0.5, 10)


def test_the_script_needs_no_simulator_and_reads_no_datasets():
    nodes = ast.walk(ast.parse(Path(q_guided.__file__).read_text()))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert "gymnasium" in imported and not imported & {"mujoco", "multiprocessing", "h5py", "minari"}


# ---- Critic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_each_critic_is_an_mlp_of_two_hidden_layers_on_normalised_observation_and_action(norm):
    model = draw_model(3, 2)
    model.obs_mean[:], model.obs_std[:] = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.1, 3.0])
    critic, observations, actions = TwinCritic(model, 8, norm), torch.randn(7, 3) * 3, torch.rand(7, 2) * 2 - 1
    q = critic(observations, actions)
    assert q.shape == (2, 7)
    for i in range(2):
        layers = [layer for layer in critic.networks[i] if isinstance(layer, torch.nn.Linear)]
        assert [layer.weight.shape for layer in layers] == [(8, 5), (8, 8), (1, 8)]
        h = torch.cat([(observations - model.obs_mean) / model.obs_std, actions], dim=-1)
        for layer in layers[:-1]:
            h = layer(h)
            if norm:
                h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            h = h * torch.sigmoid(h)
        torch.testing.assert_close(q[i], layers[-1](h)[:, 0], rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in critic.parameters()) == 2 * (6 * 8 + 9 * 8 + 9)  # LayerNorm has no weights


def test_the_two_critics_begin_apart_and_hang_on_the_seed():
    one, same, other = (QGuidedLearner(draw_model(), two_trajectories(), toy_args(seed=seed)) for seed in (1, 1, 2))
    assert not torch.equal(weights(one.critic.networks[0]), weights(one.critic.networks[1]))
    assert torch.equal(weights(one.critic), weights(same.critic))
    assert torch.equal(weights(one.critic), weights(one.target_critic))
    assert not torch.equal(weights(one.critic), weights(other.critic))


@pytest.mark.parametrize("env_id, norm", [("Ant-v5", False), ("AdroitHandPen-v1", True), ("AntMaze_UMaze-v4", True)])
def test_layer_norm_is_off_in_locomotion_only(env_id, norm):
    args = Args(env_id=env_id)
    fill_from_table(args, "medium", 0.0)
    learner = QGuidedLearner(draw_model(), two_trajectories(), args)
    q = learner.critic(torch.randn(500, 11) * 100, torch.zeros(500, 3))
    assert (q.std() < 2) == norm  # normed, the output does not grow with the observation


class Policy:
    """Acts on a window by a Gaussian around `mean`, whose std is 0 unless given; keeps what it was shown."""

    def __init__(self, mean=(0.3,), std=0.0):
        self.mean, self.std = torch.tensor(mean), std

    def conditioned_on(self, observations, returns, actions, real):
        return returns

    def __call__(self, observations, returns, actions, real):
        self.seen = [observations, returns, actions, real]
        mean = self.mean.expand(len(returns), -1)
        return Normal(mean, torch.full_like(mean, self.std), validate_args=False)


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


def target(data, context, steps, **changes):
    """By the numbers of the steps, 0 to 4."""
    args = toy_args(**(dict(gamma=0.5, target_noise=0.0, c_online=context) | changes))
    return td_target(data, data.usable.nonzero()[steps, 0], Policy(), Critic(), args).tolist()


@pytest.mark.parametrize("context", [1, 3])
def test_the_target_by_hand_at_a_true_end(context):
    data = two_trajectories(context, last=[7.0, 8.0])  # 1, 2, 7 | 3, 4, 5, 8
    assert target(data, context, [1]) == [20.0]  # nothing comes after it, whatever Q says of the state


@pytest.mark.parametrize("context", [1, 3])
def test_the_target_by_hand_at_the_time_limit_counts_on_the_state_after_it(context):
    data = two_trajectories(context, last=[7.0, 8.0])
    assert target(data, context, [4]) == [50.0 + 0.5 * 16.0]  # min(2 * 8, 3 * 8 - 1)


@pytest.mark.parametrize("context", [1, 3])
def test_the_target_by_hand_within_a_trajectory(context):
    data = two_trajectories(context, last=[0.25, 8.0])
    assert target(data, context, [0, 2, 3]) == [10.0 + 0.5 * 4.0, 30.0 + 0.5 * 8.0, 40.0 + 0.5 * 10.0]
    data.observations[context] = 0.5  # after step 0; here the second is the smaller: 3 * 0.5 - 1
    assert target(data, context, [0]) == [10.0 + 0.5 * 0.5]
    assert target(data, context, [0], reward_divisor=100.0) == pytest.approx([0.1 + 0.5 * 0.5])


def test_the_target_action_is_sampled_and_smoothed_by_clipped_noise():
    data, index = two_trajectories(1, last=[7.0, 8.0]), torch.zeros(20_000, dtype=torch.long)
    for policy, args, spread in [
        (Policy((0.3, -0.4)), toy_args(), 0.2),
        (Policy((0.3, -0.4)), toy_args(target_noise=1.0), None),
        (Policy((0.3, -0.4), 0.1), toy_args(target_noise=0.0), 0.1 * (1 - math.tanh(0.3) ** 2)),
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


# ---- Data -----------------------------------------------------------------------------------------------------------


def draw_data(lengths, terminated, seed=0, obs_dim=11, act_dim=3):
    """What pretrain_dt.py --save-data keeps, of trajectories of these lengths."""
    rng, total = np.random.default_rng(seed), sum(lengths)
    rewards = rng.normal(size=total)
    pieces = np.split(rewards, np.cumsum(lengths)[:-1])
    return dict(
        observations=rng.normal(size=(total, obs_dim)).astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, size=(total, act_dim)).astype(np.float32),
        rewards=rewards.astype(np.float32),
        returns=np.concatenate([piece[::-1].cumsum()[::-1] for piece in pieces]).astype(np.float32),
        lengths=np.array(lengths),
        terminated=np.array(terminated),
    )


def read_back(folder, data, base=None, **changes):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "data.npz", **data)
    return read_data(base or {}, toy_args(pretrained=str(folder), **changes))


def test_offline_data_are_read_as_transitions(tmp_path):
    raw = draw_data([4, 3, 5], [False, True, False])
    data, _ = read_back(tmp_path / "run", raw, c_online=3)
    steps, at = data.usable.nonzero()[:, 0], [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]  # the last of both time-outs left out
    for name in ("observations", "actions", "rewards", "returns"):
        np.testing.assert_array_equal(getattr(data, name)[steps], raw[name][at])
    assert data.terminated[steps].int().tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("context", [1, 3])
def test_for_offline_steps_the_target_policy_sees_the_realised_return(context, tmp_path):
    raw = draw_data([4, 3], [False, True])
    data, policy = read_back(tmp_path / "run", raw, c_online=context)[0], Policy((0.0, 0.0, 0.0))
    td_target(data, data.usable.nonzero()[:, 0], policy, Critic(), toy_args(c_online=context))
    observations, returns, actions, real = policy.seen
    for row, (h, start) in enumerate([(0, 0), (1, 0), (2, 0), (4, 4), (5, 4)]):
        window = [j for j in range(h + 2 - context, h + 2) if j >= start]  # ends with the state after step h
        assert real[row].tolist() == [False] * (context - len(window)) + [True] * len(window)
        kept = slice(context - len(window), None)
        np.testing.assert_array_equal(observations[row, kept], raw["observations"][window])
        np.testing.assert_array_equal(returns[row, kept], raw["returns"][window])
        np.testing.assert_array_equal(actions[row, kept][:-1], raw["actions"][window[:-1]])


@pytest.mark.parametrize("context", [1, 3])
def test_for_online_steps_the_target_policy_sees_the_stored_return(context):
    (learner, replay), policy = filled_learner(c_online=context), Policy((0.0, 0.0, 0.0))
    data = learner.transitions
    steps = data.usable.nonzero()[:, 0]
    steps = steps[steps >= learner.n_offline]
    assert len(steps) == sum(len(trajectory.rewards) for trajectory in replay)
    td_target(data, steps, policy, Critic(), learner.args)
    observations, returns, actions, real = policy.seen
    row = 0
    for trajectory in replay:
        g = np.append(trajectory.returns, trajectory.returns[-1] - trajectory.rewards[-1])
        seen = np.concatenate([trajectory.observations, trajectory.last_observation[None]])
        for h in range(len(trajectory.rewards)):
            window = slice(h + 1, h + 1 + context)  # of the slots behind the padding
            np.testing.assert_allclose(returns[row], g[window], rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(observations[row], seen[window], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(actions[row, :-1], trajectory.actions[window][: context - 1])
            assert real[row].tolist() == [*trajectory.real, True][window]
            assert data.rewards[steps[row]].item() == pytest.approx(trajectory.rewards[h], rel=1e-5)
            last = h == len(trajectory.rewards) - 1
            assert data.terminated[steps[row]].item() == (last and bool(trajectory.terminated))
            row += 1
    realised = trajectory.rewards[::-1].cumsum()[::-1]
    assert np.abs(realised[1:] - g[context:-1]).max() > 0.5  # which is another return than the realised one


def test_what_is_rolled_out_stays_for_the_critic():
    learner, _ = filled_learner()
    before = learner.transitions
    more = collected(learner, 2)
    learner.add_transitions(transitions_of(more, 1))
    count = sum(len(trajectory.rewards) for trajectory in more)
    assert learner.transitions.usable.sum() == before.usable.sum() + count
    assert all(torch.equal(new[: len(old)], old) for new, old in zip(learner.transitions, before))


# ---- The critic's updates -------------------------------------------------------------------------------------------


@functools.cache
def hoppers():
    return Environments(make_env("Hopper-v5", {}), 4)


def collected(learner, seed):
    args = learner.args
    return collect(learner.model, hoppers(), args.n_trajectories, args, np.random.default_rng(seed))


def filled_learner(bf16=False, width=16, **changes):
    """A learner whose offline data are two short trajectories, and the full trajectories of one iteration, which are
    data of its critic as well."""
    args = toy_args(**changes)
    model = draw_model(embed_dim=width)
    model.bf16 = bf16
    learner = QGuidedLearner(model, two_trajectories(args.c_online), args)
    replay = collected(learner, 1)
    learner.add_transitions(transitions_of(replay, args.c_online))
    return learner, replay


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_polyak_moves_by_tau():
    moving, goal = draw_model(seed=1), draw_model(seed=2)
    expected = 0.75 * weights(moving) + 0.25 * weights(goal)
    polyak(moving, goal, 0.25)
    torch.testing.assert_close(weights(moving), expected)


@pytest.mark.parametrize("delay", [1, 3])
def test_targets_move_at_every_so_many_updates_of_the_critic(delay):
    learner, _ = filled_learner(policy_delay=delay)
    for parameter in learner.model.parameters():
        parameter.data += 0.1  # as if the policy had learned
    policy = weights(learner.model)
    for update in range(1, 7):
        before = weights(learner.target_critic), weights(learner.target_policy)
        learner.train_critic(np.random.default_rng(update), 1)
        after = weights(learner.target_critic), weights(learner.target_policy)
        if update % delay:
            assert all(map(torch.equal, before, after))
        else:
            torch.testing.assert_close(after[0], 0.9 * before[0] + 0.1 * weights(learner.critic))
            torch.testing.assert_close(after[1], 0.9 * before[1] + 0.1 * policy)
    assert torch.equal(weights(learner.model), policy)  # the critic's updates leave the policy alone


def test_the_loss_is_the_sum_of_both_squared_errors():
    learner, index = filled_learner()[0], torch.tensor([0, 1, 3, 3])
    parts = (learner.target_policy, learner.target_critic)
    torch.manual_seed(4)
    y = td_target(learner.transitions, index, *parts, learner.args)
    q = learner.critic(learner.transitions.observations[index], learner.transitions.actions[index])
    torch.manual_seed(4)
    loss, values = critic_loss(learner.critic, *parts, learner.transitions, index, learner.args)
    expected = F.mse_loss(q[0], y) + F.mse_loss(q[1], y)
    assert loss.item() == values["critic_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert values["q_mean"].item() == pytest.approx(q.mean().item(), rel=1e-5)
    assert values["target_mean"].item() == pytest.approx(y.mean().item(), rel=1e-5)
    assert values["q_gap"].item() == pytest.approx((q[0] - q[1]).abs().mean().item(), rel=1e-5)


def random_states(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 11)), rng.uniform(-0.9, 0.9, size=(count, 3))


def trained_critic(data, updates, **changes):
    settings = dict(critic_batch=64, critic_dim=32, lr_critic=1e-2, policy_delay=1, gamma=0.5) | changes
    learner = QGuidedLearner(draw_model(n_layers=1), data, toy_args(**settings))
    return learner, learner.train_critic(np.random.default_rng(0), updates)


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
    (learner, _), drawn = filled_learner(critic_batch=50), []

    def loss(critic, policy, target_critic, data, index, args):
        drawn.append(index)
        return critic(data.observations[:1], data.actions[:1]).sum(), {"one": torch.ones(())}

    monkeypatch.setattr(q_guided, "critic_loss", loss)
    learner.train_critic(np.random.default_rng(1), 100)
    usable = learner.transitions.usable.nonzero()[:, 0]
    found, counts = torch.cat(drawn).unique(return_counts=True)
    assert torch.equal(found, usable) and (usable < learner.n_offline).sum() == 4
    mean = 5000 / len(usable)
    assert ((counts - mean) ** 2 / mean).sum() < len(usable) + 4 * math.sqrt(2 * len(usable))  # chi squared


def test_the_critic_learns_from_the_targets_and_the_values_logged_are_means_over_the_updates(monkeypatch):
    learner, seen = filled_learner()[0], []

    def spy(critic, target_policy, target_critic, data, index, args):
        assert critic is learner.critic and len(index) == 16
        assert target_policy is learner.target_policy and target_critic is learner.target_critic
        loss, values = critic_loss(critic, target_policy, target_critic, data, index, args)
        seen.append(values)
        return loss, values

    monkeypatch.setattr(q_guided, "critic_loss", spy)
    row = learner.train_critic(np.random.default_rng(0), 7)
    for name in ("critic_loss", "q_mean", "q_gap", "target_mean"):
        assert row[f"losses/{name}"] == pytest.approx(np.mean([values[name].item() for values in seen]), rel=1e-5)
    assert len(seen) == learner.critic_updates == 7 and row["time/critic"] > 0


def test_each_optimiser_steps_at_its_own_rate():
    args = toy_args(lr=0.1, lr_critic=0.2, kappa_lr=0.3)
    learner = QGuidedLearner(draw_model(), two_trajectories(), args)
    optimizers = (learner.optimizer, learner.critic_optimizer, learner.dual)
    assert [each.param_groups[0]["lr"] for each in optimizers] == [0.1, 0.2, 0.3]
    parts = (learner.model.parameters(), learner.critic.parameters(), [learner.log_kappa])
    for each, parameters in zip(optimizers, parts):
        assert list(map(id, each.param_groups[0]["params"])) == list(map(id, parameters))


def test_without_a_warm_up_the_critic_begins_as_it_is():
    learner, _ = filled_learner(critic_warmup=0)
    before = weights(learner.critic)
    assert learner.train_critic(np.random.default_rng(0), 0).keys() == {"time/critic"}
    assert torch.equal(weights(learner.critic), before)


def test_a_critic_that_is_not_finite_ends_the_run_in_a_line():
    learner, _ = filled_learner()
    learner.transitions.rewards[:] = math.nan
    with refused("the loss is not finite"):
        learner.train_critic(np.random.default_rng(3), 2)


# ---- States and candidates ------------------------------------------------------------------------------------------


def numbered(index, length, context=1):
    """A trajectory whose observations are (index, step)."""
    steps = np.arange(length + context - 1) - (context - 1)
    observations = np.stack([np.full(len(steps), index), steps], axis=1).astype(np.float32)
    actions = np.zeros((len(steps), 1), np.float32)
    fields = (observations, steps.astype(np.float32), actions, steps >= 0, actions[:length], np.zeros(length))
    return Trajectory(*fields, np.zeros((0, 0)), np.array(True), observations[-1])


def drawn_states(monkeypatch, variance, replay, **changes):
    """Pairs (number of the trajectory, step) as choose_states draws them; variance(T) in place of the policy's."""
    monkeypatch.setattr(q_guided, "action_variance", lambda policy, each, context: variance(len(each.rewards)))
    states = choose_states(None, replay, toy_args(**changes), np.random.default_rng(0))
    return [(int(trajectory.observations[-1, 0]), h) for trajectory, h in states]


@CONTEXTS
def test_states_are_of_trajectories_drawn_by_length_at_uncertain_steps(context, monkeypatch):
    replay = [numbered(0, 9, context), numbered(1, 27, context)]

    def fourth(length):  # the fourth step of each by far, the others all alike
        return np.where(np.arange(length) == 3, 50.0, 0.0)

    states = drawn_states(monkeypatch, fourth, replay, n_sources=600, n_points=3, c_online=context)
    groups = np.array(states).reshape(600, 3, 4, 2)  # sources, points, members, pair
    assert (groups == groups[:, :, :1]).all()  # the members of a group are at the same state
    points = groups[:, :, 0]
    assert (points[:, :, 0] == points[:, :1, 0]).all() and (points[:, 0, 1] == 3).all()
    assert all(len(set(steps)) == 3 for steps in points[:, :, 1].tolist())  # without replacement
    assert (points[:, 0, 0] == 0).mean() == pytest.approx(9 / 36, abs=0.06)
    others = np.unique(points[points[:, 0, 0] == 1][:, 1:, 1])
    assert set(others) == set(range(27)) - {3}  # by chance


def test_a_trajectory_shorter_than_its_points_repeats_them(monkeypatch):
    states = drawn_states(monkeypatch, np.zeros, [numbered(0, 2)], n_sources=4, n_points=5)
    assert len(states) == 4 * 5 * 4 and set(states) == {(0, 0), (0, 1)}


@pytest.mark.parametrize("context", [1, 3])
@torch.no_grad()
def test_candidates_are_groups_of_the_policys_actions_scored_by_the_smaller_q(context):
    learner, replay = filled_learner(c_online=context, group_size=300, n_sources=2, reward_divisor=10.0)
    for parameter in learner.model.parameters():  # another policy than that of the rollout
        parameter += 0.02 * torch.randn_like(parameter)
    q = learner.critic(learner.transitions.observations, learner.transitions.actions)
    learner.critic.networks[1][-1].bias += (q[0] - q[1]).median()  # now one, now the other is the smaller
    rng = np.random.default_rng(1)
    states = choose_states(learner.model, replay, learner.args, rng)
    drawn, scores = draw_candidates(learner.model, learner.critic, states, learner.args, rng)
    *window, u = drawn
    assert u.shape == (1200, 3) and scores.shape == (1200,)
    smaller = set()
    for point in range(4):
        group = slice(300 * point, 300 * point + 300)
        source, h = states[300 * point]
        steps = [field[h : h + context] for field in source[:4]]
        for field, recorded in zip(window, steps):
            assert (field[group] == torch.from_numpy(recorded)).all()
        dist = law(learner.model, steps, steps[3])
        z = (u[group] - dist.mean) / dist.stddev
        assert z.mean(0).abs().max() < 0.25 and (z.std(0) - 1).abs().max() < 0.2
        q = learner.critic(window[0][group, -1], squash(u[group]))
        np.testing.assert_allclose(scores[group], 10.0 * q.min(0).values, rtol=1e-4, atol=1e-4)
        smaller |= set(q.argmin(0).tolist())
    assert smaller == {0, 1}


def test_a_model_that_predicts_returns_is_asked_for_them():
    """In candidates, which keep what the policy acted on, and in the critic's targets."""
    learner, replay = filled_learner(c_online=2)
    learner.model.conditioned_on = lambda observations, returns, actions, real: returns + 5.0
    states = [(replay[0], 3)]
    (_, returns, *_), _ = draw_candidates(learner.model, learner.critic, states, learner.args, np.random.default_rng(0))
    np.testing.assert_array_equal(returns[0], replay[0].returns[3:5] + 5.0)
    policy = Policy((0.0, 0.0, 0.0))
    policy.conditioned_on = learner.model.conditioned_on
    td_target(learner.transitions, torch.tensor([1]), policy, Critic(), learner.args)
    assert policy.seen[1].tolist() == [[105.0, 95.0]]


def add_candidates(learner, replay, seed=1, scores=None):
    """What an iteration does in lines 3 to 8, with these scores in place of the critic's; what of them was kept."""
    args, rng = learner.args, np.random.default_rng(seed)
    states = choose_states(learner.model, replay, args, rng)
    drawn, found = draw_candidates(learner.model, learner.critic, states, args, rng)
    found = found if scores is None else np.array(scores)
    advantages, keep = group_advantages(found, args.group_size, args.delta_r)
    if keep.any():
        learner.remember(drawn, advantages, keep)
    return q_guided.candidate_metrics(found, keep, args)


def test_advantages_are_relative_to_the_group():
    learner, replay = filled_learner(n_sources=3, n_points=1)
    scores = [1.0, 2.0, 3.0, 4.0, 40.0, 10.0, 30.0, 20.0, 5.0, 5.0, 5.0, 5.0]
    row, a = add_candidates(learner, replay, scores=scores), 1 / math.sqrt(1.25)
    hand = [-1.5 * a, -0.5 * a, 0.5 * a, 1.5 * a, 1.5 * a, -1.5 * a, 0.5 * a, -0.5 * a]  # the third has no spread
    np.testing.assert_allclose(learner.buffer.advantage, hand, rtol=1e-5)
    assert row["rollout/kept"] == pytest.approx(8 / 12) and row["rollout/candidate_q"] == pytest.approx(130 / 12)
    assert row["rollout/group_std"] == pytest.approx(11 * math.sqrt(1.25) / 3)


def test_members_within_delta_r_leave():
    learner, replay = filled_learner(n_sources=1, n_points=1, delta_r=1.0)
    add_candidates(learner, replay, scores=[0.0, 2.0, 2.5, 3.5])
    np.testing.assert_allclose(learner.buffer.advantage, np.array([-2.0, 1.5]) / math.sqrt(6.5 / 4), rtol=1e-5)


def test_scores_that_differ_by_rounding_alone_are_no_group_with_spread():
    """Around 123 a float32 is 7.6e-6 from the next one."""
    learner, replay = filled_learner(n_sources=2, n_points=1)
    up = float(np.nextafter(np.float32(123), np.float32(200)))
    row = add_candidates(learner, replay, scores=[123.0, 123.0, up, 123.0, 123.0, 124.0, 123.0, 124.0])
    assert row["rollout/kept"] == 0.5
    np.testing.assert_allclose(learner.buffer.advantage, [-1.0, 1.0, -1.0, 1.0], rtol=1e-5)


def test_the_buffer_keeps_the_last_candidates_and_no_more():
    learner, replay = filled_learner(n_sources=3, n_points=2, buffer_size=30)
    add_candidates(learner, replay, 1)
    first = learner.buffer
    assert len(first.u) == 24
    add_candidates(learner, replay, 2)
    assert len(learner.buffer.u) == 30
    assert all(torch.equal(now[:6], before[18:]) for now, before in zip(learner.buffer, first))
    assert all(field.untyped_storage().nbytes() == field.nbytes for field in learner.buffer)


# ---- Ratio, loss and update -----------------------------------------------------------------------------------------


@torch.no_grad()
def random_candidates(model, rows=12, context=2, seed=0):
    """Random candidates, some at an episode's first step; `model` is the policy that drew them."""
    torch.manual_seed(seed)
    real = torch.ones(rows, context, dtype=torch.bool)
    real[::2, : context - 1] = False
    fields = [torch.randn(rows, context, len(model.obs_mean)), 3 * torch.randn(rows, context)]
    fields += [torch.rand(rows, context, model.act_dim) * 1.9 - 0.95, real]
    dist = model(*fields)
    u = dist.sample()
    return Candidates(*fields, u, torch.randn(rows), log_prob(dist, u))


def laws(model, sub):
    """Laws of u of each row, one window at a time without its padding."""
    return [law(model, [field[i].numpy() for field in sub[:4]], sub.real[i]) for i in range(len(sub.u))]


@torch.no_grad()
def test_loss_equals_equation_3_written_out():
    old, model, reference = draw_model(4, 2), draw_model(4, 2), draw_model(4, 2, seed=2)
    for parameter in model.parameters():
        parameter.data += 0.003 * torch.randn_like(parameter)
    args, kappa, sub = toy_args(beta=0.3, epsilon=0.1), 0.7, random_candidates(old, rows=18)
    torch.manual_seed(5)
    noise = torch.randn(sub.u.shape)
    surrogates, kls, entropies, ratios = [], [], [], []
    for i, (now, before, anchor) in enumerate(zip(laws(model, sub), laws(old, sub), laws(reference, sub))):
        u, advantage = sub.u[i].double(), sub.advantage[i].item()
        ratio = math.exp((now.log_prob(u) - before.log_prob(u)).sum())  # the slope of tanh is in both
        ratios.append(ratio)
        surrogates.append(min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage))
        kls.append(kl_divergence(now, anchor).sum().item())
        z = now.mean + now.stddev * noise[i].double()
        entropies.append(-(now.log_prob(z) - torch.log1p(-(torch.tanh(z) ** 2))).sum().item())
    torch.manual_seed(5)
    loss, values = q_guided_loss(model, reference, sub, torch.tensor(kappa), args)
    means = {"surrogate": surrogates, "kl": kls, "entropy": entropies, "ratio_mean": ratios}
    for name, each in means.items():
        assert values[name].item() == pytest.approx(np.mean(each), rel=1e-4, abs=1e-5), name
    assert values["clip_fraction"].item() == pytest.approx(np.mean([abs(ratio - 1) > 0.1 for ratio in ratios]))
    assert 0 < values["clip_fraction"] < 1 and values["ratio_max"].item() == pytest.approx(max(ratios), rel=1e-4)
    expected = -(np.mean(surrogates) - 0.3 * np.mean(kls) + kappa * np.mean(entropies))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_gradient_is_the_slope_of_the_loss_also_through_kl_and_sampled_entropy(monkeypatch):
    model, reference = draw_model(4, 2), draw_model(4, 2, seed=2).double()
    sub = Candidates(*(field.double() if field.is_floating_point() else field for field in random_candidates(model)))
    model.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    args, start = toy_args(beta=0.3, epsilon=10.0), torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss(theta):
        torch.nn.utils.vector_to_parameters(theta, model.parameters())
        torch.manual_seed(5)
        return q_guided_loss(model, reference, sub, torch.tensor(0.7), args)[0]

    loss(start).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    step = 1e-5 * torch.randn_like(start)
    slope = (loss(start + step) - loss(start - step)).item() / 2
    assert abs(slope) > 1e-6 and slope == pytest.approx((gradient @ step).item(), rel=1e-4)


@pytest.mark.parametrize("shift, moves", [(0.5, False), (-0.5, True), (0.05, True)])
def test_there_is_no_gradient_where_the_clipped_branch_is_the_smaller(shift, moves):
    """Of two candidates with opposite advantages, both ratios above, below or inside the range: e^shift."""
    model, args = draw_model(4, 2), toy_args(beta=0.0)
    sub, sign = random_candidates(model, rows=2, context=1), torch.tensor([1.0, -1.0])
    sub = sub._replace(advantage=sign, old_log_prob=sub.old_log_prob - shift * sign)
    loss, _ = q_guided_loss(model, model, sub, torch.tensor(0.0), args)
    loss.backward()
    steepest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert steepest > 1e-3 if moves else steepest < 1e-12
    up, down = math.exp(shift), math.exp(-shift)
    assert loss.item() == pytest.approx(-0.5 * (min(up, 1.2) - max(down, 0.8)), abs=1e-5)


def test_the_log_ratio_is_kept_within_20():
    model = draw_model(4, 2)
    sub = random_candidates(model, rows=2)
    sub = sub._replace(old_log_prob=sub.old_log_prob - torch.tensor([200.0, -200.0]))
    _, values = q_guided_loss(model, model, sub, torch.tensor(0.0), toy_args())
    assert values["ratio_max"].item() == pytest.approx(math.exp(20.0))
    assert values["ratio_mean"].item() == pytest.approx(math.exp(20.0) / 2)


@torch.no_grad()
def ratios(learner):
    sub = learner.buffer
    return (log_prob(learner.model(*sub[:4]), sub.u) - sub.old_log_prob).exp()


@pytest.mark.parametrize("bf16", [False, True])
@CONTEXTS
def test_ratio_is_1_before_the_first_update(context, bf16):
    learner, replay = filled_learner(bf16, width=64, c_online=context, n_sources=6, n_batch=20, buffer_size=100)
    for other in (learner.reference, learner.target_policy):
        other.mean_head.bias += 1.0  # by the policy itself, not by these
    add_candidates(learner, replay)
    if not bf16 or q_guided.has_bf16(torch.device("cpu")):
        assert (ratios(learner) - 1).abs().max() <= 1e-4
    assert learner.update(np.random.default_rng(1))["losses/ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert (ratios(learner) - 1).abs().max() > 1e-3


def test_an_update_is_a_clipped_step_on_a_minibatch_of_the_whole_buffer_and_one_of_kappa(monkeypatch):
    changes = dict(n_batch=8, n_minibatches=25, lr=1e-3, max_grad_norm=0.05, kappa_initial=0.2, kappa_lr=0.1)
    learner, replay = filled_learner(c_online=2, n_sources=2, **changes)
    add_candidates(learner, replay)
    learner.buffer.advantage[:] = torch.arange(16)
    parameters, step, gradients, calls = list(learner.model.parameters()), learner.optimizer.step, [], []

    def spy(model, reference, sub, kappa, args):
        assert model is learner.model and reference is learner.reference and len(sub.u) == 8
        loss, values = q_guided_loss(model, reference, sub, kappa, args)
        gradients.append(torch.autograd.grad(loss, parameters, retain_graph=True))
        calls.append((sub, kappa.item(), {name: value.item() for name, value in values.items()}))
        return loss, values

    def clipped():
        norm = torch.cat([gradient.flatten() for gradient in gradients[-1]]).norm()
        assert norm > 1
        for parameter, gradient in zip(parameters, gradients[-1]):
            torch.testing.assert_close(parameter.grad, gradient * 0.05 / norm, rtol=1e-4, atol=1e-8)
        step()

    monkeypatch.setattr(q_guided, "q_guided_loss", spy)
    monkeypatch.setattr(learner.optimizer, "step", clipped)
    row = learner.update(np.random.default_rng(1))
    log_kappa, m, v = math.log(0.2), 0.0, 0.0
    for t, (_, kappa, values) in enumerate(calls, start=1):
        assert kappa == pytest.approx(math.exp(log_kappa), rel=1e-4)  # the one before it moves
        gradient = math.exp(log_kappa) * (values["entropy"] + 3)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        log_kappa -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert learner.log_kappa.item() == pytest.approx(log_kappa, abs=1e-4)
    assert {number for sub, *_ in calls for number in sub.advantage.tolist()} == set(range(16))
    assert len(calls) == learner.updates == 25
    for name in ("loss", "surrogate", "kl", "entropy"):
        assert row[f"losses/{name}"] == pytest.approx(np.mean([values[name] for *_, values in calls]), rel=1e-4), name


def test_updates_make_good_candidates_likelier_and_leave_the_critic_alone():
    learner, replay = filled_learner(n_sources=6, beta=0.0, kappa_initial=1e-6, lr=1e-3, n_batch=48, buffer_size=48)
    add_candidates(learner, replay)
    before = weights(learner.critic), weights(learner.target_policy)
    learner.update(np.random.default_rng(1))
    gain = (ratios(learner).log() * learner.buffer.advantage).mean()
    assert gain > 1e-3
    assert all(map(torch.equal, before, (weights(learner.critic), weights(learner.target_policy))))


def test_kappa_rises_while_the_entropy_is_below_minus_the_dimension_of_the_action():
    for bias, direction in ((-9.0, 1), (0.3, -1)):
        learner, replay = filled_learner(kappa_lr=0.01, n_minibatches=1)
        learner.model.log_std_head.weight.data[:] = 0.0
        learner.model.log_std_head.bias.data[:] = bias
        add_candidates(learner, replay)
        row = learner.update(np.random.default_rng(1))
        assert (row["losses/entropy"] < -3) == (direction == 1)
        assert learner.log_kappa.item() == pytest.approx(math.log(0.1) + direction * 0.01, abs=1e-5)


def test_the_reference_becomes_the_policy_every_so_many_updates():
    learner, replay = filled_learner(reference_every=3, n_minibatches=1)
    add_candidates(learner, replay)
    for update in range(7):
        before = copy.deepcopy(learner.reference), weights(learner.model)
        learner.update(np.random.default_rng(update))
        expected = before[1] if update % 3 == 0 else weights(before[0])
        assert torch.equal(weights(learner.reference), expected)


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line():
    learner, replay = filled_learner()
    add_candidates(learner, replay)
    learner.buffer.advantage[:] = math.nan
    with refused("the loss is not finite"):
        learner.update(np.random.default_rng(3))
