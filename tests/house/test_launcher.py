"""benchmark/run.py and the shell scripts: what is run, resumed, skipped, stopped and refused, and that every line is
what the paper's tables say."""

import csv
import errno
import fcntl
import importlib
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHELL = ["pretrain_dt", "grpo_dt", "ppo_dt", "q_guided_grpo_dt", "ablations", "small"]


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmark" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run, report = load("run"), load("report")

# A script that behaves as ours do towards the launcher: a row, then the checkpoint, per iteration; --resume goes on.
# A file in the working directory makes it hang (hang), hang and ignore Ctrl-C (deaf), fail (break), end early (short).
FAKE = """
import csv, json, os, pickle, signal, sys, time, zipfile
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = flags.get("--resume") or flags["--run-dir"]
open("starts", "a").write(f"{os.path.basename(folder)} {os.environ['OMP_NUM_THREADS']}\\n")
first, checkpoint = 0, folder + "/checkpoint.pt"
if "--pretrained" in flags and not os.path.exists(flags["--pretrained"] + "/checkpoint.pt"):
    sys.exit("error: nothing pretrained")
if "--resume" in flags:
    with zipfile.ZipFile(checkpoint) as archive:
        first = pickle.loads(archive.read("archive/data.pkl"))["iteration"]
    flags = json.load(open(folder + "/args.json"))["args"] | flags
    lines = open(folder + "/metrics.csv").read().splitlines(keepends=True)[: first + 1]
else:
    lines = ["iteration,eval/return_mean\\n"]
open(folder + "/metrics.csv", "w").write("".join(lines))
total = int(flags.get("--iterations") or flags["iterations"])
json.dump({"args": {"iterations": total}}, open(folder + "/args.json", "w"))
if os.path.exists("deaf"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
open(folder + "/pid", "w").write(str(os.getpid()))
for i in range(first + 1, total + 1):
    open(folder + "/metrics.csv", "a").write(f"{i},{10 * i}\\n")
    if i == 3 and os.path.exists("short"):
        sys.exit(0)
    if i == 3 and os.path.exists("break"):
        sys.exit("error: broken in the third")
    while i == 3 and (os.path.exists("hang") or os.path.exists("deaf")):
        time.sleep(0.05)
    with zipfile.ZipFile(checkpoint + ".tmp", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"args": {"iterations": 9}, "iteration": i}, protocol=2))
    os.replace(checkpoint + ".tmp", checkpoint)
print("the end")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the fake script."""
    monkeypatch.chdir(tmp_path)
    for name in ("SEEDS", "WORKERS", "EXTRA", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    Path("fake.py").write_text(FAKE)
    return tmp_path


LINES = "a python fake.py --iterations 4\n# a comment\n\nb python fake.py --iterations 5 --lr 1e-3\n"


def launcher(*arguments, lines=LINES, **environment):
    """The launcher in a process of its own: (exit code, stdout, stderr)."""
    command = [sys.executable, str(ROOT / "benchmark" / "run.py"), *arguments]
    settings = os.environ | {"SEEDS": "1"} | environment
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=settings, timeout=120)
    return done.returncode, done.stdout, done.stderr


def starts():
    return [line.split()[0] for line in Path("starts").read_text().splitlines()] if Path("starts").exists() else []


def iterations(folder):
    with open(f"runs/{folder}/metrics.csv", newline="") as file:
        return [int(row["iteration"]) for row in csv.DictReader(file)]


# Lines


def test_flags_and_words():
    words = ["--lr", "1", "--on", "--x=2", "--g", "-1", "--lr", "3"]
    flags = {"--on": [], "--x": ["2"], "--g": ["-1"], "--lr": ["3"]}
    assert run.flags_of(words) == flags
    assert run.words_of(flags) == ["--on", "--x", "2", "--g", "-1", "--lr", "3"]
    with pytest.raises(SystemExit, match='error: "5" is no flag'):
        run.flags_of(["5", "--lr"])


def test_a_line_becomes_a_run_per_seed():
    runs = run.runs_of("n  python s.py --lr 1 --pretrained runs/p__{seed}\n", ["3", "4"], "runs", False, "--lr 2 --on")
    assert [each.name for each in runs] == ["n__3", "n__4"]
    assert runs[1].needs == Path("runs/p__4")
    assert shlex.join(runs[0].command()) == (
        "python s.py --lr 2 --pretrained runs/p__3 --on --seed 3 --run-dir runs/n__3"
    )
    assert runs[0].command(resume=True) == ["python", "s.py", "--resume", "runs/n__3"]
    words = ["--env-id", "my_tasks:A-v0", "--iterations", "5", "--no-cuda", "--track"]
    (mine,) = run.runs_of(f"n python s.py --lr 1 {' '.join(words)}", ["3"], "runs", False)
    assert mine.command(resume=True)[4:] == words


def test_quick_replaces_sizes_and_data_and_keeps_what_the_line_is_about():
    line = "n python grpo_dt_continuous.py --l-traj 5 --n-batch 4 --iterations 500 --pretrained runs/p__{seed}"
    (quick,) = run.runs_of(line, ["1"], "runs/quick", True)
    assert quick.folder == Path("runs/quick/n__1") and quick.needs == Path("runs/quick/p__1")
    assert quick.flags["--l-traj"] == ["5"]
    assert (quick.flags["--iterations"], quick.flags["--buffer-size"]) == (["2"], ["16"])
    twin = line.replace("grpo_dt_continuous.py", "benchmark/reinformer.py finetune")
    (other,) = run.runs_of(twin, ["1"], "runs/quick", True)
    assert other.program[1:] == ["benchmark/reinformer.py", "finetune"] and other.flags == quick.flags
    (quick,) = run.runs_of("n python pretrain_dt.py --dataset x.hdf5", ["1"], "runs/quick", True)
    assert quick.flags["--dataset"] == ["random"]


def test_lines_that_make_no_sense_are_refused():
    for text, reason in {"n --lr 1": "is not", "n python s.py\nn python t.py": "two lines or seeds"}.items():
        with pytest.raises(SystemExit, match=reason):
            run.runs_of(text, ["1"], "runs", False)
    with pytest.raises(SystemExit, match="no line's name"):
        run.selected(run.runs_of("n python s.py", ["1"], "runs", False), [], ["m"])


def test_quotes_that_do_not_close_are_told_in_a_line(refused):
    with refused("the line n", "no closing quotation"):
        run.runs_of("n python s.py --name 'a", ["1"], "runs", False)
    with refused("EXTRA", "no closing quotation"):
        run.runs_of("n python s.py", ["1"], "runs", False, '--name "a')


@pytest.mark.parametrize(
    "needs, circle",
    [
        ({"a": "a"}, "a__1 needs a__1"),
        ({"a": "b", "b": "a"}, "a__1 needs b__1 needs a__1"),
        ({"x": "b", "a": "b", "b": "c", "c": "a"}, "a__1 needs b__1 needs c__1 needs a__1"),
    ],
)
def test_runs_that_need_each_other_are_named_at_the_start(place, needs, circle):
    lines = "".join(f"{name} python fake.py --pretrained runs/{need}__{{seed}}\n" for name, need in needs.items())
    assert launcher(lines=lines) == (1, "", f"error: --pretrained goes in a circle: {circle}.\n")
    assert starts() == []


def test_what_a_chosen_run_needs_is_chosen_with_it_and_comes_first():
    others = run.runs_of("p python s.py\nq python s.py", ["1", "2"], "runs", False)
    own = run.runs_of("n python s.py --pretrained runs/p__{seed}\nm python s.py", ["1", "2"], "runs", False)
    names = [each.name for each in run.selected(own, others, ["n__2"])]
    assert names == ["p__2", "n__2"]
    assert [each.name for each in run.selected(own, others, [])] == ["p__1", "p__2", "n__1", "m__1", "n__2", "m__2"]


# What a folder says


def test_the_iteration_of_a_checkpoint_is_read_as_torch_reads_it(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for iteration in (0, 7, 300, 70_000, 3_000_000_000):
        args = {"iterations": 500, "env_id": "Hopper-v5", "resume": None}
        torch.save(
            {"script": "s", "args": args, "weights": {"w": torch.ones(3)}, "iteration": iteration, "rows": 3}, path
        )
        assert run.iteration_of(path) == torch.load(path, weights_only=True)["iteration"] == iteration
    path.write_bytes(path.read_bytes()[:200])
    assert run.iteration_of(path) == -1
    assert run.iteration_of(tmp_path / "missing.pt") == -1


def test_a_truncated_or_flipped_checkpoint_has_no_iteration(tmp_path):
    path, rng, weights = tmp_path / "checkpoint.pt", random.Random(0), torch.rand(500)
    torch.save({"script": "s", "args": {"iterations": 9}, "iteration": 7, "weights": {"w": weights}}, path)
    whole = path.read_bytes()
    first = whole.index(weights.numpy().tobytes())

    def flipped(place):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        return run.iteration_of(path)

    for length in (0, 1, 30, *(rng.randrange(len(whole)) for _ in range(40)), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert run.iteration_of(path) == -1, length
    assert {flipped(first + rng.randrange(2000)) for _ in range(50)} == {-1}  # of 500 fp32 weights
    assert {flipped(rng.randrange(len(whole))) for _ in range(60)} == {-1, 7}  # 7: in the padding


def test_done_needs_the_checkpoint_and_the_closing_evaluation(place):
    assert launcher()[0] == 0
    (mine, _) = run.runs_of(LINES, ["1"], "runs", False)
    table = Path("runs/a__1/metrics.csv")
    whole, checkpoint = table.read_text(), Path("runs/a__1/checkpoint.pt").read_bytes()
    assert run.state(mine) == "done"
    table.write_text(whole.replace("4,40", "4,"))  # pretraining killed before its evaluation
    assert run.state(mine) == "begun"
    table.write_text(whole)
    torch.save({"iteration": 3}, "runs/a__1/checkpoint.pt")  # killed between the row and the checkpoint
    assert run.state(mine) == "begun"
    Path("runs/a__1/checkpoint.pt").write_bytes(checkpoint)
    assert run.state(mine) == "done"
    mine.flags["--iterations"] = ["5"]
    assert run.state(mine) == "begun"
    Path("runs/a__1/checkpoint.pt").unlink()
    assert run.state(mine) == "new"


# Launching


def test_runs_are_made_once_and_skipped_when_done(place):
    code, printed, errors = launcher(SEEDS="1 2", WORKERS="2")
    assert (code, errors) == (0, "") and "4 of 4 runs done, 0 failed" in printed
    assert sorted(starts()) == ["a__1", "a__2", "b__1", "b__2"]
    assert iterations("a__1") == [1, 2, 3, 4] and iterations("b__2") == [1, 2, 3, 4, 5]
    assert Path("runs/b__1/log.txt").read_text() == (
        "$ python fake.py --iterations 5 --lr 1e-3 --seed 1 --run-dir runs/b__1\nthe end\n"
    )
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    code, printed, _ = launcher(SEEDS="1 2")
    assert code == 0 and "4 of 4 runs done" in printed
    assert len(starts()) == 4 and before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}


def test_a_run_that_fails_is_listed_with_its_reason_and_resumed_by_the_next_call(place):
    Path("break").touch()
    code, printed, errors = launcher(lines="c python fake.py --iterations 2\n" + LINES)
    assert code == 1 and "1 of 3 runs done, 2 failed" in printed
    assert errors == (
        "failed: a__1: exit code 1: error: broken in the third (runs/a__1/log.txt)\n"
        "failed: b__1: exit code 1: error: broken in the third (runs/b__1/log.txt)\n"
    )
    Path("break").unlink()
    code, _, errors = launcher()
    assert (code, errors) == (0, "") and iterations("a__1") == [1, 2, 3, 4]
    assert "\n$ python fake.py --resume runs/a__1 --iterations 4\n" in Path("runs/a__1/log.txt").read_text()


# What befalls one run and must not befall the others. Each makes a fault in the working directory.


def damage(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


FAULTS = {
    "a folder that is a file": lambda: damage("runs/a__1", b""),
    "a log that is a folder": lambda: Path("runs/a__1/log.txt").mkdir(parents=True),
    "a checkpoint of nothing": lambda: damage("runs/a__1/checkpoint.pt", b""),
    "a checkpoint that is none": lambda: damage("runs/a__1/checkpoint.pt", b"PK\x03\x04" + bytes(100)),
    "a script that is gone": lambda: Path("fake.py").rename("other.py"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_in_trouble_fails_with_a_line_and_the_others_go_on(place, fault):
    shutil.copy("fake.py", "good.py")
    FAULTS[fault]()
    code, printed, errors = launcher(lines="a python fake.py --iterations 1\nb python good.py --iterations 1\n")
    assert code == 1 and "1 of 2 runs done, 1 failed" in printed and iterations("b__1") == [1]
    assert errors.startswith("failed: a__1: ") and errors.count("\n") == 1, errors


def test_a_program_that_is_not_there_or_a_folder_that_goes_away_ends_one_run(place):
    Path("gone.py").write_text("import shutil, sys\nshutil.rmtree(sys.argv[-1])\n")
    lines = (
        "a nowhere/python fake.py\nb python gone.py\nc python fake.py --iterations 1\nd python fake.py --iterations x\n"
    )
    code, printed, errors = launcher(lines=lines)
    assert code == 1 and "1 of 4 runs done, 3 failed" in printed
    first, second, third = errors.splitlines()
    assert first.startswith("failed: a__1: it can't be begun: [Errno 2]") and "nowhere/python" in first
    assert second.startswith("failed: b__1: exit code 0 but not finished: [Errno 2]") and "runs/b__1/log.txt" in second
    assert third.startswith("failed: d__1: exit code 1: ValueError: invalid literal for int()")


@pytest.mark.parametrize("name", ["log.txt", "args.json", "metrics.csv"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\x00\xfe\n", b"$ 'a", b"[" * 100_000, b'{"args": {"iterations": []}}']
)
def test_a_damaged_file_of_a_run_is_no_end(place, name, content):
    (mine,) = run.runs_of("a python fake.py\n", ["1"], "runs", False)
    damage("runs/a__1/args.json", b'{"args": {"iterations": 3}}')
    damage("runs/a__1/metrics.csv", b"iteration,eval/return_mean\n3,5\n")
    torch.save({"iteration": 3}, "runs/a__1/checkpoint.pt")
    assert run.state(mine) == "done" and run.last_row(mine)["iteration"] == "3" and run.target(mine) == 3
    damage(f"runs/a__1/{name}", content)
    assert run.state(mine) == ("done" if name == "log.txt" else "begun")
    assert run.flags_that_differ(mine) == "" and len(run.last_line(Path(f"runs/a__1/{name}"))) <= 200


def test_a_full_disk_ends_one_run_and_not_the_launcher(place, monkeypatch, capfd):
    def full(command, **settings):
        if "runs/a__1" in command:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return begin(command, **settings)

    begin = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", full)
    runs = run.runs_of("a python fake.py --iterations 1\nb python fake.py --iterations 1\n", ["1"], "runs", False)
    assert run.Launcher(runs, 1, 1.0, set()).launch() == 1
    line = "failed: a__1: it can't be begun: [Errno 28] No space left on device (runs/a__1/log.txt)\n"
    assert capfd.readouterr().err == line and iterations("b__1") == [1]


def test_a_console_that_takes_nothing_ends_no_run(place):
    command = [sys.executable, str(ROOT / "benchmark" / "run.py")]
    with open("/dev/full", "w") as full:
        subprocess.run(command, input=LINES, stdout=full, stderr=full, text=True, env=os.environ | {"SEEDS": "1"})
    assert iterations("a__1") == [1, 2, 3, 4] and iterations("b__1") == [1, 2, 3, 4, 5]


def test_a_fault_of_the_launcher_itself_leaves_no_orphans(place, monkeypatch):
    Path("hang").touch()
    launching = run.Launcher(run.runs_of(LINES, ["1"], "runs", False), 2, 5.0, set())

    def show():
        if all(Path(f"runs/{name}/pid").exists() for name in ("a__1", "b__1")):
            raise RuntimeError("a bug")

    monkeypatch.setattr(launching, "show", show)
    try:
        with pytest.raises(RuntimeError, match="a bug"):
            launching.launch()
        assert not alive("a__1") and not alive("b__1") and launching.running == {}
    finally:
        Path("hang").unlink()


def test_a_file_system_without_locks_is_no_other_process(place, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    runs = run.runs_of("a python fake.py --iterations 1\n", ["1"], "runs", False)
    assert run.Launcher(runs, 1, 1.0, set()).launch() == 0 and iterations("a__1") == [1]


def test_what_begins_with_a_damaged_checkpoint_is_not_started(place):
    assert launcher("--only", "a__")[0] == 0
    path = Path("runs/a__1/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:-1])
    code, _, errors = launcher(lines=LINES + "n python fake.py --iterations 2 --pretrained runs/a__{seed}\n")
    assert code == 1 and starts() == ["a__1", "b__1"]
    assert errors == (
        "failed: a__1: runs/a__1/checkpoint.pt is damaged: move runs/a__1 away to begin it anew (runs/a__1/log.txt)\n"
        "failed: n__1: needs runs/a__1, which failed (runs/n__1/log.txt)\n"
    )


def test_exit_code_0_is_not_enough(place):
    Path("short").touch()
    code, _, errors = launcher("--only", "a__")
    assert code == 1 and errors.startswith("failed: a__1: exit code 0 but not finished")


def test_what_needs_a_failed_run_is_not_started(place):
    lines = "n python fake.py --iterations 2 --pretrained runs/p__{seed}\n"
    Path("needs").write_text("p python fake.py --iterations 4\nunused python fake.py --iterations 4\n")
    Path("break").touch()
    code, _, errors = launcher("--needs", "needs", lines=lines, WORKERS="2")
    assert code == 1 and starts() == ["p__1"]
    assert "failed: n__1: needs runs/p__1, which failed" in errors
    Path("break").unlink()
    code, _, errors = launcher("--needs", "needs", lines=lines, WORKERS="2")
    assert (code, errors) == (0, "") and starts() == ["p__1", "p__1", "n__1"]
    code, _, errors = launcher(lines="m python fake.py --iterations 2 --pretrained runs/none\n")
    assert code == 1 and "error: nothing pretrained" in errors  # the script's own line


def interrupt(number=signal.SIGINT, *arguments, again=False):
    """Start the launcher on LINES with two workers, send it a signal when both runs hang in iteration 3, once or
    twice; returns exit code, stdout and the seconds until it ended."""
    command = [sys.executable, str(ROOT / "benchmark" / "run.py"), *arguments]
    pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **pipe, env=os.environ | {"SEEDS": "1", "WORKERS": "2"})
    process.stdin.write(LINES)
    process.stdin.close()
    process.stdin = None
    deadline = time.time() + 60
    while not all(Path(f"runs/{n}/metrics.csv").exists() and iterations(n)[-1:] == [3] for n in ("a__1", "b__1")):
        assert time.time() < deadline, "the runs did not reach iteration 3"
        time.sleep(0.02)
    begun = time.time()
    process.send_signal(number)
    if again:
        time.sleep(0.5)
        process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert errors == ""
    return process.returncode, printed, time.time() - begun


def alive(folder):
    try:
        os.kill(int(Path(f"runs/{folder}/pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_all_and_the_same_command_goes_on(place, number):
    Path("hang").touch()
    code, printed, seconds = interrupt(number)
    assert code == 130 and seconds < 20
    assert "0 of 2 runs done, 0 failed\nstopped: the same command goes on" in printed
    assert not alive("a__1") and not alive("b__1")
    assert "KeyboardInterrupt" in Path("runs/a__1/log.txt").read_text()  # it was asked to stop, not killed
    Path("hang").unlink()
    code, _, errors = launcher()
    assert (code, errors) == (0, "") and iterations("a__1") == [1, 2, 3, 4] and iterations("b__1") == [1, 2, 3, 4, 5]
    assert "--resume runs/a__1" in Path("runs/a__1/log.txt").read_text()


@pytest.mark.parametrize("arguments, again", [(["--grace", "0.5"], False), ([], True)])
def test_a_run_that_ignores_ctrl_c_is_killed_after_a_while_or_at_a_second_one(place, arguments, again):
    Path("deaf").touch()
    code, _, seconds = interrupt(signal.SIGINT, *arguments, again=again)
    assert code == 130 and 0.4 < seconds < 20
    assert not alive("a__1") and not alive("b__1")


def test_a_run_in_which_another_process_is_working_is_left_alone(place):
    Path("runs/a__1").mkdir(parents=True)
    with open("runs/a__1/log.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        code, _, errors = launcher()
    assert code == 1 and errors.startswith("failed: a__1: another process is working in its folder")
    assert starts() == ["b__1"]


def test_a_child_keeps_its_lock_when_the_launcher_is_killed(place):
    Path("hang").touch()
    code, _, _ = interrupt(signal.SIGKILL)
    try:
        assert code == -signal.SIGKILL and alive("a__1")
        code, _, errors = launcher("--only", "a__")
        assert code == 1 and "another process is working" in errors and starts().count("a__1") == 1
    finally:
        Path("hang").unlink()


def test_a_folder_begun_with_other_flags_is_refused_and_a_longer_run_goes_on(place):
    assert launcher()[0] == 0
    code, _, errors = launcher(EXTRA="--lr 1e-4")
    assert code == 1 and len(starts()) == 2
    assert "failed: a__1: begun with no --lr, now --lr 1e-4: " in errors
    assert "failed: b__1: begun with --lr 1e-3, now --lr 1e-4: " in errors
    code, _, errors = launcher("--only", "a__", EXTRA="--iterations 6")
    assert (code, errors) == (0, "") and iterations("a__1") == [1, 2, 3, 4, 5, 6]
    code, _, errors = launcher(lines="a python fake.py\n")
    assert code == 1 and "begun with --iterations 4, now no --iterations" in errors


def test_a_needed_run_that_is_done_is_taken_however_it_was_begun(place):
    assert launcher("--only", "a__", EXTRA="--width 128")[0] == 0
    Path("needs").write_text(LINES)
    code, _, errors = launcher(
        "--needs", "needs", lines="n python fake.py --iterations 2 --pretrained runs/a__{seed}\n"
    )
    assert (code, errors) == (0, "") and starts() == ["a__1", "n__1"]


def test_a_run_begun_by_hand_is_resumed_as_often_as_it_takes(place):
    assert launcher("--only", "a__", EXTRA="--iterations 2")[0] == 0
    Path("runs/a__1/log.txt").unlink()
    Path("break").touch()
    assert launcher("--only", "a__")[0] == 1  # resumed, and broken in the third
    Path("break").unlink()
    code, _, errors = launcher("--only", "a__")
    assert (code, errors) == (0, "") and iterations("a__1") == [1, 2, 3, 4]


def test_what_begins_with_an_unfinished_run_is_not_started(place):
    Path("break").touch()
    assert launcher("--only", "a__")[0] == 1
    lines = "n python fake.py --iterations 2 --pretrained runs/a__{seed}\n"
    code, _, errors = launcher(lines=lines)
    assert code == 1 and "failed: n__1: runs/a__1 is not finished (2 of 4): --resume it first" in errors
    assert starts() == ["a__1"]
    Path("break").unlink()
    assert launcher("--only", "a__")[0] == launcher(lines=lines)[0] == 0


def test_a_wrong_number_of_workers_is_told_in_a_line(place):
    for workers in ("0", "two"):
        assert launcher(WORKERS=workers) == (1, "", f"error: WORKERS is {workers}: give 1 or more.\n")


def test_workers_share_cores_and_gpus(place, monkeypatch):
    monkeypatch.setattr(run, "cores", lambda: 7)
    assert run.environment(0, 2)["OMP_NUM_THREADS"] == "3"
    assert run.environment(0, 9)["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in run.environment(1, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [run.environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "6", "4"]
    launcher("--only", "a__")
    assert Path("starts").read_text() == f"a__1 {len(os.sched_getaffinity(0))}\n"


def test_list_and_dry_run_start_nothing(place):
    assert launcher("--list")[:2] == (0, LINES)
    assert launcher("--only", "a__")[0] == 0
    code, printed, _ = launcher("--dry-run", SEEDS="1 2")
    assert code == 0 and [line.split()[0] for line in printed.splitlines()] == ["done", "new", "new", "new"]
    assert starts() == ["a__1"]


# Slurm


def test_slurm_arrays_hold_what_is_not_done_and_a_task_makes_one_run(place):
    Path("benchmark").mkdir()
    for name in ("run.py", "slurm_array.sh"):
        shutil.copy(ROOT / "benchmark" / name, "benchmark")
    Path("bin").mkdir()
    Path("bin/sbatch").write_text('#!/bin/sh\necho "$@" >> submitted\necho "42;cluster"\n')
    Path("bin/sbatch").chmod(0o755)
    Path("needs").write_text("p python fake.py --iterations 2\n")
    lines = LINES + "n python fake.py --iterations 2 --pretrained runs/p__{seed}\n"
    assert launcher("--only", "a__")[0] == 0
    path = f"{Path('bin').resolve()}:{os.environ['PATH']}"
    code, printed, _ = launcher("--needs", "needs", "--slurm", "print", lines=lines, WORKERS="8")
    first, second = printed.splitlines()
    assert code == 0 and not Path("submitted").exists()
    assert first.startswith("first=$(sbatch --parsable --array=0-0%8 benchmark/slurm_array.sh runs/slurm/")
    assert second.startswith('sbatch --parsable --array=0-1%8 --dependency="afterany:$first" benchmark/slurm_array.sh')
    launcher("--needs", "needs", "--slurm", "submit", lines=lines, WORKERS="8", PATH=path)
    one, two = Path("submitted").read_text().splitlines()
    assert "--array=0-0%8 benchmark/" in one and "--array=0-1%8 --dependency=afterany:42 benchmark/" in two
    listed = Path(two.split()[-1])
    assert listed.read_text().splitlines() == [
        "python fake.py --iterations 5 --lr 1e-3 --seed 1 --run-dir runs/b__1",
        "python fake.py --iterations 2 --pretrained runs/p__1 --seed 1 --run-dir runs/n__1",
    ]
    task = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "PYTHON": sys.executable}
    done = subprocess.run(["bash", "benchmark/slurm_array.sh", str(listed)], env=task, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert starts() == ["a__1", "b__1"] and iterations("b__1") == [1, 2, 3, 4, 5]


def test_a_task_or_a_list_that_is_not_there_is_told_in_a_line(place, refused):
    Path("tasks").write_text("python fake.py --iterations 1\npython 'fake.py\n")
    for index in ("0", "7", "x"):
        with refused(f"tasks has no run in line {index}"):
            run.one_task("tasks", index)
    with refused("line 1 of tasks", "no closing quotation"):
        run.one_task("tasks", "1")
    assert launcher("--needs", "gone") == (1, "", "error: [Errno 2] No such file or directory: 'gone'.\n")


def test_what_slurm_says_is_told_in_a_line(place):
    code, _, errors = launcher("--slurm", "submit", PATH="/nowhere")
    assert (code, errors[:24]) == (1, "error: cannot run sbatch") and errors.count("\n") == 1
    Path("sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    Path("sbatch").chmod(0o755)
    code, _, errors = launcher("--slurm", "submit", PATH=f"{place}:{os.environ['PATH']}")
    assert code == 1 and errors.startswith("error: sbatch: invalid partition") and errors.count("\n") == 1
    assert launcher()[0] == 0
    assert launcher("--slurm", "print") == (0, "nothing to submit: all runs are done\n", "")


# The shell scripts


def lines_of(name, quick=False, seeds=("1",), extra=""):
    """The runs of a shell script."""
    command = ["bash", str(ROOT / "benchmark" / f"{name}.sh"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert listed.returncode == 0, listed.stderr
    return run.runs_of(listed.stdout, list(seeds), "runs/quick" if quick else "runs", quick, extra)


@pytest.fixture(scope="module")
def all_lines():
    return {name: lines_of(name) for name in SHELL}


def script_of(each, monkeypatch):
    """The script that a run calls. reinformer.py puts its model and its loss into those that it is named."""
    path = ROOT / each.program[1]
    if path.name != "reinformer.py":
        return importlib.import_module(path.stem)
    reinformer = load("reinformer")
    name = {"pretrain": "pretrain_dt", "finetune": "grpo_dt_continuous"}[each.program[2]]
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "DecisionTransformer", reinformer.Reinformer)
    if name == "pretrain_dt":
        monkeypatch.setattr(script, "pretrain_loss", reinformer.reinformer_loss)
    return script


def test_there_is_a_line_for_every_cell_of_table_1(all_lines):
    datasets = [
        key for row in report.read_csv(report.PAPER / "table1.csv") for key in report.dataset_keys(row["dataset"])
    ]
    assert len(datasets) == 17
    for name in ("pretrain_dt", "grpo_dt", "ppo_dt"):
        found = [report.identify(each.name, {}) for each in all_lines[name]]
        assert [identity[1:3] for identity in found if not identity[3]] == datasets
        assert {identity[0] for identity in found} == {name}


def test_there_is_a_line_for_every_curve_of_the_figures(all_lines):
    wanted = {
        (task, kind, variant) for parts in report.FIGURES.values() for task, kind, names in parts for variant in names
    }
    assert {report.identify(each.name, {})[1:4] for each in all_lines["ablations"]} == wanted
    (guided,) = (report.identify(each.name, {}) for each in all_lines["q_guided_grpo_dt"])
    assert guided[1:4] == ("Ant", "medium-replay", "")


def test_every_finetuning_line_begins_with_a_line_of_pretraining_of_the_same_environment(all_lines):
    pretraining = {each.folder: each for name in ("pretrain_dt", "small") for each in all_lines[name]}
    for name in SHELL[1:]:
        for each in (each for each in all_lines[name] if each.needs or name != "small"):
            if each.needs and each.needs.parts[:2] == ("benchmark", "checkpoints"):
                assert (ROOT / each.needs / "checkpoint.pt").is_file()
                continue
            before = pretraining[each.needs]
            assert [each.flags[flag] for flag in ("--env-id", "--dataset-kind")] == [
                before.flags[flag] for flag in ("--env-id", "--dataset-kind")
            ], each.name
            assert ("reinformer" in each.name) == (before.program[1:] == ["benchmark/reinformer.py", "pretrain"])
            assert ("reinformer" in each.name) == (each.program[1:] == ["benchmark/reinformer.py", "finetune"])


def test_the_page_counts_the_lines_of_the_shell_scripts():
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    counts = dict(re.findall(r"^\| \[benchmark/(\w+)\.sh\]\(\S+\) \| (\d+) \|", page, re.M))
    assert {*counts} == {*SHELL, "baselines"}
    assert {name: int(count) for name, count in counts.items()} == {name: len(lines_of(name)) for name in counts}


SMALL = (
    "--embed-dim",
    "--lr",
    "--buffer-size",
    "--gamma",
    "--l-eval",
    "--tau",
    "--kappa-initial",
    "--kappa-lr",
    "--delta-r",
)
SMALL += ("--n-sources", "--n-batch", "--one-scale", "--anneal-lr")
UNLIKE = dict.fromkeys(report.METHODS, (*SMALL, "--ratio", "--random-points", "--mixed-groups", "--hindsight"))
UNLIKE["pretrain_dt"] = ("--embed-dim", "--c-offline")  # its rate is not in the paper's tables


@pytest.mark.parametrize("name", SHELL)
def test_every_line_is_parsed_and_takes_the_papers_row(all_lines, name, monkeypatch):
    for each in all_lines[name]:
        script = script_of(each, monkeypatch)
        args = script.parse_args([*run.words_of(each.flags)])
        script.check_args(args)
        if script.__name__ == "pretrain_dt":
            script.fill_from_row(args, 1.0)
        else:
            script.fill_from_table(args, args.dataset_kind or "random", 1.0)
            args.g_eval = 1.0
        method, task, kind, variant, _ = report.identify(each.name, vars(args))
        assert (task, kind) == report.identify(each.name, {})[1:3]
        differs = report.settings_that_differ(method, task, kind, vars(args))
        if name == "small":  # what is unlike the paper's stands on the line
            named = {part.split(" ")[0] for part in differs.split(", ") if part}
            preset = script.SMALL if "--small" in each.flags else ()
            flags = {*each.flags, *(f"--{field.replace('_', '-')}" for field in preset)} & {*UNLIKE[method]}
            values = {report.RATIOS[each.flags["--ratio"][0]]} if "--ratio" in flags else set()
            assert named == {flag[2:].replace("-", "_") for flag in flags - {"--ratio"}} | values, differs
            continue
        swept = {
            "l-traj-": "l_traj",
            "l-eval-": "l_eval",
        }
        ablation = variant.replace("-", "_") if variant.replace("-", "_") in report.ABLATIONS else ""
        expected = [next((setting for part, setting in swept.items() if variant.startswith(part)), ""), ablation]
        expected += ["n_batch"] if ablation == "full_trajectories" else []
        assert {part.split(" ")[0] for part in differs.split(", ") if part} == {*filter(None, expected)}, each.name


def covering_lines():
    """The first line of each shell script, and lines such that every flag of every line is in one of them."""
    chosen, seen = [], set()
    for name in SHELL:
        for number, each in enumerate(lines_of(name, quick=True, extra="--eval-episodes 1")):
            flags = {(*each.program[1:], flag) for flag in each.flags}
            if number == 0 or flags - seen:
                chosen.append(each)
                seen |= flags
    return chosen


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A working directory with a toy DT and a toy Reinformer on Hopper, and the data that they learned from."""
    folder, quick = tmp_path_factory.mktemp("toys"), shlex.split(run.QUICK["pretrain_dt.py"])
    for model, program in (("dt", ["pretrain_dt.py"]), ("reinformer", ["benchmark/reinformer.py", "pretrain"])):
        with pytest.MonkeyPatch.context() as patch:
            script = script_of(run.Run(["python", *program], {}), patch)
            script.main(script.parse_args([*quick, "--save-data", "--run-dir", str(folder / model)]))
    return folder


@pytest.mark.parametrize("each", covering_lines(), ids=lambda each: each.name)
def test_a_line_of_each_shell_script_and_each_flag_at_toy_size(each, toys, monkeypatch, tmp_path):
    """In this process, and in Hopper, where episodes are short: every line as it is runs in the test below."""
    script = script_of(each, monkeypatch)
    monkeypatch.chdir(tmp_path)
    finetunes = script.__name__ != "pretrain_dt"
    each.flags |= {"--env-id": ["Hopper-v5"]} | ({"--iterations": ["1"]} if finetunes else {})
    if finetunes:
        each.flags["--pretrained"] = [str(toys / ("reinformer" if "reinformer" in each.name else "dt"))]
    folder = script.main(script.parse_args(run.words_of(each.flags)))
    assert folder == each.folder and run.state(each) == "done"
    args = json.loads((folder / "args.json").read_text())["args"]
    for flag, values in each.flags.items():
        saved = args[flag[2:].replace("-", "_")]
        assert saved is True if not values else str(saved) == values[0] or float(saved) == float(values[0]), flag
    rows = report.read_csv(folder / "metrics.csv")
    assert rows[-1]["iteration"] == ("1" if finetunes else "4")
    assert float(rows[-1]["eval/normalized_score"]) < 50
    assert any(row.get("losses/loss") or row.get("losses/nll") for row in rows)


def copy_of_the_tree(folder):
    """The scripts and benchmark/ in another folder, so that its runs/ is its own."""
    shutil.copytree(ROOT / "benchmark", folder / "benchmark", ignore=shutil.ignore_patterns("results"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)


def shell(folder, name, *arguments):
    """A shell script with toy sizes and one seed in a copy of the tree: (exit code, output)."""
    command = ["bash", str(folder / "benchmark" / f"{name}.sh"), "--quick", *arguments]
    settings = os.environ | {"PYTHON": sys.executable, "SEEDS": "1", "WORKERS": "1", "EXTRA": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    return done.returncode, done.stdout + done.stderr


def test_a_shell_script_makes_a_run_that_the_report_reads(tmp_path):
    copy_of_the_tree(tmp_path)
    code, printed = shell(tmp_path, "pretrain_dt", "--only", "Door-human")
    assert code == 0 and "1 of 1 runs done" in printed, printed
    (folder,) = (tmp_path / "runs" / "quick").iterdir()
    found = report.read_run(folder)
    assert (found.method, found.task, found.kind, found.seed) == ("pretrain_dt", "Door", "human", "1")
    assert found.goal == found.iteration == 4 and found.seconds > 0
    assert found.differs == "embed_dim 16 (512), n_layers 2 (4), n_heads 2 (4)"


@pytest.mark.slow
def test_every_line_of_every_shell_script_at_toy_size(tmp_path, all_lines):
    copy_of_the_tree(tmp_path)
    for name in SHELL:
        if not (ROOT / all_lines[name][0].program[1]).exists():
            continue
        code, printed = shell(tmp_path, name)
        assert code == 0, printed
        for each in all_lines[name]:
            assert (tmp_path / "runs" / "quick" / each.name / "checkpoint.pt").exists()
