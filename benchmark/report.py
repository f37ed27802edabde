"""The report: our numbers beside the paper's, from the metrics.csv of any number of run folders.

    python benchmark/report.py runs [FOLDER ...] [--out runs/report]

takes run folders, and folders that hold run folders, and writes report.md, report.csv and curves (PNG and PDF) into
--out. It needs no network and no account, works on runs that are not finished, and says what is missing. A damaged
run is a line under "Left out".

A run's method, task, kind of data and seed are read from its args.json; what that lacks, and the variant, from the
folder's name if it is SCRIPT__TASK-KIND__VARIANT__SEED or the scripts' own ENV__SCRIPT__KIND__SEED__TIME. Without
args.json its settings count as unknown. Runs whose settings differ from the paper's in different ways are never
averaged. Any other name may stand for a change of code: it becomes the variant where settings and seed are the same.
"""

import argparse
import csv
import itertools
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAPER = Path(__file__).resolve().parent / "paper"
LAST = 5  # evaluations whose mean is the score of a run
STILL = 10  # an iteration of more medians of its run: the machine slept
SEEDS = 3  # of the paper
RESAMPLES = 10_000

BASELINES = {"iql": "IQL", "odt": "ODT", "odt_td3": "ODT+TD3"}  # of benchmark/baselines.sh
METHODS = {"pretrain_dt": "DT", "ppo_dt": "PPO-DT", "grpo_dt": "GRPO-DT", "q_guided_grpo_dt": "Q-guided GRPO-DT"}
# A field that no other method's args.json has: what a copied script was made from.
FIELDS = {"critic_dim": "q_guided_grpo_dt", "value_dim": "ppo_dt", "l_traj": "grpo_dt", "c_offline": "pretrain_dt"}
METHODS |= BASELINES
COLUMNS = {"pretrain_dt": "dt", **{name: name for name in BASELINES}, "ppo_dt": "ppo_dt", "grpo_dt": "grpo_dt"}

# The paper's abbreviations, and the names of tasks and kinds in environment ids and folders.
TASKS = {"Ho": "Hopper", "Wa": "Walker2d", "An": "Ant", "D": "Door", "P": "Pen", "H": "Hammer"}
KINDS = {"R": "random", "MR": "medium-replay", "M": "medium", "C": "cloned", "H": "human"}
MAZES = {"U": ("AntMaze", "umaze"), "UD": ("AntMaze", "diverse")}
TABLE_TASKS = [*TASKS.values(), "AntMaze"]
OTHER_KINDS = ["expert", "umaze", "diverse"]

# What a figure compares: (task, kind) and the variants beside the method of Table 1. Names as in benchmark/*.sh.
FIGURES = {
    "1": [("Hopper", "medium", ["hindsight"]), ("Door", "human", ["hindsight"])],
    "2a": [("Ant", "medium", ["full-trajectories"])],
    "2b": [("Hopper", "medium", ["mixed-groups"])],
    "2c": [("Hopper", "medium", ["token-ratio"])],
    "2d": [("Hopper", "medium", ["random-points"])],
    "2e": [("Hopper", "medium", ["geometric-mean"])],
    "4a": [("Hopper", "medium", ["reinformer"])],
    "4b": [("Ant", "medium-replay", [])],  # and Q-guided GRPO-DT
    "4c": [("Hopper", "medium", ["l-traj-1", "l-traj-5", "l-traj-50", "l-traj-100"])],
    "4d": [("Hopper", "medium", ["l-eval-0", "l-eval-30", "l-eval-100", "l-eval-200"])],
}

# Names in the paper's tables -> names in args.json, Table 5, and ODT's rate of the entropy dual.
SETTINGS = {"lr_policy": "lr", "k_ppo": "n_trajectories"}
COMMON = dict(embed_dim=512, n_layers=4, n_heads=4, beta=1e-3, weight_decay=1e-4, max_grad_norm=0.5, kappa_lr=1e-4)
# Appendix B.1, flags of ablations, which the method of Table 1 has not, and flags that the paper has not. Two of the
# ablations are values of GRPO-DT's --ratio; runs before it have them as flags of their own.
GROUPS = dict(replay_size=32, n_sources=16, n_points=4, group_size=8, buffer_size=2048, n_minibatches=8)
ABLATIONS = ("hindsight", "full_trajectories", "mixed_groups", "token_ratio", "random_points", "geometric_mean")
BEYOND = ("one_scale", "anneal_lr")
RATIOS = {"token": "token_ratio", "geometric": "geometric_mean"}

INTRODUCTION = f"""# Our numbers beside the paper's

Normalised scores: 0 = random, 100 = expert. Of tasks that are not in the paper's Table 1: returns.

- **last**: mean ± standard deviation over seeds (n - 1, so none for one seed) of a run's score, the mean of its last
  {LAST} evaluations after updates, or of fewer where that is said; pretraining has one. In an average: the mean over
  its datasets.
- **best**: the largest single evaluation of all seeds. Evaluations are noisy, so it says little.
- **sampled return**: mean return, not score, of the trajectories with sampled actions that these runs rolled out
  between the same evaluations: of the policy that is trained, where evaluations play its mean action.
- **IQM**: interquartile mean over seeds, in an average over all seeds of its datasets: the mean without the lowest and
  the highest quarter of the scores (rounded down, so with 3 seeds the plain mean); 95 % interval by {RESAMPLES:,}
  bootstrap samples of the seeds of each dataset.
- **s / iteration**: wall time of an iteration without its evaluation, of DT of an update with it, on whatever
  machine the run had: the median over iterations and seeds. In figures against minutes no iteration counts as more
  than {STILL} medians of its run: some machines slept.
- **differs in**: settings of a run that are not those of the paper's Tables 5 to 7 and Appendix B.1, ours (paper's),
  ODT's rate of the entropy dual, and the context of its pretraining; unknown: the run folder has no args.json. The
  number of iterations is not in the paper. "Evaluated at g_online": its evaluations begin at the return-to-go of
  its rollouts, not at half of it or less, as ODT's; the paper does not say from which its own begin. Other tasks are
  held against Hopper's row, which the scripts take there. Of ODT and ODT+TD3 only the width is compared, of IQL
  nothing.
"""
TABLE_1 = f"""Ours / the paper's.
\\*: fewer than {SEEDS} seeds, not finished, or settings that differ from the paper's or are unknown."""


# The paper


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def dataset_keys(name: str) -> list[tuple[str, str]]:
    """(task, kind) of the paper's "Ho-M/MR-v2", "D-C-v1", "UD-v2"; empty for "Average"."""
    task, *kinds = name.split("-")[:2]
    if task in MAZES:
        return [MAZES[task]]
    return [(TASKS[task], KINDS[kind]) for kind in kinds[0].split("/")] if task in TASKS else []


def paper_settings(method: str, task: str, kind: str) -> dict[str, float]:
    """What Tables 5, 6 and 7 and Appendix B.1 say of a method on a dataset, under the names in args.json; the critic of
    Q-guided GRPO-DT: TD3's and ODT+TD3's settings, which it follows."""
    if method in BASELINES:  # "as Yan et al.": docs/baselines.md has the rows
        return {} if method == "iql" else {"embed_dim": 512}
    name = {"ppo_dt": "table7.csv"}.get(method, "table6.csv")
    rows = {key: row for row in read_csv(PAPER / name) for key in dataset_keys(row["environments"])}
    keys = [(task, each) for each in (kind, "medium", "cloned", "umaze")]  # outside the table: as the scripts do
    key = next((key for key in keys if key in rows), ("Hopper", "medium"))
    own = {"environments", *([] if key[0] == task else ["g_online"])}
    values = {SETTINGS.get(name, name): float(value) for name, value in rows[key].items() if name not in own}
    if method == "pretrain_dt":  # g_online and all after it belong to finetuning
        values = {key: values[key] for key in ("c_offline", "c_online") if key in values}
    if method == "ppo_dt":  # the caption of Table 7
        values |= dict(epsilon=0.2, gamma=0.99, gae_lambda=0.95)
    if method == "q_guided_grpo_dt":  # Appendix B.1; it is not said to drop members
        values = {key: value for key, value in values.items() if key != "delta_r"}
        values |= dict(lr=1e-5, kappa_initial=1e-2, gamma=0.998 if task == "AntMaze" else 0.99, tau=0.005)
    if method in ("grpo_dt", "q_guided_grpo_dt"):
        values |= GROUPS
    return COMMON | values | dict.fromkeys((*ABLATIONS, *BEYOND), False)


# Runs


class Point(NamedTuple):
    """An evaluation."""

    iteration: int
    score: float  # D4RL's, 0 = random, 100 = expert; of tasks that are not in Table 1 the return
    env_steps: float  # NaN where they are not written
    minutes: float  # wall time of the iterations up to here, NaN where it is not written
    updates: float  # gradient updates, NaN where they are not written


@dataclass
class Run:
    """What a run folder says."""

    folder: Path
    method: str
    task: str
    kind: str
    variant: str
    seed: str
    points: list[Point]  # in the order of iterations
    normalised: float  # D4RL's score, mean of the last evaluations; NaN for tasks without
    sampled: float  # return of trajectories with sampled actions, mean over the iterations of these evaluations
    goal: int | None  # iterations asked for
    iteration: int  # iterations made
    seconds: float  # wall time of an iteration (pretraining: an update), median over rows; NaN if not written
    differs: str  # settings unlike the paper's, "" if there are none, "unknown" without args.json

    @property
    def scores(self) -> list[float]:
        """Of the evaluations after updates: the first of a finetuning run is the pretrained policy's."""
        return [point.score for point in self.points if point.iteration > 0]

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores[-LAST:])

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.method, self.task, self.kind, self.variant, self.differs


def split_kind(text: str) -> tuple[str, str]:
    """The kind that a text begins with, and the rest: "medium-replay-a" -> ("medium-replay", "a")."""
    for kind in [*KINDS.values(), *OTHER_KINDS]:
        if text == kind or text.startswith(kind + "-"):
            return kind, text[len(kind) + 1 :]
    return text, ""


def task_name(text: str) -> str:
    """As in TASKS, or AntMaze: "hopper" and "Hopper-v5" -> "Hopper", "AdroitHandDoor-v1" -> "Door"; others stay."""
    short = text.split("/")[-1].removeprefix("AdroitHand").lower()
    return next((name for name in TABLE_TASKS if short.replace("_", "-").split("-")[0] == name.lower()), text)


def parse_name(name: str) -> tuple[str, str, str, str, str] | None:
    """(method, task, kind, variant, seed) of a folder's name as benchmark/*.sh or the scripts give it, else None."""
    parts = name.split("__")
    if len(parts) >= 3 and parts[0] in METHODS:
        method, (task, _, rest), *variant, seed = parts[0], parts[1].partition("-"), *parts[2:]
        kind, more = split_kind(rest)
        return method, task, kind, "__".join(part for part in [more, *variant] if part not in ("", "paper")), seed
    if len(parts) == 5 and parts[1].removesuffix("_continuous") in METHODS:
        return parts[1].removesuffix("_continuous"), parts[0], parts[2], "", parts[3]
    return None


def identify(name: str, args: dict, script: str = "") -> tuple[str, str, str, str, str] | None:
    """(method, task, kind, variant, seed) of a run: what its args.json says, else its folder's name; None if neither
    does. A script that is not one of ours is a method of its own."""
    method, task, kind, variant, seed = parse_name(name) or ("", "", "", "", "")
    method = Path(script).stem.removesuffix("_continuous") or method
    task, kind, seed = args.get("env_id", task), args.get("dataset_kind") or kind, str(args.get("seed", seed))
    return (method, task_name(task), kind, variant, seed) if method and task else None


def settings_that_differ(method: str, task: str, kind: str, args: dict) -> str:
    """The arguments that are not as in the paper, "embed_dim 128 (512), lr 0.0001 (5e-05)"; "unknown" without any."""
    if not args:
        return "unknown"
    if method not in METHODS:
        method = next((made_from for field, made_from in FIELDS.items() if field in args), method)
    if str(args.get("ratio")) in RATIOS:
        args = args | {RATIOS[args["ratio"]]: True}
    parts = []
    for name, paper in paper_settings(method, task, kind).items():
        ours = args.get(name)
        number = isinstance(ours, int | float)
        if ours is not None and not (number and math.isclose(ours, paper)):
            said = f"{ours:g}" if number else f"{ours!r}"
            flag = name if ours is True else f"{name} {said}"
            parts.append(flag if paper is False else f"{name} {said} ({paper:g})")
    halved = method not in ("pretrain_dt", *BASELINES) and task not in ("Door", "Pen", "Hammer")
    if halved and "g_online" in args and args.get("g_eval") in (None, args["g_online"]):
        parts.append("evaluated at g_online")
    if args.get("env_kwargs"):  # another environment than the paper's
        parts.append(f"env_kwargs {args['env_kwargs']}".replace(", ", ","))
    return ", ".join(parts)


def pretraining_that_differs(folder: Path, method: str, task: str, kind: str, args: dict) -> str:
    """The same of the checkpoint that a run began with: what its args.json says, which is looked for where the run has
    it and beside the run's folder."""
    if "pretrained" not in args or method == "iql":  # which takes no more than the data
        return ""
    if args["pretrained"] is None:
        return "pretrained by the script itself"
    start = Path(args["pretrained"])
    start = start.parent if start.suffix == ".pt" else start
    paper = (paper_settings(method, task, kind) | paper_settings("pretrain_dt", task, kind)).get("c_offline")
    for place in (start, folder.parent / start.name):
        try:
            ours = json.loads((place / "args.json").read_text())["args"].get("c_offline")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        return "" if ours is None or paper in (None, ours) else f"pretrained at c_offline {ours!r} ({paper:g})"
    return "pretraining unknown"


def read_args(folder: Path) -> dict:
    """args.json, {"args": {}} where there is none. ValueError: it has no arguments."""
    path = folder / "args.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"args": {}}
    if not (isinstance(content, dict) and isinstance(content.get("args"), dict)):
        raise ValueError('it has no "args"')
    return content


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv up to its last whole line, without empty cells and columns that are not used here.
    ValueError: what is wrong with it."""
    text = path.read_text(encoding="utf-8-sig")
    header, *lines = [*csv.reader(text[: text.rfind("\n") + 1].splitlines())] or [[]]
    rows = []
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(header):
            raise ValueError(f"line {number} has {len(cells)} cells, not {len(header)}")
        values = {name: cell for name, cell in zip(header, cells) if cell and name in NUMBERS}
        rows.append({name: float(cell) for name, cell in values.items()})
        if not all(abs(value) < 1e15 for value in rows[-1].values()):
            raise ValueError(f"line {number} has values that are not finite or beyond 1e15")
    iterations = [0, *(row.get("iteration", math.nan) for row in rows)]
    if not all(before <= now and now % 1 == 0 for before, now in itertools.pairwise(iterations)):
        raise ValueError("its iterations do not count up")
    return rows


NUMBERS = ("iteration", "charts/env_steps", "charts/gradient_updates", "time/iteration", "rollout/return")
NUMBERS += ("eval/return_mean", "eval/normalized_score")


def points_of(rows: list[dict[str, float]], column: str) -> list[Point]:
    """The evaluations: `column` where a row has it. Iterations of more than STILL medians count as so many: the machine
    slept."""
    points, minutes, before = [], 0.0, 0.0
    times = [row["time/iteration"] for row in rows if "time/iteration" in row]
    longest = STILL * statistics.median(times or [math.nan])
    for row in rows:
        iteration = row["iteration"]
        if iteration > before:
            seconds = min(row.get("time/iteration", math.nan), longest)
            minutes += seconds * (iteration - before) / 60  # pretraining: s / update
        before = iteration
        unknown = math.nan if iteration else 0.0
        counts = [row.get(f"charts/{name}", unknown) for name in ("env_steps", "gradient_updates")]
        if column in row:
            points.append(Point(int(iteration), row[column], counts[0], minutes, counts[1]))
    if any(now < then for before, after in itertools.pairwise(points) for then, now in zip(before[2:], after[2:])):
        raise ValueError("environment steps, times or gradient updates go down")
    return points


def sampled_return(rows: list[dict[str, float]], points: list[Point]) -> float:
    """Mean over the iterations since the evaluation before the last LAST ones; NaN where none is written."""
    since = points[-LAST - 1].iteration if len(points) > LAST else 0
    found = [row["rollout/return"] for row in rows if row["iteration"] > since and "rollout/return" in row]
    return statistics.fmean(found or [math.nan])


def read_run(folder: Path) -> Run | str:
    """The run in a folder, or a line that says why there is none."""
    file = "args.json"
    try:
        content = read_args(folder)
        args = content["args"]
        identity = identify(folder.name, args, content.get("script", ""))
        if identity is None:
            return f"{folder.name}: its name does not tell the method, nor does an args.json"
        program = Path(content.get("command", [""])[0]).stem
        if args.get("td3") and identity[0] == "odt":
            identity = ("odt_td3", *identity[1:])
        if program in ("reinformer", "odt") and identity[0] not in BASELINES and not identity[3]:
            identity = (*identity[:3], program, identity[4])  # the script that it calls does not tell it
        "".join(identity).encode()  # an error if one is no text
        differs = (settings_that_differ(*identity[:3], args), pretraining_that_differs(folder, *identity[:3], args))
        goal = args.get("iterations") or args.get("updates")
        if not isinstance(goal, int | None):
            raise ValueError(f"the number of iterations is {goal!r}")
        file = "metrics.csv"
        rows = read_metrics(folder / file)
        column = "eval/normalized_score" if identity[1] in TABLE_TASKS else "eval/return_mean"
        points = points_of(rows, column)
    except Exception as error:  # what is damaged may raise anything
        return f"{folder.name}: {file} is damaged: {' '.join(str(error).split())[:200]}"
    scores = [row["eval/normalized_score"] for row in rows if "eval/normalized_score" in row and row["iteration"]]
    times = [row["time/iteration"] for row in rows if "time/iteration" in row]
    run = Run(
        folder,
        *identity,
        points,
        normalised=statistics.fmean(scores[-LAST:] or [math.nan]),
        sampled=sampled_return(rows, points),
        goal=goal,
        iteration=int(rows[-1]["iteration"]) if rows else 0,
        seconds=statistics.median(times or [math.nan]),
        differs=", ".join(filter(None, differs)),
    )
    return run if run.scores else f"{folder.name}: no evaluation after an update yet ({column} of metrics.csv)"


def read_runs(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs in folders and in the folders in them, one per seed and group; and lines about those left out."""
    paths = sorted({path.parent for folder in folders for at in ("", "*/") for path in folder.glob(f"{at}metrics.csv")})
    read = [read_run(path) for path in paths]
    notes = [each for each in read if isinstance(each, str)]
    found = [each for each in read if isinstance(each, Run)]
    same = Counter((run.key, run.seed) for run in found)
    crowded = {key for (key, _), count in same.items() if count > 1}
    runs: dict[tuple, Run] = {}
    for run in found:
        name = run.folder.name
        if run.key in crowded and parse_name(name) is None:
            run = replace(run, variant=re.sub(rf"[-_]*(s|seed)?[-_]*{re.escape(run.seed)}$", "", name) or name)
        other = runs.get((run.key, run.seed))
        if other:
            run, worse = (run, other) if run.iteration > other.iteration else (other, run)
            notes.append(f"{worse.folder}: the group and seed of {run.folder}, which has no fewer iterations")
        runs[run.key, run.seed] = run
    return list(runs.values()), notes


# Statistics


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """The mean along the last axis without the lowest and the highest floor(n / 4): (..., n) -> (...)."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(-1)


def bootstrap(scores: list[list[float]]) -> tuple[float, float]:
    """95 % interval of the interquartile mean of the scores of one or several datasets: seeds are drawn anew within
    each dataset. NaN where no dataset has two seeds."""
    if max(len(each) for each in scores) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    drawn = [np.array(each)[rng.integers(len(each), size=(RESAMPLES, len(each)))] for each in scores]
    low, high = np.percentile(interquartile_mean(np.concatenate(drawn, axis=1)), [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Summary:
    """Scores over the seeds of a group, or over the datasets of a block."""

    method: str
    data: str
    variant: str
    mean: float
    std: float  # NaN for one seed and for a block
    best: float  # NaN for a block
    sampled: float  # NaN for a block
    iqm: float
    interval: tuple[float, float]
    seeds: int
    iterations: str
    seconds: float
    differs: str
    evaluations: int  # of the seed or dataset that has fewest, at most LAST: what "last" is the mean of
    raw: bool = False  # returns, of a task that is not in Table 1
    normalised: float = math.nan  # D4RL's score of such a task, if it has one
    paper: float = math.nan
    paper_std: float = math.nan


def span(values: list[int]) -> str:
    """[3, 5, 4] -> "3-5"."""
    return "-".join(f"{value:,}" for value in sorted({min(values), max(values)}))


def summarise(runs: list[Run], data: str = "") -> Summary:
    """Of the runs of one group; data: the name of the dataset, if not "task-kind"."""
    scores, (first, *_) = [run.score for run in runs], runs
    return Summary(
        first.method,
        data or f"{first.task}-{first.kind}",
        first.variant,
        statistics.fmean(scores),
        statistics.stdev(scores) if len(scores) > 1 else math.nan,
        max(max(run.scores) for run in runs),
        statistics.fmean(run.sampled for run in runs),
        float(interquartile_mean(np.array(scores))),
        bootstrap([scores]),
        len(runs),
        span([run.iteration for run in runs]),
        statistics.median(run.seconds for run in runs),
        first.differs,
        min(len(run.scores[-LAST:]) for run in runs),
        raw=first.task not in TABLE_TASKS,
        normalised=statistics.fmean(run.normalised for run in runs),
    )


def summarise_block(groups: list[list[Run]], cells: list[Summary], name: str) -> Summary:
    """Over the datasets of a block that have runs, with their summaries; the paper's average over the same ones."""
    scores = [[run.score for run in runs] for runs in groups]
    pooled = [score for each in scores for score in each]
    return Summary(
        cells[0].method,
        name,
        "",
        statistics.fmean(cell.mean for cell in cells),
        math.nan,
        math.nan,
        math.nan,
        float(interquartile_mean(np.array(pooled))),
        bootstrap(scores),
        len(pooled),
        span([run.iteration for runs in groups for run in runs]),
        math.nan,
        "; ".join(sorted({cell.differs for cell in cells if cell.differs})),
        min(cell.evaluations for cell in cells),
        paper=statistics.fmean(cell.paper for cell in cells),
    )


# Groups and tables


def group_runs(runs: list[Run]) -> dict[tuple, list[Run]]:
    """Runs by method, task, kind, variant and settings, each group in the order of seeds."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: (len(run.seed), run.seed)):
        groups[run.key].append(run)
    return dict(groups)


def pick(groups: dict[tuple, list[Run]], method: str, task: str, kind: str, variant: str = "") -> list[Run]:
    """The group that stands for this cell: the paper's settings if there is one, else no ablation, then most seeds."""

    def rank(runs: list[Run]) -> tuple:
        ablated = any(part in ABLATIONS for part in runs[0].differs.split(", "))
        return runs[0].differs == "", not ablated, len(runs), runs[0].iteration

    return max((runs for key, runs in groups.items() if key[:4] == (method, task, kind, variant)), key=rank, default=[])


class Cell(NamedTuple):
    """One method on one dataset of Table 1, or a block's average."""

    block: str
    dataset: str
    paper: float
    paper_std: float  # NaN where the paper gives none
    ours: Summary | None
    runs: list[Run]


def table1(groups: dict[tuple, list[Run]], method: str) -> list[Cell]:
    """One column of Table 1, in its order, averages included."""
    column, cells, block = COLUMNS.get(method, method), [], []
    for row in read_csv(PAPER / "table1.csv"):
        paper, std = float(row[column]), float(row.get(f"{column}_std") or "nan")
        runs, ours = [], None
        if row["dataset"] == "Average" and block:
            name = f"{row['block']}: average of {len(block)}"
            ours = summarise_block([cell.runs for cell in block], [cell.ours for cell in block], name)
        elif row["dataset"] != "Average":
            ((task, kind),) = dataset_keys(row["dataset"])
            runs = pick(groups, method, task, kind)
            if runs:
                ours = replace(summarise(runs, row["dataset"]), paper=paper, paper_std=std)
        cells.append(Cell(row["block"], row["dataset"], paper, std, ours, runs))
        block = [] if row["dataset"] == "Average" else [*block, cells[-1]] if ours else block
    return cells


def method_name(method: str) -> str:
    """As the paper has it; of another script the name of its file."""
    return METHODS.get(method, method)


def number(value: float, sign: str = "") -> str:
    """Two decimals, with sign="+" also a plus; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:{sign}.2f}"


def plus_minus(mean: float, std: float) -> str:
    return number(mean) + ("" if math.isnan(std) else f" ± {number(std)}")


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [[" ".join(cell.replace("|", " ").split()) for cell in cells] for cells in (header, *rows)]
    return ["| " + " | ".join(cells) + " |" for cells in (lines[0], ["---"] * len(header), *lines[1:])] + [""]


DETAILS = ["last", "best", "sampled return", "IQM [95 %]", "seeds", "iterations", "s / iteration"]


def details(ours: Summary) -> list[str]:
    """The cells under DETAILS."""
    low, high = ours.interval
    interval = "" if math.isnan(low) else f" [{number(low)}, {number(high)}]"
    few = f" (of {ours.evaluations})" if ours.method != "pretrain_dt" and ours.evaluations < LAST else ""
    sampled = "-" if math.isnan(ours.sampled) else f"{ours.sampled:,.0f}"
    cells = [plus_minus(ours.mean, ours.std) + few, number(ours.best), sampled, number(ours.iqm) + interval]
    return [*cells, str(ours.seeds), ours.iterations, number(ours.seconds)]


def as_in_the_paper(runs: list[Run]) -> bool:
    """Whether a group has the paper's seeds and settings, and made the iterations that were asked for."""
    return len(runs) >= SEEDS and not runs[0].differs and all(run.iteration >= (run.goal or math.inf) for run in runs)


def overview(tables: dict[str, list[Cell]]) -> list[str]:
    """Table 1's layout: ours / the paper's. An average of ours needs all."""
    rows = []
    for index, row in enumerate(read_csv(PAPER / "table1.csv")):
        cells = {}
        for method, table in tables.items():
            cell = table[index]
            block = [cell] if cell.runs else [each for each in table if each.block == cell.block]
            complete = cell.ours and all(each.ours for each in block)
            mark = "" if complete and all(as_in_the_paper(each.runs) for each in block if each.runs) else "\\*"
            ours = plus_minus(cell.ours.mean, cell.ours.std) + mark if complete else "-"
            cells[method] = f"{ours} / {plus_minus(cell.paper, cell.paper_std)}"
        rows.append([row["block"], row["dataset"], *cells.values()])
    return markdown_table(["", "dataset", *(METHODS[method] for method in tables)], rows)


def method_table(table: list[Cell]) -> list[str]:
    """What we have of one method, in Table 1's layout."""
    rows = []
    for cell in (cell for cell in table if cell.ours):
        ours = cell.ours
        name = cell.dataset if cell.runs else ours.data.split(": ")[1]
        paper = [plus_minus(ours.paper, ours.paper_std), number(ours.mean - ours.paper, "+")]
        rows.append([cell.block, name, *details(ours), *paper, ours.differs or "-"])
    return markdown_table(["", "dataset", *DETAILS, "paper", "difference", "differs in"], rows)


def labelled_table(summaries: list[Summary], raw: bool = False) -> list[str]:
    """`raw`: of returns, with D4RL's score in a column of its own."""
    rows = []
    for s in summaries:
        score = [number(s.normalised)] if raw else []
        rows.append([method_name(s.method), s.data, s.variant or "-", *details(s), *score, s.differs or "-"])
    score = ["score"] if raw else []
    return markdown_table(["method", "data", "variant", *DETAILS, *score, "differs in"], rows)


class Curve(NamedTuple):
    """A curve of a figure; `runs` is empty where there are none."""

    task: str
    kind: str
    method: str
    variant: str
    runs: list[Run]

    @property
    def name(self) -> str:
        return f"{method_name(self.method)} {self.task}-{self.kind} {self.variant}".strip()


def figure_curves(groups: dict[tuple, list[Run]], figure: str) -> list[Curve]:
    """The curves of a figure: for each of its datasets the method of Table 1 and what it is compared with."""
    names = []
    for task, kind, variants in FIGURES[figure]:
        names += [(task, kind, "grpo_dt", variant) for variant in ["", *variants]]
        names += [(task, kind, "q_guided_grpo_dt", "")] if figure == "4b" else []
    return [
        Curve(task, kind, method, variant, pick(groups, method, task, kind, variant))
        for task, kind, method, variant in names
    ]


def begun(curves: list[Curve]) -> bool:
    """Whether a figure has more than the curves of Table 1."""
    return any(curve.runs and (curve.variant or curve.method == "q_guided_grpo_dt") for curve in curves)


def missing(groups: dict[tuple, list[Run]], tables: dict[str, list[Cell]], runs: list[Run]) -> list[str]:
    """Lines on datasets and curves without runs, groups of fewer seeds than the paper's, and unfinished runs."""
    lines = []
    for method, table in tables.items():
        absent = [cell.dataset for cell in table if cell.dataset != "Average" and not cell.runs]
        lines += [f"{METHODS[method]}, no run ({len(absent)} of 17): {', '.join(absent)}"] if absent else []
    for figure in FIGURES:
        absent = [curve.name for curve in figure_curves(groups, figure) if not curve.runs]
        lines += [f"Fig. {figure}, no run: {', '.join(absent)}"] if absent else []
    few = [
        f"{Curve(*key[1:3], key[0], key[3], each).name} ({len(each)})"
        for key, each in sorted(groups.items())
        if len(each) < SEEDS
    ]
    lines += [f"fewer than the paper's {SEEDS} seeds: {', '.join(few)}"] if few else []
    short = [
        f"{run.folder.name} ({run.iteration:,} of {run.goal:,})" for run in runs if run.iteration < (run.goal or 0)
    ]
    return lines + ([f"not finished: {', '.join(short)}"] if short else [])


def report(runs: list[Run], notes: list[str]) -> tuple[str, list[Summary]]:
    """The Markdown page, and every summary in it once."""
    groups = group_runs(runs)
    tables = {method: table1(groups, method) for method in COLUMNS}
    page = [INTRODUCTION, "## Table 1", "", TABLE_1, "", *overview(tables)]
    summaries, shown = [], set()
    for method, table in tables.items():
        found = [cell.ours for cell in table if cell.ours]
        page += [f"## {METHODS[method]}", "", *method_table(table)] if found else []
        summaries += found
        shown |= {cell.runs[0].key for cell in table if cell.runs}
    for figure in FIGURES:
        curves = [curve for curve in figure_curves(groups, figure) if curve.runs]
        if begun(curves):
            page += [f"## Fig. {figure}", "", *labelled_table([summarise(curve.runs) for curve in curves])]
        new = [curve.runs for curve in curves if curve.runs[0].key not in shown]
        summaries += [summarise(found) for found in new]
        shown |= {found[0].key for found in new}
    others = [summarise(found) for key, found in sorted(groups.items()) if key not in shown]
    known, outside = ([found for found in others if found.raw == raw] for raw in (False, True))
    page += ["## Other runs", "", *labelled_table(known)] if known else []
    page += (
        ["## Other tasks", "", "Returns. Score: D4RL's, where there is one.", "", *labelled_table(outside, raw=True)]
        if outside
        else []
    )
    page += ["## Missing", "", *(f"- {line}" for line in missing(groups, tables, runs) or ["nothing"]), ""]
    page += ["## Left out", "", *(f"- {note}" for note in notes), ""] if notes else []
    return "\n".join(page), summaries + others


def write_csv(path: Path, summaries: list[Summary]) -> None:
    """A row per summary; empty cells for what does not exist."""
    rows = []
    for s in summaries:
        row = dict(method=s.method, data=s.data, variant=s.variant, mean=s.mean, std=s.std, best=s.best)
        row |= dict(sampled_return=s.sampled, iqm=s.iqm, iqm_low=s.interval[0], iqm_high=s.interval[1])
        row |= dict(seeds=s.seeds, iterations=s.iterations)
        row |= dict(seconds_per_iteration=s.seconds, paper=s.paper, paper_std=s.paper_std, difference=s.mean - s.paper)
        row["unit"] = "return" if s.raw else "score"
        cells = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()}
        rows.append({name: "" if value == "nan" else value for name, value in cells.items()} | {"differs": s.differs})
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.DictWriter(file, rows[0] if rows else ["method"], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


# Curves

AXES = {"iteration": "iterations", "env_steps": "environment steps", "minutes": "minutes"}  # fields of Point
AXES |= {"updates": "gradient updates"}
ENDINGS = {"iteration": "", "env_steps": "_steps", "minutes": "_minutes", "updates": "_updates"}  # of a picture's name
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # also for the colour-blind (Okabe, Ito)
# Variants of a method in one panel: towards white (> 0) or black (< 0), and the dashes.
STYLES = [(0.0, "-"), (-0.5, "-"), (0.4, "-"), (0.0, ":"), (-0.5, ":"), (0.4, ":"), (0.0, "-."), (-0.5, "-.")]
MOST = 8  # groups in a panel
LONG = 20  # a curve so many times as long as the shortest: logarithmic from the end of the shortest on
# 8 points at the size of a column; letters as text in a PDF (many venues want it); "$" in a name is no formula.
STYLE = {"font.size": 8, "axes.titlesize": 9, "lines.linewidth": 1.3, "pdf.fonttype": 42, "text.parse_math": False}
STYLE |= {"legend.fontsize": 7.5, "legend.handlelength": 1.7, "legend.frameon": False}
STYLE |= {"figure.constrained_layout.h_pad": 0.1}  # inches, between a legend and the next title


def mean_curve(runs: list[Run], axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Along a field of Point: where a seed was evaluated and all have got to, mean and standard deviation over seeds
    (n - 1; 0 for one) of the straight lines between their evaluations."""
    lines = [np.array([(getattr(point, axis), point.score) for point in run.points]) for run in runs]
    x = np.unique(np.concatenate([line[:, 0] for line in lines]))
    x = x[(x >= max(line[0, 0] for line in lines)) & (x <= min(line[-1, 0] for line in lines))]
    values = np.stack([np.interp(x, line[:, 0], line[:, 1]) for line in lines])
    return x, values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(x))


def has(runs: list[Run], axis: str) -> bool:
    """Whether all points of all runs have a value on this axis."""
    return bool(runs) and not any(math.isnan(getattr(point, axis)) for run in runs for point in run.points)


def labels(curves: list[Curve]) -> list[str]:
    """Method, variant and seeds; where two are the same, also the settings that not all of them have."""
    names = [f"{method_name(curve.method)} {curve.variant}".strip() for curve in curves]
    settings = [curve.runs[0].differs.split(", ") for curve in curves]
    texts = []
    for curve, name, mine in zip(curves, names, settings):
        alike = [each for other, each in zip(names, settings) if other == name]
        own = [part for part in mine if part and not all(part in each for each in alike)]
        own = [re.sub(r" \([^)]*\)$", "", part) for part in own]  # without the paper's value
        seeds = f"{len(curve.runs)} seed{'s' if len(curve.runs) > 1 else ''}"
        texts.append(f"{', '.join([name, *own])} ({seeds})")
    return texts


def draw(axes, curve: Curve, axis: str, label: str, colour, dashes: str) -> None:
    """The mean over seeds, and a band of one standard deviation about it."""
    x, mean, std = mean_curve(curve.runs, axis)
    axes.plot(x, mean, dashes, color=colour, label=label)
    if std.any():
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)


def draw_panel(axes, title: str, curves: list[Curve], axis: str, colours: dict[str, str]) -> None:
    """The curves of one dataset, in its method's colour each, and dashed the paper's final values of these methods."""
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import EngFormatter, MaxNLocator

    used = Counter()  # method -> its curves so far
    lasts = [mean_curve(curve.runs, axis)[0][-1:] for curve in curves if has(curve.runs, axis)]
    ends = [end for end in np.concatenate(lasts) if end > 0]
    for curve, label in zip(curves, labels(curves)):
        tint, dashes = STYLES[used[curve.method]]
        colour = np.array(to_rgb(colours[curve.method]))
        colour = colour + (1 - colour) * tint if tint > 0 else colour * (1 + tint)
        used[curve.method] += 1
        if has(curve.runs, axis):
            draw(axes, curve, axis, label, colour, dashes)
    finals = {method: paper_value(method, curves[0].task, curves[0].kind) for method in used}
    finals = {method: final for method, final in finals.items() if not math.isnan(final)}
    for method, final in finals.items():
        axes.axhline(final, color=colours[method], linestyle="--", linewidth=0.9)
    if finals:
        axes.plot([], [], "--", color="grey", linewidth=0.9, label="the paper's final value")
    axes.set_title(title)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("normalised score" if curves[0].task in TABLE_TASKS else "return")
    if axis != "minutes":  # whole numbers: 20, 500k, 2M
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    if ends and max(ends) > LONG * min(ends):
        axes.set_xscale("symlog", linthresh=min(ends))
        axes.set_xlim(0)
        powers = 10.0 ** np.arange(math.floor(math.log10(min(ends))), math.floor(math.log10(max(ends))) + 1)
        ticks = np.outer(powers, [1, 2, 5] if max(ends) < 100 * min(ends) else [1]).ravel()
        inside = (ticks >= min(ends)) & (ticks <= max(ends))  # those before it would lie on top of 0
        axes.set_xticks([0.0, *ticks[inside]])
        axes.minorticks_off()
    if axis != "minutes" or axes.get_xscale() == "symlog":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)


def paper_value(method: str, task: str, kind: str) -> float:
    """The paper's final score of a method in Table 1; NaN where it has none."""
    rows = (row for row in read_csv(PAPER / "table1.csv") if (task, kind) in dataset_keys(row["dataset"]))
    return next((float(row[method]) for row in rows if method in row), math.nan)


def save(figure, path: Path) -> None:
    """As PNG and as PDF; path: without the ending."""
    for ending in ("png", "pdf"):
        figure.savefig(f"{path}.{ending}", dpi=200, bbox_inches="tight")


def write_picture(path: Path, panels: list[tuple[str, list[Curve], str]], colours: dict[str, str]) -> None:
    """Panels (title, curves, axis), three in a row, of four two, those without a curve left out; one legend below all
    if it is the same for all, else one below each."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # drawn without pyplot, so without a display

    panels = [(title, [curve for curve in curves if curve.runs], axis) for title, curves, axis in panels]
    panels = [panel for panel in panels if any(has(curve.runs, panel[2]) for curve in panel[1])]
    if not panels:
        return
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    one = all(labels(curves) == labels(panels[0][1]) for _, curves, _ in panels)
    lines = 1 + max(len(curves) for _, curves, _ in panels)  # of a legend
    height = rows * 2.5 + 0.16 * (lines / 2 if one else lines * rows)  # inches
    with rc_context(STYLE):
        figure = Figure(figsize=(3.2 * columns, height), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, curves, axis) in zip(grid, panels):
            draw_panel(axes, title, curves, axis, colours)
            if not one:
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24))
        if one:
            figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(2, len(panels)))
        save(figure, path)


def curves_of(groups: dict[tuple, list[Run]], task: str, kind: str) -> tuple[str, list[Curve]]:
    """Title and curves of all groups on a dataset; of more than MOST those of the methods themselves, then those with
    most seeds and iterations."""
    found = [runs for key, runs in groups.items() if key[1:3] == (task, kind) and key[0] != "pretrain_dt"]
    found.sort(key=lambda runs: (runs[0].variant != "", -len(runs), -runs[0].iteration))
    chosen = sorted(found[:MOST], key=lambda runs: runs[0].key)
    title = f"{task} {kind}" + (f" ({MOST} of {len(found)} groups)" if len(found) > MOST else "")
    return title, [Curve(task, kind, runs[0].method, runs[0].variant, runs) for runs in chosen]


def write_curves(groups: dict[tuple, list[Run]], out: Path) -> None:
    """For each dataset and each ablation that has runs a picture with a panel for each of AXES; figure_3: GRPO-DT and
    PPO-DT on all datasets of Table 1; overview: all datasets with all groups."""
    ours = ["grpo_dt", "ppo_dt", "q_guided_grpo_dt"]
    methods = [*ours, *BASELINES, *sorted({key[0] for key in groups} - METHODS.keys())]
    colours = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(methods)}
    names = {key: row["dataset"] for row in read_csv(PAPER / "table1.csv") for key in dataset_keys(row["dataset"])}
    names |= {key: "-".join(key) for key in sorted({key[1:3] for key in groups} - names.keys())}
    overview, figure_3 = [], []
    for (task, kind), name in names.items():
        title, curves = curves_of(groups, task, kind)
        picture = [(title, curves, axis) for axis in AXES]
        write_picture(out / re.sub(r"[^\w.-]", "_", name)[:80], picture, colours)
        overview.append((title, curves))
        if task in TABLE_TASKS:
            both = [Curve(task, kind, method, "", pick(groups, method, task, kind)) for method in ours[:2]]
            figure_3.append((f"{task} {kind}", both))
    for axis, ending in ENDINGS.items():
        write_picture(out / f"overview{ending}", [(*panel, axis) for panel in overview], colours)
        write_picture(out / f"figure_3{ending}", [(*panel, axis) for panel in figure_3], colours)
    for figure, parts in FIGURES.items():
        curves = figure_curves(groups, figure)
        if begun(curves):
            panels = [
                (f"{task} {kind}", [curve for curve in curves if curve[:2] == (task, kind)]) for task, kind, _ in parts
            ]
            write_picture(out / f"figure_{figure}", [(*panel, axis) for panel in panels for axis in AXES], colours)


def main() -> None:
    described = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**described)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="run folders, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="where report.md, .csv and pictures go")
    parser.add_argument("--no-curves", action="store_true", help="tables only, needs no matplotlib")
    args = parser.parse_args()
    absent = [str(folder) for folder in args.folders if not folder.is_dir()]
    if absent:
        raise SystemExit(f"error: no such folder: {', '.join(absent)}.")
    runs, notes = read_runs(args.folders)
    page, summaries = report(runs, notes)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.md").write_text(page, encoding="utf-8", errors="replace")
    write_csv(args.out / "report.csv", summaries)
    if not args.no_curves:
        write_curves(group_runs(runs), args.out)
    print(f"{len(runs)} runs, {len(notes)} left out: {args.out / 'report.md'}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"error: {error}: give another --out.") from None
    except ImportError as error:
        raise SystemExit(f"error: {error}: install requirements.txt, or take --no-curves.") from None
