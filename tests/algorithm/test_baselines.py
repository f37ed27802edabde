"""The baselines under benchmark/baselines: replay, targets and losses by hand."""

import importlib.util
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


odt = load("odt")


@pytest.fixture(autouse=True)
def scripts_as_before(monkeypatch):
    """The baselines put their own in the scripts' place: not for the tests after."""
    monkeypatch.setattr(q_guided, "DecisionTransformer", q_guided.DecisionTransformer)


# ---- ODT ------------------------------------------------------------------------------------------------------------


def episode(length, first_reward=1.0, terminated=True, obs_dim=3, act_dim=2):
    """Rewards first_reward, first_reward + 1, ...; observations (first_reward, step, step)."""
    steps = np.arange(length, dtype=np.float32)
    observations = np.repeat(steps[:, None], obs_dim, axis=1)
    observations[:, 0] = first_reward
    actions = np.linspace(-0.9, 0.9, length * act_dim, dtype=np.float32).reshape(length, act_dim)
    return odt.Episode(observations, actions, steps + np.float32(first_reward), np.array(terminated))


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
    given = [episode(2, 5.0), episode(3, -4.0), episode(1, 2.0), episode(4, 0.0)]  # returns 11, -9, 2, 6
    offline = odt.offline_episodes(arrays(given))
    assert [each.rewards.sum() for each in offline] == [-9.0, 2.0, 6.0, 11.0]
    for i, each in zip([1, 2, 3, 0], offline):
        assert all(np.array_equal(one, other) for one, other in zip(given[i], each))

    def first_rewards(rolled):
        replay = odt.replay_of(offline, rolled, 3)
        return replay.rewards[np.cumsum(replay.lengths) - replay.lengths].tolist()

    rolled = [episode(2, 20.0), episode(1, -50.0), episode(3, 30.0), episode(2, 40.0)]
    assert first_rewards([]) == [2.0, 0.0, 5.0]
    assert first_rewards(rolled[:1]) == [0.0, 5.0, 20.0]
    assert first_rewards(rolled[:3]) == [20.0, -50.0, 30.0]  # a bad trajectory stays as long as a good one
    assert first_rewards(rolled) == [-50.0, 30.0, 40.0]


def test_what_was_asked_for_in_a_rollout_is_forgotten():
    context = 3
    fields = [np.arange(15.0).reshape(5, 3), np.full(5, 7200.0), np.zeros((5, 2)), np.array([0, 0, 1, 1, 1], bool)]
    ends = np.array(True), np.array([9.0, 9.0, 9.0])
    trajectory = q_guided.Trajectory(*fields, np.zeros((3, 2)), np.array([1.0, 2.0, 4.0]), np.zeros((0, 0)), *ends)
    rolled = odt.rolled_out(trajectory, context)
    assert np.array_equal(rolled.observations, fields[0][2:]) and rolled.terminated
    replay = odt.replay_of([], [rolled], 5)
    assert replay.returns.tolist() == [7.0, 6.0, 4.0]


def test_rollouts_go_on_until_there_are_enough_steps(monkeypatch):
    lengths = iter([4, 3, 2, 8])
    model = torch.nn.Linear(1, 1)

    def collect(policy, sims, n, args, rng):
        assert n == 1 and not policy.training  # no dropout in rollouts
        return [episode(next(lengths))]

    monkeypatch.setattr(q_guided, "collect", collect)
    args = odt.Args(min_steps=8)
    assert [len(each.rewards) for each in odt.roll_out(model, None, args, None)] == [4, 3, 2]
    args.min_steps = 0
    assert [len(each.rewards) for each in odt.roll_out(model.train(), None, args, None)] == [8]


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
