"""Faults found from outside: foreign folders and checkpoints, empty flags, automatic pretraining broken off."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch

import grpo_dt_continuous as grpo
import ppo_dt_continuous as ppo
import pretrain_dt
import q_guided_grpo_dt as q_guided

FINETUNING = pytest.mark.parametrize("script", [grpo, ppo, q_guided], ids=lambda script: script.__name__)
SCRIPTS = pytest.mark.parametrize("script", [grpo, ppo, q_guided, pretrain_dt], ids=lambda script: script.__name__)


@pytest.fixture(autouse=True)
def here(elsewhere, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checkpoint(path: Path, **changes) -> Path:
    """A pretrained network for Hopper, as pretrain_dt.py describes it, with `changes`."""
    model = grpo.DecisionTransformer(11, 3, embed_dim=16, n_layers=2, n_heads=2)
    sizes = dict(obs_dim=11, act_dim=3, embed_dim=16, n_layers=2, n_heads=2, kind="dt")
    content = dict(script="pretrain_dt", iteration=4, sizes=sizes, weights=model.state_dict(), args={})
    content |= dict(env_id="Hopper-v5", env_kwargs={}, dataset="random", dataset_kind="random")
    content |= dict(dataset_best_return=10.0, g_eval=3600.0, c_online=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | changes, path)
    return path


# ---- Flags ----------------------------------------------------------------------------------------------------------


@FINETUNING
@pytest.mark.parametrize("flag", ["pretrained", "resume", "eval_only", "run_dir"])
def test_an_empty_flag_is_refused_before_anything_is_made(script, flag, tmp_path, refused):
    with refused(f"--{flag.replace('_', '-')}"):
        script.main(script.Args(**{flag: ""}))
    assert list(tmp_path.iterdir()) == []


@FINETUNING
def test_a_discount_above_1_is_refused(script, refused):
    with refused("--gamma", "1.01"):
        script.check_args(script.Args(gamma=1.01))
    script.check_args(script.Args(gamma=1.0))


@SCRIPTS
def test_more_threads_or_workers_than_the_machine_could_use_are_refused(script, refused):
    most = 8 * os.cpu_count()
    for name in ("threads", "workers") if script is grpo else ("threads",):
        script.check_args(script.Args(**{name: most}))
        with refused(f"--{name}", str(most)):
            script.check_args(script.Args(**{name: most + 1}))


# ---- What is not there ----------------------------------------------------------------------------------------------


@SCRIPTS
def test_no_module_of_posix_alone_is_needed(script, tmp_path, monkeypatch):
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    spec = importlib.util.spec_from_file_location("script_without_posix", script.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    args = again.Args(env_id="module:Own/Task-v0")
    folder = again.choose_run_dir(args)
    assert not set(folder.name) & set(':/\\<>"|?*')
    again.claim(folder, args).close()
    assert (folder / ".lock").exists()


@SCRIPTS
@pytest.mark.parametrize("flag, package", [("track", "wandb"), ("capture_video", "moviepy")])
def test_a_mere_folder_of_a_packages_name_is_not_that_package(script, flag, package, tmp_path, refused, monkeypatch):
    (tmp_path / package).mkdir()  # as wandb leaves one where it has run
    monkeypatch.syspath_prepend(tmp_path)
    with refused(f"--{flag.replace('_', '-')}", f"pip install {package}"):
        script.check_args(script.Args(**{flag: True}))


@SCRIPTS
def test_tracking_without_a_login_is_one_line(script, tmp_path, refused, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty).\ncall wandb.login(key=[your_api_key])")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with refused("--track", "api_key not configured", "wandb login"):
        script.Log(tmp_path / "run", script.Args(track=True, threads=1), 1, [])
    script.choose_run_dir(script.Args(run_dir="run"))  # may begin again


# ---- Run folders ----------------------------------------------------------------------------------------------------


@SCRIPTS
@pytest.mark.parametrize("name", ["metrics.csv", "args.json", "checkpoint.pt"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(script, name, tmp_path, refused):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / name).write_text("mine")
    with refused("--run-dir"):
        script.choose_run_dir(script.Args(run_dir="notes"))
    assert (tmp_path / "notes" / name).read_text() == "mine"


@SCRIPTS
def test_a_file_is_no_folder(script, tmp_path, refused):
    (tmp_path / "notes.txt").write_text("mine")
    with refused("notes.txt"):
        script.choose_run_dir(script.Args(run_dir="notes.txt"))


@SCRIPTS
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(script, tmp_path, refused, monkeypatch):
    (tmp_path / "locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    with refused(f"{tmp_path}/locked", "--run-dir"):
        script.choose_run_dir(script.Args(run_dir="locked/deeper/run"))
    assert script.choose_run_dir(script.Args(run_dir="run")) == Path("run")


@SCRIPTS
def test_a_run_that_broke_off_before_its_first_checkpoint_may_begin_again(script, tmp_path):
    for name in (".lock", "metrics.csv", "args.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
    assert script.choose_run_dir(script.Args(run_dir="run")) == Path("run")


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

IMPOSSIBLE = [{"n_heads": 0}, {"n_heads": -4}, {"n_heads": 3}, {"n_layers": 10**7}, {"obs_dim": 10**12}]
IMPOSSIBLE += [{"embed_dim": 10**9}, {"embed_dim": "16"}, {"n_layers": 1}, {"unknown": 1}]


@SCRIPTS
@pytest.mark.parametrize("wrong", IMPOSSIBLE, ids=str)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(script, wrong, tmp_path, refused):
    content = torch.load(checkpoint(tmp_path / "checkpoint.pt"), weights_only=True)
    content["sizes"] |= wrong
    with refused("sizes"):
        script.load_model(content, torch.device("cpu"), bf16=False)


@SCRIPTS
@pytest.mark.parametrize("wrong", [{"env_kwargs": [1]}, {"sizes": "large"}, {"env_kwargs": None}], ids=str)
def test_entries_of_another_type_are_refused(script, wrong, tmp_path, refused):
    with refused("checkpoint.pt"):
        script.load_checkpoint(checkpoint(tmp_path / "checkpoint.pt", **wrong))


@SCRIPTS
def test_a_flipped_bit_is_refused(script, tmp_path, refused):
    path = checkpoint(tmp_path / "checkpoint.pt")
    script.load_checkpoint(path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200] ^= 4  # amid the weights
    path.write_bytes(content)
    with refused("checkpoint.pt"):
        script.load_checkpoint(path)


@SCRIPTS
def test_a_compressed_checkpoint_is_refused_unread(script, tmp_path, refused):
    """A megabyte of it might be gigabytes of zeros."""
    path = checkpoint(tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(path) as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with refused("packed.pt"):
        script.load_checkpoint(tmp_path / "packed.pt")


# ---- Automatic pretraining ------------------------------------------------------------------------------------------

# Stands for pretrain_dt.py: writes where it is told to, after some time
STAND_IN = """
import shutil, sys, time
from pathlib import Path

words = sys.argv[1:]
resumed = "--resume" in words
folder = Path(words[words.index("--resume" if resumed else "--run-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "calls.txt", "a") as calls:
    calls.write("resume " if resumed else "begin ")
time.sleep({seconds})
shutil.copy({path!r}, folder / "checkpoint.pt")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(seconds): pretraining that takes so long; gives the script's copy beside it."""

    def make(script, seconds=0.0):
        path = checkpoint(tmp_path / "made" / "checkpoint.pt", iteration=900)
        folder = tmp_path / "scripts"
        folder.mkdir(exist_ok=True)
        copy = folder / Path(script.__file__).name
        copy.write_text(Path(script.__file__).read_text())
        (folder / "pretrain_dt.py").write_text(STAND_IN.format(seconds=seconds, path=str(path)))
        monkeypatch.setattr(script, "__file__", str(copy))
        return copy

    return make


def calls(tmp_path):
    return (tmp_path / "runs" / "pretrained" / "calls.txt").read_text().split()


@FINETUNING
def test_pretraining_is_done_once_for_all_runs_of_a_recipe(script, stand_in, tmp_path):
    stand_in(script)
    first = script.pretrained_on_random(script.Args(embed_dim=16))
    assert script.pretrained_on_random(script.Args(embed_dim=16)) == first
    assert script.pretrained_on_random(script.Args(embed_dim=16, seed=2)) != first
    assert calls(tmp_path) == ["begin", "begin"]


@FINETUNING
def test_pretraining_that_was_broken_off_is_gone_on_with(script, stand_in, tmp_path):
    stand_in(script)
    args = script.Args(embed_dim=16)
    target = script.pretrained_on_random(args)
    checkpoint(target / "checkpoint.pt", iteration=300)
    assert script.pretrained_on_random(args) == target
    assert script.load_checkpoint(target)["iteration"] == 900 and calls(tmp_path) == ["begin", "resume"]


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
@FINETUNING
def test_where_its_parent_was_killed_the_next_run_waits_for_the_child_and_takes_what_it_made(
    script, stand_in, tmp_path
):
    copy = stand_in(script, seconds=3.0)
    code = f"import {script.__name__} as script; script.pretrained_on_random(script.Args(embed_dim=16))"
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(copy.parent)})
    while not list(tmp_path.glob("runs/pretrained/calls.txt")):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    target = script.pretrained_on_random(script.Args(embed_dim=16))
    assert script.load_checkpoint(target)["iteration"] == 900 and calls(tmp_path) == ["begin"]


@FINETUNING
def test_pretraining_that_fails_is_one_line_its_own_and_leaves_no_folder(script, stand_in, tmp_path, capfd):
    copy = stand_in(script)
    copy.with_name("pretrain_dt.py").write_text("raise SystemExit('error: no such task')")
    with pytest.raises(SystemExit) as stop:
        script.pretrained_on_random(script.Args(embed_dim=16))
    assert (stop.value.code, capfd.readouterr().err) == (1, "error: no such task\n")
    assert not any(path.is_dir() for path in (tmp_path / "runs" / "pretrained").iterdir())


@FINETUNING
def test_pretraining_that_is_killed_is_one_line(script, stand_in, refused):
    copy = stand_in(script)
    copy.with_name("pretrain_dt.py").write_text("import os\nos.kill(os.getpid(), 9)")
    with refused("--pretrained"):
        script.pretrained_on_random(script.Args(embed_dim=16))
