"""The Python API: README's example as it stands, and the errors that it raises."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from rlhf.api import evaluate, load_recipe, run
from rlhf.errors import MissingInput, RecipeError, UserError

from .conftest import ROOT, TINY_RECIPE


def example() -> str:
    """The code of README's section, with the tiny recipe in the quickstart's place, and its seed."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Python\n")[1].split("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ") or not line.strip()]
    code = "\n".join(lines)
    assert '"quickstart"' in code
    return code.replace('"quickstart"', repr(str(TINY_RECIPE))).replace('"seed=2", ', "")


def test_the_example_of_the_readme_runs(
    finished_chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_chain / "runs", tmp_path / "runs")  # of which ppo and what follows are to be done again
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = example()
    exec(compile(code, "README.md", "exec"), {})  # the code is ours
    said = capsys.readouterr().out.splitlines()
    before, after = map(float, next(line for line in said if re.fullmatch(r"\S+ \S+", line)).split())
    assert 0 <= before <= 1 and 0 <= after <= 1
    printed = [line.split() for line in said if re.match(r"runs/tiny/(sft|ppo)/model ", line)]
    assert len(printed) == 2 and all(0 <= float(accuracy) <= 1 for _, accuracy in printed)
    assert list((tmp_path / "runs/tiny").glob("ppo.stale-*")) and not list((tmp_path / "runs/tiny").glob("sft.stale-*"))


def test_what_the_command_line_refuses_raises_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe("quickstrat")
    recipe = load_recipe(str(TINY_RECIPE))
    with pytest.raises(UserError, match="no stage 'pretraining'; there are: all tokenizer"):
        run(recipe, "pretraining")
    with pytest.raises(MissingInput, match=r"rlhf.api.run\(recipe, 'tokenizer'\)"):
        run(recipe, "pretrain")
    with pytest.raises(UserError, match="-1 is less than one"):
        run(recipe, "tokenizer", processes=-1)
    with pytest.raises(UserError, match="no model directory"):
        evaluate([], tasks=["tinyworld"])
    with pytest.raises(MissingInput, match="--output: no directory"):
        evaluate([_model(tmp_path)], tasks=["tinyworld"], output=tmp_path / "nowhere" / "found.json")


def _model(folder: Path) -> Path:
    """A directory that looks like a model."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return folder / "model"


class Hub(BaseHTTPRequestHandler):
    """So much of the hub as an upload of small files needs; keeps what it is sent."""

    made: ClassVar[list[dict[str, Any]]] = []
    files: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_right":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self._answer(200, {"url": f"http://{self.headers['Host']}/me/mine", "name": "me/mine"})
        elif self.path.endswith("/preupload/main"):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer(200, {"files": files})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        else:
            assert self.path == "/api/models/me/mine/commit/main"
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            where = f"http://{self.headers['Host']}/me/mine/commit/{'0' * 40}"
            self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": where})

    def _answer(self, code: int, value: dict[str, Any]) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_model_is_uploaded_with_its_card(hub: str, tmp_path: Path) -> None:
    def push(*arguments: str, token: str = "hf_right", **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub, "HF_TOKEN": token}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), **more}
        command = [sys.executable, "-m", "rlhf", "push", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    model = _model(tmp_path)
    assert "write a model card first" in push(str(model), "me/mine").stderr
    (model / "README.md").write_text("# mine")
    refused = push(str(model), "me/mine", token="hf_wrong")
    assert refused.returncode == 2 and "hf auth login" in refused.stderr and "Traceback" not in refused.stderr
    for name, said in (("me/mine/model", "is no name on the hub"), ("me/mine", "nothing is uploaded")):
        done = push(str(model), name, HF_HUB_OFFLINE="1")
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    done = push(str(model), "me/mine")
    assert done.returncode == 0, done.stderr
    assert Hub.files == {file.name: file.read_bytes() for file in model.iterdir()}
    assert Hub.made[-1]["visibility"] == "private"
    unreachable = push(str(model), "me/mine", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 2 and "can't be reached" in unreachable.stderr
