"""IQL with online finetuning (Kostrikov et al. 2021, Implicit Q-Learning): the baseline IQL of the paper's Table 1.

  1. V(s) approaches an upper expectile of Q(s, a) over the actions of the data: the value of the best of them
  2. Q(s, a) approaches r + gamma V(s'): no action is ever asked for that the data do not have
  3. the actor imitates the data's actions, each weighted by exp(beta (Q - V))
  4. offline, as many updates as pretraining makes; then roll out, add to the data, an update for every step

Differences from the reference code, CORL's IQL (docs/baselines.md explains each under the same number):
  (1) the updates of an iteration follow its rollouts; there, one follows each step
  (2) offline as many updates as the transformers get, not a million, so the annealed rate swings sooner
  (3) in AntMaze an episode's rewards are 0 and 1 before 1 is subtracted from each, and a success ends it
  (4) the last transition of an offline trajectory that a time limit ended is left out: its next state is not kept
  (5) nothing leaves the data

Small:   python benchmark/baselines/iql.py --env-id Hopper-v5 --iterations 30
In full: python pretrain_dt.py --env-id Hopper-v5 --dataset mujoco/hopper/medium-v0 --save-data
         python benchmark/baselines/iql.py --env-id Hopper-v5 --pretrained runs/NAME
"""

from __future__ import annotations

import copy
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: the end, without a traceback
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import q_guided_grpo_dt as q_guided  # before torch, for which it sets how threads wait

# isort: split
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.distributions import Normal

import pretrain_dt as pretrain
from q_guided_grpo_dt import ACTION_LIMIT, DatasetKind, Trajectory, Transitions, polyak, task_of

# Shapes: B transitions, M slots of all transitions, S and A dimensions of observation and action.

# ---- Arguments and the reference code's settings --------------------------------------------------------------------


@dataclass
class Args:
    """IQL, offline and then online. Numbers left at None take the task's row."""

    env_id: str = "Hopper-v5"  # an environment of gymnasium, gymnasium-robotics, or MODULE:ID of your own
    env_kwargs: str | None = None  # its arguments as JSON: '{"healthy_reward": 2.0}' [None: the data's or checkpoint's]
    pretrained: str | None = None  # run folder of pretraining with --save-data, for its data [None: random data]
    data: str | None = None  # run folder whose data.npz is learned from [None: that of --pretrained]
    dataset_kind: DatasetKind | None = None  # kind of data, picks the row [None: the checkpoint's]
    embed_dim: int = 128  # width of the transformer that is made with the random data where --pretrained is left out
    iterations: int = 1000  # rollouts, each with its updates
    small: bool = False  # take the settings for a laptop (SMALL) where no flag says otherwise
    seed: int = 1  # seed of every random stream

    # Rollouts
    min_steps: int = 1000  # an iteration rolls out until it has so many steps [0: one trajectory]
    updates_per_step: float = 1.0  # updates to a step rolled out

    # Update
    offline_updates: int | None = None  # updates on the offline data, before anything else
    batch_size: int = 256  # transitions per update
    gamma: float = 0.99  # discount per step
    expectile: float | None = None  # that V approaches: 0.5 is the mean, near 1 the largest
    beta: float | None = None  # inverse temperature of the actor's weights [1 / reward]
    max_weight: float = 100.0  # bound of these weights
    tau: float = 0.005  # Polyak's tau: the share of the way that a target network moves
    lr: float = 3e-4  # learning rate of Adam, of all networks; the actor's is annealed over the offline updates
    hidden_dim: int = 256  # width of the two hidden layers of all networks
    dropout: float | None = None  # dropout in the actor, in updates only [probability]
    step_cost: float | None = None  # subtracted from each reward [raw reward]

    # The run
    eval_every: int = 10  # iterations between evaluations
    eval_episodes: int = 10  # episodes of an evaluation
    threads: int | None = None  # CPU threads of torch [None: torch's choice, or OMP_NUM_THREADS]
    cuda: bool = True  # run the network on a GPU if there is one
    run_dir: str | None = None  # folder of the run [None: runs/ENV__SCRIPT__KIND__SEED__TIME-PID]
    resume: str | None = None  # folder of a run to go on with; flags given with it hold from there on
    eval_only: str | None = None  # evaluate the checkpoint of this script in this folder, and stop
    capture_video: bool = False  # film each evaluation's first episode into RUN_DIR/videos (needs moviepy)
    track: bool = False  # also log to Weights & Biases (needs wandb)

    # What the rollout and the run folder of the scripts read: no return-to-go, no context, no bf16
    g_online: tyro.conf.Suppress[float] = 0.0  # not read by the actor
    g_eval: tyro.conf.Suppress[float] = 0.0  # not read by the actor either
    c_online: tyro.conf.Suppress[int] = 1  # a step
    bf16: tyro.conf.Suppress[bool] = False  # fp32


# CORL's. Keys: environment id up to the version, and the kind of data where that matters.
COLUMNS = ("expectile", "beta", "dropout", "step_cost")
ROWS = {
    "AdroitHandDoor cloned": (0.8, 3.0, 0.1, 0.0),
    "AdroitHandPen cloned": (0.8, 3.0, 0.1, 0.0),
    "AdroitHandHammer cloned": (0.8, 3.0, 0.1, 0.0),
    "AdroitHandRelocate cloned": (0.8, 3.0, 0.1, 0.0),
    "AntMaze": (0.9, 10.0, 0.0, 1.0),
    "all others": (0.7, 3.0, 0.0, 0.0),
}
# --small: offline as many updates as pretrain_dt.py --small makes.
SMALL = dict(offline_updates=4_000)


def fill_from_table(args: Args, kind: str, best_return: float) -> None:
    """Fill the fields that are None from the task's row, and print what is in use."""
    args.dataset_kind = args.dataset_kind or kind
    task = task_of(args.env_id)
    key = next((key for key in (f"{task} {args.dataset_kind}", task) if key in ROWS), "all others")
    row = dict(zip(COLUMNS, ROWS[key]))
    row["offline_updates"] = pretrain.ROWS.get(task, pretrain.ROWS["Hopper"])[0]  # as many as the transformers get
    for name, value in row.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    values = ", ".join(f"{name} {getattr(args, name):g}" for name in row)
    print(f"row {key} ({args.dataset_kind} data): {values}", flush=True)


# ---- Networks -------------------------------------------------------------------------------------------------------


def mlp(inputs: int, hidden: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    layers = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout)]
    layers += [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)]
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """N(tanh(mean(s)), std^2), the law of an action; the std is the same in all states. Takes raw observations."""

    kind = "baselines/iql"

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.act_dim = act_dim
        self.network = mlp(obs_dim, hidden_dim, act_dim, dropout)
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def normalized(self, observations: torch.Tensor) -> torch.Tensor:
        """As all networks see them: (..., S)."""
        return (observations - self.obs_mean) / self.obs_std

    def law(self, observations: torch.Tensor) -> Normal:
        """Of the action, not of one before tanh: (..., S) -> (..., A)."""
        mean = torch.tanh(self.network(self.normalized(observations)))
        return Normal(mean, self.log_std.clamp(-20.0, 2.0).exp().expand_as(mean), validate_args=False)

    def forward(self, observations, returns, actions, real) -> Normal:
        """For the scripts' rollout: a law without spread at the u whose tanh is the mean action, (B, A)."""
        u = self.network(self.normalized(observations[:, -1]))
        return Normal(u, torch.zeros_like(u), validate_args=False)

    def conditioned_on(self, observations, returns, actions, real) -> torch.Tensor:
        return returns  # which are not read


class Explorer:
    """The actor for the rollout, with sampled actions, clamped to their bounds."""

    def __init__(self, actor: Actor):
        self.actor, self.obs_mean, self.act_dim = actor, actor.obs_mean, actor.act_dim
        self.conditioned_on = actor.conditioned_on

    def __call__(self, observations, returns, actions, real) -> Normal:
        action = self.actor.law(observations[:, -1]).sample()
        u = torch.atanh(action.clamp(-ACTION_LIMIT, ACTION_LIMIT))
        return Normal(u, torch.zeros_like(u), validate_args=False)


class TwinQ(nn.Module):
    """Q1(s, a) and Q2(s, a) of normalised observations: (2, B)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int):
        super().__init__()
        self.networks = nn.ModuleList(mlp(obs_dim + act_dim, hidden_dim, 1) for _ in range(2))

    def forward(self, s: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([s, actions], dim=-1)
        return torch.stack([network(x).squeeze(-1) for network in self.networks])


# ---- Losses and update ----------------------------------------------------------------------------------------------


def expectile_loss(error: torch.Tensor, expectile: float) -> torch.Tensor:
    """|expectile - 1(error < 0)| error^2, elementwise."""
    return torch.where(error < 0, 1.0 - expectile, expectile) * error**2


def advantage_weights(advantage: torch.Tensor, beta: float, largest: float) -> torch.Tensor:
    """exp(beta A), up to `largest`: no gradient passes."""
    return (beta * advantage.detach()).exp().clamp(max=largest)


class IQLLearner:
    """Networks, optimisers and data: all that updates and rollouts change."""

    def __init__(self, actor: Actor, offline: Transitions, args: Args):
        self.actor, self.args = actor, args
        self.device = actor.obs_mean.device
        sizes = len(actor.obs_mean), actor.act_dim, args.hidden_dim
        self.q = TwinQ(*sizes).to(self.device)
        self.v = mlp(sizes[0], args.hidden_dim, 1).to(self.device)
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        self.actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.lr)
        self.q_optimizer = torch.optim.Adam(self.q.parameters(), lr=args.lr)
        self.v_optimizer = torch.optim.Adam(self.v.parameters(), lr=args.lr)
        self.n_offline = len(offline.real)
        self.data = Transitions(*(field.to(self.device) for field in offline))
        self.updates = 0

    def add(self, new: Transitions) -> None:
        """Append to the data, of which nothing leaves."""
        self.data = Transitions(*(torch.cat([old, more.to(self.device)]) for old, more in zip(self.data, new)))

    def losses(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        """Of V, Q and the actor on the transitions at the slots `index` (B,); and the values to log."""
        args, data = self.args, self.data
        s = self.actor.normalized(data.observations[index])  # (B, S)
        following = self.actor.normalized(data.observations[index + 1])  # (B, S)
        actions = data.actions[index]  # (B, A)
        with torch.no_grad():
            reward = data.rewards[index] - args.step_cost
            next_v = self.v(following).squeeze(-1)  # after a time limit s' counts like any other
            target = reward + args.gamma * ~data.terminated[index] * next_v  # (B,)
            q_of_data = self.target_q(s, actions).min(0).values  # (B,)
        v = self.v(s).squeeze(-1)  # (B,)
        advantage = q_of_data - v
        v_loss = expectile_loss(advantage, args.expectile).mean()
        q = self.q(s, actions)  # (2, B)
        q_loss = ((q - target) ** 2).mean()
        weight = advantage_weights(advantage, args.beta, args.max_weight)
        nll = -self.actor.law(data.observations[index]).log_prob(actions).sum(-1)
        actor_loss = (weight * nll).mean()
        values = {"v_loss": v_loss, "critic_loss": q_loss, "actor_loss": actor_loss, "nll": nll.mean()}
        values |= {"q_mean": q.mean(), "v_mean": v.mean(), "weight_mean": weight.mean()}
        return v_loss, q_loss, actor_loss, values

    def train(self, updates: int, rng: np.random.Generator) -> dict[str, float]:
        """Updates on transitions drawn uniformly from all there are; means of the values to log."""
        args, logged = self.args, []
        torch.manual_seed(int(rng.integers(2**31)))  # of dropout
        usable = self.data.usable.nonzero()[:, 0]
        self.actor.train()
        for update in range(1, updates + 1):
            choice = torch.from_numpy(rng.integers(len(usable), size=args.batch_size))
            index = usable[choice.to(self.device)]  # (B,) slots
            *losses, values = self.losses(index)  # all of the networks as they are before this update
            if args.offline_updates:  # CORL's annealing, which swings up again online
                cosine = math.cos(math.pi * self.updates / args.offline_updates)
                self.actor_optimizer.param_groups[0]["lr"] = args.lr * (1.0 + cosine) / 2.0
            optimizers = self.v_optimizer, self.q_optimizer, self.actor_optimizer
            for loss, optimizer in zip(losses, optimizers):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            polyak(self.target_q, self.q, args.tau)
            self.updates += 1
            logged.append({name: value.detach() for name, value in values.items()})
            if update % 1000 == 0 and self.updates <= args.offline_updates:
                means = q_guided.mean_losses(logged)
                shown = "  ".join(f"{name.removeprefix('losses/')} {value:,.4g}" for name, value in means.items())
                print(f"offline {update:,}/{updates:,}  {shown}", flush=True)
                logged.clear()
        self.actor.eval()
        return q_guided.mean_losses(logged) if logged else {}

    PARTS = ("q", "v", "target_q", "actor_optimizer", "q_optimizer", "v_optimizer")

    def state(self) -> dict:
        """What, beside the actor, a resumed run needs. The offline data are read again instead."""
        online = [field[self.n_offline :].clone() for field in self.data]  # a view would keep all
        return {name: getattr(self, name).state_dict() for name in self.PARTS} | dict(
            online=online, updates=self.updates
        )

    def load_state(self, state: dict) -> None:
        """Go on from what `state` gave, at the rate of the arguments."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for optimizer in (self.q_optimizer, self.v_optimizer, self.actor_optimizer):
            optimizer.param_groups[0]["lr"] = self.args.lr
        self.add(Transitions(*state["online"]))
        self.updates = state["updates"]


def roll_out(actor: Actor, sims, args: Args, rng: np.random.Generator) -> list[Trajectory]:
    """One sampled trajectory at a time, until there are min_steps steps."""
    torch.manual_seed(int(rng.integers(2**31)))  # of the actions
    trajectories = []
    while not trajectories or sum(len(each.rewards) for each in trajectories) < args.min_steps:
        trajectories += q_guided.collect(Explorer(actor), sims, 1, args, rng)
    return trajectories


# ---- The algorithm --------------------------------------------------------------------------------------------------


def main(args: Args) -> Path:
    """IQL; returns the run's folder."""
    base = q_guided.start(args)
    device = q_guided.set_up_torch(args)
    offline, fingerprint = q_guided.read_data(base, args)
    env = q_guided.make_env(args.env_id, q_guided.env_kwargs_of(args, base["env_kwargs"]))
    run_dir = q_guided.choose_run_dir(args)
    sizes = dict(obs_dim=base["sizes"]["obs_dim"], act_dim=base["sizes"]["act_dim"], hidden_dim=args.hidden_dim)
    actor = load_model(base, device, dropout=args.dropout) if args.resume else new_actor(sizes, args, base, device)
    learner = IQLLearner(actor, offline, args)
    iteration, env_steps, updates, rows = 0, 0, 0, []
    if args.resume:
        learner.load_state(base["learner"])
        iteration, env_steps, updates = base["iteration"], base["env_steps"], base["updates"]
        rows = base["rows"]
    film_to = run_dir / "videos" if args.capture_video else None
    facts = q_guided.run_facts(base, args) | dict(fingerprint=fingerprint)
    facts["sizes"] = sizes | dict(kind=Actor.kind, embed_dim=args.embed_dim)

    def save() -> None:
        content = dict(iteration=iteration, env_steps=env_steps, updates=updates, rows=log.rows)
        content |= dict(weights=actor.state_dict(), learner=learner.state())
        q_guided.save_checkpoint(run_dir / "checkpoint.pt", facts | content)

    sims = q_guided.Environments(env, args.eval_episodes)
    with sims, q_guided.Log(run_dir, args, args.iterations, rows) as log:
        if not rows:
            learner.train(args.offline_updates, np.random.default_rng([args.seed, 0]))
            log.add({"iteration": 0} | q_guided.evaluate(actor.eval(), sims, args, 0, film_to))
            save()
        while iteration < args.iterations:
            iteration += 1
            rng = np.random.default_rng([args.seed, iteration])  # of all that is drawn in this iteration
            clock = [time.perf_counter(), sims.seconds]
            trajectories = roll_out(actor.eval(), sims, args, rng)
            learner.add(q_guided.transitions_of(trajectories, context=1))
            clock += [time.perf_counter(), sims.seconds]
            steps = sum(len(trajectory.rewards) for trajectory in trajectories)
            count = max(1, round(steps * args.updates_per_step))
            row = {"iteration": iteration} | learner.train(count, rng) | q_guided.trajectory_metrics(trajectories)
            row |= q_guided.time_metrics(*clock)
            if iteration % args.eval_every == 0 or iteration == args.iterations:
                row |= q_guided.evaluate(actor, sims, args, iteration, film_to)
            env_steps += steps
            updates += count
            log.add(row | {"charts/env_steps": env_steps, "charts/gradient_updates": updates})
            save()
    print(f"checkpoint: {run_dir / 'checkpoint.pt'}", flush=True)
    return run_dir


# ---- The run's folder and the command line, by the scripts ----------------------------------------------------------


def new_actor(sizes: dict, args: Args, base: dict, device: torch.device) -> Actor:
    """An untrained one, with the data's mean and std, which pretraining left."""
    torch.manual_seed(args.seed)
    actor = Actor(**sizes, dropout=args.dropout)
    actor.obs_mean.copy_(base["weights"]["obs_mean"])
    actor.obs_std.copy_(base["weights"]["obs_std"])
    return actor.to(device)


def load_model(content: dict, device: torch.device, bf16: bool = False, dropout: float = 0.0) -> Actor:
    """The actor of a checkpoint. Exits with a line if it is another's."""
    sizes = dict(content["sizes"])
    kind = sizes.pop("kind", "dt")
    if kind != Actor.kind:
        q_guided.die(f"the checkpoint holds a {kind}: iql.py takes its own only.")
    sizes.pop("embed_dim", None)
    try:
        actor = Actor(**sizes, dropout=dropout)
        actor.load_state_dict(content["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        q_guided.die(f"the checkpoint's weights do not fit its sizes {sizes}: take another.")
    return actor.to(device).eval()


def parse_args(arguments: list[str]) -> Args:
    """The command line, read by the machinery of q_guided_grpo_dt.py, which from here on works for this script."""
    q_guided.__file__ = str(Path(pretrain.__file__).with_name("iql.py"))  # runs bear this name
    q_guided.Args, q_guided.SMALL = Args, SMALL
    q_guided.fill_from_table = fill_from_table
    q_guided.load_model = load_model
    q_guided.MAY_BE_ZERO += ("min_steps", "offline_updates", "step_cost")
    q_guided.UP_TO_ONE += ("expectile",)
    q_guided.FIXED += ("hidden_dim", "offline_updates", "step_cost")
    return q_guided.parse_args(arguments)


def command_line(arguments: list[str]) -> None:
    """IQL, or the evaluation of a checkpoint."""
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
