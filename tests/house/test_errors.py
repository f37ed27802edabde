"""Bad input and bad luck: one line that says what to do, exit code 1, no traceback, and older results stay whole. The
parts that all scripts share are tried with pretrain_dt.py, which is the quickest."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import pretrain_dt
from pretrain_dt import load_checkpoint, load_model, main, parse_args

SCRIPT = Path(pretrain_dt.__file__).resolve()
FINETUNING = ["grpo_dt_continuous", "ppo_dt_continuous", "q_guided_grpo_dt"]
TOY = dict(embed_dim=16, n_layers=2, n_heads=2, batch_size=8, dataset_steps=300, updates=4, log_every=2)
TOY |= dict(eval_episodes=1, threads=1)


def toy_flags(**changed):
    """TOY as a command line, with fields changed."""
    fields = TOY | changed
    return ["--no-cuda", *(w for name, value in fields.items() for w in (f"--{name.replace('_', '-')}", str(value)))]


def run(*arguments):
    """What the command line does, in this process."""
    args = parse_args([str(argument) for argument in arguments])
    return pretrain_dt.eval_only(args, pretrain_dt.Environments) if args.eval_only else main(args)


def script(*arguments, code=None, **kwargs):
    """The command in a process of its own. code: Python that stands in for the script."""
    command = [sys.executable, *(["-c", code] if code else [str(SCRIPT)]), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "PYTHONIOENCODING": "ascii"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, **kwargs)


def assert_one_line(done, *named):
    """Exit code 1, and on stderr one line that names these and nothing else."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert re.fullmatch(r"error: [^\n]*\n", done.stderr) and all(name in done.stderr for name in named), done.stderr


def content_of(folder):
    """All files of a folder with their bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 4 updates, not to be changed."""
    torch.set_num_threads(1)
    return run(*toy_flags(run_dir=tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def older(finished, tmp_path):
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "older"))


def assert_loads(folder, update):
    content = load_checkpoint(folder / "checkpoint.pt")
    assert content["iteration"] == update
    model = load_model(content, torch.device("cpu"), False)
    assert all(p.isfinite().all() for p in model.parameters())


# ---- Values and flags -----------------------------------------------------------------------------------------------

BELOW = ["embed_dim", "n_layers", "n_heads", "c_offline", "c_online", "updates", "batch_size", "warmup", "lr"]
BELOW += ["dataset_steps", "eval_episodes", "log_every", "kappa_initial", "threads"]
WRONG = [(name, 0) for name in BELOW] + [("lr", -0.001), ("threads", -1), ("seed", -1), ("kappa_lr", -1)]
WRONG += [("dropout", 1.5), ("dropout", -0.1), ("weight_decay", -1)]
WRONG += [("max_grad_norm", 0), ("max_grad_norm", -1)]  # below 0 it would turn the gradient round
WRONG += [("lr", "nan"), ("lr", "inf"), ("kappa_initial", "nan"), ("g_eval", "nan"), ("g_eval", "inf")]


@pytest.mark.parametrize("name, value", WRONG)
def test_a_value_that_cannot_work_is_refused_before_anything_is_written(name, value, refused, tmp_path):
    with refused(f"--{name.replace('_', '-')}", str(value)):
        run(*toy_flags(**{"run_dir": tmp_path / "run", name: value}))
    assert not (tmp_path / "run").exists()


def test_a_width_that_the_heads_do_not_divide_is_refused(refused, tmp_path):
    with refused("--embed-dim", "--n-heads"):
        run(*toy_flags(run_dir=tmp_path / "run", n_heads=3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--nonsense"], ["--updates", "many"]])
def test_flags_that_tyro_refuses_exit_with_1(flags):
    done = script(*flags)
    assert done.returncode == 1 and done.stdout == ""
    assert flags[0] in done.stderr and "Traceback" not in done.stderr


def test_random_data_too_short_for_an_episode_are_refused(refused, tmp_path):
    with refused("random"):
        run(*toy_flags(env_id="HalfCheetah-v5", dataset_steps=20, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("env_id", ["Nope-v5", "CartPole-v1"])
def test_an_unsuited_environment_is_refused_before_anything_is_written(env_id, refused, tmp_path):
    with refused(env_id):
        run(*toy_flags(env_id=env_id, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_command_prints_one_line_on_stderr_exits_with_1_and_writes_nothing():
    assert_one_line(script(*toy_flags(env_id="Nope-v5")), "Nope-v5")
    assert not list(Path.cwd().iterdir())


# ---- Runs and checkpoints -------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(older, refused):
    before = content_of(older)
    with refused(str(older), "--resume"):
        run(*toy_flags(run_dir=older, seed=2))
    assert content_of(older) == before


@pytest.mark.parametrize("flags", [["--eval-episodes", "0"], ["--threads", "-1"], ["--seed", "-1"]])
def test_evaluation_refuses_values_that_cannot_work(flags, older, refused):
    with refused(*flags):
        run("--eval-only", older / "checkpoint.pt", *flags)


@pytest.mark.parametrize("how", ["--eval-only", "--resume"])
def test_a_missing_checkpoint_is_named(how, refused, tmp_path):
    with refused(f"{tmp_path}/nowhere"):
        run(how, tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_refused_and_the_run_left_as_it_was(older, refused):
    path = older / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    before = content_of(older)
    for flags in (["--eval-only", path], ["--resume", older]):
        with refused(str(path.parent)):
            run(*flags)
    assert content_of(older) == before


def test_data_that_changed_since_the_run_began_are_refused(refused, tmp_path):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(40, 11)), rng.uniform(-1, 1, (40, 3))
        file["rewards"], file["terminals"] = rng.normal(size=40), np.arange(40) % 10 == 9
        file["timeouts"] = np.zeros(40, bool)
    folder = run(*toy_flags(dataset=tmp_path / "data.hdf5", run_dir=tmp_path / "run"))
    with h5py.File(tmp_path / "data.hdf5", "r+") as file:
        file["rewards"][7] += 0.5
    before = content_of(folder)
    with refused(f"{tmp_path}/data.hdf5", str(folder)):
        run("--resume", folder, "--updates", "6")
    assert content_of(folder) == before


# ---- Bad luck on the way --------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_a_line_and_keeps_the_last_checkpoint(refused, monkeypatch, tmp_path):
    real, calls = pretrain_dt.pretrain_loss, []

    def third_is_nan(*arguments):
        calls.append(1)
        loss, values = real(*arguments)
        return (loss * torch.nan, values | {"nll": values["nll"] * torch.nan}) if len(calls) == 3 else (loss, values)

    monkeypatch.setattr(pretrain_dt, "pretrain_loss", third_is_nan)
    with refused("loss"):
        run(*toy_flags(run_dir=tmp_path / "run"))
    assert_loads(tmp_path / "run", 2)
    monkeypatch.undo()
    assert_loads(run("--resume", tmp_path / "run"), 4)


def file_size_limit(size):
    """A full disk, as far as one process can have one: writing beyond `size` bytes of a file fails."""
    resource = pytest.importorskip("resource")
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_full_at_the_first_checkpoint_is_one_line_and_the_run_can_start_again(tmp_path):
    folder = tmp_path / "run"
    done = script(*toy_flags(run_dir=folder), preexec_fn=file_size_limit(20_000))
    assert_one_line(done, "File too large")
    assert re.search(r" [\d.]+ \\xb1 [\d.]+,", done.stdout)  # return 12.3 ± 4.5, where a terminal knows ASCII alone
    assert not {"checkpoint.pt", "checkpoint.tmp"} & set(content_of(folder))
    assert_loads(run(*toy_flags(run_dir=folder)), 4)


def test_a_disk_full_at_a_later_checkpoint_keeps_the_one_before_and_the_run_goes_on(older):
    before = (older / "checkpoint.pt").read_bytes()
    done = script("--resume", older, "--updates", 8, preexec_fn=file_size_limit(20_000))
    assert_one_line(done, "--resume")
    assert (older / "checkpoint.pt").read_bytes() == before
    assert "checkpoint.tmp" not in content_of(older)
    assert_loads(older, 4)
    assert_loads(run("--resume", older, "--updates", 8), 8)
    assert [line.split(",")[0] for line in (older / "metrics.csv").read_text().splitlines()[1:]] == list("24688")


def test_a_disk_full_under_tensorboards_feet_is_one_line_too(tmp_path):
    code = f"""if True:
        import runpy, sys, torch
        torch.save = lambda content, file: file.write(b"tiny")  # so that the events outgrow the checkpoint
        sys.argv[0] = {str(SCRIPT)!r}
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    flags = toy_flags(run_dir=tmp_path / "run", updates=20, log_every=1)
    assert_one_line(script(*flags, code=code, preexec_fn=file_size_limit(2000)), "File too large", "--resume")


def test_kill_9_halfway_through_a_checkpoint_leaves_the_one_before_whole(older):
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        import pretrain_dt
        path = Path(sys.argv[1])
        content = pretrain_dt.load_checkpoint(path) | dict(iteration=99)
        def half(path, content):
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        pretrain_dt.Path.write_bytes = half
        pretrain_dt.save_checkpoint(path, content)"""
    path = older / "checkpoint.pt"
    before = path.read_bytes()
    assert script(path, code=code).returncode == -signal.SIGKILL
    assert (older / "checkpoint.tmp").stat().st_size > len(before) // 3  # it did die in the middle
    assert path.read_bytes() == before
    assert_loads(run("--resume", older, "--updates", 6), 6)
    assert "checkpoint.tmp" not in content_of(older)


def heed_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the background jobs of a shell ignore it


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at what a process has loaded")
@pytest.mark.parametrize("name", ["pretrain_dt", *(pytest.param(n, marks=pytest.mark.slow) for n in FINETUNING)])
def test_ctrl_c_during_the_imports_is_no_traceback(name):
    command = [sys.executable, str(SCRIPT.with_name(f"{name}.py")), "--help"]
    with subprocess.Popen(command, preexec_fn=heed_ctrl_c, stdout=-1, stderr=-1, text=True) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # in the midst of them
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_ctrl_c_even_twice_ends_with_a_line_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-u", str(SCRIPT), *toy_flags(run_dir=folder, updates=100_000)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, preexec_fn=heed_ctrl_c, **pipes) as process:
        try:
            for line in process.stdout:
                if re.match(r" *4/100000 ", line):  # the checkpoint of update 2 is there
                    break
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert re.fullmatch(r"[^\n]*--resume RUN_DIR\n", errors), errors
    update = load_checkpoint(folder / "checkpoint.pt")["iteration"]
    assert update >= 2
    assert_loads(folder, update)
