"""The simulator pool of grpo_dt_continuous.py against gymnasium, environment by environment, and its snapshots."""

import functools
from typing import NamedTuple

import mujoco
import numpy as np
import pytest

from grpo_dt_continuous import LocomotionPool, SimulatorPool, make_env, make_pool, simulator_of, take_snapshot
from pretrain_dt import UMAZE

ROWS, SEGMENT = 6, 25
LOCOMOTION = [f"{task}-{v}" for task in ("Hopper", "Walker2d", "HalfCheetah", "Ant") for v in ("v4", "v5")]
ADROIT = [f"AdroitHand{task}-v1" for task in ("Door", "Hammer", "Pen", "Relocate")]
OTHERS = [*ADROIT, "AntMaze_UMaze-v4", "AntMaze_UMaze-v5", "Humanoid-v5", "Pusher-v5"]
BOTH_WAYS = [(name, LocomotionPool) for name in LOCOMOTION] + [(name, SimulatorPool) for name in LOCOMOTION + OTHERS]
EVERY_POOL = pytest.mark.parametrize("env_id, way", BOTH_WAYS, ids=[f"{n}-{w.__name__}" for n, w in BOTH_WAYS])
A_FEW = [("Ant-v5", LocomotionPool), ("Ant-v4", SimulatorPool), ("AdroitHandDoor-v1", SimulatorPool)]
A_FEW += [("AntMaze_UMaze-v4", SimulatorPool)]
FEW_POOLS = pytest.mark.parametrize("env_id, way", A_FEW, ids=[f"{n}-{w.__name__}" for n, w in A_FEW])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """MuJoCo writes its warnings to a file in the current folder."""
    monkeypatch.chdir(tmp_path)


def new_env(env_id):
    return make_env(env_id, {"maze_map": UMAZE} if env_id.startswith("AntMaze") else {})


def random_action(env, rng):
    """In single precision, as rollouts have them."""
    return rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)


class Segment(NamedTuple):
    """Steps of an episode of gymnasium's own environment, and a snapshot from before the first of them."""

    snapshot: np.ndarray
    actions: list
    observations: list
    rewards: list
    terminated: list


def disturb(env, env_id, count):
    """Every third segment gets what random actions do not bring within a few steps: a jump too high, a goal."""
    simulator = simulator_of(env)
    if count % 3 == 0 and env_id.startswith("Ant-"):
        simulator.data.qvel[2] += 5.0
    if count % 3 == 0 and env_id.startswith("AntMaze"):
        env.unwrapped.goal[:] = simulator.data.qpos[:2] + 0.44  # outside the radius of 0.45, but near


def play(env, env_id, rng, count):
    """A segment from within a random episode."""
    while True:
        env.reset(seed=int(rng.integers(2**31)))
        warm_up = rng.integers(3, 45 if "Pen" in env_id else 20)
        if not any(env.step(random_action(env, rng))[2] for _ in range(warm_up)):
            break
    disturb(env, env_id, count)
    segment = Segment(take_snapshot(env), [], [], [], [])
    while len(segment.actions) < SEGMENT and not any(segment.terminated):
        segment.actions.append(random_action(env, rng))
        outcome = env.step(segment.actions[-1])
        for field, value in zip(segment[2:], outcome):
            field.append(value)
    return segment


@functools.cache
def segments(env_id, steps=1000):
    """At least 1,000 steps of gymnasium's environment, in segments from as many episodes; not to be changed."""
    env, rng, played = new_env(env_id), np.random.default_rng(3), []
    while sum(len(segment.actions) for segment in played) < steps or len(played) % ROWS:
        played.append(play(env, env_id, rng, len(played)))
    return played


def replay(pool, batch, rows):
    """Restore the segments of `batch` into `rows` and step them side by side; what each gave: (obs, reward, end)."""
    pool.restore(rows, np.stack([segment.snapshot for segment in batch]))
    outcomes = [[] for _ in batch]
    for h in range(max(len(segment.actions) for segment in batch)):
        alive = [i for i, segment in enumerate(batch) if h < len(segment.actions)]
        stepped = pool.step(rows[alive], np.stack([batch[i].actions[h] for i in alive]))
        for i, *outcome in zip(alive, *stepped):
            outcomes[i].append(outcome)
    return outcomes


def batches(env_id):
    played = segments(env_id)
    return [played[i : i + ROWS] for i in range(0, len(played), ROWS)]


@EVERY_POOL
def test_pool_equals_gymnasium_over_1000_random_steps_from_snapshots_in_two_threads(env_id, way):
    pool, rng = way(new_env(env_id), ROWS, 2), np.random.default_rng(0)
    assert pool.threads == 2
    for batch in batches(env_id):
        for segment, outcome in zip(batch, replay(pool, batch, rng.permutation(ROWS))):
            observations, rewards, terminated = zip(*outcome)
            np.testing.assert_allclose(observations, segment.observations, rtol=0, atol=1e-9)
            np.testing.assert_allclose(rewards, segment.rewards, rtol=0, atol=1e-9)
            assert list(terminated) == segment.terminated
    ends = [segment.terminated[-1] for segment in segments(env_id)]
    never = env_id.startswith(("HalfCheetah", "Pusher")) or (env_id.startswith("Adroit") and "Pen" not in env_id)
    assert not all(ends) and any(ends) != never  # both outcomes were compared
    assert not pool.unstable()


@EVERY_POOL
def test_a_snapshot_replays_the_same_rewards_exactly_in_any_row_and_thread(env_id, way):
    two, one = way(new_env(env_id), ROWS, 2), way(new_env(env_id), ROWS + 2, 1)
    first, others = batches(env_id)[:2]
    rows = np.arange(ROWS)
    once = replay(two, first, rows)
    replay(two, others, rows)
    for again in (replay(two, first, rows[::-1].copy()), replay(one, first, rows + 2)):
        for ours, theirs in zip(once, again):
            assert [step[1:] for step in ours] == [step[1:] for step in theirs]
            assert all(np.array_equal(a[0], b[0]) for a, b in zip(ours, theirs))


@FEW_POOLS
def test_rows_that_are_not_stepped_stay_as_they_are(env_id, way):
    batch = [segment for segment in segments(env_id) if len(segment.actions) >= 10][:ROWS]
    pool, rows = way(new_env(env_id), ROWS, 2), np.arange(ROWS)
    pool.restore(rows, np.stack([segment.snapshot for segment in batch]))

    def state(row):
        data = simulator_of(pool.sims[row]).data
        return np.concatenate([[data.time], data.qpos, data.qvel, data.xpos.ravel()])

    before = [state(row) for row in rows]
    for h in range(5):
        _, rewards, _ = pool.step(np.array([4, 1]), np.stack([batch[4].actions[h], batch[1].actions[h]]))
        np.testing.assert_allclose(rewards, [batch[4].rewards[h], batch[1].rewards[h]], rtol=0, atol=1e-9)
    assert [np.array_equal(state(row), before[row]) for row in rows] == [True, False, True, True, False, True]
    _, rewards, _ = pool.step(np.array([5]), np.stack([batch[5].actions[0]]))  # late, but from where it stood
    assert abs(rewards[0] - batch[5].rewards[0]) < 1e-9


@pytest.mark.parametrize("env_id, way", [(n, w) for n, w in BOTH_WAYS if n.startswith("Ant-")])
def test_first_reward_of_a_restored_ant_counts_from_where_its_torso_lagged(env_id, way):
    env, rng, lag = new_env(env_id), np.random.default_rng(1), 0.0
    model, data = env.unwrapped.model, env.unwrapped.data
    env.reset(seed=1)
    while abs(lag) / env.unwrapped.dt < 1e-2:  # smaller ones, a pool that forgets them would not show
        env.step(random_action(env, rng))
        forward = mujoco.MjData(model)
        forward.qpos[:], forward.qvel[:] = data.qpos, data.qvel
        mujoco.mj_forward(model, forward)
        lag = forward.xpos[1, 0] - data.xpos[1, 0]
    snapshot, action = take_snapshot(env), random_action(env, rng)
    pool = way(new_env(env_id), 2, 2)
    pool.restore(np.array([1, 0]), np.stack([snapshot, segments(env_id)[1].snapshot]))
    _, rewards, _ = pool.step(np.array([1]), action[None])
    assert abs(rewards[0] - env.step(action)[1]) < 1e-9


DRAWN = {  # what a reset draws outside positions and velocities
    "AdroitHandDoor-v1": lambda env: env.unwrapped.model.body_pos,
    "AdroitHandHammer-v1": lambda env: env.unwrapped.model.body_pos,
    "AdroitHandPen-v1": lambda env: env.unwrapped.model.body_quat,
    "AdroitHandRelocate-v1": lambda env: env.unwrapped.model.site_pos,
    "AntMaze_UMaze-v4": lambda env: env.unwrapped.goal,
    "AntMaze_UMaze-v5": lambda env: env.unwrapped.goal,
}


@pytest.mark.parametrize("env_id", DRAWN)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_differ_at_the_same_time_in_what_their_reset_drew(env_id, threads):
    envs, rng = [new_env(env_id) for _ in range(4)], np.random.default_rng(2)
    for seed, env in enumerate(envs):
        env.reset(seed=seed)
    drawn = [DRAWN[env_id](env).copy() for env in envs]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(drawn) for b in drawn[:i])
    pool, rows = make_pool(new_env(env_id), 4, threads), np.arange(4)
    pool.restore(rows, np.stack([take_snapshot(env) for env in envs]))
    for _ in range(3):
        actions = np.stack([random_action(env, rng) for env in envs])
        observations, rewards, _ = pool.step(rows, actions)
        outcomes = [env.step(action) for env, action in zip(envs, actions)]
        np.testing.assert_allclose(observations, [outcome[0] for outcome in outcomes], rtol=0, atol=1e-9)
        np.testing.assert_allclose(rewards, [outcome[1] for outcome in outcomes], rtol=0, atol=1e-9)


@FEW_POOLS
def test_taking_and_restoring_a_snapshot_leaves_the_environment_and_the_snapshot_as_they_were(env_id, way):
    one, other = new_env(env_id), new_env(env_id)
    pool, rng = way(new_env(env_id), 2, 1), np.random.default_rng(0)
    for env in (one, other):
        env.reset(seed=5)
    for _ in range(4):
        snapshot = take_snapshot(one)
        kept, action = snapshot.copy(), random_action(one, rng)
        pool.restore(np.array([1]), snapshot[None])
        pool.step(np.array([1]), action[None])
        ours, theirs = one.step(action), other.step(action)
        assert np.array_equal(ours[0], theirs[0]) and ours[1] == theirs[1]
        assert np.array_equal(snapshot, kept)


def test_the_time_limit_does_not_end_simulations():
    env, rng = new_env("Pusher-v5"), np.random.default_rng(0)  # 100 steps
    env.reset(seed=0)
    for _ in range(98):
        env.step(random_action(env, rng))
    pool = make_pool(new_env("Pusher-v5"), 1, 1)
    pool.restore(np.zeros(1, int), take_snapshot(env)[None])
    actions = [random_action(env, rng) for _ in range(5)]
    ends = [bool(pool.step(np.zeros(1, int), action[None])[2][0]) for action in actions]
    assert ends == [False] * 5
    assert [env.step(action)[3] for action in actions[:2]] == [False, True]


@pytest.mark.parametrize("value", [np.nan, 1e12])
@pytest.mark.parametrize("field", ["qpos", "qvel"])
@FEW_POOLS
def test_a_simulation_that_mujoco_had_to_reset_makes_the_pool_unstable(env_id, way, field, value):
    batch, rows = [s for s in segments(env_id) if len(s.actions) >= 2][:3], np.arange(3)
    pool = way(new_env(env_id), 3, 2)
    pool.restore(rows, np.stack([segment.snapshot for segment in batch]))
    pool.step(rows, np.stack([segment.actions[0] for segment in batch]))
    assert not pool.unstable()
    getattr(simulator_of(pool.sims[1]).data, field)[3] = value
    observations, _, _ = pool.step(rows, np.stack([segment.actions[1] for segment in batch]))
    assert np.isfinite(observations).all()  # nothing else would tell
    assert pool.unstable()


@pytest.mark.parametrize("env_id", [*LOCOMOTION, *OTHERS])
def test_the_fast_way_is_taken_where_there_is_one(env_id):
    assert type(make_pool(new_env(env_id), 2, 1)) is (LocomotionPool if env_id in LOCOMOTION else SimulatorPool)


def test_an_environment_without_mujoco_is_one_line_that_names_the_other_scripts():
    match = r"\Aerror: Pendulum-v1 [^\n]*q_guided_grpo_dt\.py[^\n]*ppo_dt_continuous\.py[^\n]*\Z"
    with pytest.raises(SystemExit, match=match):
        make_pool(new_env("Pendulum-v1"), 2, 1)
