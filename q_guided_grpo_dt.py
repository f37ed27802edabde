"""Q-guided GRPO-DT: GRPO-DT for environments that can't be reset to a state. A critic scores groups of actions.

  "Online Finetuning Decision Transformers with Pure RL Gradients" (Luo & Zhu), Section 3.3.1, Appendix B.1
  1. roll out a trajectory at return-to-go g_online                                      (Algorithm 1, line 2)
  2. train a twin critic Q1, Q2 as TD3 does, on the offline data and all that was rolled out since
  3. draw trajectories in proportion to length, steps (s, g) where the policy is uncertain        (lines 3, 5)
  4. at each, a group of G candidate actions of the current policy; score: min(Q1, Q2)           (for line 6)
  5. advantage: the score relative to its group (Eq. 2); buffer of candidates                     (lines 7, 8)
  6. clipped policy gradient on the importance ratio of the one action (Eq. 3)                    (line 9)

Departures from the paper (docs/q_guided_grpo_dt.md explains each under the same number):
  (1) the mean action is tanh(mean), the median of the squashed Gaussian, not its expectation: ODT does the same
  (2) the log-ratio of an action is kept within +-20 before exp, so that no ratio overflows
  (3) old log-probabilities are computed by the update's own forward when a candidate enters the buffer
  (4) TD3's delay: the critic's updates come in a block before the policy's, so it only paces the target networks
  (5) target actions are sampled, in rollouts under the stored return-to-go; ODT+TD3's actor does neither
  (6) the last transition of an offline trajectory that a time limit ended is left out: its next state is not read
  (7) matrix products in bf16 where the hardware has units for it; residual stream, norms, heads, losses in fp32
  (8) D4RL's rules are put back where gymnasium-robotics 1.4.2 differs (docs/datasets.md)
  (9) the first iteration rolls out as many full trajectories as it draws, not one, so that the replay is not one fall

Small:   python q_guided_grpo_dt.py --env-id Hopper-v5 --embed-dim 128 --tau 0.05 --critic-warmup 2000 --iterations 30
In full: python q_guided_grpo_dt.py --env-id Hopper-v5 --pretrained runs/NAME/checkpoint.pt
"""

import contextlib
import copy
import csv
import dataclasses
import importlib.metadata
import importlib.util
import io
import itertools
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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

# Shapes: P points (s, g), G group size, B minibatch, K context, S and A dimensions of observation and action,
#         E embedding width, T steps of a full trajectory, M slots of all transitions, padding included; L = 1 step of
#         a candidate, in section 4 the number of tokens.

# ---------------------------------------------------------------------------------------------------------------------
# 2. Arguments
# ---------------------------------------------------------------------------------------------------------------------

DatasetKind = Literal["random", "medium", "medium-replay", "expert", "human", "cloned", "umaze", "diverse"]


@dataclass
class Args:
    """Finetune a pretrained Decision Transformer by Q-guided GRPO-DT, without resets. A sub-trajectory here is a single
    candidate action, a reset point only the state at which it is drawn. Fields left at None take the paper's row."""

    env_id: str = "Hopper-v5"
    """gymnasium or gymnasium-robotics id of the environment"""
    pretrained: str | None = None
    """checkpoint of pretrain_dt.py to start from [None: one is made from random data, in minutes, and kept]"""
    dataset: str | None = None
    """offline data for the critic: a Minari id, a path ending in .hdf5 (D4RL's layout), or "random": uniformly random
    actions in --env-id [None: what the checkpoint was pretrained on]"""
    dataset_kind: DatasetKind | None = None
    """kind of data, picks the paper's row [None: that of the checkpoint]"""
    dataset_steps: int = 100_000
    """size of the "random" dataset [environment steps]"""
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

    critic_warmup: int = 10_000
    """updates of the critic on the offline data alone, before anything else"""
    critic_updates: int = 300
    """updates of the critic per iteration"""
    critic_batch: int = 256
    """transitions per update of the critic"""
    critic_dim: int | None = None
    """width of the critic's two hidden layers [None: the row]"""
    critic_norm: bool | None = None
    """LayerNorm before the critic's activations [None: the row]"""
    lr_critic: float | None = None
    """learning rate of the critic, of AdamW [None: the row]"""
    policy_delay: int | None = None
    """TD3's delay: the target networks move at every so many updates of the critic [None: the row]"""
    tau: float = 0.005
    """Polyak's tau: the share of the way that a target network moves"""
    target_noise: float = 0.2
    """standard deviation of the noise on target actions [of actions in -1..1]"""
    target_noise_clip: float = 0.5
    """bound of that noise"""
    reward_divisor: float | None = None
    """what rewards are divided by for the critic [raw reward; None: the row]"""

    eval_every: int = 10
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


# Table 6 and Appendix B.1; for the critic ODT+TD3's settings and Table 5. Keys: environment id up to the version, kind
# of data.
COLUMNS = ("n_batch", "c_online", "g_online", "epsilon", "n_trajectories", "delta_r", "lr", "kappa_initial")
COLUMNS += ("gamma", "critic_dim", "critic_norm", "lr_critic", "policy_delay", "reward_divisor")
EVERYWHERE = (0.0, 1e-5, 1e-2)
WALKERS = (*EVERYWHERE, 0.99, 256, False, 1e-3, 2, 1.0)
HANDS = (*EVERYWHERE, 0.99, 512, True, 2e-4, 1, 100.0)
HAMMERS = (*EVERYWHERE, 0.99, 512, True, 2e-4, 1, 1000.0)
MAZES = (*EVERYWHERE, 0.998, 512, True, 2e-4, 1, 1.0)
ROWS = {
    ("Hopper", "medium"): (256, 1, 7200.0, 0.2, 1, *WALKERS),
    ("Hopper", "random"): (256, 1, 7200.0, 0.2, 1, *WALKERS),
    ("Walker2d", "medium"): (256, 1, 10000.0, 0.3, 1, *WALKERS),
    ("Walker2d", "random"): (256, 1, 10000.0, 0.3, 1, *WALKERS),
    ("Ant", "medium"): (256, 1, 12000.0, 0.3, 1, *WALKERS),
    ("Ant", "random"): (256, 1, 12000.0, 0.3, 1, *WALKERS),
    ("AdroitHandDoor", "cloned"): (512, 1, 3000.0, 0.3, 5, *HANDS),
    ("AdroitHandDoor", "human"): (512, 1, 3000.0, 0.3, 5, *HANDS),
    ("AdroitHandPen", "cloned"): (512, 1, 6000.0, 0.3, 5, *HANDS),
    ("AdroitHandPen", "human"): (512, 1, 6000.0, 0.3, 5, *HANDS),
    ("AdroitHandHammer", "cloned"): (512, 5, 4000.0, 0.3, 5, *HAMMERS),
    ("AdroitHandHammer", "human"): (512, 5, 4000.0, 0.3, 5, *HAMMERS),
    ("AntMaze", "umaze"): (256, 1, 2.0, 0.2, 1, *MAZES),
    ("AntMaze", "diverse"): (256, 5, 2.0, 0.2, 1, *MAZES),
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


def unscale_action(action: np.ndarray, env: gym.Env) -> np.ndarray:
    """From the bounds of the environment to the network's [-1, 1]."""
    low, high = env.action_space.low, env.action_space.high
    return 2.0 * (action - low) / (high - low) - 1.0


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


class TwinCritic(nn.Module):
    """Q1(s, a) and Q2(s, a): two MLPs of two hidden layers on the observation, normalised as for the transformer, and
    the action (Table 5). Both run in one batched pass: every weight has a leading dimension of 2."""

    def __init__(self, model: DecisionTransformer, width: int, norm: bool):
        super().__init__()
        sizes = (len(model.obs_mean) + model.act_dim, width, width, 1)
        self.norm, self.weights, self.biases = norm, nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in itertools.pairwise(sizes):
            bound = inputs**-0.5  # that of nn.Linear
            self.weights.append(torch.empty(2, inputs, outputs).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, outputs).uniform_(-bound, bound))
        self.register_buffer("obs_mean", model.obs_mean.clone())
        self.register_buffer("obs_std", model.obs_std.clone())

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Raw observations (B, S) and actions (B, A) in [-1, 1] -> Q1 and Q2 (2, B), discounted reward / divisor."""
        x = torch.cat([(observations - self.obs_mean) / self.obs_std, actions], dim=-1).expand(2, -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)  # (2, B, width)
            if layer < 2:  # [13] LayerNorm before the activation, without weights of its own
                x = F.silu(F.layer_norm(x, x.shape[-1:]) if self.norm else x)
        return x.squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Buffers
# ---------------------------------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """A full trajectory of T steps behind K - 1 steps of padding: step h's window is [h, h + K) of the first four."""

    observations: np.ndarray  # (K - 1 + T, S)
    returns: np.ndarray  # (K - 1 + T,) return-to-go that the action was conditioned on, raw
    actions: np.ndarray  # (K - 1 + T, A) in [-1, 1]
    real: np.ndarray  # (K - 1 + T,) False: padding
    u: np.ndarray  # (T, A) pre-tanh samples: the action is tanh(u)
    rewards: np.ndarray  # (T,)
    last_observation: np.ndarray  # (S,) after the last action
    terminated: np.ndarray  # () True: a true end, False: the time limit


class Transitions(NamedTuple):
    """What the critic learns from, in flat slots: each trajectory of T steps lies behind K - 1 slots of padding and
    before a slot for the state after its last step. So the window that ends with the state after slot i, which the
    target policy sees, is the slots from i + 2 - K to i + 1."""

    observations: torch.Tensor  # (M, S)
    returns: torch.Tensor  # (M,) return-to-go, raw: the stored one of rollouts, the realised one of offline data
    actions: torch.Tensor  # (M, A) in [-1, 1]
    real: torch.Tensor  # (M,) False: padding
    rewards: torch.Tensor  # (M,) raw
    terminated: torch.Tensor  # (M,) True: the step ended its trajectory truly, no reward comes after it
    usable: torch.Tensor  # (M,) True: a step, and its next state is known, or not needed since it terminated


class Candidates(NamedTuple):
    """Actions drawn at the last step of a window of K steps: sub-trajectories of one step, windows as in Episode."""

    observations: torch.Tensor  # (B, K, S)
    returns: torch.Tensor  # (B, K) raw
    actions: torch.Tensor  # (B, K, A) the last of them, which the rollout took, is not read
    real: torch.Tensor  # (B, K) False: padding
    u: torch.Tensor  # (B, 1, A) pre-tanh samples: the candidate is tanh(u)
    old_log_prob: torch.Tensor  # (B, 1)
    advantage: torch.Tensor  # (B, 1)

    def take(self, index: torch.Tensor) -> "Candidates":
        return Candidates(*(field[index] for field in self))


def windows(steps: torch.Tensor, context: int) -> torch.Tensor:
    """Every window of K consecutive steps: (B, K - 1 + L, ...) -> (B L, K, ...)."""
    return steps.unfold(1, context, 1).movedim(-1, 2).flatten(0, 1)


@dataclass
class RawData:
    """A dataset as read: flat arrays of N steps, trajectories end where `terminals` or `timeouts` is True."""

    observations: np.ndarray  # (N, S)
    actions: np.ndarray  # (N, A), in the environment's bounds
    rewards: np.ndarray  # (N,)
    terminals: np.ndarray  # (N,)
    timeouts: np.ndarray  # (N,)


def read_hdf5(path: Path) -> RawData:
    """A file in D4RL's layout. Exits with a line if it is missing, damaged or lacks an array."""
    import h5py

    if not path.is_file():
        die(f"dataset {path} not found: give the path of an .hdf5 file, a Minari id, or random.")
    names = [field.name for field in dataclasses.fields(RawData)]
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in names if name not in file]
            if missing:
                die(f"{path} lacks {', '.join(missing)}: D4RL's layout has the arrays {', '.join(names)}.")
            return RawData(*(np.asarray(file[name]) for name in names))
    except OSError as error:
        die(f"cannot read {path}: {error}. The file is damaged or no HDF5: copy it again.")


def open_minari(dataset_id: str):
    """The Minari dataset, from this machine or else downloaded. Exits with a line that says what went wrong."""
    import minari
    from minari.storage.datasets_root_dir import get_dataset_path

    if not re.fullmatch(r"[-\w/]+-v\d+", dataset_id):
        die(f'"{dataset_id}" is no dataset: give a Minari id (mujoco/hopper/medium-v0), an .hdf5 path, or random.')
    try:
        if get_dataset_path(dataset_id).exists():
            return minari.load_dataset(dataset_id)
        print(f"Minari dataset {dataset_id} is not on this machine: asking for it ...", flush=True)
        remote = minari.list_remote_datasets(prefix=dataset_id.rsplit("-v", 1)[0])
        size = remote.get(dataset_id, {}).get("dataset_size", "unknown")
        print(f"downloading {dataset_id}, {size} MB, to {get_dataset_path(dataset_id)}", flush=True)
        return minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # Minari raises ValueError, FileNotFoundError, bare connection errors and more
        die(f"cannot get the Minari dataset {dataset_id}: {error}. Check the id and the network.")


def read_minari(dataset_id: str) -> RawData:
    """A Minari dataset as flat arrays. An episode is a trajectory, whether or not its last step bears a flag; it holds
    one more observation than steps, which is left out."""
    episodes = list(open_minari(dataset_id).iterate_episodes())
    observations = [flatten_observation(episode.observations) for episode in episodes]
    if any(len(obs) != len(episode) + 1 for obs, episode in zip(observations, episodes)):
        die(f"{dataset_id} has episodes without their last observation (T instead of T + 1): collect it again.")
    lasts = np.cumsum([len(episode) for episode in episodes]) - 1
    raw = RawData(
        observations=np.concatenate([obs[:-1] for obs in observations]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        terminals=np.concatenate([episode.terminations for episode in episodes]),
        timeouts=np.concatenate([episode.truncations for episode in episodes]),
    )
    raw.timeouts[lasts] |= ~raw.terminals[lasts]
    return raw


def collect_random(env: gym.Env, steps: int, seed: int) -> RawData:
    """`steps` steps of uniformly random actions. D4RL's "random" sets come from an untrained policy instead."""
    rng, rows, start, last = np.random.default_rng(stream(seed, 0, "random actions")), [], time.time(), time.time()
    observation, _ = env.reset(seed=stream(seed, 0, "random episodes"))
    while len(rows) < steps:
        action = rng.uniform(env.action_space.low, env.action_space.high)
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else following
        if time.time() - last > 5.0 or len(rows) == steps:
            last = time.time()
            rate = len(rows) / (last - start)
            print(f"random data {len(rows):,}/{steps:,} steps, {rate:,.0f} steps/s", flush=True)
    return RawData(*(np.array(column) for column in zip(*rows)))


def cut_trajectories(raw: RawData, task: str, drop_last: bool = False) -> list[slice]:
    """Where the finished trajectories lie: cut after terminals and timeouts, an unfinished last one dropped.

    AntMaze: where the data goes on after the goal, a trajectory ends at its first success; 1-step ones are removed.
    `drop_last` also drops the last finished one.
    """
    ends = np.flatnonzero(raw.terminals.astype(bool) | raw.timeouts.astype(bool)) + 1
    pieces = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends)]
    if task == "AntMaze":
        first = [np.flatnonzero(raw.rewards[piece] >= 1.0)[:1] for piece in pieces]
        pieces = [slice(p.start, p.start + f[0] + 1) if len(f) else p for p, f in zip(pieces, first)]
        pieces = [piece for piece in pieces if piece.stop - piece.start > 1]
    return pieces[:-1] if drop_last else pieces


def check_data(raw: RawData, name: str, env: gym.Env) -> RawData:
    """Exits with a line on NaNs, on arrays of different lengths and on dimensions unlike the environment's."""
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    arrays = {field.name: getattr(raw, field.name) for field in dataclasses.fields(raw)}
    shapes = {key: array.shape for key, array in arrays.items()}
    if [len(shape) for shape in shapes.values()] != [2, 2, 1, 1, 1]:
        die(f"{name} has arrays of shapes {shapes}: (N, S), (N, A) and three times (N,) are needed.")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        die(f"{name} has arrays of different lengths {lengths}: make the dataset again.")
    types = {key: str(array.dtype) for key, array in arrays.items()}
    if any(array.dtype.kind not in "biuf" for array in arrays.values()):
        die(f"{name} has arrays of types {types}: real numbers are needed.")
    if task_of(env.spec.id) == "Ant" and raw.observations.shape[1] == 111 and obs_dim == 27:
        print("D4RL's 111-column ant: kept the first 27, the other 84 (contact forces) are zero in its data")
        raw.observations = raw.observations[:, :27]
    if task_of(env.spec.id) == "AntMaze" and raw.observations.shape[1] == 29:
        die(
            f"{name} is D4RL's 29-column antmaze: it lacks the goal, and its ant (torque, time step) and frame are not "
            "gymnasium-robotics'. Use Minari's D4RL/antmaze/umaze-v1 or umaze-diverse-v1."
        )
    if raw.observations.shape[1] != obs_dim or raw.actions.shape[1] != act_dim:
        hint = "v4 has 27 observations, v5 has 105" if task_of(env.spec.id) == "Ant" else "check --env-id"
        die(
            f"{name} has observations of {raw.observations.shape[1]} and actions of {raw.actions.shape[1]} dimensions, "
            f"{env.spec.id} has {obs_dim} and {act_dim}: {hint}."
        )
    for key, array in arrays.items():
        bad = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
        if len(bad):
            die(f"{name} has a value in {key} that is not finite, first in row {bad[0]:,}: clean or make it again.")
    return raw


def lay_out(context, lengths, observations, returns, actions, rewards, terminated, last=None) -> Transitions:
    """Trajectories of `lengths` (n,) steps, one after the other in observations (N, S), returns (N,), actions (N, A)
    and rewards (N,), as Transitions. terminated (n,): how each ended. last (n, S): the observations after the last
    steps [None: unknown, so the last step of a trajectory that did not terminate is not usable].

    Two trajectories at K = 3, s' the state after the last step:  . . s0 s1 s'  . . s0 s1 s2 s'
    """
    lasts = np.cumsum(lengths) - 1  # (n,) last steps
    slots = np.arange(len(rewards)) + np.repeat(np.arange(len(lengths)) * context, lengths) + context - 1  # (N,)
    total, ends = len(rewards) + context * len(lengths), slots[lasts]  # M, and (n,) the slots of last steps

    def spread(values: np.ndarray, after) -> np.ndarray:
        """values (N, ...) at their slots, `after` in those behind the ends: (M, ...)."""
        out = np.zeros((total, *values.shape[1:]), bool if values.dtype == bool else np.float32)
        out[slots], out[ends + 1] = values, after
        return out

    step, over = np.ones(len(rewards), bool), np.zeros(total, bool)
    over[ends] = terminated
    usable = spread(step, False)
    if last is None:
        usable[ends] = terminated
    fields = [spread(observations, 0.0 if last is None else last)]
    fields += [spread(returns, returns[lasts] - rewards[lasts]), spread(actions, 0.0)]  # [10] g' = g - r
    fields += [spread(step, True), spread(rewards, 0.0), over, usable]
    return Transitions(*map(torch.from_numpy, fields))


def load_offline(args: Args, base: dict, env: gym.Env) -> tuple[Transitions, int]:
    """The dataset named by `args`, or else the one that the checkpoint `base` was pretrained on, which is then written
    into `args`; and its fingerprint, which tells two datasets apart when a run is resumed."""
    given, args.dataset = args.dataset, args.dataset or base["dataset"]
    try:
        if args.dataset == "random":
            raw = collect_random(env, args.dataset_steps, args.seed)
        else:
            raw = read_hdf5(Path(args.dataset)) if args.dataset.endswith(".hdf5") else read_minari(args.dataset)
    except SystemExit as stop:
        if given:
            raise
        die(f"{str(stop).removeprefix('error: ')} The checkpoint was pretrained on it: say where it is by --dataset.")
    raw, task = check_data(raw, args.dataset, env), task_of(args.env_id)
    pieces = cut_trajectories(raw, task)
    if not pieces:
        die(f"{args.dataset} has no finished trajectory: none of its steps is a terminal or timeout. Get more steps.")
    observations, actions, rewards = (
        np.concatenate([field[piece] for piece in pieces]) for field in (raw.observations, raw.actions, raw.rewards)
    )
    lasts = np.array([piece.stop - 1 for piece in pieces])
    terminated = raw.terminals[lasts].astype(bool)
    if task == "AntMaze":  # cut at the goal, where an episode ends, though the data may go on after it
        terminated |= raw.rewards[lasts] >= 1.0
    realised = np.concatenate([raw.rewards[piece][::-1].cumsum(dtype=np.float64)[::-1] for piece in pieces])
    actions = unscale_action(actions, env).clip(-ACTION_LIMIT, ACTION_LIMIT)
    lengths = np.array([piece.stop - piece.start for piece in pieces])
    steps = lay_out(args.c_online, lengths, observations, realised, actions, rewards, terminated)  # departure (6)
    if not steps.usable.any():
        die(f"{args.dataset} has no transition whose next state is known: all trajectories are cut after one step.")
    line = f"{len(lengths):,} trajectories, {terminated.sum():,} of them terminated, {len(rewards):,} steps"
    print(f"offline data of the critic: {args.dataset}, {line}", flush=True)
    fingerprint = 0
    for field in steps:
        fingerprint = zlib.crc32(field.numpy().tobytes(), fingerprint)
    return steps, fingerprint


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
def collect_episodes(
    policy: DecisionTransformer, envs: list[gym.Env], args: Args, iteration: int
) -> tuple[list[Episode], float]:
    """One full trajectory in each of `envs`, side by side, with sampled actions, from g_online; and the seconds of it
    that the environments took."""
    count, seconds = len(envs), 0.0
    seeds = [stream(args.seed, iteration, f"episode {i}") for i in range(count)]
    observations = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])  # (B, S)
    history = History(count, args.c_online, observations.shape[1], policy.act_dim)
    rng = torch.Generator().manual_seed(stream(args.seed, iteration, "actions of full trajectories"))
    g, alive = np.full(count, args.g_online), np.arange(count)
    u, rewards, terminated, over = [], [[] for _ in envs], np.zeros(count, bool), np.zeros(count, bool)
    while len(alive):
        dist = history.act(policy, alive, observations, g)
        noise = torch.randn(count, policy.act_dim, generator=rng)  # [14] for all rows, whoever is still going
        sample = dist.sample(noise[alive].to(policy.obs_mean.device))
        u.append(np.zeros((count, policy.act_dim), np.float32))
        u[-1][alive], history.actions[-1][alive] = sample.cpu().numpy(), squash(sample).cpu().numpy()
        begun = time.time()
        for i in alive:
            action = scale_action(history.actions[-1][i], envs[i])
            observations[i], reward, terminated[i], truncated, _ = envs[i].step(action)
            over[i] = terminated[i] or truncated
            rewards[i].append(reward)
            g[i] -= reward  # [10] not clamped
        seconds += time.time() - begun
        if not (np.isfinite(g).all() and np.isfinite(observations).all()):
            die(f"a reward or observation is not finite in iteration {iteration}: start a new run with another --seed.")
        alive = alive[~over[alive]]
    seen, u = recorded(history, len(u)), np.stack(u, axis=1)  # (B, T, A)
    episodes = []
    for i, each in enumerate(rewards):
        past = [field[i, : args.c_online - 1 + len(each)] for field in seen]
        episodes.append(
            Episode(*past, u[i, : len(each)], np.array(each), observations[i].copy(), np.array(terminated[i]))
        )
    return episodes, seconds


def recorded(history: History, steps: int) -> list[np.ndarray]:
    """Observations, returns, actions and flags of the padding and the first `steps` steps: (B, K - 1 + steps, ...)."""
    fields = (history.observations, history.returns, history.actions, history.real)
    return [np.stack(field[: history.context - 1 + steps], axis=1) for field in fields]


def squash(u: torch.Tensor) -> torch.Tensor:
    """The action of the pre-tanh sample u, inside ODT's limits."""
    return torch.tanh(u).clamp(-ACTION_LIMIT, ACTION_LIMIT)


@torch.no_grad()
def choose_states(policy: DecisionTransformer, replay: list[Episode], args: Args, iteration: int) -> list[torch.Tensor]:
    """Lines 3 and 5: trajectories in proportion to length, with replacement; steps in each by softmax(sigma_h^2). The
    windows (P, K, ...) that end there: observations, returns, actions and which steps are no padding."""
    rng = np.random.default_rng(stream(args.seed, iteration, "points"))
    lengths = np.array([len(episode.rewards) for episode in replay])
    sources = rng.choice(len(replay), size=args.n_sources, p=lengths / lengths.sum())
    seen, variances, chosen = {}, {}, []
    for source in set(sources):
        fields = [torch.from_numpy(field)[None].to(policy.obs_mean.device) for field in replay[source][:4]]
        seen[source] = [windows(field, args.c_online) for field in fields]  # (T, K, ...) each
        variances[source] = action_variances(policy, seen[source])
    for source in sources:
        # [15] Gumbel top-k draws from the softmax without replacement, whatever the logits; short ones repeat
        order = np.argsort(-(variances[source] + rng.gumbel(size=lengths[source])))
        points = np.resize(order[: args.n_points], args.n_points)
        chosen.append([field[torch.from_numpy(points)] for field in seen[source]])
    return [torch.cat(field) for field in zip(*chosen)]


def action_variances(policy: DecisionTransformer, seen: list[torch.Tensor]) -> np.ndarray:
    """sigma_h^2, the mean over dimensions of the policy's variance (before tanh) after each window in `seen`: (T,)."""
    observations, returns, actions, real = seen
    steps, variances = np.arange(len(returns)), []
    for chunk in np.pad(steps, (0, -len(steps) % 256), mode="edge").reshape(-1, 256):  # [16]
        index = torch.from_numpy(chunk)
        dist, _ = policy.act(observations[index], returns[index], actions[index, :-1], real[index])
        variances.append((2.0 * dist.log_std).exp().mean(-1).cpu().numpy())
    return np.concatenate(variances)[: len(steps)]


@torch.no_grad()
def sample_candidates(
    policy: DecisionTransformer, critic: TwinCritic, states: list[torch.Tensor], args: Args, iteration: int
) -> tuple[Candidates, np.ndarray]:
    """In place of line 6: at each of P states a group of G actions of the policy, (P G, ...) in groups of consecutive
    ones, log-probabilities and advantages still zero; and their scores (P G,), raw discounted reward."""
    observations, returns, actions, real = states
    dist, used = policy.act(observations, returns, actions[:, :-1], real)
    returns = torch.cat([returns[:, :-1], used[:, None]], dim=1)  # reinformer: the return that it predicts now
    rng = torch.Generator().manual_seed(stream(args.seed, iteration, "candidate actions"))
    noise = torch.randn(args.group_size, *dist.mean.shape, generator=rng).to(dist.mean.device)
    u = dist.sample(noise).transpose(0, 1).flatten(0, 1)  # (G, P, A) -> (P G, A)
    fields = [each.repeat_interleave(args.group_size, dim=0) for each in (observations, returns, actions, real)]
    scores = critic(fields[0][:, -1], squash(u)).min(0).values * args.reward_divisor  # R(a) = min(Q1, Q2)
    zeros = torch.zeros_like(u[:, :1])
    return Candidates(*fields, u[:, None], zeros, zeros.clone()), scores.cpu().numpy().astype(np.float64)


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


def distribution(model: DecisionTransformer, sub, returns: torch.Tensor) -> SquashedGaussian:
    """The policy (B, L, A) at each step of `sub`, from the very window that the rollout saw. sub: observations, actions
    and real, as `returns` (B, K - 1 + L, ...), and u (B, L, A)."""
    batch, length, _ = sub.u.shape
    fields = (sub.observations, returns, sub.actions, sub.real)
    observations, g, actions, real = (windows(field, sub.real.shape[1] - length + 1) for field in fields)
    dist, _ = model(observations, g, actions[:, :-1], real)  # B L windows of K steps
    return SquashedGaussian(*(x[:, -1].reshape(batch, length, -1) for x in (dist.mean, dist.log_std)))


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Each weight of `target` moves by tau of its way to that of `source`."""
    for moving, goal in zip(target.parameters(), source.parameters(), strict=True):
        moving.lerp_(goal, tau)


@torch.no_grad()
def td_target(
    data: Transitions, index: torch.Tensor, policy: DecisionTransformer, critic: TwinCritic, args: Args
) -> torch.Tensor:
    """r + gamma min(Q1', Q2')(s', a~) of the transitions at the slots `index` (B,), r alone where it terminated: (B,).

    After a time limit the next state counts like any other. a~ is the target policy's, sampled, plus TD3's noise.
    """
    window = index[:, None] + torch.arange(2 - args.c_online, 2, device=index.device)  # (B, K), ends with s'
    observations, returns, actions, real = (field[window] for field in data[:4])
    dist, _ = policy.act(observations, returns, actions[:, :-1], real)  # [18] departure (5)
    noise = args.target_noise * torch.randn_like(dist.mean)
    noise = noise.clamp(-args.target_noise_clip, args.target_noise_clip)  # target smoothing
    action = squash(dist.sample(torch.randn_like(dist.mean))) + noise
    following = critic(observations[:, -1], action.clamp(-ACTION_LIMIT, ACTION_LIMIT)).min(0).values
    rewards = data.rewards[index] / args.reward_divisor  # [19]
    return rewards + args.gamma * ~data.terminated[index] * following


def q_guided_loss(
    model: DecisionTransformer, reference: DecisionTransformer, sub: Candidates, kappa: torch.Tensor, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Minus Eq. 3 for sub-trajectories of one action and minus the entropy term kappa H; and the values to log."""
    dist = distribution(model, sub, sub.returns)
    log_ratio = dist.log_prob(sub.u) - sub.old_log_prob  # (B, 1)
    ratio = log_ratio.clamp(-20.0, 20.0).exp()  # departure (2)
    clipped = ratio.clamp(1.0 - args.epsilon, 1.0 + args.epsilon)
    surrogate = torch.min(ratio * sub.advantage, clipped * sub.advantage).mean()  # Eq. 3
    with torch.no_grad():
        reference_dist = distribution(reference, sub, sub.returns)
    laws = [torch.distributions.Normal(d.mean, d.log_std.exp(), validate_args=False) for d in (dist, reference_dist)]
    kl = torch.distributions.kl_divergence(*laws).sum(-1).mean()  # before tanh, which changes nothing
    entropy = dist.entropy(torch.randn_like(dist.mean)).mean()
    loss = -(surrogate - args.beta * kl + kappa * entropy)  # Eq. 3 and the entropy constraint's Lagrangian
    values = {"ratio_mean": ratio.mean(), "ratio_max": ratio.max(), "kl": kl, "entropy": entropy}
    return loss, values | {"surrogate": surrogate, "clip_fraction": (clipped != ratio).float().mean()}


class QGuidedLearner:
    """Networks, targets, optimisers, entropy dual and buffers: all that an iteration changes."""

    def __init__(self, model: DecisionTransformer, offline: Transitions, args: Args):
        self.model, self.args, self.updates = model.eval(), args, 0  # no dropout in finetuning (Table 5)
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = Lamb(model.parameters(), args.lr, weight_decay=args.weight_decay)
        log_kappa = torch.tensor(math.log(args.kappa_initial), device=model.obs_mean.device)
        self.log_kappa = log_kappa.requires_grad_()
        self.dual = torch.optim.Adam([self.log_kappa], lr=args.kappa_lr)
        torch.manual_seed(stream(args.seed, 0, "weights of the critic"))
        self.critic = TwinCritic(model, args.critic_dim, args.critic_norm).to(model.obs_mean.device)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), args.lr_critic)
        self.target_policy = copy.deepcopy(model).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.critic_steps, self.n_offline = 0, len(offline.real)
        self.transitions = Transitions(*(field.to(model.obs_mean.device) for field in offline))
        self.replay: list[Episode] = []
        self.buffer: Candidates | None = None

    def remember(self, episodes: list[Episode]) -> None:
        """Line 2: the trajectories enter the replay, where the first ones leave, and the critic's data, which grow."""
        args, front = self.args, self.args.c_online - 1
        self.replay = [*self.replay, *episodes][-args.replay_size :]
        lengths = np.array([len(episode.rewards) for episode in episodes])
        seen = [np.concatenate([episode[i][front:] for episode in episodes]) for i in range(3)]
        rewards = np.concatenate([episode.rewards for episode in episodes])
        ends = [np.stack([getattr(each, name) for each in episodes]) for name in ("terminated", "last_observation")]
        self.add_transitions(lay_out(args.c_online, lengths, *seen, rewards, *ends))

    def add_transitions(self, new: Transitions) -> None:
        """Append to the critic's data."""
        device = self.model.obs_mean.device
        self.transitions = Transitions(*(torch.cat([old, more.to(device)]) for old, more in zip(self.transitions, new)))

    def update_critic(self, index: torch.Tensor) -> torch.Tensor:
        """A step of TD3's critic on the transitions at the slots `index`; the values of CRITIC_LOSSES (4,)."""
        target = td_target(self.transitions, index, self.target_policy, self.target_critic, self.args)  # (B,)
        q = self.critic(self.transitions.observations[index], self.transitions.actions[index])  # (2, B)
        loss = ((q - target) ** 2).mean(1).sum()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        self.critic_steps += 1
        if self.critic_steps % self.args.policy_delay == 0:  # departure (4)
            polyak(self.target_critic, self.critic, self.args.tau)
            polyak(self.target_policy, self.model, self.args.tau)
        gap = (q[0] - q[1]).detach().abs().mean()  # large beside the spread of a group: the scores are noise
        return torch.stack([loss.detach(), q.detach().mean(), gap, target.mean()])

    def train_critic(self, iteration: int, updates: int, show_every: int = 0) -> dict[str, float]:
        """Updates of the critic on transitions drawn uniformly from all there are; means of the values to log, and the
        seconds. A progress line at every so many updates [0: none]."""
        begun, usable = time.time(), self.transitions.usable.nonzero()[:, 0]
        rng = np.random.default_rng(stream(self.args.seed, iteration, "transitions"))
        torch.manual_seed(stream(self.args.seed, iteration, "target actions"))
        sums = torch.zeros(len(CRITIC_LOSSES), device=usable.device)
        for update in range(1, updates + 1):
            drawn = torch.from_numpy(rng.integers(len(usable), size=self.args.critic_batch)).to(usable.device)
            values = self.update_critic(usable[drawn])
            sums += values
            if show_every and (update % show_every == 0 or update == updates):
                shown = "  ".join(f"{name} {value:,.4g}" for name, value in zip(CRITIC_LOSSES, values.tolist()))
                rate = update / (time.time() - begun)
                left = (updates - update) / rate / 60
                print(f"critic {update:,}/{updates:,}  {shown}  {rate:.1f} updates/s  {left:.1f} min left", flush=True)
        losses = dict(zip(CRITIC_LOSSES, (sums / max(updates, 1)).tolist()))
        if not all(map(math.isfinite, losses.values())):
            die(f"the critic is not finite in iteration {iteration} ({losses}): begin anew with a lower --lr-critic.")
        return {f"losses/{name}": value for name, value in losses.items()} | {"time/critic": time.time() - begun}

    def add_candidates(self, iteration: int) -> dict[str, float]:
        """Lines 3 to 8: states of the replay, a group of actions at each, their advantages; those that stay enter the
        buffer, the first ones in it leave. Returns the columns of metrics.csv about them."""
        args, policy = self.args, rollout_copy(self.model)
        states = choose_states(policy, self.replay, args, iteration)  # lines 3 and 5
        new, scores = sample_candidates(policy, self.critic, states, args, iteration)  # Section 3.3.1
        advantages, keep = group_advantages(scores, args.group_size, args.delta_r)  # line 7
        new.advantage.copy_(torch.from_numpy(advantages)[:, None])
        index = np.flatnonzero(keep)
        if not len(index):
            print(f"nothing kept: no member is further than Delta_r = {args.delta_r} from its group's mean", flush=True)
        for part in np.split(index, range(args.n_batch, len(index), args.n_batch)) if len(index) else []:
            kept = new.take(torch.from_numpy(part).to(new.u.device))
            with torch.no_grad():  # departure (3): by the update's own forward, so that before the first step it is 1
                kept.old_log_prob.copy_(distribution(self.model, kept, kept.returns).log_prob(kept.u))
            fields = zip(self.buffer, kept) if self.buffer else zip(kept)
            self.buffer = Candidates(*(torch.cat(field)[-args.buffer_size :] for field in fields))  # line 8
        spread = scores.reshape(-1, args.group_size).std(1).mean().item()
        row = {"rollout/candidate_q": scores.mean().item(), "rollout/group_std": spread}
        return row | {"rollout/kept": keep.mean().item()}

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
            loss, values = q_guided_loss(self.model, self.reference, self.buffer.take(index), kappa.detach(), args)
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

    PARTS = ("optimizer", "dual", "reference", "critic", "critic_optimizer", "target_policy", "target_critic")

    def state(self) -> dict:
        """What, beside the weights, a resumed run needs. The offline data are read again instead."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        parts |= {"updates": self.updates, "critic_steps": self.critic_steps, "log_kappa": self.log_kappa.detach()}
        parts["replay"] = [[torch.from_numpy(field) for field in episode] for episode in self.replay]
        online = (field[self.n_offline :] for field in self.transitions)
        parts["online"] = [field.clone() for field in online]  # a slice would be saved with all it is cut from
        return parts | {"buffer": list(self.buffer) if self.buffer is not None else None}

    def load_state(self, state: dict) -> None:
        """Go on from what `state` gave; the weights are in the model already."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.updates, self.critic_steps = state["updates"], state["critic_steps"]
        self.log_kappa.data.copy_(state["log_kappa"])
        self.replay = [Episode(*(field.numpy() for field in each)) for each in state["replay"]]
        self.add_transitions(Transitions(*state["online"]))
        device = self.log_kappa.device
        self.buffer = Candidates(*(f.to(device) for f in state["buffer"])) if state["buffer"] else None


# ---------------------------------------------------------------------------------------------------------------------
# 8. The run
# ---------------------------------------------------------------------------------------------------------------------

EVALUATION = ("eval/return_mean", "eval/return_std", "eval/length_mean", "eval/distance_mean", "eval/normalized_score")
LOSSES = ("loss", "surrogate", "ratio_mean", "ratio_max", "clip_fraction", "kl", "entropy", "kappa", "grad_norm")
CRITIC_LOSSES = ("critic_loss", "q_mean", "q_gap", "target_mean")
METRICS = ["iteration", "charts/env_steps", "charts/SPS", "charts/gradient_updates", "charts/critic_updates"]
METRICS += ["charts/buffer", "charts/env_steps_full", "charts/env_steps_eval", *EVALUATION]
METRICS += ["rollout/return", "rollout/length", "rollout/terminated", "rollout/candidate_q", "rollout/group_std"]
METRICS += ["rollout/kept", *(f"losses/{name}" for name in (*LOSSES, "ratio_first", *CRITIC_LOSSES))]
METRICS += ["time/iteration", "time/simulate", "time/infer", "time/update", "time/critic", "time/eval"]
CONSOLE = ("eval/return_mean", "rollout/return", "losses/critic_loss", "losses/q_mean", "losses/ratio_first")
CONSOLE += ("losses/ratio_max", "losses/clip_fraction", "losses/entropy", "charts/SPS")


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


def rollout_columns(episodes: list[Episode], steps: dict[str, int], seconds: float, clock: list[float]) -> dict:
    """The rollout/ columns of metrics.csv, environment steps and times; adds this iteration's steps to `steps`."""
    lengths = [len(episode.rewards) for episode in episodes]
    steps["full"] += sum(lengths)
    collected, updated = np.diff(clock).tolist()
    return {
        "rollout/return": np.mean([episode.rewards.sum() for episode in episodes]).item(),
        "rollout/length": np.mean(lengths).item(),
        "rollout/terminated": np.mean([episode.terminated for episode in episodes]).item(),
        "charts/env_steps": steps["full"],
        **{f"charts/env_steps_{source}": count for source, count in steps.items()},
        "charts/SPS": sum(lengths) / collected,
        "time/simulate": seconds,
        "time/infer": collected - seconds,
        "time/update": updated,
        "time/iteration": time.time() - clock[0],
    }


def make_learner(args: Args, base: dict, saved: dict | None, env: gym.Env) -> tuple[QGuidedLearner, dict]:
    """The learner of a new run, or that of a run that goes on, and what its checkpoints say beside its state."""
    device, dtype = set_up_torch(args)
    offline, fingerprint = load_offline(args, base, env)
    learner = QGuidedLearner(load_model(base).use_precision(dtype).to(device), offline, args)
    if saved:
        if saved["precision"] != str(dtype):
            die(f"the run began in {saved['precision']}, here it is {dtype}: use a device like it.")
        if saved["fingerprint"] != fingerprint:
            die(f"the data in {args.dataset} changed since {args.resume} began: put the old ones back, or begin anew.")
        learner.load_state(saved["learner"])
    return learner, run_facts(base, args, dtype) | {"fingerprint": fingerprint}


def main(args: Args) -> Path:
    """Algorithm 1 with the critic of Section 3.3.1 in place of resets; returns the run's folder."""
    if args.group_size < 2:
        die(f"--group-size is {args.group_size}: an advantage is relative to a group, give 2 or more.")
    base, saved = start(args)
    envs = [make_env(args.env_id, base["env_kwargs"]) for _ in range(max(args.n_sources, args.n_trajectories))]
    learner, facts = make_learner(args, base, saved, envs[0])
    model, iteration, steps = learner.model, 0, dict(full=0, eval=0)
    if saved:
        iteration, steps = saved["iteration"], saved["steps"]
    run_dir = choose_run_dir(args)
    eval_envs = make_eval_envs(args, base["env_kwargs"], run_dir / "videos")
    log = RunLog(run_dir, METRICS, args, saved)

    def save() -> None:
        content = dict(iteration=iteration, rows=log.rows, steps=steps, weights=model.state_dict())
        save_checkpoint(run_dir / "checkpoint.pt", facts | content | dict(learner=learner.state()))

    print(f"{model.obs_mean.device.type}, {args.threads} threads, {facts['precision']}, in {run_dir}", flush=True)
    if not saved:  # the pretrained policy, before any update
        log.write(0, run_evaluation(args, model, eval_envs, 0))
        learner.train_critic(0, args.critic_warmup, show_every=max(1, args.critic_warmup // 20))
        save()

    first, begun = iteration, time.time()
    while iteration < args.iterations:
        iteration, clock = iteration + 1, [time.time()]
        count = args.n_trajectories if learner.replay else len(envs)  # departure (9)
        episodes, seconds = collect_episodes(rollout_copy(model), envs[:count], args, iteration)  # line 2
        clock.append(time.time())
        learner.remember(episodes)  # line 2
        row = learner.train_critic(iteration, args.critic_updates)  # Section 3.3.1
        row |= learner.add_candidates(iteration)  # lines 3-8
        row |= learner.update(iteration)  # line 9
        clock.append(time.time())
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            row |= run_evaluation(args, model, eval_envs, iteration)
            steps["eval"] += round(row["eval/length_mean"] * args.eval_episodes)
        row |= {"charts/gradient_updates": learner.updates, "charts/critic_updates": learner.critic_steps}
        row |= {"charts/buffer": len(learner.buffer.u) if learner.buffer else 0}
        row |= rollout_columns(episodes, steps, seconds, clock)
        log.write(iteration, row)
        left = (args.iterations - iteration) * (time.time() - begun) / (iteration - first) / 60
        shown = "  ".join(f"{name} {row[name]:,.4g}" for name in CONSOLE if name in row)
        print(f"iteration {iteration}/{args.iterations}  {shown}  {left:.0f} min left", flush=True)
        save()
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
