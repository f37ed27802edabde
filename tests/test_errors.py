"""Bad input and bad luck: one line that says what to do, exit code 1, no traceback, and older results stay whole."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import pretrain_dt
from pretrain_dt import load_checkpoint, load_model, main, parse_args

SCRIPT = Path(pretrain_dt.__file__).resolve()
TOY = dict(embed_dim=16, n_layers=2, n_heads=2, batch_size=8, dataset_steps=300, updates=4, log_every=2)
TOY |= dict(eval_episodes=1, threads=1, device="cpu")


def toy_flags(**changed):
    """TOY as a command line, with fields changed, or left out where they are None."""
    fields = {name: value for name, value in (TOY | changed).items() if value is not None}
    return [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run(*arguments):
    """What the command line does, in this process."""
    args = parse_args([str(argument) for argument in arguments])
    return pretrain_dt.eval_only(args) if args.eval_only else main(args)


def refused(match):
    """The block ends with `error: ...` on one line, which Python prints on stderr with exit code 1."""
    return pytest.raises(SystemExit, match=rf"\Aerror: [^\n]*{match}[^\n]*\Z")


def script(*arguments, code=None, **kwargs):
    """The command in a process of its own. code: Python that stands in for the script."""
    command = [sys.executable, *(["-c", code] if code else [str(SCRIPT)]), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, **kwargs)


def assert_one_line(done, match):
    """Exit code 1, and on stderr one line that matches and nothing else."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert re.fullmatch(rf"error: [^\n]*{match}[^\n]*\n", done.stderr), done.stderr


def content_of(folder):
    """All files of a folder with their bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What a run would drop into the current folder does not land in the repository."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 4 updates, not to be changed."""
    return run(*toy_flags(run_dir=tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def older(finished, tmp_path):
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "older"))


def assert_loads(folder, update):
    content = load_checkpoint(folder / "checkpoint.pt")
    assert content["iteration"] == update
    assert all(p.isfinite().all() for p in load_model(content).parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------


class Spaces(gym.Env):
    """An environment that has nothing but spaces."""

    def __init__(self, observations, actions):
        self.observation_space, self.action_space = observations, actions


def box(*shape, bound=np.inf):
    return gym.spaces.Box(-bound, bound, shape, np.float32)


GOALS = dict(achieved_goal=box(2), observation=box(4), desired_goal=box(2))
UNSUITED = {  # name: observations, actions, what the line says
    "Images": (box(8, 8, 3), box(2, bound=1.0), r"observations Box.*8, 8, 3.*must be flat Boxes"),
    "Tiles": (gym.spaces.Discrete(5), box(2, bound=1.0), r"observations Discrete\(5\)"),
    "Unbounded": (box(3), box(2), "unbounded actions Box"),
    "HalfBounded": (box(3), gym.spaces.Box(0.0, np.inf, (2,), np.float32), "unbounded actions Box"),
    "ActionGrid": (box(3), box(2, 2, bound=1.0), "actions Box.*must be flat Boxes"),
    "ManyBounds": (box(3), gym.spaces.Box(np.arange(40, dtype="f"), np.full(40, np.inf, "f")), "unbounded actions Box"),
    "OtherKeys": (gym.spaces.Dict(camera=box(2), joints=box(3)), box(2, bound=1.0), "Dict.*camera.*flat Boxes"),
    "GoalImages": (
        gym.spaces.Dict(GOALS | {"observation": box(4, 4)}),
        box(2, bound=1.0),
        "observations Dict.*must be flat Boxes",
    ),
}


@pytest.mark.parametrize("name", UNSUITED)
def test_unsuited_spaces_are_refused_before_anything_is_written(name, tmp_path):
    observations, actions, match = UNSUITED[name]
    gym.register(f"{name}-v0", lambda **kwargs: Spaces(observations, actions))
    try:
        with refused(f"{name}-v0 has .*{match}"):
            run(*toy_flags(env_id=f"{name}-v0", run_dir=tmp_path / "run"))
    finally:
        del gym.registry[f"{name}-v0"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "env_id, match",
    [
        ("Nope-v5", "cannot make the environment Nope-v5: .*Name one such as Hopper-v5"),
        ("Hopper-v99", "cannot make the environment Hopper-v99"),
        ("Hopper-v3", "cannot make the environment Hopper-v3"),
        ("no_such_package:Env-v0", "cannot make the environment no_such_package:Env-v0"),
        ("ns/Nope-v0", "cannot make the environment ns/Nope-v0"),
        ("", "cannot make the environment"),
        ("CartPole-v1", r"CartPole-v1 has actions Discrete\(2\) .*must be flat Boxes"),
    ],
)
def test_unknown_and_discrete_environments_are_refused_before_anything_is_written(env_id, match, tmp_path):
    with refused(match):
        run(*toy_flags(env_id=env_id, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_environment_whose_making_fails_is_one_line(tmp_path):
    def broken(**kwargs):
        raise AssertionError("joint 7 has\nthe wrong shape")

    gym.register("Broken-v0", broken)
    try:
        with refused("cannot make the environment Broken-v0: joint 7 has"):
            run(*toy_flags(env_id="Broken-v0", run_dir=tmp_path / "run"))
    finally:
        del gym.registry["Broken-v0"]


def test_the_command_prints_one_line_on_stderr_exits_with_1_and_writes_nothing():
    assert_one_line(script(*toy_flags(env_id="Nope-v5")), "cannot make the environment Nope-v5")
    assert not list(Path.cwd().iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Values and flags
# ---------------------------------------------------------------------------------------------------------------------

BELOW = ["embed_dim", "n_layers", "n_heads", "c_offline", "c_online", "updates", "batch_size", "warmup", "lr"]
BELOW += ["dataset_steps", "eval_episodes", "log_every", "kappa_initial", "threads"]


WRONG = [(name, 0) for name in BELOW] + [("lr", -0.001), ("threads", -1), ("seed", -1), ("kappa_lr", -1)]
WRONG += [("dropout", 1.0), ("dropout", -0.1), ("expectile", 0.0), ("expectile", 1.0), ("weight_decay", -1)]
WRONG += [("max_grad_norm", 0), ("max_grad_norm", -1)]  # below 0 it would turn the gradient round
WRONG += [("lr", "nan"), ("lr", "inf"), ("kappa_initial", "nan"), ("g_eval", "nan"), ("g_eval", "inf")]


@pytest.mark.parametrize("name, value", WRONG)
def test_a_value_that_cannot_work_is_refused_before_anything_is_written(name, value, tmp_path):
    with refused(f"--{name.replace('_', '-')} is {value}[.0]*: give"):
        run(*toy_flags(**{"run_dir": tmp_path / "run", name: value}))
    assert not (tmp_path / "run").exists()


def test_a_width_that_the_heads_do_not_divide_is_refused_with_both_numbers(tmp_path):
    with refused("--embed-dim 16 is not a multiple of --n-heads 3"):
        run(*toy_flags(run_dir=tmp_path / "run", n_heads=3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--nonsense"], ["--updates", "many"], ["--model", "gpt"], ["--seed"]])
def test_flags_that_tyro_refuses_exit_with_1(flags):
    done = script(*flags)
    assert done.returncode == 1 and done.stdout == ""
    assert flags[0] in done.stderr and "Traceback" not in done.stderr


def test_help_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0 and "--env-id" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(older, tmp_path):
    for flags in (toy_flags(device="cuda", run_dir=tmp_path / "run"), ["--eval-only", older / "checkpoint.pt"]):
        with refused("--device cuda, but torch sees no GPU: use --device cpu"):
            run(*flags, "--device", "cuda")
    assert not (tmp_path / "run").exists()


def test_tracking_without_wandb_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    with refused("wandb"):
        run(*toy_flags(run_dir=tmp_path / "run"), "--track")
    assert not (tmp_path / "run").exists()


def test_random_data_too_short_for_an_episode_are_refused(tmp_path):
    with refused("random has no finished trajectory"):
        run(*toy_flags(env_id="HalfCheetah-v5", dataset_steps=20, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Runs and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(older):
    before = content_of(older)
    with refused(f"{older} holds a run already: go on with --resume {older}, or choose another --run-dir"):
        run(*toy_flags(run_dir=older, seed=2))
    assert content_of(older) == before


def test_a_checkpoint_of_another_environment_is_refused_with_both_names(older):
    with refused("made with --env-id Hopper-v5, not Ant-v4"):
        run("--eval-only", older / "checkpoint.pt", "--env-id", "Ant-v4")
    with refused("made with --env-id Hopper-v5, not Ant-v4"):
        run("--resume", older, "--env-id", "Ant-v4")


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--seed", "3"], "made with --seed 1, not 3: leave --seed out"),
        (["--lr", "0.5"], "made with --lr 0.0001, not 0.5: leave --lr out"),
        (["--threads", "2"], "made with --threads 1, not 2"),
        (["--updates", "3"], "is at update 4 already: give --updates 4 or more"),
    ],
)
def test_resuming_refuses_what_may_not_change_and_leaves_the_run_as_it_was(older, flags, match):
    before = content_of(older)
    with refused(match):
        run("--resume", older, *flags)
    assert content_of(older) == before


@pytest.mark.parametrize(
    "flags", [["--eval-episodes", "0"], ["--c-online", "0"], ["--threads", "-1"], ["--seed", "-1"]]
)
def test_evaluation_refuses_values_that_cannot_work(older, flags):
    with refused(f"{flags[0]} is {flags[1]}"):
        run("--eval-only", older / "checkpoint.pt", *flags)


@pytest.mark.parametrize("how", ["--eval-only", "--resume"])
def test_a_missing_checkpoint_is_named(how, tmp_path):
    with refused(f"checkpoint {tmp_path}/nowhere.* not found"):
        run(how, tmp_path / "nowhere")


def test_a_run_is_evaluated_by_its_folder_as_by_its_checkpoint(older, capsys):
    run("--eval-only", older)
    by_folder = capsys.readouterr().out
    run("--eval-only", older / "checkpoint.pt")
    assert by_folder.startswith("evaluation: ") and capsys.readouterr().out == by_folder


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "text": b"no checkpoint"}[how])


@pytest.mark.parametrize("damaged", ["half", "empty", "text"])
def test_a_damaged_checkpoint_is_refused_and_the_run_left_as_it_was(older, damaged):
    damage(older / "checkpoint.pt", damaged)
    before = content_of(older)
    for flags in (["--eval-only", older / "checkpoint.pt"], ["--resume", older]):
        with refused(f"{older}/checkpoint.pt is damaged"):
            run(*flags)
    assert content_of(older) == before


FOREIGN = {
    "weights alone": lambda content: content["weights"],
    "list": lambda content: [1, 2],
    "number": lambda content: 3,
    "tensor": lambda content: torch.zeros(3),
    "no evaluation settings": lambda content: {k: content[k] for k in ("sizes", "weights", "args", "env_id")},
    "a tensor short": lambda content: content | {"weights": dict(list(content["weights"].items())[1:])},
    "other sizes": lambda content: content | {"sizes": content["sizes"] | {"embed_dim": 32}},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_is_refused(older, kind):
    path = older / "checkpoint.pt"
    torch.save(FOREIGN[kind](load_checkpoint(path)), path)
    with refused("checkpoint"):
        run("--eval-only", path)


def test_resuming_the_run_of_another_script_is_refused(older):
    path = older / "checkpoint.pt"
    content = load_checkpoint(path)
    kept = {key: content[key] for key in content if key not in ("rows", "learner", "fingerprint", "precision")}
    torch.save(kept | {"script": "grpo_dt_continuous"}, path)
    with refused("grpo_dt_continuous"):
        run("--resume", older)


def test_resuming_in_another_precision_is_refused(older):
    path = older / "checkpoint.pt"
    torch.save(load_checkpoint(path) | {"precision": "torch.float16"}, path)
    with refused(f"{older} began in torch.float16, .*torch.(float32|bfloat16)"):
        run("--resume", older, "--updates", "6")


def test_data_that_changed_since_the_run_began_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(40, 11)), rng.uniform(-1, 1, (40, 3))
        file["rewards"], file["terminals"] = rng.normal(size=40), np.arange(40) % 10 == 9
        file["timeouts"] = np.zeros(40, bool)
    folder = run(*toy_flags(dataset=tmp_path / "data.hdf5", run_dir=tmp_path / "run"))
    with h5py.File(tmp_path / "data.hdf5", "r+") as file:
        file["rewards"][7] += 0.5
    before = content_of(folder)
    with refused(f"the data in {tmp_path}/data.hdf5 changed since {folder} began"):
        run("--resume", folder, "--updates", "6")
    assert content_of(folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# Bad luck on the way
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_a_line_and_keeps_the_last_checkpoint(monkeypatch, tmp_path):
    real, calls = pretrain_dt.pretrain_loss, []

    def third_is_nan(*arguments):
        calls.append(1)
        loss, values = real(*arguments)
        return (loss * torch.nan, values | {"nll": values["nll"] * torch.nan}) if len(calls) == 3 else (loss, values)

    monkeypatch.setattr(pretrain_dt, "pretrain_loss", third_is_nan)
    with refused("the loss is not finite at update 4 .*lower --lr; the last checkpoint is kept"):
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
    assert_one_line(done, f"cannot write {folder}/checkpoint.pt: File too large; .*Make room")
    assert not {"checkpoint.pt", "checkpoint.tmp"} & set(content_of(folder))
    assert_loads(run(*toy_flags(run_dir=folder)), 4)


def test_a_disk_full_at_a_later_checkpoint_keeps_the_one_before_and_the_run_goes_on(older):
    before = (older / "checkpoint.pt").read_bytes()
    done = script("--resume", older, "--updates", 8, preexec_fn=file_size_limit(20_000))
    assert_one_line(done, f"cannot write {older}/checkpoint.pt: .* before is kept")
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
    assert_one_line(script(*flags, code=code, preexec_fn=file_size_limit(2000)), "File too large.*--resume RUN_DIR")


KILLED = {  # where in save_checkpoint the process is killed
    "halfway through the file": """
        def half(path, content):
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
            die()
        pretrain_dt.Path.write_bytes = half""",
    "before the renaming": """
        pretrain_dt.os.replace = lambda *arguments: die()""",
}


@pytest.mark.parametrize("where", KILLED)
def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before_whole(older, where):
    code = f"""if True:
        import os, signal, sys
        from pathlib import Path
        import pretrain_dt
        path = Path(sys.argv[1])
        content = pretrain_dt.load_checkpoint(path) | dict(iteration=99)
        die = lambda: os.kill(os.getpid(), signal.SIGKILL){KILLED[where]}
        pretrain_dt.save_checkpoint(path, content)"""
    path = older / "checkpoint.pt"
    before = path.read_bytes()
    assert script(path, code=code).returncode == -signal.SIGKILL
    assert (older / "checkpoint.tmp").stat().st_size > len(before) // 3  # it did die in the middle
    assert path.read_bytes() == before
    assert_loads(run("--resume", older, "--updates", 6), 6)
    assert "checkpoint.tmp" not in content_of(older)


def test_ctrl_c_ends_with_a_line_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-u", str(SCRIPT), *toy_flags(run_dir=folder, updates=100_000)]

    def heed_ctrl_c():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the background jobs of a shell ignore it

    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, preexec_fn=heed_ctrl_c, **pipes) as process:
        try:
            for line in process.stdout:
                if line.startswith("update 4/"):  # the checkpoint of update 2 is there
                    break
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert re.fullmatch(r"stopped: [^\n]*--resume RUN_DIR\n", errors), errors
    update = load_checkpoint(folder / "checkpoint.pt")["iteration"]
    assert update >= 2
    with refused("already: give --updates"):
        run("--resume", folder, "--updates", 1)
    assert_loads(folder, update)
