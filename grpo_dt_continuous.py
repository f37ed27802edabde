"""GRPO-DT: online finetuning of a Decision Transformer with group-relative policy gradients alone.

  "Online Finetuning Decision Transformers with Pure RL Gradients" (Luo & Zhu), Algorithm 1, Table 6
  1. roll out a trajectory at return-to-go g_online, a snapshot of the simulator at every step    (line 2)
  2. draw trajectories in proportion to length, reset points where the policy is uncertain        (lines 3, 5)
  3. from each point a group of G sub-trajectories of L_traj sampled steps; score: the discounted
     reward over these and L_eval steps more with the mean action                                 (line 6)
  4. advantage: the score relative to its group (Eq. 2); buffer of sub-trajectories               (lines 7, 8)
  5. clipped policy gradient on the importance ratio of whole sub-trajectories (Eq. 3)            (line 9)

Departures from the paper (docs/grpo_dt.md explains each under the same number):
  (1) the mean action is tanh(mean), the median of the squashed Gaussian, not its expectation: ODT does the same
  (2) the log-ratio of a sub-trajectory is kept within +-20 before exp, so that no ratio overflows
  (3) a sub-trajectory that ends early stays in its group: its ratio is over its real steps, its score what it got
  (4) the time limit does not end sub-trajectories, only true terminations do: members of a group share a horizon
  (5) old log-probabilities are computed by the update's own forward when a sub-trajectory enters the buffer
  (6) matrix products in bf16 where the hardware has units for it; residual stream, norms, heads, losses in fp32
  (7) D4RL's rules are put back where gymnasium-robotics 1.4.2 differs (docs/datasets.md)
  (8) the first iteration rolls out as many full trajectories as it draws, not one, so that the replay is not one fall

On a laptop: python grpo_dt_continuous.py --env-id Hopper-v5 --embed-dim 128 --iterations 30
In full:     python grpo_dt_continuous.py --env-id Hopper-v5 --pretrained runs/NAME/checkpoint.pt
"""

import contextlib
import copy
import csv
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads must not spin while the simulators work

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

# Shapes: P reset points, G group size, N = P G sub-trajectories side by side, L = L_traj steps, B minibatch,
#         K context, S and A dimensions of observation and action, E embedding width, T steps of a full trajectory;
#         in section 4 L is the number of tokens.

# ---------------------------------------------------------------------------------------------------------------------
# 2. Arguments
# ---------------------------------------------------------------------------------------------------------------------

DatasetKind = Literal["random", "medium", "medium-replay", "expert", "human", "cloned", "umaze", "diverse"]


@dataclass
class Args:
    """Finetune a pretrained Decision Transformer online by GRPO-DT. Fields left at None take the paper's row."""

    env_id: str = "Hopper-v5"
    """gymnasium or gymnasium-robotics id of the environment"""
    pretrained: str | None = None
    """checkpoint of pretrain_dt.py to start from [None: one is made from random data, in minutes, and kept]"""
    dataset_kind: DatasetKind | None = None
    """kind of data, picks the paper's row [None: that of the checkpoint]"""
    embed_dim: int = 512
    """E, width of the transformer"""
    iterations: int = 500
    """iterations, Algorithm 1's T"""

    n_trajectories: int | None = None
    """full trajectories rolled out per iteration [None: the row]"""
    replay_size: int = 32
    """full trajectories kept, first in, first out"""
    n_sources: int = 16
    """full trajectories drawn per iteration"""
    n_points: int = 4
    """points per drawn trajectory, Algorithm 1's K"""
    group_size: int = 8
    """G: members of a group, all from the same point"""
    buffer_size: int = 2048
    """sub-trajectories kept, first in, first out"""
    l_traj: int | None = None
    """L_traj: sampled steps per sub-trajectory, the unit of credit assignment [steps; None: the row]"""
    l_eval: int | None = None
    """L_eval: steps with the mean action after them, for the score only [steps; None: the row]"""
    gamma: float | None = None
    """gamma: discount per step [None: the row]"""
    delta_r: float | None = None
    """Delta_r: members whose score is this close to the group's mean leave [raw discounted reward; None: the row]"""
    g_online: float | None = None
    """g_online: initial return-to-go of rollouts and evaluations [raw reward units; None: the row]"""
    c_online: int | None = None
    """c_online: context length in evaluation and finetuning [steps; None: the row]"""

    n_batch: int | None = None
    """n_batch: sub-trajectories per minibatch [None: the row]"""
    n_minibatches: int = 8
    """gradient updates per iteration"""
    epsilon: float | None = None
    """epsilon: clipping range of the importance ratio [None: the row]"""
    beta: float = 1e-3
    """beta: weight of the KL divergence to the reference policy"""
    reference_every: int = 4
    """the reference policy becomes the current one every so many updates"""
    lr: float | None = None
    """lr_policy, of LAMB: relative movement of a tensor per update [None: the row]"""
    weight_decay: float = 1e-4
    """weight decay, on every tensor as in ODT"""
    max_grad_norm: float = 0.5
    """bound of the global gradient norm"""
    kappa_initial: float | None = None
    """initial value of the entropy dual variable kappa [None: the row]"""
    kappa_lr: float = 1e-4
    """Adam's learning rate on log kappa"""

    hindsight: bool = False
    """ablation, Fig. 1: the new log-probability sees the returns that were reached, the old one those asked for"""
    full_trajectories: bool = False
    """ablation, Fig. 2a: groups of whole episodes from their first state (L_traj: the time limit, L_eval: 0)"""
    mixed_groups: bool = False
    """ablation, Fig. 2b: the members of a group start from different reset points"""
    token_ratio: bool = False
    """ablation, Fig. 2c: one clipped ratio per step instead of one per sub-trajectory"""
    random_points: bool = False
    """ablation, Fig. 2d: reset points drawn uniformly"""
    geometric_mean: bool = False
    """ablation, Fig. 2e: the geometric mean of the steps' ratios instead of their product (GSPO)"""

    eval_every: int = 1
    """iterations between evaluations"""
    eval_episodes: int = 10
    """episodes of an evaluation"""

    seed: int = 1
    """seed of every random stream"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network runs [auto: cuda if there is one]"""
    bf16: bool = True
    """bf16 matrix products where the hardware has units for it (AVX512-BF16, AMX, GPUs since Ampere)"""
    threads: int | None = None
    """CPU threads of torch [None: torch's choice, the number of cores]"""
    run_dir: str | None = None
    """folder of the run [None: runs/ENV__SCRIPT__KIND__SEED__TIME]"""
    resume: str | None = None
    """folder of a run to go on with; only its length, --device and --track may change"""
    eval_only: str | None = None
    """evaluate this checkpoint, or that in this folder, of any script here, and stop"""
    capture_video: bool = False
    """film the first evaluation episode into RUN_DIR/videos (needs moviepy and a GL library)"""
    track: bool = False
    """also log to Weights & Biases (needs wandb)"""
    g_eval: float | None = None
    """initial return-to-go of evaluations [raw; None: g_online, in pretraining the row's; reinformer has none]"""


# Table 6, and n_trajectories of Appendix B.1. Keys: environment id up to the version, kind of data.
COLUMNS = ("n_batch", "c_online", "g_online", "l_traj", "l_eval", "gamma", "epsilon", "delta_r", "lr", "kappa_initial")
COLUMNS += ("n_trajectories",)
ROWS = {
    ("Hopper", "medium"): (256, 1, 7200.0, 15, 400, 0.995, 0.2, 2.0, 5e-5, 0.20, 1),
    ("Hopper", "random"): (256, 1, 7200.0, 15, 400, 0.995, 0.2, 2.0, 5e-5, 0.20, 1),
    ("Walker2d", "medium"): (256, 1, 10000.0, 15, 400, 0.995, 0.3, 2.0, 5e-5, 0.04, 1),
    ("Walker2d", "random"): (256, 1, 10000.0, 15, 400, 0.995, 0.3, 2.0, 5e-5, 0.20, 1),
    ("Ant", "medium"): (256, 1, 12000.0, 15, 200, 0.995, 0.3, 2.0, 5e-5, 0.04, 1),
    ("Ant", "random"): (256, 1, 12000.0, 15, 200, 0.995, 0.3, 2.0, 5e-5, 0.20, 1),
    ("AdroitHandDoor", "cloned"): (512, 1, 3000.0, 10, 100, 0.99, 0.3, 0.5, 3e-5, 0.10, 5),
    ("AdroitHandDoor", "human"): (512, 1, 3000.0, 10, 100, 0.99, 0.3, 0.4, 3e-5, 0.04, 5),
    ("AdroitHandPen", "cloned"): (512, 1, 6000.0, 3, 30, 0.99, 0.3, 0.0, 3e-5, 0.02, 5),
    ("AdroitHandPen", "human"): (512, 1, 6000.0, 3, 30, 0.99, 0.3, 0.0, 3e-5, 0.02, 5),
    ("AdroitHandHammer", "cloned"): (512, 5, 4000.0, 10, 100, 0.99, 0.3, 0.0, 3e-5, 0.05, 5),
    ("AdroitHandHammer", "human"): (512, 5, 4000.0, 10, 100, 0.99, 0.3, 0.8, 3e-5, 0.05, 5),
    ("AntMaze", "umaze"): (256, 1, 2.0, 10, 200, 1.0, 0.2, 0.0, 5e-5, 0.05, 1),
    ("AntMaze", "diverse"): (256, 5, 2.0, 10, 200, 1.0, 0.2, 0.0, 5e-5, 0.05, 1),
}


def row_of(env_id: str, kind: str) -> tuple[str, str] | None:
    """The key of the task's row: that of the kind of data, else of medium, cloned or umaze; None outside the table."""
    keys = [(task_of(env_id), each) for each in (kind, "medium", "cloned", "umaze")]
    return next((key for key in keys if key in ROWS), None)


def fill_from_table(args: Args, kind: str, best_return: float) -> str:
    """Fill the fields of `args` that are None from the row of the task and the kind of data; returns a line about it.

    A task outside the table gets Hopper's row and g_online = best + |best| of the dataset's returns.
    """
    args.dataset_kind = args.dataset_kind or kind
    key = row_of(args.env_id, args.dataset_kind)
    row = dict(zip(COLUMNS, ROWS[key or ("Hopper", "medium")]))
    if key is None:
        row["g_online"] = best_return + abs(best_return)
    for field in (field for field in COLUMNS if getattr(args, field) is None):
        setattr(args, field, row[field])
    args.g_eval = args.g_online if args.g_eval is None else args.g_eval
    source = f"row {' '.join(key)}" if key else f"no row for {args.env_id}: Hopper's, g_online from the best return"
    return f"{source} ({args.dataset_kind} data): " + ", ".join(f"{name} {getattr(args, name):g}" for name in COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Environment
# ---------------------------------------------------------------------------------------------------------------------

# D4RL's reference returns (random policy, expert): score = 100 (R - min) / (max - min).
REFERENCE_RETURNS = {
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    "HalfCheetah": (-280.178953, 12135.0),
    "AdroitHandPen": (96.262799, 3076.8331017826877),
    "AdroitHandHammer": (-274.856578, 12794.134825156867),
    "AdroitHandDoor": (-56.512833, 2880.5693087298737),
    "AdroitHandRelocate": (-6.425911, 4233.877797728884),
    "AntMaze": (0.0, 1.0),
}
GOAL_KEYS = ("achieved_goal", "observation", "desired_goal")


def task_of(env_id: str) -> str:
    """'AdroitHandDoor-v1' -> 'AdroitHandDoor', 'AntMaze_UMaze-v4' -> 'AntMaze': the key of the tables."""
    task = env_id.split("/")[-1].rsplit("-v", 1)[0]
    return "AntMaze" if task.startswith("AntMaze_") else task


def normalized_score(env_id: str, returns: float) -> float:
    """D4RL's score, 0 = random, 100 = expert; NaN for a task without reference returns."""
    low, high = REFERENCE_RETURNS.get(task_of(env_id), (math.nan, math.nan))
    return 100.0 * (returns - low) / (high - low)


def flatten_observation(observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    """One flat vector (..., S). A goal dictionary in the order of GOAL_KEYS (AntMaze: 31), so that the first 29 are
    D4RL's layout (qpos, qvel)."""
    if isinstance(observation, dict):
        return np.concatenate([observation[key] for key in GOAL_KEYS], axis=-1)
    return np.asarray(observation)


def d4rl_rules(task: str, observation: np.ndarray, reward, terminated) -> tuple:
    """Reward and termination by D4RL's rules, from those of gymnasium-robotics 1.4.2 and the observation (..., S) after
    the step. Since 1.2.1 its door, hammer and relocate add 0.1 |hand - object| where D4RL subtracts it: taking it off
    twice puts that right. D4RL's pen ends when it has fallen below 0.075 m; today's never does."""
    if task == "AdroitHandDoor":
        reward = reward - 0.2 * np.linalg.norm(observation[..., 35:38], axis=-1)  # palm - handle
    elif task == "AdroitHandHammer":
        reward = reward - 0.2 * np.linalg.norm(observation[..., 33:36] - observation[..., 36:39], axis=-1)
    elif task == "AdroitHandRelocate":
        reward = reward - 0.2 * np.linalg.norm(observation[..., 30:33], axis=-1)  # palm - ball
    elif task == "AdroitHandPen":
        terminated = terminated | (observation[..., 26] < 0.075)  # height of the pen
    return reward, terminated


class D4RLRules(gym.Wrapper):
    """Flat observations, and D4RL's rewards and terminations where today's packages differ (docs/datasets.md)."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.task = task_of(env.spec.id)
        if isinstance(env.observation_space, gym.spaces.Dict):
            size = sum(space.shape[0] for space in env.observation_space.values())
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        return flatten_observation(observation), info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        observation = flatten_observation(observation)
        reward, terminated = d4rl_rules(self.task, observation, reward, terminated)
        return observation, float(reward), bool(terminated), truncated, info


def make_env(env_id: str, env_kwargs: dict | None = None, render_mode: str | None = None) -> gym.Env:
    """The environment `env_id` under D4RL's rules, with flat observations.

    Exits with a line if it is unknown or has no time limit, or if observations or actions are not a flat Box, that of
    actions bounded.
    """
    task, kwargs = task_of(env_id), dict(env_kwargs or {})
    if task == "AdroitHandPen":
        kwargs["max_episode_steps"] = 100  # D4RL's; gymnasium-robotics gives 200
    if task == "AntMaze":
        kwargs["continuing_task"] = False  # an episode ends at the goal, its return is 0 or 1
    gym.logger.min_level = gym.logger.ERROR  # -v4 ids are meant here, and the Adroit reward is put right above
    with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
    try:
        env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True, **kwargs)
    except Exception as error:  # gymnasium's errors, missing packages, and whatever a task's own code raises
        die(f"cannot make the environment {env_id}: {str(error) or repr(error)}. Name one such as Hopper-v5 or Ant-v4.")
    actions, seen = env.action_space, env.observation_space
    parts = seen.values() if isinstance(seen, gym.spaces.Dict) and {*seen} == {*GOAL_KEYS} else [seen]
    if not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (*parts, actions)):
        die(f"{env_id} has actions {actions} and observations {seen}: both must be flat Boxes (goal keys may stay).")
    if not np.all(np.isfinite([actions.low, actions.high])):
        die(f"{env_id} has unbounded actions {actions}: they are scaled between their bounds, so give it finite ones.")
    if env.spec.max_episode_steps is None:
        die(f"{env_id} has no time limit, so an episode might never end: register it with max_episode_steps.")
    return D4RLRules(env)


def scale_action(action: np.ndarray, env: gym.Env) -> np.ndarray:
    """From the network's [-1, 1] to the bounds of the environment."""
    low, high = env.action_space.low, env.action_space.high
    return low + (action + 1.0) * 0.5 * (high - low)


# The simulator pool. A snapshot is one flat vector: MuJoCo's integration state, then `live_arrays`.

INTEGRATION_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


def simulator_of(env: gym.Env):
    """The object that holds model and data: the unwrapped environment, AntMaze's ant inside it."""
    return getattr(env.unwrapped, "ant_env", env.unwrapped)


def live_arrays(env: gym.Env) -> list[np.ndarray]:
    """What beside the integration state makes a simulation: body positions, of which rewards take differences; model
    fields that Adroit draws at each reset; the goal of a maze. All of them views."""
    model, data = simulator_of(env).model, simulator_of(env).data
    goal = [env.unwrapped.goal] if hasattr(env.unwrapped, "goal") else []
    # [13] xpos and xipos lag the joints by a substep: worked out anew, the first reward of an Ant would be wrong
    return [data.xpos, data.xipos, model.body_pos, model.body_quat, model.site_pos, *goal]


def take_snapshot(env: gym.Env) -> np.ndarray:
    """The simulation of `env` as a flat vector (D,)."""
    model, data = simulator_of(env).model, simulator_of(env).data
    state = np.empty(mujoco.mj_stateSize(model, INTEGRATION_STATE))
    mujoco.mj_getState(model, data, state, INTEGRATION_STATE)
    return np.concatenate([state, *(array.ravel() for array in live_arrays(env))])


def unstable(env: gym.Env) -> bool:
    """Whether MuJoCo found a bad position, velocity or acceleration: it then resets itself and goes on."""
    kinds = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)
    return any(simulator_of(env).data.warning[int(kind)].number for kind in kinds)


class SimulatorPool:
    """N simulations of one environment, stepped in threads. This is the general way, for any MuJoCo environment: each
    is a shallow copy of `env` with its own MjData, and its own `step` is called, outside the time limit's wrapper."""

    def __init__(self, env: gym.Env, size: int, threads: int):
        env.reset(seed=0)  # Adroit and AntMaze set attributes there
        self.env, self.task, self.size, self.threads = env, task_of(env.spec.id), size, max(1, min(threads, size))
        self.workers = ThreadPoolExecutor(self.threads)
        self.models = [copy.copy(simulator_of(env).model) for _ in range(self.threads)]
        self.sims = [self.copy_of(env.unwrapped) for _ in range(size)]
        self.fields = [None] * size  # model fields of each simulation; a thread's model gets them before a step
        self.seconds = 0.0  # spent in simulation

    @staticmethod
    def copy_of(env: gym.Env) -> gym.Env:
        """A simulation of its own: everything shared but MjData and the goal. (copy.copy would build a new one.)"""
        sim = object.__new__(type(env))
        vars(sim).update(vars(env))
        if hasattr(env, "ant_env"):
            sim.ant_env = SimulatorPool.copy_of(env.ant_env)
        else:
            sim.data = mujoco.MjData(env.model)
        if hasattr(env, "goal"):
            sim.goal = env.goal.copy()
        return sim

    def in_threads(self, function, rows: np.ndarray) -> None:
        """function(chunk of positions in rows, number of the thread) in all threads, until all have ended."""
        begun, chunks = time.time(), np.array_split(np.arange(len(rows)), self.threads)
        list(self.workers.map(function, chunks, range(self.threads)))
        self.seconds += time.time() - begun

    def restore(self, rows: np.ndarray, snapshots: np.ndarray) -> None:
        """Put simulations `rows` (n,) into the states `snapshots` (n, D)."""
        size = mujoco.mj_stateSize(self.models[0], INTEGRATION_STATE)
        for row, snapshot in zip(rows, snapshots):
            simulator, arrays = simulator_of(self.sims[row]), live_arrays(self.sims[row])
            mujoco.mj_setState(simulator.model, simulator.data, snapshot[:size], INTEGRATION_STATE)
            parts = np.split(snapshot[size:], np.cumsum([array.size for array in arrays])[:-1])
            for part, array in zip(parts, arrays):
                array[...] = part.reshape(array.shape)
            self.fields[row] = [array.copy() for array in arrays[2:5]]

    def step(self, rows: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step simulations `rows` (n,) by `actions` (n, A), in the environment's bounds: observations (n, S), rewards
        (n,), terminations (n,)."""
        observations = np.empty((len(rows), *self.env.observation_space.shape))
        rewards, terminated = np.empty(len(rows)), np.empty(len(rows), bool)

        def work(chunk: np.ndarray, thread: int) -> None:
            model = self.models[thread]
            for j in chunk:
                sim = self.sims[rows[j]]
                simulator_of(sim).model = model
                model.body_pos[:], model.body_quat[:], model.site_pos[:] = self.fields[rows[j]]
                observation, rewards[j], terminated[j], _, _ = sim.step(actions[j])
                observations[j] = flatten_observation(observation)

        self.in_threads(work, rows)
        return observations, *d4rl_rules(self.task, observations, rewards, terminated)

    def unstable(self) -> bool:
        """Whether any of its simulations ever was."""
        return any(map(unstable, self.sims))


class LocomotionPool(SimulatorPool):
    """The fast way, for Hopper, Walker2d, HalfCheetah and Ant: MuJoCo is stepped in threads, observation, reward and
    termination are worked out for the whole batch in NumPy, from the constants of the environment itself."""

    TASKS = ("Hopper", "Walker2d", "HalfCheetah", "Ant")

    def __init__(self, env: gym.Env, size: int, threads: int):
        super().__init__(env, size, threads)
        self.rules, self.v4 = env.unwrapped, env.spec.id.endswith("-v4")
        # Ant-v5 always pays for contact forces, Ant-v4 only if asked to; they need a pass of their own after the step
        self.contact = self.task == "Ant" and getattr(self.rules, "_use_contact_forces", True)
        # rewarded is the speed of the torso's body in Ant, of the root joint otherwise
        self.views = [
            (d, d.ctrl, d.qpos, d.qvel, d.cfrc_ext, d.xpos[1] if self.task == "Ant" else d.qpos)
            for d in (sim.data for sim in self.sims)
        ]

    def step(self, rows: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        qpos, qvel, forces = (np.empty((len(rows), *view.shape)) for view in self.views[0][2:5])
        before, after, skip = np.empty(len(rows)), np.empty(len(rows)), self.rules.frame_skip

        def work(chunk: np.ndarray, thread: int) -> None:
            model = self.models[thread]
            for j in chunk:
                data, ctrl, position, velocity, force, place = self.views[rows[j]]
                before[j] = place[0]
                ctrl[:] = actions[j]
                mujoco.mj_step(model, data, skip)
                qpos[j], qvel[j], after[j] = position, velocity, place[0]
                if self.contact:
                    mujoco.mj_rnePostConstraint(model, data)
                    forces[j] = force

        self.in_threads(work, rows)
        return self.observe(qpos, qvel, forces), *self.judge(qpos, qvel, forces, actions, after - before)

    def observe(self, qpos: np.ndarray, qvel: np.ndarray, forces: np.ndarray) -> np.ndarray:
        """Observations (n, S) from positions (n, nq), velocities (n, nv) and contact forces (n, bodies, 6)."""
        if self.task in ("Hopper", "Walker2d"):
            qvel = np.clip(qvel, -10.0, 10.0)
        parts = [qpos[:, 2:] if self.task == "Ant" else qpos[:, 1:], qvel]
        if sum(part.shape[1] for part in parts) < self.env.observation_space.shape[0]:  # v5 leaves out the world's
            clipped = np.clip(forces, *self.rules._contact_force_range)
            clipped = clipped[:, 0 if self.v4 else 1 :]
            parts.append(clipped.reshape(len(qpos), clipped.shape[1] * 6))  # -1 fails where no row is left
        return np.concatenate(parts, axis=1)

    def judge(self, qpos, qvel, forces, actions, dx) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and terminations (n,) each; dx (n,): distance covered."""
        rules = self.rules
        reward = getattr(rules, "_forward_reward_weight", 1.0) * dx / rules.dt
        cost = rules._ctrl_cost_weight * np.square(actions).sum(axis=1)
        if self.task == "HalfCheetah":
            return reward - cost, np.zeros(len(dx), bool)
        (low, high), height = rules._healthy_z_range, qpos[:, 2 if self.task == "Ant" else 1]
        if self.task == "Ant":
            healthy = np.isfinite(qpos).all(1) & np.isfinite(qvel).all(1) & (low <= height) & (height <= high)
            if self.contact:
                clipped = np.clip(forces, *rules._contact_force_range)
                cost = cost + rules._contact_cost_weight * np.square(clipped).sum(axis=(1, 2))
        else:
            left, right = rules._healthy_angle_range
            healthy = (low < height) & (height < high) & (left < qpos[:, 2]) & (qpos[:, 2] < right)
            if self.task == "Hopper":
                bottom, top = rules._healthy_state_range
                state = np.concatenate([qpos[:, 2:], qvel], axis=1)
                healthy &= ((bottom < state) & (state < top)).all(axis=1)
        # v4 pays the alive bonus on the terminal step too
        bonus = rules._healthy_reward * (healthy | (self.v4 and rules._terminate_when_unhealthy))
        return reward + bonus - cost, ~healthy & rules._terminate_when_unhealthy


def make_pool(env: gym.Env, size: int, threads: int) -> SimulatorPool:
    """The fast way where there is one. Exits with a line if `env` is no MuJoCo environment."""
    name = env.spec.id
    if not {"model", "data"} <= vars(simulator_of(env)).keys():
        die(f"{name} is no MuJoCo environment to reset to a state: use q_guided_grpo_dt.py or ppo_dt_continuous.py.")
    fast = type(env.unwrapped).__module__.startswith("gymnasium.envs.mujoco") and task_of(name) in LocomotionPool.TASKS
    return (LocomotionPool if fast else SimulatorPool)(env, size, threads)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Model
# ---------------------------------------------------------------------------------------------------------------------

ACTION_LIMIT = 1.0 - 1e-6  # [1] ODT's: actions stay inside (-1, 1), where atanh is finite
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # [2] state-dependent, squashed into this range


class SquashedGaussian:
    """The distribution of tanh(u) with u ~ N(mean, std^2), independent per dimension. mean, log_std: (..., A)."""

    def __init__(self, mean: torch.Tensor, log_std: torch.Tensor):
        self.mean, self.log_std = mean, log_std

    def mode(self) -> torch.Tensor:
        """The deterministic action tanh(mean): the median of the law, not its expectation. Departure (1)."""
        return torch.tanh(self.mean).clamp(-ACTION_LIMIT, ACTION_LIMIT)  # (..., A)

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """The pre-tanh sample u (..., A) for standard normal `noise`; differentiable. The action is tanh(u)."""
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, u: torch.Tensor) -> torch.Tensor:
        """log-density of the action tanh(u), summed over its dimensions: (...)."""
        normal = -0.5 * ((u - self.mean) * (-self.log_std).exp()) ** 2 - self.log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))  # [3] log d tanh(u)/du, stable for large |u|
        return (normal - log_slope).sum(-1)

    def entropy(self, noise: torch.Tensor) -> torch.Tensor:
        """Entropy, estimated by one differentiable sample: (...)."""
        return -self.log_prob(self.sample(noise))  # [4]


class Linear(nn.Linear):
    """A linear layer whose product runs in `compute_dtype`: in bf16 it uses the matrix units. Weights stay in fp32."""

    compute_dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class Block(nn.Module):
    """Pre-LayerNorm transformer block: x += attention(LN x); x += MLP(LN x)."""

    def __init__(self, embed_dim: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.query, self.key_value = Linear(embed_dim, embed_dim), Linear(embed_dim, 2 * embed_dim)
        self.project = Linear(embed_dim, embed_dim)
        self.up, self.down = Linear(embed_dim, 4 * embed_dim), Linear(4 * embed_dim, embed_dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, read: slice = slice(None)) -> torch.Tensor:
        """x (B, L, E), mask (B or 1, 1, L, L) True where a query may look -> the tokens in `read` (B, L', E)."""
        drop = self.dropout if self.training else 0.0
        h = self.norm1(x)
        q = self.query(h[:, read].contiguous())  # (B, L', E); strided, it would round otherwise without gradients
        k, v = self.key_value(h).chunk(2, dim=-1)  # (B, L, E) each
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, L, E / heads)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, read], dropout_p=drop)
        h = self.project(h.transpose(1, 2).flatten(2))  # (B, L', E)
        x = x[:, read] + F.dropout(h, drop)
        return x + F.dropout(self.down(F.silu(self.up(self.norm2(x)))), drop)


class DecisionTransformer(nn.Module):
    """ODT's stochastic Decision Transformer with the paper's Table 5, or Reinformer as a variant of it.

    dt: tokens (g_1, s_1, a_1, ..., g_K, s_K); the action is read from the state token.
    reinformer: tokens (s_1, g_1, a_1, ..., s_K, g_K); the return is read from the state token, the action from g's.
    Either way the action is read from a step's second token. Nothing can read the last action token, so there is none.
    Takes raw observations and raw returns: their mean, std and scale are buffers, saved with the weights.
    """

    def __init__(self, obs_dim, act_dim, embed_dim=512, n_layers=4, n_heads=4, kind="dt", dropout=0.0):
        super().__init__()
        self.kind, self.act_dim, self.dropout = kind, act_dim, dropout
        self.sizes = dict(obs_dim=obs_dim, act_dim=act_dim, embed_dim=embed_dim, n_layers=n_layers, n_heads=n_heads)
        self.sizes["kind"] = kind
        self.embed_return = nn.Linear(1, embed_dim)
        self.embed_observation = nn.Linear(obs_dim, embed_dim)
        self.embed_action = nn.Linear(act_dim, embed_dim)
        self.norm_in = nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, n_heads, dropout) for _ in range(n_layers))
        self.norm_out = nn.LayerNorm(embed_dim)
        self.mean_head, self.log_std_head = nn.Linear(embed_dim, act_dim), nn.Linear(embed_dim, act_dim)
        self.return_head = nn.Linear(embed_dim, 1) if kind == "reinformer" else None
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("return_scale", torch.ones(()))
        for layer in (layer for block in self.blocks for layer in block.modules() if isinstance(layer, Linear)):
            nn.init.normal_(layer.weight, std=0.02)  # [5] GPT-2's; embeddings and return head keep PyTorch's
            nn.init.zeros_(layer.bias)
        for head in (self.mean_head, self.log_std_head):
            nn.init.orthogonal_(head.weight)
            nn.init.zeros_(head.bias)

    def use_precision(self, dtype: torch.dtype) -> "DecisionTransformer":
        """Run the matrix products of the blocks in `dtype`."""
        for layer in self.modules():
            if isinstance(layer, Linear):
                layer.compute_dtype = dtype
        return self

    def attention_mask(self, real: torch.Tensor | None, n_tokens: int, device: torch.device) -> torch.Tensor:
        """Causal, and blind to padded steps: (B or 1, 1, L, L). real (B, K): False where a step is left padding."""
        causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril()[None, None]
        if real is None:
            return causal
        visible = real.repeat_interleave(3, dim=1)[:, None, None, :n_tokens]  # (B, 1, 1, L)
        itself = torch.eye(n_tokens, dtype=torch.bool, device=device)  # [6] else a padded row sees nothing: NaN
        return (causal & visible) | itself

    def forward(self, observations, returns, actions, real=None) -> tuple[SquashedGaussian, torch.Tensor | None]:
        """Distribution of each step's action, (B, K, A), and the returns (B, K) that reinformer predicts (dt: None).

        observations (B, K, S) and returns (B, K): raw. actions (B, K - 1, A) in [-1, 1]: those before the last step.
        real (B, K): False where a step is left padding [None: nowhere].
        """
        context, drop = returns.shape[1], self.dropout if self.training else 0.0
        # [7] No positional or time-step embedding: order is known through the causal mask alone (Appendix B.1).
        s = self.embed_observation((observations - self.obs_mean) / self.obs_std)  # (B, K, E)
        g = self.embed_return((returns * self.return_scale)[..., None])  # (B, K, E)
        slots = [g, s] if self.kind == "dt" else [s, g]
        if context > 1:  # [8] the slot of the last action is cut off below: nothing could read it
            slots.append(F.pad(self.embed_action(actions), (0, 0, 0, 1)))
        x = torch.stack(slots, dim=2).flatten(1, 2)[:, : 3 * context - 1]  # (B, L, E), L = 3 K - 1
        x = F.dropout(self.norm_in(x), drop)
        mask = self.attention_mask(real, x.shape[1], x.device)
        for block in self.blocks[:-1]:
            x = block(x, mask)
        # [9] The last block works out only what is read from it. dt: second tokens; reinformer: first and second.
        if self.kind == "dt":
            action_tokens = self.norm_out(self.blocks[-1](x, mask, slice(1, None, 3)))  # (B, K, E)
            predicted_returns = None
        else:
            x = self.norm_out(self.blocks[-1](x, mask))
            state_tokens, action_tokens = x[:, 0::3].contiguous(), x[:, 1::3].contiguous()  # (B, K, E)
            predicted_returns = self.return_head(state_tokens).squeeze(-1) / self.return_scale  # (B, K), raw
        spread = torch.tanh(self.log_std_head(action_tokens))
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (spread + 1.0)
        return SquashedGaussian(self.mean_head(action_tokens), log_std), predicted_returns

    def act(self, observations, returns, actions, real=None) -> tuple[SquashedGaussian, torch.Tensor]:
        """Distribution of the window's last action, (B, A), and the return-to-go (B,) that it is conditioned on:
        the given one for dt; reinformer first predicts it, then acts on it. Takes what `forward` takes."""
        if self.kind == "reinformer":
            _, predicted = self(observations, returns, actions, real)
            returns = torch.cat([returns[:, :-1], predicted[:, -1:]], dim=1)
        dist, _ = self(observations, returns, actions, real)
        return SquashedGaussian(dist.mean[:, -1], dist.log_std[:, -1]), returns[:, -1]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Buffers
# ---------------------------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """A full trajectory of T steps behind K - 1 steps of padding: step h's window is [h, h + K) of the first four."""

    observations: np.ndarray  # (K - 1 + T, S)
    returns: np.ndarray  # (K - 1 + T,) return-to-go that the action was conditioned on, raw
    actions: np.ndarray  # (K - 1 + T, A) in [-1, 1]
    real: np.ndarray  # (K - 1 + T,) False: padding
    rewards: np.ndarray  # (T,)
    snapshots: np.ndarray  # (T, D) of the simulator, before each action


class SubTrajectories(NamedTuple):
    """Sub-trajectories of L sampled steps behind the K - 1 steps before them, windows as in Trajectory."""

    observations: torch.Tensor  # (B, K - 1 + L, S)
    returns: torch.Tensor  # (B, K - 1 + L) raw
    actions: torch.Tensor  # (B, K - 1 + L, A)
    real: torch.Tensor  # (B, K - 1 + L) False: padding, or after the sub-trajectory ended
    u: torch.Tensor  # (B, L, A) pre-tanh samples: the action is tanh(u)
    new_returns: torch.Tensor  # (B, K - 1 + L) what the new log-probability sees: `returns`, but for --hindsight
    old_log_prob: torch.Tensor  # (B, L)
    advantage: torch.Tensor  # (B,)

    def take(self, index: torch.Tensor) -> "SubTrajectories":
        return SubTrajectories(*(field[index] for field in self))


def windows(steps: torch.Tensor, context: int) -> torch.Tensor:
    """Every window of K consecutive steps: (B, K - 1 + L, ...) -> (B L, K, ...)."""
    return steps.unfold(1, context, 1).movedim(-1, 2).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Rollouts
# ---------------------------------------------------------------------------------------------------------------------


class History:
    """What B rollouts side by side have seen, step by step, after K - 1 steps of padding: a window is the last K."""

    def __init__(self, batch: int, context: int, obs_dim: int, act_dim: int):
        padding = context - 1
        self.context = context
        self.observations = [np.zeros((batch, obs_dim), np.float32)] * padding
        self.returns = [np.zeros(batch, np.float32)] * padding  # returns-to-go, raw
        self.actions = [np.zeros((batch, act_dim), np.float32)] * padding  # in [-1, 1]
        self.real = [np.zeros(batch, bool)] * padding  # False: padding, or over

    def act(self, policy, rows: np.ndarray, observations: np.ndarray, returns: np.ndarray) -> SquashedGaussian:
        """One step more, of which `rows` (b,) see their part of observations (B, S) and returns (B,): the distributions
        (b, A) of their actions. The actions taken are to be written into `actions[-1]`."""
        self.observations.append(observations.astype(np.float32))
        self.returns.append(returns.astype(np.float32))
        self.actions.append(np.zeros((len(returns), policy.act_dim), np.float32))
        self.real.append(np.isin(np.arange(len(returns)), rows))
        # [16] few batch sizes, for oneDNN builds a kernel for each: multiples of 32, by repeated rows
        padded = np.resize(rows, min(len(rows) + -len(rows) % 32, len(returns)))
        steps = (self.observations, self.returns, self.actions, self.real)
        seen = [np.stack(each[-self.context :], axis=1)[padded] for each in steps]  # (b, K, ...) each
        seen[2] = seen[2][:, :-1]  # the last action is yet to be chosen
        dist, used = policy.act(*(torch.from_numpy(each).to(policy.obs_mean.device) for each in seen))
        self.returns[-1][rows] = used[: len(rows)].cpu().numpy()  # reinformer: the predicted one stays in the window
        return SquashedGaussian(dist.mean[: len(rows)], dist.log_std[: len(rows)])


def rollout_copy(model: DecisionTransformer) -> DecisionTransformer:
    """A copy to act with: no dropout, no gradients, and the block weights already in the precision of the products."""
    policy = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in policy.modules():
        if isinstance(layer, Linear):
            layer.to(layer.compute_dtype)
    return policy


@torch.no_grad()
def evaluate(
    model: DecisionTransformer, envs: list[gym.Env], g_start: float, context: int, seeds: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One episode in each of `envs`, side by side, with the deterministic action, from return-to-go g_start (raw):
    returns, lengths and last x-positions [meters; NaN where the environment reports none], (B,) each."""
    policy, count = rollout_copy(model), len(envs)
    observations = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])  # (B, S)
    history, alive = History(count, context, observations.shape[1], policy.act_dim), np.arange(count)
    returns, lengths, distances = np.zeros(count), np.zeros(count, int), np.full(count, np.nan)
    while len(alive):
        dist = history.act(policy, alive, observations, g_start - returns)  # [10] g_{h+1} = g_h - r_h, not clamped
        history.actions[-1][alive] = dist.mode().cpu().numpy()
        going = []
        for i in alive:
            action = scale_action(history.actions[-1][i], envs[i])
            observations[i], reward, terminated, truncated, info = envs[i].step(action)
            returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
            distances[i] = info.get("x_position", np.nan)
            going.append(not (terminated or truncated))
        alive = alive[going]
    return returns, lengths, distances


@torch.no_grad()
def collect(policy: DecisionTransformer, envs: list[gym.Env], args: Args, iteration: int) -> list[Trajectory]:
    """Line 2: one full trajectory in each of `envs`, side by side, with sampled actions, from g_online."""
    seeds = [stream(args.seed, iteration, f"episode {i}") for i in range(len(envs))]
    observations = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])  # (B, S)
    history = History(len(envs), args.c_online, observations.shape[1], policy.act_dim)
    rng = torch.Generator().manual_seed(stream(args.seed, iteration, "actions of full trajectories"))
    g, alive = np.full(len(envs), args.g_online), np.arange(len(envs))
    rewards, snapshots = [[] for _ in envs], [[] for _ in envs]
    while len(alive):
        dist = history.act(policy, alive, observations, g)
        noise = torch.randn(len(envs), policy.act_dim, generator=rng)[alive].to(policy.obs_mean.device)
        history.actions[-1][alive] = squash(dist.sample(noise)).cpu().numpy()
        going = []
        for i in alive:
            snapshots[i].append(take_snapshot(envs[i]))  # before the action
            action = scale_action(history.actions[-1][i], envs[i])
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            rewards[i].append(reward)
            g[i] -= reward  # [10] not clamped
            going.append(not (terminated or truncated))
        alive = alive[going]
    if any(map(unstable, envs)):
        die(f"a simulation became unstable in iteration {iteration}: start a new run with another --seed.")
    seen = recorded(history, max(map(len, rewards)))
    ends = [args.c_online - 1 + len(each) for each in rewards]
    return [
        Trajectory(*(field[i, : ends[i]] for field in seen), np.array(rewards[i]), np.array(snapshots[i]))
        for i in range(len(envs))
    ]


def recorded(history: History, steps: int) -> list[np.ndarray]:
    """Observations, returns, actions and flags of the padding and the first `steps` steps: (B, K - 1 + steps, ...)."""
    fields = (history.observations, history.returns, history.actions, history.real)
    return [np.stack(field[: history.context - 1 + steps], axis=1) for field in fields]


def squash(u: torch.Tensor) -> torch.Tensor:
    """The action of the pre-tanh sample u, inside ODT's limits."""
    return torch.tanh(u).clamp(-ACTION_LIMIT, ACTION_LIMIT)


@torch.no_grad()
def action_variance(policy: DecisionTransformer, trajectory: Trajectory, context: int) -> np.ndarray:
    """sigma_h^2, the mean over dimensions of the policy's variance (before tanh) at each step: (T,). Section 3.2."""
    seen = [windows(torch.from_numpy(field)[None], context).to(policy.obs_mean.device) for field in trajectory[:4]]
    seen[2] = seen[2][:, :-1]  # the last action is not known yet
    steps, variances = np.arange(len(trajectory.rewards)), []
    for chunk in np.pad(steps, (0, -len(steps) % 256), mode="edge").reshape(-1, 256):  # [16]
        dist, _ = policy.act(*(field[torch.from_numpy(chunk)] for field in seen))
        variances.append((2.0 * dist.log_std).exp().mean(-1).cpu().numpy())
    return np.concatenate(variances)[: len(steps)]


def choose_points(
    policy: DecisionTransformer, replay: list[Trajectory], args: Args, iteration: int
) -> list[tuple[Trajectory, int]]:
    """Lines 3 and 5: trajectories in proportion to length, with replacement; steps in each by softmax(sigma_h^2)."""
    rng = np.random.default_rng(stream(args.seed, iteration, "reset points"))
    lengths = np.array([len(trajectory.rewards) for trajectory in replay])
    sources = rng.choice(len(replay), size=args.n_sources, p=lengths / lengths.sum())
    per_source = args.n_points * (args.group_size if args.mixed_groups else 1)
    if args.full_trajectories:
        return [(replay[source], 0) for source in sources for _ in range(per_source)]
    logits = {source: np.zeros(lengths[source]) for source in sources}  # --random-points
    if not args.random_points:
        logits = {source: action_variance(policy, replay[source], args.c_online) for source in set(sources)}
    points = []
    for source in sources:
        # [14] Gumbel top-k draws from the softmax without replacement, whatever the logits; short ones repeat
        order = np.argsort(-(logits[source] + rng.gumbel(size=lengths[source])))
        points += [(replay[source], int(h)) for h in np.resize(order[:per_source], per_source)]
    return points


class Groups(NamedTuple):
    """What the rollout of N sub-trajectories gave, in groups of G consecutive ones."""

    sub: SubTrajectories  # (N, ...) on the device; old_log_prob and advantage still zero
    scores: np.ndarray  # (N,) discounted reward over L_traj + L_eval steps: r of Eq. 2
    lengths: np.ndarray  # (N,) steps lived of these
    env_steps: int
    seconds: float  # of them in simulation


@torch.no_grad()
def rollout_groups(
    policy: DecisionTransformer, pool: SimulatorPool, points: list[tuple[Trajectory, int]], args: Args, iteration: int
) -> Groups:
    """Line 6: from each point a group of G sub-trajectories, all N = P G side by side. Those that end leave."""
    members = [point for point in points for _ in range(1 if args.mixed_groups else args.group_size)]
    if args.mixed_groups:
        order = np.random.default_rng(stream(args.seed, iteration, "mixed groups")).permutation(len(members))
        members = [members[i] for i in order]
    n, before, length, device = len(members), args.c_online - 1, args.l_traj, policy.obs_mean.device
    begun = pool.seconds
    pool.restore(np.arange(n), np.stack([source.snapshots[h] for source, h in members]))
    history = History(n, args.c_online, *pool.env.observation_space.shape, policy.act_dim)
    for name in ("observations", "returns", "actions", "real"):  # the window goes on across the reset point
        getattr(history, name)[:] = [np.stack([getattr(t, name)[h + j] for t, h in members]) for j in range(before)]
    observations = np.stack([source.observations[h + before] for source, h in members])  # (N, S) as recorded
    g = np.array([source.returns[h + before] for source, h in members], np.float64)
    # [15] noise for all rows and steps, whoever lives: nothing depends on threads or on who fell
    rng = torch.Generator().manual_seed(stream(args.seed, iteration, "actions of sub-trajectories"))
    noise = torch.randn(length, n, policy.act_dim, generator=rng)
    horizon, limit = length + args.l_eval, pool.env.spec.max_episode_steps
    last = np.full(n, horizon)  # (N,) steps to play
    if args.hindsight:  # Fig. 1: to the episode's end, for the returns reached
        last = np.maximum(horizon, limit - np.array([h for _, h in members]))
    u, rewards, alive = np.zeros((n, length, policy.act_dim), np.float32), np.zeros((last.max(), n)), np.arange(n)
    for h in range(last.max()):
        if h >= length and not len(alive):
            break
        dist = history.act(policy, alive, observations, g)
        sample = dist.sample(noise[h][alive].to(device)) if h < length else dist.mean  # L_eval: the mean action
        if h < length:
            u[alive, h] = sample.cpu().numpy()
        history.actions[-1][alive] = squash(sample).cpu().numpy()
        actions = scale_action(history.actions[-1][alive], pool.env)
        observations[alive], rewards[h, alive], terminated = pool.step(alive, actions)
        g[alive] -= rewards[h, alive]
        alive = alive[~terminated & (h + 1 < last[alive])]
    seen = [torch.from_numpy(field).to(device) for field in recorded(history, length)]
    new_returns = seen[1]
    if args.hindsight:  # the returns-to-go reached, also those of the K - 1 steps before the reset point
        earlier = np.stack([np.pad(source.rewards, (before, 0))[h : h + before] for source, h in members], axis=1)
        inside = np.arange(len(rewards))[:, None] < limit - np.array([h for _, h in members])  # the time limit
        reached = np.concatenate([earlier, rewards * inside])[::-1].cumsum(0)[::-1][: before + length]
        new_returns = torch.from_numpy(reached.T.astype(np.float32)).to(device)  # (N, K - 1 + L)
    zeros = torch.zeros(n, length, device=device)
    sub = SubTrajectories(*seen, torch.from_numpy(u).to(device), new_returns, zeros, zeros[:, 0])
    lived = np.array(history.real[before:])  # (steps, N)
    scores = args.gamma ** np.arange(horizon) @ rewards[:horizon]
    if pool.unstable() or not np.isfinite(scores).all():
        die(f"a simulation became unstable in iteration {iteration}: start a new run with another --seed.")
    return Groups(sub, scores, lived[:horizon].sum(0), int(lived.sum()), pool.seconds - begun)


def group_advantages(scores: np.ndarray, group_size: int, delta_r: float) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 2 and the filter of Appendix B.1: advantages (N,) and which members stay (N,).

    The score relative to its group, in units of the group's standard deviation (population). Members within delta_r of
    the group's mean leave, and so do groups without spread. The statistics are those of the whole group.
    """
    groups = scores.reshape(-1, group_size)  # (P, G)
    mean, std = groups.mean(1, keepdims=True), groups.std(1, keepdims=True)
    keep = (np.abs(groups - mean) > delta_r) & (std > 1e-8 + 1e-6 * np.abs(mean))  # more than rounding
    return ((groups - mean) / (std + 1e-8)).ravel(), keep.ravel()


# ---------------------------------------------------------------------------------------------------------------------
# 7. Loss and update
# ---------------------------------------------------------------------------------------------------------------------


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2019) as ODT uses it: Adam's direction with both bias corrections, weight decay on every tensor,
    rescaled to the norm of the tensor it moves. So a step moves each tensor by lr of its norm, unless that is 0."""

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-4):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self) -> None:
        """One step for every parameter that has a gradient, which is used up: its memory holds the direction then."""
        for group in self.param_groups:
            group["step"] += 1
            beta1, beta2 = group["betas"]
            correction1, root2 = 1.0 - beta1 ** group["step"], (1.0 - beta2 ** group["step"]) ** 0.5
            for p in (p for p in group["params"] if p.grad is not None):  # [11]
                if not self.state[p]:
                    self.state[p] = dict(m=torch.zeros_like(p), v=torch.zeros_like(p))
                m, v, direction = self.state[p]["m"], self.state[p]["v"], p.grad
                m.lerp_(p.grad, 1.0 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1.0 - beta2)
                # Adam's: m / correction1 over sqrt(v / correction2) + eps
                torch.sqrt(v, out=direction).add_(root2 * group["eps"])
                torch.div(m, direction, out=direction).mul_(root2 / correction1).add_(p, alpha=group["weight_decay"])
                p_norm, norm = p.norm(), direction.norm()
                trust = torch.where((p_norm > 0) & (norm > 0), p_norm / norm, 1.0)  # a zero tensor: a plain step
                p.addcmul_(direction, -group["lr"] * trust)


def masked_mean(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean over the real tokens: values and real of one shape."""
    return (values * real).sum() / real.sum()


def distribution(model: DecisionTransformer, sub, returns: torch.Tensor) -> SquashedGaussian:
    """The policy (B, L, A) at each step of `sub`, from the very window that the rollout saw. sub: observations, actions
    and real, as `returns` (B, K - 1 + L, ...), and u (B, L, A)."""
    batch, length, _ = sub.u.shape
    fields = (sub.observations, returns, sub.actions, sub.real)
    observations, g, actions, real = (windows(field, sub.real.shape[1] - length + 1) for field in fields)
    dist, _ = model(observations, g, actions[:, :-1], real)  # B L windows of K steps
    return SquashedGaussian(*(x[:, -1].reshape(batch, length, -1) for x in (dist.mean, dist.log_std)))


def importance_ratio(log_ratio: torch.Tensor, real: torch.Tensor, args: Args) -> torch.Tensor:
    """pi(tau) / pi_old(tau) of each sub-trajectory (B, 1), or of each step (B, L) under --token-ratio."""
    log_ratio = log_ratio * real
    if not args.token_ratio:
        log_ratio = log_ratio.sum(1, keepdim=True)  # a sum over the sub-trajectory, Eq. 3; its mean in Fig. 2e
        if args.geometric_mean:
            log_ratio = log_ratio / real.sum(1, keepdim=True)
    return log_ratio.clamp(-20.0, 20.0).exp()  # departure (2)


def grpo_loss(
    model: DecisionTransformer, reference: DecisionTransformer, sub: SubTrajectories, kappa: torch.Tensor, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Minus Eq. 3 and minus the entropy term kappa H; and the values to log."""
    real = sub.real[:, -sub.u.shape[1] :]  # (B, L)
    dist = distribution(model, sub, sub.new_returns)
    ratio = importance_ratio(dist.log_prob(sub.u) - sub.old_log_prob, real, args)  # (B, 1 or L)
    advantage = sub.advantage[:, None]  # (B, 1)
    clipped = ratio.clamp(1.0 - args.epsilon, 1.0 + args.epsilon)
    surrogate = torch.min(ratio * advantage, clipped * advantage)  # Eq. 3
    weight = real / real.sum(1, keepdim=True) if args.token_ratio else torch.ones_like(ratio)  # Eq. 1's 1/|o|
    surrogate = (surrogate * weight).sum(1).mean()
    with torch.no_grad():
        reference_dist = distribution(reference, sub, sub.new_returns)
    laws = [torch.distributions.Normal(d.mean, d.log_std.exp(), validate_args=False) for d in (dist, reference_dist)]
    kl = masked_mean(torch.distributions.kl_divergence(*laws).sum(-1), real)  # before tanh, which changes nothing
    entropy = masked_mean(dist.entropy(torch.randn_like(dist.mean)), real)
    loss = -(surrogate - args.beta * kl + kappa * entropy)  # Eq. 3 and the entropy constraint's Lagrangian
    counted = real if args.token_ratio else torch.ones_like(ratio)
    values = {"ratio_mean": masked_mean(ratio, counted), "ratio_max": ratio.max(), "kl": kl, "entropy": entropy}
    return loss, values | {"surrogate": surrogate, "clip_fraction": masked_mean((clipped != ratio).float(), counted)}


class GRPOLearner:
    """Network, reference, optimisers, entropy dual and buffer: all that an iteration's updates change."""

    def __init__(self, model: DecisionTransformer, args: Args):
        self.model, self.args, self.updates = model.eval(), args, 0  # no dropout in finetuning (Table 5)
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = Lamb(model.parameters(), args.lr, weight_decay=args.weight_decay)
        log_kappa = torch.tensor(math.log(args.kappa_initial), device=model.obs_mean.device)
        self.log_kappa = log_kappa.requires_grad_()
        self.dual = torch.optim.Adam([self.log_kappa], lr=args.kappa_lr)
        self.buffer: SubTrajectories | None = None

    @torch.no_grad()
    def remember(self, groups: Groups, advantages: np.ndarray, keep: np.ndarray) -> None:
        """Line 8: the members that stay enter the buffer, the first ones in it leave."""
        args, index = self.args, np.flatnonzero(keep)
        if not len(index):
            print(f"nothing kept: no member is further than Delta_r = {args.delta_r} from its group's mean", flush=True)
            return
        for part in np.split(index, range(args.n_batch, len(index), args.n_batch)):
            new = groups.sub.take(torch.from_numpy(part).to(groups.sub.u.device))
            new.advantage.copy_(torch.from_numpy(advantages[part]))
            # departure (5): by the update's own forward, so that before the first step the ratio is 1
            new.old_log_prob.copy_(distribution(self.model, new, new.returns).log_prob(new.u))
            fields = zip(self.buffer, new) if self.buffer else zip(new)
            self.buffer = SubTrajectories(*(torch.cat(field)[-args.buffer_size :] for field in fields))

    def update(self, iteration: int) -> dict[str, float]:
        """Line 9: minibatches drawn uniformly from the buffer, a gradient step each; means of the values to log."""
        if not self.buffer:
            return {}
        args, logged = self.args, []
        rng = np.random.default_rng(stream(args.seed, iteration, "minibatches"))
        torch.manual_seed(stream(args.seed, iteration, "entropy"))
        for _ in range(args.n_minibatches):
            if self.updates % args.reference_every == 0:
                self.reference.load_state_dict(self.model.state_dict())
            index = torch.from_numpy(rng.integers(len(self.buffer.u), size=args.n_batch)).to(self.buffer.u.device)
            kappa = self.log_kappa.exp()
            loss, values = grpo_loss(self.model, self.reference, self.buffer.take(index), kappa.detach(), args)
            self.optimizer.zero_grad()
            loss.backward()
            values["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            self.optimizer.step()
            # [12] The dual of H >= rho, rho = -dim A: min over kappa >= 0 of kappa (H - rho)
            self.dual.zero_grad()
            (kappa * (values["entropy"].detach() + self.model.act_dim)).backward()
            self.dual.step()
            self.updates += 1
            values |= {"loss": loss, "kappa": kappa}
            logged.append(torch.stack([values[name].detach() for name in LOSSES]))
        table = torch.stack(logged).cpu()  # the only wait for the device
        losses = dict(zip(LOSSES, table.mean(0).tolist()))
        losses["ratio_max"] = table[:, LOSSES.index("ratio_max")].max().item()
        losses["ratio_first"] = table[0, LOSSES.index("ratio_mean")].item()
        if not all(map(math.isfinite, losses.values())):
            die(f"the loss is not finite in iteration {iteration} ({losses}): lower --lr; the last checkpoint is kept.")
        return {f"losses/{name}": value for name, value in losses.items()}

    def size(self) -> int:
        """Sub-trajectories in the buffer."""
        return len(self.buffer.u) if self.buffer else 0

    def state(self) -> dict:
        """What, beside the weights, a resumed run needs."""
        parts = {"optimizer": self.optimizer.state_dict(), "dual": self.dual.state_dict(), "updates": self.updates}
        parts |= {"log_kappa": self.log_kappa.detach(), "reference": self.reference.state_dict()}
        return parts | {"buffer": list(self.buffer) if self.buffer is not None else None}

    def load_state(self, state: dict) -> None:
        """Go on from what `state` gave; the weights are in the model already."""
        self.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.dual.load_state_dict(state["dual"])
        self.log_kappa.data.copy_(state["log_kappa"])
        self.reference.load_state_dict(state["reference"])
        device = self.log_kappa.device
        self.buffer = SubTrajectories(*(f.to(device) for f in state["buffer"])) if state["buffer"] else None


# ---------------------------------------------------------------------------------------------------------------------
# 8. The run
# ---------------------------------------------------------------------------------------------------------------------

EVALUATION = ("eval/return_mean", "eval/return_std", "eval/length_mean", "eval/distance_mean", "eval/normalized_score")
LOSSES = ("loss", "surrogate", "ratio_mean", "ratio_max", "clip_fraction", "kl", "entropy", "kappa", "grad_norm")
METRICS = ["iteration", "charts/env_steps", "charts/SPS", "charts/gradient_updates", "charts/buffer"]
METRICS += ["charts/env_steps_full", "charts/env_steps_sub", "charts/env_steps_eval", *EVALUATION]
METRICS += ["rollout/return", "rollout/length", "rollout/sub_score", "rollout/group_std", "rollout/kept"]
METRICS += ["rollout/ended_early", *(f"losses/{name}" for name in (*LOSSES, "ratio_first"))]
METRICS += ["time/iteration", "time/collect", "time/simulate", "time/infer", "time/update", "time/eval"]
CONSOLE = ("eval/return_mean", "rollout/return", "rollout/kept", "losses/ratio_first", "losses/ratio_max")
CONSOLE += ("losses/clip_fraction", "losses/entropy", "charts/SPS")


def die(message: str) -> NoReturn:
    """End with one line on stderr and exit code 1."""
    raise SystemExit("error: " + re.sub(r"\s*\n\s*", " ", message))


def stream(seed: int, iteration: int, purpose: str) -> int:
    """The seed of one random stream: the same for the same (seed, iteration, purpose), so nothing needs saving."""
    sequence = np.random.SeedSequence([seed, iteration, zlib.crc32(purpose.encode())])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))  # 63 bits: what torch takes


def write_file(path: Path, content: bytes) -> None:
    """Written beside `path`, then renamed: whenever the process dies, `path` is whole, the old one or the new."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        die(f"cannot write {path}: {error.strerror}; what stood there before is kept. Make room, then go on.")


def save_checkpoint(path: Path, content: dict) -> None:
    """Plain types and tensors, so that torch.load(weights_only=True) reads them."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of any script here, on the CPU. Exits with a line if it is missing, damaged or foreign."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        die(f"checkpoint {path} not found: give the folder of a run, or the checkpoint.pt in it.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not {"script", "iteration", "sizes", "weights", "args", "env_id", "env_kwargs", "g_eval"} <= content.keys():
            raise KeyError
    except Exception:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError and more
        die(f"{path} is damaged, or no checkpoint of these scripts: take another.")
    return content


def load_model(content: dict, dropout: float = 0.0) -> DecisionTransformer:
    """The network of a checkpoint, with the statistics of its observations and the scale of its returns."""
    try:
        model = DecisionTransformer(**content["sizes"], dropout=dropout)
        model.load_state_dict(content["weights"])
    except (TypeError, RuntimeError):
        die(f"the checkpoint's weights do not fit its sizes {content['sizes']}: take another.")
    return model


def set_up_torch(args) -> tuple[torch.device, torch.dtype]:
    """Threads, the device of --device, and bf16 for matrix products if --bf16 and the device has units for it."""
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        die("--device cuda, but torch sees no GPU: use --device cpu, or install a CUDA build of torch.")
    if args.device != "cpu" and torch.cuda.is_available():
        device, units = torch.device("cuda"), torch.cuda.get_device_capability()[0] >= 8
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        device, units = torch.device("cpu"), any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return device, torch.bfloat16 if args.bf16 and units else torch.float32


def parse_args(arguments: list[str] | None = None) -> Args:
    """The command line. With --resume or --eval-only, the checkpoint's arguments are the defaults."""
    args = tyro.cli(Args, args=arguments)
    if args.resume and args.eval_only:
        die("--resume goes on with a run, --eval-only only evaluates: give one of them.")
    path = args.resume or args.eval_only
    if path is None:
        return args
    content, known = load_checkpoint(Path(path)), {field.name for field in dataclasses.fields(Args)}
    if args.resume and content["script"] != Path(__file__).stem:
        die(f"{path} is a run of {content['script']}.py: resume it with that script.")
    saved = Args(**{name: value for name, value in content["args"].items() if name in known})
    if args.eval_only:
        saved = dataclasses.replace(saved, g_eval=content["g_eval"], device="auto", capture_video=False)
    args = tyro.cli(Args, args=arguments, default=saved)
    fixed = {"env_id"} if args.eval_only else known - {"updates", "iterations", "device", "track", "resume"}
    for name in sorted(fixed):
        old, new, flag = getattr(saved, name), getattr(args, name), "--" + name.replace("_", "-")
        if old != new:
            die(f"{path} was made with {flag} {old}, not {new}: leave {flag} out, or start a run of its own.")
    return args


MAY_BE_ZERO = (
    "seed dropout weight_decay kappa_lr return_loss_weight beta delta_r l_eval gae_lambda value_warmup critic_warmup "
    "target_noise"
)
MAY_BE_NEGATIVE = "g_eval g_online"


def check_args(args) -> None:
    """Exits with a line on values that cannot work, before anything is written."""
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not math.isfinite(value):
            die(f"{flag} is {value}: give a finite number.")
        zero, negative = name in MAY_BE_ZERO.split(), name in MAY_BE_NEGATIVE.split()
        if number and not (value > 0 or negative or (value == 0 and zero)):
            die(f"{flag} is {value}: give one above 0.")
        if name in ("dropout", "expectile") and value >= 1.0:
            die(f"{flag} is {value}: give a number below 1.")
        package = {"track": "wandb", "capture_video": "moviepy"}.get(name)
        if package and value and importlib.util.find_spec(package) is None:
            die(f"{flag} needs {package}: pip install {package}.")


class RunLog:
    """metrics.csv and TensorBoard under the same names, args.json beside them, wandb behind --track."""

    def __init__(self, run_dir: Path, columns: list[str], args, saved: dict | None = None):
        """saved: the checkpoint that a resumed run goes on from; what was written after it is cut off."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.csv"
        lines = path.read_text().splitlines(keepends=True)[: 1 + saved["rows"]] if saved else [",".join(columns) + "\n"]
        if lines[0].strip() != ",".join(columns):
            die(f"{path} has other columns than this version writes: start a new run from its checkpoint.")
        write_file(path, "".join(lines).encode())
        packages = ("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "minari")
        versions = {name: importlib.metadata.version(name) for name in packages}
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        content = json.dumps({"args": vars(args), "versions": versions, "commit": commit}, indent=2)
        write_file(run_dir / "args.json", content.encode())
        if args.track:
            import wandb

            wandb.init(project="online-dt-rl", name=run_dir.name, config=vars(args), sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter

        self.rows, self.file = len(lines) - 1, open(path, "a", newline="")
        self.table = csv.DictWriter(self.file, columns, lineterminator="\n")
        self.writer = SummaryWriter(str(run_dir), purge_step=0)
        for row in csv.DictReader(lines):  # what is kept, anew: events of a killed process may be lost
            for name in (name for name in columns[1:] if row[name]):
                self.writer.add_scalar(name, float(row[name]), int(row["iteration"]))

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """A row; names that are not in `values`, and values that are NaN, stay empty."""
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        self.table.writerow({"iteration": iteration} | values)
        self.file.flush()
        self.rows += 1
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self.file.close()
        self.writer.flush()  # raises what TensorBoard's thread met; close() would not
        self.writer.close()


def choose_run_dir(args) -> Path:
    """The folder of this run, yet to be made. Exits with a line rather than mix two runs in one folder."""
    name = f"{args.env_id}__{Path(__file__).stem}__{args.dataset_kind}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{name.replace('/', '_')}")
    run_dir = run_dir.parent if run_dir.is_file() else run_dir  # --resume RUN_DIR/checkpoint.pt
    if not args.resume and (run_dir / "checkpoint.pt").exists():
        die(f"{run_dir} holds a run already: go on with --resume {run_dir}, or choose another --run-dir.")
    return run_dir


def make_eval_envs(args, env_kwargs: dict, video_dir: Path) -> list[gym.Env]:
    """One environment per evaluation episode; the first one films itself if --capture-video."""
    modes = ["rgb_array" if args.capture_video else None, *[None] * (args.eval_episodes - 1)]
    envs = [make_env(args.env_id, env_kwargs, mode) for mode in modes]
    if args.capture_video:
        try:
            envs[0].reset()
            envs[0].render()
            envs[0] = gym.wrappers.RecordVideo(envs[0], str(video_dir), episode_trigger=lambda episode: True)
        except Exception as error:  # moviepy missing, no GL library, no display: each raises its own
            die(f"cannot film {args.env_id}: {error}. It needs moviepy and a GL library (MUJOCO_GL=egl).")
    return envs


def run_evaluation(args, model: DecisionTransformer, envs: list[gym.Env], iteration: int) -> dict[str, float]:
    """Evaluate, print the outcome and return the eval/ columns of metrics.csv. The same (seed, iteration) plays the
    same episodes, so a saved model scores what it scored in memory."""
    begun, seeds = time.time(), [stream(args.seed, iteration, f"evaluation {i}") for i in range(len(envs))]
    returns, lengths, distances = evaluate(model, envs, args.g_eval, args.c_online, seeds)
    values = (returns.mean(), returns.std(), lengths.mean(), distances.mean())
    row = dict(zip(EVALUATION, map(float, (*values, normalized_score(args.env_id, values[0])))))
    shown = [f"{name.removeprefix('eval/')} {value:,.1f}" for name, value in row.items() if not math.isnan(value)]
    print(f"evaluation: {', '.join(shown)} ({len(envs)} episodes, g = {args.g_eval:,.0f})", flush=True)
    return row | {"time/eval": time.time() - begun}


def eval_only(args) -> None:
    """Evaluate the checkpoint --eval-only; nothing is written but the film."""
    check_args(args)
    content, (device, dtype) = load_checkpoint(Path(args.eval_only)), set_up_torch(args)
    model, folder = load_model(content).use_precision(dtype).to(device), Path(args.eval_only)
    envs = make_eval_envs(args, content["env_kwargs"], (folder if folder.is_dir() else folder.parent) / "videos")
    run_evaluation(args, model, envs, content["iteration"])
    for env in envs:
        env.close()


def pretrained_on_random(args: Args) -> Path:
    """The checkpoint that is used where --pretrained is left out: pretrain_dt.py, run once on random data of this
    environment for this width, kept under runs/pretrained: minutes on two cores at any width."""
    key = row_of(args.env_id, args.dataset_kind or "random")
    context = args.c_online or (ROWS[key][COLUMNS.index("c_online")] if key else 1)
    updates = 900  # [17]
    name = f"{args.env_id.replace('/', '_')}__{args.embed_dim}__c{context}__u{updates}__{args.seed}"
    target = Path(f"runs/pretrained/{name}")
    print(f"no --pretrained given: taking {target}, pretrained on random data", flush=True)
    if (target / "checkpoint.pt").exists():
        return target
    own = target.with_name(f"{target.name}.{os.getpid()}")  # parallel runs make their own, the first one stays
    flags = dict(env_id=args.env_id, embed_dim=args.embed_dim, seed=args.seed, device=args.device, run_dir=own)
    # a context of c_online and small minibatches at a large rate: quick, and groups whose members differ
    flags |= dict(c_offline=context, c_online=context, batch_size=max(1, 128 // (3 * context - 1)))
    flags |= dict(updates=updates, lr=1e-3, dataset_steps=30_000)
    flags |= {"threads": args.threads} if args.threads else {}
    command = [sys.executable, str(Path(__file__).with_name("pretrain_dt.py")), "--bf16" if args.bf16 else "--no-bf16"]
    command += [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if subprocess.run(command, env=environment).returncode:
        die("pretraining on random data failed, see above: mend it, or give --pretrained.")
    try:
        own.rename(target)
    except OSError:  # another run was faster
        shutil.rmtree(own)
    return target


def start(args: Args) -> tuple[dict, dict | None]:
    """The checkpoint to begin with, and the same once more if it is a run that goes on. Fills `args` from the table."""
    check_args(args)
    choose_run_dir(args)  # an occupied one is refused before minutes of pretraining
    saved = load_checkpoint(Path(args.resume)) if args.resume else None
    base = saved or load_checkpoint(Path(args.pretrained or pretrained_on_random(args)))
    if base["env_id"] != args.env_id:
        die(f"{args.pretrained} was pretrained in {base['env_id']}, not in {args.env_id}: give the one or the other.")
    args.embed_dim = base["sizes"]["embed_dim"]
    line = fill_from_table(args, base["dataset_kind"], base["dataset_best_return"])
    if saved and saved["iteration"] > args.iterations:
        die(f"{args.resume} is at iteration {saved['iteration']}: give --iterations {saved['iteration']} or more.")
    print(line, flush=True)
    return base, saved


def run_facts(base: dict, args: Args, dtype: torch.dtype) -> dict:
    """What every checkpoint of a run says beside weights and state: plain types, for whoever resumes or evaluates."""
    facts = {key: base[key] for key in ("sizes", "env_id", "env_kwargs", "dataset", "dataset_best_return")}
    facts |= dict(script=Path(__file__).stem, dataset_kind=args.dataset_kind, precision=str(dtype))
    return facts | dict(g_eval=args.g_eval, c_online=args.c_online, args=vars(args) | {"resume": None})


def check_flags(args: Args) -> None:
    """Exits with a line on flags that do not go together or with the environment; fills in --full-trajectories."""
    exclusive = [("full_trajectories", "mixed_groups"), ("full_trajectories", "random_points")]
    for one, other in [*exclusive, ("token_ratio", "geometric_mean")]:
        if getattr(args, one) and getattr(args, other):
            die(f"--{one} and --{other} exclude each other: give one.".replace("_", "-"))
    if args.group_size < 2:
        die(f"--group-size is {args.group_size}: an advantage is relative to a group, give 2 or more.")
    if args.resume:
        return
    env = make_env(args.env_id)
    make_pool(env, 1, 1)  # what can't be reset is refused before minutes of pretraining
    if args.full_trajectories:
        if (args.l_traj, args.l_eval) != (None, None):
            die("--full-trajectories sets L_traj and L_eval: leave --l-traj and --l-eval out.")
        args.l_traj, args.l_eval = env.spec.max_episode_steps, 0
    env.close()


def row_of_iteration(
    episodes: list[Trajectory], groups: Groups, keep: np.ndarray, steps: dict[str, int], clock: list[float], args: Args
) -> dict[str, float]:
    """The rollout/ columns of metrics.csv, environment steps and times; adds this iteration's steps to `steps`."""
    steps["full"] += sum(len(episode.rewards) for episode in episodes)
    steps["sub"] += groups.env_steps
    collected, rolled, updated = np.diff(clock).tolist()
    return {
        "rollout/return": np.mean([episode.rewards.sum() for episode in episodes]).item(),
        "rollout/length": np.mean([len(episode.rewards) for episode in episodes]).item(),
        "rollout/sub_score": groups.scores.mean().item(),
        "rollout/group_std": groups.scores.reshape(-1, args.group_size).std(1).mean().item(),
        "rollout/kept": keep.mean().item(),
        "rollout/ended_early": (groups.lengths < args.l_traj + args.l_eval).mean().item(),
        "charts/env_steps": steps["full"] + steps["sub"],
        **{f"charts/env_steps_{source}": count for source, count in steps.items()},
        "charts/SPS": groups.env_steps / rolled,
        "time/collect": collected,
        "time/simulate": groups.seconds,
        "time/infer": rolled - groups.seconds,
        "time/update": updated,
        "time/iteration": time.time() - clock[0],
    }


def main(args: Args) -> Path:
    """Algorithm 1; returns the run's folder."""
    check_flags(args)
    base, saved = start(args)
    device, dtype = set_up_torch(args)
    envs = [make_env(args.env_id, base["env_kwargs"]) for _ in range(max(args.n_sources, args.n_trajectories))]
    size = args.n_sources * args.n_points * args.group_size
    pool = make_pool(make_env(args.env_id, base["env_kwargs"]), size, args.threads)
    model = load_model(base).use_precision(dtype).to(device)
    learner, iteration, steps, replay = GRPOLearner(model, args), 0, dict(full=0, sub=0, eval=0), []
    if saved:
        if saved["precision"] != str(dtype):
            die(f"the run began in {saved['precision']}, here it is {dtype}: use a device like it.")
        learner.load_state(saved["learner"])
        iteration, steps = saved["iteration"], saved["steps"]
        replay = [Trajectory(*(field.numpy() for field in each)) for each in saved["replay"]]
    facts, run_dir = run_facts(base, args, dtype), choose_run_dir(args)
    eval_envs = make_eval_envs(args, base["env_kwargs"], run_dir / "videos")
    log = RunLog(run_dir, METRICS, args, saved)
    print(f"{device.type}, {args.threads} threads, {dtype}, {size} sub-trajectories, in {run_dir}", flush=True)
    if not saved:  # the pretrained policy, before any update
        log.write(0, run_evaluation(args, model, eval_envs, 0))

    first, begun = iteration, time.time()
    while iteration < args.iterations:
        iteration, clock = iteration + 1, [time.time()]
        policy, count = rollout_copy(model), args.n_trajectories if replay else len(envs)  # departure (8)
        episodes = collect(policy, envs[:count], args, iteration)  # line 2
        replay = [*replay, *episodes][-args.replay_size :]
        clock.append(time.time())
        points = choose_points(policy, replay, args, iteration)  # lines 3-5
        groups = rollout_groups(policy, pool, points, args, iteration)  # line 6
        clock.append(time.time())
        advantages, keep = group_advantages(groups.scores, args.group_size, args.delta_r)  # line 7
        learner.remember(groups, advantages, keep)  # line 8
        row = learner.update(iteration)  # line 9
        clock.append(time.time())
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            row |= run_evaluation(args, model, eval_envs, iteration)
            steps["eval"] += round(row["eval/length_mean"] * args.eval_episodes)
        row |= {"charts/gradient_updates": learner.updates, "charts/buffer": learner.size()}
        row |= row_of_iteration(episodes, groups, keep, steps, clock, args)
        log.write(iteration, row)
        left = (args.iterations - iteration) * (time.time() - begun) / (iteration - first) / 60
        shown = "  ".join(f"{name} {row[name]:,.4g}" for name in CONSOLE if name in row)
        print(f"iteration {iteration}/{args.iterations}  {shown}  {left:.0f} min left", flush=True)
        content = dict(iteration=iteration, rows=log.rows, steps=steps, weights=model.state_dict())
        content |= dict(learner=learner.state(), replay=[[torch.from_numpy(f) for f in each] for each in replay])
        save_checkpoint(run_dir / "checkpoint.pt", facts | content)
    log.close()
    for env in [*envs, *eval_envs]:
        env.close()
    print(f"checkpoint: {run_dir / 'checkpoint.pt'}", flush=True)
    return run_dir


if __name__ == "__main__":
    if any(word.replace("_", "-") == "--capture-video" for word in sys.argv) and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is first imported
    threading.excepthook = lambda failure: None  # TensorBoard's thread: the next write raises its error again, here
    try:
        arguments = parse_args()
        eval_only(arguments) if arguments.eval_only else main(arguments)
    except SystemExit as stop:  # tyro's code for bad usage is 2
        raise SystemExit(1 if stop.code == 2 else stop.code) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: a run goes on from its last checkpoint with --resume RUN_DIR") from None
    except OSError as error:
        die(f"{error}: what was written before is kept; once that is mended, go on with --resume RUN_DIR.")
