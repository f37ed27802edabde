"""The baselines under benchmark/baselines: replay, targets and losses by hand."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pretrain_dt
import q_guided_grpo_dt as q_guided

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    """A script of benchmark/baselines as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"by_hand_{name}", ROOT / f"benchmark/baselines/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


odt, iql = load("odt"), load("iql")


@pytest.fixture(autouse=True)
def scripts_as_before(monkeypatch):
    """The baselines put their own in the scripts' place: not for the tests after."""
    monkeypatch.setattr(q_guided, "DecisionTransformer", q_guided.DecisionTransformer)


# ---- ODT ------------------------------------------------------------------------------------------------------------


def episode(length, first_reward=1.0, terminated=True, obs_dim=3, act_dim=2, last_is_known=False):
    """Rewards first_reward, first_reward + 1, ...; observations (first_reward, step, step), the last one all T."""
    steps = np.arange(length, dtype=np.float32)
    observations = np.repeat(steps[:, None], obs_dim, axis=1)
    observations[:, 0] = first_reward
    actions = np.linspace(-0.9, 0.9, length * act_dim, dtype=np.float32).reshape(length, act_dim)
    last = np.full(obs_dim, length if last_is_known else np.nan, np.float32)
    return odt.Episode(observations, actions, steps + np.float32(first_reward), np.array(terminated), last)


def arrays(episodes):
    """As data.npz holds them."""
    replay = odt.replay_of(episodes, [], len(episodes))
    return {name: np.array(field) for name, field in replay._asdict().items()}


ODT_ROWS = """
Hopper-v5                medium  5   3600   7200  1e-4  5e-4  1000     0
Hopper-v5                random  5   3600   7200  1e-4  5e-4  1000  1000
Walker2d-v4              medium  5   5000  10000  1e-3  1e-3  1000     0
Ant-v5                   medium  5   5000  10000  1e-4  1e-4  1000     0
HalfCheetah-v5           medium  5   6000  12000  1e-4  1e-4  1000     0
AdroitHandDoor-v1        human   1   4000   4000  1e-4  1e-4  5000  1000
AdroitHandPen-v1         cloned  5  12000  12000  1e-4  1e-4  5000  1000
AdroitHandHammer-v1      human   1 160000 160000  1e-4  1e-4  5000  1000
AdroitHandRelocate-v1    human   1   5000   5000  1e-4  1e-4  5000  1000
AntMaze_UMaze-v4         diverse 1      1      2  1e-4  1e-4  2000  1000
"""


@pytest.mark.parametrize("line", ODT_ROWS.strip().splitlines(), ids=lambda line: "-".join(line.split()[:2]))
def test_rows_of_odt_are_those_of_the_reference_code(line):
    env_id, kind, *numbers = line.split()
    _, row = odt.task_row(env_id, kind)
    assert [row[name] for name in odt.COLUMNS] == [float(number) for number in numbers]


def test_outside_the_table_the_dataset_says_the_returns_and_the_pretraining_the_context(monkeypatch, capsys):
    monkeypatch.setattr(q_guided, "load_checkpoint", lambda path: {"args": {"c_offline": 3, "warmup": 70}})
    args = odt.Args(env_id="Pendulum-v1", pretrained="somewhere")
    odt.fill_from_table(args, "medium", -150.0)
    assert (args.g_eval, args.g_online, args.c_offline, args.c_online, args.warmup) == (-150.0, 0.0, 3, 3, 70)
    args = odt.Args(env_id="Hopper-v5", pretrained="somewhere", c_offline=20, g_eval=1.0)
    odt.fill_from_table(args, "medium", -150.0)
    assert (args.g_eval, args.g_online, args.c_offline, args.c_online, args.warmup) == (1.0, 7200.0, 20, 5, 70)
    assert "outside the table" in capsys.readouterr().out


def test_windows_of_the_replay_are_relabelled_in_hindsight_against_a_loop():
    episodes = [episode(4, 1.0), episode(1, 7.0), episode(6, -2.0)]
    replay = odt.replay_of(episodes[:2], episodes[2:], 3)
    drawn = pretrain_dt.draw_windows(replay, 3, 400, np.random.default_rng(0))
    starts = set()
    for observations, returns, actions, real in zip(*drawn):
        which, first = (observations[real][0, i].item() for i in (0, 1))
        (source,) = (each for each in episodes if each.rewards[0] == which)
        start = int(first)
        starts.add((which, start))
        length = min(3, len(source.rewards) - start)
        assert real.tolist() == [False] * (3 - length) + [True] * length
        for k in range(length):
            expected = sum(source.rewards[start + k :].tolist())  # what its own trajectory brought from there on
            assert returns[real][k].item() == pytest.approx(expected)
            assert torch.equal(actions[real][k], torch.from_numpy(source.actions[start + k]))
    assert starts == {(each.rewards[0], h) for each in episodes for h in range(len(each.rewards))}


def test_the_replay_begins_with_the_best_and_the_oldest_leave_first():
    given = [episode(2, 5.0), episode(3, -4.0, False), episode(1, 2.0), episode(4, 0.0)]  # returns 11, -9, 2, 6
    offline = odt.offline_episodes(arrays(given))
    assert [each.rewards.sum() for each in offline] == [-9.0, 2.0, 6.0, 11.0]
    for i, each in zip([1, 2, 3, 0], offline):
        assert all(np.array_equal(one, other, equal_nan=True) for one, other in zip(given[i], each))

    def first_rewards(rolled):
        replay = odt.replay_of(offline, rolled, 3)
        return replay.rewards[np.cumsum(replay.lengths) - replay.lengths].tolist()

    rolled = [episode(2, 20.0), episode(1, -50.0), episode(3, 30.0), episode(2, 40.0)]
    assert first_rewards([]) == [2.0, 0.0, 5.0]
    assert first_rewards(rolled[:1]) == [0.0, 5.0, 20.0]
    assert first_rewards(rolled[:3]) == [20.0, -50.0, 30.0]  # a bad trajectory stays as long as a good one
    assert first_rewards(rolled) == [-50.0, 30.0, 40.0]


@pytest.mark.parametrize("terminated", [True, False])
def test_what_was_asked_for_in_a_rollout_is_forgotten(terminated):
    context = 3
    fields = [np.arange(15.0).reshape(5, 3), np.full(5, 7200.0), np.zeros((5, 2)), np.array([0, 0, 1, 1, 1], bool)]
    ends = np.array(terminated), np.array([9.0, 9.0, 9.0])
    trajectory = q_guided.Trajectory(*fields, np.zeros((3, 2)), np.array([1.0, 2.0, 4.0]), np.zeros((0, 0)), *ends)
    rolled = odt.rolled_out(trajectory, context)
    assert np.array_equal(rolled.observations, fields[0][2:]) and rolled.terminated == terminated
    assert rolled.last_observation.tolist() == [9.0, 9.0, 9.0]
    replay = odt.replay_of([], [rolled], 5)
    assert replay.returns.tolist() == [7.0, 6.0, 4.0]


def test_rollouts_go_on_until_there_are_enough_steps(monkeypatch):
    lengths = iter([4, 3, 2, 8])

    def collect(policy, sims, n, args, rng):
        assert n == 1
        return [episode(next(lengths))]

    monkeypatch.setattr(q_guided, "collect", collect)
    args = odt.Args(min_steps=8)
    assert [len(each.rewards) for each in odt.roll_out(None, None, args, None)] == [4, 3, 2]
    args.min_steps = 0
    assert [len(each.rewards) for each in odt.roll_out(None, None, args, None)] == [8]


def test_the_network_is_the_scripts_with_relu_written_out():
    torch.manual_seed(0)
    model = odt.ReluTransformer(3, 2, embed_dim=8, n_layers=1, n_heads=2).eval().requires_grad_(False)
    block = model.blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, mask = torch.randn(2, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    h = F.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias)
    q, (k, v) = block.query(h), block.key_value(h).chunk(2, -1)
    mixed = torch.zeros_like(x)
    for part in (slice(0, 4), slice(4, 8)):  # heads
        weights = (q[..., part] @ k[..., part].mT / 2.0).masked_fill(~mask[0], -torch.inf).softmax(-1)
        mixed[..., part] = weights @ v[..., part]
    y = x + block.project(mixed)
    h = F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias)
    y = y + block.down(block.up(h).clamp(min=0.0))
    torch.testing.assert_close(block(x, mask), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block(x, mask, slice(-1, None)), y[:, -1:], rtol=1e-4, atol=1e-5)


def test_dropout_works_in_updates_only():
    torch.manual_seed(0)
    model = odt.ReluTransformer(3, 2, embed_dim=8, n_layers=1, n_heads=2, dropout=0.5)
    window = torch.randn(4, 2, 3), torch.randn(4, 2), torch.rand(4, 2, 2), torch.ones(4, 2, dtype=torch.bool)
    assert not torch.equal(model(*window).mean, model(*window).mean)
    model.eval()
    assert torch.equal(model(*window).mean, model(*window).mean)


@pytest.mark.parametrize("kind", ["dt", "baselines/odt"])
def test_a_checkpoint_of_either_kind_is_read_as_what_it_is(kind):
    model = odt.MODELS[kind](3, 2, embed_dim=8, n_layers=1, n_heads=2)
    sizes = dict(obs_dim=3, act_dim=2, embed_dim=8, n_layers=1, n_heads=2, kind=kind)
    content = dict(sizes=sizes, weights=model.state_dict())
    again = odt.load_model(content, torch.device("cpu"), bf16=False, dropout=0.1)
    assert type(again) is odt.MODELS[kind] and again.dropout == 0.1
    assert isinstance(again.blocks[0], odt.ReluBlock) == (kind == "baselines/odt")


# ---- ODT+TD3 --------------------------------------------------------------------------------------------------------

CRITIC_ROWS = """
Hopper-v5             0.99   256  False  1e-3  2     1   10000
Walker2d-v4           0.99   256  False  1e-3  2     1   20000
Ant-v5                0.99   256  False  1e-3  2     1   10000
HalfCheetah-v5        0.99   256  False  1e-3  2     1   10000
AdroitHandDoor-v1     0.99   512  True   2e-4  1   100   40000
AdroitHandPen-v1      0.99   512  True   2e-4  1   100   40000
AdroitHandHammer-v1   0.99   512  True   2e-4  1  1000   40000
AdroitHandRelocate-v1 0.99   512  True   2e-4  1   100   40000
AntMaze_UMaze-v4      0.998  512  True   2e-4  1     1  200000
"""


@pytest.mark.parametrize("line", CRITIC_ROWS.strip().splitlines(), ids=lambda line: line.split()[0])
def test_rows_of_the_critic_are_those_of_the_reference_code(line):
    env_id, *values = line.split()
    _, row = odt.task_row(env_id, "cloned" if "Hand" in env_id else "umaze" if "Maze" in env_id else "medium")
    found = [row[name] for name in (*odt.CRITIC, "critic_warmup")]
    assert found == [value == "True" if value.isalpha() else float(value) for value in values]


def td3_args(**changes):
    toy = dict(td3=True, c_offline=3, batch_size=64, gamma=0.9, critic_dim=8, critic_norm=False, lr_critic=1e-2)
    toy |= dict(policy_delay=2, tau=0.1, reward_divisor=2.0, lr=1e-2, warmup=1, weight_decay=1e-4, critic_warmup=6)
    return odt.Args(**(toy | changes))


def draw_model(dropout=0.0):
    """A network whose actions heed all that it sees."""
    torch.manual_seed(0)
    model = q_guided.DecisionTransformer(3, 2, embed_dim=8, n_layers=1, n_heads=2, dropout=dropout).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.return_scale.fill_(0.1)
    return model


def replay_with_all_ends():
    """Trajectories that terminated, that a time limit ended, and of whose end the next state is not known."""
    ends = dict(a=(4, 1.0, True), b=(3, 10.0, False), c=(5, 20.0, False))
    episodes = [episode(*ends[name], last_is_known=name == "b") for name in "abc"]
    return episodes, odt.replay_of(episodes, [], 3, td3=True)


def test_transitions_of_windows_against_a_loop():
    episodes, replay = replay_with_all_ends()
    batch = odt.draw_batch(replay, td3_args(), np.random.default_rng(0), torch.device("cpu"))
    seen = set()
    for b, k in np.argwhere(batch.now.real.numpy()):
        first, step = batch.now.observations[b, k, :2].tolist()
        (source,) = (each for each in episodes if each.rewards[0] == first)
        step, last = int(step), len(source.rewards) - 1
        assert batch.rewards[b, k] == source.rewards[step]
        assert batch.terminated[b, k].item() == (step == last and bool(source.terminated))
        assert batch.usable[b, k].item() == (first != 20.0 or step < last)
        assert batch.later.returns[b, k].item() == pytest.approx(sum(source.rewards[step + 1 :].tolist()))
        if step < last:
            assert torch.equal(batch.later.observations[b, k], torch.from_numpy(source.observations[step + 1]))
            if k < 2:
                assert torch.equal(batch.later.actions[b, k], torch.from_numpy(source.actions[step + 1]))
        elif first == 10.0:
            assert batch.later.observations[b, k].tolist() == [3.0, 3.0, 3.0]
        seen.add((first, step))
    assert len(seen) == 12 and torch.equal(batch.later.real, batch.now.real)
    assert not batch.usable[~batch.now.real].any() and all(field.isfinite().all() for field in batch.later)


def test_the_td_target_by_hand_with_a_termination_and_with_a_time_limit():
    _, replay = replay_with_all_ends()
    args = td3_args(target_noise=0.0)
    batch = odt.draw_batch(replay, args, np.random.default_rng(0), torch.device("cpu"))
    policy = draw_model()
    critic = q_guided.TwinCritic(policy, 8, False).requires_grad_(False)
    target = odt.td_target(batch, policy, critic, args)
    cases = set()
    for b, k in np.argwhere(batch.usable.numpy()):
        start = 3 - int(batch.now.real[b].sum())
        window = [field[b, start : k + 1][None] for field in batch.later]
        action = torch.tanh(policy(*window).mean[0]).detach()  # from the window a step later, up to s' alone
        q = critic(batch.later.observations[b, k][None], action[None]).min()
        expected = batch.rewards[b, k] / 2.0 + (0.0 if batch.terminated[b, k] else 0.9 * q)
        assert target[b, k].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
        at_limit = batch.now.observations[b, k, :2].tolist() == [10.0, 2.0]
        cases.add("terminated" if batch.terminated[b, k] else "time limit" if at_limit else "inside")
    assert cases == {"terminated", "time limit", "inside"}


def test_target_noise_is_clipped_and_actions_stay_in_bounds(monkeypatch):
    _, replay = replay_with_all_ends()
    args = td3_args(target_noise=5.0, target_noise_clip=0.25)
    batch = odt.draw_batch(replay, args, np.random.default_rng(0), torch.device("cpu"))
    policy, seen = draw_model(), []

    def critic(observations, actions):
        seen.append(actions)
        return torch.zeros(2, *observations.shape[:2])

    odt.td_target(batch, policy, critic, args)
    quiet = torch.tanh(policy(*batch.later, every_step=True).mean)
    moved = (seen[0] - quiet).abs()
    assert moved.max() <= 0.25 + 1e-5 and (moved > 0.2).float().mean() > 0.5 and seen[0].abs().max() < 1.0


def test_no_gradient_reaches_the_targets_and_padding_counts_for_nothing():
    _, replay = replay_with_all_ends()
    args = td3_args()
    batch = odt.draw_batch(replay, args, np.random.default_rng(0), torch.device("cpu"))
    model = draw_model()
    critic, target_critic = (q_guided.TwinCritic(model, 8, False) for _ in range(2))
    torch.manual_seed(1)
    loss, _ = odt.critic_loss(critic, model, target_critic, batch, args)
    loss.backward()
    assert all(p.grad is None for p in [*model.parameters(), *target_critic.parameters()])
    assert all(p.grad is not None for p in critic.parameters())
    torch.manual_seed(1)
    target = odt.td_target(batch, model, target_critic, args)
    q = critic(batch.now.observations, batch.now.actions)
    errors = [((q[:, b, k] - target[b, k]) ** 2).sum().item() for b, k in np.argwhere(batch.usable.numpy())]
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-4)
    hidden = batch._replace(rewards=torch.where(batch.usable, batch.rewards, 1e6))
    torch.manual_seed(1)
    assert odt.critic_loss(critic, model, target_critic, hidden, args)[0].item() == loss.item()


def test_the_actors_loss_is_the_squared_error_minus_alpha_q1_written_out():
    _, replay = replay_with_all_ends()
    batch = odt.draw_batch(replay, td3_args(), np.random.default_rng(0), torch.device("cpu"))
    model = draw_model()
    critic = q_guided.TwinCritic(model, 8, False)
    loss, values = odt.actor_loss(model, batch.now, critic, alpha=0.3)
    action = torch.tanh(model(*batch.now, every_step=True).mean)
    steps = np.argwhere(batch.now.real.numpy())
    mse = np.mean([((action - batch.now.actions)[b, k] ** 2).mean().item() for b, k in steps])
    q1 = np.mean([critic(batch.now.observations[b, k], action[b, k])[0].item() for b, k in steps])
    assert loss.item() == pytest.approx(mse - 0.3 * q1, rel=1e-4)
    assert (values["action_mse"].item(), values["policy_q"].item()) == pytest.approx((mse, q1), rel=1e-4)
    assert odt.actor_loss(model, batch.now)[0].item() == pytest.approx(mse, rel=1e-4)  # pretraining


def test_an_update_moves_critic_actor_and_targets_at_their_paces():
    _, replay = replay_with_all_ends()
    model = draw_model(dropout=0.1)
    learner = odt.TD3Learner(model, td3_args())
    assert model.training and not learner.target_policy.training  # dropout in updates, none in targets
    steps = []

    def parts():
        both = (learner.critic, learner.model, learner.target_critic, learner.target_policy)
        return [torch.cat([p.detach().flatten().clone() for p in each.parameters()]) for each in both]

    critic, actor, _, target_policy = parts()
    learner.warm_up(replay)
    warm, same, copied, target = parts()
    assert not torch.equal(warm, critic) and torch.equal(same, actor) and torch.equal(target, target_policy)
    assert torch.equal(copied, warm)  # copied anew when the online phase begins
    learner.critic_optimizer.register_step_post_hook(lambda *_: steps.append("critic"))
    learner.optimizer.register_step_post_hook(lambda *_: steps.append("actor"))
    learner.update(replay, np.random.default_rng(3))
    new_critic, new_actor, new_target_critic, new_target_policy = parts()
    assert steps == ["critic", "critic", "actor"]
    torch.testing.assert_close(new_target_critic, 0.9 * warm + 0.1 * new_critic)
    torch.testing.assert_close(new_target_policy, 0.9 * actor + 0.1 * new_actor)
    heads = model.log_std_head.weight, model.log_std_head.bias
    assert all(p.grad is None for p in heads) and not torch.equal(new_actor, actor)


def test_the_critic_learns_against_its_target_and_the_actor_from_the_critic(monkeypatch):
    _, replay = replay_with_all_ends()
    learner = odt.TD3Learner(draw_model(), td3_args(alpha=0.3))
    calls = {"critic_loss": [], "actor_loss": [], "polyak": []}
    for name, seen in calls.items():
        function = getattr(odt, name)
        monkeypatch.setattr(odt, name, lambda *given, f=function, seen=seen: (seen.append(given), f(*given))[1])

    def same(given, expected):
        return len(given) == len(expected) and all(one is other for one, other in zip(given, expected))

    learner.warm_up(replay)
    networks = learner.critic, learner.target_policy, learner.target_critic
    assert len(calls["critic_loss"]) == 6 and all(same(given[:3], networks) for given in calls["critic_loss"])
    moving = learner.target_critic, learner.critic, learner.args.tau
    assert len(calls["polyak"]) == 3 and all(same(given, moving) for given in calls["polyak"])
    assert not calls["actor_loss"]  # it stands still
    for seen in calls.values():
        seen.clear()
    learner.update(replay, np.random.default_rng(3))
    assert len(calls["critic_loss"]) == 2 and all(same(given[:3], networks) for given in calls["critic_loss"])
    ((model, windows, critic, alpha),) = calls["actor_loss"]
    assert model is learner.model and critic is learner.critic and alpha == 0.3
    assert windows is calls["critic_loss"][-1][3].now
    assert same(calls["polyak"][0], moving)
    assert same(calls["polyak"][1], (learner.target_policy, learner.model, learner.args.tau))
    assert type(learner.critic_optimizer) is torch.optim.AdamW
    assert learner.critic_optimizer.param_groups[0]["weight_decay"] == 0.01


def test_exploration_is_noise_on_the_action():
    model = draw_model()
    window = torch.randn(4000, 1, 3), torch.randn(4000, 1), torch.zeros(4000, 1, 2), torch.ones(4000, 1).bool()
    window = tuple(field[:1].expand_as(field) for field in window)
    torch.manual_seed(0)
    dist = odt.Explorer(model, 0.05)(*window)
    mean = torch.tanh(model(*window).mean[0]).detach()
    actions = torch.tanh(dist.mean)
    assert not dist.stddev.any() and mean.abs().max() < 0.8
    torch.testing.assert_close(actions.mean(0), mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(actions.std(0), torch.full((2,), 0.05), atol=3e-3, rtol=0)
    loud = torch.tanh(odt.Explorer(model, 9.0)(*window).mean)
    assert loud.isfinite().all() and loud.abs().max() < 1.0


# ---- IQL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, kind, row, updates",
    [
        ("Hopper-v5", "medium", (0.7, 3.0, 0.0, 0.0), 5000),
        ("Walker2d-v4", "random", (0.7, 3.0, 0.0, 0.0), 10000),
        ("AdroitHandDoor-v1", "human", (0.7, 3.0, 0.0, 0.0), 40000),
        ("AdroitHandPen-v1", "cloned", (0.8, 3.0, 0.1, 0.0), 40000),
        ("AntMaze_UMaze-v4", "diverse", (0.9, 10.0, 0.0, 1.0), 200000),
        ("Pendulum-v1", "random", (0.7, 3.0, 0.0, 0.0), 5000),
    ],
)
def test_rows_of_iql_are_those_of_the_reference_code(env_id, kind, row, updates, capsys):
    args = iql.Args(env_id=env_id)
    iql.fill_from_table(args, kind, 1.0)
    assert tuple(getattr(args, name) for name in iql.COLUMNS) == row and args.offline_updates == updates
    assert f"offline_updates {updates}" in capsys.readouterr().out
    assert (args.gamma, args.tau, args.lr, args.batch_size, args.hidden_dim) == (0.99, 0.005, 3e-4, 256, 256)


def test_the_expectile_loss_and_its_minimiser_by_hand():
    loss = iql.expectile_loss(torch.tensor([-2.0, -0.5, 0.0, 3.0]), 0.7)
    torch.testing.assert_close(loss, torch.tensor([0.3 * 4, 0.3 * 0.25, 0.0, 0.7 * 9]))
    values = torch.linspace(0.0, 1.0, 1001)
    total = sum(iql.expectile_loss(target - values, 0.9) for target in (0.0, 1.0))
    assert values[total.argmin()].item() == pytest.approx(0.9, abs=2e-3)  # of {0, 1} it is the expectile itself


def test_advantage_weights_grow_with_the_advantage_up_to_their_cap():
    advantage = torch.tensor([-1.0, 0.0, 0.5, 1.0, 10.0], requires_grad=True)
    weights = iql.advantage_weights(advantage, 3.0, 100.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-3), 1.0, math.exp(1.5), math.exp(3), 100.0]))
    assert not weights.requires_grad


def iql_learner(**changes):
    """On two trajectories: one that terminated, one that a time limit ended, with the state after it."""
    rng = np.random.default_rng(0)
    lengths, total = np.array([3, 4]), 7
    fields = rng.normal(size=(total, 3)), np.zeros(total), rng.uniform(-0.9, 0.9, (total, 2)), rng.normal(size=total)
    last = rng.normal(size=(2, 3))
    data = q_guided.lay_out(1, lengths, *(field.astype(np.float32) for field in fields), np.array([True, False]), last)
    toy = dict(hidden_dim=8, expectile=0.8, beta=2.0, gamma=0.9, step_cost=0.25, dropout=0.0, offline_updates=10)
    args = iql.Args(**(toy | dict(lr=1e-2, tau=0.1, max_weight=1.5) | changes))
    torch.manual_seed(0)
    actor = iql.Actor(3, 2, 8)
    actor.obs_mean.normal_()
    actor.obs_std.uniform_(0.5, 2.0)
    learner = iql.IQLLearner(actor, data, args)
    for p in [*learner.q.parameters(), *learner.v.parameters(), *learner.target_q.parameters()]:
        p.data += 0.3 * torch.randn_like(p)
    return learner


def test_losses_of_iql_written_out_with_a_termination_and_with_a_time_limit():
    learner = iql_learner()
    actor, data = learner.actor, learner.data
    index = data.usable.nonzero()[:, 0]
    assert len(index) == 7
    v_loss, q_loss, actor_loss, _ = learner.losses(index)
    expected = [[], [], []]
    capped = 0
    for i in index:
        s, following = ((data.observations[j] - actor.obs_mean) / actor.obs_std for j in (i, i + 1))
        a = data.actions[i]
        target = data.rewards[i] - 0.25 + (0.0 if data.terminated[i] else 0.9 * learner.v(following).item())
        q_target = min(network(torch.cat([s, a])).item() for network in learner.target_q.networks)
        advantage = q_target - learner.v(s).item()
        expected[0].append((0.8 if advantage > 0 else 0.2) * advantage**2)
        expected[1] += [(network(torch.cat([s, a])).item() - target.item()) ** 2 for network in learner.q.networks]
        error = (a - torch.tanh(actor.network(s))) / actor.log_std.exp()
        nll = (0.5 * error**2 + actor.log_std + 0.5 * math.log(2 * math.pi)).sum().item()
        expected[2].append(min(math.exp(2.0 * advantage), 1.5) * nll)
        capped += math.exp(2.0 * advantage) > 1.5
    assert 0 < capped < 7 and data.terminated[index].sum() == 1
    found = [loss.item() for loss in (v_loss, q_loss, actor_loss)]
    assert found == pytest.approx([np.mean(each) for each in expected], rel=1e-4)


def test_each_loss_of_iql_moves_its_own_network_alone():
    learner = iql_learner()
    networks = dict(v=learner.v, q=learner.q, actor=learner.actor, target=learner.target_q)
    index = learner.data.usable.nonzero()[:, 0]
    for name, loss in zip(("v", "q", "actor"), learner.losses(index)):
        loss.backward()
        touched = {key for key, network in networks.items() if any(p.grad is not None for p in network.parameters())}
        assert touched == {name}
        for network in networks.values():
            network.zero_grad(set_to_none=True)


def test_an_update_of_iql_anneals_the_actors_rate_and_moves_the_target_by_tau():
    learner = iql_learner()
    before = [p.clone() for p in learner.target_q.parameters()]
    for update in range(3):
        learner.train(1, np.random.default_rng(update))
        rate = learner.actor_optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(1e-2 * (1 + math.cos(math.pi * update / 10)) / 2)
        for p, old, new in zip(learner.target_q.parameters(), before, learner.q.parameters()):
            torch.testing.assert_close(p, 0.9 * old + 0.1 * new)
        before = [p.clone() for p in learner.target_q.parameters()]
    assert learner.v_optimizer.param_groups[0]["lr"] == 1e-2 and learner.updates == 3


def test_iql_never_draws_a_slot_whose_next_state_is_not_known():
    learner, seen = iql_learner(), []
    assert len(learner.data.usable) == 9  # two slots for the states after the last steps
    losses = learner.losses

    def spy(index):
        assert learner.actor.training  # dropout in updates
        seen.append(index)
        return losses(index)

    learner.losses = spy
    learner.actor.eval()  # as rollouts leave it
    learner.train(20, np.random.default_rng(0))
    assert not learner.actor.training
    assert sorted(torch.cat(seen).unique().tolist()) == learner.data.usable.nonzero()[:, 0].tolist()


def test_iql_explores_with_sampled_actions_until_there_are_enough_steps(monkeypatch):
    actor, lengths = iql.Actor(3, 2, 8), iter([4, 3, 2])

    def collect(policy, sims, n, args, rng):
        assert type(policy) is iql.Explorer and policy.actor is actor
        return [episode(next(lengths))]

    monkeypatch.setattr(q_guided, "collect", collect)
    found = iql.roll_out(actor, None, iql.Args(min_steps=8), np.random.default_rng(0))
    assert [len(each.rewards) for each in found] == [4, 3, 2]


def test_a_new_actor_of_iql_has_the_datas_statistics_and_the_rows_dropout():
    base = dict(weights=dict(obs_mean=torch.tensor([1.0, 2.0, 3.0]), obs_std=torch.tensor([4.0, 5.0, 6.0])))
    sizes = dict(obs_dim=3, act_dim=2, hidden_dim=8)
    actor = iql.new_actor(sizes, iql.Args(dropout=0.1), base, torch.device("cpu"))
    assert [layer.p for layer in actor.network if isinstance(layer, torch.nn.Dropout)] == [0.1, 0.1]
    assert torch.equal(actor.normalized(torch.tensor([5.0, 7.0, 9.0])), torch.ones(3))


def test_the_actor_acts_by_its_mean_in_evaluations_and_samples_in_rollouts():
    torch.manual_seed(0)
    actor = iql.Actor(3, 2, 8, dropout=0.5).eval()
    actor.log_std.data.fill_(-3.0)
    observations = torch.randn(1, 1, 3).expand(5000, 1, 3)
    window = observations, torch.zeros(5000, 1), torch.zeros(5000, 1, 2), torch.ones(5000, 1).bool()
    mean = torch.tanh(actor.network(observations[0, 0])).detach()
    dist = actor(*window)
    assert not dist.stddev.any()
    torch.testing.assert_close(torch.tanh(dist.mean[0]), mean)
    actions = torch.tanh(iql.Explorer(actor)(*window).mean)
    torch.testing.assert_close(actions.mean(0), mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(actions.std(0), torch.full((2,), math.exp(-3.0)), atol=3e-3, rtol=0)
