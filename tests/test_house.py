"""The house: imports go down only, and the README's tree says what is on the disk."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [
    {"rlhf.recipe", "rlhf.errors", "rlhf.functional"},
    {
        "rlhf.model",
        "rlhf.likelihood",
        "rlhf.footprint",
        "rlhf.muon",
        "rlhf.products",
        "rlhf.tokenizer",
        "rlhf.runtime",
        "rlhf.checkpoint",
        "rlhf.rundir",
        "rlhf.team",
        "rlhf.job",
        "rlhf.trackers",
        "rlhf.saver",
        "rlhf.pieces",
        "rlhf.sharding",
        "rlhf.zero",
        "rlhf.plugins",
        "rlhf.templates",
        "rlhf.choices",
        "rlhf.quantisation",
    },
    {"rlhf.data", "rlhf.tinyworld", "rlhf.rollout", "rlhf.judge"},
    {"evaluation"},
    {"stages"},
    {
        "rlhf.cli",
        "rlhf.api",
        "rlhf.__main__",
        "rlhf.chain",
        "rlhf.plan",
        "rlhf.launch",
        "rlhf.launch_file",
        "rlhf.launcher",
        "rlhf.worker",
        "rlhf.status",
        "rlhf.chat",
        "rlhf.label",
    },
]


def sources() -> list[Path]:
    return sorted(path for folder in ("rlhf", "stages", "evaluation") for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    return -1 if module == "rlhf" else 99


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] in ("rlhf", "stages", "evaluation")}


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_go_down_only(path: Path) -> None:
    mine = floor_of(module_of(path))
    assert mine < 99, f"{module_of(path)} stands on no floor"
    above = {name for name in imported(path) if mine < floor_of(name) < 99}
    assert not above, f"{module_of(path)} imports from above: {sorted(above)}"


def tree_in_readme() -> set[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", text, re.DOTALL)
    assert block, "README.md has no tree"
    found: set[str] = set()
    folders: list[str] = []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        indent, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert len(line.split()) > 1, f"no purpose given: {line}"
        folders = [*folders[:indent], name]
        found.add("".join(folders))
    return found


def test_the_readme_names_every_file_with_its_purpose() -> None:
    listed = {name for name in tree_in_readme() if not name.endswith("/")}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    on_disk = {
        name
        for name in tracked.stdout.split()
        if (ROOT / name).is_file()
        and not name.endswith(("__init__.py", ".gitignore"))
        and not (name.startswith("tests/") and name != "tests/conftest.py")
    }
    on_disk |= {name for name in listed if name.endswith("__init__.py") and (ROOT / name).is_file()}
    assert listed == on_disk
