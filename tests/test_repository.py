"""What keeps the repository honest: copies that stay equal, arguments that are read, docs that say what the code does.

Everything here holds for every script at the top, also for those still to come.
"""

import ast
import csv
import fnmatch
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT_NAMES = "*_dt*.py"  # anything else at the top is no script, and is not allowed there
SCRIPTS = sorted(ROOT.glob(SCRIPT_NAMES))
ROOMS = ("Arguments", "Environment", "Model", "Buffers", "Rollouts", "Loss and update", "The run")  # from 2 on
# Scripts in a newer form, which the others take next: until then names that they share with the others may differ.
# Fields of Args have comments instead of docstrings, banners are one line, no comment has a [number], no list METRICS.
REWRITTEN = ("grpo_dt_continuous",)
NEW_ROOMS = ("Arguments and the paper's settings", "Model", "Rollouts", "Advantage, loss, update", "Algorithm 1")
NEW_ROOMS += ("Environments", "Run folder")
ALLOWED = ("benchmark", "docs", "tests", "requirements.txt", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff")

OWN_CODE = {"Args", "main"}  # every script has its own
OWN_TABLES = {
    "COLUMNS",
    "ROWS",
    "LOSSES",
    "METRICS",
    "CONSOLE",
}  # named alike since they play the same part, different by nature
# Parts of fields of the same name that may differ between scripts, each with its reason.
MAY_DIFFER = {
    (
        "dataset",
        "type",
    ): "one of pretraining's inputs; Q-guided GRPO-DT takes that of the checkpoint where none is given",
    ("dataset", "default"): "as above",
    ("dataset", "docstring"): "as above",
    ("dataset_kind", "docstring"): "pretraining reads it from the dataset's name, finetuning from the checkpoint",
    ("kappa_initial", "type"): "one value in pretraining, one per row of the paper's tables in finetuning",
    ("kappa_initial", "default"): "as above",
    ("kappa_initial", "docstring"): "as above",
    ("lr", "docstring"): "the paper's lr_policy in finetuning",
    ("eval_every", "default"): "an evaluation costs little beside an iteration of GRPO-DT, much beside the others",
    ("iterations", "docstring"): "each names its own algorithm",
}

UNCHANGED = [script for script in SCRIPTS if script.stem not in REWRITTEN]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def docs_page(script: Path) -> str:
    return read(ROOT / "docs" / f"{script.stem.removesuffix('_continuous')}.md")


def pages() -> list[Path]:
    """README.md, required, and the pages in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# Same name, same code


def definitions(source: str) -> dict[str, str]:
    """Text of the classes, functions and constants at a module's top level that scripts share, by name."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            name, first = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target), node.lineno
        else:
            continue
        if name not in OWN_CODE | OWN_TABLES:
            found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


class Field(NamedTuple):
    type: str
    default: str
    docstring: str | None


def comment_tokens(source: str) -> list[tokenize.TokenInfo]:
    """The comments of a source."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token for token in tokens if token.type == tokenize.COMMENT]


def args_fields(source: str) -> dict[str, Field]:
    """The fields of a script's Args: type, default and the docstring under each, or the comment in its line."""
    comments = {token.start[0]: token.string.lstrip("# ") for token in comment_tokens(source)}
    (args,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    found = {}
    for node, following in zip(args.body, [*args.body[1:], None]):
        if not isinstance(node, ast.AnnAssign):
            continue
        documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        docstring = following.value.value if documented else comments.get(node.end_lineno)
        found[node.target.id] = Field(
            ast.unparse(node.annotation), ast.unparse(node.value) if node.value else "", docstring
        )
    return found


def code_that_differs(one: str, other: str) -> list[str]:
    """Names that two scripts share and define by different texts."""
    left, right = definitions(one), definitions(other)
    return [name for name in left.keys() & right.keys() if left[name] != right[name]]


def fields_that_differ(one: str, other: str) -> list[tuple[str, str]]:
    """(field, part) of what the Args of two scripts share and say differently, but for MAY_DIFFER."""
    left, right = args_fields(one), args_fields(other)
    parts = [(name, part) for name in left.keys() & right.keys() for part in Field._fields]
    differing = [(name, part) for name, part in parts if getattr(left[name], part) != getattr(right[name], part)]
    return [pair for pair in differing if pair not in MAY_DIFFER]


ONE = '''
import math
SCALE = 1.0
ROWS = {"a": 1}
LOW, HIGH = -5.0, 2.0

@cache
def f(x):  # a comment
    return x

class Net:
    def forward(self): return 1

class Args:
    """Text."""
    seed: int = 1
    """seed of the run"""
    lr: float = 1e-4
    """learning rate"""
    resume: str | None = None
    """only --updates may change"""

def main(args): return args.seed
'''


@pytest.mark.parametrize(
    "old, new, differing",
    [
        ("return args.seed", "return args.lr", []),  # main is each script's own
        ('{"a": 1}', '{"a": 2}', []),  # and so are its tables
        ("def f(x)", "def g(x)", []),  # another name, another function
        ("# a comment", "# another", ["f"]),
        ("@cache", "@lru_cache", ["f"]),
        ("return 1", "return 2", ["Net"]),
        ("SCALE = 1.0", "SCALE = 2.0", ["SCALE"]),
        ("-5.0, 2.0", "-5.0, 3.0", ["(LOW, HIGH)"]),
    ],
)
def test_the_comparison_of_code_sees_what_it_should(old, new, differing):
    assert ONE.count(old) == 1
    assert code_that_differs(ONE, ONE.replace(old, new)) == differing


@pytest.mark.parametrize(
    "old, new, differing",
    [
        ("seed of the run", "seed of the run", []),
        ("only --updates", "only --iterations", [("resume", "docstring")]),
        ("seed: int = 1", "other: int = 1", []),
        ("seed of the run", "seed", [("seed", "docstring")]),
        ("seed: int = 1", "seed: int = 2", [("seed", "default")]),
        ("seed: int = 1", "seed: int | None = 1", [("seed", "type")]),
        ("resume: str | None = None", "resume: str | None = ''", [("resume", "default")]),
    ],
)
def test_the_comparison_of_fields_sees_what_it_should(old, new, differing):
    assert ONE.count(old) == 1
    assert fields_that_differ(ONE, ONE.replace(old, new)) == differing


def test_documented_exceptions_may_differ():
    field = 'class Args:\n    lr: float = 1.0\n    """{}"""\n'
    assert ("lr", "docstring") in MAY_DIFFER
    assert fields_that_differ(field.format("the rate"), field.format("another")) == []


def test_documentation_is_read_from_docstrings_and_from_comments():
    fields = args_fields(
        'class Args:\n    a: int = 1  # one  # two\n    b: str = "# x"\n    c: int = 2\n    """three"""\n'
    )
    assert {name: field.docstring for name, field in fields.items()} == {"a": "one  # two", "b": None, "c": "three"}


@pytest.mark.parametrize("script", UNCHANGED, ids=lambda path: path.stem)
def test_same_name_same_code(script):
    assert len(definitions(read(script))) > 20
    for other in UNCHANGED[UNCHANGED.index(script) + 1 :]:
        assert code_that_differs(read(script), read(other)) == [], other.name
        assert fields_that_differ(read(script), read(other)) == [], other.name


def test_there_are_scripts():
    assert "pretrain_dt" in [script.stem for script in SCRIPTS]  # else every test of each script would pass unseen


def test_exceptions_name_fields_that_exist():
    fields = {name for script in SCRIPTS for name in args_fields(read(script))}
    assert {name for name, _ in MAY_DIFFER} <= fields
    assert {part for _, part in MAY_DIFFER} <= set(Field._fields)


# Arguments


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
    assert unread_fields(ONE) == {"lr", "resume"}
    assert unread_fields(ONE + "def f(self): print(self.args.lr)") == {"resume"}
    assert unread_fields(ONE + "def f(args): args.lr = args.resume") == {"lr"}  # written is not read
    assert unread_fields(ONE + "def f(args): return [getattr(args, name) for name in ('lr', 'resume')]") == set()
    assert unread_fields(ONE + "def check_args(args): assert args.lr > 0") == {"lr", "resume"}
    assert unread_fields(ONE + "def f(): return dict(value='lr')") == {"lr", "resume"}


@each_script
def test_every_argument_is_documented_and_read(script):
    fields = args_fields(read(script))
    assert len(fields) > 10
    assert [name for name, field in fields.items() if not field.docstring] == []
    assert unread_fields(read(script)) == set()


# The rooms of a script


@each_script
def test_importing_a_script_does_nothing(script, tmp_path):
    command = [sys.executable, "-B", "-c", f"import {script.stem}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@each_script
def test_the_rooms_stand_in_order_under_their_banners(script):
    rule = "# " + "-" * 117
    lines = read(script).splitlines()
    if script.stem in REWRITTEN:
        banners = [line for line in lines if line.startswith("# ----")]
        assert banners == [f"# ---- {n}. {room} ".ljust(119, "-") for n, room in enumerate(NEW_ROOMS, start=2)]
        return
    banners = [lines[i + 1] for i in range(len(lines) - 2) if lines[i] == rule == lines[i + 2]]
    assert banners == [f"# {number}. {room}" for number, room in enumerate(ROOMS, start=2)]
    assert lines.count(rule) == 2 * len(ROOMS)


@each_script
def test_docstring_lines_and_functions_are_short(script):
    tree = ast.parse(read(script))
    assert ast.get_docstring(tree)
    assert tree.body[0].end_lineno - tree.body[0].lineno + 1 <= 30
    assert [line for line in read(script).splitlines() if len(line) > 120] == []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > 60] == []


# Numbers and names that stand in the code and in the docs


def comment_markers(source: str) -> set[int]:
    """The numbers [n] in the comments of a source."""
    comments = (token.string for token in comment_tokens(source))
    return {int(number) for comment in comments for number in re.findall(r"\[(\d+)\]", comment)}


def section(page: str, title: str) -> str:
    """What stands under the heading "## title" up to the next "## "; empty if there is none."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


def list_numbers(text: str) -> list[int]:
    """The numbers of a Markdown list "1. ...", in the order in which they stand."""
    return [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)]


def table_names(text: str) -> list[str]:
    """The `names` in the first column of a Markdown table."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_markers_lists_and_tables_are_read_right():
    assert comment_markers("x = [1]  # [3] why\ns = '# [4]'\n# [5], [12]\n") == {3, 5, 12}
    page = "# Title\n\n## One\n\n1. a\n   2. no\n2. b\n\n## Two\n\n| `x` | 1 |\n| y | `z` |\n| `w/v` | 2 |\n"
    assert list_numbers(section(page, "One")) == [1, 2]
    assert table_names(section(page, "Two")) == ["x", "w/v"]
    assert section(page, "Three") == ""


@each_script
def test_markers_in_comments_are_the_docs_implementation_details(script):
    markers = comment_markers(read(script))
    if script.stem in REWRITTEN:
        assert markers == set()
        return
    assert markers == set(range(1, len(markers) + 1)) and markers
    assert list_numbers(section(docs_page(script), "Implementation details")) == sorted(markers)


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


def columns_of_a_run(script, folder: Path) -> list[str]:
    """The columns of metrics.csv after a toy run of a finetuning script from random weights."""
    model, sizes = script.DecisionTransformer(11, 3, 16, 1, 1), dict(obs_dim=11, act_dim=3, embed_dim=16)
    content = dict(script="pretrain_dt", sizes=sizes | dict(n_layers=1, n_heads=1, kind="dt"), iteration=0, args={})
    content |= dict(env_id="Hopper-v5", env_kwargs={}, dataset="random", dataset_kind="random", g_eval=1.0, c_online=1)
    torch.save(content | dict(weights=model.state_dict(), dataset_best_return=1.0), folder / "checkpoint.pt")
    words = (
        f"--pretrained {folder} --run-dir {folder / 'run'} --iterations 1 --n-sources 1 --n-points 2 --group-size 2 "
    )
    words += "--l-traj 3 --l-eval 3 --delta-r 0 --n-batch 4 --n-minibatches 1 --eval-episodes 1 --no-cuda --threads 1"
    script.main(script.parse_args(words.split()))
    with open(folder / "run" / "metrics.csv", newline="") as file:
        return next(csv.reader(file))


@each_script
def test_the_docs_list_exactly_the_metrics(script, tmp_path):
    listed, module = table_names(section(docs_page(script), "Metrics")), importlib.import_module(script.stem)
    if script.stem in REWRITTEN:
        assert sorted(listed) == sorted(columns_of_a_run(module, tmp_path))
    else:
        assert listed == module.METRICS


# Requirements


def requirements(path: Path) -> list[str]:
    lines = [line.split("#")[0].strip() for line in read(path).splitlines()]
    return [line for line in lines if line]


def test_every_pin_is_exact():
    first, *added = requirements(ROOT / "tests" / "requirements.txt")
    assert first == "-r ../requirements.txt"
    pins = requirements(ROOT / "requirements.txt") + added
    assert len(pins) > 10
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==\d[\w.]*", pin)] == []


# Links and commands in the docs

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
    benchmark/reinformer.py, which takes GRPO-DT's words, is one."""
    blocks = re.findall(FENCE, page, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(FENCE, "", page, flags=re.MULTILINE | re.DOTALL))
    found = []
    for text in [*blocks, *spans]:
        for line in text.replace("\\\n", " ").splitlines():
            for match in re.finditer(r"(?<!\w)((?:(?!test_)\w*_dt\w*|reinformer)\.py)( [^|&;>)]*)", line):
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
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(read(target)), link


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_commands_in_the_docs_use_flags_that_exist(page):
    fields = {script.name: args_fields(read(script)) for script in SCRIPTS}
    fields["reinformer.py"] = fields["grpo_dt_continuous.py"]
    for script, words in commands(read(page)):
        assert script in fields, f"no such script: {script}"
        assert unknown_flags(words, fields[script]) == [], f"{script} {' '.join(words)}"


@each_script
def test_the_docs_of_a_script_show_commands_and_flags_that_exist(script):
    assert script.name in [name for name, _ in commands(docs_page(script))]
    fields = {name: field for other in SCRIPTS for name, field in args_fields(read(other)).items()}
    flags = re.findall(r"`(--[a-z][\w-]*)[^`]*`", docs_page(script))
    assert flags and unknown_flags(flags, fields) == []


# Files


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
