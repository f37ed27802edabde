"""The datasets that benchmark/collect_dataset.py makes, and its SAC, against numbers worked out otherwise."""

import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform, TanhTransform

import pretrain_dt

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark"))
import collect_dataset
from collect_dataset import SAC, Args, Critics, Transitions, episodes_of, main, play


@pytest.fixture
def env():
    torch.set_num_threads(1)
    env = gym.make("Pendulum-v1")
    yield env
    env.close()


def test_both_critics_are_what_two_networks_of_their_own_give():
    torch.manual_seed(0)
    critics, x, a = Critics(5, 8), torch.randn(7, 3), torch.randn(7, 2)
    for k in range(2):
        h = torch.cat([x, a], 1)
        for i in range(3):
            h = h @ critics.weights[i][k] + critics.biases[i][k]
            h = h.clamp(min=0) if i < 2 else h
        torch.testing.assert_close(critics(x, a)[k], h[:, 0])


def test_actions_keep_the_bounds_and_their_density_is_that_of_the_squashed_gaussian(env):
    agent, x = SAC(env, Args(hidden=16)), torch.randn(50, 3)
    torch.manual_seed(3)
    with torch.no_grad():
        actions, log_prob = agent.actor(x)
        mean, spread = agent.actor.head(agent.actor.body(x)).chunk(2, dim=-1)
    assert actions.abs().max() <= 2.0 and actions.abs().max() > 1.0
    law = Normal(mean.double(), (-5 + 3.5 * (torch.tanh(spread.double()) + 1)).exp())
    law = TransformedDistribution(law, [TanhTransform(), AffineTransform(0.0, 2.0)])
    expected = law.log_prob(actions.double()).sum(-1) + math.log(2.0)  # the constant of the bounds' width is left out
    torch.testing.assert_close(log_prob.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("terminated, truncated", [(False, False), (True, False), (False, True)])
def test_the_critics_target_bootstraps_unless_the_episode_truly_ended(env, terminated, truncated):
    agent = SAC(env, Args(hidden=16, lr=0.0, tau=0.0, gamma=0.9))
    batch = [torch.randn(4, 3), torch.rand(4, 1), torch.randn(4), torch.full((4,), terminated)]
    batch += [torch.full((4,), truncated), torch.randn(4, 3)]
    torch.manual_seed(1)
    agent.update(batch)
    torch.manual_seed(1)
    with torch.no_grad():
        actions, log_prob = agent.actor(batch[5])
        value = torch.minimum(*agent.targets(batch[5], actions)) - 1.0 * log_prob  # alpha begins at 1
        target = batch[2] + (0.0 if terminated else 0.9) * value
    last = agent.critics.biases[-1].grad  # d loss / d bias of Q_k = 2 mean(Q_k - target)
    with torch.no_grad():
        error = (agent.critics(batch[0], batch[1]) - target).mean(1)
    torch.testing.assert_close(last[:, 0, 0], 2 * error)


def test_the_targets_follow_and_actor_and_temperature_move_every_other_update(env):
    agent = SAC(env, Args(hidden=16, tau=0.25))
    batch = [torch.randn(4, 3), torch.rand(4, 1), torch.randn(4), torch.zeros(4, dtype=torch.bool)]
    batch += [torch.zeros(4, dtype=torch.bool), torch.randn(4, 3)]
    old, actor = agent.targets.weights[1].clone(), agent.actor.head.weight.clone()
    agent.update(batch)
    torch.testing.assert_close(agent.targets.weights[1].data, 0.75 * old + 0.25 * agent.critics.weights[1].data)
    assert torch.equal(agent.actor.head.weight, actor) and agent.log_alpha.item() == 0.0
    agent.update(batch)
    assert not torch.equal(agent.actor.head.weight, actor) and agent.log_alpha.item() != 0.0
    assert all(p.requires_grad for p in agent.critics.parameters())


def test_transitions_grow_and_the_last_one_ends_its_episode():
    kept = Transitions(2, 1, capacity=3)
    for i in range(8):
        kept.add([i, i], [0.5], float(i), i == 2, i == 5, [i + 1, i + 1])
    columns = kept.columns()
    assert columns["rewards"].tolist() == list(range(8)) and columns["observations"].shape == (8, 2)
    assert columns["terminals"].nonzero()[0].tolist() == [2] and columns["timeouts"].nonzero()[0].tolist() == [5, 7]
    assert [(each.start, each.stop) for each in episodes_of(columns)] == [(0, 3), (3, 6), (6, 8)]
    assert not kept.arrays[4][7]  # collecting may go on
    (rewards,) = {tuple(each.shape) for each in kept.sample(np.random.default_rng(0), 5)[2:3]}
    assert rewards == (5,)


def test_playing_ends_with_the_episode_in_which_the_steps_are_reached(env):
    kept = play(env, lambda observation: np.zeros(1, np.float32), 201, seed=4)
    assert kept.size == 400
    columns = kept.columns()
    assert columns["timeouts"].nonzero()[0].tolist() == [199, 399] and not columns["terminals"].any()
    fresh = gym.make("Pendulum-v1")
    observation, _ = fresh.reset(seed=4)
    for i in range(200):
        np.testing.assert_array_equal(columns["observations"][i], observation)
        observation, reward, *_ = fresh.step(np.zeros(1, np.float32))
        assert columns["rewards"][i] == pytest.approx(reward)
        np.testing.assert_array_equal(columns["next_observations"][i], observation)


class InPlace(gym.Env):
    """Counts in a buffer of its own, which is what it returns; its reset gives integers, its rewards are arrays."""

    observation_space = gym.spaces.Box(-1e3, 1e3, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, seed=None, options=None):
        self.steps, self.buffer = 0, np.zeros(1, np.float32)
        return np.zeros(1, int), {}

    def step(self, action):
        self.steps += 1
        self.buffer += 0.5
        return self.buffer, np.array([self.steps]), self.steps == 4, False, {}


def test_observations_are_copied_and_keep_their_fractions():
    kept = play(InPlace(), lambda observation: np.zeros(1, np.float32), 5, seed=0).columns()
    assert kept["observations"][:, 0].tolist() == [0.0, 0.5, 1.0, 1.5] * 2
    assert kept["next_observations"][:, 0].tolist() == [0.5, 1.0, 1.5, 2.0] * 2
    assert kept["rewards"].tolist() == [1.0, 2.0, 3.0, 4.0] * 2


def test_a_disk_that_fills_up_leaves_the_hdf5_file_and_no_half_dataset(tmp_path, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    toy = dict(medium_return=-1e9, learning_starts=200, random_steps=120, medium_steps=100, hidden=8, batch_size=16)
    real = minari.create_dataset_from_buffers

    def full(*args, **kwargs):
        real(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minari, "create_dataset_from_buffers", full)
    with pytest.raises(OSError, match="No space left"):
        main(Args(hdf5=str(tmp_path / "files"), **toy))
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["Hopper-v5-medium-replay.hdf5"]
    assert len(pretrain_dt.read_hdf5(tmp_path / "files" / "Hopper-v5-medium-replay.hdf5").rewards) >= 200
    assert minari.list_local_datasets() == {} and sorted(each.name for each in tmp_path.iterdir()) == [
        "files",
        "minari",
    ]
    with pytest.raises(SystemExit, match=r"\Aerror: [^\n]*Hopper-v5-medium-replay.hdf5 exists already[^\n]*\Z"):
        main(Args(hdf5=str(tmp_path / "files"), **toy))


@pytest.mark.parametrize("left", ["online-dt/Hopper-v5/medium-v0", "online-dt/Hopper-v5/random-v0/data"])
def test_what_is_left_of_a_damaged_dataset_is_refused_before_training(left, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(collect_dataset, "train", lambda *given: pytest.fail("trained for hours"))
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(SystemExit, match=rf"\Aerror: [^\n]*{left.removesuffix('/data')} exists already[^\n]*\Z"):
        main(Args())


@pytest.mark.parametrize("which", ["MINARI_DATASETS_PATH", "--hdf5"])
def test_a_folder_that_cannot_be_written_shows_before_training(which, tmp_path, monkeypatch):
    monkeypatch.setattr(collect_dataset, "train", lambda *given: pytest.fail("trained for hours"))
    (tmp_path / "file").write_text("mine")
    folders = dict.fromkeys(("MINARI_DATASETS_PATH", "--hdf5"), str(tmp_path / "free"))
    folders[which] = str(tmp_path / "file" / "deep")
    monkeypatch.setenv("MINARI_DATASETS_PATH", folders["MINARI_DATASETS_PATH"])
    with pytest.raises(OSError, match="file"):  # a line, where the script is run
        main(Args(hdf5=folders["--hdf5"]))


def test_each_dataset_is_written_before_the_next_is_played(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    toy = dict(medium_return=-1e9, learning_starts=200, random_steps=120, medium_steps=100, hidden=8, batch_size=16)

    def stopped(agent, observation):
        if agent.updates and (tmp_path / "online-dt/Hopper-v5/medium-replay-v0/data/main_data.hdf5").exists():
            raise KeyboardInterrupt
        return act(agent, observation)

    act = collect_dataset.SAC.act
    monkeypatch.setattr(collect_dataset.SAC, "act", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(Args(**toy))
    assert len(pretrain_dt.read_minari("online-dt/Hopper-v5/medium-replay-v0").rewards) >= 200
    assert [path.name for path in (tmp_path / "online-dt" / "Hopper-v5").iterdir() if path.is_dir()] == [
        "medium-replay-v0"
    ]


def test_three_datasets_are_written_that_pretraining_reads_and_learns_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    toy = dict(medium_return=-1e9, learning_starts=200, random_steps=120, medium_steps=100, hidden=8, batch_size=16)
    main(Args(hdf5=str(tmp_path / "files"), **toy))
    printed = capsys.readouterr().out
    for kind in ("random", "medium-replay", "medium"):
        dataset_id, path = f"online-dt/Hopper-v5/{kind}-v0", tmp_path / "files" / f"Hopper-v5-{kind}.hdf5"
        one, other = pretrain_dt.read_minari(dataset_id), pretrain_dt.read_hdf5(path)
        for name in ("observations", "actions", "rewards", "terminals", "timeouts"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=f"{kind} {name}")
        assert f"{dataset_id}: {len(one.rewards):,} steps" in printed
        dataset = pretrain_dt.open_minari(dataset_id)
        assert dataset.spec.env_spec.id == "Hopper-v5"
        metadata = dataset.storage.metadata
        assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)
        assert len(one.rewards) >= {"random": 120, "medium": 100, "medium-replay": 200}[kind]
    replay = pretrain_dt.read_hdf5(tmp_path / "files" / "Hopper-v5-medium-replay.hdf5")
    assert replay.terminals.sum() >= 19  # training went on until there were 20 episodes
    args = dict(dataset="online-dt/Hopper-v5/medium-v0", embed_dim=16, n_layers=1, n_heads=1, batch_size=8, updates=2)
    run_dir = pretrain_dt.main(pretrain_dt.Args(**args, eval_episodes=1, threads=1, run_dir=str(tmp_path / "run")))
    content = pretrain_dt.load_checkpoint(run_dir)
    assert (content["dataset_kind"], content["env_id"]) == ("medium", "Hopper-v5")
    with pytest.raises(SystemExit, match=r"\Aerror: [^\n]*/medium-v0, [^\n]*exists already: move it away[^\n]*\Z"):
        main(Args(**toy))


@pytest.mark.parametrize(
    "flags, match",
    [
        (dict(env_id="Humanoid-v5"), "no medium return known for Humanoid-v5: give --medium-return"),
        (dict(env_id="Nope-v5", medium_return=1.0), "cannot make the environment Nope-v5"),
        (dict(env_id="CartPole-v1", medium_return=1.0), "both must be flat Boxes"),
        (dict(batch_size=0), "must be above 0"),
        (
            dict(max_steps=300, learning_starts=290, batch_size=4, medium_return=1e9),
            "no return of 1,000,000,000 after 300",
        ),
    ],
)
def test_what_cannot_work_ends_with_one_line_and_writes_nothing(flags, match, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    with pytest.raises(SystemExit, match=rf"\Aerror: [^\n]*{match}[^\n]*\Z"):
        main(Args(**flags))
    assert not list((tmp_path / "minari").rglob("*.hdf5"))


def test_medium_returns_are_the_papers_scores_of_d4rls_medium_sets():
    for task, score in (("Hopper", 44.32), ("Walker2d", 62.09), ("Ant", 80.30)):
        low, high = collect_dataset.REFERENCE[task]
        assert collect_dataset.MEDIUM[task] == pytest.approx(low + score / 100 * (high - low), abs=1.0)
    assert all(
        collect_dataset.REFERENCE[task] == pretrain_dt.REFERENCE_RETURNS[task] for task in collect_dataset.MEDIUM
    )
