"""Tasks, D4RL's rules on top of them, what make_env refuses, and environments side by side: against the simulator and
gymnasium. All scripts have the same text of these; here it is that of ppo_dt_continuous.py."""

import functools
import math
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import grpo_dt_continuous
import ppo_dt_continuous as script
from ppo_dt_continuous import Environments, make_env, scale_action
from pretrain_dt import UMAZE

TASKS = [  # environment, observations, actions, time limit: gymnasium 1.4.0, gymnasium-robotics 1.4.2, D4RL's pen
    ("Hopper-v4", 11, 3, 1000),
    ("Hopper-v5", 11, 3, 1000),
    ("Walker2d-v4", 17, 6, 1000),
    ("Walker2d-v5", 17, 6, 1000),
    ("Ant-v4", 27, 8, 1000),
    ("Ant-v5", 105, 8, 1000),
    ("HalfCheetah-v4", 17, 6, 1000),
    ("HalfCheetah-v5", 17, 6, 1000),
    ("AdroitHandDoor-v1", 39, 28, 200),
    ("AdroitHandHammer-v1", 46, 26, 200),
    ("AdroitHandPen-v1", 45, 24, 100),
    ("AdroitHandRelocate-v1", 39, 30, 200),
    ("AntMaze_UMaze-v4", 31, 8, 700),
    ("AntMaze_UMaze-v5", 109, 8, 700),
]


@functools.cache
def shared_env(env_id):
    return make_env(env_id, {"maze_map": UMAZE} if env_id.startswith("AntMaze") else {})


def distance(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b))


# ---- Dimensions, limits, and tasks that need no rule ----------------------------------------------------------------


@pytest.mark.parametrize("env_id, obs_dim, act_dim, limit", TASKS)
def test_dimensions_and_time_limit_of_each_task(env_id, obs_dim, act_dim, limit):
    env = shared_env(env_id)
    first, _ = env.reset(seed=0)
    second = env.step(env.action_space.sample())[0]
    assert first.shape == second.shape == env.observation_space.shape == (obs_dim,)
    assert first.dtype == second.dtype == env.observation_space.dtype
    assert env.observation_space.contains(first) and env.observation_space.contains(second)
    assert env.action_space.shape == (act_dim,)
    assert np.all(env.action_space.low == -1.0) and np.all(env.action_space.high == 1.0)
    assert env.spec.max_episode_steps == limit


@pytest.mark.parametrize("env_id, limit", [(name, limit) for name, _, _, limit in TASKS if limit < 1000])
def test_adroit_and_antmaze_are_truncated_at_their_limit_and_not_before(env_id, limit):
    env = shared_env(env_id)
    env.reset(seed=0)
    still = np.zeros(env.action_space.shape)
    assert [env.step(still)[3] for _ in range(limit)] == [False] * (limit - 1) + [True]


@pytest.mark.parametrize("env_id", [name for name, _, _, limit in TASKS if limit == 1000] + ["Pendulum-v1"])
def test_gymnasium_tasks_are_untouched(env_id):
    ours, theirs = shared_env(env_id), gym.make(env_id)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    for _ in range(210):
        action = rng.uniform(ours.action_space.low, ours.action_space.high).astype(np.float32)
        ours_step, theirs_step = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(ours_step[0], theirs_step[0])
        assert ours_step[1:4] == theirs_step[1:4]
        if ours_step[2] or ours_step[3]:
            np.testing.assert_array_equal(ours.reset()[0], theirs.reset()[0])


def test_keyword_arguments_reach_the_environment():
    assert make_env("Ant-v5", {"include_cfrc_ext_in_observation": False}).observation_space.shape == (27,)


# ---- Adroit: rewards recomputed from the simulator, by D4RL's formulas ----------------------------------------------


def door_reward(data):
    angle = data.joint("door_hinge").qpos[0]
    reward = -0.1 * distance(data.site("S_grasp").xpos, data.site("S_handle").xpos)
    reward += -0.1 * (angle - 1.57) ** 2 - 1e-5 * np.sum(data.qvel**2)
    return reward + 2 * (angle > 0.2) + 8 * (angle > 1.0) + 10 * (angle > 1.35)


def hammer_reward(data):
    hammer, head, nail = data.body("Object").xpos, data.site("tool").xpos, data.site("S_target").xpos
    to_goal = distance(nail, data.site("nail_goal").xpos)
    reward = -0.1 * distance(data.site("S_grasp").xpos, hammer) - distance(head, nail) - 10 * to_goal
    reward -= 1e-2 * np.linalg.norm(data.qvel)
    return reward + 2 * (hammer[2] > 0.04 and head[2] > 0.04) + 25 * (to_goal < 0.02) + 75 * (to_goal < 0.01)


def relocate_reward(data):
    ball, palm, target = data.body("Object").xpos, data.site("S_grasp").xpos, data.site("target").xpos
    reward = -0.1 * distance(palm, ball)
    if ball[2] > 0.04:
        reward += 1 - 0.5 * distance(palm, target) - 0.5 * distance(ball, target)
    return reward + 10 * (distance(ball, target) < 0.1) + 20 * (distance(ball, target) < 0.05)


def pen_reward(data):
    pen = data.body("Object").xpos
    ours = data.site("object_top").xpos - data.site("object_bottom").xpos
    wanted = data.site("target_top").xpos - data.site("target_bottom").xpos
    off, similarity = distance(pen, data.site("eps_ball").xpos), ours @ wanted / np.linalg.norm(ours) ** 2
    reward = -off + similarity - 5 * (pen[2] < 0.075)
    return reward + 10 * (off < 0.075 and similarity > 0.9) + 50 * (off < 0.075 and similarity > 0.95)


# Moves of the simulator towards the bonuses, which random actions never reach.
def open_door(sim, rng):
    sim.data.joint("door_hinge").qpos[:] = rng.uniform(0.1, 1.5)


def lift_hammer_and_drive_nail(sim, rng):
    sim.data.joint("OBJTz").qpos[:] = rng.uniform(0.0, 0.3)
    sim.data.joint("nail_dir").qpos[:] = rng.uniform(0.0, 0.09)


def bring_ball_to_target(sim, rng):
    gap = sim.data.site("target").xpos - sim.data.body("Object").xpos + rng.uniform(-0.08, 0.08, 3)
    for axis, name in enumerate(("OBJTx", "OBJTy", "OBJTz")):
        sim.data.joint(name).qpos[:] += gap[axis]


def turn_target_to_pen(sim, rng):
    sim.model.body("target").quat[:] = sim.data.body("Object").xquat + rng.uniform(-0.2, 0.2, 4)


@pytest.mark.parametrize(
    "task, formula, move, highest",
    [
        ("Door", door_reward, open_door, 19),
        ("Hammer", hammer_reward, lift_hammer_and_drive_nail, 99),
        ("Relocate", relocate_reward, bring_ball_to_target, 29),
        ("Pen", pen_reward, turn_target_to_pen, 60),
    ],
)
def test_adroit_reward_is_d4rls_formula_of_the_simulators_state(task, formula, move, highest):
    env, rng, rewards, expected = shared_env(f"AdroitHand{task}-v1"), np.random.default_rng(0), [], []
    for step in range(400):
        if step % 100 == 0:
            env.reset(seed=step)
        if step % 5 == 4 and step % 100 < 50:
            move(env.unwrapped, rng)
        _, reward, *_ = env.step(rng.uniform(-1.0, 1.0, env.action_space.shape))
        rewards.append(reward)
        expected.append(formula(env.unwrapped.data))
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-9)
    assert isinstance(rewards[0], float)
    assert max(rewards) > highest and min(rewards) < 0  # the moves did reach all bonuses


def test_pen_ends_exactly_when_it_has_fallen_below_75_mm():
    env, rng, steps = shared_env("AdroitHandPen-v1"), np.random.default_rng(0), []
    for episode in range(10):
        observation, _ = env.reset(seed=episode)
        for step in range(100):
            observation, _, terminated, truncated, _ = env.step(rng.uniform(-1.0, 1.0, 24))
            height = env.unwrapped.data.body("Object").xpos[2]
            assert observation[26] == height
            assert type(terminated) is bool and terminated == (height < 0.075)
            if terminated or truncated:
                steps.append(step + 1)
                break
    assert len(steps) == 10 and 1 < min(steps) < 100  # some fell, none at once


@pytest.mark.parametrize("task", ["Door", "Hammer", "Relocate"])
def test_door_hammer_and_relocate_never_terminate(task):
    env, rng = shared_env(f"AdroitHand{task}-v1"), np.random.default_rng(0)
    env.reset(seed=0)
    assert not any(env.step(rng.uniform(-1.0, 1.0, env.action_space.shape))[2] for _ in range(200))


class Fixed(gym.Env):
    """Every step gives the same."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (46,)), gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, env_id, observation, reward, terminated=False):
        self.spec, self.outcome = SimpleNamespace(id=env_id), (observation, reward, terminated, False, {})

    def step(self, action):
        return self.outcome


def ruled(*outcome):
    """Reward and flag of a step under D4RL's rules."""
    return script.D4RLRules(Fixed(*outcome)).step(np.zeros(1))[1:3]


@pytest.mark.parametrize(
    "task, taken_off",  # twice 0.1 times the distance, of an observation that counts up in squares
    [
        ("AdroitHandDoor", 0.2 * np.sqrt(35.0**4 + 36.0**4 + 37.0**4)),  # entries 35 to 37 are palm - handle
        ("AdroitHandHammer", 0.2 * np.sqrt(207.0**2 + 213.0**2 + 219.0**2)),  # 36^2 - 33^2, 37^2 - 34^2, 38^2 - 35^2
        ("AdroitHandRelocate", 0.2 * np.sqrt(30.0**4 + 31.0**4 + 32.0**4)),
        ("AdroitHandPen", 0.0),
        ("AdroitHandDoorSparse", 0.0),
        ("Hopper", 0.0),
    ],
)
def test_door_hammer_and_relocate_of_version_1_take_twice_the_distance_off(task, taken_off):
    observation = np.arange(46.0) ** 2
    assert ruled(f"{task}-v1", observation, 3.0) == (pytest.approx(3.0 - taken_off, rel=1e-12), False)
    assert ruled(f"{task}-v1", observation, 3.0, True)[1] is True
    for other in (f"{task}-v2", f"{task}-v0", f"Own/{task}-v11"):
        assert ruled(other, observation, 3.0) == (3.0, False)


def test_the_pen_of_version_1_ends_when_it_has_fallen_below_75_mm():
    observation = np.full(45, 0.01)
    for height, fallen in ((0.0751, False), (0.075, False), (0.0749, True)):
        observation[26] = height
        assert ruled("AdroitHandPen-v1", observation, 3.0) == (3.0, fallen)
        assert ruled("AdroitHandPen-v1", observation, 3.0, True) == (3.0, True)
        for other in ("AdroitHandPen-v2", "AdroitHandDoor-v1", "Hopper-v1"):
            assert ruled(other, observation, 3.0)[1] is False


# ---- AntMaze --------------------------------------------------------------------------------------------------------


def test_antmaze_starts_and_goals_lie_in_the_two_fixed_cells_of_umaze():
    env, starts, goals = shared_env("AntMaze_UMaze-v4"), [], []
    for seed in range(40):
        observation, _ = env.reset(seed=seed)
        starts.append(observation[:2])
        goals.append(observation[-2:])
    for points, cell in ((starts, (-4.0, 4.0)), (goals, (-4.0, -4.0))):
        offsets = np.array(points) - cell
        assert np.abs(offsets).max() <= 1.0  # a quarter of the 4 m cell to each side
        assert np.all(offsets.max(axis=0) > 0.5) and np.all(offsets.min(axis=0) < -0.5)  # and really spread there


def test_antmaze_observation_is_position_and_velocity_then_goal():
    env, rng = shared_env("AntMaze_UMaze-v4"), np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    for _ in range(20):
        sim = env.unwrapped.ant_env.data
        np.testing.assert_array_equal(observation[:29], np.concatenate([sim.qpos, sim.qvel]))
        np.testing.assert_array_equal(observation[29:], env.unwrapped.goal)
        observation = env.step(rng.uniform(-1.0, 1.0, 8))[0]


@pytest.mark.parametrize("start, inside", [(0.1, True), (1.0, False)])
def test_antmaze_pays_1_and_ends_at_the_goal_only(start, inside):
    env = shared_env("AntMaze_UMaze-v4")
    env.reset(seed=0)
    _, reward, terminated, _, _ = env.step(np.zeros(8))
    assert (reward, terminated) == (0.0, False)
    ant = env.unwrapped.ant_env
    qpos = ant.data.qpos.copy()
    qpos[:2] = env.unwrapped.goal + np.array([start, 0.0])
    ant.set_state(qpos, np.zeros(14))
    observation, reward, terminated, truncated, _ = env.step(np.zeros(8))
    assert (distance(observation[:2], observation[-2:]) < 0.45) == inside
    assert (reward, terminated, truncated) == (float(inside), inside, False)


def test_antmaze_pays_nothing_and_goes_on_wherever_the_goal_is_not():
    env, rng = shared_env("AntMaze_UMaze-v4"), np.random.default_rng(0)
    env.reset(seed=1)
    outcomes = [env.step(rng.uniform(-1.0, 1.0, 8))[1:3] for _ in range(200)]
    assert set(outcomes) == {(0.0, False)}


# ---- Scores and names ------------------------------------------------------------------------------------------------

REFERENCES = [  # D4RL's random and expert returns
    ("Hopper-v5", -20.272305, 3234.3),
    ("Walker2d-v4", 1.629008, 4592.3),
    ("Ant-v5", -325.6, 3879.7),
    ("HalfCheetah-v5", -280.178953, 12135.0),
    ("AdroitHandPen-v1", 96.262799, 3076.8331017826877),
    ("AdroitHandHammer-v1", -274.856578, 12794.134825156867),
    ("AdroitHandDoor-v1", -56.512833, 2880.5693087298737),
    ("AdroitHandRelocate-v1", -6.425911, 4233.877797728884),
    ("AntMaze_UMaze-v4", 0.0, 1.0),
]


@pytest.mark.parametrize("env_id, random, expert", REFERENCES)
def test_score_is_0_at_the_random_and_100_at_the_expert_return(env_id, random, expert):
    assert script.normalized_score(env_id, random) == 0.0
    assert script.normalized_score(env_id, expert) == pytest.approx(100.0)
    assert script.normalized_score(env_id, (random + expert) / 2) == pytest.approx(50.0)


@pytest.mark.parametrize(
    "env_id, returns, score",
    [("AdroitHandDoor-v1", 794.1, 28.96), ("Hopper-v5", 1384, 43.1), ("Ant-v5", 2144, 58.7), ("Hopper-v5", 383, 12.4)],
)
def test_score_of_known_datasets(env_id, returns, score):
    assert script.normalized_score(env_id, returns) == pytest.approx(score, abs=0.051)


def test_score_without_reference_returns_is_nan():
    assert math.isnan(script.normalized_score("Pendulum-v1", 0.0))


@pytest.mark.parametrize(
    "env_id, task",
    [
        ("Hopper-v5", "Hopper"),
        ("Walker2d-v4", "Walker2d"),
        ("AdroitHandDoor-v1", "AdroitHandDoor"),
        ("AntMaze_UMaze-v4", "AntMaze"),
        ("AntMaze_Large_Diverse_GR-v5", "AntMaze"),
        ("Ant-v10", "Ant"),
        ("some/Name-v0", "Name"),
        ("MountainCar-variant-v0", "MountainCar-variant"),
    ],
)
def test_task_is_the_name_without_namespace_version_and_maze(env_id, task):
    assert script.task_of(env_id) == task


# ---- What make_env refuses ------------------------------------------------------------------------------------------


class Spaces(gym.Env):
    """An environment that has nothing but spaces."""

    def __init__(self, observations, actions):
        self.observation_space, self.action_space = observations, actions


def box(*shape, bound=np.inf):
    return gym.spaces.Box(-bound, bound, shape, np.float32)


GOALS = dict(achieved_goal=box(2), observation=box(4), desired_goal=box(2))
UNSUITED = {  # name: observations, actions
    "Images": (box(8, 8, 3), box(2, bound=1.0)),
    "Tiles": (gym.spaces.Discrete(5), box(2, bound=1.0)),
    "Buttons": (box(3), gym.spaces.Discrete(2)),
    "Unbounded": (box(3), box(2)),
    "HalfBounded": (box(3), gym.spaces.Box(0.0, np.inf, (2,), np.float32)),
    "LargestBounds": (box(3), box(2, bound=np.finfo(np.float32).max)),
    "WholeNumbers": (box(3), gym.spaces.Box(0, 8, (2,), np.int64)),
    "ActionGrid": (box(3), box(2, 2, bound=1.0)),
    "OtherKeys": (gym.spaces.Dict(camera=box(2), joints=box(3)), box(2, bound=1.0)),
    "GoalImages": (gym.spaces.Dict(GOALS | {"observation": box(4, 4)}), box(2, bound=1.0)),
}


@pytest.fixture
def registered():
    """registered(entry_point): the id under which it is registered until the test ends."""
    names = []

    def register(entry_point, **kwargs):
        names.append(f"Own{len(names)}-v0")
        gym.register(names[-1], entry_point, **dict(max_episode_steps=20) | kwargs)
        return names[-1]

    yield register
    for name in names:
        del gym.registry[name]


@pytest.mark.parametrize("name", UNSUITED)
def test_unsuited_spaces_are_refused(name, registered, refused):
    env_id = registered(lambda **kwargs: Spaces(*UNSUITED[name]))
    with refused(env_id):
        make_env(env_id, {})


def test_goal_keys_are_laid_out_in_their_order_and_copied(registered):
    class Goals(Point):
        observation_space = gym.spaces.Dict(GOALS)

        def reset(self, **kwargs):
            self.keys = {key: np.full(space.shape, i) for i, (key, space) in enumerate(GOALS.items())}
            return self.keys, {}

        def step(self, action):
            return self.keys, 0.0, False, False, {}

    env = make_env(registered(Goals), {})
    assert env.observation_space.shape == (8,)
    observation = env.reset(seed=0)[0]
    assert observation.tolist() == [0, 0, 1, 1, 1, 1, 2, 2] and observation.dtype == np.float64


@pytest.mark.parametrize("env_id", ["Nope-v5", "Hopper-v99", "Hopper-v3", "no_such_package:Env-v0", "ns/Nope-v0", ""])
def test_what_does_not_exist_is_refused(env_id, refused):
    with refused(f"environment {env_id}"):
        make_env(env_id, {})


def test_an_environment_whose_making_fails_is_one_line(registered, refused):
    def broken(**kwargs):
        raise AssertionError("joint 7 has\nthe wrong shape")

    env_id = registered(broken)
    with refused(env_id, "joint 7 has the wrong shape"):
        make_env(env_id, {})


def test_an_environment_without_a_time_limit_is_refused(registered, refused):
    env_id = registered(Point, max_episode_steps=None)
    with refused(env_id, "max_episode_steps"):
        make_env(env_id, {})


def test_render_mode_is_passed_for_a_film_alone(registered):
    class WithoutRendering(Point):
        def __init__(self, speed=0.1):
            self.speed = speed

    assert make_env(registered(WithoutRendering), {"speed": 0.2}).unwrapped.speed == 0.2
    kwargs = {}
    assert make_env("Hopper-v5", kwargs).render_mode is None
    assert make_env("Hopper-v5", kwargs, "rgb_array").render_mode == "rgb_array"
    assert kwargs == {}


class WithoutSeed(gym.Env):
    """gym's API before 0.26: observations alone at reset, four values a step."""

    observation_space, action_space = box(3), box(2, bound=1.0)

    def reset(self):
        return np.zeros(3)

    def step(self, action):
        return np.zeros(3), 0.0, False, {}


class ObservationAlone(WithoutSeed):
    def reset(self, seed=None, options=None):
        return np.zeros(3)


class FourValues(WithoutSeed):
    def reset(self, seed=None, options=None):
        return np.zeros(3), {}


class Columns(FourValues):
    """Of the API of today, with observations that are not of their space."""

    def step(self, action):
        return np.zeros((3, 1)), 0.0, False, False, {}


@pytest.mark.parametrize("task", [WithoutSeed, ObservationAlone, FourValues, Columns], ids=lambda task: task.__name__)
def test_an_environment_that_cannot_be_played_is_one_line(task, registered, refused):
    env_id = registered(task)
    with refused(env_id, "(3,)" if task is Columns else "docs/environments.md"):
        make_env(env_id, {})


def test_the_module_of_ones_own_task_may_lie_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    entry_point = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
    register = f"gymnasium.register('Found-v0', '{entry_point}', max_episode_steps=7)"
    (tmp_path / "module_that_lies_here.py").write_text(f"import gymnasium\n{register}\n")
    with Environments(make_env("module_that_lies_here:Found-v0", {"g": 5.0}), 2) as sims:
        assert sims.limit == 7 and [env.unwrapped.g for env in sims.envs] == [5.0, 5.0]
    del gym.registry["Found-v0"]


@pytest.mark.parametrize("text", ["healthy_reward=2", "[1]", "{'healthy_reward': 2}", "2", "null"])
def test_arguments_that_are_no_json_object_are_refused(text, refused):
    with refused("--env-kwargs", text):
        script.env_kwargs_of(script.Args(env_kwargs=text))


def test_a_checkpoints_arguments_are_kept_and_others_refused(refused):
    known = {"healthy_reward": 2.0, "maze_map": [[1, "r"]]}
    for text in (None, "{}", '{"healthy_reward": 2}', '{"maze_map": [[1, "r"]]}'):
        assert script.env_kwargs_of(script.Args(env_kwargs=text), known) == known
    for text in ('{"healthy_reward": 3.0}', '{"frame_skip": 4}'):
        with refused("--env-kwargs", '"healthy_reward": 2.0'):
            script.env_kwargs_of(script.Args(env_kwargs=text), known)


def test_a_time_limit_among_the_arguments_is_that_of_all_environments():
    with Environments(make_env("Pendulum-v1", {"max_episode_steps": 3}), 2) as sims:
        sims.reset(np.array([1, 2]))
        ends = [sims.step(np.arange(2), np.zeros((2, 1)))[3].tolist() for _ in range(3)]
    assert (sims.limit, ends) == (3, [[False, False]] * 2 + [[True, True]])


# ---- Side by side ---------------------------------------------------------------------------------------------------


class Point(gym.Env):
    """A point in the plane that an action moves. Bounds are uneven."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-1.0, 0.0]), np.array([3.0, 10.0]), dtype=np.float64)
    speed = 0.1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1.0, 1.0, 2)
        self.actions = []
        return self.place.copy(), {}

    def step(self, action):
        self.actions.append(action)
        self.place += self.speed * action
        return self.place.copy(), -np.abs(self.place).sum(), bool(self.place[1] > 4.0), False, {}


class Careless(Point):
    """Integers at reset; hands out its own buffer and writes into it; rewards (1,) in float32; flags of numpy."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.place = np.round(10.0 * self.place)
        return self.place.astype(int), {}

    def step(self, action):
        _, reward, terminated, *rest = super().step(action)
        return self.place, np.array([reward], np.float32), np.bool_(terminated), *rest


class Breaks(Point):
    """Gives out `value` as the reward or in the observation of its third step."""

    def __init__(self, value, where, **kwargs):
        self.value, self.where = value, where

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if len(self.actions) == 3 and self.where == "reward":
            reward = self.value
        elif len(self.actions) == 3:
            observation[1] = self.value
        return observation, reward, *rest


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Pendulum-v1", "AdroitHandPen-v1"])
def test_environments_are_each_that_of_gymnasium_over_100_steps(env_id):
    alone, rng, seeds = [make_env(env_id, {}) for _ in range(3)], np.random.default_rng(0), np.array([3, 8, 5])
    given, compared = make_env(env_id, {}), 0
    with Environments(given, 3) as sims:
        assert sims.env is given and sims.limit == given.spec.max_episode_steps
        for first in range(0, 100, 25):  # a reset leaves nothing of the episode before
            expected = [env.reset(seed=int(seed) + first)[0] for env, seed in zip(alone, seeds)]
            np.testing.assert_array_equal(sims.reset(seeds + first), expected)
            rows = np.arange(3)
            for _ in range(25):
                actions = rng.uniform(-1.0, 1.0, (3, *given.action_space.shape)).astype(np.float32)
                scaled = [scale_action(action, given.action_space) for action in actions]
                rows = rng.permutation(rows)
                outcomes = list(zip(*(alone[i].step(scaled[i])[:4] for i in rows)))
                for ours, theirs in zip(sims.step(rows, actions[rows]), outcomes):
                    np.testing.assert_array_equal(ours, theirs)
                compared += len(rows)
                rows = rows[~np.array(outcomes[2])]
                if not len(rows):
                    break
    assert compared > 150


def test_rows_that_are_not_stepped_stay_where_they_are(registered):
    with Environments(make_env(registered(Point), {}), 3) as sims:
        first = sims.reset(np.array([1, 2, 3]))
        kept = first.copy()
        observations, rewards, terminated, truncated = sims.step(np.array([2, 0]), np.array([[0.0, -1.0], [1.0, -0.5]]))
        np.testing.assert_allclose(observations, kept[[2, 0]] + [[0.1, 0.0], [0.3, 0.25]], rtol=1e-12)
        np.testing.assert_allclose(rewards, -np.abs(observations).sum(1), rtol=1e-12)
        assert [field.dtype for field in (rewards, terminated, truncated)] == [np.float64, bool, bool]
        np.testing.assert_allclose(sims.step(np.array([1]), np.array([[-0.5, -1.0]]))[0], kept[[1]], rtol=1e-12)
        np.testing.assert_array_equal(first, kept)  # a copy
        np.testing.assert_array_equal(sims.reset(np.array([2])), kept[[1]])  # fewer than there are


def test_episodes_are_truncated_at_the_limit_and_terminated_by_the_task(registered):
    with Environments(make_env(registered(Point, max_episode_steps=6), {}), 2) as sims:
        sims.reset(np.array([1, 2]))
        actions = np.array([[-0.5, -1.0], [-0.5, 1.0]])  # one stays, the other rises by 1 a step
        ends = [[field.tolist() for field in sims.step(np.arange(2), actions)[2:]] for _ in range(6)]
    assert [truncated for _, truncated in ends] == [[False, False]] * 5 + [[True, True]]
    risen = [terminated[1] for terminated, _ in ends]
    assert not risen[0] and risen[-1] and not any(terminated[0] for terminated, _ in ends)


def test_a_careless_task_is_played_by_copies_in_double_precision_and_actions_in_the_type_of_its_box(registered):
    with Environments(make_env(registered(Careless), {}), 2) as sims:
        seen = [sims.reset(np.array([1, 2]))]
        kept = [seen[0].copy()]
        for action in (0.3, -0.2, 0.4):
            observations, rewards, *_ = sims.step(np.arange(2), np.full((2, 2), action, np.float32))
            np.testing.assert_allclose(rewards, -np.abs(observations).sum(1), rtol=1e-6)
            seen.append(observations)
            kept.append(observations.copy())
        np.testing.assert_array_equal(seen, kept)
        assert {each.dtype for each in seen} == {np.dtype(np.float64)}
        assert (seen[0] == seen[0].round()).all() and len(np.unique(np.vstack(seen), axis=0)) == 8
        moved = 0.1 * scale_action(np.full(2, 0.3), sims.space)
        np.testing.assert_allclose(seen[1] - seen[0], [moved, moved], rtol=1e-6)
        assert {action.dtype for env in sims.envs for action in env.unwrapped.actions} == {np.dtype(np.float64)}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["reward", "observation"])
def test_what_is_not_finite_ends_in_a_line(value, where, registered, refused):
    env = make_env(registered(Breaks), {"value": value, "where": where})
    with Environments(env, 2) as sims:
        sims.reset(np.array([1, 2]))
        for _ in range(2):
            sims.step(np.arange(2), np.zeros((2, 2)))
        with refused(env.spec.id, where, "--seed"):
            sims.step(np.arange(2), np.zeros((2, 2)))


def test_all_environments_have_the_arguments_of_the_first_and_are_closed_at_the_end(registered):
    closed = []

    class Closes(Point):
        def __init__(self, speed, **kwargs):
            self.speed = speed

        def close(self):
            closed.append(self.speed)

    with Environments(make_env(registered(Closes), {"speed": 0.2}), 3) as sims:
        assert [env.unwrapped.speed for env in sims.envs] == [0.2] * 3
    assert closed == [0.2] * 3


def test_an_evaluation_scores_the_same_as_in_simulators():
    torch.manual_seed(0)
    model, scores = script.DecisionTransformer(11, 3, 16, 2, 2).eval(), []
    for players in (Environments, grpo_dt_continuous.Simulators):
        args = SimpleNamespace(env_id="Hopper-v5", seed=3, eval_episodes=3, g_eval=20.0, c_online=2)
        with players(make_env("Hopper-v5", {}), 3) as sims:
            scores.append(script.evaluate(model, sims, args, 7))
    for name in ("return_mean", "return_std", "length_mean", "normalized_score"):
        assert scores[0][f"eval/{name}"] == scores[1][f"eval/{name}"]
    assert scores[0]["eval/return_std"] > 0


def test_actions_are_scaled_from_low_to_high_in_the_type_of_the_box():
    low, high = np.array([-2.0, 0.0, 3.0], np.float32), np.array([2.0, 10.0, 3.0], np.float32)
    actions = np.array([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [0.0, 0.5, 0.3], [0.25, -0.5, 1.0]], np.float32)
    expected = [[-2.0, 0.0, 3.0], [2.0, 10.0, 3.0], [0.0, 7.5, 3.0], [0.5, 2.5, 3.0]]
    for dtype in (np.float32, np.float64):
        scaled = scale_action(actions, gym.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype))
        assert scaled.dtype == dtype
        np.testing.assert_array_equal(scaled, expected)
