"""What keeps the repository honest: twins that are equal, arguments that are read, docs that say what the code does."""

import ast
import csv
import fnmatch
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["grpo_dt_continuous", "ppo_dt_continuous", "q_guided_grpo_dt", "pretrain_dt"]
SCRIPTS = [ROOT / f"{name}.py" for name in NAMES]
SCRIPT_NAMES = "*_dt*.py"  # what git tracks at the top beside ALLOWED
ALLOWED = ("benchmark", "docs", "tests", "requirements.txt", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff")
ALLOWED += ("CHANGELOG.md", "CONTRIBUTING.md")

OWN = {"Args", "main", "ROWS", "COLUMNS", "SMALL"}  # every script has its own
# Parts of fields of the same name that may differ between scripts, each with its reason.
MAY_DIFFER = {
    ("env_id", "comment"): "what can be reset to a state is less than what can be played",
    ("pretrained", "comment"): "Q-guided GRPO-DT also needs the data that pretraining keeps on --save-data",
    ("dataset_kind", "comment"): "pretraining reads it off the dataset's name, finetuning from the checkpoint",
    ("embed_dim", "comment"): "where --pretrained is given, that decides",
    ("g_eval", "comment"): "pretraining's is the row's",
    ("c_online", "comment"): "beside c_offline in pretraining",
    ("kappa_initial", "type"): "one value in pretraining, one per row of the paper's tables in finetuning",
    ("kappa_initial", "default"): "as above",
    ("lr", "comment"): "the paper's lr_policy in finetuning",
    ("eval_every", "default"): "an evaluation costs little beside an iteration of GRPO-DT, much beside the others",
    ("iterations", "comment"): "each names its own algorithm",
    ("n_trajectories", "comment"): "K_PPO in Algorithm 2",
}

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def docs_page(script: Path) -> str:
    return read(ROOT / "docs" / f"{script.stem.removesuffix('_continuous')}.md")


def pages() -> list[Path]:
    """README.md, required, and the pages in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# ---- Same name, same text -------------------------------------------------------------------------------------------


def definitions(source: str) -> dict[str, str]:
    """Text of the classes, functions and constants at a module's top level that scripts share, by name; with the
    comment that stands above each."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            name, first = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target), node.lineno
        elif isinstance(node, ast.AugAssign):
            name, first = f"{ast.unparse(node.target)} +=", node.lineno
            name += " again" * (name in found)
        else:
            continue
        while lines[first - 2].startswith("# ") and not lines[first - 2].startswith("# --"):
            first -= 1
        if name.split(" ")[0] not in OWN:
            found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


class Field(NamedTuple):
    type: str
    default: str
    comment: str | None


def comments_of(source: str) -> dict[int, str]:
    """The comments of a source, by line."""
    tokens = tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def args_fields(source: str) -> dict[str, Field]:
    """The fields of a script's Args: type, default, and the comment in its line."""
    comments = comments_of(source)
    (args,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return {
        node.target.id: Field(ast.unparse(node.annotation), ast.unparse(node.value), comments.get(node.end_lineno))
        for node in fields
    }


@pytest.mark.parametrize("one, other", itertools.combinations(NAMES, 2))
def test_what_two_scripts_have_under_the_same_name_is_the_same_text(one, other):
    left, right = (definitions(read(ROOT / f"{name}.py")) for name in (one, other))
    shared = left.keys() & right.keys()
    assert len(shared) > 20
    for name in sorted(shared):
        if left[name] != right[name]:
            pytest.fail(f"{name} differs between {one} and {other}: copy the change to the twin, or rename it")


@pytest.mark.parametrize("one, other", itertools.combinations(NAMES, 2))
def test_flags_of_the_same_name_have_the_same_type_default_and_comment(one, other):
    left, right = (args_fields(read(ROOT / f"{name}.py")) for name in (one, other))
    for name, part in itertools.product(left.keys() & right.keys(), Field._fields):
        if getattr(left[name], part) != getattr(right[name], part) and (name, part) not in MAY_DIFFER:
            pytest.fail(
                f"{part} of {name} differs between {one} and {other}: copy the change to the twin, or rename it"
            )


def test_exceptions_name_fields_that_exist():
    fields = {name for script in SCRIPTS for name in args_fields(read(script))}
    assert {name for name, _ in MAY_DIFFER} <= fields
    assert {part for _, part in MAY_DIFFER} <= set(Field._fields)


# ---- Arguments ------------------------------------------------------------------------------------------------------


def unread_fields(source: str) -> set[str]:
    """Fields of Args that nothing reads: neither args.NAME, nor "NAME" in a function that calls getattr(args, ...).

    Filling a field from a table (fill_from_table, fill_from_row) and checking its range (check_args) is no use of it.
    """
    used = set()
    for part in ast.parse(source).body:
        if getattr(part, "name", None) in ("Args", "fill_from_table", "fill_from_row", "check_args"):
            continue
        nodes = list(ast.walk(part))
        calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"]
        by_name = any(ast.unparse(call.args[0]) in ("args", "self.args") for call in calls)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if ast.unparse(node.value) in ("args", "self.args", "arguments"):
                    used.add(node.attr)
            elif by_name and isinstance(node, ast.Constant):
                used.add(node.value)
    return set(args_fields(source)) - used


def test_unread_fields_are_found():
    source = (
        "class Args:\n    seed: int = 1\n    lr: float = 0.1\n    resume: str = ''\ndef main(args): return args.seed\n"
    )
    assert unread_fields(source) == {"lr", "resume"}
    assert unread_fields(source + "def f(self): print(self.args.lr)") == {"resume"}
    assert unread_fields(source + "def f(args): args.lr = args.resume") == {"lr"}  # written is not read
    assert unread_fields(source + "def f(args): return [getattr(args, name) for name in ('lr', 'resume')]") == set()
    assert unread_fields(source + "def check_args(args): assert args.lr > 0") == {"lr", "resume"}


@each_script
def test_every_argument_has_a_comment_and_is_read(script):
    fields = args_fields(read(script))
    assert len(fields) > 10
    assert [name for name, field in fields.items() if not field.comment] == []
    assert unread_fields(read(script)) == set()


@each_script
def test_help_shows_the_comment_and_the_default_of_every_field(script):
    env = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = " ".join(re.sub(r"[^\x20-\x7e]", " ", done.stdout).split())
    for name, field in args_fields(read(script)).items():
        comment = " ".join(field.comment.split())
        assert f" --{name.replace('_', '-')}" in shown and comment in shown, name
        default = str(ast.literal_eval(field.default))
        after = shown.split(comment, 1)[1]
        assert after.startswith(f" (default: {default}"), (name, after[:40])


# ---- The rooms of a script ------------------------------------------------------------------------------------------


@each_script
def test_importing_a_script_does_nothing(script, tmp_path):
    command = [sys.executable, "-B", "-c", f"import {script.stem}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@each_script
def test_the_rooms_stand_in_order(script):
    found = re.findall(r"^# ---- (\d+)\. (.+?) -+$", read(script), re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(2, 2 + len(found)))
    rooms = [room for _, room in found]
    assert rooms[:3] == ["Arguments and the paper's settings", "Model", "Rollouts"]
    assert rooms[5] == "Environments" and rooms[-1] == "Run folder"


@each_script
def test_docstring_lines_and_functions_are_short(script):
    tree = ast.parse(read(script))
    assert tree.body[0].end_lineno - tree.body[0].lineno + 1 <= 30
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > 60] == []


# ---- Numbers and names that stand in the code and in the docs -------------------------------------------------------


def section(page: str, title: str) -> str:
    """What stands under the heading "## title" up to the next "## "; empty if there is none."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


def list_numbers(text: str) -> list[int]:
    """The numbers of a Markdown list "1. ...", in the order in which they stand."""
    return [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)]


def metrics_listed(script: Path) -> list[str]:
    """The names in the first column of the table under "Metrics" in the docs of a script."""
    return re.findall(r"^\| `([^`]+)` \|", section(docs_page(script), "Metrics"), re.MULTILINE)


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_numbers_of_details_and_departures_that_a_link_names_exist(page):
    for number, file, anchor in re.findall(
        r"\[d[a-z]+ (\d+)[^]]*\]\(([\w.]+)#(implementation-details|departures)\)", read(page)
    ):
        title = anchor.replace("-", " ").capitalize()
        assert int(number) in list_numbers(section(read(page.parent / file), title)), f"{file}: {number}"


@each_script
def test_departures_in_the_docstring_are_those_of_the_docs(script):
    docstring = ast.get_docstring(ast.parse(read(script)))
    departures = [int(number) for number in re.findall(r"^\s*\((\d+)\) ", docstring, re.MULTILINE)]
    assert departures == list(range(1, len(departures) + 1)) and departures
    assert list_numbers(section(docs_page(script), "Departures")) == departures


TOY = {
    "grpo_dt_continuous": "--n-sources 1 --n-points 2 --group-size 2 --l-traj 3 --l-eval 3 --delta-r 0 --workers 0",
    "ppo_dt_continuous": "--n-trajectories 1 --value-dim 8 --value-warmup 1 --eval-every 1",
    "q_guided_grpo_dt": "--n-trajectories 1 --n-sources 1 --n-points 2 --group-size 2 --delta-r 0 --critic-warmup 1 "
    "--critic-updates 1 --critic-batch 8 --critic-dim 8 --eval-every 1",
    "pretrain_dt": "--dataset-steps 300 --embed-dim 16 --n-layers 1 --n-heads 1 --batch-size 8 --updates 2 "
    "--log-every 1 --save-data",
}


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """toy_run(name): the folder of a toy run of a script; those that finetune begin with that of pretrain_dt.py."""
    folder, made = tmp_path_factory.mktemp("toys"), {}

    def run(name):
        if name not in made:
            words = f"{TOY[name]} --eval-episodes 1 --no-cuda --threads 1 --run-dir {folder / name}"
            if name != "pretrain_dt":
                words += f" --pretrained {run('pretrain_dt')} --iterations 1 --n-batch 4 --n-minibatches 1"
            script = importlib.import_module(name)
            torch.set_num_threads(1)
            made[name] = script.main(script.parse_args(words.split()))
        return made[name]

    return run


@each_script
def test_the_docs_list_exactly_the_metrics_that_a_run_writes(script, toy_run):
    with open(toy_run(script.stem) / "metrics.csv", newline="") as file:
        assert sorted(next(csv.reader(file))) == sorted(metrics_listed(script))


def test_what_the_console_shows_are_metrics():
    listed = {name for script in SCRIPTS for name in metrics_listed(script)}
    for name in NAMES:
        assert importlib.import_module(name).CONSOLE.keys() <= listed


# ---- Requirements ---------------------------------------------------------------------------------------------------


def requirements(path: Path) -> list[str]:
    lines = [line.split("#")[0].strip() for line in read(path).splitlines()]
    return [line for line in lines if line]


def test_every_pin_is_exact():
    first, *added = requirements(ROOT / "tests" / "requirements.txt")
    assert first == "-r ../requirements.txt"
    pins = requirements(ROOT / "requirements.txt") + added
    assert len(pins) > 10
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==\d[\w.]*", pin)] == []


# ---- Links and commands in the docs ---------------------------------------------------------------------------------

FENCE = r"^```.*?^```$"  # with MULTILINE and DOTALL


def relative_links(page: str) -> list[str]:
    """Targets of the Markdown and HTML links of a page that point into the repository, "#anchors" included."""
    prose = re.sub(FENCE, "", page, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`]*`", "", prose)
    targets = re.findall(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose)
    return [one or other for one, other in targets if not re.match(r"\w+:", one or other)]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(FENCE, "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: str) -> list[tuple[str, list[str]]]:
    """(script, words after it) of every command in fenced blocks and `spans` that runs a script with words after it;
    benchmark/reinformer.py is one, and so are the baselines."""
    blocks = re.findall(FENCE, page, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(FENCE, "", page, flags=re.MULTILINE | re.DOTALL))
    found = []
    for text in [*blocks, *spans]:
        for line in text.replace("\\\n", " ").splitlines():
            for match in re.finditer(r"(?<!\w)((?:(?!test_)\w*_dt\w*|reinformer|odt|iql)\.py)( [^|&;>)]*)", line):
                found.append((match[1], match[2].split(" #")[0].split()))
    return found


def unknown_flags(words: list[str], fields: dict[str, Field]) -> list[str]:
    """Words that look like flags and are none of a script with these fields of Args."""
    known = {"--help"} | {"--" + name.replace("_", "-") for name in fields}
    known |= {"--no-" + name.replace("_", "-") for name, field in fields.items() if field.type == "bool"}
    return [word for word in words if re.match("-+[a-z]", word) and word.split("=")[0] not in known]


PAGE = """
A [page](docs/a.md#part), a [site](https://x.org/b.md), [here](#top-2), [`code`](c.py) and `d[0](e.md)`.

```bash
pip install x --flag && python a_dt.py --seed 1 --lr=2 \\
    --no-on  # --comment
uv run path/b_dt_x.py --other | grep --this
x[1](f.md)
```

`python a_dt.py --wrong`, `a_dt.py`, `python benchmark/reinformer.py --seed 1` <img src="g.png">
## D4RL's layout, (1)
"""


def test_links_and_commands_are_read_right():
    assert relative_links(PAGE) == ["docs/a.md#part", "#top-2", "c.py", "g.png"]
    assert anchors(PAGE) == {"d4rls-layout-1"}
    assert commands(PAGE) == [
        ("a_dt.py", ["--seed", "1", "--lr=2", "--no-on"]),
        ("b_dt_x.py", ["--other"]),
        ("a_dt.py", ["--wrong"]),
        ("reinformer.py", ["--seed", "1"]),
    ]
    fields = {"seed": Field("int", "1", ""), "on": Field("bool", "True", "")}
    assert unknown_flags(["--seed", "-1", "--no-on", "--no-seed", "--lr=2", "-x"], fields) == [
        "--no-seed",
        "--lr=2",
        "-x",
    ]


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_every_relative_link_points_to_something(page):
    for link in relative_links(read(page)):
        if link.startswith("../../actions/"):  # GitHub's page of the workflow
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(read(target)), link


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_commands_in_the_docs_use_flags_that_exist(page):
    fields = {script.name: args_fields(read(script)) for script in SCRIPTS}
    fields |= {path.name: args_fields(read(path)) for path in (ROOT / "benchmark" / "baselines").glob("*.py")}
    twins = {"pretrain": "pretrain_dt.py", "finetune": "grpo_dt_continuous.py"}  # whose words reinformer.py takes
    for script, words in commands(read(page)):
        if script == "odt.py" and words[0] == "pretrain":
            script, words = "pretrain_dt.py", [word for word in words if word != "--td3"]
        if script == "reinformer.py":
            script = twins.get(words[0] if words else "", "grpo_dt_continuous.py")
        assert script in fields, f"no such script: {script}"
        assert unknown_flags(words, fields[script]) == [], f"{script} {' '.join(words)}"


TIME = re.compile(r"\b(seconds?|minutes?|hours?|not timed|as long as|the time that was left)\b")


def untimed(page: str) -> list[str]:
    """Commands of a page's bash blocks that do not say how long they take: behind them, in a comment at the head of
    their block, or in the paragraph before it."""
    found = []
    for match in re.finditer(r"((?:[^\n]+\n)*)\n*(?:<!--[^\n]*-->\n)?```bash\n(.*?)```", page, re.DOTALL):
        block = match[2].replace("\\\n", " ").strip()
        head = block.splitlines()[0] if block.startswith("#") else ""
        if TIME.search(match[1] + head):
            continue
        for line in block.splitlines():
            command, _, comment = line.partition("#")
            if re.search(r"\b(python3?|bash) ", command) and not TIME.search(comment):
                found.append(command.strip())
    return found


def test_commands_without_a_time_are_found():
    timed = "It takes a minute:\n\n```bash\npython a.py\n```\n\nText.\n\n```bash\n# hours\npython b.py\n```\n"
    assert untimed(timed) == []
    page = timed + "\nOnly this:\n\n```bash\npython c.py \\\n    --flag\npython d.py  # seconds\nls\n```\n"
    assert untimed(page) == ["python c.py      --flag"]


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_every_command_says_how_long_it_takes(page):
    assert untimed(read(page)) == []


@each_script
def test_the_docs_of_a_script_show_commands_and_flags_that_exist(script):
    assert script.name in [name for name, _ in commands(docs_page(script))]
    fields = {name: field for other in SCRIPTS for name, field in args_fields(read(other)).items()}
    flags = re.findall(r"`(--[a-z][\w-]*)[^`]*`", docs_page(script))
    assert flags and unknown_flags(flags, fields) == []


@each_script
def test_uv_run_installs_what_requirements_say(script):
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", read(script), re.M).group(1)
    header = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    required = [line for line in read(ROOT / "requirements.txt").splitlines() if line and not line.startswith("#")]
    assert header["dependencies"] == required
    assert header["requires-python"] == ">=3.11"


# ---- Files ----------------------------------------------------------------------------------------------------------


def tracked_files() -> list[str]:
    """Paths that git tracks; skips the test where there is no git or no repository."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    return [path for path in done.stdout.split("\0") if path]


def is_allowed_at_the_top(name: str) -> bool:
    return name in ALLOWED or name.startswith(".") or fnmatch.fnmatch(name, SCRIPT_NAMES)


def test_what_is_allowed_at_the_top():
    names = [
        "grpo_dt_continuous.py",
        "pretrain_dt.py",
        "docs",
        ".github",
        "utils.py",
        "runs",
        "setup.py",
        "MUJOCO_LOG.TXT",
    ]
    assert [name for name in names if not is_allowed_at_the_top(name)] == names[4:]


def test_the_top_level_holds_scripts_and_house_files_only():
    top = {path.split("/")[0] for path in tracked_files()}
    assert "README.md" in top
    assert sorted(name for name in top if not is_allowed_at_the_top(name)) == []


# Folders of somebody's machine. Built from parts, so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~}/-])/(?:" + "|".join(["root", "home", "Users"]) + r")/")


def test_machine_paths_are_recognised():
    for parts in (["", "root", ".cache"], ["", "home", "me", "x"], ["", "Users", "me", "x"]):
        assert MACHINE_PATH.search('run "' + "/".join(parts) + '"'), parts
    for text in ("https://example.org/homepage", "docs/home.md", "rooted"):
        assert not MACHINE_PATH.search(text), text


def test_no_file_names_a_folder_of_some_machine():
    found = []
    for path in tracked_files():
        try:
            lines = read(ROOT / path).splitlines()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # no text, or deleted but not yet committed
        found += [f"{path}:{number}" for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert found == []
