"""Datasets: reading, checking, cutting, and the windows drawn from them, against arrays and numbers made by hand."""

import functools
import os
import socket
from pathlib import Path

import gymnasium as gym
import h5py
import huggingface_hub
import minari
import numpy as np
import pytest
import torch
from minari.data_collector.episode_buffer import EpisodeBuffer

from pretrain_dt import (
    ACTION_LIMIT,
    UMAZE,
    Args,
    Dataset,
    RawData,
    choose_kwargs,
    collect_random,
    cut_trajectories,
    draw_windows,
    fingerprint,
    load_dataset,
    make_env,
    pretraining_facts,
    start_or_resume,
)


@functools.cache
def shared_env(env_id):
    return make_env(env_id, {"maze_map": UMAZE} if env_id.startswith("AntMaze") else {})


def flags(steps, where):
    out = np.zeros(steps, bool)
    out[list(where)] = True
    return out


def raw_data(steps=10, obs_dim=11, act_dim=3, terminals=(4,), timeouts=(9,), seed=0):
    """Random arrays of a dataset whose trajectories end at the given steps."""
    rng = np.random.default_rng(seed)
    return RawData(
        rng.normal(size=(steps, obs_dim)).astype(np.float32),
        rng.uniform(-1, 1, (steps, act_dim)).astype(np.float32),
        rng.normal(size=steps).astype(np.float32),
        flags(steps, terminals),
        flags(steps, timeouts),
    )


def hdf5_file(folder, raw, without=(), **changed):
    """`raw` as a file in D4RL's layout: arrays in `changed` replaced, those in `without` left out."""
    path = folder / "hopper-medium.hdf5"
    with h5py.File(path, "w") as file:
        for name, array in (vars(raw) | changed).items():
            if name not in without:
                file[name] = array
        file["infos/qpos"] = np.zeros(3)  # D4RL's files hold more than is read
    return str(path)


def load(dataset, env_id="Hopper-v5", **fields):
    return load_dataset(Args(env_id=env_id, dataset=dataset, **fields), shared_env(env_id))


def refused(match):
    """The block ends with one line that teaches, and matches."""
    return pytest.raises(SystemExit, match=rf"\Aerror: [^\n]*{match}[^\n]*\Z")


# ---------------------------------------------------------------------------------------------------------------------
# Cutting, returns, description
# ---------------------------------------------------------------------------------------------------------------------


def cuts(steps, terminals=(), timeouts=(), rewards=None, task="Hopper", **kwargs):
    raw = raw_data(steps, terminals=terminals, timeouts=timeouts)
    raw.rewards = raw.rewards if rewards is None else np.array(rewards)
    return [(piece.start, piece.stop) for piece in cut_trajectories(raw, task, **kwargs)]


def test_trajectories_end_after_terminals_timeouts_and_both_at_once():
    assert cuts(9, terminals=[1, 8], timeouts=[4, 8]) == [(0, 2), (2, 5), (5, 9)]


def test_trajectories_of_one_step_stay_outside_antmaze():
    assert cuts(4, terminals=[0, 1], timeouts=[3]) == [(0, 1), (1, 2), (2, 4)]


def test_the_unfinished_last_trajectory_is_dropped():
    assert cuts(9, terminals=[1], timeouts=[4]) == [(0, 2), (2, 5)]
    assert cuts(9) == []


def test_flags_stored_as_numbers_cut_too():
    raw = raw_data(6, terminals=[1], timeouts=[5])
    raw.terminals, raw.timeouts = raw.terminals.astype(np.uint8), raw.timeouts.astype(np.float64)
    assert cut_trajectories(raw, "Hopper") == [slice(0, 2), slice(2, 6)]


def test_drop_last_drops_the_last_finished_trajectory():
    assert cuts(9, terminals=[1], timeouts=[4], drop_last=True) == [(0, 2)]
    assert cuts(9, terminals=[1], timeouts=[8], drop_last=True) == [(0, 2)]
    assert cuts(9, drop_last=True) == []


def test_antmaze_is_cut_at_the_first_success_and_loses_its_trajectories_of_one_step():
    rewards = [0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0]
    #          0-4: success at 2   5: one step   6-8: at 7   9-10: none   11: unfinished
    assert cuts(12, terminals=[5], timeouts=[4, 8, 10], rewards=rewards, task="AntMaze") == [(0, 3), (6, 8), (9, 11)]
    assert cuts(12, terminals=[5], timeouts=[4, 8, 10], rewards=rewards)[0] == (0, 5)  # elsewhere 1 is just a reward


def test_antmaze_success_at_the_first_step_leaves_nothing():
    assert cuts(6, timeouts=[2, 5], rewards=[1, 0, 0, 0, 1, 0], task="AntMaze") == [(3, 5)]


def dataset(observations, actions, rewards, lengths):
    """As load_dataset makes it, of trajectories that did not terminate."""
    returns = np.concatenate([part[::-1].cumsum()[::-1] for part in np.split(rewards, np.cumsum(lengths)[:-1])])
    fields = [np.asarray(field, np.float32) for field in (observations, actions, rewards, returns)]
    return Dataset(*fields, np.array(lengths), np.zeros(len(lengths), bool))


def two_trajectories():
    """Rewards 1, 2, 4 and 10, -20."""
    rng = np.random.default_rng(0)
    rewards = np.array([1.0, 2.0, 4.0, 10.0, -20.0])
    return dataset(rng.normal(size=(5, 11)), rng.normal(size=(5, 3)), rewards, [3, 2])


def rewarded(folder, rewards, **ends):
    """The path of a dataset with these rewards."""
    raw = raw_data(len(rewards), **ends)
    raw.rewards = np.array(rewards)
    return hdf5_file(folder, raw)


def test_returns_to_go_are_sums_to_the_end_of_the_own_trajectory(tmp_path):
    data = load(rewarded(tmp_path, [1.0, 2.0, 4.0, 10.0, -20.0], terminals=[2], timeouts=[4]))
    assert data.returns.tolist() == [7.0, 6.0, 4.0, -10.0, -20.0]
    assert data.lengths.tolist() == [3, 2] and data.terminated.tolist() == [True, False]
    assert data.best_return() == 7.0


def test_returns_are_summed_in_float64_and_kept_in_float32(tmp_path):
    rewards = np.r_[1e8, np.ones(9)].astype(np.float32)  # in float32, 1e8 + 1 is 1e8
    data = load(rewarded(tmp_path, rewards, terminals=[9], timeouts=()))
    assert data.returns.tolist() == [np.float32(1e8 + 9), 9, 8, 7, 6, 5, 4, 3, 2, 1]


def test_a_trajectory_that_reached_antmazes_goal_terminated_though_the_data_go_on(tmp_path):
    raw = raw_data(12, 31, 8, terminals=[11], timeouts=[3, 7])
    raw.rewards = np.array([0.0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    data = load(hdf5_file(tmp_path, raw), "AntMaze_UMaze-v4")
    assert data.lengths.tolist() == [3, 4, 4] and data.terminated.tolist() == [True, False, True]


def test_episodes_beyond_the_time_limit_are_counted(tmp_path, capsys):
    raw = raw_data(steps=3200, terminals=(), timeouts=(999, 2999, 3199))  # the second time limit is not marked
    load(hdf5_file(tmp_path, raw))
    assert "\n1 episodes are longer than the 1,000 steps of Hopper-v5" in "\n" + capsys.readouterr().out


def test_returns_beyond_float32_are_refused(tmp_path):
    with refused("rewards whose sums are not finite in float32"):
        load(rewarded(tmp_path, np.full(4, 3e38), terminals=[3], timeouts=()))


def test_description_says_episodes_steps_returns_and_score(tmp_path, capsys):
    path = rewarded(tmp_path, [1.0, 2.0, 4.0, 10.0, -20.0], terminals=[2], timeouts=[4])
    load(path)
    low, high = -20.272305, 3234.3
    scores = [100 * (7 - low) / (high - low), 100 * (-10 - low) / (high - low)]
    line = f"{path}: 2 episodes, 5 steps, return -1.5 ± 8.5, best 7.0, score"
    assert capsys.readouterr().out == f"{line} {np.mean(scores):.2f} ± {np.std(scores):.2f}\n"
    load("random", "Pendulum-v1", dataset_steps=200)
    assert "score" not in capsys.readouterr().out  # no reference returns


@pytest.mark.parametrize(
    "changed",
    [
        dict(observations=np.eye(5, 11, dtype=np.float32)),
        dict(actions=np.eye(5, 3, dtype=np.float32)),
        dict(rewards=np.array([1.0, 2.0, 4.0, 10.0, -20.001], np.float32)),
        dict(lengths=np.array([2, 3])),
        dict(terminated=np.array([False, True])),
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_fingerprint_changes_with_each_array(changed):
    data = two_trajectories()
    assert fingerprint(data) == fingerprint(two_trajectories())
    assert fingerprint(data._replace(**changed)) != fingerprint(data)


# ---------------------------------------------------------------------------------------------------------------------
# HDF5 in D4RL's layout
# ---------------------------------------------------------------------------------------------------------------------


def test_hdf5_is_read_as_it_is_up_to_the_last_finished_trajectory(tmp_path, capsys):
    raw = raw_data(12, terminals=[4], timeouts=[9])
    raw.actions = raw.actions.astype(np.float64)
    data = load(hdf5_file(tmp_path, raw))
    np.testing.assert_array_equal(data.observations, raw.observations[:10])
    np.testing.assert_allclose(data.actions, raw.actions[:10], atol=1e-6)
    np.testing.assert_array_equal(data.rewards, raw.rewards[:10])
    assert data.lengths.tolist() == [5, 5]
    kinds = (data.observations.dtype, data.actions.dtype, data.rewards.dtype)
    assert kinds == (np.float32, np.float32, np.float32)
    assert "outside the bounds" not in capsys.readouterr().out


def test_drop_last_episode_reaches_the_cut(tmp_path):
    assert load(hdf5_file(tmp_path, raw_data()), drop_last_episode=True).lengths.tolist() == [5]


def test_pendulum_actions_are_scaled_from_plus_minus_2(tmp_path):
    raw = raw_data(10, 3, 1)
    raw.actions = np.linspace(-2, 2, 10, dtype=np.float32)[:, None]
    data = load(hdf5_file(tmp_path, raw), "Pendulum-v1")
    np.testing.assert_allclose(data.actions, raw.actions / 2, atol=2e-6)


def test_actions_outside_the_bounds_are_clipped_with_a_line_and_atanh_stays_finite(tmp_path, capsys):
    raw = raw_data()
    raw.actions[[2, 5], 1] = [1.37, -9.0]
    raw.actions[7, 0] = 1.0  # at the bound: not outside
    data = load(hdf5_file(tmp_path, raw))
    limit = np.float32(ACTION_LIMIT)
    assert [data.actions[2, 1], data.actions[5, 1], data.actions[7, 0]] == [limit, -limit, limit]
    untouched = np.ones((10, 3), bool)
    untouched[[2, 5, 7], [1, 1, 0]] = False
    np.testing.assert_allclose(data.actions[untouched], raw.actions[untouched], atol=1e-6)
    assert torch.atanh(torch.from_numpy(data.actions)).isfinite().all()
    assert "20.00 % of the actions lie outside the bounds of Hopper-v5: clipped" in capsys.readouterr().out


def test_d4rls_ant_of_111_columns_is_cut_to_27_for_ant_v4_with_a_line(tmp_path, capsys):
    raw = raw_data(10, 111, 8)
    data = load(hdf5_file(tmp_path, raw), "Ant-v4")
    np.testing.assert_array_equal(data.observations, raw.observations[:, :27])
    assert "111-column ant: kept the first 27" in capsys.readouterr().out
    with refused("observations of 111 and actions of 8 dimensions, Ant-v5 has 105 and 8: v4 has 27 .*, v5 has 105"):
        load(hdf5_file(tmp_path, raw), "Ant-v5")


def test_d4rls_antmaze_of_29_columns_is_refused_with_the_reason(tmp_path):
    with refused("29-column antmaze: it lacks the goal.*Minari's D4RL/antmaze/umaze-v1"):
        load(hdf5_file(tmp_path, raw_data(10, 29, 8)), "AntMaze_UMaze-v4")


@pytest.mark.parametrize("name", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_value_that_is_not_finite_is_named_by_array_and_row(tmp_path, name, value):
    raw = raw_data()
    setattr(raw, name, getattr(raw, name).astype(np.float64))
    getattr(raw, name)[[6, 8]] = value
    with refused(f"value in {name} that is not finite in float32, first in row 6:"):
        load(hdf5_file(tmp_path, raw))


@pytest.mark.parametrize(
    "obs_dim, act_dim, env_id, match",
    [
        (
            11,
            3,
            "Walker2d-v5",
            "observations of 11 and actions of 3 dim.*, Walker2d-v5 has 17 and 6: .*--env-id",
        ),
        (17, 3, "Hopper-v5", "observations of 17 and actions of 3 dimensions, Hopper-v5 has 11 and 3"),
        (11, 2, "Hopper-v5", "observations of 11 and actions of 2 dimensions, Hopper-v5 has 11 and 3"),
        (27, 8, "Ant-v5", "observations of 27 .*Ant-v5 has 105 and 8: v4 has 27 observations, v5 has 105"),
    ],
)
def test_wrong_dimensions_are_refused_with_both_numbers(tmp_path, obs_dim, act_dim, env_id, match):
    with refused(match):
        load(hdf5_file(tmp_path, raw_data(10, obs_dim, act_dim)), env_id)


@pytest.mark.parametrize(
    "changed, match",
    [
        (dict(rewards=np.zeros(9)), "arrays of different lengths .*'observations': 10.*'rewards': 9"),
        (dict(terminals=np.zeros(11, bool)), "arrays of different lengths .*'terminals': 11"),
        (dict(rewards=np.zeros((10, 1))), r"'rewards': \(10, 1\).*\(N, S\), \(N, A\) and three times \(N,\)"),
        (dict(actions=np.zeros(10)), r"'actions': \(10,\).*\(N, S\), \(N, A\)"),
        (dict(observations=np.zeros((10, 8, 8, 3))), r"'observations': \(10, 8, 8, 3\)"),
        (dict(terminals=np.zeros(10), timeouts=np.zeros(10)), "no finished trajectory"),
        (dict(rewards=np.float32(1.0)), "rewards"),
        (dict(rewards=np.array([b"x"] * 10)), "rewards"),
    ],
    ids=["short", "long", "column", "flat", "images", "unfinished", "scalar", "text"],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changed, match):
    with refused(match):
        load(hdf5_file(tmp_path, raw_data(), **changed))


def test_a_dataset_without_a_single_step_is_refused(tmp_path):
    with refused("no finished trajectory|no step|empty"):
        load(hdf5_file(tmp_path, raw_data(0, terminals=(), timeouts=())))


def test_drop_last_episode_of_a_single_trajectory_is_refused(tmp_path):
    with refused("no finished trajectory"):
        load(hdf5_file(tmp_path, raw_data(terminals=[9], timeouts=())), drop_last_episode=True)


def test_missing_arrays_are_named(tmp_path):
    with refused("lacks rewards, timeouts: .*observations, actions, rewards, terminals, timeouts"):
        load(hdf5_file(tmp_path, raw_data(), without=("rewards", "timeouts")))


def test_a_truncated_file_is_refused(tmp_path):
    path = Path(hdf5_file(tmp_path, raw_data(2000)))
    path.write_bytes(path.read_bytes()[:20_000])
    with refused(f"cannot read {path}.* damaged or no HDF5"):
        load(str(path))


def test_a_file_that_is_no_hdf5_is_refused(tmp_path):
    path = tmp_path / "text.hdf5"
    path.write_text("no hdf5")
    with refused(f"cannot read {path}.* damaged or no HDF5"):
        load(str(path))


def test_a_missing_file_is_refused(tmp_path):
    with refused(f"dataset {tmp_path}/nowhere.hdf5 not found: give --dataset the path"):
        load(f"{tmp_path}/nowhere.hdf5")


# ---------------------------------------------------------------------------------------------------------------------
# Minari
# ---------------------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, on datasets without author or permalink


@pytest.fixture
def minari_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def episode(steps, seed, spaces, end="terminations", observations=None):
    """A random episode in the given observation and action space, with `observations` (default: steps + 1) of them."""
    (obs_space, act_space), rng = spaces, np.random.default_rng(seed)
    count = steps + 1 if observations is None else observations

    def draw(space):
        return rng.normal(size=(count, *space.shape)).astype(space.dtype)

    goals = isinstance(obs_space, gym.spaces.Dict)
    return EpisodeBuffer(
        observations={key: draw(space) for key, space in obs_space.items()} if goals else draw(obs_space),
        actions=rng.uniform(-1, 1, (steps, *act_space.shape)).astype(act_space.dtype),
        rewards=list(rng.uniform(-1, 1, steps)),  # below 1: no AntMaze success
        terminations=[end == "terminations" and step == steps - 1 for step in range(steps)],
        truncations=[end == "truncations" and step == steps - 1 for step in range(steps)],
        infos={},
    )


def minari_dataset(name, env, episodes):
    """Create it; `episodes` are the keyword arguments of episode()."""
    spaces = env.observation_space, env.action_space
    buffers = [episode(seed=seed, spaces=spaces, **kwargs) for seed, kwargs in enumerate(episodes)]
    minari.create_dataset_from_buffers(name, buffers, env=env, data_format="hdf5")
    return buffers


def test_minari_episodes_come_back_without_their_last_observation(minari_root):
    kinds = [dict(steps=5), dict(steps=7, end="truncations"), dict(steps=1)]
    buffers = minari_dataset("test/hopper-v0", gym.make("Hopper-v5"), kinds)
    data = load("test/hopper-v0")
    assert data.lengths.tolist() == [5, 7, 1]
    observations = np.concatenate([b.observations[:-1] for b in buffers])
    np.testing.assert_array_equal(data.observations, observations.astype(np.float32))
    np.testing.assert_allclose(data.actions, np.concatenate([b.actions for b in buffers]), atol=1e-6)
    np.testing.assert_array_equal(data.rewards, np.concatenate([b.rewards for b in buffers]).astype(np.float32))
    assert data.terminated.tolist() == [True, False, True]


def test_a_minari_episode_whose_end_bears_no_flag_is_a_trajectory_of_its_own(minari_root):
    minari_dataset(
        "test/hopper-v0", gym.make("Hopper-v5"), [dict(steps=4, end="no flag"), dict(steps=3, end="no flag")]
    )
    assert load("test/hopper-v0").lengths.tolist() == [4, 3]


def test_minari_antmaze_is_read_as_31_columns_and_brings_its_own_map(minari_root):
    turned = [row[::-1] for row in UMAZE[::-1]]
    env = gym.make("AntMaze_UMaze-v4", maze_map=turned, continuing_task=True)
    buffers = minari_dataset("test/maze-v0", env, [dict(steps=4), dict(steps=6)])
    data = load("test/maze-v0", "AntMaze_UMaze-v4")
    keys = ("achieved_goal", "observation", "desired_goal")
    for piece, buffer in zip(np.split(data.observations, [4]), buffers):
        expected = np.concatenate([buffer.observations[key][:-1] for key in keys], axis=1)
        np.testing.assert_array_equal(piece, expected.astype(np.float32))
    kwargs = choose_kwargs(Args(env_id="AntMaze_UMaze-v4", dataset="test/maze-v0"))
    assert kwargs == {"maze_map": turned, "continuing_task": True, "reward_type": "sparse"}
    observation, _ = make_env("AntMaze_UMaze-v4", kwargs).reset(seed=0)
    assert np.abs(observation[:2] - (4, -4)).max() <= 1 and np.abs(observation[-2:] - (4, 4)).max() <= 1


def test_other_data_take_d4rls_umaze_for_umaze_ids_only():
    assert choose_kwargs(Args(env_id="AntMaze_UMaze-v4")) == {"maze_map": UMAZE}
    assert choose_kwargs(Args(env_id="AntMaze_UMaze-v5", dataset="x.hdf5")) == {"maze_map": UMAZE}
    assert choose_kwargs(Args(env_id="AntMaze_Medium-v4")) == choose_kwargs(Args(env_id="Ant-v4")) == {}


def test_a_minari_datasets_arguments_are_the_environments_but_for_the_flags(minari_root):
    env = gym.make("Hopper-v5", healthy_reward=2.0, terminate_when_unhealthy=False, render_mode="rgb_array")
    minari_dataset("test/hopper-v0", env, [dict(steps=5)])
    args = Args(env_id="Hopper-v5", dataset="test/hopper-v0")
    assert choose_kwargs(args) == {"healthy_reward": 2.0, "terminate_when_unhealthy": False}
    args.env_kwargs = '{"healthy_reward": 3.0}'
    assert choose_kwargs(args) == {"healthy_reward": 3.0, "terminate_when_unhealthy": False}
    args.env_id = "Walker2d-v5"  # the set's are another task's
    assert choose_kwargs(args) == {"healthy_reward": 3.0}


def test_minari_episodes_of_t_instead_of_t_plus_1_observations_are_refused(minari_root):
    minari_dataset("test/hopper-v0", gym.make("Hopper-v5"), [dict(steps=5), dict(steps=6, observations=6)])
    with refused(r"test/hopper-v0 has episodes without their last observation \(T instead of T \+ 1\)"):
        load("test/hopper-v0")


def test_a_minari_dataset_of_another_environment_is_refused_with_both_numbers(minari_root):
    minari_dataset("test/hopper-v0", gym.make("Hopper-v5"), [dict(steps=5)])
    with refused("observations of 11 and actions of 3 dimensions, AntMaze_UMaze-v4 has 31 and 8"):
        load("test/hopper-v0", "AntMaze_UMaze-v4")


class Hub:
    """A session of huggingface_hub's, with a network or without."""

    def __init__(self, reachable):
        self.reachable = reachable

    def head(self, url, timeout):
        assert url.startswith("https://") and timeout <= 10
        if not self.reachable:
            raise ConnectionError("hub unreachable.\nmore about it")


def test_an_unknown_minari_id_without_network_is_one_line_at_once(minari_root, monkeypatch, capfd):
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Hub(reachable=False))
    monkeypatch.setattr(minari, "list_remote_datasets", lambda **kwargs: pytest.fail("would try for half a minute"))
    with refused("cannot get the Minari dataset mujoco/hopper/medium-v0: hub unreachable.*the network"):
        load("mujoco/hopper/medium-v0")
    printed = capfd.readouterr()
    assert "mujoco/hopper/medium-v0 is not on this machine" in printed.out
    assert printed.out.count("\n") == 1 and printed.err == ""


def test_a_minari_dataset_on_this_machine_asks_no_network(minari_root, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked the hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *given: pytest.fail("asked the network"))
    minari_dataset("test/hopper-v0", gym.make("Hopper-v5"), [dict(steps=5)])
    assert load("test/hopper-v0").lengths.tolist() == [5]
    (minari_root / "test" / "hopper-v0" / "data" / "main_data.hdf5").unlink()
    with refused(f"cannot read the Minari dataset test/hopper-v0: .* Mend {minari_root}/test/hopper-v0"):
        load("test/hopper-v0")


def test_a_download_says_its_size_first_and_its_failure_in_one_line(minari_root, monkeypatch, capsys):
    def no_download(dataset_id):
        raise ValueError("Couldn't find any version")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Hub(reachable=True))
    monkeypatch.setattr(minari, "list_remote_datasets", lambda **kwargs: {"a-b/c-v1": {"dataset_size": 12.5}})
    monkeypatch.setattr(minari, "download_dataset", no_download)
    with refused("cannot get the Minari dataset a-b/c-v1: Couldn't find any version"):
        load("a-b/c-v1")
    assert f"downloading a-b/c-v1, 12.5 MB, to {minari_root}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["medium", "mujoco/hopper/medium", "../x-v0", "a b-v0", "data.h5", ""])
def test_a_malformed_id_is_refused_without_asking_anyone(name, monkeypatch):
    monkeypatch.setattr(minari, "list_remote_datasets", lambda **kwargs: pytest.fail("asked the hub"))
    with refused(f'"{name}" is no dataset: give a Minari id'):
        load(name)


# ---------------------------------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------------------------------


class Told:
    """A generator that draws the given first steps."""

    def __init__(self, first):
        self.first = np.asarray(first)

    def integers(self, high, size):
        assert size == len(self.first) and self.first.max() < high
        return self.first


def numbered(lengths):
    """Trajectories whose observation, action and reward tell the step, counted from 1."""
    steps = np.arange(1, sum(lengths) + 1)
    columns = np.stack([steps, -steps], axis=1).astype(np.float32)
    return dataset(columns, columns[:, :1] / 1000, steps.astype(np.float64), lengths)


@pytest.mark.parametrize("context", [1, 3, 6])
def test_windows_equal_a_construction_step_by_step(context):
    data = numbered([4, 1, 7, 2])
    windows = draw_windows(data, context, 14, Told(range(14)))
    shapes = [tuple(array.shape) for array in windows]
    assert shapes == [(14, context, 2), (14, context), (14, context, 1), (14, context)]
    for first in range(14):
        end = next(end for end in (4, 5, 12, 14) if end > first)
        steps = list(range(first, min(first + context, end)))
        pad = context - len(steps)
        observations, returns, actions, real = (array[first].numpy() for array in windows)
        assert real.tolist() == [False] * pad + [True] * len(steps)
        assert observations[pad:, 0].tolist() == [step + 1 for step in steps]
        assert returns[pad:].tolist() == [sum(range(step + 1, end + 1)) for step in steps]
        np.testing.assert_allclose(actions[pad:, 0], [(step + 1) / 1000 for step in steps])


def test_the_left_padding_of_a_window_is_zero_and_its_actions_are_finite_before_tanh():
    windows = draw_windows(numbered([4, 1, 7, 2]), 6, 14, Told(range(14)))
    assert (~windows.real).sum() > 14
    assert not windows.observations[~windows.real].any() and not windows.returns[~windows.real].any()
    assert torch.atanh(windows.actions).isfinite().all()  # the loss multiplies by `real`: a NaN would survive that


def test_every_step_of_the_data_is_equally_likely_to_be_first():
    lengths, draws = [1, 2, 30, 7], 40_000
    windows = draw_windows(numbered(lengths), 3, draws, np.random.default_rng(0))
    first = windows.observations[..., 0].where(windows.real, torch.inf).min(dim=1).values.long().numpy()
    counts = np.bincount(first, minlength=41)[1:]
    assert counts.sum() == draws
    chi2 = ((counts - draws / 40) ** 2 / (draws / 40)).sum()
    assert chi2 < 39 + 5 * np.sqrt(2 * 39)  # mean and 5 standard deviations of chi-square with 39 degrees of freedom


def test_no_window_crosses_trajectories():
    lengths = np.random.default_rng(0).integers(1, 12, 50)
    data = numbered(lengths)
    trajectory = np.repeat(np.arange(50), lengths)
    windows = draw_windows(data, 8, 2000, np.random.default_rng(1))
    steps = windows.observations[..., 0].long().numpy() - 1
    real = windows.real.numpy()
    for row, is_real in zip(steps, real):
        inside = row[is_real]
        assert len(set(trajectory[inside])) == 1 and np.all(np.diff(inside) == 1)
        assert len(inside) == min(8, np.cumsum(lengths)[trajectory[inside[0]]] - inside[0])


# ---------------------------------------------------------------------------------------------------------------------
# Random data
# ---------------------------------------------------------------------------------------------------------------------


def random_data(env_id, steps, seed=0):
    return collect_random(Args(env_id=env_id, dataset_steps=steps, seed=seed), shared_env(env_id))


def test_random_data_are_the_same_for_a_seed_and_others_for_another():
    first, again, other = (random_data("Hopper-v5", 120, seed) for seed in (1, 1, 2))
    for name, array in vars(first).items():
        np.testing.assert_array_equal(array, getattr(again, name))
    assert not np.array_equal(first.observations[0], other.observations[0])
    assert not np.array_equal(first.actions[0], other.actions[0])


def test_random_actions_are_uniform_between_the_bounds():
    actions = random_data("Pendulum-v1", 2000).actions
    assert actions.shape == (2000, 1) and np.abs(actions).max() <= 2.0
    counts = np.histogram(actions, bins=10, range=(-2, 2))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 9 + 5 * np.sqrt(18)


class Counter(gym.Env):
    """Observes (episode, step); pays 10 * episode + the step it leads to; ends by turns after 3 (terminal) and 4 steps
    (timeout). Seeding leaves the count of episodes alone."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    episode = -2  # the first is that of make_env

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.count = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        self.count += 1
        reward, odd = 10.0 * self.episode + self.count, self.episode % 2
        return np.array([self.episode, self.count]), reward, not odd and self.count == 3, odd and self.count == 4, {}


def test_random_data_pair_each_step_with_the_observation_before_it_and_start_anew_after_an_end():
    gym.register("Counter-v0", Counter, max_episode_steps=100)
    raw = random_data("Counter-v0", 12)
    steps = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1)]
    assert raw.observations.tolist() == [[float(x), float(y)] for x, y in steps]
    assert raw.rewards.tolist() == [10.0 * x + y + 1 for x, y in steps]
    assert np.flatnonzero(raw.terminals).tolist() == [2, 9]
    assert np.flatnonzero(raw.timeouts).tolist() == [6]


def test_collecting_leaves_the_environment_of_evaluations_as_it_was():
    env = make_env("Pendulum-v1", {})
    before = env.reset(seed=0)[0], env.unwrapped.np_random.bit_generator.state
    collect_random(Args(env_id="Pendulum-v1", dataset_steps=50), env)
    assert np.array_equal(env.unwrapped._get_obs(), before[0].astype(np.float32))
    assert env.unwrapped.np_random.bit_generator.state == before[1]


def test_random_pendulum_ends_by_time_only():
    raw = random_data("Pendulum-v1", 450)
    assert np.flatnonzero(raw.timeouts).tolist() == [199, 399] and not raw.terminals.any()


def test_random_data_go_the_same_way_as_files():
    data = load("random", "Pendulum-v1", dataset_steps=450)
    assert data.lengths.tolist() == [200, 200]
    assert data.observations.dtype == data.actions.dtype == np.float32
    assert 0.99 < np.abs(data.actions).max() < 1.0


# ---------------------------------------------------------------------------------------------------------------------
# The network's buffers
# ---------------------------------------------------------------------------------------------------------------------

SIZES = dict(embed_dim=16, n_layers=1, n_heads=2)


def new_base(args, data):
    return start_or_resume(args, data, pretraining_facts(args, data, {}))


def test_network_takes_mean_and_std_from_the_data_and_leaves_constant_columns_unscaled():
    rng = np.random.default_rng(0)
    observations = rng.normal([0, 5, -1e4], [1, 0.1, 3], (20_000, 3)).astype(np.float32)
    observations = np.concatenate([observations, np.full((20_000, 1), 0.7, np.float32)], axis=1)
    observations = np.concatenate([observations, observations[:, :1] * 5e-4], axis=1)  # as good as constant
    data = dataset(observations, np.zeros((20_000, 2)), np.zeros(20_000), [20_000])
    base = new_base(Args(**SIZES), data)
    exact = observations.astype(np.float64)
    np.testing.assert_allclose(base["weights"]["obs_mean"], exact.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(base["weights"]["obs_std"], [*exact.std(axis=0)[:3], 1.0, 1.0], rtol=2e-5)
    assert base["sizes"] == dict(obs_dim=5, act_dim=2, kind="dt", **SIZES)


@pytest.mark.parametrize(
    "env_id, scale", [("AntMaze_UMaze-v4", 1.0), ("Hopper-v5", 1e-3), ("AdroitHandPen-v1", 1e-3), ("Ant-v4", 1e-3)]
)
def test_return_scale_is_1_for_antmaze_and_a_thousandth_elsewhere(env_id, scale):
    base = new_base(Args(env_id=env_id, **SIZES), two_trajectories())
    assert base["weights"]["return_scale"].item() == pytest.approx(scale)


def test_initial_weights_hang_on_the_seed_alone():
    bases = [new_base(Args(seed=seed, **SIZES), two_trajectories()) for seed in (1, 1, 2)]
    weights = [torch.cat([value.flatten() for value in base["weights"].values()]) for base in bases]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ---------------------------------------------------------------------------------------------------------------------
# Real data
# ---------------------------------------------------------------------------------------------------------------------

needs_datasets = pytest.mark.skipif("DATASETS" not in os.environ, reason="DATASETS is not set")


@pytest.mark.data
@needs_datasets
@pytest.mark.parametrize(
    "file, env_id, drop_last, parts",
    [
        ("door-human", "AdroitHandDoor-v1", False, ["25 episodes, 6,729 steps, return 794.1 ± 357.7", "28.96 ± 12.18"]),
        ("door-human", "AdroitHandDoor-v1", True, ["24 episodes, 6,504 steps", "score 28.30"]),
        ("Hopper-v5-medium", "Hopper-v5", False, ["444 episodes, 199,714 steps, return 1,383.9 ± 334.5", "score 43.1"]),
    ],
)
def test_real_data_have_their_known_numbers(file, env_id, drop_last, parts, capsys):
    path = str(Path(os.environ["DATASETS"]) / f"{file}.hdf5")
    load(path, env_id, drop_last_episode=drop_last)
    line = capsys.readouterr().out
    assert all(part in line for part in parts), line
