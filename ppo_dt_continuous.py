"""PPO-DT: online finetuning of a Decision Transformer with PPO's gradients alone.

  "Online Finetuning Decision Transformers with Pure RL Gradients" (Luo & Zhu), Algorithm 2, Table 7
  1. roll out K_PPO trajectories at return-to-go g_online; those of the last four iterations stay  (line 2)
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
In full:     python ppo_dt_continuous.py --env-id Hopper-v5 --pretrained runs/NAME
"""

from __future__ import annotations

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
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: the end, without a traceback

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributions import Normal, kl_divergence

# Shapes: N trajectories of T steps side by side, M steps of all that are kept, padding included; B minibatch of
#         sub-trajectories of L = c_train steps, K context, S and A dimensions of observation and action, E embedding
#         width.

# ---- 2. Arguments and the paper's settings --------------------------------------------------------------------------

DatasetKind = Literal["random", "medium", "medium-replay", "expert", "human", "cloned", "umaze", "diverse"]


@dataclass
class Args:
    """Finetune a pretrained Decision Transformer by PPO-DT. Numbers left at None take the paper's row (ROWS)."""

    env_id: str = "Hopper-v5"  # an environment of gymnasium, gymnasium-robotics, or MODULE:ID of your own
    env_kwargs: str | None = None  # its arguments as JSON: '{"healthy_reward": 2.0}' [None: the data's or checkpoint's]
    pretrained: str | None = None  # run folder of pretrain_dt.py [None: made from random data, in minutes]
    dataset_kind: DatasetKind | None = None  # kind of data, picks the paper's row [None: the checkpoint's]
    embed_dim: int = 512  # E, width of the transformer that is made where --pretrained is left out
    iterations: int = 500  # T of Algorithm 2 [not in the paper]
    small: bool = False  # take the settings for a laptop (SMALL) where no flag says otherwise
    seed: int = 1  # seed of every random stream

    # Rollouts and advantages
    n_trajectories: int | None = None  # K_PPO: full trajectories rolled out per iteration
    replay_iterations: int = 4  # iterations for which full trajectories are kept
    gamma: float | None = None  # discount per step
    gae_lambda: float | None = None  # lambda of GAE: 0 trusts the value network, 1 the returns
    g_online: float | None = None  # initial return-to-go of rollouts [raw reward units]
    g_eval: float | None = None  # initial return-to-go of evaluations [raw reward units; None: the checkpoint's]
    c_online: int | None = None  # context length [steps]

    # Update
    c_train: int | None = None  # c_train: steps per sub-trajectory [not in the paper]
    n_batch: int | None = None  # sub-trajectories per minibatch
    n_minibatches: int = 8  # gradient updates per iteration [not in the paper]
    epsilon: float | None = None  # clipping range of the importance ratio
    beta: float = 1e-3  # weight of the KL divergence to the reference policy
    reference_every: int = 4  # the reference policy becomes the current one every so many updates
    lr: float | None = None  # lr_policy, of LAMB: relative movement of a tensor per update
    weight_decay: float = 1e-4  # weight decay, on every tensor as in ODT
    max_grad_norm: float = 0.5  # bound of the global gradient norm
    kappa_initial: float | None = None  # initial value of the entropy dual variable kappa
    kappa_lr: float = 1e-4  # Adam's learning rate on log kappa

    # Value network
    value_dim: int | None = None  # width of the value network's two hidden layers
    value_norm: bool | None = None  # LayerNorm before the value network's activations
    lr_value: float | None = None  # learning rate of the value network, of AdamW
    value_warmup: int = 200  # updates of the value network on the first trajectories' returns, before anything else

    # Ablation
    hindsight: bool = False  # Fig. 1: new log-probabilities see the returns that were reached

    # The run
    eval_every: int = 10  # iterations between evaluations
    eval_episodes: int = 10  # episodes of an evaluation
    threads: int | None = None  # CPU threads of torch [None: torch's choice, or OMP_NUM_THREADS]
    cuda: bool = True  # run the network on a GPU if there is one
    bf16: bool = True  # bf16 matrix products where the hardware has units for it
    run_dir: str | None = None  # folder of the run [None: runs/ENV__SCRIPT__KIND__SEED__TIME-PID]
    resume: str | None = None  # folder of a run to go on with; flags given with it hold from there on
    eval_only: str | None = None  # evaluate the checkpoint in this folder, of any script here, and stop
    capture_video: bool = False  # film each evaluation's first episode into RUN_DIR/videos (needs moviepy)
    track: bool = False  # also log to Weights & Biases (needs wandb)


# Table 7 and its caption (epsilon, gamma, lambda); size and norm of the value network: Table 5 and Appendix B.1. The
# paper gives c_train no value: here it is Table 7's c_offline, but 5, not 1, in AntMaze diverse. Keys:
# task_of(environment id), kind of data.
COLUMNS = ("n_batch", "c_online", "g_online", "n_trajectories", "lr", "lr_value", "kappa_initial")
COLUMNS += ("c_train", "value_dim", "value_norm", "epsilon", "gamma", "gae_lambda")
LOCOMOTION = (20, 256, False, 0.2, 0.99, 0.95)  # the second line of COLUMNS
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
# --small: what learns on a processor core in minutes, measured on Hopper and Ant (docs/results.md). Else the paper's.
SMALL = dict(embed_dim=128, gamma=0.995, n_batch=64)


# ---- 3. Model -------------------------------------------------------------------------------------------------------

ACTION_LIMIT = 1.0 - 1e-6  # ODT's: actions stay inside (-1, 1), where atanh is finite
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # the standard deviation depends on the state, squashed into this range


def squash(u: torch.Tensor) -> torch.Tensor:
    """The action tanh(u), inside ODT's limits. That of a mean u is the median of the action. Departure (1)."""
    return torch.tanh(u).clamp(-ACTION_LIMIT, ACTION_LIMIT)


def log_prob(dist: Normal, u: torch.Tensor) -> torch.Tensor:
    """log-density of the action tanh(u) for u ~ dist, summed over its dimensions: (..., A) -> (...)."""
    log_slope = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))  # log d tanh(u)/du, stable for large |u|
    return (dist.log_prob(u) - log_slope).sum(-1)


def attention(q, k, v, mask: torch.Tensor, dropout: float) -> torch.Tensor:
    """Softmax attention. q (B, heads, L', E / heads), k, v (B, heads, L, E / heads), mask (B or 1, 1, L', L)."""
    if k.shape[2] > 3:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # Few tokens: plain products take a fraction of the time of a kernel that is made for long sequences.
    logits = (q.float().unsqueeze(3) * k.float().unsqueeze(2)).sum(-1)  # (B, heads, L', L)
    logits = logits / q.shape[-1] ** 0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    weights = F.dropout(weights, dropout).unsqueeze(4)  # (B, heads, L', L, 1)
    return (weights * v.float().unsqueeze(2)).sum(3)  # (B, heads, L', E / heads)


class Block(nn.Module):
    """Pre-LayerNorm transformer block: x += attention(LN x); x += MLP(LN x)."""

    def __init__(self, embed_dim: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(embed_dim)
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key_value = nn.Linear(embed_dim, 2 * embed_dim)
        self.project = nn.Linear(embed_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.up = nn.Linear(embed_dim, 4 * embed_dim)
        self.down = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, read: slice = slice(None)) -> torch.Tensor:
        """x (B, L, E), mask (B or 1, 1, L, L) True where a query may look -> the tokens in `read` (B, L', E)."""
        dropout = self.dropout if self.training else 0.0
        h = self.norm1(x)
        q = self.query(h[:, read].contiguous())  # (B, L', E); a strided input rounds differently under no_grad
        k, v = self.key_value(h).chunk(2, dim=-1)  # (B, L, E) each
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, L, E / heads)
        h = attention(q, k, v, mask[:, :, read], dropout)
        h = self.project(h.transpose(1, 2).flatten(2))  # (B, L', E)
        x = x[:, read] + F.dropout(h, dropout)
        h = self.down(F.silu(self.up(self.norm2(x))))
        return x + F.dropout(h, dropout)


class DecisionTransformer(nn.Module):
    """ODT's stochastic Decision Transformer with the paper's Table 5.

    Tokens (g_1, s_1, a_1, ..., g_K, s_K); the action of a step is read from its state token. Takes raw observations and
    raw returns: their mean, std and scale are buffers, saved with the weights.
    """

    kind = "dt"

    def __init__(self, obs_dim, act_dim, embed_dim=512, n_layers=4, n_heads=4, kind="dt", dropout=0.0):
        """kind: not read; it is among a checkpoint's sizes, where load_model looks at it."""
        super().__init__()
        self.act_dim = act_dim
        self.dropout = dropout
        self.bf16 = False
        self.embed_return = nn.Linear(1, embed_dim)
        self.embed_observation = nn.Linear(obs_dim, embed_dim)
        self.embed_action = nn.Linear(act_dim, embed_dim)
        self.norm_in = nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, n_heads, dropout) for _ in range(n_layers))
        self.norm_out = nn.LayerNorm(embed_dim)
        self.mean_head = nn.Linear(embed_dim, act_dim)
        self.log_std_head = nn.Linear(embed_dim, act_dim)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("return_scale", torch.ones(()))
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)  # GPT-2's; embeddings keep PyTorch's
                nn.init.zeros_(layer.bias)
        for head in (self.mean_head, self.log_std_head):
            nn.init.orthogonal_(head.weight)
            nn.init.zeros_(head.bias)

    def attention_mask(self, real: torch.Tensor, n_tokens: int) -> torch.Tensor:
        """Causal, and blind to padded steps: (B, 1, L, L). real (B, K): False where a step is left padding."""
        causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=real.device).tril()
        visible = real.repeat_interleave(3, dim=1)[:, None, None, :n_tokens]  # (B, 1, 1, L)
        itself = torch.eye(n_tokens, dtype=torch.bool, device=real.device)  # else a padded row sees nothing: NaN
        return (causal & visible) | itself

    def forward(self, observations, returns, actions, real, every_step: bool = False) -> Normal:
        """Distribution of u at a window's last step, (B, A), or at every step, (B, K, A); the action is tanh(u).

        observations (B, K, S) and returns (B, K): raw. actions (B, K, A) in [-1, 1]; the last one is not read.
        real (B, K): False where a step is left padding.
        """
        n_tokens = 3 * returns.shape[1] - 1  # none for the last action, which is yet to be chosen
        s = self.embed_observation((observations - self.obs_mean) / self.obs_std)  # (B, K, E)
        g = self.embed_return((returns * self.return_scale)[..., None])  # (B, K, E)
        a = self.embed_action(actions)  # (B, K, E)
        tokens = [g, s, a][:n_tokens]  # n_tokens = 2 at context 1: no a, no gradient for its weights
        x = torch.stack(tokens, dim=2).flatten(1, 2)[:, :n_tokens]  # (B, L, E); no positional embedding (B.1)
        x = F.dropout(self.norm_in(x), self.dropout, self.training)
        mask = self.attention_mask(real, n_tokens)
        read = slice(1, None, 3) if every_step else slice(-1, None)  # the state tokens that actions are read from
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):  # departure (6)
            for block in self.blocks[:-1]:
                x = block(x, mask)
            x = self.blocks[-1](x, mask, read)  # works out no more than is read
        x = self.norm_out(x.float())  # (B, 1 or K, E)
        x = x if every_step else x[:, 0]
        spread = torch.tanh(self.log_std_head(x))
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (spread + 1.0)
        return Normal(self.mean_head(x), log_std.exp(), validate_args=False)

    def conditioned_on(self, observations, returns, actions, real) -> torch.Tensor:
        """The returns-to-go (B, K) that actions are conditioned on: those asked for. Takes what `forward` takes. A
        model that predicts its own (benchmark/reinformer.py) puts that of the last step in place."""
        return returns


class ValueNetwork(nn.Module):
    """V(s): an MLP of two hidden layers on the observation, normalised as for the transformer (Table 5)."""

    def __init__(self, model: DecisionTransformer, width: int, norm: bool):
        super().__init__()
        self.norm = norm
        self.hidden = nn.ModuleList([nn.Linear(len(model.obs_mean), width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 1)
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
        return self.center + self.scale * self.head(x).squeeze(-1)  # departure (5)

    def set_units(self, returns: torch.Tensor) -> None:
        """Take mean and std of these discounted returns for zero and one. Returns that are all alike set no scale."""
        std, mean = torch.std_mean(returns, correction=0)
        self.center.copy_(mean)
        self.scale.copy_(torch.where(std < 1e-3, 1.0, std))


# ---- 4. Rollouts ----------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """N rollouts of T steps side by side, behind the K - 1 steps before them: the window of step t is [t, t + K). The
    first four fields are what the network reads, in the order in which `forward` takes them."""

    observations: np.ndarray  # (N, K - 1 + T, S)
    returns: np.ndarray  # (N, K - 1 + T) the return-to-go that the action was conditioned on, raw
    actions: np.ndarray  # (N, K - 1 + T, A) in [-1, 1]
    real: np.ndarray  # (N, K - 1 + T) False: padding, or after the end
    u: np.ndarray  # (N, T, A) before tanh: the action is tanh(u)
    rewards: np.ndarray  # (N, T)
    snapshots: np.ndarray  # (N, T, D) states of GRPO-DT's simulators before each action, else (N, 0, 0)
    terminated: np.ndarray  # (N,) whether the task ended it, not a limit
    last_observation: np.ndarray  # (N, S) after the last step


@torch.no_grad()
def rollout(policy, sims, observations, g, noise, last, past=None, context=1, snapshots=False) -> Steps:
    """Play `sims` side by side from `observations` (N, S) at returns-to-go g (N,), row i for last[i] steps at most.

    noise (N, L, A): the first L steps sample, those after them take the mean action; L = 0 is an evaluation.
    past: the K - 1 steps before, as the first four fields of Steps [None: padding]. snapshots: keep sims.states too.
    """
    n, sampled, act_dim = noise.shape
    front = context - 1  # columns before step 0
    total = int(last.max())
    device = policy.obs_mean.device
    g = g.astype(np.float64)  # astype copies: the caller's arrays stay as they are
    observations = observations.astype(np.float64)
    steps = Steps(
        observations=np.zeros((n, front + total, observations.shape[1]), np.float32),
        returns=np.zeros((n, front + total), np.float32),
        actions=np.zeros((n, front + total, act_dim), np.float32),
        real=np.zeros((n, front + total), bool),
        u=np.zeros((n, total, act_dim), np.float32),
        rewards=np.zeros((n, total)),
        snapshots=np.zeros((n, total, sims.states.shape[1]) if snapshots else (n, 0, 0)),
        terminated=np.zeros(n, bool),
        last_observation=observations,  # the array that the loop below keeps up to date
    )
    for field, before in zip(steps, past or ()):
        field[:, :front] = before
    alive = np.arange(n)
    with torch.autocast(device.type, enabled=False):  # the outermost autocast keeps the bf16 copies of weights
        for t in range(total):
            now = (alive, front + t)  # rows and column of this step
            steps.observations[now] = observations[alive]
            steps.returns[now] = g[alive]
            steps.real[now] = True
            if snapshots:
                steps.snapshots[alive, t] = sims.states[alive]
            window = [torch.from_numpy(field[alive, t : t + context]).to(device) for field in steps[:4]]
            window[1] = policy.conditioned_on(*window)
            steps.returns[now] = window[1][:, -1].cpu()  # g itself, unless the model predicts its own
            dist = policy(*window)
            u = dist.mean
            if t < sampled:
                u = u + dist.stddev * torch.from_numpy(noise[alive, t]).to(device)
            steps.u[alive, t] = u.cpu()
            steps.actions[now] = squash(u).cpu()
            observations[alive], rewards, terminated, truncated = sims.step(alive, steps.actions[now])
            steps.rewards[alive, t] = rewards
            steps.terminated[alive] = terminated
            g[alive] -= rewards  # g_{h+1} = g_h - r_h, never clamped
            alive = alive[~terminated & ~truncated & (t + 1 < last[alive])]
            if not len(alive):
                break
    return steps


class Trajectory(Steps):
    """A row of Steps without its axis N, cut at its end: T steps behind K - 1 of padding, (0, 0) where no snapshots."""


def draw_noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal, for all rows and steps, also of rows that have ended: so no row's noise depends on another's."""
    return rng.standard_normal(shape, dtype=np.float32)


def collect(policy, sims, n: int, args: Args, rng: np.random.Generator, snapshots=False) -> list[Trajectory]:
    """Line 2: n full trajectories side by side, with sampled actions, from g_online."""
    observations = sims.reset(rng.integers(2**31, size=n))
    noise = draw_noise(rng, n, sims.limit, policy.act_dim)
    g = np.full(n, args.g_online)
    last = np.full(n, sims.limit)
    steps = rollout(policy, sims, observations, g, noise, last, context=args.c_online, snapshots=snapshots)
    trajectories, front = [], args.c_online - 1
    for i, length in enumerate(steps.real.sum(1)):
        fields = [field[i, : front + length] for field in steps[:4]]
        fields += [field[i, :length] for field in steps[4:7]]  # u, rewards, snapshots: no padding before them
        fields += [steps.terminated[i], steps.last_observation[i]]
        trajectories.append(Trajectory(*(np.array(field) for field in fields)))  # copies: a view would keep all rows
    return trajectories


def evaluate(policy, sims, args: Args, iteration: int, film_to: Path | None = None) -> dict[str, float]:
    """Episodes with the mean action, from g_eval: the columns eval/ of metrics.csv. The same (seed, iteration) plays
    the same episodes, so a saved model scores what it scored in memory. film_to: a folder, for the first episode."""
    begun = time.perf_counter()
    seeds = np.random.default_rng([args.seed, iteration, 1]).integers(2**31, size=args.eval_episodes)
    n = len(seeds)
    g = np.full(n, args.g_eval)
    last = np.full(n, sims.limit)
    noise = np.zeros((n, 0, policy.act_dim), np.float32)
    steps = rollout(policy, sims, sims.reset(seeds), g, noise, last, context=args.c_online)
    if film_to:
        film(sims.env, args.env_id, int(seeds[0]), steps.actions[0][steps.real[0]], film_to)
    returns = steps.rewards.sum(1)
    return {
        "eval/return_mean": returns.mean().item(),
        "eval/return_std": returns.std().item(),
        "eval/length_mean": steps.real.sum(1).mean().item(),
        "eval/normalized_score": normalized_score(args.env_id, returns.mean().item()),
        "time/eval": time.perf_counter() - begun,
    }


# ---- 5. Advantage, loss, update -------------------------------------------------------------------------------------


def gae(rewards: np.ndarray, values: np.ndarray, terminated: bool, gamma: float, lam: float) -> np.ndarray:
    """Eq. 4: advantages (T,) of rewards (T,) and values (T + 1,) of the states before each action and after the last.

    After a true end the last value counts as 0; after the time limit it stands for the rewards not seen.
    """
    following = values[1:].copy()  # (T,)
    if terminated:
        following[-1] = 0.0
    delta = rewards + gamma * following - values[:-1]
    advantages = np.zeros(len(rewards))
    later = 0.0
    for h in reversed(range(len(rewards))):
        later = delta[h] + gamma * lam * later
        advantages[h] = later
    return advantages


class Batch(NamedTuple):
    """Sub-trajectories of L steps behind the K - 1 steps before them, windows as in Steps. What
    all_steps gives holds all M steps that are kept, in one row: (M, ...) each."""

    observations: torch.Tensor  # (B, K - 1 + L, S)
    returns: torch.Tensor  # (B, K - 1 + L) raw; under --hindsight those that were reached
    actions: torch.Tensor  # (B, K - 1 + L, A)
    real: torch.Tensor  # (B, K - 1 + L) False: padding, or after the trajectory's end
    u: torch.Tensor  # (B, L, A)
    old_log_prob: torch.Tensor  # (B, L)
    advantage: torch.Tensor  # (B, L) of Eq. 4, not normalised
    value_target: torch.Tensor  # (B, L) V_target of Eq. 6


def windows(steps: torch.Tensor, context: int) -> torch.Tensor:
    """Every window of K consecutive steps: (B, K - 1 + L, ...) -> (B L, K, ...)."""
    return steps.unfold(1, context, 1).movedim(-1, 2).flatten(0, 1)  # unfold puts K last: (B, L, ..., K)


def distribution(model: DecisionTransformer, sub) -> Normal:
    """The policy's distribution of u (B, L, A) at each step of `sub`, from the very window that the rollout saw."""
    context = sub.real.shape[1] - sub.u.shape[1] + 1  # K
    dist = model(*(windows(field, context) for field in sub[:4]))  # B L windows of K steps
    return Normal(dist.mean.view_as(sub.u), dist.stddev.view_as(sub.u), validate_args=False)


def masked_mean(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean over the real steps: values and real of one shape."""
    return (values * real).sum() / real.sum()


def ppo_loss(model, reference, sub: Batch, kappa: torch.Tensor, args: Args) -> tuple[torch.Tensor, dict]:
    """Minus Eq. 5 and minus the entropy term kappa H; and the values to log."""
    real = sub.real[:, -sub.u.shape[1] :]  # (B, L) of the sampled steps, without the K - 1 before them
    mean = masked_mean(sub.advantage, real)
    std = masked_mean((sub.advantage - mean) ** 2, real).sqrt()
    advantage = (sub.advantage - mean) / (std + 1e-8)  # (B, L), line 5: normalised over the batch
    dist = distribution(model, sub)
    log_ratio = (log_prob(dist, sub.u) - sub.old_log_prob) * real  # (B, L), one per step
    ratio = log_ratio.clamp(-20.0, 20.0).exp()  # departure (2)
    clipped = ratio.clamp(1.0 - args.epsilon, 1.0 + args.epsilon)
    surrogate = masked_mean(torch.min(ratio * advantage, clipped * advantage), real)  # Eq. 5

    with torch.no_grad():
        reference_dist = distribution(reference, sub)
    kl = masked_mean(kl_divergence(dist, reference_dist).sum(-1), real)  # of the Gaussians: tanh keeps a KL as it is
    entropy = masked_mean(-log_prob(dist, dist.rsample()), real)  # estimated by one sample a step
    loss = -(surrogate - args.beta * kl + kappa * entropy)  # Eq. 5 and the entropy constraint's Lagrangian
    values = {"loss": loss, "surrogate": surrogate, "kl": kl, "entropy": entropy}
    values["ratio_mean"] = masked_mean(ratio, real)
    values["ratio_max"] = ratio.max()
    values["clip_fraction"] = masked_mean((clipped != ratio).float(), real)
    return loss, values


class PPOLearner:
    """Networks, reference, optimisers, entropy dual and buffer: all that an iteration's updates change."""

    def __init__(self, model: DecisionTransformer, args: Args):
        self.model = model.eval()  # no dropout in finetuning (Table 5)
        self.args = args
        self.device = model.obs_mean.device
        self.updates = 0
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = Lamb(model.parameters(), args.lr, args.weight_decay)
        self.log_kappa = torch.tensor(math.log(args.kappa_initial), device=self.device, requires_grad=True)
        self.dual = torch.optim.Adam([self.log_kappa], lr=args.kappa_lr)
        torch.manual_seed(args.seed)  # of the value network's weights
        self.value = ValueNetwork(model, args.value_dim, args.value_norm).to(self.device)
        self.value_optimizer = torch.optim.AdamW(self.value.parameters(), args.lr_value)
        self.replay: list[tuple[Trajectory, np.ndarray]] = []  # with old log-probabilities (T,)

    @torch.no_grad()
    def remember(self, trajectories: list[Trajectory]) -> None:
        """Line 2: the trajectories enter the buffer, the first ones in it leave."""
        for trajectory in trajectories:
            length = len(trajectory.rewards)
            after = -length % 128  # padding: on a CPU each new number of rows costs 3 MB of bf16 kernels for good
            fields = [torch.from_numpy(pad(field, 0, after))[None] for field in trajectory[:5]]
            empty = torch.zeros(1, length + after)
            sub = Batch(*(field.to(self.device) for field in fields), empty, empty, empty)  # of T steps
            # departure (4): by the update's own forward, so that before the first step the ratio is 1
            old_log_prob = log_prob(distribution(self.model, sub), sub.u)  # (1, T), then padding
            self.replay.append((trajectory, old_log_prob[0, :length].cpu().numpy()))
        self.replay = self.replay[-self.args.replay_iterations * self.args.n_trajectories :]

    @torch.no_grad()
    def all_steps(self, lam: float) -> Batch:
        """Line 3: every step kept with its advantage, in one row (M, ...): each trajectory between K - 1 steps of
        padding and L - 1 more, so that a sub-trajectory and its windows are slices."""
        args, device = self.args, self.device
        front, back = args.c_online - 1, args.c_train - 1
        pieces = []  # the fields of each trajectory
        for trajectory, old_log_prob in self.replay:
            states = np.vstack([trajectory.observations[front:], trajectory.last_observation]).astype(np.float32)
            values = self.value(torch.from_numpy(states).to(device)).cpu().numpy()  # (T + 1,)
            advantage = gae(trajectory.rewards, values, trajectory.terminated, args.gamma, lam)
            target = advantage + values[:-1]  # V_target of Eq. 6
            observations, returns, actions, real, u = trajectory[:5]
            if args.hindsight:
                returns = np.pad(trajectory.rewards, (front, 0))[::-1].cumsum()[::-1]  # those that were reached
            seen = [pad(field, 0, back) for field in (observations, returns, actions, real)]  # with padding in front
            pieces.append(seen + [pad(field, front, back) for field in (u, old_log_prob, advantage, target)])
        flat = [torch.from_numpy(np.concatenate(field)).to(device) for field in zip(*pieces)]
        return Batch(*(field.float() if field.is_floating_point() else field for field in flat))

    def draw(self, flat: Batch, rng: np.random.Generator) -> Batch:
        """Lines 4 and 5: n_batch sub-trajectories, each from a step drawn uniformly over all that are kept, which is a
        trajectory drawn in proportion to its length."""
        first = rng.choice(np.flatnonzero(flat.real.cpu()), size=self.args.n_batch)  # (B,), departure (3)
        index = first[:, None] + np.arange(1 - self.args.c_online, self.args.c_train)  # (B, K - 1 + L)
        index = torch.from_numpy(index).to(flat.real.device)
        own = index[:, self.args.c_online - 1 :]  # (B, L)
        return Batch(*(field[index] for field in flat[:4]), *(field[own] for field in flat[4:]))

    def update_value(self, sub: Batch) -> torch.Tensor:
        """A step on Eq. 6; returns the loss."""
        length = sub.u.shape[1]
        values = self.value(sub.observations[:, -length:])  # (B, L)
        loss = masked_mean((values - sub.value_target) ** 2, sub.real[:, -length:])  # Eq. 6
        self.value_optimizer.zero_grad()
        loss.backward()
        self.value_optimizer.step()
        return loss

    def warm_up_value(self, rng: np.random.Generator) -> None:
        """Departure (5): before the first iteration, fit the value network to the discounted returns (lambda = 1)."""
        flat = self.all_steps(1.0)
        self.value.set_units(flat.value_target[flat.real])
        for update in range(1, self.args.value_warmup + 1):
            self.update_value(self.draw(flat, rng))
            if update % 50 == 0:  # what lies beyond the time limit is the network's own estimate, better by now
                flat = self.all_steps(1.0)

    def update(self, rng: np.random.Generator) -> dict[str, float]:
        """Lines 3 to 6: minibatches drawn from the buffer, a gradient step each; means of the values to log."""
        args, logged = self.args, []
        torch.manual_seed(int(rng.integers(2**31)))  # of the entropy's samples
        flat = self.all_steps(args.gae_lambda)  # line 3
        for _ in range(args.n_minibatches):
            if self.updates % args.reference_every == 0:
                self.reference.load_state_dict(self.model.state_dict())
            sub = self.draw(flat, rng)
            kappa = self.log_kappa.exp()
            loss, values = ppo_loss(self.model, self.reference, sub, kappa.detach(), args)
            self.optimizer.zero_grad()
            loss.backward()
            values["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            self.optimizer.step()
            # the dual of H >= rho, rho = -dim A: min over kappa >= 0 of kappa (H - rho)
            self.dual.zero_grad()
            (kappa * (values["entropy"].detach() + self.model.act_dim)).backward()
            self.dual.step()
            self.updates += 1
            values["kappa"] = kappa
            values["value_loss"] = self.update_value(sub)
            logged.append({name: value.detach() for name, value in values.items()})
        losses = mean_losses(logged)
        target = flat.value_target[flat.real]  # advantage + value, both from before these updates
        unexplained = flat.advantage[flat.real].var() / target.var().clamp(min=1e-8)
        return losses | {"losses/explained_variance": 1.0 - unexplained.item()}

    PARTS = ("model", "reference", "optimizer", "dual", "value", "value_optimizer")

    def state(self) -> dict:
        """What a resumed run needs."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        replay = [[torch.from_numpy(field) for field in (*trajectory, old)] for trajectory, old in self.replay]
        return parts | dict(log_kappa=self.log_kappa.detach(), updates=self.updates, replay=replay)

    def load_state(self, state: dict) -> None:
        """Go on from what `state` gave, at the rates of the arguments."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.optimizer.param_groups[0].update(lr=self.args.lr, weight_decay=self.args.weight_decay)
        self.dual.param_groups[0]["lr"] = self.args.kappa_lr
        self.value_optimizer.param_groups[0]["lr"] = self.args.lr_value
        self.log_kappa.data.copy_(state["log_kappa"])
        self.updates = state["updates"]
        for saved in state["replay"]:
            *fields, old_log_prob = (field.numpy() for field in saved)
            self.replay.append((Trajectory(*fields), old_log_prob))


def pad(field: np.ndarray, before: int, after: int) -> np.ndarray:
    """Zeros before and after the steps (T, ...)."""
    return np.pad(field, [(before, after)] + [(0, 0)] * (field.ndim - 1))


# ---- 6. Algorithm 2 -------------------------------------------------------------------------------------------------


def main(args: Args) -> Path:
    """Algorithm 2; returns the run's folder."""
    base = start(args)  # a checkpoint, pretrained now if none is given; fills args from the paper's row
    model = load_model(base, set_up_torch(args), args.bf16)
    run_dir = choose_run_dir(args)
    env = make_env(args.env_id, env_kwargs_of(args, base["env_kwargs"]))
    learner = PPOLearner(model, args)
    iteration, env_steps, rows = 0, 0, []
    if args.resume:
        learner.load_state(base["learner"])
        iteration, env_steps, rows = base["iteration"], base["env_steps"], base["rows"]
    film_to = run_dir / "videos" if args.capture_video else None
    size = max(args.n_trajectories, args.eval_episodes)
    with Environments(env, size) as sims, Log(run_dir, args, args.iterations, rows) as log:
        if not rows:  # the pretrained policy, before any update
            log.add({"iteration": 0} | evaluate(model, sims, args, 0, film_to))
        while iteration < args.iterations:
            iteration += 1
            rng = np.random.default_rng([args.seed, iteration])  # of all that is drawn in this iteration
            clock = [time.perf_counter(), sims.seconds]  # now, and spent in sims.step so far
            trajectories = collect(model, sims, args.n_trajectories, args, rng)  # line 2
            clock += [time.perf_counter(), sims.seconds]
            learner.remember(trajectories)  # line 2
            if learner.updates == 0:
                learner.warm_up_value(rng)  # departure (5)
            row = {"iteration": iteration} | learner.update(rng)  # lines 3-6
            row |= trajectory_metrics(trajectories) | time_metrics(*clock)
            if iteration % args.eval_every == 0 or iteration == args.iterations:
                row |= evaluate(model, sims, args, iteration, film_to)
            env_steps += sum(len(each.rewards) for each in trajectories)
            log.add(row | {"charts/env_steps": env_steps, "charts/gradient_updates": learner.updates})
            content = dict(iteration=iteration, env_steps=env_steps, rows=log.rows, weights=model.state_dict())
            content |= dict(learner=learner.state())
            save_checkpoint(run_dir / "checkpoint.pt", run_facts(base, args) | content)
    print(f"checkpoint: {run_dir / 'checkpoint.pt'}", flush=True)
    return run_dir


# What follows is machinery, which a first reading may skip: optimiser, environments, the run's folder.


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2019) as ODT uses it: Adam's direction with both bias corrections, weight decay on every tensor,
    rescaled to the norm of the tensor it moves. So a step moves each tensor by lr of its norm, unless that is 0."""

    def __init__(self, params, lr: float, weight_decay: float, betas=(0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, step=0))

    @torch.no_grad()
    def step(self) -> None:
        """One step for every parameter that has a gradient: at context 1 the action embedding has none."""
        for group in self.param_groups:
            group["step"] += 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = dict(m=torch.zeros_like(p), v=torch.zeros_like(p))
                m = self.state[p]["m"].lerp_(p.grad, 1.0 - beta1)
                v = self.state[p]["v"].lerp_(p.grad.square(), 1.0 - beta2)
                m_hat = m / (1.0 - beta1 ** group["step"])
                v_hat = v / (1.0 - beta2 ** group["step"])
                direction = m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * p
                trust = p.norm() / direction.norm()
                trust = torch.where((trust > 0) & trust.isfinite(), trust, 1.0)  # a zero tensor: a plain step
                p -= group["lr"] * trust * direction


# ---- 7. Environments ------------------------------------------------------------------------------------------------

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
    task = re.split("[/:]", env_id)[-1].rsplit("-v", 1)[0]
    return "AntMaze" if task.startswith("AntMaze_") else task


def normalized_score(env_id: str, returns: float) -> float:
    """D4RL's score, 0 = random, 100 = expert; NaN for a task without reference returns."""
    low, high = REFERENCE_RETURNS.get(task_of(env_id), (math.nan, math.nan))
    return 100.0 * (returns - low) / (high - low)


class D4RLRules(gym.Wrapper):
    """Flat observations, and D4RL's rewards and terminations where gymnasium-robotics 1.4.2 differs (docs/datasets.md).

    Since 1.2.1 its door, hammer and relocate add 0.1 |hand - object| where D4RL subtracts it: taking it off twice puts
    that right. D4RL's pen ends when it has fallen below 0.075 m; today's never does.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.rules = env.spec.id  # the corrections are for -v1 ids: a -v2 would be right as it is
        if isinstance(env.observation_space, gym.spaces.Dict):
            size = sum(space.shape[0] for space in env.observation_space.values())
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def flat(self, observation) -> np.ndarray:
        """A copy of its own (S,); a goal dictionary in the order of GOAL_KEYS, whose first 29 are D4RL's AntMaze."""
        if isinstance(observation, dict):
            observation = np.concatenate([observation[key] for key in GOAL_KEYS])
        return np.array(observation, np.float64)

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        return self.flat(observation), info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(np.copy(action))  # a task may write into it
        observation = self.flat(observation)
        reward = np.asarray(reward, np.float64).item()  # some tasks give an array (1,)
        if self.rules == "AdroitHandDoor-v1":
            reward -= 0.2 * np.linalg.norm(observation[35:38])  # palm - handle
        elif self.rules == "AdroitHandHammer-v1":
            reward -= 0.2 * np.linalg.norm(observation[33:36] - observation[36:39])
        elif self.rules == "AdroitHandRelocate-v1":
            reward -= 0.2 * np.linalg.norm(observation[30:33])  # palm - ball
        elif self.rules == "AdroitHandPen-v1":
            terminated = terminated or observation[26] < 0.075  # height of the pen
        return observation, reward, bool(terminated), bool(truncated), info


def make_env(env_id: str, env_kwargs: dict, render_mode: str | None = None) -> gym.Env:
    """The environment `env_id` under D4RL's rules, with flat observations. Exits with a line if it does not suit."""
    task, kwargs = task_of(env_id), dict(env_kwargs)
    if ":" in env_id and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the module may lie in the current folder
    if render_mode:
        kwargs["render_mode"] = render_mode
    if task == "AdroitHandPen":
        kwargs.setdefault("max_episode_steps", 100)  # D4RL's; gymnasium-robotics gives 200
    if task == "AntMaze":
        kwargs["continuing_task"] = False  # an episode ends at the goal, its return is 0 or 1
    gym.logger.min_level = gym.logger.ERROR  # -v4 ids are meant here, and the Adroit reward is put right above
    with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
    try:
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
    except Exception as error:  # gymnasium's errors, missing packages, and whatever a task's own code raises
        # where gymnasium-robotics 1.4.2 meets mujoco 3.12 or later, it asserts without a word
        why = str(error) or f"{error!r}, as Fetch, Hand and FrankaKitchen tasks say where mujoco is 3.12 or later"
        die(f"cannot make the environment {env_id}: {why}. Name one such as Hopper-v5 or Ant-v4.")
    actions, seen = env.action_space, env.observation_space
    parts = seen.values() if isinstance(seen, gym.spaces.Dict) and {*seen} == {*GOAL_KEYS} else [seen]
    if not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (*parts, actions)):
        die(f"{env_id} has actions {actions} and observations {seen}: both must be flat Boxes (goal keys may stay).")
    if actions.dtype.kind != "f":
        die(f"{env_id} has actions in whole numbers, {actions}: a policy's are continuous, so give it a Box of floats.")
    if np.abs([actions.low, actions.high]).max() > 1e30:
        die(f"{env_id} has unbounded actions {actions}: they are scaled between their bounds, so give it finite ones.")
    if env.spec.max_episode_steps is None:
        die(f"{env_id} has no time limit, so an episode might never end: register it with max_episode_steps.")
    env = D4RLRules(env)
    env.kwargs = env_kwargs  # for whoever makes the same environment again
    try:  # a step, for the old API and whatever a task's own code raises
        first, _ = env.reset(seed=0)
        following = env.step(actions.high)[0]
    except Exception as error:
        die(f"{env_id} cannot be played: {error!r}. It must be of gymnasium's API, docs/environments.md shows one.")
    if {first.shape, following.shape} != {env.observation_space.shape}:
        shapes = f"{first.shape} and {following.shape}"
        die(f"{env_id} gave observations of shapes {shapes}, its space is {env.observation_space}: mend it.")
    return env


def env_kwargs_of(args: Args, known: dict | None = None) -> dict:
    """The environment's arguments: those of --env-kwargs, or a checkpoint's (`known`), with which --env-kwargs must
    agree."""
    try:
        given = json.loads(args.env_kwargs or "{}")
    except json.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        die(f"--env-kwargs is {args.env_kwargs}: give JSON, in quotes: --env-kwargs '{{\"healthy_reward\": 2.0}}'.")
    if known is None:
        return given
    if known | given != known:
        die(f"the checkpoint was made with --env-kwargs '{json.dumps(known)}': leave the flag out, or pretrain anew.")
    return known


def scale_action(action: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """From the network's [-1, 1] to the bounds of the environment, in the type of its Box: (..., A)."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return (low + (action + 1.0) * 0.5 * (high - low)).astype(space.dtype)


def film(env: gym.Env, env_id: str, seed: int, actions: np.ndarray, folder: Path) -> None:
    """Play the episode of `seed` again in a twin of `env`, by its actions (T, A), before a camera."""
    try:
        camera = make_env(env_id, env.kwargs, "rgb_array")
        camera = gym.wrappers.RecordVideo(camera, str(folder), lambda episode: True, name_prefix=f"seed-{seed}")
        camera.reset(seed=seed)
        for action in actions:
            camera.step(scale_action(action, env.action_space))
        camera.close()
        print(f"film: {folder}", flush=True)
    except (Exception, SystemExit) as error:  # no GL library, no display, no render_mode: no reason to end a run
        print(f"cannot film {env_id}: {error}. It needs a GL library (MUJOCO_GL=egl).", file=sys.stderr)


def check_finite(env_id: str, rewards: np.ndarray, observations: np.ndarray) -> None:
    """Exits with a line where a task gave a reward or an observation that is not finite."""
    for what, values in (("a reward", rewards), ("an observation", observations)):
        if not np.isfinite(values).all():
            die(f"{env_id} gave {what} that is not finite: mend it. If that is rare, --resume with another --seed.")


class Environments:
    """N environments of one kind, played side by side in this process. A context manager: leaving it closes them."""

    def __init__(self, env: gym.Env, size: int):
        """env: of make_env, the first of them; the others are made like it."""
        self.env, self.envs = env, [env, *(make_env(env.spec.id, env.kwargs) for _ in range(size - 1))]
        self.limit, self.space, self.seconds = env.spec.max_episode_steps, env.action_space, 0.0

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *_) -> None:
        for env in self.envs:
            env.close()

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """A new episode from each of `seeds` (n,) in the first n environments: observations (n, S)."""
        return np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(self.envs, seeds)])

    def step(self, rows: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step environments `rows` (n,) by actions (n, A) in [-1, 1]: observations (n, S), and rewards, terminated,
        truncated (n,) each."""
        begun = time.perf_counter()
        outcomes = [self.envs[i].step(action)[:4] for i, action in zip(rows, scale_action(actions, self.space))]
        observations, rewards, terminated, truncated = (np.array(each) for each in zip(*outcomes))
        check_finite(self.env.spec.id, rewards, observations)
        self.seconds += time.perf_counter() - begun
        return observations, rewards, terminated, truncated


# ---- 8. Run folder --------------------------------------------------------------------------------------------------


def die(message: str) -> NoReturn:
    """End with one line on stderr and exit code 1."""
    raise SystemExit("error: " + re.sub(r"\s*\n\s*", " ", message))


def write_file(path: Path, content: bytes) -> None:
    """Written beside `path`, then renamed: whenever the process dies, `path` is whole, the old one or the new."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict) -> None:
    """Plain types and tensors, so that torch.load(weights_only=True) reads them."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of any script here, on the CPU. Exits with a line if it is missing, damaged or foreign."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        die(f"checkpoint {path} not found: give the folder of a run, or the checkpoint.pt in it.")
    try:
        archive = zipfile.ZipFile(path)
        compressed = any(entry.compress_type for entry in archive.infolist())  # torch never does: it might be endless
        if compressed or archive.testzip():  # checksums, which torch does not look at
            raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not {"script", "iteration", "sizes", "weights", "args", "env_id", "env_kwargs", "g_eval"} <= content.keys():
            raise ValueError
        if not (isinstance(content["sizes"], dict) and isinstance(content["env_kwargs"], dict)):
            raise ValueError
    except Exception:  # zipfile and torch raise BadZipFile, RuntimeError, UnpicklingError, KeyError and more
        die(f"{path} is damaged, or no checkpoint of these scripts: take another.")
    return content


def set_up_torch(args: Args) -> torch.device:
    """The device; sets how many threads torch takes."""
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def load_model(content: dict, device: torch.device, bf16: bool, dropout: float = 0.0) -> DecisionTransformer:
    """The network of a checkpoint. bf16: its matrix products in that precision, where the device has units for it."""
    sizes, weights = content["sizes"], content["weights"]
    kind = sizes.get("kind", "dt")
    if kind != DecisionTransformer.kind:
        program = Path(__file__).name if kind == "dt" else f"benchmark/{kind}.py"
        die(f"the checkpoint holds a {kind}: {program} takes it.")
    try:
        found = {"obs_dim": len(weights["obs_mean"]), "act_dim": len(weights["mean_head.bias"])}
        found |= {"embed_dim": len(weights["norm_in.bias"])}
        found |= {"n_layers": sum(name.endswith(".norm1.bias") for name in weights)}
        if not found.items() <= sizes.items() or sizes["n_heads"] < 1 or sizes["embed_dim"] % sizes["n_heads"]:
            raise ValueError  # before memory is taken by the sizes' word
        model = DecisionTransformer(**sizes, dropout=dropout)
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError):
        die(f"the checkpoint's weights do not fit its sizes {sizes}: take another.")
    model.bf16 = bf16 and has_bf16(device)
    return model.to(device)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has units for bf16 matrix products."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def run_facts(base: dict, args: Args) -> dict:
    """What every checkpoint of a run says beside weights and state: plain types, for whoever resumes or evaluates."""
    facts = {key: base[key] for key in ("sizes", "env_id", "env_kwargs", "dataset", "dataset_best_return")}
    facts |= dict(script=Path(__file__).stem, dataset_kind=args.dataset_kind, args=vars(args) | {"resume": None})
    return facts | dict(g_eval=args.g_eval, c_online=args.c_online)


def mean_losses(logged: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Of an iteration's updates, columns losses/ of metrics.csv: means, the largest ratio, and the mean ratio before
    the first step."""
    table = torch.stack([torch.stack(list(values.values())) for values in logged])
    table = table.cpu().numpy()  # (updates, values); the only wait for the device
    if not np.isfinite(table).all():
        die("the loss is not finite: lower --lr, and --resume the run if it has a checkpoint.")
    columns = dict(zip(logged[0], table.T))
    losses = {f"losses/{name}": column.mean().item() for name, column in columns.items()}
    if "ratio_mean" in columns:
        losses["losses/ratio_max"] = columns["ratio_max"].max().item()
        losses["losses/ratio_first"] = columns["ratio_mean"][0].item()
    return losses


def trajectory_metrics(trajectories: list[Trajectory]) -> dict[str, float]:
    """Of an iteration's full trajectories, columns rollout/ of metrics.csv."""
    return {
        "rollout/return": np.mean([trajectory.rewards.sum() for trajectory in trajectories]).item(),
        "rollout/length": np.mean([len(trajectory.rewards) for trajectory in trajectories]).item(),
        "rollout/terminated": np.mean([trajectory.terminated for trajectory in trajectories]).item(),
    }


def time_metrics(begun: float, simulated: float, rolled: float, simulated_then: float) -> dict[str, float]:
    """Seconds of the parts of an iteration, columns time/ of metrics.csv: of clock and simulators when the iteration
    began, and when its rollouts were done; the update has just ended."""
    simulate = simulated_then - simulated
    now = time.perf_counter()
    parts = {"time/simulate": simulate, "time/infer": rolled - begun - simulate}
    return parts | {"time/update": now - rolled, "time/iteration": now - begun}


def git(*words: str) -> str:
    """What git answers in this script's folder; "" without git, or outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "-c", "color.ui=never", "-c", "diff.noprefix=false", *words]
    if not shutil.which("git"):
        return ""
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout.rstrip("\n")


class Log:
    """metrics.csv and TensorBoard under the same names, args.json beside them, wandb behind --track, and a line an
    iteration on the console. A context manager; the run's folder belongs to it alone."""

    def __init__(self, run_dir: Path, args: Args, total: int, rows: list[dict]):
        """total: iterations in all. rows: those of a run that goes on; all is written anew, so what came after its
        checkpoint is gone."""
        self.lock = claim(run_dir, args)
        self.path = run_dir / "metrics.csv"
        self.total, self.rows, self.shown, self.lines = total, rows, [], 0
        self.begun = time.time()
        self.first = rows[-1]["iteration"] if rows else 0
        packages = ("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "minari")
        installed = {each.name: each.version for each in importlib.metadata.distributions()}
        device = set_up_torch(args)
        precision = "bf16" if args.bf16 and has_bf16(device) else "fp32"
        name = Path(__file__).name
        facts = dict(script=name, command=sys.argv, args=vars(args), device=device.type, precision=precision)
        tracked = git("ls-files", f":/*{name}")
        facts["commit"] = git("rev-parse", "--verify", "-q", "HEAD") if tracked else ""
        facts["diff"] = git("diff", "--no-ext-diff", "HEAD", "--", ":/*.py") if tracked else ""
        facts["versions"] = {name: installed[name] for name in packages if name in installed}
        write_file(run_dir / "args.json", json.dumps(facts, indent=2).encode())
        print(f"{run_dir}: {device.type}, {args.threads} threads, {precision}", flush=True)
        if args.track:
            import wandb

            try:
                wandb.init(project="online-dt-rl", name=run_dir.name, config=vars(args), sync_tensorboard=True)
            except Exception as error:  # no login, no network
                die(f"--track: {error}. Run wandb login, set WANDB_MODE=offline, or leave it out.")
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = lambda failure: None  # of TensorBoard's thread: the next write raises its error again
        self.writer = SummaryWriter(str(run_dir), purge_step=0)
        for row in rows:
            self.show(row)
        self.write()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        self.writer.flush()  # raises what TensorBoard's thread met; close() would not
        self.writer.close()
        self.lock.close()

    def add(self, row: dict[str, float]) -> None:
        """A row, without values that are NaN."""
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        self.rows.append(row)
        self.show(row)
        self.write()
        self.tell(row)

    def tell(self, row: dict[str, float]) -> None:
        """A line on the console; the headings now and then."""
        done = row["iteration"] - self.first
        left = (self.total - row["iteration"]) * (time.time() - self.begun) / done if done else None
        self.begun = self.begun if done else time.time()  # the evaluation before the first iteration is none
        names = [name for name in CONSOLE if any(name in each for each in [*self.rows, row])]
        if self.lines % 20 == 0 or names != self.shown:
            print("iteration".rjust(13) + "".join(CONSOLE[name][0].rjust(8) for name in names), flush=True)
        self.lines, self.shown = self.lines + 1, names
        print(console_line(row, names, self.total, left), flush=True)

    def write(self) -> None:
        """metrics.csv, whole; its columns are the names of all rows so far."""
        file = io.StringIO()
        table = csv.DictWriter(file, dict.fromkeys(name for each in self.rows for name in each), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_file(self.path, file.getvalue().encode())

    def show(self, row: dict[str, float]) -> None:
        """In TensorBoard."""
        for name in row.keys() - {"iteration"}:
            self.writer.add_scalar(name, row[name], row["iteration"])


CONSOLE = {
    "eval/return_mean": ("eval", ",.0f"),
    "eval/normalized_score": ("score", ".1f"),
    "rollout/return": ("return", ",.0f"),
    "rollout/kept": ("kept", ".2f"),
    "losses/nll": ("nll", ".4g"),
    "losses/action_mse": ("mse", ".4f"),
    "losses/q_mean": ("Q", ".3g"),
    "losses/explained_variance": ("V", ".2f"),
    "losses/ratio_first": ("ratio", ".2f"),
    "losses/ratio_max": ("max", ".3g"),
    "losses/clip_fraction": ("clip", ".2f"),
    "losses/entropy": ("H", ".2f"),
}


def console_line(row: dict[str, float], names: list[str], total: int, left: float | None) -> str:
    """A row's values under the headings of `names`, of CONSOLE; left: seconds to the end."""
    line = f"{row['iteration']}/{total}".rjust(13)
    for name in names:
        texts = [format(row[name], style) for style in (CONSOLE[name][1], ".1e", ".0e") if name in row]
        line += next((text for text in texts if len(text) < 8), "").rjust(8)  # a space at least before it
    if left is not None:
        minutes = round(left / 60)
        line += f" {minutes // 60}:{minutes % 60:02} left".rjust(12)
    return line


def choose_run_dir(args: Args) -> Path:
    """The folder of this run, yet to be made. Exits with a line rather than mix two runs in one folder."""
    name = f"{args.env_id}__{Path(__file__).stem}__{args.dataset_kind}__{args.seed}__{int(time.time())}-{os.getpid()}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{re.sub('[/:]', '_', name)}")
    if args.resume and run_dir.is_file():  # --resume RUN_DIR/checkpoint.pt will do
        run_dir = run_dir.parent
    there = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        die(f"cannot write into {there}: {error.strerror}. Mend that, or choose another --run-dir.")
    if args.resume:
        return run_dir
    table = run_dir / "metrics.csv"
    foreign = table.exists() or (run_dir / "args.json").exists()
    if foreign and (run_dir / ".lock").exists():  # a run that broke off before its first checkpoint: at most two rows
        foreign = table.exists() and table.read_bytes().count(b"\n") > 3
    if foreign or (run_dir / "checkpoint.pt").exists():
        die(f"{run_dir} holds a run or other files: go on with --resume {run_dir}, or choose another --run-dir.")
    return run_dir


def hold(file, wait: bool) -> bool:
    """Lock an open file for this process and for children that inherit it, until they end. False: another has it."""
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
    return True


def claim(run_dir: Path, args: Args):
    """Make the folder and hold it for this process, until that ends, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir / ".lock", "w")
    if not hold(lock, wait=False):
        die(f"another process is at work in {run_dir}: wait for it, or choose another --run-dir.")
    choose_run_dir(dataclasses.replace(args, run_dir=str(run_dir)))  # a run may have ended there since the first look
    return lock


def paper_row(env_id: str, kind: str) -> tuple[str, dict]:
    """The name of the row to take, and its values by field: the task's row of this kind of data, else of medium, cloned
    or umaze. Outside the table Hopper's, without g_online, which means nothing there."""
    task = task_of(env_id)
    for each in (kind, "medium", "cloned", "umaze"):
        if (task, each) in ROWS:
            return f"{task} {each}", dict(zip(COLUMNS, ROWS[task, each]))
    return "outside the table", dict(zip(COLUMNS, ROWS["Hopper", "medium"])) | {"g_online": None}


def fill_from_table(args: Args, kind: str, best_return: float) -> None:
    """Fill the fields that are None from the paper's row, and print what is in use. Outside the table g_online is
    best + |best| of the dataset's returns."""
    args.dataset_kind = args.dataset_kind or kind
    source, row = paper_row(args.env_id, args.dataset_kind)
    row["g_online"] = row["g_online"] or best_return + abs(best_return)
    for name, value in row.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    values = ", ".join(f"{name} {getattr(args, name):g}" for name in COLUMNS)
    print(f"row {source} ({args.dataset_kind} data): {values}", flush=True)


def pretrained_on_random(args: Args) -> Path:
    """The run folder that is used where --pretrained is left out: pretrain_dt.py on random data of this environment,
    for this width, context and seed, kept under runs/pretrained: minutes on two cores. What was broken off goes on."""
    context = args.c_online or paper_row(args.env_id, args.dataset_kind or "random")[1]["c_online"]
    # a context of c_online and small minibatches at a large rate: quick, and groups whose members differ
    recipe = dict(updates=900, batch_size=max(1, 128 // (3 * context - 1)), lr=1e-3, dataset_steps=30_000)
    made_by = "-".join(f"{value:g}" for value in recipe.values())
    task = re.sub("[/:]", "_", args.env_id)
    task += f"__{zlib.crc32(args.env_kwargs.encode()):08x}" if args.env_kwargs else ""
    name = f"{task}__{args.embed_dim}__c{context}__v2-{made_by}__{args.seed}"
    target = Path(f"runs/pretrained/{name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:  # the child holds it too: if this process dies, the next one waits for it
        if not hold(lock, wait=False):
            print(f"no --pretrained given: waiting for the process that makes {target}", flush=True)
            hold(lock, wait=True)
        begun = (target / "checkpoint.pt").exists()
        if begun and load_checkpoint(target)["iteration"] >= recipe["updates"]:
            print(f"no --pretrained given: taking {target}, pretrained on random data", flush=True)
            return target
        print(f"no --pretrained given: pretraining on random data in {target}", flush=True)
        flags = dict(env_id=args.env_id, embed_dim=args.embed_dim, c_offline=context, c_online=context, seed=args.seed)
        flags = dict(env_id=args.env_id, resume=target) if begun else recipe | flags | dict(run_dir=target)
        flags |= {name: value for name in ("threads", "env_kwargs") if (value := getattr(args, name))}
        command = [sys.executable, str(Path(__file__).with_name("pretrain_dt.py")), "--save-data"]
        command += ["--cuda" if args.cuda else "--no-cuda", "--bf16" if args.bf16 else "--no-bf16"]
        command += [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
        inherited = [lock.fileno()] if os.name == "posix" else []
        code = subprocess.run(command, pass_fds=inherited).returncode
        if code:
            if not (target / "checkpoint.pt").exists():
                shutil.rmtree(target, ignore_errors=True)
            if code == 1:  # it has said why
                raise SystemExit(1)
            die(f"pretraining on random data ended with code {code}: run this again, or give --pretrained.")
    return target


def start(args: Args) -> dict:
    """The checkpoint to begin with, or to go on from; where none is given, pretraining makes one in minutes. Fills
    `args` from the paper's row."""
    check_args(args)
    choose_run_dir(args)  # an occupied one is refused before minutes of pretraining
    if not (args.resume or args.pretrained):
        args.pretrained = str(pretrained_on_random(args))
    path = args.resume or args.pretrained
    base = load_checkpoint(path)
    if base["env_id"] != args.env_id:
        die(f"{path} was pretrained in {base['env_id']}, not in {args.env_id}: give the one or the other.")
    if args.resume and base["iteration"] > args.iterations:
        die(f"{path} is at iteration {base['iteration']}: give --iterations {base['iteration']} or more.")
    args.embed_dim = base["sizes"]["embed_dim"]
    fill_from_table(args, base["dataset_kind"], base["dataset_best_return"])
    args.g_eval = base["g_eval"] if args.g_eval is None else args.g_eval
    return base


def eval_only(args: Args, players) -> None:
    """Evaluate the checkpoint --eval-only in `players`, which is Environments or Simulators; nothing is written but the
    film."""
    check_args(args)
    content, folder = load_checkpoint(args.eval_only), Path(args.eval_only)
    model = load_model(content, set_up_torch(args), args.bf16)
    env = make_env(args.env_id, env_kwargs_of(args, content["env_kwargs"]))
    film_to = (folder.parent if folder.is_file() else folder) / "videos" if args.capture_video else None
    with players(env, args.eval_episodes) as sims:
        row = evaluate(model, sims, args, content["iteration"], film_to)
    shown = [name for name in row if name.startswith("eval/") and not math.isnan(row[name])]
    shown = [f"{name.removeprefix('eval/')} {row[name]:,.1f}" for name in shown]
    print(f"evaluation: {', '.join(shown)} ({args.eval_episodes} episodes, g = {args.g_eval:,.0f})", flush=True)


# Fields of all scripts here.
MAY_BE_ZERO = ("seed", "l_eval", "delta_r", "beta", "weight_decay", "kappa_lr", "workers", "dropout", "gae_lambda")
MAY_BE_ZERO += ("value_warmup", "critic_warmup", "target_noise", "target_noise_clip", "one_scale")
UP_TO_ONE = ("gamma", "gae_lambda", "tau", "dropout")
ANY_SIGN = ("g_online", "g_eval")


def check_args(args: Args) -> None:
    """Exits with a line on values that cannot work, before anything is written."""
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if value == "":
            die(f"{flag} is empty: give a value, or leave it out.")
        if type(value) in (int, float):
            fits = value > 0 or (value == 0 and name in MAY_BE_ZERO) or name in ANY_SIGN
            if not (fits and abs(value) < 2**31) or (name in UP_TO_ONE and value > 1):  # NaN is not below
                least = "" if name in ANY_SIGN else ", 0 or more" if name in MAY_BE_ZERO else " above 0"
                most = "up to 1" if name in UP_TO_ONE else "below 2**31"
                die(f"{flag} is {value}: give a finite number{least}, {most}.")
            cores = os.cpu_count() or 1
            if name in ("threads", "workers") and value > 8 * cores:
                die(f"{flag} is {value}, on a machine of {cores} cores: give up to {8 * cores}.")
    for flag, wanted, package in (("track", args.track, "wandb"), ("capture-video", args.capture_video, "moviepy")):
        found = importlib.util.find_spec(package)
        if wanted and not (found and found.origin):  # a mere folder of that name, as wandb leaves, has none
            die(f"--{flag} needs {package}: pip install {package}.")


# Fields of all scripts here that the saved state hangs on: they may not change when a run goes on.
FIXED = ("env_id", "pretrained", "dataset_kind", "embed_dim", "c_online", "l_traj", "kappa_initial", "run_dir")
FIXED += ("hindsight", "full_trajectories", "mixed_groups", "ratio", "random_points", "n_layers", "n_heads")
FIXED += ("value_dim", "value_norm", "critic_dim", "critic_norm", "reward_divisor", "small")


def parse_args(arguments: list[str] | None = None) -> Args:
    """The command line. With --resume or --eval-only, the checkpoint's arguments are the defaults."""
    args = tyro.cli(Args, args=arguments)
    path = args.resume or args.eval_only
    if path is None:
        if args.small:
            args = tyro.cli(Args, args=arguments, default=Args(small=True, **SMALL))
            kept = "embed_dim" if vars(args).get("pretrained") else ""  # a checkpoint has its own
            shown = [f"{name} {getattr(args, name)}" for name in SMALL if name != kept]
            print(f"--small: {', '.join(shown)}", flush=True)
        return args
    content = load_checkpoint(path)
    if args.resume and (args.eval_only or content["script"] != Path(__file__).stem):
        die(f"{path} is a run of {content['script']}.py: resume it with that script, without --eval-only.")
    if args.resume and not isinstance(content.get("rows"), list):
        die(f"{path} holds weights alone or is of an older version: start a new run.")
    if ":" in content["env_id"] and args.env_id != content["env_id"]:  # gym.make would import what stands before it
        die(f"{path} imports a module, {content['env_id']}: if you trust it, give --env-id {content['env_id']}.")
    values = content["args"] | {"env_id": content["env_id"], "g_eval": content["g_eval"]}
    saved = Args(**{name: value for name, value in values.items() if name in vars(args)})
    if args.eval_only:
        own = dict(c_online=content["c_online"], threads=None, workers=None)
        own |= dict(capture_video=False, track=False, resume=None)
        saved = dataclasses.replace(saved, **{name: own[name] for name in own.keys() & vars(args).keys()})
    args = tyro.cli(Args, args=arguments, default=saved)
    names = FIXED if args.resume else ("env_id", "c_online", "embed_dim")
    for name in [name for name in names if name in vars(args)]:
        old, new, flag = getattr(saved, name), getattr(args, name), "--" + name.replace("_", "-")
        if old != new:
            die(f"{path} was made with {flag} {old}, not {new}: leave {flag} out, or start a run of its own.")
    return args


if __name__ == "__main__":
    if any(word.replace("_", "-") == "--capture-video" for word in sys.argv) and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when a camera is first made
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a ± where the terminal knows ASCII alone
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        arguments = parse_args()
        eval_only(arguments, Environments) if arguments.eval_only else main(arguments)
    except SystemExit as stop:  # tyro's code for bad usage is 2
        raise SystemExit(1 if stop.code == 2 else stop.code) from None
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # twice is once
        raise SystemExit("stopped: a run that has a checkpoint goes on with --resume RUN_DIR") from None
    except OSError as error:
        die(f"{error}: what was written before is kept; once that is mended, go on with --resume RUN_DIR.")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch's, of a CPU or GPU
            raise
        die(f"out of memory, {error}: give smaller sizes, the flags' help says what they count.")

# What `uv run ppo_dt_continuous.py` installs: requirements.txt.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.14.0",
#     "gymnasium-robotics==1.4.2",
#     "minari[hdf5,hf]==0.5.4",
#     "h5py==3.16.0",
#     "Pillow==13.0.0",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "matplotlib==3.11.2",
# ]
# ///
