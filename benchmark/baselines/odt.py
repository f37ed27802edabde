"""Online Decision Transformer (Zheng et al. 2022), and with --td3 ODT+TD3 (Yan et al. 2024): baselines of Table 1.

  1. a replay of whole trajectories begins with the best of the dataset
  2. roll out at return-to-go g_online; the new trajectory enters the replay, the first one in it leaves
  3. hindsight: the return-to-go of a step is what its own trajectory brought from there on, not what was asked for
  4. 300 updates of pretraining's loss on windows of c_offline steps, every step of the replay equally likely the first
  --td3: the action is tanh(mean), explored with noise; a twin critic learns from the same windows as in TD3, and the
  actor minimises its squared error against the replay's actions minus alpha Q1

Differences from the reference code (docs/baselines.md explains each under the same number):
  (1) the return-to-go is in raw reward, seen by the network times 0.001, in AntMaze times 1: as in ODT, not ODT+TD3
  (2) AntMaze's rewards are 0 and 1, as in the paper, and its returns-to-go ODT's
  (3) entropy is a mean over real steps, not over padding too; heads without a loss are left out
  (4) an observation that is constant in the data is centred but not scaled; actions are limited as in the scripts
  (5) --td3: the critic has SiLU, as in Table 5, and a mean over steps as its loss, not over padding too
  (6) --td3: the critic learns from the offline data after the actor's pretraining, not beside it
  (7) --td3: after a time limit the target counts on the next state; where the data do not have it, the step is left out

Small:   python benchmark/baselines/odt.py --env-id Hopper-v5 --small --iterations 30
In full: python benchmark/baselines/odt.py pretrain --env-id Hopper-v5 --dataset mujoco/hopper/medium-v0 --save-data
         python benchmark/baselines/odt.py --env-id Hopper-v5 --pretrained runs/NAME       (--td3 on both)

The first word `pretrain` runs pretrain_dt.py with ODT's network and settings. Without it --pretrained may also name a
run of pretrain_dt.py itself, so that all methods begin with one policy.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: the end, without a traceback
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import q_guided_grpo_dt as q_guided  # before torch, for which it sets how threads wait

# isort: split
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal

import pretrain_dt as pretrain
from pretrain_dt import Windows, masked_mean
from q_guided_grpo_dt import ACTION_LIMIT, DatasetKind, Trajectory, TwinCritic, polyak, squash, task_of
from q_guided_grpo_dt import paper_row as critic_row

# Shapes: T steps of a trajectory, N steps of the replay, B windows, K context, S and A dimensions of observation and
#         action.

# ---- Arguments and the reference code's settings --------------------------------------------------------------------


@dataclass
class Args:
    """Finetune a pretrained Decision Transformer by ODT. Numbers left at None take the task's row."""

    env_id: str = "Hopper-v5"  # an environment of gymnasium, gymnasium-robotics, or MODULE:ID of your own
    env_kwargs: str | None = None  # its arguments as JSON: '{"healthy_reward": 2.0}' [None: the data's or checkpoint's]
    pretrained: str | None = None  # run folder of pretraining with --save-data [None: made from random data]
    data: str | None = None  # run folder whose data.npz the replay begins with [None: that of --pretrained]
    dataset_kind: DatasetKind | None = None  # kind of data, picks the row [None: the checkpoint's]
    embed_dim: int = 512  # E, width of the transformer that is made where --pretrained is left out
    td3: bool = False  # ODT+TD3 in place of ODT
    iterations: int = 1500  # rollouts, each with its updates
    small: bool = False  # take the settings for a laptop (SMALL) where no flag says otherwise
    seed: int = 1  # seed of every random stream

    # Rollouts and replay
    min_steps: int | None = None  # an iteration rolls out until it has so many steps [0: one trajectory]
    replay_size: int | None = None  # full trajectories kept, first in, first out
    g_online: float | None = None  # initial return-to-go of rollouts [raw reward units]
    g_eval: float | None = None  # initial return-to-go of evaluations [raw reward units]
    c_online: int | None = None  # context length of rollouts and evaluations [steps]

    # Update
    n_minibatches: int = 300  # gradient updates per iteration
    batch_size: int = 256  # windows per update
    c_offline: int | None = None  # context length in training [steps; None: the pretraining's]
    dropout: float = 0.1  # dropout in embeddings, attention and blocks, in updates only [probability]
    lr: float | None = None  # of LAMB: relative movement of a tensor per update
    warmup: int | None = None  # linear warm-up, which goes on from pretraining [updates; None: the pretraining's]
    weight_decay: float | None = None  # weight decay, on every tensor as in ODT
    max_grad_norm: float = 0.25  # bound of the global gradient norm
    kappa_initial: float = 0.1  # initial value of the entropy dual variable kappa, where pretraining left none
    kappa_lr: float = 1e-4  # Adam's learning rate on log kappa

    # --td3
    alpha: float = 0.1  # weight of the critic in the actor's loss
    exploration_noise: float = 0.1  # standard deviation of the noise in rollouts [of actions in -1..1]
    gamma: float | None = None  # discount per step
    critic_warmup: int | None = None  # updates of the critic on the offline data alone, before anything else
    critic_dim: int | None = None  # width of the critic's two hidden layers
    critic_norm: bool | None = None  # LayerNorm before the critic's activations
    lr_critic: float | None = None  # learning rate of the critic, of AdamW
    policy_delay: int | None = None  # updates of the critic to one of the actor and of the target networks
    tau: float = 0.005  # Polyak's tau: the share of the way that a target network moves
    target_noise: float = 0.2  # standard deviation of the noise on target actions [of actions in -1..1]
    target_noise_clip: float = 0.5  # bound of that noise
    reward_divisor: float | None = None  # what rewards are divided by for the critic [raw reward]

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


@dataclass
class PretrainArgs(pretrain.Args):
    """Pretrain ODT's network, with ReLU, by pretrain_dt.py."""

    td3: bool = False  # the actor of ODT+TD3: squared error of tanh(mean) in place of likelihood and entropy
    weight_decay: float = 5e-4  # weight decay, on every tensor [5e-4: Hopper; ODT's 1e-3 for Walker2d, else 1e-4]
    max_grad_norm: float = 0.25  # bound of the global gradient norm


# Of ODT+TD3's repository, which holds ODT too. Keys: environment id up to the version.
COLUMNS = ("c_online", "g_eval", "g_online", "lr", "weight_decay", "replay_size", "min_steps")
ROWS = {
    "Hopper": (5, 3600.0, 7200.0, 1e-4, 5e-4, 1000, 0),
    "Walker2d": (5, 5000.0, 10000.0, 1e-3, 1e-3, 1000, 0),
    "Ant": (5, 5000.0, 10000.0, 1e-4, 1e-4, 1000, 0),
    "HalfCheetah": (5, 6000.0, 12000.0, 1e-4, 1e-4, 1000, 0),
    "AdroitHandDoor": (1, 4000.0, 4000.0, 1e-4, 1e-4, 5000, 1000),
    "AdroitHandPen": (5, 12000.0, 12000.0, 1e-4, 1e-4, 5000, 1000),
    "AdroitHandHammer": (1, 160000.0, 160000.0, 1e-4, 1e-4, 5000, 1000),
    "AdroitHandRelocate": (1, 5000.0, 5000.0, 1e-4, 1e-4, 5000, 1000),
    "AntMaze": (1, 1.0, 2.0, 1e-4, 1e-4, 2000, 1000),
}
# --small: the width and the single-step windows of the scripts' --small, so that all begin with one policy.
SMALL = dict(embed_dim=128, c_online=1)
CRITIC = ("gamma", "critic_dim", "critic_norm", "lr_critic", "policy_delay", "reward_divisor")


def task_row(env_id: str, kind: str) -> tuple[str, dict]:
    """What the row is, and its values: outside the table Hopper's, whose returns-to-go mean nothing there."""
    task = task_of(env_id)
    row = dict(zip(COLUMNS, ROWS.get(task, ROWS["Hopper"])))
    if kind == "random":  # a policy that falls after a few steps would bring a few steps an iteration
        row["min_steps"] = 1000
    # the critic's settings are those of Q-guided GRPO-DT, which are ODT+TD3's; so many updates as in its pretraining
    critic = critic_row("AdroitHandDoor-v1" if task == "AdroitHandRelocate" else env_id, kind)[1]
    row |= {name: critic[name] for name in CRITIC}
    row["critic_warmup"] = row["policy_delay"] * pretrain.ROWS.get(task, pretrain.ROWS["Hopper"])[0]
    return (task, row) if task in ROWS else ("outside the table", row | {"g_eval": None, "g_online": None})


def fill_from_table(args: Args, kind: str, best_return: float) -> None:
    """Fill the fields that are None from the task's row and from the pretraining, and print what is in use. Outside
    the table g_eval is the best of the dataset's returns, g_online best + |best|."""
    args.dataset_kind = args.dataset_kind or kind
    source, row = task_row(args.env_id, args.dataset_kind)
    pretraining = q_guided.load_checkpoint(args.resume or args.pretrained)["args"]
    row["g_eval"] = row["g_eval"] or best_return
    row["g_online"] = row["g_online"] or best_return + abs(best_return)
    row["c_offline"] = args.c_offline or pretraining.get("c_offline") or 1
    row["c_online"] = min(row["c_online"], row["c_offline"])
    row["warmup"] = pretraining.get("warmup") or 1
    for name, value in row.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    unused = () if args.td3 else (*CRITIC, "critic_warmup")
    values = ", ".join(f"{name} {getattr(args, name):g}" for name in row if name not in unused)
    print(f"row {source} ({args.dataset_kind} data): {values}", flush=True)


# ---- Model ----------------------------------------------------------------------------------------------------------


class ReluBlock(q_guided.Block):
    """The scripts' block with ReLU, as ODT has it, where the paper has SiLU."""

    def forward(self, x, mask, read=slice(None)) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        h = self.norm1(x)
        q = self.query(h[:, read].contiguous())  # (B, L', E)
        k, v = self.key_value(h).chunk(2, dim=-1)  # (B, L, E) each
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, L, E / heads)
        h = q_guided.attention(q, k, v, mask[:, :, read], dropout)
        h = self.project(h.transpose(1, 2).flatten(2))  # (B, L', E)
        x = x[:, read] + F.dropout(h, dropout)
        h = self.down(F.relu(self.up(self.norm2(x))))  # all else is the scripts'
        return x + F.dropout(h, dropout)


class ReluTransformer(q_guided.DecisionTransformer):
    """The scripts' Decision Transformer with ReLU."""

    kind = "baselines/odt"

    def __init__(self, obs_dim, act_dim, embed_dim=512, **sizes):
        super().__init__(obs_dim, act_dim, embed_dim, **sizes)
        for block in self.blocks:
            block.__class__ = ReluBlock  # the same weights, another forward


MODELS = {"dt": q_guided.DecisionTransformer, "baselines/odt": ReluTransformer}
load_model_of_the_scripts = q_guided.load_model


def load_model(content: dict, device: torch.device, bf16: bool, dropout: float = 0.0) -> q_guided.DecisionTransformer:
    """The network of a checkpoint, of pretrain_dt.py's kind or of this script's."""
    q_guided.DecisionTransformer = MODELS.get(content["sizes"].get("kind", "dt"), ReluTransformer)
    return load_model_of_the_scripts(content, device, bf16, dropout)


# ---- Replay ---------------------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """A whole trajectory. What was asked for when it was rolled out is not kept."""

    observations: np.ndarray  # (T, S)
    actions: np.ndarray  # (T, A) in [-1, 1]
    rewards: np.ndarray  # (T,)
    terminated: np.ndarray  # () whether the task ended it, not a time limit
    last_observation: np.ndarray  # (S,) after the last step; NaN: not known


def offline_episodes(data: dict[str, np.ndarray]) -> list[Episode]:
    """The trajectories of a dataset, the arrays of data.npz, by return: the lowest first, so that it leaves first."""
    ends = np.cumsum(data["lengths"])
    episodes = []
    for start, end, terminated in zip(ends - data["lengths"], ends, data["terminated"]):
        fields = [data[name][start:end] for name in ("observations", "actions", "rewards")]
        episodes.append(Episode(*fields, np.array(terminated), np.full_like(fields[0][0], np.nan)))
    return sorted(episodes, key=lambda episode: episode.rewards.sum(dtype=np.float64))


def rolled_out(trajectory: Trajectory, context: int) -> Episode:
    """A trajectory of the rollout, without the K - 1 steps of padding."""
    front = context - 1
    seen = trajectory.observations[front:], trajectory.actions[front:]
    last = trajectory.last_observation.astype(np.float32)
    return Episode(*seen, trajectory.rewards.astype(np.float32), trajectory.terminated, last)


def hindsight_returns(rewards: np.ndarray) -> np.ndarray:
    """The return-to-go (T,) that a trajectory turned out to have: the sum of its rewards from each step on."""
    return rewards[::-1].cumsum(dtype=np.float64)[::-1].astype(np.float32)


def replay_of(offline: list[Episode], rolled: list[Episode], size: int, td3: bool = False) -> pretrain.Dataset:
    """The last `size` trajectories, those of the dataset (the best last) before those that were rolled out, as a
    dataset that pretraining draws windows from, relabelled in hindsight. td3: that with_next adds to."""
    episodes = [*offline, *rolled][-size:]
    replay = pretrain.Dataset(
        observations=np.concatenate([episode.observations for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        returns=np.concatenate([hindsight_returns(episode.rewards) for episode in episodes]),
        lengths=np.array([len(episode.rewards) for episode in episodes]),
        terminated=np.array([episode.terminated for episode in episodes]),
    )
    return with_next(replay, episodes) if td3 else replay


def roll_out(policy, sims, args: Args, rng: np.random.Generator) -> list[Trajectory]:
    """One sampled trajectory at a time from g_online, until there are min_steps steps."""
    trajectories = []
    while not trajectories or sum(len(each.rewards) for each in trajectories) < args.min_steps:
        trajectories += q_guided.collect(policy, sims, 1, args, rng)
    return trajectories


# ---- ODT+TD3 --------------------------------------------------------------------------------------------------------


class Explorer:
    """A deterministic policy for the rollout: a law without spread at tanh(mean) plus N(0, noise^2)."""

    def __init__(self, policy: q_guided.DecisionTransformer, noise: float):
        self.policy, self.noise = policy, noise
        self.obs_mean, self.act_dim, self.conditioned_on = policy.obs_mean, policy.act_dim, policy.conditioned_on

    def __call__(self, *window) -> Normal:
        action = squash(self.policy(*window).mean)
        action = action + self.noise * torch.randn_like(action)
        u = torch.atanh(action.clamp(-ACTION_LIMIT, ACTION_LIMIT))
        return Normal(u, torch.zeros_like(u), validate_args=False)


class Batch(NamedTuple):
    """Windows of transitions."""

    now: Windows  # s, g, a
    later: Windows  # the same windows a step later: s', g' = g - r, the realised one, and actions
    rewards: torch.Tensor  # (B, K) raw
    terminated: torch.Tensor  # (B, K) whether the task ended its trajectory with this step
    usable: torch.Tensor  # (B, K) a real step, and s' is known, or not needed since it terminated


def with_next(replay: pretrain.Dataset, episodes: list[Episode]) -> pretrain.Dataset:
    """The replay with the columns (s, s', r, terminated, usable) for its observations, so that they are drawn with the
    windows: (N, 2 S + 3)."""
    following = [np.vstack([episode.observations[1:], episode.last_observation]) for episode in episodes]
    following = np.concatenate(following)  # (N, S)
    terminated = np.zeros((len(following), 1), bool)
    terminated[np.cumsum(replay.lengths) - 1, 0] = replay.terminated
    usable = terminated | np.isfinite(following).all(1, keepdims=True)  # (N, 1)
    rewards = replay.rewards[:, None]
    columns = [replay.observations, np.nan_to_num(following), rewards, terminated, usable]
    return replay._replace(observations=np.concatenate(columns, axis=1, dtype=np.float32))


def draw_batch(replay: pretrain.Dataset, args: Args, rng: np.random.Generator, device: torch.device) -> Batch:
    """Windows of a replay of with_next."""
    drawn = pretrain.draw_windows(replay, args.c_offline, args.batch_size, rng)
    columns, returns, actions, real = (field.to(device) for field in drawn)
    size = (columns.shape[-1] - 3) // 2  # S, of columns (B, K, 2 S + 3)
    s, following = columns[..., :size], columns[..., size : 2 * size]  # (B, K, S) each
    rewards, terminated, usable = columns[..., 2 * size :].unbind(-1)  # (B, K) each
    following_actions = torch.zeros_like(actions)  # the last one is not read
    following_actions[:, :-1] = actions[:, 1:]
    now = Windows(s, returns, actions, real)
    later = Windows(following, returns - rewards, following_actions, real)
    return Batch(now, later, rewards, terminated > 0, usable > 0)


@torch.no_grad()
def td_target(batch: Batch, policy, critic: TwinCritic, args: Args) -> torch.Tensor:
    """TD3's target r + gamma min(Q1', Q2')(s', a~) at every step, r alone where the task ended: (B, K). a~: what the
    target actor does in the window a step later, and clipped noise. `policy`, `critic`: the targets."""
    action = squash(policy(*batch.later, every_step=True).mean)  # (B, K, A)
    noise = args.target_noise * torch.randn_like(action)
    noise = noise.clamp(-args.target_noise_clip, args.target_noise_clip)
    action = (action + noise).clamp(-ACTION_LIMIT, ACTION_LIMIT)
    following = critic(batch.later.observations, action).min(0).values  # (B, K)
    return batch.rewards / args.reward_divisor + args.gamma * ~batch.terminated * following


def critic_loss(critic: TwinCritic, target_policy, target_critic, batch: Batch, args: Args) -> tuple:
    """The squared errors of Q1 and Q2, added up; and the values to log."""
    target = td_target(batch, target_policy, target_critic, args)  # (B, K)
    q = critic(batch.now.observations, batch.now.actions)  # (2, B, K)
    loss = masked_mean(((q - target) ** 2).sum(0), batch.usable)
    values = {"critic_loss": loss, "q_mean": masked_mean(q.mean(0), batch.usable)}
    values["target_mean"] = masked_mean(target, batch.usable)
    values["q_gap"] = masked_mean((q[0] - q[1]).abs(), batch.usable)
    return loss, values


def actor_loss(model, windows: Windows, critic: TwinCritic | None = None, alpha: float = 0.0) -> tuple:
    """(a - pi)^2 - alpha Q1(s, pi) with pi = tanh(mean), a mean over the real steps; and the values to log. Pretraining
    has no critic."""
    action = squash(model(*windows, every_step=True).mean)  # (B, K, A)
    mse = masked_mean((action - windows.actions).square().mean(-1), windows.real)
    if critic is None:
        return mse, {"action_mse": mse}
    q = masked_mean(critic(windows.observations, action)[0], windows.real)
    return mse - alpha * q, {"action_mse": mse, "policy_q": q}


class ActorLearner(pretrain.Learner):
    """Pretraining's learner without law, entropy and dual."""

    def update(self, data: pretrain.Dataset, rng: np.random.Generator) -> None:
        """A gradient step of pretraining."""
        drawn = pretrain.draw_windows(data, self.args.c_offline, self.args.batch_size, rng)
        windows = Windows(*(field.to(self.model.obs_mean.device) for field in drawn))
        torch.manual_seed(int(rng.integers(2**31)))  # of dropout
        loss, values = actor_loss(self.model, windows)
        self.step(loss, values)

    def step(self, loss: torch.Tensor, values: dict) -> None:
        """LAMB's, at the rate that the warm-up leaves."""
        args = self.args
        self.optimizer.zero_grad()
        loss.backward()
        values["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.updates += 1
        self.optimizer.param_groups[0]["lr"] = args.lr * min(self.updates / args.warmup, 1.0)
        self.optimizer.step()
        self.logged.append({name: value.detach() for name, value in values.items()})


class TD3Learner(ActorLearner):
    """Actor, critic, and the targets of both."""

    def __init__(self, model: q_guided.DecisionTransformer, args: Args):
        super().__init__(model, args)
        torch.manual_seed(args.seed)  # of the critic's first weights
        self.critic = TwinCritic(model, args.critic_dim, args.critic_norm).to(model.obs_mean.device)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=args.lr_critic)
        self.target_policy = copy.deepcopy(model).eval().requires_grad_(False)  # without dropout
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def update_critic(self, replay: pretrain.Dataset, rng: np.random.Generator) -> tuple[Batch, dict]:
        """A gradient step of the critic; its batch, and the values to log."""
        torch.manual_seed(int(rng.integers(2**31)))  # of target noise and dropout
        batch = draw_batch(replay, self.args, rng, self.model.obs_mean.device)
        loss, values = critic_loss(self.critic, self.target_policy, self.target_critic, batch, self.args)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return batch, values

    def update(self, data: pretrain.Dataset, rng: np.random.Generator) -> None:
        """policy_delay gradient steps of the critic, one of the actor on the last batch, and one of the targets."""
        for _ in range(self.args.policy_delay):
            batch, values = self.update_critic(data, rng)
        loss, more = actor_loss(self.model, batch.now, self.critic, self.args.alpha)
        self.step(loss, values | more)
        polyak(self.target_critic, self.critic, self.args.tau)
        polyak(self.target_policy, self.model, self.args.tau)

    def warm_up(self, offline: pretrain.Dataset) -> None:
        """Updates of the critic on the offline data, for the pretrained actor, which stands still."""
        rng = np.random.default_rng([self.args.seed, 0])
        for update in range(1, self.args.critic_warmup + 1):
            _, values = self.update_critic(offline, rng)
            if update % self.args.policy_delay == 0:
                polyak(self.target_critic, self.critic, self.args.tau)
            if update % 500 == 0:
                shown = "  ".join(f"{name} {value.item():,.4g}" for name, value in values.items())
                print(f"critic {update:,}/{self.args.critic_warmup:,}  {shown}", flush=True)
        self.target_critic.load_state_dict(self.critic.state_dict())

    PARTS = ("critic", "critic_optimizer", "target_policy", "target_critic")

    def state(self) -> dict:
        """What, beside the weights, a resumed run needs."""
        return super().state() | {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state(self, state: dict) -> None:
        """Go on from what `state` gave, or from what pretraining left, which has no critic."""
        super().load_state(state)
        for name in self.PARTS:
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        self.critic_optimizer.param_groups[0]["lr"] = self.args.lr_critic


# ---- The algorithm --------------------------------------------------------------------------------------------------


def main(args: Args) -> Path:
    """ODT or ODT+TD3; returns the run's folder."""
    base = q_guided.start(args)
    model = load_model(base, q_guided.set_up_torch(args), args.bf16, args.dropout)
    offline, fingerprint = read_data(base, args)
    env = q_guided.make_env(args.env_id, q_guided.env_kwargs_of(args, base["env_kwargs"]))
    run_dir = q_guided.choose_run_dir(args)
    # an update of ODT is pretraining's, and so are its optimiser and entropy dual
    learner = TD3Learner(model, args) if args.td3 else pretrain.Learner(model, args)
    explorer = Explorer(model, args.exploration_noise) if args.td3 else model
    iteration, env_steps, updates, rolled, rows = 0, 0, 0, [], []
    if args.resume:
        learner.load_state(base["learner"])
        iteration, env_steps, updates = base["iteration"], base["env_steps"], base["updates"]
        rolled = [Episode(*(field.numpy() for field in each)) for each in base["rolled"]]
        rows = base["rows"]
    elif base["script"] == "pretrain_dt" and "learner" in base:
        learner.load_state(base["learner"])  # moments, kappa and warm-up go on
    film_to = run_dir / "videos" if args.capture_video else None
    facts = q_guided.run_facts(base, args) | dict(fingerprint=fingerprint)

    def save() -> None:
        content = dict(iteration=iteration, env_steps=env_steps, updates=updates, rows=log.rows)
        content |= dict(weights=model.state_dict(), learner=learner.state())
        content["rolled"] = [[torch.from_numpy(field) for field in each] for each in rolled]
        q_guided.save_checkpoint(run_dir / "checkpoint.pt", facts | content)

    sims = q_guided.Environments(env, args.eval_episodes)
    with sims, q_guided.Log(run_dir, args, args.iterations, rows) as log:
        if not rows:  # the pretrained policy, before any update
            log.add({"iteration": 0} | q_guided.evaluate(model.eval(), sims, args, 0, film_to))
            if args.td3:
                learner.warm_up(replay_of(offline, [], len(offline), td3=True))
                log.begun = time.time()  # the warm-up says nothing of the time that is left
            learner.logged.clear()
            save()
        while iteration < args.iterations:
            iteration += 1
            rng = np.random.default_rng([args.seed, iteration])  # of all that is drawn in this iteration
            torch.manual_seed(int(rng.integers(2**31)))  # of the noise of --td3
            clock = [time.perf_counter(), sims.seconds]
            model.eval()  # no dropout in rollouts
            trajectories = roll_out(explorer, sims, args, rng)
            rolled += [rolled_out(trajectory, args.c_online) for trajectory in trajectories]
            rolled = rolled[-args.replay_size :]
            clock += [time.perf_counter(), sims.seconds]
            replay = replay_of(offline, rolled, args.replay_size, args.td3)
            model.train()
            learner.logged.clear()
            for _ in range(args.n_minibatches):
                learner.update(replay, rng)
            row = {"iteration": iteration} | learner.metrics() | q_guided.trajectory_metrics(trajectories)
            row |= q_guided.time_metrics(*clock)
            if iteration % args.eval_every == 0 or iteration == args.iterations:
                row |= q_guided.evaluate(model.eval(), sims, args, iteration, film_to)
            env_steps += sum(len(trajectory.rewards) for trajectory in trajectories)
            updates += args.n_minibatches
            log.add(row | {"charts/env_steps": env_steps, "charts/gradient_updates": updates})
            save()
    print(f"checkpoint: {run_dir / 'checkpoint.pt'}", flush=True)
    return run_dir


# ---- The run's folder and the command line, by the scripts ----------------------------------------------------------


def read_data(base: dict, args: Args) -> tuple[list[Episode], int]:
    """The trajectories that --pretrained learned from, the best last, and a fingerprint. Exits with a line if they are
    missing, or not those of `base`."""
    _, fingerprint = q_guided.read_data(base, args)
    folder = Path(args.data or args.pretrained)
    folder = folder.parent if folder.is_file() else folder
    return offline_episodes(dict(np.load(folder / "data.npz"))), fingerprint


def parse_args(arguments: list[str]) -> Args:
    """The command line, read by the machinery of q_guided_grpo_dt.py, which from here on works for this script."""
    q_guided.__file__ = str(Path(pretrain.__file__).with_name("odt.py"))  # runs bear this name
    q_guided.Args, q_guided.SMALL = Args, SMALL
    q_guided.paper_row = task_row
    q_guided.fill_from_table = fill_from_table
    q_guided.load_model = load_model
    q_guided.MAY_BE_ZERO += ("min_steps", "alpha", "exploration_noise")
    q_guided.FIXED += ("c_offline", "replay_size", "td3")
    return q_guided.parse_args(arguments)


def command_line(arguments: list[str]) -> None:
    """pretrain_dt.py with ODT's network after the word `pretrain`, else ODT."""
    if arguments[:1] == ["pretrain"]:
        pretrain.Args = PretrainArgs
        pretrain.DecisionTransformer = ReluTransformer
        args = pretrain.parse_args(arguments[1:])
        pretrain.Learner = ActorLearner if args.td3 else pretrain.Learner
        pretrain.eval_only(args, pretrain.Environments) if args.eval_only else pretrain.main(args)
    else:
        args = parse_args(arguments)
        q_guided.eval_only(args, q_guided.Environments) if args.eval_only else main(args)


if __name__ == "__main__":
    if any(word.replace("_", "-") == "--capture-video" for word in sys.argv) and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command_line(sys.argv[1:])
    except SystemExit as stop:
        raise SystemExit(1 if stop.code == 2 else stop.code) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: a run that has a checkpoint goes on with --resume RUN_DIR") from None
    except OSError as error:
        q_guided.die(f"{error}: what was written before is kept; once that is mended, go on with --resume RUN_DIR.")
