"""The simulators of grpo_dt_continuous.py: against gymnasium, environment by environment; their proof; the life of
their workers; and the environments of others that they are given."""

import contextlib
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

import grpo_dt_continuous as grpo
from grpo_dt_continuous import DecisionTransformer, Simulation, Simulators, make_env, rollout, scale_action
from pretrain_dt import UMAZE

SCRIPT = Path(grpo.__file__).resolve()
ROWS, SEGMENT = 6, 25
LOCOMOTION = [f"{task}-{v}" for task in ("Hopper", "Walker2d", "HalfCheetah", "Ant") for v in ("v4", "v5")]
ADROIT = [f"AdroitHand{task}-v1" for task in ("Door", "Hammer", "Pen", "Relocate")]
ALL = [*LOCOMOTION, *ADROIT, "AntMaze_UMaze-v4", "AntMaze_UMaze-v5", "Pusher-v5"]
ALL += [pytest.param("Humanoid-v5", marks=pytest.mark.slow)]
EVERY = pytest.mark.parametrize("env_id", ALL)
A_FEW = pytest.mark.parametrize("env_id", ["Ant-v5", "Ant-v4", "AdroitHandDoor-v1", "AntMaze_UMaze-v4"])


def new_env(env_id):
    return make_env(env_id, {"maze_map": UMAZE} if env_id.startswith("AntMaze") else {})


@functools.cache
def simulators(env_id):
    """Without workers; for tests that leave it fit for use."""
    return Simulators(new_env(env_id), ROWS + 2, 0)


@contextlib.contextmanager
def ending(seconds):
    """The block fails if it takes longer: a hang is what is tested for."""

    def fail(*_):
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def random_action(space, rng):
    """In [-1, 1], in single precision, as rollouts have them."""
    return rng.uniform(-1.0, 1.0, space.shape).astype(np.float32)


def act(env, action):
    """A step of the environment itself by an action in [-1, 1]."""
    return env.step(scale_action(action, env.action_space))


def taken(simulation):
    """The state of a simulation, as a vector of its own."""
    state = np.full(simulation.ends[-1], np.nan)
    simulation.take(state)
    return state


def assert_same(ours, theirs):
    """Sequences of arrays or numbers, equal to the last bit."""
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y)


# ---- Against gymnasium ----------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Steps of an episode of gymnasium's own environment, and a snapshot from before the first of them."""

    snapshot: np.ndarray
    actions: list
    observations: list
    rewards: list
    terminated: list


def disturb(simulation, env_id, count):
    """Every third segment gets what random actions do not bring within a few steps: a jump too high, a goal."""
    if count % 3 == 0 and env_id.startswith("Ant-"):
        simulation.data.qvel[2] += 5.0
    if count % 3 == 0 and env_id.startswith("AntMaze"):
        simulation.env.unwrapped.goal[:] = simulation.data.qpos[:2] + 0.44  # outside the radius of 0.45, but near


def play(simulation, env_id, rng, count):
    """A segment from within a random episode."""
    env, space = simulation.env, simulation.env.action_space
    while True:
        simulation.reset(int(rng.integers(2**31)))
        warm_up = rng.integers(3, 45 if "Pen" in env_id else 20)
        if not any(act(env, random_action(space, rng))[2] for _ in range(warm_up)):
            break
    disturb(simulation, env_id, count)
    segment = Segment(taken(simulation), [], [], [], [])
    while len(segment.actions) < SEGMENT and not any(segment.terminated):
        segment.actions.append(random_action(space, rng))
        outcome = act(env, segment.actions[-1])
        for field, value in zip(segment[2:], outcome):
            field.append(value)
    return segment


@functools.cache
def segments(env_id, steps):
    """At least so many steps of gymnasium's environment, in segments from as many episodes; not to be changed."""
    simulation, rng, played = Simulation(new_env(env_id)), np.random.default_rng(3), []
    while sum(len(segment.actions) for segment in played) < steps or len(played) % ROWS:
        played.append(play(simulation, env_id, rng, len(played)))
    return played


def replay(sims, batch, rows):
    """Restore the segments of `batch` into `rows` and step them side by side; for each its steps: (observation, reward,
    terminated, truncated, state)."""
    sims.states[rows] = [segment.snapshot for segment in batch]
    outcomes = [[] for _ in batch]
    for h in range(max(len(segment.actions) for segment in batch)):
        alive = [i for i, segment in enumerate(batch) if h < len(segment.actions)]
        stepped = sims.step(rows[alive], np.stack([batch[i].actions[h] for i in alive]))
        for i, *outcome in zip(alive, *stepped, sims.states[rows[alive]]):
            outcomes[i].append(outcome)
    return outcomes


@EVERY
def test_simulators_equal_gymnasium_over_1000_random_steps_from_snapshots_within_episodes(env_id):
    sims, rng, played = simulators(env_id), np.random.default_rng(0), segments(env_id, 1000)
    atol = 1e-12 if "Pen" in env_id else 0.0
    for start in range(0, len(played), ROWS):
        batch = played[start : start + ROWS]
        for segment, outcome in zip(batch, replay(sims, batch, rng.permutation(ROWS))):
            observations, rewards, terminated, truncated, _ = zip(*outcome)
            np.testing.assert_allclose(observations, segment.observations, rtol=0, atol=atol)
            np.testing.assert_allclose(rewards, segment.rewards, rtol=0, atol=atol)
            assert list(terminated) == segment.terminated and not any(truncated)
    ends = [segment.terminated[-1] for segment in played]
    never = env_id.startswith(("HalfCheetah", "Pusher")) or (env_id.startswith("Adroit") and "Pen" not in env_id)
    assert not all(ends) and any(ends) != never  # both outcomes were compared


@EVERY
def test_a_restored_state_replays_the_same_rewards_exactly_in_any_row(env_id):
    sims, rows = simulators(env_id), np.arange(ROWS)
    played = segments(env_id, 40)
    first, others = played[:ROWS], played[-ROWS:][::-1]
    once = replay(sims, first, rows)
    replay(sims, others, rows)
    for again in (replay(sims, first, rows[::-1].copy()), replay(sims, first, rows + 2)):
        for ours, theirs in zip(once, again, strict=True):
            for step, same in zip(ours, theirs, strict=True):
                assert_same(step, same)


def test_a_reset_gives_gymnasiums_first_observations_and_their_states():
    sims, env, rng = simulators("Hopper-v5"), gym.make("Hopper-v5"), np.random.default_rng(0)
    sims.states[:] = before = 7.0
    observations = sims.reset(np.array([5, 11, 5]))
    kept = observations.copy()
    assert_same(observations, [env.reset(seed=seed)[0] for seed in (5, 11, 5)])
    assert_same(sims.states[0], sims.states[2])
    assert (sims.states[3:] == before).all()
    action = random_action(sims.space, rng)
    env.reset(seed=11)
    stepped = sims.step(np.array([1]), action[None])
    assert_same([field[0] for field in stepped], act(env, action)[:4])
    assert_same(observations, kept)  # a copy


def test_what_a_step_gives_are_copies_in_the_types_of_a_rollout():
    sims, rng = simulators("Hopper-v5"), np.random.default_rng(0)
    sims.reset(np.arange(ROWS))
    actions = np.stack([random_action(sims.space, rng) for _ in range(ROWS)])
    before = actions.copy()
    stepped = sims.step(np.arange(ROWS), actions)
    kept = [field.copy() for field in stepped]
    sims.step(np.arange(ROWS), -actions)
    assert_same(stepped, kept)
    assert_same(actions, before)
    assert [field.dtype for field in stepped] == [np.float64, np.float64, bool, bool]
    assert [field.shape for field in stepped] == [(ROWS, 11), (ROWS,), (ROWS,), (ROWS,)]


@A_FEW
def test_rows_that_are_not_stepped_stay_as_they_are(env_id):
    batch = [segment for segment in segments(env_id, 300) if len(segment.actions) >= 10][:ROWS]
    sims = simulators(env_id)
    before = np.stack([segment.snapshot for segment in batch])
    sims.states[:ROWS] = before
    for h in range(5):
        _, rewards, *_ = sims.step(np.array([4, 1]), np.stack([batch[4].actions[h], batch[1].actions[h]]))
        assert rewards.tolist() == [batch[4].rewards[h], batch[1].rewards[h]]
    assert (sims.states[:ROWS] == before).all(1).tolist() == [True, False, True, True, False, True]
    _, rewards, *_ = sims.step(np.array([5]), batch[5].actions[0][None])  # late, but from where it stood
    assert rewards.tolist() == batch[5].rewards[:1]


@pytest.mark.parametrize("env_id", ["Ant-v4", "Ant-v5"])
def test_first_reward_of_a_restored_ant_counts_from_where_its_torso_lagged(env_id):
    simulation, sims, rng, lag = Simulation(new_env(env_id)), simulators(env_id), np.random.default_rng(1), 0.0
    env, model, data = simulation.env, simulation.model, simulation.data
    simulation.reset(1)
    while abs(lag) / env.unwrapped.dt < 1e-2:  # smaller ones, simulators that forget them would not show
        act(env, random_action(env.action_space, rng))
        forward = mujoco.MjData(model)
        forward.qpos[:], forward.qvel[:] = data.qpos, data.qvel
        mujoco.mj_forward(model, forward)
        lag = forward.xpos[1, 0] - data.xpos[1, 0]
    action = random_action(env.action_space, rng)
    sims.states[[1, 0]] = taken(simulation), segments(env_id, 40)[1].snapshot
    _, rewards, *_ = sims.step(np.array([1]), action[None])
    assert rewards[0] == act(env, action)[1]


DRAWN = {  # what a reset draws outside positions and velocities
    "AdroitHandDoor-v1": lambda env: env.unwrapped.model.body_pos,
    "AdroitHandHammer-v1": lambda env: env.unwrapped.model.body_pos,
    "AdroitHandPen-v1": lambda env: env.unwrapped.model.body_quat,
    "AdroitHandRelocate-v1": lambda env: env.unwrapped.model.site_pos,
    "AntMaze_UMaze-v4": lambda env: env.unwrapped.goal,
    "AntMaze_UMaze-v5": lambda env: env.unwrapped.goal,
}


@pytest.mark.parametrize("env_id", DRAWN)
def test_rows_differ_at_the_same_time_in_what_their_reset_drew(env_id):
    envs, sims, rng = [new_env(env_id) for _ in range(4)], simulators(env_id), np.random.default_rng(2)
    seeds, rows = np.array([3, 8, 5, 4]), np.arange(4)
    for seed, env in zip(seeds, envs):
        env.reset(seed=int(seed))
    drawn = [DRAWN[env_id](env).copy() for env in envs]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(drawn) for b in drawn[:i])
    sims.reset(seeds)
    for _ in range(3):
        actions = np.stack([random_action(env.action_space, rng) for env in envs])
        observations, rewards, *_ = sims.step(rows, actions)
        outcomes = [act(env, action) for env, action in zip(envs, actions)]
        np.testing.assert_allclose(observations, [outcome[0] for outcome in outcomes], rtol=0, atol=1e-12)
        np.testing.assert_allclose(rewards, [outcome[1] for outcome in outcomes], rtol=0, atol=1e-12)


@A_FEW
def test_taking_and_restoring_a_state_leaves_the_environment_and_the_state_as_they_were(env_id):
    one, other, sims = Simulation(new_env(env_id)), Simulation(new_env(env_id)), simulators(env_id)
    rng = np.random.default_rng(0)
    for simulation in (one, other):
        simulation.reset(5)
    for _ in range(4):
        state, action = taken(one), random_action(sims.space, rng)
        kept = state.copy()
        sims.states[1] = state
        sims.step(np.array([1]), action[None])
        one.put(state)  # where it stands
        assert_same(taken(one), kept)
        assert_same(act(one.env, action)[:3], act(other.env, action)[:3])
        assert_same(state, kept)
        assert_same(taken(one), taken(other))
    one.put(kept)  # and back again
    assert_same(taken(one), kept)


def test_the_time_limit_does_not_end_simulations():
    simulation, sims, rng = Simulation(new_env("Pusher-v5")), simulators("Pusher-v5"), np.random.default_rng(0)
    env = simulation.env
    assert sims.limit == 100
    simulation.reset(0)
    for _ in range(98):
        act(env, random_action(env.action_space, rng))
    sims.states[0] = taken(simulation)
    actions = [random_action(env.action_space, rng) for _ in range(5)]
    ends = [[field[0] for field in sims.step(np.array([0]), action[None])[2:]] for action in actions]
    assert ends == [[False, False]] * 5
    assert [act(env, action)[3] for action in actions[:2]] == [False, True]


@A_FEW
def test_a_simulation_that_mujoco_had_to_reset_is_one_line(env_id, refused):
    batch, rows = [s for s in segments(env_id, 300) if len(s.actions) >= 2][:3], np.arange(3)
    actions, sims = np.stack([segment.actions[0] for segment in batch]), simulators(env_id)
    for field, value in (("qpos", np.nan), ("qpos", 1e12), ("qvel", -1e12), ("qfrc_applied", 1e15)):
        sims.states[:3] = [segment.snapshot for segment in batch]
        sims.main.put(sims.states[1])
        getattr(sims.main.data, field)[3] = value
        sims.main.take(sims.states[1])
        sims.step(rows[::2], actions[::2])  # the others go on
        with refused("--seed"):
            sims.step(rows, actions)
        sims.local.reset(0)  # MuJoCo counts its warnings until then


# ---- Workers give the same ------------------------------------------------------------------------------------------


def stepped(sims):
    """Steps of changing rows, more and fewer than there are workers: all that is seen."""
    rng, seen = np.random.default_rng(4), [sims.reset(np.arange(20, 28))]
    for count in (8, 8, 7, 1, 2, 3, 8, 5, 4, 8):
        actions = rng.uniform(-1.0, 1.0, (count, *sims.space.shape)).astype(np.float32)
        seen += [*sims.step(rng.permutation(8)[:count], actions), sims.states[:8].copy()]
    return seen


def rolled(sims):
    """Two rollouts with a small random network, the second from within the first one's trajectories."""
    rng, n, act_dim = np.random.default_rng(5), 8, sims.space.shape[0]
    torch.manual_seed(0)
    policy = DecisionTransformer(sims.observations.shape[1], act_dim, 16, 2, 2).eval()
    noise = rng.standard_normal((n, 20, act_dim), dtype=np.float32)
    last = rng.integers(10, 31, n)
    first = rollout(policy, sims, sims.reset(np.arange(n)), np.full(n, 100.0), noise, last, None, 3, snapshots=True)
    sims.states[:n] = first.snapshots[:, 4]
    past = [field[:, 4:6] for field in first[:4]]
    second = rollout(policy, sims, first.observations[:, 6], first.returns[:, 6], noise[:, 4:], last - 4, past, 3)
    return [*first, *second]


@pytest.mark.parametrize("env_id", ["Hopper-v5", pytest.param("AdroitHandDoor-v1", marks=pytest.mark.slow)])
def test_no_and_one_and_three_workers_give_the_same_to_the_last_bit_also_through_a_rollout(env_id):
    seen = []
    for workers in (0, 1, 3):
        with ending(120), Simulators(new_env(env_id), 8, workers) as sims:
            pids = [process.pid for process in sims.processes]
            assert len(pids) == workers and {*pids} <= {*workers_of(os.getpid())}
            seen.append([*stepped(sims), *rolled(sims)])
        assert_gone(pids, 5)
    assert_same(seen[0], seen[1])
    assert_same(seen[0], seen[2])
    first, second = seen[0][-18:-9], seen[0][-9:]
    assert len(np.unique(first[3].sum(1))) > 2  # some ended before others
    together = min(first[5].shape[1] - 4, second[5].shape[1])
    np.testing.assert_allclose(first[5][:, 4:][:, :together], second[5][:, :together], rtol=0, atol=1e-4)  # one episode


# ---- The proof ------------------------------------------------------------------------------------------------------


def own(entry_point, **kwargs):
    """The id of a task of one's own, registered in this process."""
    env_id = f"Own/{getattr(entry_point, '__name__', 'Task').strip('<>')}-v0"
    gym.registry.pop(env_id, None)
    gym.register(env_id, entry_point, **dict(max_episode_steps=50) | kwargs)
    return env_id


class Revalued(HalfCheetahEnv):
    """Gymnasium's cheetah with an outcome of one's own."""

    def step(self, action):
        return self.outcome(action, *super().step(action))


class TargetSpeed(Revalued):
    """A speed to run at, drawn at each reset."""

    def reset_model(self):
        self.target = self.np_random.uniform(0.0, 3.0, 1)
        return super().reset_model()

    def outcome(self, action, observation, reward, *rest):
        return observation, reward - abs(self.data.qvel[0] - self.target.item()), *rest


class Direction(TargetSpeed):
    """One of two, by luck the same in the first episodes that are played."""

    def reset_model(self):
        super().reset_model()
        self.target[:] = 3.0 * np.sign(self.target - 1.2)
        return self._get_obs()


class Friction(HalfCheetahEnv):
    def reset_model(self):
        self.model.geom_friction[:, 0] = self.np_random.uniform(0.1, 1.5)
        return super().reset_model()


class Noise(Revalued):
    def outcome(self, action, observation, *rest):
        return observation + 1e-3 * self.np_random.normal(size=observation.shape), *rest


class SmoothActions(Revalued):
    """Changes of action cost."""

    def reset_model(self):
        self.previous = np.zeros(6)
        return super().reset_model()

    def outcome(self, action, observation, reward, *rest):
        change, self.previous = np.square(action - self.previous).sum(), action.copy()
        return observation, reward - 1e-2 * change, *rest


class Flags(HopperEnv):
    """Only whether it ends hangs on what is drawn."""

    def reset_model(self):
        self.steps_left = self.np_random.integers(8, 14)
        return super().reset_model()

    def step(self, action):
        self.steps_left -= 1
        observation, reward, _, *rest = super().step(action)
        return observation, reward, self.steps_left <= 0, *rest


class NotANumber(Revalued):
    """Gives one in the first episode, in which the simulators' own copy stays, or in all later ones."""

    episodes = 0

    def __init__(self, where, first, **kwargs):
        self.where, self.first = where, first
        super().__init__(**kwargs)

    def reset_model(self):
        self.episodes += 1
        return super().reset_model()

    def outcome(self, action, observation, reward, *rest):
        factor = np.nan if self.first == (self.episodes == 1) else 1.0
        if self.where == "reward":
            return observation, reward * factor, *rest
        return observation * factor, reward, *rest


class TargetSpeedOfOneStep(TargetSpeed):
    def outcome(self, *seen):
        observation, reward, _, *rest = super().outcome(*seen)
        return observation, reward, True, *rest


def with_a_limit(**kwargs):
    return gym.wrappers.TimeLimit(HalfCheetahEnv(**kwargs), 30)


def with_a_limit_within(**kwargs):
    return gym.wrappers.TransformReward(gym.make("Hopper-v5", **kwargs), abs)


class GoalTuple(Revalued):
    goal = (2.0, 0.0)

    def outcome(self, action, observation, reward, *rest):
        return observation, reward - abs(self.data.qpos[0] - self.goal[0]), *rest


def ten_times(**kwargs):
    return gym.wrappers.TransformReward(gym.make("Hopper-v5", **kwargs).unwrapped, lambda reward: 10.0 * reward)


class EndsAtOnce(Revalued):
    def outcome(self, action, observation, reward, *rest):
        return observation, reward, True, *rest[1:]


class EndsInTheThirdStep(Revalued):
    """Until 0.15 s, by MuJoCo's clock: a step is 0.05 s."""

    def outcome(self, action, observation, reward, *rest):
        assert self.data.time < 0.17, "stepped after its end"
        return observation, reward, self.data.time > 0.12, *rest[1:]


class DrawnGoal(GoalTuple):
    """A goal that is drawn, in a tuple, which no snapshot holds."""

    def reset_model(self):
        self.goal = tuple(self.np_random.uniform(-2.0, 2.0, 2))
        return super().reset_model()


REFUSED = [TargetSpeed, Direction, Friction, Noise, SmoothActions, Flags, DrawnGoal, TargetSpeedOfOneStep]


@pytest.mark.parametrize("task", REFUSED, ids=lambda task: task.__name__)
def test_a_task_that_keeps_state_where_a_snapshot_does_not_reach_is_refused_at_the_start(task, refused):
    env_id = own(task)
    with refused(env_id, "live_arrays", "ppo_dt_continuous.py"):
        Simulators(make_env(env_id, {}), 2, 0)


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_what_is_not_finite_is_called_that_and_no_instability(where, refused):
    for first in (True, False):  # in the copy that plays, and in the environment itself
        env = make_env(own(NotANumber), {"where": where, "first": first})
        with refused("NotANumber-v0", where, "not finite"):
            Simulators(env, 2, 0)


def test_a_task_cut_short_before_the_proof_could_see_more_is_still_looked_at(refused):
    for steps in (1, 3, 5):
        with refused("TargetSpeed-v0", "live_arrays"):
            Simulators(make_env(own(TargetSpeed, max_episode_steps=steps), {}), 2, 0)


def test_state_that_live_arrays_is_told_of_is_no_reason_to_refuse(monkeypatch):
    live_arrays = grpo.live_arrays
    monkeypatch.setattr(grpo, "live_arrays", lambda env: [*live_arrays(env), env.unwrapped.target])
    assert_plays_exactly(own(TargetSpeed))


@pytest.mark.parametrize("task", [with_a_limit, with_a_limit_within], ids=lambda task: task.__name__)
def test_a_time_limit_within_the_entry_point_is_refused(task, refused):
    env_id = own(task)
    with refused(env_id, "max_episode_steps"):
        Simulators(make_env(env_id, {}), 2, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_without_mujoco_is_one_line_that_names_the_other_scripts(workers, refused):
    with refused("Pendulum-v1", "q_guided_grpo_dt.py", "ppo_dt_continuous.py"):
        Simulators(make_env("Pendulum-v1", {}), 2, workers)


def assert_plays_exactly(env_id, kwargs=None, sims=None):
    """Two episodes of the environment itself, to their ends but for the time limit, and the same side by side in
    `sims`. Gives the rewards of the first."""
    env = make_env(env_id, kwargs or {})
    sims = sims or Simulators(make_env(env_id, kwargs or {}), 2, 0)
    rng, outcomes = np.random.default_rng(0), []
    actions = [[random_action(env.action_space, rng) for _ in range(env.spec.max_episode_steps)] for _ in range(2)]
    for seed in (30, 31):
        first, _ = env.reset(seed=seed)
        outcomes.append([(first,)])
        for action in actions[seed - 30]:
            outcomes[-1].append(act(env, action))
            if outcomes[-1][-1][2]:
                break
    assert_same(sims.reset(np.array([30, 31])), [episode[0][0] for episode in outcomes])
    for t in range(1, max(map(len, outcomes))):
        rows = np.array([i for i in range(2) if t < len(outcomes[i])])
        found = sims.step(rows, np.stack([actions[i][t - 1] for i in rows]))
        for field, *expected in zip(found[:3], *(outcomes[i][t] for i in rows)):
            assert_same(field, expected)
    return [outcome[1] for outcome in outcomes[0][1:]]


@pytest.mark.parametrize(
    "task, registered, kwargs",
    [
        (ten_times, {}, {}),
        ("gymnasium.envs.mujoco.hopper_v4:HopperEnv", {}, {}),
        (HopperEnv, {}, {"exclude_current_positions_from_observation": False}),
        (HopperEnv, {"kwargs": {"exclude_current_positions_from_observation": False}}, {"healthy_reward": 3.0}),
        (GoalTuple, {}, {}),
        (EndsAtOnce, {}, {}),
        (EndsInTheThirdStep, {}, {}),
        (HalfCheetahEnv, {"max_episode_steps": 1}, {}),
        (HalfCheetahEnv, {"max_episode_steps": 4}, {}),
    ],
    ids=["ten_times", "v4", "positions", "positions-registered", "goal", "at-once", "third", "limit-1", "limit-4"],
)
def test_a_task_that_snapshots_do_reach_is_accepted_and_played_exactly(task, registered, kwargs):
    rewards = assert_plays_exactly(own(task, **registered), kwargs)
    lengths = {EndsAtOnce: 1, EndsInTheThirdStep: 3}
    assert len(rewards) == lengths.get(task, len(rewards))
    if task is ten_times:
        plain = assert_plays_exactly(own("gymnasium.envs.mujoco.hopper_v5:HopperEnv"))
        np.testing.assert_allclose(rewards, 10.0 * np.array(plain), rtol=1e-12)


def test_an_id_that_names_the_module_which_registers_it_is_played_exactly(tmp_path, monkeypatch):
    entry_point = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"
    register = f"gymnasium.register('Named-v3', '{entry_point}', max_episode_steps=40)"
    (tmp_path / "module_of_ones_own.py").write_text(f"import gymnasium\n{register}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert_plays_exactly("module_of_ones_own:Named-v3")


class WrongInOneProcess(Revalued):
    def __init__(self, wrong, **kwargs):
        self.off = 1e-6 * (multiprocessing.current_process().name == wrong)
        super().__init__(**kwargs)

    def outcome(self, action, observation, reward, *rest):
        return observation, reward + self.off, *rest


def test_the_proof_is_every_workers(refused):
    counter = int(re.search(r"\d+$", multiprocessing.get_context("spawn").Process().name)[0])
    kwargs = {"wrong": f"SpawnProcess-{counter + 2}"}  # the second of the two
    with ending(120), refused("WrongInOneProcess-v0", "live_arrays"):
        Simulators(make_env(own(WrongInOneProcess), kwargs), 2, 2)


# ---- A worker's life ------------------------------------------------------------------------------------------------


def processes():
    """(pid, parent's pid, command line) of all that run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found.append((int(folder.name), int(parent), (folder / "cmdline").read_text().replace("\0", " ")))
    return found


def below(pid):
    """The descendants of a process: {pid: command line}."""
    listed, found = processes(), {}
    while more := {p: line for p, parent, line in listed if parent in (pid, *found) and p not in found}:
        found |= more
    return found


def wait_for(condition, seconds):
    """Its first true value, or its last."""
    begun = time.monotonic()
    while not (value := condition()) and time.monotonic() < begun + seconds:
        time.sleep(0.02)
    return value


def assert_gone(pids, seconds):
    assert wait_for(lambda: not {pid for pid, *_ in processes()} & {*pids}, seconds)


@contextlib.contextmanager
def script(folder, *command, **files):
    """A command in a group of processes of its own, `out` and `err` in the folder. None is left behind."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=env,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=heed,
        )
    try:
        yield process
    finally:
        left = below(process.pid)
        process.kill()
        process.wait()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def workers_of(pid):
    return [pid for pid, line in below(pid).items() if "spawn_main" in line]


def ignores_ctrl_c(pid):
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(ignored, 16) & 1 << signal.SIGINT - 1)


class Fragile(Revalued):
    """Raises far out, and dies farther out."""

    def outcome(self, action, *seen):
        if self.data.qpos[0] > 500.0:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel would, out of memory, in the middle of a step
        if self.data.qpos[0] > 50.0:
            raise ValueError("the motor\nis hot")
        return seen


class NotInWorkers(HalfCheetahEnv):
    def __init__(self, **kwargs):
        if multiprocessing.parent_process():
            raise RuntimeError("no licence")
        super().__init__(**kwargs)


def put_at(sims, row, x):
    sims.main.put(sims.states[row])
    sims.main.data.qpos[0] = x
    sims.main.take(sims.states[row])


def test_what_a_worker_raises_and_its_death_are_one_line_each_and_leaving_ends_all(refused):
    rows, still, env = np.arange(4), np.zeros((4, 6)), make_env(own(Fragile), {})
    with ending(120), Simulators(env, 4, 2) as sims:
        pids = [process.pid for process in sims.processes]
        sims.reset(rows)
        put_at(sims, 3, 60.0)
        with refused("Fragile-v0", "the motor is hot", "--workers"):
            sims.step(rows, still)
        sims.step(rows[:3], still[:3])  # others go on, should someone want to
        os.kill(pids[1], signal.SIGKILL)
        assert_gone(pids[1:], 5)
        with refused("--resume"):
            sims.step(rows[:3], still[:3])
        put_at(sims, 0, 600.0)
        with refused("--resume"):  # the other one, in the middle of a step
            sims.step(rows[:1], still[:1])
    assert_gone(pids, 5)


def test_an_environment_that_fails_in_workers_is_one_line_at_the_start(refused):
    with ending(120), refused("NotInWorkers-v0", "no licence"):
        Simulators(make_env(own(NotInWorkers), {}), 2, 1)


def test_an_id_registered_in_the_parent_alone_is_played_by_workers_with_its_arguments():
    env_id = own("gymnasium.envs.mujoco.hopper_v5:HopperEnv", kwargs={"healthy_reward": 2.0}, max_episode_steps=30)
    kwargs = {"exclude_current_positions_from_observation": False}
    with ending(120), Simulators(make_env(env_id, kwargs), 2, 1) as sims:
        assert sims.limit == 30 and sims.observations.shape[1] == 12
        rewards = assert_plays_exactly(env_id, kwargs, sims)
    assert min(rewards[:3]) > 1.0  # of which 2 are for health


def test_an_entry_point_that_does_not_pickle_is_one_line_and_plays_without_workers(refused):
    before = below(os.getpid())

    class Local(HalfCheetahEnv):
        pass

    def local(**kwargs):
        return HalfCheetahEnv(**kwargs)

    for entry_point in (lambda **kwargs: HalfCheetahEnv(**kwargs), local, Local):
        env_id = own(entry_point)
        with ending(30), refused(env_id, "--workers"):
            Simulators(make_env(env_id, {}), 2, 2)
        assert_plays_exactly(env_id)
    assert not any("spawn_main" in line for pid, line in below(os.getpid()).items() if pid not in before)


PLAY = """
import numpy as np
from grpo_dt_continuous import Simulators, make_env

def main():
    with Simulators(make_env("Hopper-v5", {}), 8, 2) as sims:
        print("playing", flush=True)
        while True:
            sims.reset(np.arange(8))
            sims.step(np.arange(8), np.zeros((8, 3)))
"""


def test_a_script_that_is_killed_leaves_no_process(tmp_path):
    with script(tmp_path, "play.py", play=PLAY + "\nif __name__ == '__main__':\n    main()\n") as process:
        assert wait_for(lambda: (tmp_path / "out").read_text() == "playing\n", 120), (tmp_path / "err").read_text()
        pids = below(process.pid)
        assert len(workers_of(process.pid)) == 2
        process.kill()
        process.wait()
        assert_gone(pids, 10)  # 5 on a quiet machine


def test_a_script_without_a_main_guard_gets_a_line_that_says_so(tmp_path):
    with script(tmp_path, "play.py", play=PLAY.replace("8, 2)", "8, 1)") + "\nmain()\n") as process:
        assert process.wait(120) == 1
        line = (tmp_path / "err").read_text().splitlines()[-1]
        assert re.match("error: .*__main__.*--workers", line)


@pytest.mark.parametrize("moment", ["starting", "running"])
def test_ctrl_c_leaves_no_process_and_no_traceback(tmp_path, moment, pretrained):
    flags = (
        f"--env-id Hopper-v5 --pretrained {pretrained()} --run-dir run --workers 2 --threads 1 --no-cuda --n-sources 2"
    )
    with script(tmp_path, str(SCRIPT), *flags.split(), "--eval-episodes", "1") as process:
        assert wait_for(lambda: len(workers_of(process.pid)) == 2, 120), (tmp_path / "err").read_text()
        if moment == "running":
            assert wait_for(lambda: " 1/500" in (tmp_path / "out").read_text(), 120), (tmp_path / "err").read_text()
        assert wait_for(lambda: not ignores_ctrl_c(process.pid), 20)  # it does while it starts its workers
        pids = below(process.pid)
        assert all(map(ignores_ctrl_c, workers_of(process.pid)))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 1
        assert_gone(pids, 10)
        assert re.fullmatch(r"[^\n]*--resume[^\n]*\n", (tmp_path / "err").read_text())


# ---- Environments of others ------------------------------------------------------------------------------------------


class Careless(HalfCheetahEnv):
    """Hands out its own buffer and writes into it; integers at reset; rewards (1,) in float32; flags of numpy; bounds
    in double precision, one action that has but one value."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.buffer, self.seen = np.zeros(17), []
        low, high = np.array([-1.0, -0.5, 0.25, -1.0, 0.0, -1.0]), np.array([1.0, 1.0, 0.25, 1.0, 1.0, 1.0])
        self.action_space = gym.spaces.Box(low, high, dtype=np.float64)

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        self.buffer[:] = observation
        return (100.0 * observation).astype(int), info

    def step(self, action):
        self.seen.append(action)
        observation, reward, *rest = super().step(action)
        self.buffer[:] = observation
        return self.buffer, np.array([reward], np.float32), np.bool_(False), *rest[1:]


class Single(Careless):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (6,), np.float32)


@pytest.mark.parametrize("task", [Careless, Single], ids=lambda task: task.__name__)
def test_a_careless_task_is_played_exactly_with_actions_in_the_type_of_its_box(task):
    env_id = own(task)
    sims = Simulators(make_env(env_id, {}), 2, 0)
    assert_plays_exactly(env_id, sims=sims)
    for env in (sims.main.env, sims.local.env):
        seen, space = np.stack(env.unwrapped.seen), env.action_space
        assert {action.dtype for action in env.unwrapped.seen} == {space.dtype}
        assert (seen >= space.low).all() and (seen <= space.high).all()
    if task is Careless:
        assert (seen[:, 2] == 0.25).all() and len(np.unique(seen[:, 0])) > 20
