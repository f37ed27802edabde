"""Datasets in the manner of D4RL for a task of today's gymnasium: random, medium-replay and medium, made by SAC.

  Minari has no random and no medium-replay sets for MuJoCo, and D4RL's own come from other versions of the tasks.
  1. random: steps of uniformly random actions
  2. SAC (Haarnoja et al. 2018) trains until its last episodes reach a medium return
  3. medium-replay: every step of that training, from the first one on
  4. medium: steps of the policy that it ended with, actions sampled

python benchmark/collect_dataset.py --env-id Hopper-v5 --hdf5 datasets
writes three Minari datasets, online-dt/Hopper-v5/{random,medium-replay,medium}-v0, for `pretrain_dt.py --dataset`,
and beside them datasets/Hopper-v5-{random,medium-replay,medium}.hdf5 in D4RL's layout.
"""

import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

# Shapes: B batch, S and A dimensions of observation and action, N steps.

# Return at which training stops: what D4RL's medium sets hold on average (Hopper 44, Walker2d 62, Ant 80 of 100,
# Table 2 of the paper), and D4RL's reference returns of a random policy and an expert.
MEDIUM = {"Hopper": 1422.0, "Walker2d": 2852.0, "Ant": 3051.0}
REFERENCE = {
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    "HalfCheetah": (-280.178953, 12135.0),
}


@dataclass
class Args:
    """Collect the random, medium-replay and medium datasets of one task with SAC."""

    env_id: str = "Hopper-v5"
    """gymnasium id of the environment"""
    medium_return: float | None = None
    """mean return of the last 20 training episodes at which training stops [raw reward; None: D4RL's]"""
    max_steps: int = 2_000_000
    """environment steps after which training gives up"""
    random_steps: int = 200_000
    """least number of steps of the random set; its last episode is played to the end"""
    medium_steps: int = 200_000
    """least number of steps of the medium set; its last episode is played to the end"""
    hdf5: str | None = None
    """folder for the same datasets as HDF5 files in D4RL's layout [None: none are written]"""

    learning_starts: int = 5_000
    """steps of uniformly random actions before SAC's first"""
    hidden: int = 256
    """width of the two hidden layers of actor and critics"""
    batch_size: int = 256
    """transitions per update"""
    gamma: float = 0.99
    """discount per step"""
    tau: float = 0.005
    """step of the target critics towards the critics, per update"""
    lr: float = 3e-4
    """Adam's learning rate of actor, critics and temperature"""
    actor_every: int = 2
    """updates of the critics per update of the actor"""

    seed: int = 1
    """seed of all random numbers"""
    threads: int = 1
    """CPU threads of torch: a process per core collects more than one with many threads"""


def die(message: str) -> None:
    """End with one line on stderr and exit code 1."""
    raise SystemExit(f"error: {message}")


class Transitions:
    """Every transition so far, in arrays that are doubled when they are full."""

    def __init__(self, obs_dim: int, act_dim: int, capacity: int = 65_536):
        self.size, shapes = 0, ((obs_dim,), (act_dim,), (), (), (), (obs_dim,))
        dtypes = (np.float32, np.float32, np.float32, bool, bool, np.float32)
        self.arrays = [np.zeros((capacity, *shape), dtype) for shape, dtype in zip(shapes, dtypes)]

    def add(self, *fields) -> None:
        """observation (S,), action (A,), reward, terminated, truncated, next observation (S,)"""
        if self.size == len(self.arrays[0]):
            self.arrays = [np.concatenate([array, np.zeros_like(array)]) for array in self.arrays]
        for array, field in zip(self.arrays, fields):
            array[self.size] = field
        self.size += 1

    def sample(self, rng: np.random.Generator, count: int) -> list[torch.Tensor]:
        """Fields as in `add`, (B, ...), uniformly with replacement."""
        index = rng.integers(self.size, size=count)
        return [torch.from_numpy(array[index]) for array in self.arrays]

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays (N, ...) under D4RL's names. The step at which collecting stopped ends its episode."""
        names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
        columns = {name: array[: self.size].copy() for name, array in zip(names, self.arrays)}
        columns["timeouts"][-1] |= ~columns["terminals"][-1]
        return columns


class Actor(nn.Module):
    """A squashed Gaussian; actions in the environment's bounds."""

    def __init__(self, env: gym.Env, hidden: int):
        super().__init__()
        dims = env.observation_space.shape[0], env.action_space.shape[0]
        self.body = nn.Sequential(nn.Linear(dims[0], hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 2 * dims[1])
        low, high = env.action_space.low, env.action_space.high
        self.register_buffer("middle", torch.tensor((high + low) / 2, dtype=torch.float32))
        self.register_buffer("half_range", torch.tensor((high - low) / 2, dtype=torch.float32))

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled actions (B, A) and their log-densities (B,), but for the constant of the bounds' width."""
        mean, spread = self.head(self.body(observations)).chunk(2, dim=-1)
        log_std = -5.0 + 3.5 * (torch.tanh(spread) + 1.0)  # in [-5, 2]
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.9189385 - 2.0 * (0.6931472 - u - F.softplus(-2.0 * u))
        return self.middle + self.half_range * torch.tanh(u), log_prob.sum(-1)


class Critics(nn.Module):
    """Two action values Q1, Q2 (2, B), worked out side by side as batched products."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        sizes = [(inputs, hidden), (hidden, hidden), (hidden, 1)]
        bound = [fan_in**-0.5 for fan_in, _ in sizes]  # nn.Linear's
        self.weights = nn.ParameterList(torch.empty(2, *size).uniform_(-b, b) for size, b in zip(sizes, bound))
        self.biases = nn.ParameterList(torch.empty(2, 1, size[1]).uniform_(-b, b) for size, b in zip(sizes, bound))

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([observations, actions], dim=-1).expand(2, -1, -1)  # (2, B, S + A)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x if i == 0 else F.relu(x), weight)
        return x.squeeze(-1)


class SAC:
    """Actor, critics, their targets and the temperature alpha, whose entropy target is -dim A."""

    def __init__(self, env: gym.Env, args: Args):
        torch.manual_seed(args.seed)
        obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
        self.args, self.updates, self.target_entropy = args, 0, -float(act_dim)
        self.actor, self.log_alpha = Actor(env, args.hidden), torch.zeros(1, requires_grad=True)
        self.critics, self.targets = (Critics(obs_dim + act_dim, args.hidden) for _ in range(2))
        self.targets.load_state_dict(self.critics.state_dict())
        self.targets.requires_grad_(False)
        adam = [torch.optim.Adam(m.parameters(), args.lr, fused=True) for m in (self.actor, self.critics)]
        self.actor_adam, self.critic_adam, self.alpha_adam = *adam, torch.optim.Adam([self.log_alpha], args.lr)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """One sampled action (A,)."""
        with torch.no_grad():
            return self.actor(torch.from_numpy(observation.astype(np.float32))[None])[0][0].numpy()

    def update(self, batch: list[torch.Tensor]) -> None:
        """A step of the critics and, every `actor_every`, one of actor and temperature."""
        args, (observations, actions, rewards, terminated, _, following) = self.args, batch
        with torch.no_grad():  # a time-out is no end: its value is bootstrapped
            next_actions, log_prob = self.actor(following)
            value = self.targets(following, next_actions).min(0).values - self.log_alpha.exp() * log_prob  # (B,)
            target = rewards + args.gamma * (~terminated) * value
        loss = ((self.critics(observations, actions) - target) ** 2).mean(1).sum()
        self.step(self.critic_adam, loss)
        self.updates += 1
        if self.updates % args.actor_every == 0:
            self.critics.requires_grad_(False)
            sampled, log_prob = self.actor(observations)
            value = self.critics(observations, sampled).min(0).values
            self.step(self.actor_adam, (self.log_alpha.exp().detach() * log_prob - value).mean())
            self.critics.requires_grad_(True)
            entropy_gap = (log_prob.detach() + self.target_entropy).mean()
            self.step(self.alpha_adam, -self.log_alpha.exp().sum() * entropy_gap)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.targets.parameters()), list(self.critics.parameters()), args.tau)

    @staticmethod
    def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def play(env: gym.Env, choose, steps: int, seed: int, after=None) -> Transitions:
    """At least `steps` steps of actions choose(observation), to the end of an episode; after(transitions, returns) is
    called at every step and stops everything by returning True."""
    transitions = Transitions(env.observation_space.shape[0], env.action_space.shape[0])
    observation, total, returns = np.array(env.reset(seed=seed)[0], np.float64), 0.0, []
    while True:
        action = choose(observation)
        following, reward, terminated, truncated, _ = env.step(action.copy())
        following = np.array(following, np.float64)  # a copy: some environments return their own buffer, or integers
        reward = np.asarray(reward, np.float64).item()  # or a reward of shape (1,)
        transitions.add(observation, action, reward, terminated, truncated, following)
        total, observation = total + reward, following
        if terminated or truncated:
            returns.append(total)
            observation, total = np.array(env.reset()[0], np.float64), 0.0
            if transitions.size >= steps:
                return transitions
        if after and after(transitions, returns):
            return transitions


def train(env: gym.Env, args: Args, medium_return: float) -> tuple[SAC, Transitions]:
    """SAC until the mean return of its last 20 episodes reaches `medium_return`; and all steps of its training."""
    agent, rng, begun, shown = SAC(env, args), np.random.default_rng(args.seed), time.time(), [0.0]
    env.action_space.seed(args.seed)

    def choose(observation: np.ndarray) -> np.ndarray:
        return env.action_space.sample() if agent.updates == 0 else agent.act(observation)

    def after(transitions: Transitions, returns: list[float]) -> bool:
        if transitions.size >= args.learning_starts:
            agent.update(transitions.sample(rng, args.batch_size))
        mean = float(np.mean(returns[-20:])) if returns else float("nan")
        if time.time() - shown[0] > 10:
            shown[0], rate = time.time(), transitions.size / (time.time() - begun)
            print(f"{transitions.size:,} steps  last 20 returns {mean:,.0f}  {rate:.0f} steps/s", flush=True)
        if transitions.size >= args.max_steps:
            die(f"no return of {medium_return:,.0f} after {args.max_steps:,} steps: give more, or --medium-return.")
        return len(returns) >= 20 and mean >= medium_return and agent.updates > 0

    return agent, play(env, choose, args.max_steps, args.seed, after)


def episodes_of(columns: dict[str, np.ndarray]) -> list[slice]:
    """The steps of each episode."""
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"]) + 1
    return [slice(first, last) for first, last in zip([0, *ends[:-1]], ends)]


def write_minari(dataset_id: str, columns: dict[str, np.ndarray], env: gym.Env, task: str) -> None:
    """A Minari dataset with the environment's spec and, for D4RL's tasks, its reference scores. Made in a hidden
    folder, then moved to its place: a half one would be in the way for ever."""
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.storage.datasets_root_dir import get_dataset_path

    buffers = []
    for i, each in enumerate(episodes_of(columns)):
        observations = np.concatenate([columns["observations"][each], columns["next_observations"][each][-1:]])
        flags = [columns[name][each].tolist() for name in ("rewards", "terminals", "timeouts")]
        dtypes = (env.observation_space.dtype, env.action_space.dtype)
        buffers.append(EpisodeBuffer(i, None, None, observations.astype(dtypes[0]), columns["actions"][each], *flags))
    low, high = REFERENCE.get(task, (None, None))
    facts = dict(algorithm_name="uniformly random actions" if "/random-" in dataset_id else "SAC")
    facts |= dict(ref_min_score=low, ref_max_score=high, description="made by benchmark/collect_dataset.py")
    facts |= dict(requirements=["gymnasium[mujoco]"])
    root, target = get_dataset_path(), get_dataset_path(dataset_id)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
    given = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(making)
    try:
        with warnings.catch_warnings():  # Minari asks for an author, an e-mail address and a link
            warnings.simplefilter("ignore")
            minari.create_dataset_from_buffers(dataset_id, buffers, env=env, **facts)
        for namespace in making.rglob("namespace_metadata.json"):
            place = root / namespace.relative_to(making)
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                shutil.copy(namespace, place)
        os.replace(making / dataset_id, target)
    finally:
        os.environ.pop("MINARI_DATASETS_PATH")
        if given is not None:
            os.environ["MINARI_DATASETS_PATH"] = given
        shutil.rmtree(making, ignore_errors=True)


def write_hdf5(path: Path, columns: dict[str, np.ndarray], args: Args) -> None:
    """A file in D4RL's layout, written beside `path` and renamed."""
    import h5py

    temporary = path.with_suffix(".tmp")
    try:
        with h5py.File(temporary, "w") as file:
            for name, array in columns.items():
                file.create_dataset(name, data=array, compression="gzip")
            file.attrs.update(env_id=args.env_id, seed=args.seed, made_by="benchmark/collect_dataset.py")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(args: Args) -> None:
    """Collect the three datasets and write them; those that exist are refused before anything runs."""
    from minari.storage.datasets_root_dir import get_dataset_path

    torch.set_num_threads(args.threads)
    task = args.env_id.rsplit("-v", 1)[0]
    medium_return = MEDIUM.get(task) if args.medium_return is None else args.medium_return
    if medium_return is None:
        die(f"no medium return known for {args.env_id}: give --medium-return.")
    if min(args.random_steps, args.medium_steps, args.learning_starts, args.batch_size, args.max_steps) < 1:
        die("--random-steps, --medium-steps, --learning-starts, --batch-size and --max-steps must be above 0.")
    name = re.sub(r"[^-\w]", "_", args.env_id)  # my_module:Own-v0
    ids = {kind: f"online-dt/{name}/{kind}-v0" for kind in ("medium-replay", "medium", "random")}
    taken = [str(get_dataset_path(each)) for each in ids.values() if get_dataset_path(each).exists()]
    if taken:
        die(f"{', '.join(taken)} exists already: move it away, or choose another MINARI_DATASETS_PATH.")
    files = {kind: Path(args.hdf5 or "") / f"{name}-{kind}.hdf5" for kind in ids}
    taken = [str(path) for path in files.values() if args.hdf5 and path.exists()]
    if taken:
        die(f"{', '.join(taken)} exists already: move it away, or choose another --hdf5.")
    try:
        env = gym.make(args.env_id)
    except gym.error.Error as error:
        die(f"cannot make the environment {args.env_id}: {error}")
    spaces = (env.observation_space, env.action_space)
    if not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces):
        die(f"{args.env_id} has {spaces}: both must be flat Boxes.")

    for folder in [get_dataset_path(), *([args.hdf5] if args.hdf5 else [])]:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # what can't be written shows before hours of training
    agent, replay = train(env, args, medium_return)
    env.action_space.seed(args.seed + 1)
    collect = {
        "medium-replay": lambda: replay,
        "medium": lambda: play(env, agent.act, args.medium_steps, args.seed + 2),
        "random": lambda: play(env, lambda observation: env.action_space.sample(), args.random_steps, args.seed + 1),
    }
    for kind in ids:  # each is written before the next is played
        transitions = collect[kind]()
        columns = transitions.columns()
        returns = [columns["rewards"][each].sum() for each in episodes_of(columns)]
        if args.hdf5:
            write_hdf5(files[kind], columns, args)
        write_minari(ids[kind], columns, env, task)
        size = f"{transitions.size:,} steps, {len(returns):,} episodes"
        print(f"{ids[kind]}: {size}, return {np.mean(returns):,.1f} ± {np.std(returns):,.1f}", flush=True)
    env.close()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        sys.exit("stopped: what was printed as a dataset is written, nothing else")
    except OSError as error:
        die(f"{error}: make room or choose another folder; datasets printed above are written.")
