"""Table 7, advantages, ratios, loss, value network and buffer of ppo_dt_continuous.py, by hand."""

import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import ppo_dt_continuous as ppo
from ppo_dt_continuous import (
    ROWS,
    Args,
    Batch,
    DecisionTransformer,
    Environments,
    PPOLearner,
    ValueNetwork,
    collect,
    distribution,
    fill_from_table,
    gae,
    log_prob,
    make_env,
    ppo_loss,
    scale_action,
    squash,
)

SIZES = dict(embed_dim=16, n_layers=2, n_heads=2)
CONTEXTS = pytest.mark.parametrize("context", [1, 5])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def toy_args(**changes):
    """The learning rate is high, so that a few updates leave a mark on every weight."""
    toy = dict(env_id="Hopper-v5", iterations=2, n_trajectories=2, replay_iterations=2, c_train=4, gamma=0.9)
    toy |= dict(gae_lambda=0.8, g_online=3.0, c_online=1, n_batch=8, epsilon=0.2, lr=1e-2, kappa_initial=0.1)
    toy |= dict(value_dim=8, value_norm=False, lr_value=1e-2, value_warmup=3, eval_episodes=1, eval_every=1)
    toy |= dict(cuda=False, threads=1, embed_dim=16, reference_every=3)
    return Args(**(toy | changes))


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


# ---- Table 7 --------------------------------------------------------------------------------------------------------

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
def test_rows_are_those_of_the_papers_table_7(env_id, kind, numbers, capsys):
    args = Args(env_id=env_id)
    fill_from_table(args, kind, 100.0)
    assert {name: float(getattr(args, name)) for name in NAMES} == dict(zip(NAMES, map(float, numbers)))
    assert (args.epsilon, args.gamma, args.gae_lambda) == (0.2, 0.99, 0.95)
    locomotion = args.c_train == 20
    assert (args.value_dim, args.value_norm) == ((256, False) if locomotion else (512, True))
    assert f"g_online {args.g_online:g}" in capsys.readouterr().out
    assert len(PRINTED) == len(ROWS)


def test_a_task_outside_the_table_takes_hoppers_row_and_twice_the_best_return():
    args, hopper = Args(env_id="Pendulum-v1"), Args(env_id="Hopper-v5")
    fill_from_table(args, "random", 400.0)
    fill_from_table(hopper, "medium", 400.0)
    assert args.g_online == 800.0 and args.n_batch == hopper.n_batch and args.kappa_initial == hopper.kappa_initial


# ---- Advantages -----------------------------------------------------------------------------------------------------

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


# ---- Value network --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("env_id, norm", [("Ant-v5", False), ("AdroitHandPen-v1", True), ("AntMaze_UMaze-v4", True)])
def test_the_learners_value_network_is_that_of_the_row(env_id, norm):
    args = Args(env_id=env_id)
    fill_from_table(args, "medium", 0.0)
    learner = PPOLearner(draw_model(), args)
    values = learner.value(torch.randn(500, 11) * 100)
    assert (values.std() < 2) == norm  # normed, they do not grow with the observation
    assert learner.value.head.in_features == args.value_dim
    assert learner.value_optimizer.param_groups[0]["lr"] == args.lr_value != args.lr


def test_returns_that_are_all_alike_set_no_scale():
    value = ValueNetwork(draw_model(3, 2), 8, False)
    value.set_units(torch.full((7,), 2.5))
    assert (value.center.item(), value.scale.item()) == (2.5, 1.0)


# ---- Collecting -----------------------------------------------------------------------------------------------------


def played(env_id="Hopper-v5", seed=1, **changes):
    """A network, arguments and the full trajectories that it plays."""
    args = toy_args(env_id=env_id, **changes)
    env = make_env(env_id, {})
    model = draw_model(env.observation_space.shape[0], env.action_space.shape[0])
    with Environments(env, args.n_trajectories) as sims:
        return model, args, collect(model, sims, args.n_trajectories, args, np.random.default_rng(seed))


def law(model, observations, returns, actions):
    """The law of u (A,) at the last of these steps, in a window without padding. actions: of the steps before it."""
    unread = [*actions, np.full(model.act_dim, np.nan)]
    window = [torch.from_numpy(np.array(part, np.float32))[None] for part in (observations, returns, unread)]
    dist = model(*window, torch.ones(1, len(returns), dtype=torch.bool))
    return Normal(dist.mean[0].double(), dist.stddev[0].double())


@pytest.mark.parametrize("context", [1, 3])
@torch.no_grad()
def test_a_trajectory_is_that_of_playing_it_alone(context):
    model, args, trajectories = played(c_online=context, n_trajectories=3)
    rng = np.random.default_rng(1)
    seeds = rng.integers(2**31, size=3)
    noise = rng.standard_normal((3, 1000, 3), dtype=np.float32)
    assert len({len(trajectory.rewards) for trajectory in trajectories}) > 1  # some go on when others have ended
    for i, trajectory in enumerate(trajectories):
        env, g, front = make_env("Hopper-v5", {}), args.g_online, context - 1
        observation, _ = env.reset(seed=int(seeds[i]))
        steps = len(trajectory.rewards)
        seen, returns, actions = [], [], []
        for h in range(steps):
            seen.append(observation)
            returns.append(g)
            before = actions[max(0, len(actions) + 1 - context) :]
            dist = law(model, seen[-context:], returns[-context:], before)
            u = dist.mean + dist.stddev * noise[i, h]
            np.testing.assert_allclose(trajectory.u[h], u, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(trajectory.observations[front + h], observation, atol=1e-5)
            assert trajectory.returns[front + h] == pytest.approx(g, abs=1e-4)
            actions.append(squash(torch.from_numpy(trajectory.u[h])).numpy())
            np.testing.assert_array_equal(trajectory.actions[front + h], actions[-1])
            observation, reward, terminated, truncated, _ = env.step(scale_action(actions[-1], env.action_space))
            assert trajectory.rewards[h] == pytest.approx(reward, abs=1e-5)
            assert (terminated or truncated) == (h == steps - 1)
            g -= reward
        assert bool(trajectory.terminated) == terminated
        np.testing.assert_allclose(trajectory.last_observation, observation, atol=1e-5)
        assert trajectory.real.tolist() == [False] * front + [True] * steps


def test_the_time_limit_is_no_termination():
    _, _, trajectories = played("Pendulum-v1")
    assert [len(trajectory.rewards) for trajectory in trajectories] == [200, 200]
    assert not any(trajectory.terminated for trajectory in trajectories)
    assert all(trajectory.terminated for trajectory in played()[2])  # Hopper falls


# ---- Buffer ---------------------------------------------------------------------------------------------------------


def filled_learner(width=16, bf16=False, **changes):
    """A learner that remembers the trajectories of one iteration."""
    args = toy_args(**changes)
    model = draw_model(embed_dim=width)
    model.bf16 = bf16
    learner = PPOLearner(model, args)
    with Environments(make_env("Hopper-v5", {}), args.n_trajectories) as sims:
        learner.remember(collect(model, sims, args.n_trajectories, args, np.random.default_rng(1)))
    return learner


@CONTEXTS
@pytest.mark.parametrize("hindsight", [False, True])
@torch.no_grad()
def test_all_steps_are_the_trajectories_between_paddings(context, hindsight):
    learner = filled_learner(c_online=context, hindsight=hindsight, n_trajectories=3)
    steps, at, front = learner.all_steps(0.8), 0, context - 1
    for trajectory, old in learner.replay:
        count = len(trajectory.rewards)
        here = slice(at + front, at + front + count)
        np.testing.assert_array_equal(steps.observations[here], trajectory.observations[front:])
        np.testing.assert_array_equal(steps.u[here], trajectory.u)
        np.testing.assert_array_equal(steps.old_log_prob[here], old)
        states = np.vstack([trajectory.observations[front:], trajectory.last_observation])
        values = learner.value(torch.from_numpy(states).float()).double().numpy()
        advantage = gae(trajectory.rewards, values, trajectory.terminated, 0.9, 0.8)
        np.testing.assert_allclose(steps.advantage[here], advantage, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(steps.value_target[here], advantage + values[:-1], rtol=1e-4, atol=1e-5)
        reached = [trajectory.rewards[h:].sum() for h in range(count)]
        expected = reached if hindsight else trajectory.returns[front:]
        np.testing.assert_allclose(steps.returns[here], expected, rtol=1e-4, atol=1e-4)
        end = at + front + count + learner.args.c_train - 1
        assert steps.real[at:end].tolist() == [False] * front + [True] * count + [False] * 3
        at = end
    assert at == len(steps.real)


@CONTEXTS
def test_sub_trajectories_begin_at_every_step_alike_and_end_with_their_trajectory(context):
    learner = filled_learner(c_online=context, n_trajectories=2, n_batch=4000)
    steps = learner.all_steps(0.8)
    steps = steps._replace(old_log_prob=torch.arange(len(steps.real)).float())  # to know them by
    sub = learner.draw(steps, np.random.default_rng(0))
    assert sub.real.shape == (4000, context - 1 + 4) and sub.u.shape == (4000, 4, 3)
    first, counts = np.unique(sub.old_log_prob[:, 0].numpy(), return_counts=True)
    assert first.tolist() == steps.real.nonzero()[:, 0].tolist()
    mean = 4000 / len(first)
    assert ((counts - mean) ** 2 / mean).sum() < len(first) + 4 * math.sqrt(2 * len(first))  # chi squared
    lived = [context - 1 + len(trajectory.rewards) for trajectory, _ in learner.replay]
    ends = np.cumsum([each + 3 for each in lived]) - 3  # behind each, three steps of padding
    left = np.array([min(end - start for end in ends if end > start) for start in sub.old_log_prob[:, 0].numpy()])
    assert sub.real[:, context - 1 :].sum(1).tolist() == np.minimum(left, 4).tolist()
    row, start = 17, int(sub.old_log_prob[17, 0])
    assert torch.equal(sub.observations[row], steps.observations[start - context + 1 : start + 4])
    assert torch.equal(sub.advantage[row], steps.advantage[start : start + 4])


def test_the_buffer_keeps_the_last_iterations():
    learner = filled_learner(n_trajectories=2, replay_iterations=2)
    first = [trajectory for trajectory, _ in learner.replay]
    later = played(seed=2)[2] + played(seed=3)[2]
    learner.remember(later[:2])
    assert [one is kept for one, (kept, _) in zip([*first, *later[:2]], learner.replay)] == [True] * 4
    learner.remember(later[2:])
    assert [one is kept for one, (kept, _) in zip(later, learner.replay)] == [True] * 4


@CONTEXTS
@torch.no_grad()
def test_old_log_probabilities_of_any_length_are_each_trajectorys_own_and_take_few_sizes_of_batch(context):
    """In bf16 on a CPU each number of rows costs memory for good."""
    learner = filled_learner(c_online=context, n_trajectories=3)
    sizes = []
    learner.model.register_forward_pre_hook(lambda model, given: sizes.append(len(given[0])))
    trajectories = [trajectory for trajectory, _ in learner.replay]
    learner.replay.clear()
    learner.remember(trajectories)
    assert sizes == [128 * math.ceil(len(trajectory.rewards) / 128) for trajectory in trajectories]
    for trajectory, old in learner.replay:
        fields = [torch.from_numpy(field)[None] for field in trajectory[:5]]
        sub = Batch(*fields, *[torch.zeros(1, len(trajectory.rewards))] * 3)
        expected = log_prob(distribution(learner.model, sub), sub.u)[0]
        np.testing.assert_allclose(old, expected, rtol=1e-5, atol=1e-5)


# ---- Ratio, loss and update -----------------------------------------------------------------------------------------


@torch.no_grad()
def draw_sub(model, rows=6, steps=3, context=2, seed=0):
    """Random sub-trajectories of which some end early and some begin an episode; `model` is the policy that acted."""
    torch.manual_seed(seed)
    obs_dim, act_dim, width = len(model.obs_mean), model.act_dim, context - 1 + steps
    real = torch.arange(width) < context - 1 + torch.tensor([steps, 2, 1] * rows)[:rows, None]
    real[::2, : context - 1] = False
    returns, observations = 3 * torch.randn(rows, width), torch.randn(rows, width, obs_dim)
    actions, noise = torch.rand(rows, width, act_dim) * 1.9 - 0.95, torch.randn(rows, steps, act_dim)
    advantage, target, zeros = 5 + torch.randn(rows, steps), torch.randn(rows, steps), torch.zeros(rows, steps)
    sub = Batch(observations, returns, actions, real, noise, zeros, advantage, target)
    dist = distribution(model, sub)
    sub = sub._replace(u=dist.mean + dist.stddev * noise)
    return sub._replace(old_log_prob=log_prob(dist, sub.u))


def own(sub):
    """Which steps of the sub-trajectories there are: (B, L)."""
    return sub.real[:, -sub.u.shape[1] :]


@torch.no_grad()
def laws(model, sub):
    """Normal laws before tanh of each row and real step, one window at a time without its padding."""
    rows, steps, _ = sub.u.shape
    context, found = sub.real.shape[1] - steps + 1, {}
    for i in range(rows):
        for h in (h for h in range(steps) if own(sub)[i, h]):
            seen = [j for j in range(h, h + context) if sub.real[i, j]]
            found[i, h] = law(model, sub.observations[i, seen], sub.returns[i, seen], sub.actions[i, seen[:-1]].numpy())
    return found


@pytest.mark.parametrize("hindsight", [False, True])
@torch.no_grad()
def test_loss_equals_equation_5_written_out(hindsight):
    old, model, reference = draw_model(4, 2), draw_model(4, 2), draw_model(4, 2, seed=2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    args, kappa, sub = toy_args(beta=0.3, epsilon=0.1), 0.7, draw_sub(old, rows=18)
    sub.old_log_prob[~own(sub)] = -30.0  # what stands after the end must not count
    before = laws(old, sub)
    if hindsight:
        sub = sub._replace(returns=sub.returns + torch.randn_like(sub.returns) * 0.1)
    new, anchor = laws(model, sub), laws(reference, sub)
    torch.manual_seed(5)
    noise = torch.normal(torch.zeros(sub.u.shape), torch.ones(sub.u.shape))  # as rsample draws it
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


def test_the_gradient_of_the_loss_is_its_slope():
    """Along a random direction, for the same noise: neither the KL penalty nor the entropy is taken for a constant."""
    model, reference, args = draw_model(4, 2), draw_model(4, 2, seed=2), toy_args(beta=0.3, epsilon=100.0)
    sub = draw_sub(model, rows=18)
    direction, step = [torch.randn_like(p) for p in model.parameters()], 3e-4

    def loss_at(distance):
        moved = copy.deepcopy(model)
        for p, along in zip(moved.parameters(), direction):
            p.data += distance * along
        torch.manual_seed(5)
        return moved, ppo_loss(moved, reference, sub, torch.tensor(0.7), args)[0]

    moved, loss = loss_at(0.0)
    gradient = torch.autograd.grad(loss, [*moved.parameters()])
    slope = sum((g * along).sum().item() for g, along in zip(gradient, direction))
    expected = (loss_at(step)[1] - loss_at(-step)[1]).item() / (2 * step)
    assert slope == pytest.approx(expected, rel=1e-2)


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
    log_ratio = log_prob(distribution(learner.model, sub), sub.u) - sub.old_log_prob
    return log_ratio[own(sub)].exp()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@CONTEXTS
def test_ratio_is_1_before_the_first_update(context, bf16):
    if bf16 and not ppo.has_bf16(torch.device("cpu")):
        pytest.skip("no bf16 units")
    learner = filled_learner(64, bf16, c_online=context, n_trajectories=4, n_batch=24)
    steps = learner.all_steps(0.8)
    for seed in range(4):
        sub = learner.draw(steps, np.random.default_rng(seed))
        assert (ratios(learner, sub) - 1).abs().max() <= 1e-4
        assert not own(sub).all()  # ends of trajectories among them
    row = learner.update(np.random.default_rng(1))
    assert row["losses/ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert (ratios(learner, sub) - 1).abs().max() > 1e-3


@CONTEXTS
def test_hindsight_spoils_the_ratio_and_leaves_the_old_log_probability(context):
    """Fig. 1's point: relabelled, the ratio is nowhere near 1 although the policy has not moved."""
    plain, relabelled = (filled_learner(c_online=context, g_online=9.0, hindsight=each) for each in (False, True))
    ours, theirs = plain.all_steps(0.8), relabelled.all_steps(0.8)
    for name in ("observations", "u", "real", "old_log_prob"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    ours, theirs = plain.draw(ours, np.random.default_rng(0)), relabelled.draw(theirs, np.random.default_rng(0))
    assert (ratios(plain, ours) - 1).abs().max() <= 1e-4
    off = (ratios(relabelled, theirs) - 1).abs()
    assert off.mean() > 0.02 and off.max() > 0.2  # some outside the clipping range


@torch.no_grad()
def value_error(learner, steps):
    return ((learner.value(steps.observations) - steps.value_target)[steps.real] ** 2).mean().item()


@CONTEXTS
def test_a_value_update_lowers_equation_6_and_moves_nothing_else(context):
    learner = filled_learner(c_online=context, n_batch=64)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    steps = learner.all_steps(0.8)
    sub = learner.draw(steps, np.random.default_rng(0))
    with torch.no_grad():
        error = (learner.value(sub.observations[:, context - 1 :]) - sub.value_target)[own(sub)]
    assert learner.update_value(sub).item() == pytest.approx((error**2).mean().item(), rel=1e-5)
    for _ in range(30):
        learner.update_value(sub)
    assert learner.update_value(sub).item() < 0.8 * (error**2).mean()
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


def test_warming_up_takes_the_units_of_the_returns_and_fits_them():
    cold, warm = (filled_learner(n_trajectories=6, n_batch=64, value_warmup=count) for count in (0, 150))
    steps = cold.all_steps(1.0)  # discounted returns: all of these episodes end truly, so no value is in them
    returns = steps.value_target[steps.real]
    for learner in (cold, warm):
        learner.warm_up_value(np.random.default_rng(0))
        assert learner.value.center.item() == pytest.approx(returns.mean().item(), rel=1e-5)
        assert learner.value.scale.item() == pytest.approx(returns.std(correction=0).item(), rel=1e-5)
    assert value_error(warm, steps) < 0.5 * value_error(cold, steps)


def test_the_warm_up_fits_the_returns_whatever_lambda_is():
    learner = filled_learner(value_warmup=100)
    with mock.patch.object(learner, "all_steps", wraps=learner.all_steps) as asked:
        learner.warm_up_value(np.random.default_rng(0))
    assert asked.call_args_list == [mock.call(1.0)] * 3  # lambda 1: at first and after every 50 updates


def test_beyond_the_time_limit_the_warm_up_counts_on_the_network_itself():
    """Reward 1 for 50 steps, then the time limit: with gamma 0.98 every value is 1 / (1 - 0.98) = 50, while the rewards
    seen alone are worth 32 at first and 1 at last, 20 on average."""
    for count, low, high in ((50, 10, 30), (2000, 42, 51)):
        learner = filled_learner(gamma=0.98, n_batch=64, lr_value=3e-2, value_warmup=count)
        trajectory, old = learner.replay[0]
        fields = {name: np.resize(field, (50, *field.shape[1:])) for name, field in trajectory._asdict().items()}
        fields |= dict(rewards=np.ones(50), terminated=np.array(False), last_observation=trajectory.last_observation)
        learner.replay = [(ppo.Trajectory(**fields), np.resize(old, 50))]
        learner.warm_up_value(np.random.default_rng(0))
        steps = learner.all_steps(1.0)
        assert low < learner.value(steps.observations)[steps.real].mean().item() < high


def test_targets_are_worked_out_anew_in_the_units_of_the_warm_up():
    learner = filled_learner()
    learner.warm_up_value(np.random.default_rng(0))
    center = learner.value.center.item()
    one = learner.all_steps(0.8).advantage
    row = learner.update(np.random.default_rng(1))
    learner.remember(played(seed=2)[2])  # other returns, by which the units would be others
    learner.update(np.random.default_rng(2))
    assert learner.value.center.item() == center and learner.updates == 16
    assert not torch.equal(learner.all_steps(0.8).advantage[: len(one)], one)  # the current value network's
    assert math.isfinite(row["losses/explained_variance"])


def test_explained_variance_is_what_the_value_network_knew_of_its_targets():
    learner = filled_learner()
    learner.warm_up_value(np.random.default_rng(0))
    steps = learner.all_steps(0.8)
    advantage, target = steps.advantage[steps.real].numpy(), steps.value_target[steps.real].numpy()
    row = learner.update(np.random.default_rng(1))
    assert row["losses/explained_variance"] == pytest.approx(1 - advantage.var() / target.var(), abs=1e-4)


@pytest.mark.parametrize("bound", [0.05, 1e6], ids=["clipped", "unclipped"])
def test_the_policy_steps_down_the_clipped_gradient_of_its_loss_and_kappa_down_that_of_the_dual(bound):
    learner = filled_learner(max_grad_norm=bound, kappa_initial=0.2, kappa_lr=0.5)
    parameters = [p for name, p in learner.model.named_parameters() if "embed_action" not in name]  # unread: context 1
    loss_of, step, gradients, entropies, norms = ppo.ppo_loss, learner.optimizer.step, [], [], []
    log_kappa, m, v = math.log(0.2), 0.0, 0.0

    def spied(model, reference, sub, kappa, args):
        nonlocal log_kappa, m, v
        if t := len(entropies):  # Adam's step on log kappa for kappa (H - rho)
            slope = math.exp(log_kappa) * (entropies[-1] + 3.0)
            m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
            log_kappa -= 0.5 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert kappa.item() == pytest.approx(math.exp(log_kappa), rel=1e-3) and not kappa.requires_grad
        assert model is learner.model and reference is learner.reference and args is learner.args
        loss, values = loss_of(model, reference, sub, kappa, args)
        gradients.append(torch.autograd.grad(loss, parameters, retain_graph=True))
        entropies.append(values["entropy"].item())
        return loss, values

    def measured():
        norm = torch.cat([g.flatten() for g in gradients[-1]]).norm()
        norms.append(norm.item())
        for p, gradient in zip(parameters, gradients[-1]):
            torch.testing.assert_close(p.grad, gradient * min(1.0, bound / norm), rtol=1e-3, atol=1e-6)
        step()

    with mock.patch.object(ppo, "ppo_loss", spied), mock.patch.object(learner.optimizer, "step", measured):
        row = learner.update(np.random.default_rng(1))
    assert len(norms) == 8 and min(norms) > 0.05
    assert row["losses/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-3)  # before it was clipped


def test_the_reference_becomes_the_policy_every_so_many_updates():
    learner = filled_learner(reference_every=3, n_minibatches=1)
    for update in range(7):
        before = copy.deepcopy(learner.reference.state_dict()), copy.deepcopy(learner.model.state_dict())
        learner.update(np.random.default_rng(update))
        after = learner.reference.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before[update % 3 == 0].items())
        assert not torch.equal(learner.model.mean_head.weight, after["mean_head.weight"])


def test_kappa_rises_while_the_entropy_is_below_minus_the_dimension_of_the_action():
    for bias, direction in ((-9.0, 1), (0.3, -1)):
        learner = filled_learner(kappa_lr=0.01, n_minibatches=1)
        learner.model.log_std_head.weight.data[:] = 0.0
        learner.model.log_std_head.bias.data[:] = bias
        row = learner.update(np.random.default_rng(1))
        assert (row["losses/entropy"] < -3) == (direction == 1)
        assert learner.log_kappa.item() == pytest.approx(math.log(0.1) + direction * 0.01, abs=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line():
    learner = filled_learner()
    learner.replay[0][0].rewards[:] = math.nan
    with pytest.raises(SystemExit, match=r"\Aerror: [^\n]*loss[^\n]*\Z"):
        learner.update(np.random.default_rng(3))
