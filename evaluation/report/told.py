"""The end of a report: the same prompts answered by every model, and where the run comes from."""

from typing import Any

from evaluation.report.document import Answers, Block, Cell, Folded, Paragraph, Reply, Section, Table, text
from evaluation.report.gather import Report
from evaluation.report.measured import missing
from evaluation.report.reading import group, number, one_line, shortened, signed, whole, words

MOST_MESSAGES, MOST_MODELS = 8, 12
DIGEST = 12  # characters of a digest that are shown
LONGEST_RECIPE, LONGEST_COMMAND = 100_000, 500


def answers(report: Report, most: int, longest: int) -> Section:
    """The first prompts with the models' responses, each of at most so many characters."""
    title = "The same prompts, answered by each model"
    shown = report.answers[:most]
    if not shown:
        nothing = missing(report, "No responses (evaluate/responses.jsonl)", asks="evaluate.prompts")
        return Section("answers", title, nothing)
    blocks: list[Block] = [_answered(line, longest) for line in shown]
    if report.answers_in_all > len(shown):
        blocks.append(
            Paragraph(
                f"{len(shown)} of {report.answers_in_all:,} prompts; all are in evaluate/responses.jsonl.", "note"
            )
        )
    return Section("answers", title, blocks)


def _answered(line: dict[str, Any], longest: int) -> Answers:
    said = line.get("prompt")
    messages = said if isinstance(said, list) else [{"role": "prompt", "content": said}]
    prompt = [
        (one_line(words(message, "role"), 20), shortened(words(message, "content"), longest))
        for message in messages[-MOST_MESSAGES:]
    ]
    if len(messages) > MOST_MESSAGES:
        prompt = [("", f"… ({len(messages) - MOST_MESSAGES:,} earlier messages)"), *prompt]
    responses = group(line, "responses")
    return Answers(prompt, [_reply(name, group(responses, name), longest) for name in list(responses)[:MOST_MODELS]])


def _reply(model: str, found: dict[str, Any], longest: int) -> Reply:
    facts = [f"{whole(number(found, 'tokens'))} tokens"]
    facts += [f"{key} {signed(value, 2)}" for key in ("score", "gold") if (value := number(found, key)) is not None]
    if found.get("ended") is False:
        facts.append("did not end")
    return Reply(one_line(model), shortened(words(found, "text"), longest), ", ".join(facts))


def lineage(report: Report) -> Section:
    """Fingerprints, versions, commands, seed and recipe."""
    done = {name: stage for name, stage in report.stages.items() if stage.manifest}
    blocks: list[Block] = []
    if done:
        rows = [
            [
                text(name),
                text(words(stage.summary, "started").replace("T", " ").replace("+00:00", " UTC") or "–"),
                _digest(words(stage.manifest, "output")),
                *_made_from(stage.manifest),
                _digest(words(stage.manifest, "git_commit")),
            ]
            for name, stage in done.items()
        ]
        header = ("stage", "started", "model's SHA-256", "made from", "commit")
        notes = (
            f"Digests are shortened to {DIGEST} characters. Seed: {one_line(str(report.recipe.get('seed', '–')))}.",
        )
        blocks.append(Table("Fingerprints", header, rows, notes, in_markdown=False))
        blocks.append(_versions(report))
        commands = dict.fromkeys(command for stage in done.values() if (command := words(stage.manifest, "command")))
        blocks.append(Folded("Commands", "\n".join(shortened(command, LONGEST_COMMAND) for command in commands), True))
    else:
        blocks.append(Paragraph("No stage has begun.", "missing"))
    blocks.append(Folded("The recipe, as resolved", shortened(report.recipe_text, LONGEST_RECIPE)))
    return Section("lineage", "Lineage", blocks)


def _digest(found: str) -> Cell:
    return Cell(one_line(found[:DIGEST]) or "–", full=found, number=False)


def _made_from(manifest: dict[str, Any]) -> list[Cell]:
    inputs = group(manifest, "inputs")
    found = {key.removeprefix("stage "): str(value) for key, value in inputs.items() if key.startswith("stage ")}
    told = ", ".join(f"{name} {digest[:DIGEST]}" for name, digest in found.items())
    return [Cell(told or "–", full=", ".join(f"{name} {digest}" for name, digest in found.items()), number=False)]


def _versions(report: Report) -> Table:
    found: dict[str, dict[str, list[str]]] = {}
    for name, stage in report.stages.items():
        for package, version in group(stage.manifest, "versions").items():
            found.setdefault(package, {}).setdefault(str(version), []).append(name)
    rows = [
        [
            text(one_line(package)),
            text(
                one_line(next(iter(versions)))
                if len(versions) == 1
                else "; ".join(f"{one_line(version)} ({', '.join(stages)})" for version, stages in versions.items())
            ),
        ]
        for package, versions in found.items()
    ]
    return Table("Versions", ("package", "version"), rows, in_markdown=False)
