"""Pretraining: a stochastic Decision Transformer (or Reinformer) from offline data, the start of all finetuning here.

  "Online Finetuning Decision Transformers with Pure RL Gradients" (Luo & Zhu), Section 2, Appendix A, Table 5
  1. cut the dataset into trajectories; the return-to-go of a step is the sum of the rewards from it on
  2. draw windows of c_offline steps (g, s, a), every step of the data equally likely to be the first
  3. maximise log pi(a | window) under the entropy constraint H(pi) >= -dim A           (ODT's objective)
  4. LAMB with linear warm-up; at the end, evaluate at the return-to-go g_eval with context c_online

Departures from the paper and from ODT, its base (docs/pretrain_dt.md explains each under the same number):
  (1) evaluation plays tanh(mean), the median of the squashed Gaussian, not its expectation: ODT does the same
  (2) an observation that is constant in the data (std < 1e-3) is centred but not scaled
  (3) entropy is a mean over real tokens (ODT averages over padding too); heads without a loss are left out
  (4) runs shorter than the row's number of updates warm up over a tenth of their updates, not over 10,000
  (5) matrix products in bf16 where the hardware has units for it; residual stream, norms, heads, losses in fp32
  (6) D4RL's rules are put back where gymnasium-robotics 1.4.2 differs (docs/datasets.md)
  (7) --model reinformer keeps this transformer (pre-LN, no time-step embedding) and ODT's squashed Gaussian
  (8) "random" data are uniformly random actions; D4RL's random sets come from an untrained policy

On a laptop: python pretrain_dt.py --env-id Hopper-v5 --embed-dim 128 --updates 500 --batch-size 64 --lr 1e-3
In full:     python pretrain_dt.py --env-id Hopper-v5 --dataset mujoco/hopper/medium-v0
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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

# Shapes: B batch, K context (steps of a window), L tokens, S and A dimensions of observation and action,
#         E embedding width, N steps of a dataset, M its trajectories.

# ---------------------------------------------------------------------------------------------------------------------
# 2. Arguments
# ---------------------------------------------------------------------------------------------------------------------

DatasetKind = Literal["random", "medium", "medium-replay", "expert", "human", "cloned", "umaze", "diverse"]


@dataclass
class Args:
    """Pretrain a Decision Transformer on offline data. Fields left at None take the row of the environment."""

    env_id: str = "Hopper-v5"
    """gymnasium or gymnasium-robotics id of the environment"""
    dataset: str = "random"
    """a Minari id, a path ending in .hdf5 (D4RL's layout), or "random": uniformly random actions in --env-id"""
    dataset_kind: DatasetKind | None = None
    """kind of data, picks the paper's row [None: from the name, else medium, cloned (Adroit) or umaze (AntMaze)]"""
    dataset_steps: int = 100_000
    """size of the "random" dataset [environment steps]"""
    drop_last_episode: bool = False
    """leave out the last trajectory, as the paper's episode counts do (its door-human: 6,504 of 6,729 steps)"""

    model: Literal["dt", "reinformer"] = "dt"
    """dt: tokens (g, s, a), the return-to-go is given; reinformer: tokens (s, g, a), it is predicted"""
    embed_dim: int = 512
    """E, width of the transformer"""
    n_layers: int = 4
    """number of transformer blocks"""
    n_heads: int = 4
    """attention heads per block, divides --embed-dim"""
    dropout: float = 0.1
    """dropout on embeddings, attention weights and block outputs, while pretraining only [probability]"""
    c_offline: int | None = None
    """c_offline: context length in training [steps; None: the row]"""
    c_online: int | None = None
    """c_online: context length in evaluation and finetuning [steps; None: the row]"""

    updates: int | None = None
    """gradient updates in total [None: the row]"""
    batch_size: int = 256
    """windows per update"""
    lr: float | None = None
    """learning rate of LAMB: relative movement of a tensor per update [None: the row]"""
    warmup: int | None = None
    """linear learning-rate warm-up [updates; None: 10,000, or a tenth of --updates if below the row's number]"""
    weight_decay: float = 1e-4
    """weight decay, on every tensor as in ODT"""
    max_grad_norm: float = 0.5
    """bound of the global gradient norm"""
    kappa_initial: float = 0.1
    """initial value of the entropy dual variable kappa"""
    kappa_lr: float = 1e-4
    """Adam's learning rate on log kappa"""
    return_loss_weight: float = 1.0
    """weight of the return loss [reinformer only]"""
    expectile: float = 0.99
    """tau of the expectile regression of the return [reinformer only]"""

    g_eval: float | None = None
    """initial return-to-go of evaluations [raw; None: g_online, in pretraining the row's; reinformer has none]"""
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
    log_every: int = 100
    """a console line, a row of metrics.csv and a checkpoint every so many updates"""
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


class Row(NamedTuple):
    """Pretraining settings of a task; the fields that Args leaves at None."""

    updates: int
    lr: float
    c_offline: int  # paper's Table 6
    c_online: int  # paper's Table 6
    g_eval: float | None  # raw units; ODT's and ODT+TD3's evaluation returns-to-go, g_online for Adroit


# Updates and learning rates are ODT+TD3's (Yan et al. 2024), to which the paper's Appendix B.1 defers.
# Relocate and HalfCheetah are not in the paper: ODT+TD3's too, but for a context of 1. Keys: the id up to the version.
ROWS = {
    "Hopper": Row(5_000, 1e-4, 20, 1, 3600.0),
    "Walker2d": Row(10_000, 1e-3, 20, 1, 5000.0),
    "Ant": Row(5_000, 1e-4, 20, 1, 6000.0),
    "HalfCheetah": Row(5_000, 1e-4, 20, 1, 6000.0),
    "AdroitHandDoor": Row(40_000, 1e-4, 5, 1, 3000.0),
    "AdroitHandPen": Row(40_000, 1e-4, 5, 1, 6000.0),
    "AdroitHandHammer": Row(40_000, 1e-4, 5, 5, 4000.0),
    "AdroitHandRelocate": Row(40_000, 1e-4, 5, 1, 5000.0),
    "AntMaze": Row(200_000, 1e-4, 5, 1, 1.0),
    "AntMaze diverse": Row(200_000, 1e-4, 1, 5, 1.0),
}


def fill_from_row(args: Args) -> str:
    """Fill the fields of `args` that are None from the task's row; returns a line that says which row that is."""
    task, name = task_of(args.env_id), Path(args.dataset).name.lower().replace("_", "-")
    if args.dataset_kind is None:
        named = ("random", "medium-replay", "medium", "expert", "human", "cloned", "diverse")
        default = "cloned" if task.startswith("Adroit") else "umaze" if task == "AntMaze" else "medium"
        args.dataset_kind = next((kind for kind in named if kind in name), default)
    key = "AntMaze diverse" if task == "AntMaze" and args.dataset_kind == "diverse" else task
    row = ROWS.get(key, ROWS["Hopper"]._replace(g_eval=None))
    if args.warmup is None:
        # LAMB moves a tensor by about lr of its norm per update: 2,000 updates under a warm-up of 10,000 would
        # move it by 2 %, and the network would still be the untrained one. Departure (4).
        args.warmup = 10_000 if args.updates is None or args.updates >= row.updates else max(1, args.updates // 10)
    for field, value in row._asdict().items():
        if getattr(args, field) is None:
            setattr(args, field, value)
    source = f"row {key}" if key in ROWS else f"no row for {task}: Hopper's row, g_eval = best return of the data"
    return (
        f"{source}, {args.dataset_kind} data: updates {args.updates:,}, lr {args.lr:g}, warm-up {args.warmup:,}, "
        f"c_offline {args.c_offline}, c_online {args.c_online}"
    )


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

# D4RL's umaze with its fixed start (r) and goal (g), in gymnasium-robotics' frame; a Minari dataset brings its own map.
UMAZE = [[1, 1, 1, 1, 1], [1, "r", 0, 0, 1], [1, 1, 1, 0, 1], [1, "g", 0, 0, 1], [1, 1, 1, 1, 1]]
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


# ---------------------------------------------------------------------------------------------------------------------
# 5. Buffers
# ---------------------------------------------------------------------------------------------------------------------


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


def maze_kwargs(args: Args) -> dict:
    """AntMaze's map: that of the Minari dataset, else D4RL's umaze for UMaze ids. Empty for other environments."""
    if task_of(args.env_id) != "AntMaze":
        return {}
    if args.dataset != "random" and not args.dataset.endswith(".hdf5"):
        spec = open_minari(args.dataset).spec.env_spec
        if spec is not None and "maze_map" in spec.kwargs:
            return {"maze_map": spec.kwargs["maze_map"]}
    return {"maze_map": UMAZE} if "_UMaze-" in args.env_id else {}


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


@dataclass
class Trajectories:
    """Whole trajectories, one after the other in flat arrays of N steps."""

    observations: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, A) float32 in [-ACTION_LIMIT, ACTION_LIMIT]
    rewards: np.ndarray  # (N,) float64
    lengths: np.ndarray  # (M,)

    def ends(self) -> np.ndarray:
        """Index after the last step of each trajectory: (M,)."""
        return np.cumsum(self.lengths)

    def returns_to_go(self) -> np.ndarray:
        """g_h, the sum of the rewards from step h to the end of its trajectory, raw and undiscounted: (N,)."""
        pieces = np.split(self.rewards, self.ends()[:-1])
        return np.concatenate([piece[::-1].cumsum()[::-1] for piece in pieces])

    def episode_returns(self) -> np.ndarray:
        """(M,)"""
        return self.returns_to_go()[self.ends() - self.lengths]

    def describe(self, args: Args) -> str:
        """The statistics line, comparable to the paper's Tables 2-4."""
        returns = self.episode_returns()
        line = f"{args.dataset}: {len(returns):,} episodes, {len(self.rewards):,} steps, "
        line += f"return {returns.mean():,.1f} ± {returns.std():,.1f}, best {returns.max():,.1f}"
        scores = np.array([normalized_score(args.env_id, value) for value in returns])
        return line + ("" if np.isnan(scores).any() else f", score {scores.mean():.2f} ± {scores.std():.2f}")

    def fingerprint(self) -> int:
        """Tells two datasets apart when a run is resumed."""
        value = 0
        for array in (self.rewards, self.observations, self.actions, self.lengths):
            value = zlib.crc32(array.tobytes(), value)
        return value


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


def load_trajectories(args: Args, env: gym.Env) -> Trajectories:
    """The dataset named by `args`, checked against `env` and cut into finished trajectories, actions in [-1, 1]."""
    if args.dataset == "random":
        raw = collect_random(env, args.dataset_steps, args.seed)
    else:
        raw = read_hdf5(Path(args.dataset)) if args.dataset.endswith(".hdf5") else read_minari(args.dataset)
    raw = check_data(raw, args.dataset, env)
    pieces = cut_trajectories(raw, task_of(args.env_id), args.drop_last_episode)
    if not pieces:
        die(f"{args.dataset} has no finished trajectory: none of its steps is a terminal or timeout. Get more steps.")
    actions = np.concatenate([raw.actions[piece] for piece in pieces])
    outside = np.mean(np.any((actions < env.action_space.low) | (actions > env.action_space.high), axis=1))
    if outside:
        print(f"{100 * outside:.2f} % of the actions lie outside the bounds of {args.env_id}: clipped to them")
    return Trajectories(
        observations=np.concatenate([raw.observations[piece] for piece in pieces]).astype(np.float32),
        actions=unscale_action(actions, env).clip(-ACTION_LIMIT, ACTION_LIMIT).astype(np.float32),
        rewards=np.concatenate([raw.rewards[piece] for piece in pieces]).astype(np.float64),
        lengths=np.array([piece.stop - piece.start for piece in pieces]),
    )


class Windows(NamedTuple):
    """A batch of training windows, left-padded."""

    observations: torch.Tensor  # (B, K, S)
    returns: torch.Tensor  # (B, K)
    actions: torch.Tensor  # (B, K, A)
    real: torch.Tensor  # (B, K) False where padded


class WindowSampler:
    """Draws windows of up to `context` steps, left-padded where the trajectory ends before."""

    def __init__(self, data: Trajectories, context: int, device: torch.device):
        self.context = context
        self.ends = np.repeat(data.ends(), data.lengths)  # (N,) where the trajectory of a step ends
        self.observations = torch.from_numpy(data.observations).to(device)
        self.actions = torch.from_numpy(data.actions).to(device)
        self.returns = torch.from_numpy(data.returns_to_go().astype(np.float32)).to(device)

    def sample(self, rng: np.random.Generator, batch: int) -> Windows:
        # [13] ODT draws trajectories in proportion to length, then a uniform first step: uniform over all steps.
        first = rng.integers(len(self.ends), size=batch)  # (B,)
        length = np.minimum(self.context, self.ends[first] - first)  # (B,)
        offset = np.arange(self.context) - (self.context - length)[:, None]  # (B, K) negative: padding
        index = torch.from_numpy(first[:, None] + offset.clip(min=0)).to(self.returns.device)
        real = torch.from_numpy(offset >= 0).to(self.returns.device)
        return Windows(
            self.observations[index] * real[..., None], self.returns[index] * real, self.actions[index], real
        )


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


def expectile_loss(error: torch.Tensor, tau: float) -> torch.Tensor:
    """|tau - 1(error < 0)| error^2, elementwise: near tau = 1 its minimiser is the largest return to be had."""
    return torch.where(error < 0, 1.0 - tau, tau) * error**2


def pretrain_loss(
    model: DecisionTransformer, windows: Windows, kappa: torch.Tensor, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-E[log pi(a | window)] - kappa H, for Reinformer plus its return loss; and the values to log."""
    real = windows.real
    dist, predicted = model(windows.observations, windows.returns, windows.actions[:, :-1], real)
    nll = -masked_mean(dist.log_prob(torch.atanh(windows.actions)), real)
    entropy = masked_mean(dist.entropy(torch.randn_like(dist.mean)), real)
    mse = masked_mean(((torch.tanh(dist.mean) - windows.actions) ** 2).mean(-1), real)
    return_loss = torch.zeros_like(nll)
    if predicted is not None:
        unit = masked_mean(windows.returns.abs(), real).clamp(min=1e-6)  # [14] returns in units of their mean size
        return_loss = masked_mean(expectile_loss((windows.returns - predicted) / unit, args.expectile), real)
    loss = nll - kappa * entropy + args.return_loss_weight * return_loss
    return loss, {"nll": nll, "entropy": entropy, "action_mse": mse, "return": return_loss}


class Learner:
    """Network, optimisers and the entropy dual: all that an update changes."""

    def __init__(self, model: DecisionTransformer, args: Args):
        self.model, self.args, self.step = model.train(), args, 0
        device = model.obs_mean.device
        self.optimizer = Lamb(model.parameters(), args.lr, weight_decay=args.weight_decay)
        self.log_kappa = torch.tensor(math.log(args.kappa_initial), device=device, requires_grad=True)
        self.dual = torch.optim.Adam([self.log_kappa], lr=args.kappa_lr)
        self.sums = torch.zeros(len(LOSSES), device=device)  # of the values to log, since the last row

    def update(self, sampler: WindowSampler) -> None:
        """One gradient step. Its random numbers hang on (seed, step) alone, so a resumed run draws the same ones."""
        args, self.step = self.args, self.step + 1
        windows = sampler.sample(np.random.default_rng(stream(args.seed, self.step, "windows")), args.batch_size)
        torch.manual_seed(stream(args.seed, self.step, "dropout and entropy"))
        kappa = self.log_kappa.exp()
        loss, values = pretrain_loss(self.model, windows, kappa.detach(), args)
        self.optimizer.zero_grad()
        loss.backward()
        values["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = args.lr * min(self.step / args.warmup, 1.0)
        self.optimizer.step()
        # [12] The dual of H >= rho, rho = -dim A: min over kappa >= 0 of kappa (H - rho)
        self.dual.zero_grad()
        (kappa * (values["entropy"].detach() + self.model.act_dim)).backward()
        self.dual.step()
        values["kappa"] = kappa
        self.sums += torch.stack([values[name].detach() for name in LOSSES])

    def mean_losses(self) -> dict[str, float]:
        """Means since the last row, the only wait for the device. Exits with a line if one is not finite."""
        count = (self.step - 1) % self.args.log_every + 1
        losses = {f"losses/{name}": value for name, value in zip(LOSSES, (self.sums / count).tolist(), strict=True)}
        if not all(map(math.isfinite, losses.values())):
            die(f"the loss is not finite at update {self.step:,} ({losses}): lower --lr; the last checkpoint is kept.")
        return losses

    def state(self) -> dict:
        """What, beside the weights, a resumed run needs."""
        parts = {"optimizer": self.optimizer.state_dict(), "dual": self.dual.state_dict(), "sums": self.sums}
        return parts | {"log_kappa": self.log_kappa.detach()}

    def load_state(self, saved: dict) -> None:
        """Go on from a checkpoint; the weights are in the model already."""
        state, self.step = saved["learner"], saved["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.dual.load_state_dict(state["dual"])
        self.log_kappa.data.copy_(state["log_kappa"])
        self.sums.copy_(state["sums"])


# ---------------------------------------------------------------------------------------------------------------------
# 8. The run
# ---------------------------------------------------------------------------------------------------------------------

EVALUATION = ("eval/return_mean", "eval/return_std", "eval/length_mean", "eval/distance_mean", "eval/normalized_score")
LOSSES = ("nll", "entropy", "kappa", "action_mse", "return", "grad_norm")
METRICS = ["iteration", "charts/learning_rate", *(f"losses/{name}" for name in LOSSES)]
METRICS += [*EVALUATION, "time/iteration", "time/eval"]


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


def new_model(args: Args, data: Trajectories) -> DecisionTransformer:
    """The untrained network, with the data's mean and std and the scale of the returns in its buffers."""
    if args.embed_dim % args.n_heads:
        die(f"--embed-dim {args.embed_dim} is not a multiple of --n-heads {args.n_heads}: change one of them.")
    torch.manual_seed(stream(args.seed, 0, "weights"))
    dims = data.observations.shape[1], data.actions.shape[1]
    model = DecisionTransformer(*dims, args.embed_dim, args.n_layers, args.n_heads, args.model, args.dropout)
    mean, std = (getattr(data.observations, name)(axis=0, dtype=np.float64) for name in ("mean", "std"))
    model.obs_mean.copy_(torch.from_numpy(mean))
    model.obs_std.copy_(torch.from_numpy(np.where(std < 1e-3, 1.0, std + 1e-6)))  # departure (2)
    model.return_scale.fill_(1.0 if task_of(args.env_id) == "AntMaze" else 1e-3)  # [15] ODT's
    return model


def check_resumed(saved: dict, facts: dict, args: Args) -> None:
    """Exits with a line if the data or the precision is not that of the run to go on with."""
    if saved["fingerprint"] != facts["fingerprint"]:
        die(f"the data in {args.dataset} changed since {args.resume} began: put the old ones back, or start a new run.")
    if saved["precision"] != facts["precision"]:
        die(f"{args.resume} began in {saved['precision']}, here it is {facts['precision']}: use a device like it.")
    if saved["iteration"] > args.updates:
        die(f"{args.resume} is at update {saved['iteration']:,} already: give --updates {saved['iteration']} or more.")


def pretraining_facts(args: Args, model: DecisionTransformer, data: Trajectories, env_kwargs: dict, dtype) -> dict:
    """What every checkpoint of a run says beside weights and state: plain types, for whoever finetunes or evaluates."""
    best_return = float(data.episode_returns().max())
    args.g_eval = best_return if args.g_eval is None else args.g_eval
    facts = dict(script=Path(__file__).stem, sizes=model.sizes, env_id=args.env_id, env_kwargs=env_kwargs)
    facts |= dict(dataset=args.dataset, dataset_kind=args.dataset_kind, dataset_best_return=best_return)
    facts |= dict(fingerprint=data.fingerprint(), precision=str(dtype), g_eval=args.g_eval, c_online=args.c_online)
    return facts | dict(args=vars(args) | {"resume": None})


def progress_line(step: int, updates: int, losses: dict[str, float], rate: float, seconds_left: float) -> str:
    """What the console shows every --log-every updates."""
    return (
        f"update {step:,}/{updates:,}  nll {losses['losses/nll']:.3f}  mse {losses['losses/action_mse']:.4f}  "
        f"entropy {losses['losses/entropy']:.2f}  {rate:.1f} updates/s  {seconds_left / 60:.1f} min left"
    )


def main(args: Args) -> Path:
    """Pretrain, or go on with a run; returns the run's folder."""
    check_args(args)
    saved = load_checkpoint(Path(args.resume)) if args.resume else None
    print(fill_from_row(args), flush=True)
    env_kwargs = saved["env_kwargs"] if saved else maze_kwargs(args)
    env, (device, dtype) = make_env(args.env_id, env_kwargs), set_up_torch(args)
    data = load_trajectories(args, env)
    print(data.describe(args), flush=True)

    model = load_model(saved, args.dropout) if saved else new_model(args, data)
    learner = Learner(model.use_precision(dtype).to(device), args)
    sampler = WindowSampler(data, args.c_offline, device)
    facts = pretraining_facts(args, model, data, env_kwargs, dtype)
    if saved:
        check_resumed(saved, facts, args)
        learner.load_state(saved)
    run_dir = choose_run_dir(args)
    envs = make_eval_envs(args, env_kwargs, run_dir / "videos")  # before training: what fails, fails early
    log = RunLog(run_dir, METRICS, args, saved)
    size = f"{sum(p.numel() for p in model.parameters()):,} weights"
    print(f"{args.model}, {size}, {device.type}, {args.threads} threads, {dtype}, in {run_dir}", flush=True)

    begun = block_begun = time.time()
    first = block_first = learner.step
    while learner.step < args.updates:
        learner.update(sampler)
        step = learner.step
        if step % args.log_every and step < args.updates:
            continue
        losses, now = learner.mean_losses(), time.time()
        rate, block_begun, block_first = (step - block_first) / (now - block_begun), now, step
        seconds_left = (args.updates - step) * (now - begun) / (step - first)
        print(progress_line(step, args.updates, losses, rate, seconds_left), flush=True)
        if step % args.log_every == 0:
            learning_rate = learner.optimizer.param_groups[0]["lr"]
            log.write(step, losses | {"charts/learning_rate": learning_rate, "time/iteration": 1.0 / rate})
            learner.sums.zero_()
        content = dict(iteration=step, rows=log.rows, weights=model.state_dict(), learner=learner.state())
        save_checkpoint(run_dir / "checkpoint.pt", facts | content)

    # The closing row is not among the checkpoint's rows: a run that is resumed with more updates drops it.
    log.write(learner.step, run_evaluation(args, model, envs, learner.step))
    log.close()
    for each in [env, *envs]:
        each.close()
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
