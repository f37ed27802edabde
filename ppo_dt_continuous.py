"""PPO-DT: online finetuning of a Decision Transformer with PPO's gradients alone.

  "Online Finetuning Decision Transformers with Pure RL Gradients" (Luo & Zhu), Algorithm 2, Table 7
  1. roll out K_PPO trajectories at return-to-go g_online; first in, first out for four iterations (line 2)
  2. advantage of every step kept: GAE with the current value network (Eq. 4)                     (line 3)
  3. draw sub-trajectories of c_train steps, normalise their advantages over the batch            (lines 4, 5)
  4. clipped policy gradient on the importance ratio of each step (Eq. 5)                         (line 6)
  5. value network: squared error to advantage + value (Eq. 6)                                    (line 6)

Departures from the paper (docs/ppo_dt.md explains each under the same number):
  (1) the mean action is tanh(mean), the median of the squashed Gaussian, not its expectation: ODT does the same
  (2) the log-ratio of a step is kept within +-20 before exp, so that no ratio overflows
  (3) a sub-trajectory may begin at any step and is shorter where its trajectory ends, as in ODT
  (4) old log-probabilities are computed by the update's own forward when a trajectory enters the buffer
  (5) the value network predicts in units of the first trajectories' returns, and learns them before the first update
  (6) matrix products in bf16 where the hardware has units for it; residual stream, norms, heads, losses in fp32
  (7) D4RL's rules are put back where gymnasium-robotics 1.4.2 differs (docs/datasets.md)

On a laptop: python ppo_dt_continuous.py --env-id Hopper-v5 --embed-dim 128 --iterations 100
In full:     python ppo_dt_continuous.py --env-id Hopper-v5 --pretrained runs/NAME/checkpoint.pt
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

# Shapes: B minibatch, L = c_train steps, K context, S and A dimensions of observation and action, E embedding width,
#         T steps of a full trajectory, M steps of all that are kept, padding included; in section 4 L counts tokens.

# ---------------------------------------------------------------------------------------------------------------------
# 2. Arguments
# ---------------------------------------------------------------------------------------------------------------------

DatasetKind = Literal["random", "medium", "medium-replay", "expert", "human", "cloned", "umaze", "diverse"]


@dataclass
class Args:
    """Finetune a pretrained Decision Transformer online by PPO-DT. Fields left at None take the paper's row."""

    env_id: str = "Hopper-v5"
    """gymnasium or gymnasium-robotics id of the environment"""
    pretrained: str | None = None
    """checkpoint of pretrain_dt.py to start from [None: one is made from random data, in minutes, and kept]"""
    dataset_kind: DatasetKind | None = None
    """kind of data, picks the paper's row [None: that of the checkpoint]"""
    embed_dim: int = 512
    """E, width of the transformer"""
    iterations: int = 500
    """iterations, Algorithm 2's T"""

    n_trajectories: int | None = None
    """full trajectories rolled out per iteration [None: the row]"""
    replay_iterations: int = 4
    """iterations for which full trajectories are kept"""
    c_train: int | None = None
    """c_train: steps per sub-trajectory [steps; None: the row]"""
    gamma: float | None = None
    """gamma: discount per step [None: the row]"""
    gae_lambda: float | None = None
    """lambda of GAE: 0 trusts the value network, 1 the returns [None: the row]"""
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

    value_dim: int | None = None
    """width of the value network's two hidden layers [None: the row]"""
    value_norm: bool | None = None
    """LayerNorm before the value network's activations [None: the row]"""
    lr_value: float | None = None
    """lr_value, of AdamW [None: the row]"""
    value_warmup: int = 200
    """updates of the value network alone, on the first trajectories' discounted returns, before anything else"""

    hindsight: bool = False
    """ablation, Fig. 1: the new log-probability sees the returns that were reached, the old one those asked for"""

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


# Table 7, what it says of all rows, and what Table 5 and the text say of locomotion and of the others. Keys:
# environment id up to the version, kind of data.
COLUMNS = ("n_batch", "c_online", "g_online", "n_trajectories", "lr", "lr_value", "kappa_initial")
COLUMNS += ("c_train", "value_dim", "value_norm", "epsilon", "gamma", "gae_lambda")
LOCOMOTION = (20, 256, False, 0.2, 0.99, 0.95)
OTHERS = (5, 512, True, 0.2, 0.99, 0.95)
ROWS = {
    ("Hopper", "medium"): (256, 1, 7200.0, 8, 5e-5, 1e-3, 0.02, *LOCOMOTION),
    ("Hopper", "random"): (256, 1, 7200.0, 8, 5e-5, 1e-3, 0.04, *LOCOMOTION),
    ("Walker2d", "medium"): (256, 1, 10000.0, 8, 5e-5, 1e-3, 0.02, *LOCOMOTION),
    ("Walker2d", "random"): (256, 1, 10000.0, 8, 5e-5, 1e-3, 0.20, *LOCOMOTION),
    ("Ant", "medium"): (256, 1, 12000.0, 8, 5e-5, 1e-3, 0.02, *LOCOMOTION),
    ("Ant", "random"): (256, 1, 12000.0, 8, 5e-5, 1e-3, 0.02, *LOCOMOTION),
    ("AdroitHandDoor", "cloned"): (512, 1, 3000.0, 16, 3e-5, 2e-4, 0.002, *OTHERS),
    ("AdroitHandDoor", "human"): (512, 1, 3000.0, 16, 3e-5, 2e-4, 0.002, *OTHERS),
    ("AdroitHandPen", "cloned"): (512, 1, 6000.0, 8, 3e-5, 2e-4, 0.04, *OTHERS),
    ("AdroitHandPen", "human"): (512, 1, 6000.0, 8, 3e-5, 2e-4, 0.04, *OTHERS),
    ("AdroitHandHammer", "cloned"): (512, 5, 4000.0, 16, 3e-5, 2e-4, 0.005, *OTHERS),
    ("AdroitHandHammer", "human"): (512, 5, 4000.0, 16, 3e-5, 2e-4, 0.005, *OTHERS),
    ("AntMaze", "umaze"): (256, 1, 2.0, 8, 5e-5, 1e-3, 0.02, *OTHERS),
    ("AntMaze", "diverse"): (256, 5, 2.0, 8, 5e-5, 1e-3, 0.02, *OTHERS),
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


class ValueNetwork(nn.Module):
    """V(s): an MLP of two hidden layers on the observation, normalised as for the transformer (Table 5)."""

    def __init__(self, model: DecisionTransformer, width: int, norm: bool):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(len(model.obs_mean), width), nn.Linear(width, width)])
        self.head, self.norm = nn.Linear(width, 1), norm
        self.register_buffer("obs_mean", model.obs_mean.clone())
        self.register_buffer("obs_std", model.obs_std.clone())
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Raw observations (..., S) -> values (...), raw discounted reward."""
        x = (observations - self.obs_mean) / self.obs_std
        for layer in self.hidden:
            x = layer(x)
            x = F.silu(F.layer_norm(x, x.shape[-1:]) if self.norm else x)
        return self.center + self.scale * self.head(x).squeeze(-1)  # [13] departure (5)

    def set_units(self, returns: torch.Tensor) -> None:
        """Take mean and std of these discounted returns for zero and one. Returns that are all alike set no scale."""
        std, mean = torch.std_mean(returns, correction=0)
        self.center.copy_(mean)
        self.scale.copy_(torch.where(std < 1e-3, 1.0, std))


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


class TokenBatch(NamedTuple):
    """Sub-trajectories of L steps behind the K - 1 steps before them, windows as in Episode. Or M steps in one row."""

    observations: torch.Tensor  # (B, K - 1 + L, S)
    returns: torch.Tensor  # (B, K - 1 + L) raw
    actions: torch.Tensor  # (B, K - 1 + L, A)
    real: torch.Tensor  # (B, K - 1 + L) False: padding, or after the trajectory's end
    new_returns: torch.Tensor  # (B, K - 1 + L) what the new log-probability sees: `returns`, but for --hindsight
    u: torch.Tensor  # (B, L, A) pre-tanh samples: the action is tanh(u)
    old_log_prob: torch.Tensor  # (B, L)
    advantage: torch.Tensor  # (B, L) of Eq. 4, not normalised
    value_target: torch.Tensor  # (B, L)


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


def gae(rewards: np.ndarray, values: np.ndarray, terminated: bool, gamma: float, lam: float) -> np.ndarray:
    """Eq. 4: advantages (T,) of rewards (T,) and values (T + 1,) of the states before each action and after the last.

    After a true end the last value counts as 0; after the time limit it stands for the rewards not seen.
    """
    following = np.append(values[1:-1], 0.0 if terminated else values[-1])  # (T,)
    delta, advantages, later = rewards + gamma * following - values[:-1], np.zeros(len(rewards)), 0.0
    for h in reversed(range(len(rewards))):
        advantages[h] = later = delta[h] + gamma * lam * later
    return advantages


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


def ppo_loss(
    model: DecisionTransformer, reference: DecisionTransformer, sub: TokenBatch, kappa: torch.Tensor, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Minus Eq. 5 and minus the entropy term kappa H; and the values to log."""
    real = sub.real[:, -sub.u.shape[1] :]  # (B, L)
    mean = masked_mean(sub.advantage, real)
    std = masked_mean((sub.advantage - mean) ** 2, real).sqrt()
    advantage = (sub.advantage - mean) / (std + 1e-8)  # (B, L), line 5
    dist = distribution(model, sub, sub.new_returns)
    log_ratio = (dist.log_prob(sub.u) - sub.old_log_prob) * real
    ratio = log_ratio.clamp(-20.0, 20.0).exp()  # (B, L), departure (2)
    clipped = ratio.clamp(1.0 - args.epsilon, 1.0 + args.epsilon)
    surrogate = masked_mean(torch.min(ratio * advantage, clipped * advantage), real)  # Eq. 5
    with torch.no_grad():
        reference_dist = distribution(reference, sub, sub.new_returns)
    laws = [torch.distributions.Normal(d.mean, d.log_std.exp(), validate_args=False) for d in (dist, reference_dist)]
    kl = masked_mean(torch.distributions.kl_divergence(*laws).sum(-1), real)  # before tanh, which changes nothing
    entropy = masked_mean(dist.entropy(torch.randn_like(dist.mean)), real)
    loss = -(surrogate - args.beta * kl + kappa * entropy)  # Eq. 5 and the entropy constraint's Lagrangian
    values = {"ratio_mean": masked_mean(ratio, real), "ratio_max": ratio.max(), "kl": kl, "entropy": entropy}
    return loss, values | {"surrogate": surrogate, "clip_fraction": masked_mean((clipped != ratio).float(), real)}


class PPOLearner:
    """Networks, reference, optimisers, entropy dual and buffer: all that an iteration's updates change."""

    def __init__(self, model: DecisionTransformer, args: Args):
        self.model, self.args, self.updates = model.eval(), args, 0  # no dropout in finetuning (Table 5)
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = Lamb(model.parameters(), args.lr, weight_decay=args.weight_decay)
        log_kappa = torch.tensor(math.log(args.kappa_initial), device=model.obs_mean.device)
        self.log_kappa = log_kappa.requires_grad_()
        self.dual = torch.optim.Adam([self.log_kappa], lr=args.kappa_lr)
        torch.manual_seed(stream(args.seed, 0, "weights of the value network"))
        self.value = ValueNetwork(model, args.value_dim, args.value_norm).to(model.obs_mean.device)
        self.value_optimizer = torch.optim.AdamW(self.value.parameters(), args.lr_value)
        self.replay: list[tuple[Episode, np.ndarray]] = []  # with old log-probabilities (T,)

    @torch.no_grad()
    def remember(self, episodes: list[Episode]) -> None:
        """Line 2: the trajectories enter the buffer, the first ones in it leave."""
        device = self.model.obs_mean.device
        for episode in episodes:
            fields = [torch.from_numpy(field)[None].to(device) for field in episode[:5]]  # (1, K - 1 + T or T, ...)
            zeros = torch.zeros(1, len(episode.rewards), device=device)
            sub = TokenBatch(*fields[:4], fields[1], fields[4], zeros, zeros, zeros)
            # departure (4): by the update's own forward, so that before the first step the ratio is 1
            old_log_prob = distribution(self.model, sub, sub.returns).log_prob(sub.u)[0].cpu().numpy()
            self.replay.append((episode, old_log_prob))
        self.replay = self.replay[-self.args.replay_iterations * self.args.n_trajectories :]

    @torch.no_grad()
    def all_steps(self, lam: float) -> TokenBatch:
        """Line 3: every step kept with its advantage, in one row (M, ...): each trajectory between K - 1 steps of
        padding and L - 1 more, so that a sub-trajectory and its windows are slices."""
        args, rows = self.args, []
        for episode, old_log_prob in self.replay:
            front = args.c_online - 1
            states = np.concatenate([episode.observations[front:], episode.last_observation[None].astype(np.float32)])
            values = self.value(torch.from_numpy(states).to(self.model.obs_mean.device)).cpu().numpy()  # (T + 1,)
            advantage = gae(episode.rewards, values.astype(np.float64), episode.terminated, args.gamma, lam)
            reached = np.pad(episode.rewards, (front, 0))[::-1].cumsum()[::-1]  # realised return-to-go
            steps = (episode.u, old_log_prob, advantage, advantage + values[:-1])  # Eq. 6's target
            steps = [np.pad(step, [(front, 0)] + [(0, 0)] * (step.ndim - 1)) for step in steps]
            fields = [*episode[:4], reached if args.hindsight else episode.returns, *steps]
            rows.append([np.pad(f, [(0, args.c_train - 1)] + [(0, 0)] * (f.ndim - 1)) for f in fields])
        flat = (torch.from_numpy(np.concatenate(field)) for field in zip(*rows))
        return TokenBatch(*((f.float() if f.is_floating_point() else f).to(self.model.obs_mean.device) for f in flat))

    def draw(self, steps: TokenBatch, rng: np.random.Generator) -> TokenBatch:
        """Lines 4 and 5: n_batch sub-trajectories, each from a step drawn uniformly over all that are kept, which is a
        trajectory drawn in proportion to its length."""
        first = rng.choice(np.flatnonzero(steps.real.cpu().numpy()), size=self.args.n_batch)  # [15] departure (3)
        index = first[:, None] + np.arange(1 - self.args.c_online, self.args.c_train)  # (B, K - 1 + L)
        index = torch.from_numpy(index).to(steps.real.device)
        own = index[:, self.args.c_online - 1 :]  # (B, L)
        return TokenBatch(*(f[index] for f in steps[:5]), *(f[own] for f in steps[5:]))

    def update_value(self, sub: TokenBatch) -> torch.Tensor:
        """A step on Eq. 6; returns the loss."""
        real, length = sub.real, sub.u.shape[1]
        values = self.value(sub.observations[:, -length:])  # (B, L)
        loss = masked_mean((values - sub.value_target) ** 2, real[:, -length:])  # Eq. 6
        self.value_optimizer.zero_grad()
        loss.backward()
        self.value_optimizer.step()
        return loss

    def warm_up_value(self) -> None:
        """Departure (5): before the first iteration, fit the value network to the discounted returns (lambda = 1)."""
        steps = self.all_steps(1.0)
        self.value.set_units(steps.value_target[steps.real])
        rng = np.random.default_rng(stream(self.args.seed, 0, "minibatches of the value network"))
        for update in range(1, self.args.value_warmup + 1):
            self.update_value(self.draw(steps, rng))
            if update % 50 == 0:  # what lies beyond the time limit is the network's own estimate, better by now
                steps = self.all_steps(1.0)

    def update(self, iteration: int) -> dict[str, float]:
        """Lines 3 to 6: minibatches drawn from the buffer, a gradient step each; means of the values to log."""
        if self.updates == 0:
            self.warm_up_value()
        args, logged, steps = self.args, [], self.all_steps(self.args.gae_lambda)
        rng = np.random.default_rng(stream(args.seed, iteration, "minibatches"))
        torch.manual_seed(stream(args.seed, iteration, "entropy"))
        for _ in range(args.n_minibatches):
            if self.updates % args.reference_every == 0:
                self.reference.load_state_dict(self.model.state_dict())
            sub, kappa = self.draw(steps, rng), self.log_kappa.exp()
            loss, values = ppo_loss(self.model, self.reference, sub, kappa.detach(), args)
            self.optimizer.zero_grad()
            loss.backward()
            values["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            self.optimizer.step()
            # [12] The dual of H >= rho, rho = -dim A: min over kappa >= 0 of kappa (H - rho)
            self.dual.zero_grad()
            (kappa * (values["entropy"].detach() + self.model.act_dim)).backward()
            self.dual.step()
            value_loss = self.update_value(sub)
            self.updates += 1
            values |= {"loss": loss, "kappa": kappa, "value_loss": value_loss}
            logged.append(torch.stack([values[name].detach() for name in LOSSES]))
        table = torch.stack(logged).cpu()
        losses = dict(zip(LOSSES, table.mean(0).tolist()))
        losses["ratio_max"] = table[:, LOSSES.index("ratio_max")].max().item()
        losses["ratio_first"] = table[0, LOSSES.index("ratio_mean")].item()
        target = steps.value_target[steps.real]
        losses["explained_variance"] = 1.0 - (steps.advantage[steps.real].var() / target.var().clamp(min=1e-8)).item()
        if not all(map(math.isfinite, losses.values())):
            die(f"the loss is not finite in iteration {iteration} ({losses}): lower --lr; the last checkpoint is kept.")
        return {f"losses/{name}": value for name, value in losses.items()}

    def state(self) -> dict:
        """What, beside the weights, a resumed run needs."""
        parts = {"optimizer": self.optimizer.state_dict(), "dual": self.dual.state_dict(), "updates": self.updates}
        parts |= {"log_kappa": self.log_kappa.detach(), "reference": self.reference.state_dict()}
        parts |= {"value": self.value.state_dict(), "value_optimizer": self.value_optimizer.state_dict()}
        replay = [[torch.from_numpy(field) for field in (*episode, old)] for episode, old in self.replay]
        return parts | {"replay": replay}

    def load_state(self, state: dict) -> None:
        """Go on from what `state` gave; the weights are in the model already."""
        self.updates = state["updates"]
        for name in ("optimizer", "dual", "reference", "value", "value_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.log_kappa.data.copy_(state["log_kappa"])
        replay = [[field.numpy() for field in each] for each in state["replay"]]
        self.replay = [(Episode(*fields), old_log_prob) for *fields, old_log_prob in replay]


# ---------------------------------------------------------------------------------------------------------------------
# 8. The run
# ---------------------------------------------------------------------------------------------------------------------

EVALUATION = ("eval/return_mean", "eval/return_std", "eval/length_mean", "eval/distance_mean", "eval/normalized_score")
LOSSES = ("loss", "surrogate", "ratio_mean", "ratio_max", "clip_fraction", "kl", "entropy", "kappa", "grad_norm")
LOSSES += ("value_loss",)
METRICS = ["iteration", "charts/env_steps", "charts/SPS", "charts/gradient_updates", "charts/env_steps_full"]
METRICS += ["charts/env_steps_eval", *EVALUATION, "rollout/return", "rollout/length", "rollout/terminated"]
METRICS += [*(f"losses/{name}" for name in (*LOSSES, "ratio_first", "explained_variance"))]
METRICS += ["time/iteration", "time/simulate", "time/infer", "time/update", "time/eval"]
CONSOLE = ("eval/return_mean", "rollout/return", "losses/ratio_first", "losses/ratio_max", "losses/clip_fraction")
CONSOLE += ("losses/entropy", "losses/explained_variance", "charts/SPS")


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


def main(args: Args) -> Path:
    """Algorithm 2; returns the run's folder."""
    base, saved = start(args)
    device, dtype = set_up_torch(args)
    envs = [make_env(args.env_id, base["env_kwargs"]) for _ in range(args.n_trajectories)]
    model = load_model(base).use_precision(dtype).to(device)
    learner, iteration, steps = PPOLearner(model, args), 0, dict(full=0, eval=0)
    if saved:
        if saved["precision"] != str(dtype):
            die(f"the run began in {saved['precision']}, here it is {dtype}: use a device like it.")
        learner.load_state(saved["learner"])
        iteration, steps = saved["iteration"], saved["steps"]
    facts, run_dir = run_facts(base, args, dtype), choose_run_dir(args)
    eval_envs = make_eval_envs(args, base["env_kwargs"], run_dir / "videos")
    log = RunLog(run_dir, METRICS, args, saved)
    print(f"{device.type}, {args.threads} threads, {dtype}, {len(envs)} trajectories at once, in {run_dir}", flush=True)
    if not saved:  # the pretrained policy, before any update
        log.write(0, run_evaluation(args, model, eval_envs, 0))

    first, begun = iteration, time.time()
    while iteration < args.iterations:
        iteration, clock = iteration + 1, [time.time()]
        episodes, seconds = collect_episodes(rollout_copy(model), envs, args, iteration)  # line 2
        clock.append(time.time())
        learner.remember(episodes)  # line 2
        row = learner.update(iteration)  # lines 3-6
        clock.append(time.time())
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            row |= run_evaluation(args, model, eval_envs, iteration)
            steps["eval"] += round(row["eval/length_mean"] * args.eval_episodes)
        row |= {"charts/gradient_updates": learner.updates}
        row |= rollout_columns(episodes, steps, seconds, clock)
        log.write(iteration, row)
        left = (args.iterations - iteration) * (time.time() - begun) / (iteration - first) / 60
        shown = "  ".join(f"{name} {row[name]:,.4g}" for name in CONSOLE if name in row)
        print(f"iteration {iteration}/{args.iterations}  {shown}  {left:.0f} min left", flush=True)
        content = dict(iteration=iteration, rows=log.rows, steps=steps, weights=model.state_dict())
        save_checkpoint(run_dir / "checkpoint.pt", facts | content | dict(learner=learner.state()))
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
