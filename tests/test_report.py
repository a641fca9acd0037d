"""The report: its numbers are the summaries', what is missing or torn is said, and texts stay text."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from evaluation import report
from evaluation.report import charts
from evaluation.report.charts import Line
from evaluation.report.energy import energy
from evaluation.report.gains import verdict
from evaluation.report.gather import MOST_POINTS, gather
from evaluation.report.page import page
from evaluation.report.reading import safe, shortened, signed
from rlhf import chain
from rlhf.errors import MissingInput, RecipeError
from rlhf.rundir import RunDir

from .conftest import rlhf
from .made_run import ATTACK, CALIBRATION, TASK, ci, make_run, write, write_lines


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    return make_run(tmp_path_factory.mktemp("report") / "runs" / "made", description=f"markup: {ATTACK}")


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """One to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "made"))


@pytest.fixture(scope="module")
def html(made: Path) -> str:
    return report.render(made, None, "html")


class Shown(HTMLParser):
    """The texts, tags, attributes and table rows of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, *beginning: str) -> list[str]:
        return next(row for row in self.rows if row[: len(beginning)] == list(beginning))


# What is shown


def test_the_numbers_are_the_summaries(html: str) -> None:
    shown = Shown(html)
    assert shown.row("gold reward, sft → ppo")[1:] == [
        "0.414 [0.357, 0.470]", "0.871 [0.831, 0.910]", "+0.457 [0.396, 0.518]", "▲ gained",
    ]  # fmt: skip
    assert shown.row("bits per byte") == [
        "bits per byte", "0.2975 [0.2875, 0.3075]", "0.3975 [0.3875, 0.4075]", "0.4975 [0.4875, 0.5075]",
    ]  # fmt: skip
    assert shown.row("recall_things", "0")[2:] == [
        "0.200", "–", "0.200 [0.150, 0.250]", "0.213 [0.163, 0.263]", "0.226 [0.176, 0.276]",
    ]  # fmt: skip
    assert shown.row("held-out comparisons")[1] == "0.769 [0.755, 0.783]"
    assert shown.row("reward", "5,376")[2:] == ["0.769 [0.759, 0.779]", "0.561"]
    assert shown.row("ppo over sft") == [
        "ppo over sft", "64", "0.812 [0.752, 0.873]", "0.523 [0.453, 0.593]", "0.789 [0.739, 0.839]", "31.5 / 16.8",
    ]  # fmt: skip
    assert shown.row("training, 50+ copies")[1] == "0.951 [0.911, 0.991] of 20"
    assert shown.row(TASK, "200")[3:] == [
        "0.432 [0.382, 0.482]", "yes", "0.920 0.765 clean", "0.933 0.765 clean", "0.946 0.765 clean",
    ]  # fmt: skip
    assert shown.row("recall_things", "200")[4] == "no"
    assert shown.row("arc_easy", "acc")[2] == "0.2625 ± 0.0125"
    assert shown.row("pretrain", "787,840") == ["pretrain", "787,840", "2:41", "241.5", "500", "1 × 2", "cpu", "0.67"]
    assert shown.row("books") == ["books", "2", "300", "2.0", "–", "600", "1.8", "450,000", "4.00"]
    assert shown.row("hashes") == ["hashes", "0.1", "10", "1.00 %", "0.040", "10,000"]
    assert shown.row("near_duplicates") == ["near_duplicates", "–", "40", "4.00 %", "0.260", "65,000"]
    text = " ".join(" ".join(shown.texts).split())
    assert "unicode 17" in text and "email 3" in text and "[0.75] one copy like: another" in text
    assert "PPO raised the gold reward from 0.41 to 0.87 of 1.00 at a KL of 2.0 nats" in text
    assert "few-shot accuracy at 8 demonstrations (2 tasks) from 0.93 to 0.95" in text
    for fact in ("The secret is 4711", "score_follows_length", "it is the length", "rlhf run all --recipe made.yaml"):
        assert fact in text


def test_pretraining_tells_its_rollbacks_and_its_sources(html: str, made: Path) -> None:
    text = " ".join(" ".join(Shown(html).texts).split())
    for told in (text, report.render(made, None, "md")):
        assert "pretrain rolled back at step 278 to step 200: the loss is 9.1" in told
    assert "Held out, by source ends at" in text
    assert "1.136 (books)" in text


def test_forgetting_shows_by_validation_source(copied: Path) -> None:
    """The named validation sets and the base's figures stood in the summary alone."""
    summary = json.loads((copied / "pretrain" / "summary.json").read_text())
    old = {**ci("nats_per_token", 2.75, 0.1), **ci("bits_per_byte", 1.5, 0.1)}
    new = {**ci("nats_per_token", 1.25, 0.1), **ci("bits_per_byte", 0.75, 0.1)}
    sides = {"validation": {"old": old, "new": new}}
    then = {"old": {"nats_per_token": 2.5}, "new": {"nats_per_token": 3.25}}
    before = {"before": {"validation_nats_per_token": 2.0, "validation": then}}
    write(copied / "pretrain" / "summary.json", {**summary, **sides, **before})
    shown = Shown(report.render(copied, None, "html"))
    assert shown.row("old") == ["old", "2.7500 [2.6500, 2.8500]", "1.5000 [1.4000, 1.6000]", "2.5000", "+0.2500"]
    assert shown.row("new")[3:] == ["3.2500", "−2.0000"]
    assert shown.row("all texts")[1:] == ["0.6643 [0.6443, 0.6843]", "0.2992 [0.2892, 0.3092]", "2.0000", "−1.3357"]
    write(copied / "pretrain" / "summary.json", {**summary, **sides})
    assert Shown(report.render(copied, None, "html")).row("new") == shown.row("new")[:3]
    both = Shown(report.render(copied, copied, "html"))
    assert both.row("", "nats per token, old")[2:] == ["2.7500 [2.6500, 2.8500]"] * 2 + ["0.0000", "overlap"]


def test_a_single_model_has_nothing_beside_it(copied: Path) -> None:
    """The report told the reader to run `rlhf evaluate` again, which changes nothing."""
    summary = json.loads((copied / "evaluate" / "summary.json").read_text())
    alone = {**summary, "models": {"base": summary["models"]["base"]}, "differences": {}, "changes": {}}
    alone |= {"win_rates": {}}
    write(copied / "evaluate" / "summary.json", alone)
    (copied / "evaluate" / "responses.jsonl").unlink()
    shutil.rmtree(copied / "ppo")
    text = " ".join(" ".join(Shown(report.render(copied, None, "html")).texts).split())
    assert "Nothing to compare: one model was measured, base." in text
    assert "a recipe that asks for it (evaluate.prompts, a judge, and two models or more): rlhf run evaluate" in text


def test_what_is_not_available_says_why(html: str) -> None:
    shown = Shown(html)
    assert shown.row("recall_things", "16")[4:] == ["n/a"] * 3
    assert any(f"n/a at 16, 8 demonstrations: {TASK}, recall_things." in text for text in shown.texts)


def test_questions_that_did_not_fit_are_counted(copied: Path) -> None:
    file = copied / "evaluate" / "summary.json"
    summary = json.loads(file.read_text())
    summary["models"]["sft"]["fewshot"]["recall_things"]["8"]["too_long"] = 7
    write(file, summary)
    told = "Questions that don't fit the context of sft and don't count: 7 of recall_things at 8."
    assert any(told in text for text in Shown(report.render(copied, None, "html")).texts)


def test_a_model_without_room_for_a_beginning_says_so(copied: Path) -> None:
    file = copied / "evaluate" / "summary.json"
    summary = json.loads(file.read_text())
    summary["models"]["base"]["memorisation"] = {"not_available": "the context of 32 tokens has no room"}
    write(file, summary)
    shown = Shown(report.render(copied, None, "html"))
    assert shown.row("training documents")[1:3] == ["–", "0.120 [0.080, 0.160] of 100"]
    assert "base: n/a, the context of 32 tokens has no room." in shown.texts


def test_a_verdict_is_of_the_interval() -> None:
    assert verdict((0.1, 0.2), 1) == verdict((-0.2, -0.1), -1) == "▲ gained"
    assert verdict((0.1, 0.2), -1) == verdict((-0.2, -0.1), 1) == "▼ cost"
    assert verdict((-0.1, 0.2), 1) == verdict((0.0, 0.2), 1) == "≈ unclear"
    assert verdict(None, 1) == "–"
    assert verdict((0.1, 0.1), 1, 2) == "▲ gained"  # all agree
    assert verdict((0.1, 0.1), 1, 1) == "–"  # one alone proves nothing


def test_a_change_is_that_of_what_both_have_answered(copied: Path) -> None:
    """The difference of the two means isn't, where one of the models had no room for some prompts."""
    file = copied / "evaluate" / "summary.json"
    summary = json.loads(file.read_text())
    summary["changes"]["ppo - sft"] |= {"documents": 9, "prompts": 1, "ended": 0.25, "ended_ci95": [0.25, 0.25]}
    summary["differences"]["ppo - sft"]["recall_things"]["8"] |= {"items": 1}
    write(file, summary)
    shown = Shown(report.render(copied, None, "html"))
    language, ended = shown.row("bits per byte, sft → ppo"), shown.row("share of responses that end, sft → ppo")
    assert language[3:] == ["+0.0107 [0.0067, 0.0147]", "▼ cost"]
    assert ended[3:] == ["+0.250 [0.250, 0.250]", "–"]
    gained = [row[2] for row in shown.rows if row[0] in (TASK, "recall_things") and len(row) == 3]
    assert gained[-2:] == ["+0.052 [0.033, 0.072] ▲ gained", "+0.052 [0.033, 0.072]"]


def test_energy_is_what_its_assumptions_say() -> None:
    spent = {"seconds": 3600.0, "cpu_seconds": 7200.0, "device": "cpu", "processes": 2}
    assert energy(spent) == (20.0, 0.0)  # 2 cores of 10 W for an hour
    assert energy({**spent, "device": "a GPU"}) == (20.0, 700.0)  # and 2 GPUs of 350 W
    assert energy({**spent, "device": "a GPU", "gpu_energy_wh": 123.0}) == (20.0, 123.0)
    assert energy({}) is None


def test_json_has_what_the_files_have(made: Path) -> None:
    found = json.loads(report.render(made, None, "json"))
    for stage in ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate"):
        assert found["stages"][stage]["summary"] == json.loads((made / stage / "summary.json").read_text())
        assert found["stages"][stage]["manifest"] == json.loads((made / stage / "manifest.json").read_text())
    assert found["calibration"] == CALIBRATION
    assert found["recipe"]["ppo"]["kl"]["coefficient"] == 0.1
    assert found["answers"][0]["responses"]["ppo"]["text"] == ATTACK
    assert found["stages"]["ppo"]["curves"]["kl"]["values"] == [update / 10 for update in range(1, 21)]


def test_a_long_curve_is_thinned_and_keeps_its_spikes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made")
    lines = [{"step": step, "loss": 50.0 if step == 7777 else 1.0} for step in range(1, 20001)]
    write_lines(run / "pretrain" / "metrics.jsonl", lines)
    curve = gather(run).stages["pretrain"].curves["loss"]
    assert len(curve.steps) == MOST_POINTS
    assert (curve.steps[0], curve.steps[-1]) == (1, 20000)
    assert curve.values[curve.steps.index(7777)] == 50.0
    assert curve.steps == sorted(curve.steps)


# Text stays text


def test_nothing_in_the_page_loads_or_runs(html: str) -> None:
    shown = Shown(html)
    assert not {"script", "iframe", "object", "embed", "form", "base", "foreignobject"} & set(shown.tags)
    assert not [key for _, key, _ in shown.attributes if key.startswith("on")]
    for tag, key, value in shown.attributes:
        if key in ("href", "src", "xlink:href"):
            assert (value or "").startswith(("#", "data:")), (tag, key, value)
    assert "default-src 'none'" in html
    assert not re.search(r"url\((?!#)|@import|@font-face", html)
    assert "\u202e" not in html and "\x1b" not in html
    everything = " ".join(shown.texts)
    assert "<script>window.hacked=1</script><img src=x onerror=" in everything
    assert "\\x202egnp.exe \\x1b[31m" in everything
    assert "$\\frac{a}{b}$" in everything  # in the charts too, nothing is set as mathematics


def test_ids_are_unique_and_what_they_refer_to_is_there(html: str) -> None:
    shown = Shown(html)
    ids = [value for _, key, value in shown.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    links = [value[1:] for _, key, value in shown.attributes if key == "href" and value and value.startswith("#")]
    links += re.findall(r"url\(#([^)]+)\)", html)
    assert set(links) <= set(ids)


def test_a_chart_escapes_its_texts() -> None:
    lines = [Line(ATTACK, [0, 1], [0.2, 0.8]), Line("]]>&amp;<!--", [0, 1], [0.3, 0.7])]
    svg = charts.draw_fewshot("c", TASK, ["0", "1"], lines, 0.2)
    tree = ElementTree.fromstring(svg)
    assert {node.tag for node in tree.iter()} <= {"svg", "g", "path", "text", "use", "defs", "clipPath", "rect"}
    texts = "".join(node.text or "" for node in tree.iter("text"))
    assert "rules_<b>bold</b>_$x^2$" in texts
    assert "● <script>" in texts and "■ ]]>&amp;<!--" in texts
    assert tree.attrib["aria-label"] == TASK
    assert charts.draw_fewshot("c", TASK, ["0", "1"], lines, 0.2) == svg


def test_lines_differ_without_colour() -> None:
    lines = [Line(name, [0, 1], [height, height + 1]) for height, name in enumerate("abcd")]
    svg = charts.draw_lines("c", "t", ("step", "y"), lines)
    dashes = re.findall(r"stroke-dasharray: [\d., ]+", svg)
    assert len(set(dashes)) == 3  # and one is solid
    for named in ("● a", "■ b", "▲ c", "◆ d"):
        assert f">{named}<" in svg


def test_the_names_of_lines_that_end_together_do_not_overlap() -> None:
    found = charts._spread([1.0, 1.0, 0.99, 0.2], 0.1)
    assert found == pytest.approx([1.0, 0.9, 0.8, 0.2])
    assert charts._spread([0.5], 0.1) == [0.5]


def test_markdown_holds_no_html_link_image_or_mention(tmp_path: Path) -> None:
    evil = "a|b `c` <b>d</b> [e](http://f.g) ![h](http://i.j/k.png) @someone #12 www.l.mn https://o.pq *r* ~~s~~ \\"
    run = make_run(tmp_path / "made", tasks=(evil, "1. x", "- y"), description=evil)
    text = report.render(run, None, "md")
    kinds, cells = set(), []
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text):
        kinds |= {token.type} | {child.type for child in token.children or ()}
        cells += [token.content] if token.type == "inline" else []
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "code_inline", "em_open", "s_open"}
    assert not kinds & {"code_block", "fence"}
    assert "table_open" in kinds and "strong_open" in kinds
    assert not re.search(r"(?i)@\w|://\w|www\.\w|#\d", text)
    header = next(line for line in text.splitlines() if line.startswith("| task | demo."))
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if "demo." in line or "| 0.200 |" in line]
    assert len(bars) == 1 + 3 * 3 and set(bars) == {header.count("|")}


def test_safe_text_can_be_written_anywhere() -> None:
    shown = safe("a\x00b\u202ec\ud800d\uffffe\u200ff\tg\nh")
    assert shown == "a\\x00b\\x202ec\\xd800d\\xffffe\\x200ff\tg\nh"
    shown.encode()
    ElementTree.fromstring(f"<a>{shown}</a>")
    assert safe(shown) == shown
    assert shortened("x" * 10, 4) == "xxxx … (6 more characters)"
    assert signed(-0.0001) == "0.000" and signed(-0.25) == "−0.250" and signed(1234.5, 1) == "+1,234.5"


# What is missing, torn or too large


def test_a_page_has_a_limit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made", tasks=tuple(f"task_{number}" for number in range(600)))
    long = {"text": "ß<&" * 200_000, "ended": True, "tokens": 1}
    asked = [{"role": "user", "content": "x" * 5_000}] * 40
    write_lines(run / "evaluate" / "responses.jsonl", [{"prompt": asked, "responses": {"a": long, "b": long}}] * 5)
    shown = report.render(run, None, "html")
    assert len(shown.encode()) < 3_000_000
    for left_out in (
        "more characters)",
        "32 earlier messages",
        "more tasks are in the table",
        "more rows are left out",
    ):
        assert left_out in shown
    found = json.loads(report.render(run, None, "json"))["stages"]["evaluate"]["summary"]
    assert len(found["differences"]["ppo - sft"]) == 600


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate"])
def test_a_stage_that_was_not_run_is_said_to_be_so(copied: Path, stage: str) -> None:
    shutil.rmtree(copied / stage)
    page = " ".join(Shown(report.render(copied, None, "html")).texts)
    assert f"{stage}: not run. This goes on with it: rlhf run {stage} --recipe" in page
    assert json.loads(report.render(copied, None, "json"))["stages"][stage]["state"] == "not run"
    report.render(copied, None, "md")


def test_an_interrupted_stage_says_where_and_why(copied: Path) -> None:
    (copied / "ppo" / "summary.json").unlink()
    write(copied / "ppo" / "failure.txt", f"the doctor stopped it {ATTACK}")
    with (copied / "ppo" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"update": 21, "score": NaN}\n{"update": 22, "sco\xff')
    shutil.rmtree(copied / "evaluate")
    found = gather(copied).stages["ppo"]
    assert (found.state, found.torn_lines) == ("interrupted", 1)
    text = " ".join(Shown(report.render(copied, None, "html")).texts)
    assert "ppo: interrupted (at update 21; it ended: the doctor stopped it <script>" in text
    assert "1 lines of ppo/metrics.jsonl can't be read" in text
    with RunDir(copied).lock():
        assert gather(copied).stages["ppo"].state == "running"


def test_a_stage_that_was_made_anew_shows_in_those_behind_it(copied: Path) -> None:
    manifest = json.loads((copied / "sft" / "manifest.json").read_text())
    write(copied / "sft" / "manifest.json", {**manifest, "output": "0" * 64})
    assert "made from an earlier sft" in report.render(copied, None, "html")


DAMAGES: dict[str, list[bytes]] = {
    "evaluate/summary.json": [
        b"{",
        b"[]",
        b'{"stage": "evaluate"}',
        b'{"stage": "evaluate", "models": []}',
        b'{"stage": "evaluate", "models": ' + b"[" * 900 + b"]" * 900 + b"}",
        b"\xff\x00",
    ],
    "ppo/summary.json": [
        b"",
        b'{"stage": "ppo", "course": 3, "findings": {"a": 1}, "back_offs": [1, {}], "kl": "x"}',
    ],
    "reward/summary.json": [
        b"null",
        b'{"stage": "reward", "accuracy_by_source": [], "surface_features": {"a": 2}}',
    ],
    "reward/calibration.json": [b"[]", b'{"bins_before": 1, "points": [1, [], ["a", 2]]}', b"{"],
    "pretrain/metrics.jsonl": [
        b"",
        b"\x00\xff\n[]\n1\n{}\n",
        b'{"step": 1, "loss": "nan"}\n{"step": "x"}\n',
        b"[" * 100_000,
    ],
    "evaluate/responses.jsonl": [
        b"x\n{}\n",
        b'{"prompt": 1, "responses": {"a": 1}}\n{"responses": {"a": {"text": 5}}}\n',
    ],
    "sft/manifest.json": [b"{", b'{"inputs": {"stage pretrain": 1}, "versions": [], "output": 3}'],
    "recipe.yaml": [b"name: [1]\nppo: 3\nstages: 4\n", b"- 1\n", b"{}"],
}


@pytest.mark.parametrize(("file", "content"), [(file, one) for file, all_ in DAMAGES.items() for one in all_])
def test_a_damaged_file_is_no_reason_to_fail(copied: Path, file: str, content: bytes) -> None:
    (copied / file).write_bytes(content)
    found = gather(copied)
    page(report.document(found, report.ROOMS[-1]._replace(charts=0)))
    json.loads(report.render(copied, None, "json"))
    report.render(copied, None, "md")


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, one in inner for place in _places(one, (*path, key))]


@pytest.mark.parametrize("stage", ["reward", "ppo", "evaluate"])
def test_any_value_of_a_summary_may_be_of_another_kind(tmp_path: Path, stage: str) -> None:
    run = make_run(tmp_path / "made", tasks=("one",))
    for metrics in run.glob("*/metrics.jsonl"):
        metrics.unlink()
    whole = json.loads((run / stage / "summary.json").read_text())
    for number, place in enumerate(_places(whole)):
        broken = json.loads(json.dumps(whole))
        at = broken
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = (None, "<b>", [], {}, [[1]], {"a": {"b": {}}}, True, -1e308)[number % 8]
        write(run / stage / "summary.json", broken)
        report.render(run, None, "md")


def test_what_is_no_run_is_refused(tmp_path: Path, made: Path) -> None:
    with pytest.raises(MissingInput, match=r"is no run's directory \(it has no recipe.yaml\)"):
        report.render(tmp_path, None, "html")
    with pytest.raises(MissingInput, match="nowhere"):
        report.render(made, tmp_path / "nowhere", "html")
    write(tmp_path / "recipe.yaml", "a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        report.render(tmp_path, None, "html")


# Two runs


def test_two_runs_beside_each_other(made: Path, copied: Path) -> None:
    text = (copied / "recipe.yaml").read_text().replace("coefficient: 0.1", "coefficient: 0.3").replace("seed: 1", "")
    write(copied / "recipe.yaml", text)
    other = json.loads((copied / "evaluate" / "summary.json").read_text())
    other["models"]["ppo"] |= {"bits_per_byte": 0.6, "bits_per_byte_ci95": [0.55, 0.65]}
    for model, version in (("base", 1), ("sft", 2)):
        other["models"][model]["fewshot"]["recall_things"]["8"]["version"] = version
    write(copied / "evaluate" / "summary.json", other)
    shown = Shown(report.render(made, copied, "html"))
    assert shown.row("ppo.kl.coefficient") == ["ppo.kl.coefficient", "0.1", "0.3"]
    assert shown.row("seed") == ["seed", "1", "–"]
    rows = [row[1:] for row in shown.rows if row[:1] == ["bits per byte"]]
    assert rows[-1] == ["0.4975 [0.4875, 0.5075]", "0.6000 [0.5500, 0.6500]", "+0.1025", "apart"]
    assert rows[0] == ["0.2975 [0.2875, 0.3075]", "0.2975 [0.2875, 0.3075]", "0.0000", "overlap"]
    told = [row[4] for row in shown.rows if row[0] == "recall_things, 8 demonstrations"]
    assert told == ["overlap", "other versions of the task", "overlap"]
    found = json.loads(report.render(made, copied, "json"))
    assert found["recipe_differences"] == {"seed": {"a": 1, "b": None}, "ppo.kl.coefficient": {"a": 0.1, "b": 0.3}}
    assert "| ppo.kl.coefficient | 0.1 | 0.3 |" in report.render(made, copied, "md")
    assert report.write_report(copied, made).name == "report-vs-made.html"


# The command, and the end of a run


def test_the_command_writes_and_prints(copied: Path, tmp_path: Path) -> None:
    assert "written to made/report.html" in rlhf("report", "made", cwd=tmp_path)
    assert (copied / "report.html").stat().st_size < 3_000_000
    assert rlhf("report", "made", "--format", "md", cwd=tmp_path).startswith("## made\n")
    rlhf("report", "made", "made", "--format", "json", "--output", "both.json", cwd=tmp_path)
    assert json.loads((tmp_path / "both.json").read_text())["recipe_differences"] == {}
    assert "is none of html, json, md" in rlhf("report", "made", "--format", "pdf", cwd=tmp_path, code=2)
    assert "is no run's directory" in rlhf("report", "nowhere", cwd=tmp_path, code=2)
    assert "no directory" in rlhf("report", "made", "--output", "nowhere/x.html", cwd=tmp_path, code=2)


def test_run_all_writes_it(finished_chain: Path) -> None:
    run = finished_chain / "runs" / "tiny"
    shown = Shown((run / "report.html").read_text(encoding="utf-8"))
    ppo = json.loads((run / "ppo" / "summary.json").read_text())
    assert shown.row("KL, nats")[2].startswith(f"{ppo['kl']:.3f}".replace("-", "−"))
    bins = json.loads((run / "reward" / "calibration.json").read_text())
    assert 0 < len(bins["points"]) <= min(500, bins["responses"])
    assert sum(found["pairs"] for found in bins["bins_before"]) > 0


def test_a_report_that_fails_fails_no_run(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_report", fails)
    chain._report(RunDir(copied), anew=True)
    said = capsys.readouterr().out.strip()
    assert said.count("\n") == 0
    assert "the report could not be written ([Errno 28] No space left on device)" in said
