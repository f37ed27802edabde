"""How fast grpo_dt_continuous.py simulates, and how long its iteration takes at the paper's size.

    python benchmark/speed.py [--parts pool] [--threads 1] [--tasks Hopper-v5 Ant-v5]

Part "pool": environment steps per second of the simulator pool. For each task three things do the same work, from the
same snapshots of an episode of random actions:
  pool   make_pool(...).step: observations, rewards and terminations of all simulations
  raw    mujoco.mj_step alone, on the MjData of that pool, in its threads
  loop   env.step of one gymnasium environment, for some of the simulations, one after the other
They take turns for several rounds. The Markdown table gives environment steps per second, each frame_skip steps of
MuJoCo, and ratios, all medians over the rounds.

Part "iteration": seconds of one iteration with the settings of the task's row, a network of random weights and
sub-trajectories that all live through L_traj + L_eval steps (falls are switched off):
  ours   the script's own functions
  plain  the same iteration as one would first write it: a loop over env.step, fp32, all three tokens of a step through
         the whole network; --plain-steps of its L_eval steps are run, and their time is scaled to all; not where the
         row has a context above 1
  floor  the same environment steps by raw mj_step and the floating-point operations of ours at the speed of a large
         matrix product, nothing else

Part "changes": what each change of the network's work brings: milliseconds of a policy call for 512 windows, and of a
forward and backward pass of a minibatch (n_batch x L_traj windows), all taking turns; and what few batch sizes bring.
Take all of them on a quiet machine: other load falls on their parts unevenly.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import mujoco
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo_dt_continuous as grpo

TASKS = ["Hopper-v5", "Walker2d-v4", "HalfCheetah-v5", "Ant-v4", "Ant-v5"]
TASKS += ["AdroitHandDoor-v1", "AdroitHandHammer-v1", "AdroitHandPen-v1", "AntMaze_UMaze-v4"]
PARTS = ["pool", "iteration", "changes"]
ACTION = 0.3  # size of the random actions, of 1: the simulations stay calm


def record_episode(env, rng: np.random.Generator) -> np.ndarray:
    """A snapshot before every step of one episode of random actions: (T, D). `env` stays as the episode left it."""
    env.reset(seed=0)
    snapshots, ended = [], False
    while not ended:
        snapshots.append(grpo.take_snapshot(env))
        action = grpo.scale_action(rng.uniform(-ACTION, ACTION, env.action_space.shape), env)
        ended = any(env.step(action)[2:4])
    return np.array(snapshots)


def raw_step(pool: grpo.SimulatorPool):
    """step(rows, controls) by mj_step alone, on the data and in the threads of `pool`."""
    views = [(grpo.simulator_of(sim).data, grpo.simulator_of(sim).data.ctrl) for sim in pool.sims]
    skip = grpo.simulator_of(pool.env).frame_skip

    def step(rows: np.ndarray, controls: np.ndarray) -> None:
        def work(chunk: np.ndarray, thread: int) -> None:
            model = pool.models[thread]
            for j in chunk:
                data, ctrl = views[rows[j]]
                ctrl[:] = controls[j]
                mujoco.mj_step(model, data, skip)

        pool.in_threads(work, rows)

    return step


def time_pool(pool: grpo.SimulatorPool, step, snapshots: np.ndarray, actions: np.ndarray) -> float:
    """Environment steps per second of step(rows, actions) for all simulations; actions (steps, N, A)."""
    rows = np.arange(pool.size)
    pool.restore(rows, snapshots)
    begun = time.perf_counter()
    for action in actions:
        step(rows, action)
    return len(actions) * pool.size / (time.perf_counter() - begun)


def positions(pool: grpo.SimulatorPool) -> np.ndarray:
    """Where all simulations are: (N, nq)."""
    return np.array([grpo.simulator_of(sim).data.qpos for sim in pool.sims])


def time_loop(env, snapshots: np.ndarray, actions: np.ndarray) -> float:
    """The same by env.step of one environment, for 16 of the simulations; `env` recorded the snapshots."""
    simulator, seconds = grpo.simulator_of(env), 0.0
    chosen = range(0, len(snapshots), max(1, len(snapshots) // 16))
    size = mujoco.mj_stateSize(simulator.model, grpo.INTEGRATION_STATE)
    for j in chosen:
        mujoco.mj_setState(simulator.model, simulator.data, snapshots[j, :size], grpo.INTEGRATION_STATE)
        begun = time.perf_counter()
        for action in actions[:, j]:
            env.step(action)
        seconds += time.perf_counter() - begun
    return len(actions) * len(chosen) / seconds


def measure(task: str, args) -> str:
    """A row of the table."""
    rng, env = np.random.default_rng(0), grpo.make_env(task)
    episode = record_episode(env, rng)
    snapshots = episode[np.linspace(0, len(episode) - 1, args.simulations).astype(int)]
    pool = grpo.make_pool(grpo.make_env(task), args.simulations, args.threads)
    actions = rng.uniform(-ACTION, ACTION, (args.steps, args.simulations, *env.action_space.shape))
    actions = grpo.scale_action(actions, env)
    rules, speeds = env.unwrapped, []  # Adroit scales actions to the range of its actuators inside its step
    controls = rules.act_mean + actions * rules.act_rng if hasattr(rules, "act_rng") else actions
    for n in range(args.rounds + 1):
        pooled, reached = time_pool(pool, pool.step, snapshots, actions), positions(pool)
        raw = time_pool(pool, raw_step(pool), snapshots, controls)
        assert np.allclose(positions(pool), reached, atol=1e-6), f"{task}: pool and raw mj_step did not do the same"
        speeds += [(pooled, raw, time_loop(env.env, snapshots, actions))] if n else []  # round 0 warms up
    a, b, c = np.array(speeds).T
    values = [f"{np.median(each):,.0f}" for each in (a, b, c)] + [f"{np.median(each):.2f}" for each in (a / b, a / c)]
    return f"| {task} | {type(pool).__name__} | {' | '.join(values)} |"


class PlainTransformer(grpo.DecisionTransformer):
    """The same network, at context 1, as one would first write it: all three tokens of a step, the action's slot empty,
    through all blocks in full."""

    n_tokens = 3

    def forward(self, observations, returns, actions, real=None):
        s = self.embed_observation((observations - self.obs_mean) / self.obs_std)  # (B, 1, E)
        g = self.embed_return((returns * self.return_scale)[..., None])
        a = self.embed_action(torch.zeros(len(returns), 1, self.act_dim, device=returns.device))
        x = self.norm_in(torch.cat([g, s, a][: self.n_tokens], dim=1))  # (B, 3, E)
        mask = torch.ones(self.n_tokens, self.n_tokens, dtype=torch.bool, device=x.device).tril()[None, None]
        for block in self.blocks:
            x = block(x, mask)
        token = self.norm_out(x)[:, 1:2]
        spread = torch.tanh(self.log_std_head(token))
        log_std = grpo.LOG_STD_MIN + 0.5 * (grpo.LOG_STD_MAX - grpo.LOG_STD_MIN) * (spread + 1.0)
        return grpo.SquashedGaussian(self.mean_head(token), log_std), None


class TwoTokens(PlainTransformer):
    """Without the action's slot, which nothing reads; all blocks in full."""

    n_tokens = 2


@torch.no_grad()
def plain_rollout(model: PlainTransformer, envs: list, members: list, args, eval_steps: int) -> tuple[float, float]:
    """Seconds in env.step and in the policy for L_traj + `eval_steps` steps of all members, one environment each."""
    simulated = inferred = 0.0
    for env, (source, h) in zip(envs, members):
        simulator = grpo.simulator_of(env)
        size = mujoco.mj_stateSize(simulator.model, grpo.INTEGRATION_STATE)
        mujoco.mj_setState(simulator.model, simulator.data, source.snapshots[h][:size], grpo.INTEGRATION_STATE)
    observations = np.stack([source.observations[h] for source, h in members])
    g = np.array([source.returns[h] for source, h in members])
    for step in range(args.l_traj + eval_steps):
        begun = time.perf_counter()
        windows = torch.from_numpy(observations)[:, None], torch.from_numpy(g)[:, None], None
        dist, _ = model.act(*windows)
        u = dist.sample(torch.randn_like(dist.mean)) if step < args.l_traj else dist.mean
        dist.log_prob(u)
        actions = grpo.squash(u).numpy()
        inferred, begun = inferred + time.perf_counter() - begun, time.perf_counter()
        for i, env in enumerate(envs):
            observations[i], reward, _, _, _ = env.unwrapped.step(grpo.scale_action(actions[i], env))
            g[i] -= reward
        simulated += time.perf_counter() - begun
    return simulated, inferred


def new_learner(cls, env, args, dtype) -> grpo.GRPOLearner:
    """A learner on random weights at the size in `args`."""
    torch.manual_seed(0)
    model = cls(*env.observation_space.shape, *env.action_space.shape, args.embed_dim).use_precision(dtype)
    model.return_scale.fill_(1e-3)
    return grpo.GRPOLearner(model.to(args.device), args)


def timed(function, *args):
    """(seconds, result) of a call, the device's work included."""
    begun = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def peak_flops(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a large matrix product: best of ten."""
    a, b = torch.randn(4096, 512, device=device).to(dtype), torch.randn(512, 2048, device=device).to(dtype)
    seconds = min(timed(torch.mm, a, b)[0] for _ in range(10))
    return 2 * 4096 * 512 * 2048 / seconds


def flops_of(model, args) -> float:
    """Floating-point operations of the network's matrix products for one window."""
    shapes = ((args.c_online, len(model.obs_mean)), (args.c_online,), (args.c_online - 1, model.act_dim))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*(torch.zeros(64, *shape, device=args.device) for shape in shapes))
    return counter.get_total_flops() / 64


def measure_plain(env, kwargs: dict, learner, points: list, args, plain_steps: int) -> list[float]:
    """Seconds of simulation, network and update of the plain iteration, from the points and with the buffer of ours."""
    plain = new_learner(PlainTransformer, env, args, torch.float32)
    members = [point for point in points for _ in range(args.group_size)]
    envs = [grpo.make_env(args.env_id, kwargs) for _ in members]
    for each in envs:
        each.reset(seed=0)
    some = min(plain_steps, args.l_eval)
    plain_rollout(plain.model, envs, members, args, 0)
    scale = (args.l_traj + args.l_eval) / (args.l_traj + some)
    parts = [scale * part for part in plain_rollout(plain.model, envs, members, args, some)]
    plain.buffer = learner.buffer
    return [*parts, timed(plain.update, 1)[0]]


def measure_iteration(task: str, options) -> tuple[str, str]:
    """Rows of the second table. The first iteration warms up where there is time for two."""
    kwargs = {"terminate_when_unhealthy": False} if task.startswith(("Hopper", "Walker2d", "Ant-")) else {}
    args = grpo.Args(env_id=task, embed_dim=options.embed_dim, threads=options.threads, delta_r=0.0)
    (device, dtype), args.g_eval = grpo.set_up_torch(args), None
    args.device = device.type
    grpo.fill_from_table(args, "medium", 0.0)
    envs = [grpo.make_env(task, kwargs) for _ in range(args.n_sources)]
    pool = grpo.make_pool(grpo.make_env(task, kwargs), args.n_sources * args.n_points * args.group_size, args.threads)
    learner = new_learner(grpo.DecisionTransformer, envs[0], args, dtype)
    policy = grpo.rollout_copy(learner.model)
    grpo.collect(policy, envs[:1], args, 0)
    collected, replay = timed(grpo.collect, policy, envs[:1], args, 1)
    for warm_up in (True, False):
        args.l_eval, all_steps = (1, args.l_eval) if warm_up else (args.l_eval, 0)
        chosen, points = timed(grpo.choose_points, policy, replay, args, 1)
        rolled, groups = timed(grpo.rollout_groups, policy, pool, points, args, 1)
        args.l_eval = all_steps or args.l_eval
        keep = np.ones(pool.size, bool)
        remembered, _ = timed(learner.remember, groups, np.linspace(-1, 1, pool.size), keep)
        updated, _ = timed(learner.update, 1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    ours = (groups.seconds, chosen + rolled - groups.seconds, remembered + updated)
    seeds, ten = list(range(10)), envs[:10]
    evaluated, _ = timed(grpo.evaluate, learner.model, ten, args.g_eval, args.c_online, seeds)

    steps, flops = groups.env_steps, flops_of(learner.model, args)
    actions = np.zeros((options.steps, pool.size, *envs[0].action_space.shape))
    begun = time.perf_counter()
    for action in actions:
        raw_step(pool)(np.arange(pool.size), action)
    raw = actions.size / actions.shape[2] / (time.perf_counter() - begun)
    trained = args.n_minibatches * args.n_batch * args.l_traj
    peak = peak_flops(dtype, args.device)
    # an update goes forward, backward (twice the work) and forward through the reference
    floor = (steps / raw, steps * flops / peak, (4 * trained + pool.size * args.l_traj) * flops / peak)

    tables = [("ours", ours), ("floor", floor)]
    if options.plain_steps and args.c_online == 1:  # the plain network has no context
        tables.insert(1, ("plain", measure_plain(envs[0], kwargs, learner, points, args, options.plain_steps)))
    rows = []
    for name, parts in tables:
        columns = " | ".join(f"{part:.1f}" for part in (sum(parts), *parts))
        rows += [f"| {task} | {name} | {columns} | {sum(parts) / sum(ours):.2f} |"]
    note = f"{task}: {steps:,} environment steps, {dtype}, {peak / 1e9:,.0f} GFLOP/s at the peak, "
    note += f"{flops / 1e6:.1f} MFLOP a window; apart: collection {collected:.1f} s, evaluation {evaluated:.1f} s; "
    note += f"peak memory of ours {memory:.2f} GiB"
    return "\n".join(rows), note


def measure_changes(task: str, options) -> tuple[str, str]:
    """Rows of the third table, and a line on batch sizes: medians over rounds in which all take turns."""
    env, args = grpo.make_env(task), grpo.Args(env_id=task, embed_dim=options.embed_dim, threads=options.threads)
    args.c_online, args.g_eval = 1, None
    (device, dtype), script = grpo.set_up_torch(args), grpo.DecisionTransformer
    args.device = device.type
    grpo.fill_from_table(args, "medium", 0.0)
    variants = [
        ("three tokens, all of them through all blocks", PlainTransformer, torch.float32, False),
        ("two tokens: none for the action", TwoTokens, torch.float32, False),
        ("the last block for the state token alone", script, torch.float32, False),
        ("products in bf16", script, dtype, False),
        ("and the weights made bf16 once per iteration", script, dtype, True),
    ]
    variants = variants if dtype == torch.bfloat16 else variants[:3]

    def act(model, count: int) -> None:
        with torch.no_grad():
            model.act(torch.ones(count, 1, *env.observation_space.shape, device=device), ones[:count], None)

    def learn(model) -> None:
        observations = torch.ones(trained, 1, *env.observation_space.shape, device=device)
        dist, _ = model(observations, ones, None)
        (dist.mean.square().mean() + dist.log_std.mean()).backward()

    trained = args.n_batch * args.l_traj
    ones, times = torch.ones(trained, 1, device=device), []
    models = [new_learner(cls, env, args, kind).model for _, cls, kind, _ in variants]
    policies = [grpo.rollout_copy(model) if once else model for model, (*_, once) in zip(models, variants)]
    for _ in range(options.rounds + 1):
        acting = [timed(act, policy, 512)[0] for policy in policies]
        times.append((acting, [timed(learn, model)[0] for model in models]))
    acting, learning = 1000 * np.median(np.array(times[1:]), axis=0)  # round 0 warms up
    rows = [
        f"| {task} | {name} | {a:.1f} | {a / acting[0]:.2f} | {b:.0f} | {b / learning[0]:.2f} |"
        for (name, *_), a, b in zip(variants, acting, learning)
    ]
    falling = range(511, 351, -1)  # members fall one by one; every size is new, as it is for a run's first iteration
    every = sum(timed(act, policies[-1], count)[0] for count in falling)
    padded = sum(timed(act, policies[-1], count + -count % 32)[0] for count in falling)
    return "\n".join(rows), f"{task}: calls for 511, 510, ..., 352 windows {every:.2f} s, padded to 32 {padded:.2f} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--tasks", nargs="+", help="environment ids [pool: all of the paper's; else Hopper-v5]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of pool and network [all cores]")
    parser.add_argument("--rounds", type=int, default=5, help="pool, changes: rounds that count, after one")
    parser.add_argument("--steps", type=int, default=20, help="pool: environment steps of each simulation in a round")
    parser.add_argument("--simulations", type=int, default=256, help="pool: simulations side by side")
    parser.add_argument("--embed-dim", type=int, default=512, help="width of the network")
    parser.add_argument(
        "--plain-steps", type=int, default=15, help="iteration: L_eval steps run by the plain one [0: leave it out]"
    )
    arguments = parser.parse_args()
    if "pool" in arguments.parts:
        print(f"{arguments.simulations} simulations, {arguments.threads} threads, environment steps per second:\n")
        print("| environment | class of the pool | pool | raw | loop | pool / raw | pool / loop |\n" + "|---" * 7 + "|")
        for task in arguments.tasks or TASKS:
            print(measure(task, arguments), flush=True)
    if "iteration" in arguments.parts:
        print(f"\nwidth {arguments.embed_dim}, {arguments.threads} threads, seconds of an iteration:\n")
        print("| environment | | total | simulate | infer | update | total / ours |\n" + "|---" * 7 + "|")
        notes = []
        for task in arguments.tasks or ["Hopper-v5"]:  # a row as soon as it is there: they take minutes
            row, note = measure_iteration(task, arguments)
            print(row, flush=True)
            notes.append(note)
        print("\n" + "\n".join(notes))
    if "changes" in arguments.parts:
        print(f"\nwidth {arguments.embed_dim}, {arguments.threads} threads, milliseconds:\n")
        print("| environment | | policy call | ratio | forward, backward | ratio |\n" + "|---" * 6 + "|")
        changes = [measure_changes(task, arguments) for task in arguments.tasks or ["Hopper-v5"]]
        print("\n".join(row for row, _ in changes) + "\n\n" + "\n".join(note for _, note in changes))
