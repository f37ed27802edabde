"""Changed copies of grpo_dt_continuous.py beside the original: same flags, same seeds, one figure and one table.

    cp grpo_dt_continuous.py my_grpo_dt.py        # then change a function in it
    python benchmark/compare.py my_grpo_dt.py     # minutes on two cores
    python benchmark/compare.py mine.py other.py --seeds 1 2 3 -- --iterations 40 --l-eval 400

Flags after -- are those of the script; they are added to SMALL. The runs are made by benchmark/run.py, in folders named
by the text of the script: what has been run is not run again, and a copy that was changed is. Copies stand beside the
original, since they pretrain with the pretrain_dt.py beside them.
"""

import argparse
import csv
import difflib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ORIGINAL = HERE.parent / "grpo_dt_continuous.py"
# a quarter of the reset points, minibatches to fit, a shorter L_eval, a larger step
SMALL = "--embed-dim 128 --n-sources 4 --n-batch 64 --buffer-size 256 --l-eval 200 --lr 2e-4 --iterations 8"
SMALL += " --eval-every 4"

PANELS = {
    "eval/return_mean": "return, mean action",
    "rollout/sub_score": "score of sub-trajectories",
    "rollout/group_std": "standard deviation in a group",
    "losses/clip_fraction": "clipped fraction",
    "losses/kl": "KL to the reference",
    "losses/entropy": "entropy",
}
TABLE = (*PANELS, "rollout/kept", "losses/ratio_max", "losses/grad_norm")


def die(message: str):
    raise SystemExit(f"error: {message}")


def changes(copy: Path) -> list[str]:
    """The lines that a copy adds and takes away, with a mark where each place begins."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (ORIGINAL, copy)]
    return list(difflib.unified_diff(*texts, ORIGINAL.name, copy.name, n=0, lineterm=""))


def run_name(script: Path, flags: list[str]) -> str:
    """Of a run, but for its seed: another text or other flags give another name."""
    text = script.read_bytes() + shlex.join(flags).encode()
    return f"compare-{script.stem}-{hashlib.sha256(text).hexdigest()[:8]}"


def read_columns(folder: Path) -> dict[str, np.ndarray]:
    """metrics.csv: iteration and the columns of TABLE, NaN where a cell is empty."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row.get(name) or "nan") for row in rows]) for name in ("iteration", *TABLE)}


def late_mean(run: dict[str, np.ndarray], name: str) -> float:
    """Mean of a column over the second half of the iterations; of evaluations, the last one."""
    values = run[name][run["iteration"] > run["iteration"][-1] / 2]
    values = values[np.isfinite(values)]
    return values[-1] if name.startswith("eval/") else values.mean() if len(values) else np.nan


def table(found: dict[str, list[dict]]) -> str:
    """A Markdown table: for each script the mean over its seeds, and each seed's value."""
    lines = [["", *found], ["---"] * (1 + len(found))]
    for name in TABLE:
        values = [[late_mean(run, name) for run in runs] for runs in found.values()]
        cells = [f"{np.mean(each):.3g} ({', '.join(f'{value:.3g}' for value in each)})" for each in values]
        lines.append([f"`{name}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """A panel for each of PANELS: thin lines are seeds, thick ones their mean."""
    from matplotlib.figure import Figure  # drawn without pyplot, so without a display

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for number, (label, runs) in enumerate(found.items()):
            x, values = runs[0]["iteration"], np.array([run[name] for run in runs])  # (seeds, iterations)
            there = np.isfinite(values).all(0)  # evaluations are not made in each iteration
            axes.plot(x[there], values[:, there].T, color=f"C{number}", linewidth=0.6)
            axes.plot(x[there], values[:, there].mean(0), color=f"C{number}", linewidth=2, label=label)
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    described = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**described)
    parser.add_argument("copies", nargs="+", type=Path, metavar="COPY", help="changed copies of grpo_dt_continuous.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="of each script's runs [1 2]")
    args = parser.parse_args(words[:split])
    flags = shlex.split(SMALL) + words[split + 1 :]

    for copy in args.copies:
        if not copy.is_file():
            die(f"{copy} not found: cp {ORIGINAL.name} {copy}, and change a function in it.")
        if copy.stem == ORIGINAL.stem or copy.resolve().parent != ORIGINAL.resolve().parent:
            die(f"{copy} must stand beside {ORIGINAL.name}, under another name.")
        if not changes(copy):
            die(f"{copy} is {ORIGINAL.name}, word for word: change a function in it.")
        print("\n".join(changes(copy)), flush=True)

    names = {script: run_name(script, flags) for script in (ORIGINAL, *args.copies)}
    lines = [f"{name} {shlex.join(['python', str(script), *flags])}" for script, name in names.items()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(names) * len(args.seeds))
    environment = {"WORKERS": str(workers)} | os.environ | {"SEEDS": " ".join(map(str, args.seeds))}
    launch = [sys.executable, str(HERE / "run.py")]
    signal.signal(signal.SIGINT, lambda *_: None)  # at Ctrl-C run.py ends its runs, and this goes on below
    done = subprocess.run(launch, input="\n".join(lines), text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)
    for script, name in names.items():
        if run_name(script, flags) != name:
            die(f"{script} was changed while it ran: remove runs/{name}__*, and give the command again.")

    found = {}
    for script, name in names.items():
        found[script.stem] = [read_columns(Path(f"runs/{name}__{seed}")) for seed in args.seeds]
    picture = Path("runs") / f"{'-'.join(copy.stem for copy in args.copies)}.png"
    draw(found, picture)
    print(f"means of the second half, return of the last evaluation (seeds {', '.join(map(str, args.seeds))}):")
    print(f"{table(found)}\n{picture}")


if __name__ == "__main__":
    main()
