"""Pretraining: a stochastic Decision Transformer from offline data, the start of all finetuning here.

  "Online Finetuning Decision Transformers with Pure RL Gradients" (Luo & Zhu), Section 2, Appendix A, Table 5
  1. cut the dataset into trajectories; the return-to-go of a step is the sum of the rewards from it on
  2. draw windows of c_offline steps (g, s, a), every step of the data equally likely to be the first
  3. maximise log pi(a | window) under the entropy constraint H(pi) >= -dim A           (ODT's objective)
  4. LAMB with linear warm-up; at the end, evaluate at the return-to-go g_eval with context c_online

Departures from the paper and from ODT, its base (docs/pretrain_dt.md explains each under the same number):
  (1) the mean action is tanh(mean), the median of the squashed Gaussian, not its expectation: ODT does the same
  (2) an observation that is constant in the data (std < 1e-3) is centred but not scaled
  (3) entropy is a mean over real steps (ODT averages over padding too); heads without a loss are left out
  (4) runs shorter than the row's number of updates warm up over a tenth of their updates, not over 10,000
  (5) "random" data are uniformly random actions; D4RL's random sets come from an untrained policy
  (6) matrix products in bf16 where the hardware has units for it; residual stream, norms, heads, losses in fp32
  (7) D4RL's rules are put back where gymnasium-robotics 1.4.2 differs (docs/datasets.md)

On a laptop: python pretrain_dt.py --env-id Hopper-v5 --embed-dim 128 --updates 500 --batch-size 64 --lr 1e-3
In full:     python pretrain_dt.py --env-id Hopper-v5 --dataset mujoco/hopper/medium-v0
"""

from __future__ import annotations

import contextlib
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
from torch.distributions import Normal

# Shapes: B windows, K context, S and A dimensions of observation and action, E embedding width, N steps of a dataset
#         and M its trajectories; in rollouts N episodes side by side.

# ---- 2. Arguments and the paper's settings --------------------------------------------------------------------------

DatasetKind = Literal["random", "medium", "medium-replay", "expert", "human", "cloned", "umaze", "diverse"]


@dataclass
class Args:
    """Pretrain a Decision Transformer on offline data. Numbers left at None take the task's row (ROWS)."""

    env_id: str = "Hopper-v5"  # an environment of gymnasium, gymnasium-robotics, or MODULE:ID of your own
    env_kwargs: str | None = None  # its arguments as JSON: '{"healthy_reward": 2.0}' [None: the data's or checkpoint's]
    dataset: str = "random"  # a Minari id, a path ending in .hdf5 (D4RL's layout), or random: uniformly random actions
    dataset_kind: DatasetKind | None = None  # kind of data, picks the row [None: read off the dataset's name]
    dataset_steps: int = 100_000  # size of the random dataset [environment steps]
    drop_last_episode: bool = False  # leave out the last trajectory, as the paper's episode counts do
    save_data: bool = False  # keep the data as RUN_DIR/data.npz, for q_guided_grpo_dt.py (Ant: 460 MB a million steps)
    small: bool = False  # take the settings for a laptop (SMALL) where no flag says otherwise
    seed: int = 1  # seed of every random stream

    # Network
    embed_dim: int = 512  # E, width of the transformer
    n_layers: int = 4  # transformer blocks
    n_heads: int = 4  # attention heads per block
    dropout: float = 0.1  # dropout in embeddings, attention and blocks, while pretraining only [probability]
    c_offline: int | None = None  # context length in training [steps]
    c_online: int | None = None  # context length of evaluations, and of finetuning from here [steps]

    # Update
    updates: int | None = None  # gradient updates in total
    batch_size: int = 256  # windows per update
    lr: float | None = None  # of LAMB: relative movement of a tensor per update
    warmup: int | None = None  # linear warm-up [updates; None: 10,000, or a tenth of --updates below the row's number]
    weight_decay: float = 1e-4  # weight decay, on every tensor as in ODT
    max_grad_norm: float = 0.5  # bound of the global gradient norm
    kappa_initial: float = 0.1  # initial value of the entropy dual variable kappa
    kappa_lr: float = 1e-4  # Adam's learning rate on log kappa

    # The run
    g_eval: float | None = None  # initial return-to-go of evaluations [raw reward units]
    eval_episodes: int = 10  # episodes of an evaluation
    log_every: int = 100  # updates between rows of metrics.csv, each with a checkpoint
    threads: int | None = None  # CPU threads of torch [None: torch's choice, or OMP_NUM_THREADS]
    cuda: bool = True  # run the network on a GPU if there is one
    bf16: bool = True  # bf16 matrix products where the hardware has units for it
    run_dir: str | None = None  # folder of the run [None: runs/ENV__SCRIPT__KIND__SEED__TIME-PID]
    resume: str | None = None  # folder of a run to go on with; flags given with it hold from there on
    eval_only: str | None = None  # evaluate the checkpoint in this folder, of any script here, and stop
    capture_video: bool = False  # film each evaluation's first episode into RUN_DIR/videos (needs moviepy)
    track: bool = False  # also log to Weights & Biases (needs wandb)


# Updates and learning rates are ODT+TD3's (Yan et al. 2024), to which the paper's Appendix B.1 defers; contexts are
# those of Table 6. g_eval is the return-to-go that evaluations begin at: ODT's, for door, pen and hammer the paper's
# g_online. Relocate and HalfCheetah are not in the paper: ODT+TD3's, but for a context of 1. Keys: task_of(id), and for
# AntMaze the kind of data.
COLUMNS = ("updates", "lr", "c_offline", "c_online", "g_eval")
ROWS = {
    "Hopper": (5_000, 1e-4, 20, 1, 3600.0),
    "Walker2d": (10_000, 1e-3, 20, 1, 5000.0),
    "Ant": (5_000, 1e-4, 20, 1, 6000.0),
    "HalfCheetah": (5_000, 1e-4, 20, 1, 6000.0),
    "AdroitHandDoor": (40_000, 1e-4, 5, 1, 3000.0),
    "AdroitHandPen": (40_000, 1e-4, 5, 1, 6000.0),
    "AdroitHandHammer": (40_000, 1e-4, 5, 5, 4000.0),
    "AdroitHandRelocate": (40_000, 1e-4, 5, 1, 5000.0),
    "AntMaze": (200_000, 1e-4, 5, 1, 1.0),
    "AntMaze diverse": (200_000, 1e-4, 1, 5, 1.0),
}
# --small: a network for the other scripts' --small, in minutes of a processor core. Else the row's.
SMALL = dict(embed_dim=128, c_offline=1, updates=4_000, lr=1e-3)


def fill_from_row(args: Args, best_return: float) -> None:
    """Fill the fields that are None, dataset_kind from the dataset's name and the others from the task's row, and print
    what is in use. Outside the table that is Hopper's row, and g_eval the best return of the dataset."""
    task = task_of(args.env_id)
    if args.dataset_kind is None:
        name = Path(args.dataset).name.lower().replace("_", "-")
        named = ("random", "medium-replay", "medium", "expert", "human", "cloned", "diverse")
        default = "cloned" if task.startswith("Adroit") else "umaze" if task == "AntMaze" else "medium"
        args.dataset_kind = next((kind for kind in named if kind in name), default)
    key = "AntMaze diverse" if task == "AntMaze" and args.dataset_kind == "diverse" else task
    row = dict(zip(COLUMNS, ROWS.get(key, ROWS["Hopper"])))
    if key not in ROWS:
        row["g_eval"] = best_return
    for name, value in row.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.warmup is None:
        # LAMB moves a tensor by about lr of its norm per update: 2,000 updates under a warm-up of 10,000 would
        # move it by 2 %, and the network would still be the untrained one. Departure (4).
        args.warmup = 10_000 if args.updates >= row["updates"] else max(1, args.updates // 10)
    values = ", ".join(f"{name} {getattr(args, name):g}" for name in (*COLUMNS, "warmup"))
    source = f"row {key}" if key in ROWS else "row outside the table"
    print(f"{source} ({args.dataset_kind} data): {values}", flush=True)


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


# ---- 5. Loss and update ---------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """A batch of windows of up to K steps, left-padded."""

    observations: torch.Tensor  # (B, K, S)
    returns: torch.Tensor  # (B, K) return-to-go, raw
    actions: torch.Tensor  # (B, K, A) in (-1, 1)
    real: torch.Tensor  # (B, K) False: padding


def draw_windows(data: Dataset, context: int, size: int, rng: np.random.Generator) -> Windows:
    """`size` windows. Every step of the data is equally likely to be the first: so ODT draws, a trajectory in
    proportion to its length, then a uniform step. Near a trajectory's end a window is short, and padded."""
    ends = np.cumsum(data.lengths)  # (M,)
    first = rng.integers(len(data.rewards), size=size)  # (B,)
    end = ends[np.searchsorted(ends, first, side="right")]  # (B,)
    length = np.minimum(context, end - first)  # (B,)
    offset = np.arange(context) - (context - length)[:, None]  # (B, K) negative: padding
    real = offset >= 0
    index = first[:, None] + offset.clip(min=0)
    # padding is zero, but for actions, which nothing reads there
    fields = [data.observations[index] * real[..., None], data.returns[index] * real, data.actions[index], real]
    return Windows(*(torch.from_numpy(field) for field in fields))


def masked_mean(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean over the real steps: values and real of one shape."""
    return (values * real).sum() / real.sum()


def pretrain_loss(model: DecisionTransformer, windows: Windows, kappa: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """-log pi(a | window) and minus the entropy term kappa H; and the values to log."""
    real = windows.real
    dist = model(*windows, every_step=True)  # of u, (B, K, A)
    nll = -masked_mean(log_prob(dist, torch.atanh(windows.actions)), real)
    entropy = masked_mean(-log_prob(dist, dist.rsample()), real)  # estimated by one sample a step
    loss = nll - kappa * entropy  # the entropy constraint's Lagrangian
    mse = masked_mean((squash(dist.mean) - windows.actions).square().mean(-1), real)
    return loss, {"nll": nll, "entropy": entropy, "action_mse": mse}


class Learner:
    """Network, optimisers and entropy dual: all that an update changes."""

    def __init__(self, model: DecisionTransformer, args: Args):
        self.model = model.train()
        self.args = args
        self.device = model.obs_mean.device
        self.updates = 0
        self.optimizer = Lamb(model.parameters(), args.lr, args.weight_decay)
        self.log_kappa = torch.tensor(math.log(args.kappa_initial), device=self.device, requires_grad=True)
        self.dual = torch.optim.Adam([self.log_kappa], lr=args.kappa_lr)
        self.logged: list[dict[str, torch.Tensor]] = []  # the values of each update since the last row

    def update(self, data: Dataset, rng: np.random.Generator) -> None:
        """A gradient step."""
        args = self.args
        drawn = draw_windows(data, args.c_offline, args.batch_size, rng)
        windows = Windows(*(field.to(self.device) for field in drawn))
        torch.manual_seed(int(rng.integers(2**31)))  # of dropout and the entropy's samples
        kappa = self.log_kappa.exp()
        loss, values = pretrain_loss(self.model, windows, kappa.detach())
        self.optimizer.zero_grad()
        loss.backward()
        values["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.updates += 1
        self.optimizer.param_groups[0]["lr"] = args.lr * min(self.updates / args.warmup, 1.0)  # linear warm-up
        self.optimizer.step()
        # the dual of H >= rho, rho = -dim A: min over kappa >= 0 of kappa (H - rho)
        self.dual.zero_grad()
        (kappa * (values["entropy"].detach() + self.model.act_dim)).backward()
        self.dual.step()
        values["kappa"] = kappa
        self.logged.append({name: value.detach() for name, value in values.items()})

    def metrics(self) -> dict[str, float]:
        """Means over the updates since the last row, columns of metrics.csv."""
        return mean_losses(self.logged) | {"charts/learning_rate": self.optimizer.param_groups[0]["lr"]}

    def state(self) -> dict:
        """What, beside the weights, a resumed run needs."""
        parts = dict(optimizer=self.optimizer.state_dict(), dual=self.dual.state_dict())
        return parts | dict(log_kappa=self.log_kappa.detach(), updates=self.updates, logged=self.logged)

    def load_state(self, state: dict) -> None:
        """Go on from what `state` gave, at the rates of the arguments."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.dual.load_state_dict(state["dual"])
        self.optimizer.param_groups[0]["weight_decay"] = self.args.weight_decay
        self.dual.param_groups[0]["lr"] = self.args.kappa_lr
        self.log_kappa.data.copy_(state["log_kappa"])
        self.updates = state["updates"]
        self.logged = [{name: v.to(self.device) for name, v in values.items()} for values in state["logged"]]


# ---- 6. Pretraining -------------------------------------------------------------------------------------------------


def main(args: Args) -> Path:
    """Pretrain, or go on with a run; returns the run's folder."""
    check_args(args)
    if args.embed_dim % args.n_heads:
        die(f"--embed-dim {args.embed_dim} is not a multiple of --n-heads {args.n_heads}: change one of them.")
    choose_run_dir(args)  # an occupied one is refused before data are collected
    env_kwargs = choose_kwargs(args)
    env = make_env(args.env_id, env_kwargs)
    device = set_up_torch(args)
    data = load_dataset(args, env)
    fill_from_row(args, data.best_return())
    facts = pretraining_facts(args, data, env_kwargs)
    base = start_or_resume(args, data, facts)
    model = load_model(base, device, args.bf16, args.dropout)
    learner = Learner(model, args)
    step, rows = 0, []
    if args.resume:
        learner.load_state(base["learner"])
        step, rows = base["iteration"], base["rows"]
    run_dir = choose_run_dir(args)
    film_to = run_dir / "videos" if args.capture_video else None
    with Environments(env, args.eval_episodes) as sims, Log(run_dir, args, args.updates, rows) as log:
        if args.save_data:
            save_data(run_dir / "data.npz", data)
        begun, first = time.perf_counter(), step  # when the row to come was begun, and after which update
        due = time.time() + 5  # when the console has its next line, beside those of the rows
        while step < args.updates:
            step += 1
            rng = np.random.default_rng([args.seed, step])  # of all that is drawn in this update
            learner.update(data, rng)
            if step % args.log_every and step < args.updates:  # neither a row nor a checkpoint
                if time.time() > due:
                    log.tell({"iteration": step} | learner.metrics())
                    due = time.time() + 30
                continue
            row = {"iteration": step} | learner.metrics()  # ends the run where a loss is not finite
            if step % args.log_every == 0:
                seconds = (time.perf_counter() - begun) / (step - first)
                log.add(row | {"time/iteration": seconds})
                learner.logged.clear()
                begun, first = time.perf_counter(), step
                due = time.time() + 30
            content = dict(iteration=step, rows=log.rows, weights=model.state_dict(), learner=learner.state())
            save_checkpoint(run_dir / "checkpoint.pt", facts | content)
        # the closing row is not among the checkpoint's: a run that goes on to more updates has it at its new end
        log.add({"iteration": step} | evaluate(model.eval(), sims, args, step, film_to))
    print(f"checkpoint: {run_dir / 'checkpoint.pt'}", flush=True)
    return run_dir


# What follows is machinery, which a first reading may skip: optimiser, environments, datasets, the run's folder.


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


# ---- 8. Datasets ----------------------------------------------------------------------------------------------------

# D4RL's umaze with its fixed start (r) and goal (g), in gymnasium-robotics' frame; a Minari dataset brings its own map.
UMAZE = [[1, 1, 1, 1, 1], [1, "r", 0, 0, 1], [1, 1, 1, 0, 1], [1, "g", 0, 0, 1], [1, 1, 1, 1, 1]]


class Dataset(NamedTuple):
    """Whole trajectories, one after the other: N steps in M trajectories. The arrays of data.npz, under their names."""

    observations: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, A) float32, in [-ACTION_LIMIT, ACTION_LIMIT]
    rewards: np.ndarray  # (N,) float32
    returns: np.ndarray  # (N,) float32, return-to-go: the sum of the rewards from a step on, raw and undiscounted
    lengths: np.ndarray  # (M,) steps of each trajectory
    terminated: np.ndarray  # (M,) whether the task ended it, not a time limit

    def best_return(self) -> float:
        """The largest of its trajectories."""
        return self.returns[np.cumsum(self.lengths) - self.lengths].max().item()


@dataclass
class RawData:
    """A dataset as read: flat arrays of N steps, trajectories end where `terminals` or `timeouts` is True."""

    observations: np.ndarray  # (N, S)
    actions: np.ndarray  # (N, A), in the environment's bounds
    rewards: np.ndarray  # (N,)
    terminals: np.ndarray  # (N,)
    timeouts: np.ndarray  # (N,)


def load_dataset(args: Args, env: gym.Env) -> Dataset:
    """The dataset named by `args`, checked against `env` and cut into finished trajectories, actions in [-1, 1]."""
    if args.dataset == "random":
        raw = collect_random(args, env)
    else:
        raw = read_hdf5(Path(args.dataset)) if args.dataset.endswith(".hdf5") else read_minari(args.dataset)
    check_data(raw, args.dataset, env)
    task = task_of(args.env_id)
    pieces = cut_trajectories(raw, task, args.drop_last_episode)
    if not pieces:
        die(f"{args.dataset} has no finished trajectory: none of its steps is a terminal or timeout. Get more steps.")
    actions = np.concatenate([raw.actions[piece] for piece in pieces])
    low, high = env.action_space.low, env.action_space.high
    outside = np.mean(np.any((actions < low) | (actions > high), axis=1))
    if outside:
        print(f"{100 * outside:.2f} % of the actions lie outside the bounds of {args.env_id}: clipped to them")
    actions = 2.0 * (actions - low) / np.maximum(high - low, 1e-6) - 1.0  # the reverse of scale_action
    rewards = [raw.rewards[piece].astype(np.float64) for piece in pieces]
    returns = np.concatenate([each[::-1].cumsum()[::-1] for each in rewards])
    if np.abs(returns).max() > np.finfo(np.float32).max:
        die(f"{args.dataset} has rewards whose sums are not finite in float32: make it again with smaller ones.")
    lasts = np.array([piece.stop - 1 for piece in pieces])
    terminated = raw.terminals[lasts].astype(bool)
    if task == "AntMaze":  # cut at the goal, where an episode ends, though the data may go on after it
        terminated |= raw.rewards[lasts] >= 1.0
    data = Dataset(
        observations=np.concatenate([raw.observations[piece] for piece in pieces]).astype(np.float32),
        actions=actions.clip(-ACTION_LIMIT, ACTION_LIMIT).astype(np.float32),
        rewards=np.concatenate(rewards).astype(np.float32),
        returns=returns.astype(np.float32),
        lengths=np.array([len(each) for each in rewards]),
        terminated=terminated,
    )
    longer = int((data.lengths > env.spec.max_episode_steps).sum())
    if longer:
        print(
            f"{longer:,} episodes are longer than the {env.spec.max_episode_steps:,} steps of {args.env_id}: are their "
            "time limits marked in timeouts? Episodes that run into each other have returns that are too high."
        )
    totals = np.array([each.sum() for each in rewards])
    line = f"{args.dataset}: {len(totals):,} episodes, {len(data.rewards):,} steps, "
    line += f"return {totals.mean():,.1f} ± {totals.std():,.1f}, best {totals.max():,.1f}"
    scores = np.array([normalized_score(args.env_id, total) for total in totals])
    line += "" if np.isnan(scores).any() else f", score {scores.mean():.2f} ± {scores.std():.2f}"
    print(line, flush=True)
    return data


def save_data(path: Path, data: Dataset) -> None:
    """The arrays of `data` under their names."""
    buffer = io.BytesIO()
    np.savez(buffer, **data._asdict())
    write_file(path, buffer.getbuffer())


def fingerprint(data: Dataset) -> int:
    """Tells two datasets apart when a run is resumed."""
    value = 0
    for array in data:
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
        goals = [np.flatnonzero(raw.rewards[piece] >= 1.0) for piece in pieces]  # its steps at the goal
        pieces = [slice(p.start, p.start + g[0] + 1) if len(g) else p for p, g in zip(pieces, goals)]
        pieces = [piece for piece in pieces if piece.stop - piece.start > 1]
    return pieces[:-1] if drop_last else pieces


def check_shapes(raw: RawData, name: str) -> None:
    """Exits with a line on arrays whose shapes do not fit each other, or that do not hold real numbers."""
    arrays = vars(raw)
    shapes = {key: array.shape for key, array in arrays.items()}
    if [len(shape) for shape in shapes.values()] != [2, 2, 1, 1, 1]:
        die(f"{name} has arrays of shapes {shapes}: (N, S), (N, A) and three times (N,) are needed.")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len({*lengths.values()}) > 1:
        die(f"{name} has arrays of different lengths {lengths}: make the dataset again.")
    if any(array.dtype.kind not in "biuf" for array in arrays.values()):
        types = {key: str(array.dtype) for key, array in arrays.items()}
        die(f"{name} has arrays of types {types}: real numbers are needed.")


def check_data(raw: RawData, name: str, env: gym.Env) -> None:
    """Exits with a line on values that are not finite, and on shapes that fit neither each other nor `env`. Of D4RL's
    ant it keeps the columns that Ant-v4 has."""
    check_shapes(raw, name)
    task, found = task_of(env.spec.id), (raw.observations.shape[1], raw.actions.shape[1])
    wanted = (env.observation_space.shape[0], env.action_space.shape[0])
    if task == "Ant" and (found[0], wanted[0]) == (111, 27):
        print("D4RL's 111-column ant: kept the first 27, the other 84 (contact forces) are zero in its data")
        raw.observations, found = raw.observations[:, :27], (27, found[1])
    if task == "AntMaze" and found[0] == 29:
        die(
            f"{name} is D4RL's 29-column antmaze: it lacks the goal, and its ant (torque, time step) and frame are not "
            "gymnasium-robotics'. Use Minari's D4RL/antmaze/umaze-v1 or umaze-diverse-v1."
        )
    if found != wanted:
        hint = "v4 has 27 observations, v5 has 105" if task == "Ant" else "check --env-id"
        die(
            f"{name} has observations of {found[0]} and actions of {found[1]} dimensions, "
            f"{env.spec.id} has {wanted[0]} and {wanted[1]}: {hint}."
        )
    for key, array in vars(raw).items():
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32)).all(axis=tuple(range(1, array.ndim)))  # (N,)
        if not finite.all():
            row = finite.argmin()
            die(f"{name} has a value in {key} that is not finite in float32, first in row {row:,}: make it again.")


def collect_random(args: Args, env: gym.Env) -> RawData:
    """Uniformly random actions in a twin of `env`, so that evaluations find `env` as it was made. Departure (5)."""
    rng = np.random.default_rng([args.seed, 0])
    twin, space = make_env(env.spec.id, env.kwargs), env.action_space
    observation, _ = twin.reset(seed=int(rng.integers(2**31)))
    rows, shown = [], time.time()
    while len(rows) < args.dataset_steps:
        action = rng.uniform(space.low, space.high).astype(space.dtype)
        following, reward, terminated, truncated, _ = twin.step(action)
        rows.append((observation, action, reward, terminated, truncated))
        observation = twin.reset()[0] if terminated or truncated else following
        if time.time() - shown > 5.0:
            shown = time.time()
            print(f"random data: {len(rows):,} of {args.dataset_steps:,} steps", flush=True)
    twin.close()
    return RawData(*(np.array(column) for column in zip(*rows)))


def read_hdf5(path: Path) -> RawData:
    """A file in D4RL's layout. Exits with a line if it is missing, damaged or lacks an array."""
    import h5py

    if not path.is_file():
        die(f"dataset {path} not found: give --dataset the path of an .hdf5 file, a Minari id, or random.")
    names = [field.name for field in dataclasses.fields(RawData)]
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in names if name not in file]
            if missing:
                die(f"{path} lacks {', '.join(missing)}: D4RL's layout has the arrays {', '.join(names)}.")
            raw = RawData(*(file[name] for name in names))
            check_shapes(raw, str(path))
            size = sum(array.nbytes for array in vars(raw).values())
            if size > 1000 * path.stat().st_size:  # no compression does that: before memory is taken by its word
                raise ValueError(f"it says that it has {len(raw.rewards):,} steps, and is too small for them")
            return RawData(*(array[:] for array in vars(raw).values()))
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError, ValueError and more
        die(f"cannot read {path}: {error}. The file is damaged or no HDF5: copy it again.")


def read_minari(dataset_id: str) -> RawData:
    """A Minari dataset as flat arrays. An episode is a trajectory, whether or not its last step bears a flag; it holds
    one more observation than steps, which is left out."""
    dataset = open_minari(dataset_id)
    try:
        episodes = list(dataset.iterate_episodes())
        steps = sum(len(episode) for episode in episodes)
        if steps != dataset.spec.total_steps or not steps:
            raise ValueError(f"it has {steps:,} steps, its metadata say {dataset.spec.total_steps:,}")
        observations = [episode.observations for episode in episodes]
        if isinstance(observations[0], dict):
            observations = [np.concatenate([each[key] for key in GOAL_KEYS], axis=-1) for each in observations]
        if any(len(obs) != len(episode) + 1 for obs, episode in zip(observations, episodes)):
            die(f"{dataset_id} has episodes without their last observation (T instead of T + 1): collect it again.")
        raw = RawData(
            observations=np.concatenate([obs[:-1] for obs in observations]),
            actions=np.concatenate([episode.actions for episode in episodes]),
            rewards=np.concatenate([episode.rewards for episode in episodes]),
            terminals=np.concatenate([episode.terminations for episode in episodes]),
            timeouts=np.concatenate([episode.truncations for episode in episodes]),
        )
        lasts = np.cumsum([len(episode) for episode in episodes]) - 1
        raw.timeouts[lasts] |= ~raw.terminals[lasts]
        return raw
    except Exception as error:  # h5py's and Minari's, which raise KeyError, AssertionError and more
        die_of_minari(dataset_id, error)


def die_of_minari(dataset_id: str, error: Exception) -> NoReturn:
    """What was read of a Minari dataset on this machine raised `error`."""
    from minari.storage.datasets_root_dir import get_dataset_path

    path = get_dataset_path(dataset_id)
    what = str(error) or repr(error)
    die(f"cannot read the Minari dataset {dataset_id}: {what}. Mend {path}, or move it away and get it again.")


def check_entry_points(path: Path) -> None:
    """Minari makes the environment of a set that states no spaces, and so runs what `path`, its metadata, names. Raises
    ValueError where that is code of others than gymnasium's."""
    metadata = json.loads(path.read_text())
    if not {"observation_space", "action_space"} <= metadata.keys():
        spec = json.loads(metadata["env_spec"])
        named = [each["entry_point"] for each in (spec, *spec["additional_wrappers"])]
        if not all(re.match(r"gymnasium(_robotics)?\.", each) for each in named):
            raise ValueError(f"it states no spaces, and its environment is code of others: {named}")


def open_minari(dataset_id: str):
    """The Minari dataset, from this machine or else downloaded. Exits with a line that says what went wrong."""
    import minari
    from minari.storage.datasets_root_dir import get_dataset_path

    if not re.fullmatch(r"[-\w/]+-v\d+", dataset_id):
        die(f'"{dataset_id}" is no dataset: give a Minari id (mujoco/hopper/medium-v0), an .hdf5 path, or random.')
    path, root = get_dataset_path(dataset_id), get_dataset_path()
    if not path.exists():
        print(f"Minari dataset {dataset_id} is not on this machine: asking for it ...", flush=True)
        try:
            from huggingface_hub import constants, get_session

            get_session().head(constants.ENDPOINT, timeout=10)  # without a network Minari would try for half a minute
            remote = minari.list_remote_datasets(prefix=dataset_id.rsplit("-v", 1)[0])
            size = remote.get(dataset_id, {}).get("dataset_size", "unknown")
            print(f"downloading {dataset_id}, {size} MB, to {path}", flush=True)
            minari.download_dataset(dataset_id)
        except Exception as error:  # Minari raises ValueError, FileNotFoundError, bare connection errors and more
            die(f"cannot get the Minari dataset {dataset_id}: {error}. Local ones lie in {root}; check the network.")
    try:
        check_entry_points(path / "data" / "metadata.json")
        return minari.load_dataset(dataset_id)
    except Exception as error:
        die_of_minari(dataset_id, error)


def choose_kwargs(args: Args) -> dict:
    """The environment's arguments: D4RL's umaze for UMaze ids, those of the Minari dataset, those of --env-kwargs. Each
    overrides those before it. A run that goes on keeps its own."""
    if args.resume:
        return env_kwargs_of(args, load_checkpoint(args.resume)["env_kwargs"])
    umaze = task_of(args.env_id) == "AntMaze" and "_UMaze-" in args.env_id
    kwargs = {"maze_map": UMAZE} if umaze else {}
    if args.dataset != "random" and not args.dataset.endswith(".hdf5"):
        spec = open_minari(args.dataset).spec.env_spec
        if spec is not None and spec.id == args.env_id.split(":")[-1]:  # another version may know other arguments
            kwargs |= {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    return kwargs | env_kwargs_of(args)


# ---- 9. Run folder --------------------------------------------------------------------------------------------------


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


def pretraining_facts(args: Args, data: Dataset, env_kwargs: dict) -> dict:
    """What every checkpoint of a run says beside weights and state: plain types, for whoever resumes, finetunes or
    evaluates."""
    sizes = dict(obs_dim=data.observations.shape[1], act_dim=data.actions.shape[1], embed_dim=args.embed_dim)
    sizes |= dict(n_layers=args.n_layers, n_heads=args.n_heads, kind=DecisionTransformer.kind)
    facts = dict(script=Path(__file__).stem, sizes=sizes, env_id=args.env_id, env_kwargs=env_kwargs)
    facts |= dict(dataset=args.dataset, dataset_kind=args.dataset_kind, dataset_best_return=data.best_return())
    facts |= dict(fingerprint=fingerprint(data), args=vars(args) | {"resume": None})
    return facts | dict(g_eval=args.g_eval, c_online=args.c_online)


def start_or_resume(args: Args, data: Dataset, facts: dict) -> dict:
    """The checkpoint to go on from, or that of an untrained network, with the data's mean and std and the scale of the
    returns in its buffers."""
    if args.resume:
        base = load_checkpoint(args.resume)
        if base["fingerprint"] != facts["fingerprint"]:
            other = f"{args.resume} began with other data than {args.dataset} holds"
            die(f"{other}: give those with --dataset, or start a new run.")
        if base["iteration"] > args.updates:
            die(f"{args.resume} is at update {base['iteration']}: give --updates {base['iteration']} or more.")
        return base
    torch.manual_seed(args.seed)
    model = DecisionTransformer(**facts["sizes"])
    std = data.observations.std(0, dtype=np.float64)
    model.obs_mean.copy_(torch.from_numpy(data.observations.mean(0, dtype=np.float64)))
    model.obs_std.copy_(torch.from_numpy(np.where(std < 1e-3, 1.0, std + 1e-6)))  # departure (2)
    model.return_scale.fill_(1.0 if task_of(args.env_id) == "AntMaze" else 1e-3)  # ODT's
    return facts | {"weights": model.state_dict()}


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

# What `uv run pretrain_dt.py` installs: requirements.txt.
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
