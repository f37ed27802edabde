"""Tasks, D4RL's rules on top of them, and evaluation: against the simulator, gymnasium and scripted episodes."""

import functools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import grpo_dt_continuous
import pretrain_dt
from pretrain_dt import UMAZE, DecisionTransformer, History, SquashedGaussian, d4rl_rules, evaluate, make_env

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


@pytest.fixture(params=[pretrain_dt, grpo_dt_continuous], ids=lambda script: script.__name__)
def script(request):
    """The tasks of pretrain_dt.py, which the other scripts share word for word, and those of grpo_dt_continuous.py."""
    return request.param


@functools.cache
def shared_env(script, env_id):
    return script.make_env(env_id, {"maze_map": UMAZE} if env_id.startswith("AntMaze") else {})


def distance(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b))


# ---------------------------------------------------------------------------------------------------------------------
# Dimensions, limits, and tasks that need no rule
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id, obs_dim, act_dim, limit", TASKS)
def test_dimensions_and_time_limit_of_each_task(script, env_id, obs_dim, act_dim, limit):
    env = shared_env(script, env_id)
    first, _ = env.reset(seed=0)
    second = env.step(env.action_space.sample())[0]
    assert first.shape == second.shape == env.observation_space.shape == (obs_dim,)
    assert first.dtype == second.dtype == env.observation_space.dtype
    assert env.observation_space.contains(first) and env.observation_space.contains(second)
    assert env.action_space.shape == (act_dim,)
    assert np.all(env.action_space.low == -1.0) and np.all(env.action_space.high == 1.0)
    assert env.spec.max_episode_steps == limit


@pytest.mark.parametrize("env_id, limit", [(name, limit) for name, _, _, limit in TASKS if limit < 1000])
def test_adroit_and_antmaze_are_truncated_at_their_limit_and_not_before(script, env_id, limit):
    env = shared_env(script, env_id)
    env.reset(seed=0)
    still = np.zeros(env.action_space.shape)
    assert [env.step(still)[3] for _ in range(limit)] == [False] * (limit - 1) + [True]


@pytest.mark.parametrize("env_id", [name for name, _, _, limit in TASKS if limit == 1000] + ["Pendulum-v1"])
def test_gymnasium_tasks_are_untouched(script, env_id):
    ours, theirs = shared_env(script, env_id), gym.make(env_id)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    for _ in range(210):
        action = rng.uniform(ours.action_space.low, ours.action_space.high).astype(np.float32)
        ours_step, theirs_step = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(ours_step[0], theirs_step[0])
        assert ours_step[1:4] == theirs_step[1:4]
        if ours_step[2] or ours_step[3]:
            np.testing.assert_array_equal(ours.reset()[0], theirs.reset()[0])


def test_keyword_arguments_reach_the_environment(script):
    assert script.make_env("Ant-v5", {"include_cfrc_ext_in_observation": False}).observation_space.shape == (27,)


# ---------------------------------------------------------------------------------------------------------------------
# Adroit: rewards recomputed from the simulator, by D4RL's formulas
# ---------------------------------------------------------------------------------------------------------------------


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
def test_adroit_reward_is_d4rls_formula_of_the_simulators_state(script, task, formula, move, highest):
    env, rng, rewards, expected = shared_env(script, f"AdroitHand{task}-v1"), np.random.default_rng(0), [], []
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


def test_pen_ends_exactly_when_it_has_fallen_below_75_mm(script):
    env, rng, steps = shared_env(script, "AdroitHandPen-v1"), np.random.default_rng(0), []
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


@pytest.mark.parametrize("height, fallen", [(0.0751, False), (0.075, False), (0.0749, True)])
def test_pen_threshold_is_strict_and_holds_for_no_other_task(height, fallen):
    observation = np.full(45, 1.0)
    observation[26] = height
    assert d4rl_rules("AdroitHandPen", observation, 3.0, False) == (3.0, fallen)
    assert d4rl_rules("AdroitHandPen", observation, 3.0, True) == (3.0, True)
    for task in ("AdroitHandDoor", "AdroitHandHammer", "AdroitHandRelocate", "Hopper"):
        assert d4rl_rules(task, observation, 3.0, False)[1] is False


@pytest.mark.parametrize(
    "task, taken_off",  # 0.2 times the distance, of observations that count up from 0 and down from 50
    [
        ("AdroitHandDoor", (0.2 * np.sqrt(35**2 + 36**2 + 37**2), 0.2 * np.sqrt(15**2 + 14**2 + 13**2))),
        ("AdroitHandHammer", (0.2 * np.sqrt(27), 0.2 * np.sqrt(27))),  # hand and object are 3 apart on each axis
        ("AdroitHandRelocate", (0.2 * np.sqrt(30**2 + 31**2 + 32**2), 0.2 * np.sqrt(20**2 + 19**2 + 18**2))),
        ("AdroitHandPen", (0.0, 0.0)),
        ("Hopper", (0.0, 0.0)),
    ],
)
def test_rules_of_several_steps_at_once_take_twice_the_distance_off_each(task, taken_off):
    observations = np.stack([np.arange(46.0), 50.0 - np.arange(46.0)])
    observations[1, 26] = 0.01  # a height, in the pen's observation alone
    rewards, terminated = d4rl_rules(task, observations, np.array([1.0, -2.0]), np.array([False, False]))
    np.testing.assert_allclose(rewards, np.array([1.0, -2.0]) - taken_off, rtol=1e-12)
    assert terminated.tolist() == [False, task == "AdroitHandPen"]


@pytest.mark.parametrize("task", ["Door", "Hammer", "Relocate"])
def test_door_hammer_and_relocate_never_terminate(script, task):
    env, rng = shared_env(script, f"AdroitHand{task}-v1"), np.random.default_rng(0)
    env.reset(seed=0)
    assert not any(env.step(rng.uniform(-1.0, 1.0, env.action_space.shape))[2] for _ in range(200))


# ---------------------------------------------------------------------------------------------------------------------
# AntMaze
# ---------------------------------------------------------------------------------------------------------------------


def test_antmaze_starts_and_goals_lie_in_the_two_fixed_cells_of_umaze(script):
    env, starts, goals = shared_env(script, "AntMaze_UMaze-v4"), [], []
    for seed in range(40):
        observation, _ = env.reset(seed=seed)
        starts.append(observation[:2])
        goals.append(observation[-2:])
    for points, cell in ((starts, (-4.0, 4.0)), (goals, (-4.0, -4.0))):
        offsets = np.array(points) - cell
        assert np.abs(offsets).max() <= 1.0  # a quarter of the 4 m cell to each side
        assert np.all(offsets.max(axis=0) > 0.5) and np.all(offsets.min(axis=0) < -0.5)  # and really spread there


def test_antmaze_observation_is_position_and_velocity_then_goal(script):
    env, rng = shared_env(script, "AntMaze_UMaze-v4"), np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    for _ in range(20):
        sim = env.unwrapped.ant_env.data
        np.testing.assert_array_equal(observation[:29], np.concatenate([sim.qpos, sim.qvel]))
        np.testing.assert_array_equal(observation[29:], env.unwrapped.goal)
        observation = env.step(rng.uniform(-1.0, 1.0, 8))[0]


@pytest.mark.parametrize("start, inside", [(0.1, True), (1.0, False)])
def test_antmaze_pays_1_and_ends_at_the_goal_only(script, start, inside):
    env = shared_env(script, "AntMaze_UMaze-v4")
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


def test_antmaze_pays_nothing_and_goes_on_wherever_the_goal_is_not(script):
    env, rng = shared_env(script, "AntMaze_UMaze-v4"), np.random.default_rng(0)
    env.reset(seed=1)
    outcomes = [env.step(rng.uniform(-1.0, 1.0, 8))[1:3] for _ in range(200)]
    assert set(outcomes) == {(0.0, False)}


# ---------------------------------------------------------------------------------------------------------------------
# Scores, names, bounds
# ---------------------------------------------------------------------------------------------------------------------

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
def test_score_is_0_at_the_random_and_100_at_the_expert_return(script, env_id, random, expert):
    assert script.normalized_score(env_id, random) == 0.0
    assert script.normalized_score(env_id, expert) == pytest.approx(100.0)
    assert script.normalized_score(env_id, (random + expert) / 2) == pytest.approx(50.0)


@pytest.mark.parametrize(
    "env_id, returns, score",
    [("AdroitHandDoor-v1", 794.1, 28.96), ("Hopper-v5", 1384, 43.1), ("Ant-v5", 2144, 58.7), ("Hopper-v5", 383, 12.4)],
)
def test_score_of_known_datasets(script, env_id, returns, score):
    assert script.normalized_score(env_id, returns) == pytest.approx(score, abs=0.051)


def test_score_without_reference_returns_is_nan(script):
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
def test_task_is_the_name_without_namespace_version_and_maze(script, env_id, task):
    assert script.task_of(env_id) == task


@pytest.mark.parametrize("env_id, bound", [("Pendulum-v1", 2.0), ("Humanoid-v5", 0.4), ("Hopper-v5", 1.0)])
def test_actions_are_scaled_between_the_bounds_of_the_environment(env_id, bound):
    env = shared_env(pretrain_dt, env_id)
    scaled = pretrain_dt.scale_action(np.linspace(-1, 1, 5)[:, None], env)  # (5, A)
    np.testing.assert_allclose(scaled[:, 0], bound * np.linspace(-1, 1, 5), atol=1e-7)
    theirs = grpo_dt_continuous.scale_action(np.linspace(-1, 1, 5)[:, None], env.action_space)
    np.testing.assert_allclose(theirs, scaled, atol=1e-7)
    np.testing.assert_allclose(pretrain_dt.unscale_action(scaled, env)[:, 0], np.linspace(-1, 1, 5), atol=1e-6)


def test_uneven_bounds_are_scaled_from_low_to_high():
    env = gym.Env()
    env.action_space = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32))
    np.testing.assert_allclose(pretrain_dt.scale_action(np.array([-1.0, 0.5]), env), [-1.0, 7.5])
    np.testing.assert_allclose(pretrain_dt.unscale_action(np.array([3.0, 2.5]), env), [1.0, -0.5])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


class Scripted(gym.Env):
    """An episode written out: its rewards, whether it ends by termination or truncation, and, if told, the
    x-position after each step. Bounds are ±2."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, name, rewards, end="terminated", positions=None):
        self.name, self.rewards, self.end, self.actions, self.seed = name, rewards, end, [], None
        self.positions = positions

    def reset(self, *, seed=None, options=None):
        self.seed, self.actions = seed, []
        return np.array([self.name, 0.0]), {}

    def step(self, action):
        assert len(self.actions) < len(self.rewards), "stepped after its end"
        self.actions.append(float(action[0]))
        step = len(self.actions)
        over = step == len(self.rewards)
        reward, observation = self.rewards[step - 1], np.array([self.name, float(step)])
        info = {"x_position": self.positions[step - 1]} if self.positions else {}
        return observation, reward, over and self.end == "terminated", over and self.end == "truncated", info


class Recorder:
    """A policy that keeps what it is shown. Its action is tanh(name / 10 + step / 100)."""

    act_dim, obs_mean = 1, torch.zeros(2)

    def __init__(self, returns_shift=0.0):
        self.seen, self.returns_shift = [], returns_shift

    def act(self, observations, returns, actions, real):
        self.seen.append([t.numpy().copy() for t in (observations, returns, actions, real)])
        mean = observations[:, -1] @ torch.tensor([[0.1], [0.01]])  # (B, 1)
        return SquashedGaussian(mean, torch.zeros_like(mean)), returns[:, -1] + self.returns_shift


REWARDS = [[5.0, -3.0], [1.0, 2.0, 4.0, 8.0, 16.0], [100.0, 0.5, 0.25, 0.125], [7.0]]


def play(monkeypatch, policy, context=3, g_start=20.0):
    """Evaluation of four scripted episodes of 2, 5, 4 and 1 steps."""
    ends = ["terminated", "truncated", "terminated", "truncated"]
    envs = [Scripted(name, *script) for name, script in enumerate(zip(REWARDS, ends))]
    monkeypatch.setattr(pretrain_dt, "rollout_copy", lambda model: model)
    return envs, *evaluate(policy, envs, g_start, context, [11, 22, 33, 44])


def windows_by_hand(name, context, g_start):
    """What the policy should see at each step of episode `name`: observations, returns, actions, real."""
    g = g_start - np.cumsum([0.0, *REWARDS[name]])
    for step in range(len(REWARDS[name])):
        observations, returns, actions, real = np.zeros((context, 2)), np.zeros(context), np.zeros(context), []
        for slot, then in enumerate(range(step - context + 1, step + 1)):
            real.append(then >= 0)
            if then >= 0:
                observations[slot], returns[slot], actions[slot] = (
                    (name, then),
                    g[then],
                    np.tanh(name / 10 + then / 100),
                )
        yield observations, returns, actions[:-1, None], np.array(real)


def test_evaluation_returns_sums_and_lengths_and_steps_no_ended_environment(monkeypatch):
    envs, returns, lengths, _ = play(monkeypatch, Recorder())  # Scripted fails the test if stepped after its end
    np.testing.assert_allclose(returns, [sum(rewards) for rewards in REWARDS])
    assert lengths.tolist() == [2, 5, 4, 1]  # by termination, truncation, termination, truncation
    assert [env.seed for env in envs] == [11, 22, 33, 44]


def test_evaluation_plays_the_scaled_tanh_of_the_mean(monkeypatch):
    envs, *_ = play(monkeypatch, Recorder())
    for env in envs:
        expected = 2.0 * np.tanh(env.name / 10 + np.arange(len(env.rewards)) / 100)
        np.testing.assert_allclose(env.actions, expected, rtol=1e-5)


@pytest.mark.parametrize("context", [1, 3, 8])
def test_evaluation_shows_the_last_steps_left_padded_and_g_falls_by_each_reward_unclamped(monkeypatch, context):
    policy = Recorder()
    play(monkeypatch, policy, context)
    expected = [list(windows_by_hand(name, context, 20.0)) for name in range(4)]
    assert len(policy.seen) == 5
    for step, seen in enumerate(policy.seen):
        alive = [name for name in range(4) if step < len(REWARDS[name])]
        shown = np.resize(alive, 4)  # four at every step: those that are over are made up for by repeated ones
        for got, wanted in zip(seen, zip(*(expected[name][step] for name in shown)), strict=True):
            np.testing.assert_allclose(got, np.stack(wanted), rtol=1e-6)
    assert min(seen[1].min() for seen in policy.seen) < -80  # 20 - 100.75: below zero, unclamped


def test_the_return_that_reinformer_predicts_stays_in_the_window(monkeypatch):
    policy = Recorder(returns_shift=1000.0)
    play(monkeypatch, policy)
    last = policy.seen[-1]  # episode 1, step 4: returns given 20, 19, 17, 13, 5
    np.testing.assert_allclose(last[1], [[1017.0, 1013.0, 5.0]] * 4)  # it alone goes on: repeated up to four


def test_evaluation_from_a_seed_repeats_itself_with_a_real_network():
    torch.manual_seed(0)
    model = DecisionTransformer(11, 3, 16, 2, 2)
    envs = [make_env("Hopper-v5") for _ in range(3)]
    first, second = (evaluate(model, envs, 100.0, 4, [1, 2, 3]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(set(first[0])) == len(set(first[2])) == 3 and min(first[1]) > 1


def test_the_distance_is_the_last_x_position_and_nan_where_none_is_reported(monkeypatch):
    positions = [[1.0, 9.0, -4.0], [5.0, 6.0], None, [-0.5]]  # neither the highest, nor the first, nor a sum
    scripts = zip(([1.0] * 3, [1.0] * 2, [1.0] * 4, [1.0]), ["terminated", "truncated"] * 2, positions)
    envs = [Scripted(name, *script) for name, script in enumerate(scripts)]
    monkeypatch.setattr(pretrain_dt, "rollout_copy", lambda model: model)
    distances = evaluate(Recorder(), envs, 20.0, 2, [1, 2, 3, 4])[2]
    np.testing.assert_array_equal(distances, [-4.0, 6.0, np.nan, -0.5])


class Tape(gym.Wrapper):
    """Keeps the actions of an episode."""

    def reset(self, **kwargs):
        self.actions = []
        return self.env.reset(**kwargs)

    def step(self, action):
        self.actions.append(action.copy())
        return self.env.step(action)


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v4"])
def test_the_distance_is_that_of_gymnasiums_episode_of_the_same_actions(env_id):
    envs, theirs = [Tape(make_env(env_id)) for _ in range(3)], gym.make(env_id)
    torch.manual_seed(0)
    model = DecisionTransformer(*envs[0].observation_space.shape, *envs[0].action_space.shape, 16, 2, 2)
    _, lengths, distances = evaluate(model, envs, 100.0, 4, [5, 6, 7])
    for env, seed, length, distance in zip(envs, (5, 6, 7), lengths, distances):
        theirs.reset(seed=seed)
        *_, (_, _, terminated, truncated, info) = [theirs.step(action) for action in env.actions]
        assert (terminated or truncated) and len(env.actions) == length
        assert distance == info["x_position"] == env.unwrapped.data.qpos[0] != 0.0


def test_the_distance_is_nan_in_a_real_environment_without_a_position():
    model = DecisionTransformer(3, 1, 16, 2, 2)
    returns, lengths, distances = evaluate(model, [make_env("Pendulum-v1") for _ in range(2)], 0.0, 2, [1, 2])
    assert np.isnan(distances).all() and distances.shape == (2,)
    assert lengths.tolist() == [200, 200] and np.isfinite(returns).all()


@pytest.mark.parametrize("context", [1, 2, 3, 9])
def test_history_shows_the_last_k_steps_of_its_rows_left_padded_in_few_batch_sizes(context):
    rng, policy, batch = np.random.default_rng(0), Recorder(returns_shift=0.5), 70
    history, rows = History(batch, context, 2, 1), np.arange(batch)
    counts = [70, 70, 65, 64, 63, 33, 32, 31, 1]  # how many rows are alive at each step
    sizes = [70, 70, 70, 64, 64, 64, 32, 32, 32]  # multiples of 32, but no more than there are rollouts
    observations, returns = rng.normal(size=(len(counts), batch, 2)), 50 * rng.normal(size=(len(counts), batch))
    actions = np.zeros((len(counts), batch, 1))
    for step, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        rows = np.sort(rng.choice(rows, count, replace=False))
        dist = history.act(policy, rows, observations[step], returns[step])
        seen_observations, seen_returns, seen_actions, seen_real = policy.seen[-1]
        assert seen_observations.shape == (size, context, 2) and seen_returns.shape == (size, context)
        assert seen_actions.shape == (size, context - 1, 1) and seen_real.shape == (size, context)
        for place in range(size):
            i, first = rows[place % count], max(0, step - context + 1)  # the rest: the same rows over again
            padding, used = context - (step + 1 - first), returns[first : step + 1, i].copy()
            used[:-1] += 0.5  # of the steps before, what the policy acted on; of this one, what it is given
            assert seen_real[place].tolist() == [False] * padding + [True] * (step + 1 - first)
            assert not seen_observations[place, :padding].any() and not seen_returns[place, :padding].any()
            assert not seen_actions[place, :padding].any()
            np.testing.assert_allclose(seen_observations[place, padding:], observations[first : step + 1, i], rtol=1e-6)
            np.testing.assert_allclose(seen_returns[place, padding:], used, rtol=1e-6)
            np.testing.assert_allclose(seen_actions[place, padding:], actions[first:step, i], rtol=1e-6)
        mean = observations[step, rows] @ [[0.1], [0.01]]
        np.testing.assert_allclose(dist.mean.numpy(), mean, rtol=1e-5, atol=1e-6)  # one per row, no repetitions
        assert dist.log_std.shape == (count, 1)
        actions[step, rows] = rng.uniform(-1.0, 1.0, (count, 1))
        history.actions[-1][rows] = actions[step, rows]
    assert len(policy.seen) == len(counts)


def test_history_keeps_every_step_with_the_return_acted_on_and_who_lived_it():
    policy, history, sizes = Recorder(returns_shift=100.0), History(3, 3, 2, 1), []
    for step, rows in enumerate(([0, 1, 2], [0, 2], [2]), start=1):
        observations, returns = np.full((3, 2), step, np.float32), np.float32(step) * np.arange(1, 4, dtype="f")
        history.act(policy, np.array(rows), observations, returns)
        observations[:], returns[:] = np.nan, np.nan  # it keeps copies: evaluation writes into its arrays
        assert not history.actions[-1].any()  # no action yet
        history.actions[-1][rows] = 0.1 * step
        sizes.append(len(policy.seen[-1][0]))
    assert sizes == [3, 3, 3]
    real = np.array([[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 0, 1], [0, 0, 1]], bool)  # two of padding, three lived
    np.testing.assert_array_equal(np.stack(history.real), real)
    np.testing.assert_array_equal(np.stack(history.returns)[real], [101.0, 102.0, 103.0, 102.0, 106.0, 109.0])
    np.testing.assert_array_equal(np.stack(history.observations)[real][:, 0], [1.0, 1.0, 1.0, 2.0, 2.0, 3.0])
    np.testing.assert_allclose(np.stack(history.actions)[..., 0], real * np.array([0, 0, 0.1, 0.2, 0.3])[:, None])
    assert not any(np.stack(part)[:2].any() for part in (history.observations, history.returns, history.actions))
    assert {part[-1].dtype for part in (history.observations, history.returns, history.actions)} == {np.dtype("f4")}
