"""The launcher: every line of the shell scripts beside it, once per seed, on a few workers or as a Slurm array.

    bash benchmark/grpo_dt.sh [--quick] [--only Hopper-medium ...] [--dry-run] [--slurm print|submit]

reads lines "NAME  python SCRIPT.py --flag value ..." on its standard input. For each line and seed it makes a run
in the folder runs/NAME__SEED: it puts the seed in the place of {seed} and adds --seed and --run-dir.

    SEEDS="1 2 3"     the seeds
    WORKERS=1         runs side by side; each gets its share of the cores as threads, and of CUDA_VISIBLE_DEVICES
    EXTRA="--lr 1e-4" flags added to every line; one that the line has already takes the new value

A run whose --pretrained is the folder of another run waits for it. Runs of the lines in --needs are made only where
another run waits for them. Each run's console goes to log.txt in its folder; the launcher shows one line for all and
ends with exit code 1 and the list of those that failed. Ctrl-C stops everything; the same command goes on: finished
runs are skipped, broken ones resumed. A folder that was begun with other flags is refused, not mixed. Whatever befalls
a run or its files, a full disk or a damaged checkpoint, that run fails with a line and the others go on.
"""

import argparse
import contextlib
import csv
import json
import os
import pickletools
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

try:
    import fcntl
except ImportError:
    raise SystemExit("error: benchmark/run.py needs Linux or macOS (on Windows: WSL).") from None

LENGTH = ("--iterations", "--updates")  # a resumed run may get a larger one
FREE = ("--cuda", "--no-cuda", "--track", "--save-data")  # a resumed run may get another one

# --quick: these flags instead of a line's own, so that a line takes seconds. L_traj and L_eval stay the line's.
QUICK = {
    "pretrain_dt.py": "--dataset random --dataset-steps 1500 --embed-dim 16 --n-layers 2 --n-heads 2 --batch-size 8 "
    "--updates 4 --log-every 2 --eval-episodes 1 --threads 1",
    "grpo_dt_continuous.py": "--embed-dim 16 --iterations 2 --n-sources 2 --n-points 1 --group-size 4 --delta-r 0 "
    "--buffer-size 16 --n-batch 4 --n-minibatches 2 --eval-episodes 1 --threads 1",
    "ppo_dt_continuous.py": "--embed-dim 16 --iterations 2 --n-trajectories 2 --n-batch 8 --n-minibatches 2 "
    "--value-dim 16 --value-warmup 5 --eval-every 1 --eval-episodes 1 --threads 1",
    "q_guided_grpo_dt.py": "--iterations 2 --n-sources 2 --n-points 2 "
    "--group-size 4 --buffer-size 32 --n-batch 8 --n-minibatches 2 --critic-warmup 5 --critic-updates 5 "
    "--critic-batch 8 --critic-dim 16 --eval-every 1 --eval-episodes 1 --threads 1",
}
QUICK["reinformer.py pretrain"] = QUICK["pretrain_dt.py"]
QUICK["reinformer.py finetune"] = QUICK["grpo_dt_continuous.py"]
QUICK["odt.py pretrain"] = QUICK["pretrain_dt.py"]
QUICK["odt.py"] = "--embed-dim 16 --iterations 2 --n-minibatches 2 --batch-size 8 --min-steps 0 --replay-size 20 "
QUICK["odt.py"] += "--critic-warmup 5 --critic-dim 16 --eval-every 1 --eval-episodes 1 --threads 1"
QUICK["iql.py"] = "--embed-dim 16 --iterations 2 --min-steps 0 --offline-updates 4 --batch-size 8 --hidden-dim 8 "
QUICK["iql.py"] += "--eval-every 1 --eval-episodes 1 --threads 1"


def die(message: str) -> NoReturn:
    """End with one line on stderr and exit code 1."""
    raise SystemExit(f"error: {message}")


def say(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    """Print at once. A console that takes nothing (a full disk, a closed pipe) ends no run."""
    with contextlib.suppress(OSError, UnicodeError):
        print(text, end=end, file=file, flush=True)


# Lines and runs


def words_in(text: str, where: str) -> list[str]:
    """As a shell splits it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        die(f"{where}: {str(error).lower()}.")


def flags_of(words: list[str]) -> dict[str, list[str]]:
    """["--lr", "1", "--on", "--x=2"] -> {"--lr": ["1"], "--on": [], "--x": ["2"]}; of a flag given twice the last."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, *value = word.split("=", 1)
            flags.pop(name, None)
            flags[name] = value
        elif flags:
            flags[name].append(word)
        else:
            die(f'"{word}" is no flag: flags begin with --.')
    return flags


def words_of(flags: dict[str, list[str]]) -> list[str]:
    """The reverse of flags_of."""
    return [word for name, values in flags.items() for word in (name, *values)]


@dataclass
class Run:
    """One command with one seed, and the folder that it writes."""

    program: list[str]  # ["python", "SCRIPT.py"], for reinformer.py and odt.py also what it does
    flags: dict[str, list[str]]

    @property
    def folder(self) -> Path:
        return Path(self.flags["--run-dir"][0])

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def needs(self) -> Path | None:
        """The folder of the checkpoint that it begins with."""
        values = self.flags.get("--pretrained")
        return Path(values[0]) if values else None

    def command(self, resume: bool = False) -> list[str]:
        """To begin it; to go on, --resume and what may change, since its other flags are in its checkpoint; and
        --env-id, without which no module that a checkpoint names is imported."""
        wanted = ("--env-id", *LENGTH, *FREE) if resume else self.flags
        flags = {flag: values for flag, values in self.flags.items() if flag in wanted}
        return self.program + (["--resume", str(self.folder)] if resume else []) + words_of(flags)


def parse(words: list[str]) -> Run:
    """A run from the words of its command, which has --run-dir."""
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return Run(words[:first], flags_of(words[first:]))


def runs_of(text: str, seeds: list[str], runs: str, quick: bool, extra: str = "") -> list[Run]:
    """The runs of lines "NAME  command", seed after seed. Folders in runs/ are put into the folder `runs`."""
    found, extra_words = [], words_in(extra, "EXTRA")
    for seed in seeds:
        for line in text.splitlines():
            name, _, command = line.strip().partition(" ")
            if not name or name.startswith("#"):
                continue
            run = parse(words_in(command.replace("{seed}", seed), f"the line {name}"))
            script = " ".join(Path(word).name for word in run.program[1:])  # reinformer.py has a word after it
            if not script.split(" ")[0].endswith(".py"):
                die(f'the line "{line.strip()}" is not "NAME python SCRIPT.py --flag value ...".')
            run.flags |= flags_of(shlex.split(QUICK.get(script, ""))) if quick else {}
            run.flags |= flags_of(extra_words)
            run.flags = {
                flag: [runs + value.removeprefix("runs") if value.startswith("runs/") else value for value in values]
                for flag, values in run.flags.items()
            }
            run.flags |= {"--seed": [seed], "--run-dir": [f"{runs}/{name}__{seed}"]}
            found.append(run)
    folders = [run.folder for run in found]
    twice = {folder.name for folder in folders if folders.count(folder) > 1}
    if twice:
        die(f"two lines or seeds give the same run: {', '.join(sorted(twice))}.")
    return found


def check_needs(runs: list[Run]) -> None:
    """Exit with a line if runs wait for each other in a circle."""
    needs = {run.folder: run.needs for run in runs}
    for folder in needs:
        chain = [folder]
        while (need := needs.get(chain[-1])) and need not in chain:
            chain.append(need)
        if need == folder:
            die(f"--pretrained goes in a circle: {' needs '.join(each.name for each in [*chain, folder])}.")


def selected(own: list[Run], others: list[Run], only: list[str]) -> list[Run]:
    """Those of `own` whose name contains one of `only` (none given: all), after those of `others` that they need."""
    own = [run for run in own if not only or any(part in run.name for part in only)]
    if not own:
        die(f"no line's name contains any of {only}." if only else "no lines on the standard input, or no SEEDS.")
    needed = {run.needs for run in own} - {run.folder for run in own}
    return [run for run in others if run.folder in needed] + own


# What a folder says about its run


def iteration_of(checkpoint: Path) -> int:
    """The "iteration" in a checkpoint, without importing torch; -1 where there is none or it is damaged.

    A file of torch.save is a zip archive with a pickle in it; the number follows its key. metrics.csv alone does not
    tell: its last row is written before the checkpoint.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            compressed = any(entry.compress_type for entry in archive.infolist())  # torch never does
            if compressed or archive.testzip():  # checksums of all that is in it
                return -1
            (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            operations = ((op.name, value) for op, value, _ in pickletools.genops(archive.read(name)))
            for operation, value in operations:
                if operation.endswith("UNICODE") and value == "iteration":
                    return int(next(number for kind, number in operations if "PUT" not in kind and kind != "MEMOIZE"))
    except Exception:  # zipfile and pickletools raise BadZipFile, RuntimeError, struct.error, IndexError and more
        pass
    return -1


def last_row(run: Run) -> dict[str, str]:
    """The last whole row of metrics.csv; empty where there is none."""
    try:
        with open(run.folder / "metrics.csv", newline="", encoding="utf-8") as file:
            header, rows = next(csv.reader([next(file)])), deque(file, maxlen=1)
        cells = next(csv.reader(rows), [])
    except (OSError, ValueError, StopIteration, csv.Error):
        return {}
    return dict(zip(header, cells)) if len(cells) == len(header) else {}


def target(run: Run) -> int | None:
    """Its --iterations or --updates: the line's, else what its args.json says; None if neither tells."""
    try:
        for flag in LENGTH:
            if flag in run.flags:
                return int(run.flags[flag][0])
        args = json.loads((run.folder / "args.json").read_text())["args"]
        return next(int(args[name]) for name in ("iterations", "updates") if name in args)
    except (OSError, ValueError, LookupError, TypeError, StopIteration, RecursionError):
        return None


def state(run: Run) -> str:
    """ "done", "begun" (there is a checkpoint) or "new". Done: its checkpoint is whole and has all iterations, and the
    last row of metrics.csv has the closing evaluation."""
    iteration, goal = iteration_of(run.folder / "checkpoint.pt"), target(run)
    if goal is not None and iteration >= goal and last_row(run).get("eval/return_mean"):
        return "done"
    return "begun" if os.path.exists(run.folder / "checkpoint.pt") else "new"


def begun_as(run: Run) -> Run | None:
    """The command with which the launcher began the checkpoint in its folder: the first line of log.txt. None if that
    is not known: the run was begun by hand, or its log is gone or damaged."""
    try:
        with open(run.folder / "log.txt") as file:
            words = shlex.split(file.readline(100_000))
    except (OSError, ValueError):
        return None
    return None if words[:1] != ["$"] or "--resume" in words else parse(words[1:])


def last_line(log: Path) -> str:
    """The last line with anything on it, or why there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        return str(error)
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def flags_that_differ(run: Run) -> str:
    """What of its flags is not as when it was begun, as a text; empty if it may go on or be taken as done. A length
    may be new, but not left out where it was given: warm-ups depend on it."""
    begun = begun_as(run)
    if begun is None or not os.path.exists(run.folder / "checkpoint.pt"):
        return ""
    for flag in [*begun.flags, *run.flags]:
        old, new = (" ".join([flag, *each.flags[flag]]) if flag in each.flags else "" for each in (begun, run))
        if old != new and flag not in FREE and not (flag in LENGTH and new):
            return f"{old or f'no {flag}'}, now {new or f'no {flag}'}"
    return ""


# Workers


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(slot: int, workers: int) -> dict[str, str]:
    """A worker's share of the machine: threads by OMP_NUM_THREADS (what the scripts take for --threads), one GPU of
    CUDA_VISIBLE_DEVICES."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    share = {"OMP_NUM_THREADS": str(max(1, cores() // workers)), "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    return os.environ | (share if gpus != [""] else {"OMP_NUM_THREADS": share["OMP_NUM_THREADS"]})


class Launcher:
    """Runs runs. `exact`: folders whose run must have been begun with the line's flags to be gone on with."""

    def __init__(self, runs: list[Run], workers: int, grace: float, exact: set[Path]):
        self.waiting, self.workers, self.grace, self.exact = list(runs), workers, grace, exact
        self.total, self.begun_at = len(runs), time.time()
        self.running: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
        self.done: list[Run] = []
        self.failed: dict[Path, str] = {}  # folder -> reason
        self.stops, self.shown = 0, ""

    def stop(self, *_) -> None:
        """Handler of Ctrl-C and SIGTERM: the loop sees it; nothing is interrupted halfway."""
        self.stops += 1

    def fail(self, run: Run, reason: str) -> None:
        self.failed[run.folder] = reason

    def start(self, run: Run, slot: int) -> None:
        """Begin or resume it, or find it done or hopeless. OSError and ValueError: it can't be begun."""
        how, checkpoint = state(run), run.folder / "checkpoint.pt"
        differs = flags_that_differ(run) if run.folder in self.exact else ""
        if differs:
            return self.fail(run, f"begun with {differs}: take back the change, or move {run.folder} away")
        if how == "done":
            return self.done.append(run)
        if how == "begun" and iteration_of(checkpoint) < 0:
            return self.fail(run, f"{checkpoint} is damaged: move {run.folder} away to begin it anew")
        start = Run(run.program, {"--run-dir": [str(run.needs)]})
        if how == "new" and run.needs and state(start) == "begun" and target(start):
            made = f"{iteration_of(run.needs / 'checkpoint.pt'):,} of {target(start):,}"
            return self.fail(run, f"{run.needs} is not finished ({made}): --resume it first")
        run.folder.mkdir(parents=True, exist_ok=True)
        command = run.command(resume=how == "begun")
        with open(run.folder / "log.txt", "a") as log:
            if not self.locked(log):
                return self.fail(run, "another process is working in its folder")
            if how == "new":
                log.truncate(0)
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            if command[0] == "python":
                command[0] = sys.executable
            share = environment(slot, self.workers)
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=share, start_new_session=True
            )
        self.running[slot] = run, process

    @staticmethod
    def locked(log: TextIO) -> bool:
        """Lock the run's log. The child holds the lock with its copy of the file, also if the launcher is killed."""
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def ready(self) -> Run | None:
        """Take the next waiting run whose need is met; one whose need has failed fails as well."""
        pending = {run.folder for run in self.waiting} | {run.folder for run, _ in self.running.values()}
        for run in list(self.waiting):
            if run.needs in pending:
                continue
            self.waiting.remove(run)
            if run.needs not in self.failed:
                return run
            self.fail(run, f"needs {run.needs}, which failed")
        return None

    def collect(self) -> None:
        """Take note of runs that have ended."""
        for slot, (run, process) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[slot]
            if code == 0 and state(run) == "done":
                self.done.append(run)
            elif not self.stops:
                short = " but not finished" if code == 0 else ""
                self.fail(run, f"exit code {code}{short}: {last_line(run.folder / 'log.txt')}")

    def show(self) -> None:
        """One line about all runs: rewritten on a terminal, else written when a run begins or ends and now and then."""
        counts = f"{len(self.done)} of {self.total} done, {len(self.failed)} failed, {len(self.running)} running"
        minutes = (time.time() - self.begun_at) / 60
        key = f"{counts} {[run.name for run, _ in self.running.values()]} {minutes // 10}"
        if not sys.stdout.isatty() and key == self.shown:
            return
        self.shown = key
        rows = [(run, last_row(run).get("iteration", "0")) for run, _ in self.running.values()]
        parts = [f"{run.name} {iteration}/{target(run) or '?'}" for run, iteration in rows]
        line = f"{minutes:.0f} min: {counts}{': ' if parts else ''}{', '.join(parts)}"
        if sys.stdout.isatty():
            line = f"\r{line[: os.get_terminal_size().columns - 1]}\x1b[K"
        say(line, end="" if sys.stdout.isatty() else "\n")

    def end_children(self) -> None:
        """Ctrl-C for all children, and after `grace` seconds, or at a second Ctrl-C, the end of those left."""
        for _, process in self.running.values():
            os.killpg(process.pid, signal.SIGINT)
        stops, deadline = self.stops, time.time() + self.grace
        while any(process.poll() is None for _, process in self.running.values()):
            if time.time() > deadline or self.stops > stops:
                for _, process in self.running.values():
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.1)

    def launch(self) -> int:
        """Until all is done or Ctrl-C; returns the exit code: 0, 1 if runs failed, 130 after Ctrl-C."""
        handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (self.waiting or self.running) and not self.stops:
                for slot in range(self.workers):
                    while slot not in self.running and (run := self.ready()):
                        try:
                            self.start(run, slot)
                        except (OSError, ValueError) as error:
                            self.fail(run, f"it can't be begun: {error}")
                self.collect()
                self.show()
                if self.running:
                    time.sleep(0.2)
        finally:  # whatever ends the loop, no run is left behind
            self.end_children()
            self.collect()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return self.verdict()

    def verdict(self) -> int:
        """Print what was reached; returns the exit code."""
        say(f"\n{len(self.done)} of {self.total} runs done, {len(self.failed)} failed")
        if self.stops:
            say("stopped: the same command goes on where each run's last checkpoint is")
            return 130
        for folder, reason in self.failed.items():
            say(f"failed: {folder.name}: {reason} ({folder / 'log.txt'})", file=sys.stderr)
        return 1 if self.failed else 0


# Slurm


def slurm(runs: list[Run], folder: Path, workers: int, submit: bool) -> None:
    """Write the commands of all runs that aren't done to files, and print or submit the arrays that run them.

    Runs that others wait for go into a first array, the others into a second one, which Slurm starts after it.
    """
    runs = [run for run in runs if state(run) != "done"]
    if not runs:
        print("nothing to submit: all runs are done")
    needed = {run.needs for run in runs}
    stages = [[run for run in runs if run.folder in needed], [run for run in runs if run.folder not in needed]]
    folder.mkdir(parents=True, exist_ok=True)
    job = ""
    for number, stage in enumerate(stages):
        if not stage:
            continue
        path = folder / f"{int(time.time())}-{number}.txt"
        path.write_text("".join(shlex.join(run.command()) + "\n" for run in stage))
        command = ["sbatch", "--parsable", f"--array=0-{len(stage) - 1}%{workers}"]
        command += [f"--dependency=afterany:{job}"] if job else []
        command += ["benchmark/slurm_array.sh", str(path)]
        job = "$first"
        if submit:
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                die(f"cannot run sbatch ({error.strerror}): on a machine without Slurm take --slurm print.")
            if done.returncode:
                die(f"sbatch: {' '.join(done.stderr.split())}: see the lines at the top of benchmark/slurm_array.sh.")
            job = done.stdout.strip().split(";")[0]
            print(f"job {job}: {len(stage)} runs of {path}")
        elif number == 0:
            print(f"first=$({shlex.join(command)})")
        else:
            print(shlex.join(command).replace("'--dependency=afterany:$first'", '--dependency="afterany:$first"'))


def one_task(path: str, index: str) -> Run:
    """The run in line `index` (from 0) of a file that slurm() wrote."""
    with contextlib.suppress(OSError, LookupError, ValueError):
        run = parse(words_in(Path(path).read_text().splitlines()[int(index)], f"line {index} of {path}"))
        if "--run-dir" in run.flags:
            return run
    die(f"{path} has no run in line {index}, counted from 0.")


def parse_args() -> argparse.Namespace:
    described = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**described)
    parser.add_argument("--quick", action="store_true", help="toy sizes and random data, in runs/quick")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="lines whose name contains a PART")
    parser.add_argument("--needs", metavar="FILE", help="lines that are run where others wait for them")
    parser.add_argument("--list", action="store_true", help="print the lines and stop")
    parser.add_argument("--dry-run", action="store_true", help="print what each run would do, and its command")
    parser.add_argument("--slurm", choices=("print", "submit"), help="as arrays of benchmark/slurm_array.sh")
    parser.add_argument("--task", nargs=2, metavar=("FILE", "INDEX"), help="one line of a file of --slurm")
    parser.add_argument(
        "--grace", type=float, default=30.0, help="seconds that Ctrl-C leaves to a run to end by itself"
    )
    return parser.parse_args()


def main() -> int:
    args, workers = parse_args(), os.environ.get("WORKERS", "1")
    if not workers.isdecimal() or int(workers) < 1:
        die(f"WORKERS is {workers}: give 1 or more.")
    if args.task:
        run = one_task(*args.task)
        return Launcher([run], 1, args.grace, {run.folder}).launch()
    text, needed = sys.stdin.read(), Path(args.needs).read_text() if args.needs else ""
    if args.list:
        print(text, end="")
        return 0
    seeds, runs = os.environ.get("SEEDS", "1 2 3").split(), "runs/quick" if args.quick else "runs"
    own = runs_of(text, seeds, runs, args.quick, os.environ.get("EXTRA", ""))
    others = runs_of(needed, seeds, runs, args.quick)
    chosen = selected(own, others, args.only)
    check_needs(chosen)
    if args.dry_run:
        for run in chosen:
            how = state(run)
            print(f"{how:6} {shlex.join(run.command(resume=how == 'begun'))}")
    elif args.slurm:
        slurm(chosen, Path("runs/slurm"), int(workers), args.slurm == "submit")
    else:
        return Launcher(chosen, int(workers), args.grace, {run.folder for run in own}).launch()
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (OSError, UnicodeError) as error:  # --needs, the lines, runs/slurm
        die(f"{error}.")
