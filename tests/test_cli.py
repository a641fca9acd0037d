"""The command line as a user meets it: exit codes, one message, no traceback, nothing heavy before it is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def rlhf(*arguments: str, cwd: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "rlhf", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_version_and_help() -> None:
    import rlhf as package

    assert rlhf("--version").stdout == f"rlhf {package.__version__}\n"
    shown = rlhf("--help")
    assert shown.returncode == 0
    for command in ("run", "recipes", "evaluate", "status", "report", "chat", "label", "schema"):
        assert command in shown.stdout
        assert rlhf(command, "--help").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["report", "--help"], ["recipes"], ["schema"], ["run", "all", "x"]],
)
def test_nothing_heavy_is_imported_before_a_stage_runs(arguments: list[str]) -> None:
    code = (
        "import sys, rlhf.cli\n"
        f"sys.argv = ['rlhf', *{arguments!r}]\n"
        "rlhf.cli.main()\n"
        "heavy = {'torch', 'transformers', 'trl', 'accelerate', 'datasets', 'numpy', 'pandas', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_recipes_are_listed_with_what_they_need() -> None:
    shown = rlhf("recipes").stdout
    assert "quickstart" in shown
    assert "needs:" in shown
    assert "takes:" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "all"], "--recipe is missing"),
        (["run", "everything", "--recipe", "quickstart"], "no stage 'everything'"),
        (["run", "all", "--recipe", "nowhere.yaml"], "no recipe file nowhere.yaml"),
        (["run", "all", "--recipe", "quickstart", "ppo.kl.coeff=1"], "unknown key"),
        (["run", "all", "sede=2", "--recipe", "quickstart"], "did you mean 'seed'"),
        (["run", "all", "--recipe", "quickstart", "name=../../etc"], "letters, digits"),
        (["run", "all", "--recipe", "/dev/null"], "empty"),
        (["run", "all", "--recipe", "quickstart", "pretrain.train=[{path: none.jsonl}]"], "no file none.jsonl"),
        (["status", "nowhere"], "is no run's directory"),
        (["report", "nowhere"], "is no run's directory"),
        (["chat", "nowhere"], "no config.json"),
        (["evaluate", "nowhere"], "nowhere is no directory: no config.json"),
        (["fly"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "all", "--recipe", "quickstart", "--colour"], "No such option"),
    ],
)
def test_a_users_mistake_is_one_clear_message_and_exit_code_two(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    done = rlhf(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_a_stage_out_of_order_names_the_command_that_makes_its_input(tmp_path: Path) -> None:
    done = rlhf("run", "ppo", "--recipe", "quickstart", "--runs-dir", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert "ppo stands on the stage reward, which has not been run" in done.stderr
    for stage in ("tokenizer", "pretrain", "sft", "reward", "all"):
        assert f"rlhf run {stage} --recipe quickstart --runs-dir {tmp_path / 'runs'}\n" in done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
    assert "Traceback" not in done.stderr
