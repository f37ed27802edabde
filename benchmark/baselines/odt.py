"""Online Decision Transformer (Zheng et al. 2022): the baseline ODT of the paper's Table 1.

  1. a replay of whole trajectories begins with the best of the dataset
  2. roll out at return-to-go g_online; the new trajectory enters the replay, the first one in it leaves
  3. hindsight: the return-to-go of a step is what its own trajectory brought from there on, not what was asked for
  4. 300 updates of pretraining's loss on windows of c_offline steps, every step of the replay equally likely the first

Differences from the reference code (docs/baselines.md explains each under the same number):
  (1) the return-to-go is in raw reward, seen by the network times 0.001, in AntMaze times 1: as in ODT, not ODT+TD3
  (2) AntMaze's rewards are 0 and 1, as in the paper, and its returns-to-go ODT's
  (3) entropy is a mean over real steps, not over padding too; heads without a loss are left out
  (4) an observation that is constant in the data is centred but not scaled; actions are limited as in the scripts

Small:   python benchmark/baselines/odt.py --env-id Hopper-v5 --embed-dim 128 --c-online 1 --iterations 30
In full: python benchmark/baselines/odt.py pretrain --env-id Hopper-v5 --dataset mujoco/hopper/medium-v0 --save-data
         python benchmark/baselines/odt.py --env-id Hopper-v5 --pretrained runs/NAME

The first word `pretrain` runs pretrain_dt.py with ODT's network and settings. Without it --pretrained may also name a
run of pretrain_dt.py itself, so that all methods begin with one policy.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import q_guided_grpo_dt as q_guided  # before torch, for which it sets how threads wait

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

import pretrain_dt as pretrain
from q_guided_grpo_dt import DatasetKind, Trajectory, task_of

# Shapes: T steps of a trajectory, N steps of the replay, B windows, K context, S and A dimensions of observation and
#         action.

# ---- Arguments and the reference code's settings --------------------------------------------------------------------


@dataclass
class Args:
    """Finetune a pretrained Decision Transformer by ODT. Fields left at None take the task's row."""

    env_id: str = "Hopper-v5"  # an environment of gymnasium, gymnasium-robotics, or MODULE:ID of your own
    pretrained: str | None = None  # run folder of pretraining with --save-data [None: made from random data]
    data: str | None = None  # run folder whose data.npz the replay begins with [None: that of --pretrained]
    dataset_kind: DatasetKind | None = None  # kind of data, picks the row [None: the checkpoint's]
    embed_dim: int = 512  # E, width of the transformer that is made where --pretrained is left out
    iterations: int = 1500  # rollouts, each with its updates
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


def task_row(env_id: str, kind: str) -> tuple[str, dict]:
    """What the row is, and its values: outside the table Hopper's, whose returns-to-go mean nothing there."""
    task = task_of(env_id)
    row = dict(zip(COLUMNS, ROWS.get(task, ROWS["Hopper"])))
    if kind == "random":  # a policy that falls after a few steps would bring a few steps an iteration
        row["min_steps"] = 1000
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
    values = ", ".join(f"{name} {getattr(args, name):g}" for name in row)
    print(f"row {source} ({args.dataset_kind} data): {values}", flush=True)


# ---- Model ----------------------------------------------------------------------------------------------------------


class ReluBlock(q_guided.Block):
    """The scripts' block with ReLU, as ODT has it, where the paper has SiLU."""

    def forward(self, x, mask, read=slice(None)) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        h = self.norm1(x)
        q = self.query(h[:, read].contiguous())
        k, v = self.key_value(h).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = q_guided.attention(q, k, v, mask[:, :, read], dropout)
        h = self.project(h.transpose(1, 2).flatten(2))
        x = x[:, read] + F.dropout(h, dropout)
        h = self.down(F.relu(self.up(self.norm2(x))))
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


def offline_episodes(data: dict[str, np.ndarray]) -> list[Episode]:
    """The trajectories of a dataset, the arrays of data.npz, by return: the lowest first, so that it leaves first."""
    ends = np.cumsum(data["lengths"])
    episodes = []
    for start, end, terminated in zip(ends - data["lengths"], ends, data["terminated"]):
        fields = [data[name][start:end] for name in ("observations", "actions", "rewards")]
        episodes.append(Episode(*fields, np.array(terminated)))
    return sorted(episodes, key=lambda episode: episode.rewards.sum(dtype=np.float64))


def rolled_out(trajectory: Trajectory, context: int) -> Episode:
    """A trajectory of the rollout, without the K - 1 steps of padding."""
    front = context - 1
    seen = trajectory.observations[front:], trajectory.actions[front:]
    return Episode(*seen, trajectory.rewards.astype(np.float32), trajectory.terminated)


def hindsight_returns(rewards: np.ndarray) -> np.ndarray:
    """The return-to-go (T,) that a trajectory turned out to have: the sum of its rewards from each step on."""
    return rewards[::-1].cumsum(dtype=np.float64)[::-1].astype(np.float32)


def replay_of(offline: list[Episode], rolled: list[Episode], size: int) -> pretrain.Dataset:
    """The last `size` trajectories, those of the dataset (the best last) before those that were rolled out, as a
    dataset that pretraining draws windows from, relabelled in hindsight."""
    episodes = [*offline, *rolled][-size:]
    return pretrain.Dataset(
        observations=np.concatenate([episode.observations for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        returns=np.concatenate([hindsight_returns(episode.rewards) for episode in episodes]),
        lengths=np.array([len(episode.rewards) for episode in episodes]),
        terminated=np.array([episode.terminated for episode in episodes]),
    )


def roll_out(model, sims, args: Args, rng: np.random.Generator) -> list[Trajectory]:
    """One sampled trajectory at a time from g_online, until there are min_steps steps."""
    trajectories = []
    while not trajectories or sum(len(each.rewards) for each in trajectories) < args.min_steps:
        trajectories += q_guided.collect(model.eval(), sims, 1, args, rng)
    return trajectories


# ---- The algorithm --------------------------------------------------------------------------------------------------


def main(args: Args) -> Path:
    """ODT; returns the run's folder."""
    base = q_guided.start(args)
    model = load_model(base, q_guided.set_up_torch(args), args.bf16, args.dropout)
    offline, fingerprint = read_data(base, args)
    env = q_guided.make_env(args.env_id, base["env_kwargs"])
    run_dir = q_guided.choose_run_dir(args)
    learner = pretrain.Learner(model, args)  # an update is pretraining's, and so are its optimiser and entropy dual
    iteration, env_steps, updates, rolled, rows = 0, 0, 0, [], []
    if args.resume:
        learner.load_state(base["learner"])
        iteration, env_steps, updates = base["iteration"], base["env_steps"], base["updates"]
        rolled = [Episode(*(field.numpy() for field in each)) for each in base["rolled"]]
        rows = base["rows"]
    elif base["script"] == "pretrain_dt" and "learner" in base:
        learner.load_state(base["learner"])  # moments, kappa and warm-up go on
    film_to = run_dir / "videos" if args.capture_video else None
    evaluation = dataclasses.replace(args, g_online=args.g_eval)
    facts = q_guided.run_facts(base, args) | dict(fingerprint=fingerprint, g_eval=args.g_eval)
    with (
        q_guided.Environments(env, args.eval_episodes) as sims,
        q_guided.Log(run_dir, args, args.iterations, rows) as log,
    ):
        if not rows:  # the pretrained policy, before any update
            log.add({"iteration": 0} | q_guided.evaluate(model.eval(), sims, evaluation, 0, film_to))
        while iteration < args.iterations:
            iteration += 1
            rng = np.random.default_rng([args.seed, iteration])  # of all that is drawn in this iteration
            clock = [time.perf_counter(), sims.seconds]
            trajectories = roll_out(model, sims, args, rng)
            rolled += [rolled_out(trajectory, args.c_online) for trajectory in trajectories]
            rolled = rolled[-args.replay_size :]
            clock += [time.perf_counter(), sims.seconds]
            replay = replay_of(offline, rolled, args.replay_size)
            model.train()  # with dropout
            learner.logged.clear()
            for _ in range(args.n_minibatches):
                learner.update(replay, rng)
            row = {"iteration": iteration} | learner.metrics() | q_guided.trajectory_metrics(trajectories)
            row |= q_guided.time_metrics(*clock)
            if iteration % args.eval_every == 0 or iteration == args.iterations:
                row |= q_guided.evaluate(model.eval(), sims, evaluation, iteration, film_to)
            env_steps += sum(len(trajectory.rewards) for trajectory in trajectories)
            updates += args.n_minibatches
            log.add(row | {"charts/env_steps": env_steps, "charts/gradient_updates": updates})
            content = dict(iteration=iteration, env_steps=env_steps, updates=updates, rows=log.rows)
            content |= dict(weights=model.state_dict(), learner=learner.state())
            content["rolled"] = [[torch.from_numpy(field) for field in each] for each in rolled]
            q_guided.save_checkpoint(run_dir / "checkpoint.pt", facts | content)
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


check_args_of_the_scripts = q_guided.check_args


def check_args(args: Args) -> None:
    """Exits with a line on values that cannot work, before anything is written."""
    if args.g_eval is not None and not np.isfinite(args.g_eval):
        q_guided.die(f"--g-eval is {args.g_eval}: give a finite number.")
    check_args_of_the_scripts(dataclasses.replace(args, g_eval=None))


def parse_args(arguments: list[str]) -> Args:
    """The command line, read by the machinery of q_guided_grpo_dt.py, which from here on works for this script."""
    q_guided.__file__ = str(Path(pretrain.__file__).with_name("odt.py"))  # runs bear this name
    q_guided.Args = Args
    q_guided.paper_row = task_row
    q_guided.fill_from_table = fill_from_table
    q_guided.check_args = check_args
    q_guided.load_model = load_model
    q_guided.MAY_BE_ZERO += ("min_steps",)
    q_guided.FIXED += ("c_offline", "replay_size")
    return q_guided.parse_args(arguments)


def command_line(arguments: list[str]) -> None:
    """pretrain_dt.py with ODT's network after the word `pretrain`, else ODT."""
    if arguments[:1] == ["pretrain"]:
        pretrain.Args = PretrainArgs
        pretrain.DecisionTransformer = ReluTransformer
        args = pretrain.parse_args(arguments[1:])
        pretrain.eval_only(args, pretrain.Environments) if args.eval_only else pretrain.main(args)
    else:
        args = parse_args(arguments)
        q_guided.eval_only(args, q_guided.Environments) if args.eval_only else main(args)


if __name__ == "__main__":  # as in the scripts
    if any(word.replace("_", "-") == "--capture-video" for word in sys.argv) and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        command_line(sys.argv[1:])
    except SystemExit as stop:
        raise SystemExit(1 if stop.code == 2 else stop.code) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: a run goes on from its last checkpoint with --resume RUN_DIR") from None
    except OSError as error:
        q_guided.die(f"{error}: what was written before is kept; once that is mended, go on with --resume RUN_DIR.")
