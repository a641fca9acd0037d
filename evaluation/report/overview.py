"""The beginning of a report: what came of the run, and what each stage was and took."""

from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

from evaluation.report.document import Block, Cell, Facts, Paragraph, Section, Table, text
from evaluation.report.energy import ASSUMPTIONS, energy
from evaluation.report.gather import Report, StageReport
from evaluation.report.reading import group, in_brackets, interval, items, number, one_line, shortened, whole
from evaluation.report.reading import with_digits as digits
from rlhf.runtime import format_seconds

MOST_SOURCES, MOST_ROLLBACKS = 6, 5
LONGEST_DESCRIPTION, LONGEST_FAILURE = 600, 400
WORK = {  # what a stage did: key of its summary -> word
    "tokenizer": {"texts": "texts"},
    "pretrain": {"steps": "steps", "tokens": "tokens"},
    "sft": {"steps": "steps", "tokens": "tokens"},
    "reward": {"steps": "steps", "pairs_train": "pairs"},
    "ppo": {"updates": "updates", "episodes": "episodes"},
    "evaluate": {},
}
FEWSHOT = "few-shot accuracy"


def headline(report: Report) -> Section:
    """What came of it, in a sentence and a few numbers."""
    blocks: list[Block] = []
    if report.description:
        blocks.append(Paragraph(shortened(report.description, LONGEST_DESCRIPTION), "lead"))
    told = outcome(report)
    if told:
        blocks.append(Paragraph(told))
        blocks.append(Facts(list(_facts(report))))
    unfinished = [stage for stage in report.stages.values() if stage.state != "done"]
    blocks.extend(Paragraph(f"{stage.name}: {where_it_stands(stage)}", "warning") for stage in unfinished)
    if not told:
        blocks.append(Paragraph("There is no result yet to tell in a sentence.", "missing"))
    return Section("outcome", "What came of it", blocks)


def where_it_stands(stage: StageReport) -> str:
    """The state of a stage that isn't done, and what runs it."""
    note = f" ({shortened(stage.note, LONGEST_FAILURE)})" if stage.note else ""
    return f"{stage.state}{note}." + ("" if stage.state == "running" else f" This goes on with it: {stage.command}")


def outcome(report: Report) -> str:
    """One sentence with what alignment changed; empty where nothing of it is known."""
    ppo, models = report.summary("ppo"), group(report.summary("evaluate"), "models")
    parts = []
    for key, what in (("gold", "the gold reward"), ("score", "the judge's score")):
        before, after = number(ppo, f"{key}_before"), number(ppo, f"{key}_after")
        if before is not None and after is not None:
            best = number(ppo, "gold_best") if key == "gold" else None
            moved = "raised" if after > before else "lowered" if after < before else "kept"
            of = "" if best is None else f" of {digits(best, 2)}"
            parts.append(f"PPO {moved} {what} from {digits(before, 2)} to {digits(after, 2)}{of}")
            break
    kl = number(ppo, "kl")
    if parts and kl is not None:
        parts[0] += f" at a KL of {digits(kl, 1)} nats"
    sft, tuned = group(models, "sft"), group(models, "ppo")
    before, after = number(sft, "bits_per_byte"), number(tuned, "bits_per_byte")
    if before is not None and after is not None:
        parts.append(f"bits per byte went from {digits(before)} to {digits(after)}")
    shared = shared_accuracy(sft, tuned)
    if shared:
        count, tasks, before, after = shared
        parts.append(
            f"{FEWSHOT} at {count} demonstrations ({tasks} tasks) from {digits(before, 2)} to {digits(after, 2)}"
        )
    if not parts:
        return _earlier_outcome(report)
    return "; ".join(parts) + "."


def _earlier_outcome(report: Report) -> str:
    """What the last stage that is done says, where PPO isn't."""
    reward, sft, pretrain = (report.summary(stage) for stage in ("reward", "sft", "pretrain"))
    told = []
    if (loss := number(pretrain, "validation_nats_per_token")) is not None:
        before = number(group(pretrain, "before"), "validation_nats_per_token")
        moved = "ended at" if before is None else f"went from {digits(before)} to"
        told.append(f"pretraining {moved} {digits(loss)} nats per token on held-out documents")
    if (loss := number(sft, "validation_nats_per_token")) is not None:
        told.append(f"SFT at {digits(loss)} on held-out dialogues")
    if (accuracy := number(reward, "accuracy")) is not None:
        told.append(f"the reward model is right on {digits(accuracy, 2)} of the held-out comparisons")
    return ("; ".join(told)[:1].upper() + "; ".join(told)[1:] + ".") if told else ""


def shared_accuracy(first: dict[str, Any], second: dict[str, Any]) -> tuple[str, int, float, float] | None:
    """Mean accuracy of two models over the tasks that both did at the largest common number of demonstrations."""
    both: dict[int, list[tuple[float, float]]] = {}
    for task, counts in group(first, "fewshot").items():
        for count in counts if isinstance(counts, dict) else ():
            a = number(group(counts, count), "accuracy")
            b = number(group(second, "fewshot", task, count), "accuracy")
            if a is not None and b is not None and str(count).isdecimal():
                both.setdefault(int(count), []).append((a, b))
    if not both:
        return None
    count = max(both)
    return str(count), len(both[count]), fmean(a for a, _ in both[count]), fmean(b for _, b in both[count])


def _facts(report: Report) -> Iterable[tuple[str, str, str]]:
    ppo = report.summary("ppo")
    for key, what in (("gold", "gold reward"), ("score", "judge's score")):
        before, after = number(ppo, f"{key}_before"), number(ppo, f"{key}_after")
        if before is not None and after is not None:
            gained = interval(ppo, f"{key}_gain")
            yield (
                f"{what}, PPO",
                f"{digits(before, 2)} → {digits(after, 2)}",
                (f"gain {in_brackets(gained, 2)}" if gained else ""),
            )
    if (kl := number(ppo, "kl")) is not None:
        yield "KL to the SFT model", f"{digits(kl, 2)} nats", in_brackets(interval(ppo, "kl"), 2)
    reward = report.summary("reward")
    if (accuracy := number(reward, "accuracy")) is not None:
        length = number(reward, "length_baseline_accuracy")
        yield (
            "reward model is right",
            digits(accuracy, 2),
            "" if length is None else f"longer wins: {digits(length, 2)}",
        )
    seconds = [number(stage.summary, "seconds") for stage in report.stages.values()]
    if any(seconds):
        total = sum(value or 0.0 for value in seconds)
        yield "the whole run", format_seconds(total), "minutes:seconds" if total < 3600 else "hours:minutes:seconds"


# The chain


def chain(report: Report) -> Section:
    """What each stage was made of, did and took."""
    stages = list(report.stages.values())
    did = [[text(stage.name), _state(stage), text(sources(report, stage.name)), text(_work(stage))] for stage in stages]
    took = [_cost(stage) for stage in stages if stage.summary]
    blocks: list[Block] = [Table("The stages", ("stage", "state", "data", "work"), did)]
    if took:
        header = (
            "stage",
            "parameters",
            "time",
            "CPU-seconds",
            "MiB",
            "processes × threads",
            "device",
            "energy, Wh",
        )
        notes = (
            "MiB: peak memory of the largest process. Time counts interrupted attempts up to the checkpoint that the "
            f"stage went on from. {ASSUMPTIONS}",
        )
        blocks.append(Table("What they took", header, [*took, _total(stages)], notes))
    blocks.extend(Paragraph(told, "note") for stage in stages for told in _rolled_back(stage))
    return Section("chain", "The chain at a glance", blocks)


def _state(stage: StageReport) -> Cell:
    note = shortened(stage.note, LONGEST_FAILURE)
    return Cell(stage.state, note, number=False)


def sources(report: Report, stage: str) -> str:
    """What a stage reads, as the recipe names it."""
    section = report.recipe.get(stage)
    found = [
        f"{key.replace('.', ' ').replace('_', ' ')}: {_source(source)}"
        for key, value in flattened(section if isinstance(section, dict) else {}).items()
        for source in (value if isinstance(value, list) else ())
        if isinstance(source, dict) and any(source.get(kind) for kind in ("builtin", "path", "hub"))
    ]
    more = f"; and {len(found) - MOST_SOURCES} more" if len(found) > MOST_SOURCES else ""
    return "; ".join(found[:MOST_SOURCES]) + more or "–"


def _source(source: dict[str, Any]) -> str:
    where = next(str(source[kind]) for kind in ("builtin", "path", "hub") if source.get(kind))
    rows = number(source, "rows")
    return one_line(where) + (f" ({whole(rows)} rows)" if rows is not None else "")


def flattened(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists stay."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flattened(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def _work(stage: StageReport) -> str:
    known = [(number(stage.summary, key), word) for key, word in WORK[stage.name].items()]
    found = ", ".join(f"{whole(value)} {word}" for value, word in known if value is not None)
    models = len(group(stage.summary, "models"))
    return found or (f"{models} models measured" if models else "–")


def _rolled_back(stage: StageReport) -> Iterator[str]:
    """What was done about spikes of the loss."""
    rollbacks = [each for each in items(stage.summary, "rollbacks") if isinstance(each, dict)]
    for each in rollbacks[:MOST_ROLLBACKS]:
        rows = each.get("skipped_rows")
        skipped = f"; rows {rows[0]} to {rows[1]} were skipped" if isinstance(rows, list) and len(rows) == 2 else ""
        where = f"rolled back at step {each.get('step')} to step {each.get('back_to_step')}"
        yield one_line(f"{stage.name} {where}: {each.get('cause')}{skipped}.", 200)
    if len(rollbacks) > MOST_ROLLBACKS:
        yield f"{stage.name}: {len(rollbacks) - MOST_ROLLBACKS:,} rollbacks more."


def _cost(stage: StageReport) -> list[Cell]:
    summary, spent = stage.summary, energy(stage.summary)
    seconds, parameters = number(summary, "seconds"), number(summary, "parameters")
    return [
        text(stage.name),
        Cell(whole(parameters) if parameters else "–"),
        Cell("–" if seconds is None else format_seconds(seconds)),
        Cell(digits(number(summary, "cpu_seconds"), 1)),
        Cell(whole(number(summary, "peak_memory_mib"))),
        Cell(f"{whole(number(summary, 'processes'))} × {whole(number(summary, 'threads'))}"),
        text(one_line(str(summary.get("device", "–")))),
        Cell("–" if spent is None else f"{digits(spent.total, 2)}"),
    ]


def _total(stages: Iterable[StageReport]) -> list[Cell]:
    summaries = [stage.summary for stage in stages if stage.summary]
    seconds, cpu = (sum(number(s, key) or 0.0 for s in summaries) for key in ("seconds", "cpu_seconds"))
    memory = max((number(s, "peak_memory_mib") or 0.0 for s in summaries), default=0.0)
    used = sum(spent.total for s in summaries if (spent := energy(s)))
    return [
        text("all"), Cell(""), Cell(format_seconds(seconds)), Cell(digits(cpu, 1)), Cell(whole(memory)), Cell(""),
        text(""), Cell(digits(used, 2)),
    ]  # fmt: skip
