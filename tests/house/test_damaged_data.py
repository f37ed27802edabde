"""Datasets that are damaged, or that moved: each loads right or ends in one line, and none takes memory by its word."""

import json
import shutil
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector.episode_buffer import EpisodeBuffer

import pretrain_dt
import q_guided_grpo_dt as q_guided
from pretrain_dt import Args, fingerprint, load_checkpoint, load_dataset, main, make_env, parse_args

NAMES = ("observations", "actions", "rewards", "terminals", "timeouts")
LENGTHS = [10, 10, 20, 20]
MINARI_ID = "test/hopper-v0"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, on datasets without author or permalink
FEW_OR_MANY = pytest.mark.parametrize("count", [60, pytest.param(2_000, marks=pytest.mark.slow)])


def arrays():
    """60 steps of Hopper's size: trajectories of LENGTHS, two that terminate and two that do not."""
    rng, steps = np.random.default_rng(0), np.arange(1, 61)
    fields = [rng.normal(size=(60, 11)).astype(np.float32), rng.uniform(-1, 1, (60, 3)).astype(np.float32)]
    fields += [rng.normal(size=60).astype(np.float32), np.isin(steps, [10, 40]), np.isin(steps, [20, 60])]
    return dict(zip(NAMES, fields))


def hdf5_file(path, **format):
    with h5py.File(path, "w", libver=format.pop("libver", None)) as file:
        for name, array in arrays().items():
            file.create_dataset(name, data=array, **format)
    return path


@pytest.fixture(scope="module")
def hopper():
    return make_env("Hopper-v5", {})


@pytest.fixture(scope="module")
def outcome(hopper):
    """outcome(dataset, named): the dataset if it loads, every value finite, else the one line, which names `named`."""

    def look(dataset, named):
        try:
            data = load_dataset(Args(dataset=str(dataset)), hopper)
        except SystemExit as stop:
            line = str(stop)
            assert line.startswith("error: ") and "\n" not in line and str(named) in line, line
            return line
        steps = data.lengths.sum()
        assert data.observations.shape == (steps, 11) and data.actions.shape == (steps, 3)
        assert data.rewards.shape == data.returns.shape == (steps,) and len(data.terminated) == len(data.lengths)
        assert all(np.isfinite(array).all() for array in data)
        return data

    return look


def damaged(content, rng):
    """A flipped bit, a few other bytes, eight in a row, or the end cut off."""
    content, kind = bytearray(content), rng.integers(4)
    if kind == 0:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    elif kind == 1:
        for place in rng.integers(len(content), size=10):
            content[place] = rng.integers(256)
    elif kind == 2:
        start = rng.integers(len(content) - 8)
        content[start : start + 8] = rng.bytes(8)
    else:
        content = content[: rng.integers(len(content))]
    return bytes(content)


# ---- HDF5 -----------------------------------------------------------------------------------------------------------


@FEW_OR_MANY
@pytest.mark.parametrize("format", [{}, {"compression": "gzip"}], ids=["plain", "gzip"])
def test_a_damaged_file_loads_or_ends_in_one_line(format, count, outcome, tmp_path):
    path, rng = hdf5_file(tmp_path / "data.hdf5", **format), np.random.default_rng(0)
    whole = path.read_bytes()
    assert outcome(path, path).lengths.tolist() == LENGTHS
    lines = 0
    for _ in range(count):
        path.write_bytes(damaged(whole, rng))
        lines += isinstance(outcome(path, path), str)
    assert 0.2 * count < lines < count  # both happen


@FEW_OR_MANY
def test_of_a_file_with_checksums_whatever_loads_is_right(count, outcome, tmp_path):
    path, rng = hdf5_file(tmp_path / "data.hdf5", libver="latest", fletcher32=True), np.random.default_rng(0)
    whole, right = path.read_bytes(), fingerprint(outcome(path, path))
    for _ in range(count):
        path.write_bytes(damaged(whole, rng))
        data = outcome(path, path)
        assert isinstance(data, str) or fingerprint(data) == right


def many_rows(file, name, array):
    """10^10 rows that were never written."""
    file.create_dataset(name, (10**10, *array.shape[1:]), array.dtype, chunks=(1000, *array.shape[1:]))


IN_PLACE = {
    "a link to nowhere": lambda file, name, array: file.__setitem__(name, h5py.SoftLink("/nowhere")),
    "a link in a circle": lambda file, name, array: file.__setitem__(name, h5py.SoftLink(f"/{name}")),
    "a link to a file that is gone": lambda file, name, array: file.__setitem__(name, h5py.ExternalLink("no.h5", name)),
    "a group": lambda file, name, array: file.create_group(name),
    "a type": lambda file, name, array: file.__setitem__(name, np.dtype("f4")),
    "an empty dataset": lambda file, name, array: file.__setitem__(name, h5py.Empty("f4")),
    "no rows": lambda file, name, array: file.__setitem__(name, array[:0]),
    "a row less": lambda file, name, array: file.__setitem__(name, array[:-1]),
    "a dimension more": lambda file, name, array: file.__setitem__(name, array[..., None]),
    "10^10 rows": many_rows,
    "text": lambda file, name, array: file.__setitem__(name, array.astype("S3")),
    "complex numbers": lambda file, name, array: file.__setitem__(name, array.astype(complex)),
    "NaN": lambda file, name, array: file.__setitem__(name, array * np.nan),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", IN_PLACE)
def test_what_stands_in_an_arrays_place_is_refused(what, name, outcome, tmp_path):
    path = hdf5_file(tmp_path / "data.hdf5")
    with h5py.File(path, "r+") as file:
        del file[name]
        IN_PLACE[what](file, name, arrays()[name])
    assert isinstance(outcome(path, path), str)


def test_a_file_that_declares_10_to_the_10_rows_in_all_arrays_is_refused_before_memory_is_taken(outcome, tmp_path):
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for name, array in arrays().items():
            many_rows(file, name, array)
    assert "10,000,000,000 steps" in outcome(tmp_path / "data.hdf5", tmp_path / "data.hdf5")


@pytest.mark.parametrize("dtype", ["f2", ">f8", "f8", "longdouble"])
def test_floats_of_other_widths_and_byte_order_load_right(dtype, outcome, tmp_path):
    path, right = hdf5_file(tmp_path / "data.hdf5"), arrays()["observations"]
    with h5py.File(path, "r+") as file:
        del file["observations"]
        file["observations"] = right.astype(dtype)
    np.testing.assert_array_equal(outcome(path, path).observations, right.astype(dtype).astype(np.float32))


# ---- Minari ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minari_set(tmp_path_factory):
    """The folder of a Minari dataset of three episodes of 20 steps: metadata.json, main_data.hdf5."""
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MINARI_DATASETS_PATH", str(root))
        rng, buffers = np.random.default_rng(0), []
        for i in range(3):
            flags = [[False] * 20, [False] * 19 + [True]]
            fields = [
                rng.normal(size=(21, 11)),
                rng.uniform(-1, 1, (20, 3)).astype(np.float32),
                list(rng.normal(size=20)),
            ]
            buffers.append(EpisodeBuffer(i, None, None, *fields, *flags))
        minari.create_dataset_from_buffers(MINARI_ID, buffers, env=gym.make("Hopper-v5"), data_format="hdf5")
    return root / MINARI_ID / "data"


@pytest.fixture
def copied(minari_set, tmp_path, monkeypatch):
    """A copy of it, to be damaged, where Minari looks."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return Path(shutil.copytree(minari_set, tmp_path / MINARI_ID / "data"))


@FEW_OR_MANY
@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_a_damaged_minari_dataset_loads_or_ends_in_one_line(name, count, outcome, copied):
    path, rng = copied / name, np.random.default_rng(0)
    whole = path.read_bytes()
    assert outcome(MINARI_ID, MINARI_ID).lengths.tolist() == [20, 20, 20]
    lines = 0
    for _ in range(count // 2):
        path.write_bytes(damaged(whole, rng))
        lines += isinstance(outcome(MINARI_ID, MINARI_ID), str)
    assert 0.1 * count < lines <= count // 2


def change_metadata(folder, **changed):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def change_episode(change):
    """change(episode), of the second episode."""

    def apply(folder):
        with h5py.File(folder / "main_data.hdf5", "r+") as file:
            change(file["episode_1"])

    return apply


def no_episode(folder):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        del file["episode_1"]


MINARI_DAMAGE = {
    "half a file": lambda folder: (folder / "main_data.hdf5").write_bytes(
        (folder / "main_data.hdf5").read_bytes()[: (folder / "main_data.hdf5").stat().st_size // 2]
    ),
    "a missing episode": no_episode,
    "fewer episodes than it says": lambda folder: change_metadata(folder, total_episodes=4),
    "more than it says": lambda folder: change_metadata(folder, total_episodes=2),
    "no episode": lambda folder: change_metadata(folder, total_episodes=0, total_steps=0),
    "no data": lambda folder: (folder / "main_data.hdf5").unlink(),
    "no metadata": lambda folder: (folder / "metadata.json").unlink(),
    "metadata of another kind": lambda folder: (folder / "metadata.json").write_text("[1]"),
    "no folder in it": shutil.rmtree,
    "no rewards": change_episode(lambda episode: episode.__delitem__("rewards")),
    "a group": change_episode(lambda episode: (episode.__delitem__("actions"), episode.create_group("actions"))),
    "a row less": change_episode(lambda episode: episode["actions"].resize(19, axis=0)),
    "a reward less": change_episode(lambda episode: episode["rewards"].resize(19, axis=0)),
    "an observation less": change_episode(lambda episode: episode["observations"].resize(20, axis=0)),
    "2^60 actions": change_episode(lambda episode: episode["actions"].resize(2**60, axis=0)),
}


@pytest.mark.parametrize("what", MINARI_DAMAGE)
def test_a_minari_dataset_that_is_not_whole_is_refused(what, outcome, copied):
    MINARI_DAMAGE[what](copied)
    assert isinstance(outcome(MINARI_ID, MINARI_ID), str)


def test_a_minari_dataset_cannot_have_its_own_code_run(outcome, copied, tmp_path, monkeypatch):
    """Minari makes the environment of a set that states no spaces."""
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    metadata = json.loads((copied / "metadata.json").read_text())
    del metadata["observation_space"]
    (copied / "metadata.json").write_text(json.dumps(metadata))
    assert outcome(MINARI_ID, MINARI_ID).lengths.tolist() == [20, 20, 20]  # gymnasium's own may be made
    spec = json.loads(metadata["env_spec"])
    wrapper = {"name": "Foreign", "entry_point": "foreign:Wrapper", "kwargs": {}}
    for changed in ({"entry_point": "foreign:Env"}, {"additional_wrappers": [wrapper]}):
        (copied / "metadata.json").write_text(
            json.dumps(metadata | {"env_spec": json.dumps(spec | changed, separators=(",", ":"))})
        )
        assert "foreign:" in outcome(MINARI_ID, MINARI_ID)
        assert not (tmp_path / "ran").exists()


# ---- data.npz -------------------------------------------------------------------------------------------------------


@FEW_OR_MANY
def test_of_damaged_data_for_the_critic_whatever_loads_is_right(count, outcome, tmp_path, refused):
    pretrain_dt.save_data(tmp_path / "data.npz", outcome(hdf5_file(tmp_path / "data.hdf5"), "data.hdf5"))
    args, rng = q_guided.Args(pretrained=str(tmp_path), c_online=1), np.random.default_rng(0)
    whole, lines = (tmp_path / "data.npz").read_bytes(), 0
    _, right = q_guided.read_data({}, args)
    for _ in range(count):
        (tmp_path / "data.npz").write_bytes(damaged(whole, rng))
        try:
            assert q_guided.read_data({}, args)[1] == right  # its checksums are looked at
        except SystemExit as stop:
            assert "data.npz is damaged" in str(stop) and "\n" not in str(stop)
            lines += 1
    assert 0.5 * count < lines < count
    (tmp_path / "data.npz").unlink()
    with refused("data.npz", "--save-data", "--data"):
        q_guided.read_data({}, args)


# ---- Data that moved ------------------------------------------------------------------------------------------------

TOY = dict(embed_dim=16, n_layers=1, n_heads=1, batch_size=8, log_every=2, eval_episodes=1, threads=1, cuda=False)


def test_a_run_whose_data_moved_goes_on_by_their_new_path_as_if_they_had_not(tmp_path, refused):
    old, new = hdf5_file(tmp_path / "old.hdf5"), tmp_path / "new.hdf5"
    whole = main(Args(**TOY, dataset=str(old), updates=4, warmup=2, run_dir=str(tmp_path / "whole")))
    run_dir = main(Args(**TOY, dataset=str(old), updates=2, warmup=2, run_dir=str(tmp_path / "run")))
    old.rename(new)
    flags = ["--resume", str(run_dir), "--updates", "4"]
    with refused(str(old), "--dataset"):
        main(parse_args(flags))
    with h5py.File(hdf5_file(tmp_path / "other.hdf5"), "r+") as other:
        other["rewards"][7] += 0.5
    with refused("other.hdf5", "--dataset"):
        main(parse_args([*flags, "--dataset", str(tmp_path / "other.hdf5")]))
    assert load_checkpoint(run_dir)["iteration"] == 2
    main(parse_args([*flags, "--dataset", str(new)]))
    ours, theirs = load_checkpoint(run_dir), load_checkpoint(whole)
    assert all(torch.equal(ours["weights"][name], theirs["weights"][name]) for name in theirs["weights"])
    assert ours["dataset"] == ours["args"]["dataset"] == str(new) and ours["dataset_kind"] == theirs["dataset_kind"]
    args = pretrain_dt.parse_args(["--resume", str(run_dir)])
    assert args.dataset == str(new)  # from here on
