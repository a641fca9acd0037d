"""The course of each stage, from its metrics."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from evaluation.report.charts import Line, draw_lines
from evaluation.report.document import Block, Chart, Charts, Paragraph, Section
from evaluation.report.gather import Report, StageReport
from evaluation.report.reading import one_line
from rlhf.runtime import format_number

MOST_LINES = 8


class Plot(NamedTuple):
    """What one chart shows of a stage: keys of its metrics, each with the name of its line.

    A key that ends in `/*` stands for all that begin so; their lines are called by what comes in its place.
    """

    title: str
    unit: str
    keys: dict[str, str]
    share: bool = False  # between 0 and 1
    falling: bool = False  # as losses do


RATE = Plot("Learning rate", "learning rate", {"learning_rate": "rate"})
PLOTS: dict[str, tuple[Plot, ...]] = {
    "pretrain": (
        Plot("Loss", "nats per token", {"loss": "training", "validation_nats_per_token": "held out"}, falling=True),
        Plot("Held out, by source", "nats per token", {"validation_nats_per_token/*": ""}, falling=True),
        RATE,
        Plot("Batch", "tokens per step", {"tokens_per_step": "batch"}),
        Plot("Utilisation", "of the matrix product's peak", {"model_flops_utilisation": "FLOPs"}, share=True),
    ),
    "sft": (
        Plot("Loss", "nats per token", {"loss": "training", "validation_nats_per_token": "held out"}, falling=True),
        RATE,
    ),
    "reward": (
        Plot("Loss", "nats per comparison", {"loss": "training", "validation_loss": "held out"}),
        Plot("Accuracy", "share right", {"accuracy": "training", "validation_accuracy": "held out"}, share=True),
        RATE,
    ),
    "ppo": (
        Plot("Score", "judge's score", {"score": "episodes", "validation_score": "held out"}),
        Plot("Gold reward", "gold reward", {"gold": "episodes", "validation_gold": "held out"}),
        Plot("KL to the reference", "nats per response", {"kl": "episodes", "validation_kl": "held out"}),
        Plot("Entropy", "nats per token", {"entropy": "policy"}),
        Plot("Length", "tokens", {"response_tokens": "episodes", "validation_response_tokens": "held out"}),
        Plot("Responses that end", "share", {"ended": "episodes", "validation_ended": "held out"}, share=True),
        Plot("Clipped tokens", "share", {"clip_fraction": "policy"}),
        Plot("Explained variance", "of the returns", {"explained_variance": "critic"}),
        Plot("Learning rate", "learning rate", {"learning_rate": "policy", "critic_learning_rate": "critic"}),
    ),
}


def curves(report: Report) -> Section:
    """A chart for each figure that a stage logs."""
    blocks: list[Block] = []
    for name, stage in report.stages.items():
        if name not in PLOTS:
            continue
        drawn = list(_drawn(name, {"": stage}))
        if drawn:
            blocks.append(Paragraph(name, "heading"))
            blocks.append(Charts(drawn))
            blocks.extend(Paragraph(told, "note") for told in _left_out(stage))
        else:
            blocks.append(Paragraph(f"{name} has logged nothing yet ({stage.state}). Run: {stage.command}", "missing"))
    return Section("curves", "Curves", blocks or [Paragraph("No stage of this run logs its course.", "missing")])


def compared_curves(first: Report, second: Report) -> Section:
    """The curves of two runs in one chart each."""
    blocks: list[Block] = []
    for name in PLOTS:
        both = {letter: run.stages[name] for letter, run in (("A", first), ("B", second)) if name in run.stages}
        drawn = list(_drawn(name, both))
        if drawn:
            blocks.append(Paragraph(name, "heading"))
            blocks.append(Charts(drawn))
            left_out = [f"{letter}: {told}" for letter, stage in both.items() for told in _left_out(stage)]
            blocks.extend(Paragraph(told, "note") for told in left_out)
    return Section("curves", "Curves", blocks or [Paragraph("Neither run has logged anything.", "missing")])


def _drawn(name: str, stages: dict[str, StageReport]) -> Iterator[Chart]:
    """The charts of one stage of one run, or of several runs by their letters."""
    across = "update" if name == "ppo" else "step"
    for plot in PLOTS[name]:
        named = {key: said for stage in stages.values() for key, said in _named(plot, stage)}
        lines = [
            Line(f"{letter} {said}".strip() if len(named) > 1 or not letter else letter, curve.steps, curve.values)
            for letter, stage in stages.items()
            for key, said in named.items()
            if (curve := stage.curves.get(key)) and curve.values
        ]
        if lines:
            labels = (across, plot.unit)
            draw = partial(
                draw_lines, title=plot.title, labels=labels, lines=lines, share=plot.share, falling=plot.falling
            )
            yield Chart(draw, f"{plot.title} ends at {', '.join(_end(line, len(lines)) for line in lines)}.")


def _named(plot: Plot, stage: StageReport) -> Iterator[tuple[str, str]]:
    """The keys of a plot that the stage has logged, with the names of their lines."""
    for key, said in plot.keys.items():
        beginning = key.removesuffix("*")
        if beginning == key:
            yield key, said
        else:
            found = sorted(each for each in stage.curves if each.startswith(beginning))
            yield from ((each, one_line(each.removeprefix(beginning), 30)) for each in found[:MOST_LINES])


def _end(line: Line, of: int) -> str:
    return format_number(line.y[-1]) + (f" ({line.name})" if of > 1 else "")


def _left_out(stage: StageReport) -> Iterator[str]:
    if stage.torn_lines:
        yield f"{stage.torn_lines:,} lines of {stage.name}/metrics.jsonl can't be read and are left out."
    lost = {key: curve.not_finite for key, curve in stage.curves.items() if curve.not_finite}
    for key, count in lost.items():
        yield f"{count:,} values of {key} are no finite numbers and aren't drawn."
