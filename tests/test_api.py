"""The Python API: README's example as it stands, and the errors that it raises."""

import re
from pathlib import Path

import pytest

from rlhf.api import evaluate, load_recipe, run
from rlhf.errors import MissingInput, RecipeError, UserError

from .conftest import ROOT, TINY_RECIPE


def example() -> str:
    """The code of README's section, with the tiny recipe in the quickstart's place."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Python\n")[1].split("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ") or not line.strip()]
    code = "\n".join(lines)
    assert '"quickstart"' in code
    return code.replace('"quickstart"', repr(str(TINY_RECIPE)))


def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = example()
    exec(compile(code, "README.md", "exec"), {})  # the code is ours
    said = capsys.readouterr().out.splitlines()
    before, after = map(float, next(line for line in said if re.fullmatch(r"\S+ \S+", line)).split())
    assert 0 <= before <= 1 and 0 <= after <= 1
    printed = [line.split() for line in said if re.match(r"runs/tiny/(sft|ppo)/model ", line)]
    assert len(printed) == 2 and all(0 <= float(accuracy) <= 1 for _, accuracy in printed)
    assert (tmp_path / "runs/tiny/report.html").is_file()


def test_what_the_command_line_refuses_raises_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe("quickstrat")
    recipe = load_recipe(str(TINY_RECIPE))
    with pytest.raises(UserError, match="no stage 'pretraining'; there are: all tokenizer"):
        run(recipe, "pretraining")
    with pytest.raises(MissingInput, match=r"rlhf.api.run\(recipe, 'tokenizer'\)"):
        run(recipe, "pretrain")
    with pytest.raises(UserError, match="no model directory"):
        evaluate([], tasks=["tinyworld"])
    with pytest.raises(MissingInput, match="--output: no directory"):
        evaluate([_model(tmp_path)], tasks=["tinyworld"], output=tmp_path / "nowhere" / "found.json")


def _model(folder: Path) -> Path:
    """A directory that looks like a model."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return folder / "model"
