"""Recipes and commands broken at random: a clear refusal with exit code 2, or a recipe that is really fine; never a
traceback. The short run is in the suite; `scripts/test -m slow` takes 10,000 recipes and 100 processes."""

import copy
import random
import shutil
import string
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rlhf import chain, cli
from rlhf.errors import Interrupted, RlhfError
from rlhf.recipe import shipped_recipes
from tests.conftest import ROOT, TINY_RECIPE

TEXTS = [path.read_text(encoding="utf-8") for path in (*shipped_recipes(), TINY_RECIPE)]
WEIRD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "x", "yes", "null", "1e-4", "\x00", "\x1b[31mred", "\ud83d"[:0], "你好", "../..", "/", "~", "a" * 5000),
    *([], [[]], [None], [{}], {}, {"": ""}, {"a": {"b": {}}}, [1, "a", None], {"builtin": "tinyworld"}),
    *([{"path": "*"}], [{"path": "\x00"}], [{"hub": "x"}], [{"builtin": "tinyworld", "rows": -1}], "tinyworld"),
]
KEYS = [
    "",
    "name",
    "seed",
    "ppo",
    "kl",
    "train",
    "x" * 300,
    "\x1b[2J",
    "__class__",
    "rows",
    "from",
    "from_",
    "1",
    "a.b",
]


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def mutated_tree(text: str, draw: random.Random) -> str:
    """The recipe with one to four values replaced, keys renamed, removed or added."""
    tree = copy.deepcopy(yaml.safe_load(text))
    for _ in range(draw.randint(1, 4)):
        path = draw.choice([place for place in places(tree) if place] or [()])
        if not path:
            break
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        kind = draw.choice(("replace", "replace", "remove", "rename", "add", "move"))
        if kind == "replace":
            parent[path[-1]] = copy.deepcopy(draw.choice(WEIRD))
        elif kind == "remove":
            del parent[path[-1]]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw.choice(KEYS)] = parent.pop(path[-1])
        elif kind == "add" and isinstance(parent, dict):
            parent[draw.choice(KEYS)] = copy.deepcopy(draw.choice(WEIRD))
        elif isinstance(tree, dict):
            tree[draw.choice(KEYS)] = copy.deepcopy(parent[path[-1]])
        if not tree:
            break
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


def mutated_text(text: str, draw: random.Random) -> str:
    """The recipe with characters, pieces and lines changed."""
    for _ in range(draw.randint(1, 5)):
        a, b = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + draw.choice((0, 1, 1, 10, 200)))
        piece = draw.choice(
            (
                *(
                    "",
                    "\t",
                    "\n",
                    ":",
                    "- ",
                    "{",
                    "}",
                    "[",
                    "]",
                    "&a ",
                    "*a",
                    "!!python/object:os.system ",
                    "!!binary x",
                    "\x00",
                ),
                *("<<: *a\n", "%YAML 9\n", "---\n", "...\n", "\u2028", "\x85", "'", '"', "|", ">", "#", "@", "`", "? "),
                *(
                    "0o7",
                    "1_000",
                    "2026-99-99",
                    ".inf",
                    "~",
                    text[a:b],
                    text[:50],
                    "".join(draw.choices(string.printable, k=5)),
                ),
            )
        )
        text = text[:a] + piece + text[b:]
        if not text:
            break
    return text


def outcome(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and message of the command line in this process; a stage that would start is not started."""

    def started(*_: Any) -> None:
        raise Interrupted("would start")

    monkeypatch.setattr(chain, "run_processes", started)
    monkeypatch.setattr(chain, "_git_commit", lambda: None)
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(cli.app, arguments)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    error = result.exception
    if isinstance(error, RlhfError):
        return error.exit_code, str(error)
    if error is not None and not isinstance(error, SystemExit):
        return -1, "".join(traceback.format_exception(error))
    return result.exit_code, result.output


def check(seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    draw = random.Random(seed)
    text = draw.choice(TEXTS)
    text = (mutated_tree if draw.random() < 0.7 else mutated_text)(text, draw)
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    code, said = outcome(["run", "all", "--recipe", str(path)], folder, monkeypatch)
    assert code in (2, Interrupted.exit_code), f"{said}\n{text}"
    assert said.strip()
    assert sorted(inner.name for inner in folder.iterdir()) == ["recipe.yaml"], "something was left behind"
    return code


def folder_for(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations")


def test_mutated_recipes_are_refused_or_fine(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_for(tmp_path_factory)
    codes = [check(seed, folder, monkeypatch) for seed in range(300)]
    assert 150 < codes.count(2) < 300  # some changes change nothing that matters, most do


@pytest.mark.slow
def test_ten_thousand_mutated_recipes(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_for(tmp_path_factory)
    first = random.SystemRandom().randrange(2**40)
    print(f"seeds from {first}")
    for seed in range(first, first + 10_000):
        check(seed, folder, monkeypatch)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    key=st.sampled_from(["seed", "name", "ppo", "ppo.kl", "stages", "data.root", "tokenizer.train", "x"]), value=values
)
def test_any_value_of_an_override_is_refused_or_fine(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = folder_for(tmp_path_factory)
        override = f"{key}={yaml.safe_dump(value, default_flow_style=True)}"
        code, said = outcome(["run", "all", "--recipe", str(TINY_RECIPE), override], folder, monkeypatch)
        assert code in (2, Interrupted.exit_code), said


def bad_arguments(draw: random.Random, folder: Path) -> list[str]:
    """A command line with at least one thing wrong."""
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "folder").mkdir(exist_ok=True)
    words = [
        "",
        "-",
        "--",
        "ppo=",
        "=",
        "a=b",
        "\x1b[31m",
        "--recipe",
        "--processes",
        "0",
        "-1",
        "binary",
        "folder",
        "你好",
    ]
    start = draw.choice(
        [
            ["run"],
            ["run", "all", "--recipe", draw.choice(["binary", "folder", "none.yaml", "", "quickstart.yml"])],
            ["run", draw.choice(["al", "PPO", "", "sft,ppo"]), "--recipe", "quickstart"],
            [
                "run",
                "all",
                "--recipe",
                "quickstart",
                draw.choice(["sede=1", "seed=x", "ppo.kl=3", "stages=[]", "name=.."]),
            ],
            ["run", "all", "--recipe", "quickstart", "--processes", draw.choice(["0", "-3", "x", "1e9"])],
            ["status", draw.choice(["binary", "folder", "none", ""])],
            ["evaluate", draw.choice(["binary", "folder", "none"])],
            ["chat", draw.choice(["binary", "folder", "none"]), "--temperature", draw.choice(["-1", "x", "0.5"])],
            [draw.choice(["fly", "RUN", "--verbose", "\x00"[:0] + "x"])],
        ]
    )
    return [*start, *draw.choices(words, k=draw.choice((0, 0, 1, 2)))]


def check_processes(number: int, folder: Path) -> None:
    draw = random.Random(number)
    for _ in range(number):
        arguments = bad_arguments(draw, folder)
        done = subprocess.run(
            [sys.executable, "-m", "rlhf", *arguments],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
            capture_output=True,
            timeout=120,
        )
        said = (done.stdout + done.stderr).decode("utf-8", "replace")
        if "--help" in said and done.returncode == 0:
            continue
        assert done.returncode == 2, (arguments, said)
        assert "Traceback" not in said, (arguments, said)
        assert said.strip(), arguments
        assert "\x1b" not in said, arguments


def test_bad_command_lines_in_real_processes(tmp_path: Path) -> None:
    check_processes(12, tmp_path)


@pytest.mark.slow
def test_a_hundred_bad_command_lines_in_real_processes(tmp_path: Path) -> None:
    check_processes(100, tmp_path)
