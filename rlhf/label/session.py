"""One sitting of `rlhf label`: asks question after question until all are answered or the person leaves."""

import getpass
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf.data.reader import Faults
from rlhf.errors import MissingInput, RlhfError, UserError
from rlhf.label.answers import AnswerLog, Tally, tally
from rlhf.label.pairs import Pair, in_order, next_question, read_pairs
from rlhf.label.screen import Screen
from rlhf.recipe import check_name
from rlhf.rundir import RunDir


def label(run_dir: Path, *, name: str, pairs: Path | None, repeats: float, seed: int) -> None:
    """Has a person compare the responses that the reward stage has drawn, or those of a file.

    Raises MissingInput where there are none, UserError for a name that can't be one or that is labelling elsewhere.
    """
    name = person(name)
    if pairs and not run_dir.is_dir():
        raise MissingInput(f"no directory {run_dir}, where the answers would be kept")
    files = [pairs] if pairs else responses_of(run_dir)
    faults = Faults("skip")
    order = in_order(read_pairs(files, faults), seed)
    with AnswerLog(RunDir(run_dir).labels, name) as log, Screen() as screen:
        notes = [faults.report()]
        if log.torn:
            notes.append(f"the last answer was cut short when its process ended, and is asked again ({log.path})")
        try:
            with suppress(KeyboardInterrupt, EOFError):
                _ask_all(log, screen, order, seed, repeats, " ".join(filter(None, notes)))
        finally:
            screen.end()
        screen.say(_totals(log, order))


def person(name: str) -> str:
    """The name that answers are kept under: the one given, or the user's. Raises UserError where it can't be one."""
    try:
        found = name or getpass.getuser()
    except (OSError, KeyError):
        raise UserError("--name is missing: who is labelling? (there is no login name)") from None
    try:
        return check_name(found)
    except ValueError as error:
        raise UserError(f"--name {found!r}: {error}") from None


def responses_of(run_dir: Path) -> list[Path]:
    """The files of responses that the run's reward stage has drawn. Raises MissingInput, with the command, without."""
    if not (run_dir / "recipe.yaml").is_file():
        raise MissingInput(f"{run_dir} is no run's directory (it has no recipe.yaml)")
    folder = RunDir(run_dir).stage("reward").path
    files = [folder / f"responses.{split}.jsonl" for split in ("train", "test")]
    found = [file for file in files if file.is_file()]
    if not found:
        absolute = run_dir.resolve()
        command = [
            "rlhf",
            "run",
            "reward",
            "--recipe",
            str(run_dir / "recipe.yaml"),
            "--runs-dir",
            str(absolute.parent),
        ]
        raise MissingInput(
            f"no responses to compare: {files[0]} is written by the reward stage when it collects "
            f"(reward.collect.labeller: person). Run\n  {shlex.join(command)}\nfirst, or name a file with --pairs"
        )
    return found


def _ask_all(log: AnswerLog, screen: Screen, order: Sequence[Pair], seed: int, repeats: float, note: str) -> None:
    """Returns when every pair is answered or the person wants to leave."""
    while question := next_question(order, log.answers, seed, repeats):
        shown = time.monotonic()
        said = screen.ask(question, _header(log, order), note)
        note = ""
        if said == "quit":
            return
        with _uninterrupted(), _kept(log):
            if said != "undo":
                log.record(question, said, time.monotonic() - shown)
            else:
                note = "taken back" if log.undo() else "there is no answer to take back"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within, SIGINT and SIGTERM wait: an answer is kept whole, in both files."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _kept(log: AnswerLog) -> Iterator[None]:
    """Within, an answer is written. Raises RlhfError, saying what is lost, where there is no room for it."""
    try:
        yield
    except OSError as error:
        raise RlhfError(
            f"{log.path} can't be written: {error.strerror}. The last key counts for nothing; every answer before it "
            "is kept there: free some space and give the same command again, which goes on with that question"
        ) from None


def _done(log: AnswerLog, order: Sequence[Pair]) -> int:
    return len({pair.id for pair in order} & {answer.pair.id for answer in log.answers})


def _header(log: AnswerLog, order: Sequence[Pair]) -> str:
    return f"{log.name}: {_done(log, order)} of {len(order)} pairs" + _agreement(tally(log.answers))


def _agreement(found: Tally) -> str:
    estimate = found.agreement
    if estimate is None:
        return ""
    share = f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"; agreement on repeats {found.agreeing}/{found.repeats} = {share}"


def _totals(log: AnswerLog, order: Sequence[Pair]) -> str:
    found = tally(log.answers)
    kept = f"the preferences are in {log.preferences_file}" if found.preferences else "no preference yet"
    return (
        f"{_header(log, order)}\npreferred {found.preferences}, tie {found.ties}, both bad {found.both_bad}, "
        f"skipped {found.skipped}\n{kept}"
    )
