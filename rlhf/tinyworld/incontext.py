"""The built-in world's two families of in-context tasks, as training documents and as test items.

*rules*: the task line does not say which of several known rules applies; only the demonstrations show it, and the
query is never among them. *recall*: an arbitrary mapping that the demonstrations define, the query among them.

What keeps test items out of training is a property of the text, not a list. Some inputs are *shy*: in training
documents they never come first and never follow themselves. Some ordered pairs of inputs are *strangers*: in training
documents the second never follows the first. A test item asks about a shy input right after a stranger (or after
itself, or after the task line), so no test prompt, with any number of demonstrations, is part of a training document.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from rlhf.tinyworld.words import Draw, facts, text_hash, words

MAX_SHOTS = 8
SHY_SHARE = 0.25
STRANGER_SHARE = 0.2
RECALL_PAIRS = (2, 2, 2, 2, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9)  # most have few: with two, looking up is learned soonest


class Item(NamedTuple):
    """One test item: the demonstrations for one count, the query, and what it can be answered with."""

    task: str
    instruction: str
    demonstrations: tuple[tuple[str, str], ...]
    input: str
    choices: tuple[str, ...]
    answer: int


class Rules(NamedTuple):
    """A family of rules over the same inputs. Every rule gives another output for every input."""

    name: str
    inputs: tuple[str, ...]
    rules: tuple[Callable[[str], str], ...]


class Recall(NamedTuple):
    """A family of arbitrary mappings from keys to values."""

    name: str
    inputs: tuple[str, ...]
    values: tuple[str, ...]


RULES_LINE = "Find the rule."
RECALL_LINE = "Remember the pairs."


def _chinese_numeral(x: str) -> str:
    """A whole number from 1 to 99 in Chinese: 12 is 十二, 20 is 二十."""
    digits = " 一二三四五六七八九"
    tens, ones = divmod(int(x), 10)
    return ((digits[tens] if tens > 1 else "") + "十" if tens else "") + digits[ones].strip()


@cache
def rule_families() -> tuple[Rules, ...]:
    """The rules tasks: five things to do to a number, five to do to an adjective."""
    opposite = {fact.subject: fact.answer for fact in facts() if fact.kind == "opposite"}
    chinese: dict[str, str] = words()["adjectives"]
    return (
        Rules(
            "rules_numbers",
            tuple(str(n) for n in range(2, 31)),
            (
                lambda x: str(int(x) + 1),
                lambda x: str(int(x) - 1),
                lambda x: str(int(x) + 10),
                lambda x: str(int(x) * 10),
                _chinese_numeral,
            ),
        ),
        Rules(
            "rules_words",
            tuple(opposite),
            (
                lambda x: opposite[x],
                lambda x: chinese[x],
                lambda x: f"{x} {x}",
                lambda x: f"very {x}",
                lambda x: f"not {x}",
            ),
        ),
    )


@cache
def recall_families() -> tuple[Recall, ...]:
    """The recall tasks: made-up names to things, and made-up names to colours."""
    w = words()
    return (
        Recall("recall_things", tuple(w["names"]), tuple(w["things"])),
        Recall("recall_colours", tuple(w["names"]), tuple(sorted(set(w["colours"].values())))),
    )


def is_shy(x: str) -> bool:
    """Whether `x` never begins a training document of these families and never follows itself in one."""
    return text_hash("shy", x) < SHY_SHARE


def are_strangers(before: str, x: str) -> bool:
    """Whether `x` never follows `before` in a training document of these families."""
    if before == x:
        return is_shy(x)
    return is_shy(x) and text_hash("strangers", before, x) < STRANGER_SHARE


def lines(instruction: str, pairs: list[tuple[str, str]]) -> str:
    """The text of an in-context document: the task line, then a line for each pair."""
    return "\n".join([instruction, *(f"{x} -> {y}" for x, y in pairs)])


def _walk(pool: list[str], n: int, draw: Draw, *, repeats: bool, previous: str | None = None) -> list[str]:
    """Up to `n` inputs from `pool` in random order, no two strangers side by side, no shy one at the beginning."""
    chosen: list[str] = []
    pool = list(pool)
    while pool and len(chosen) < n:
        allowed = [x for x in pool if (not is_shy(x) if previous is None else not are_strangers(previous, x))]
        if not allowed:
            break
        previous = draw.pick(allowed)
        chosen.append(previous)
        if not repeats:
            pool.remove(previous)
    return chosen


def rules_document(draw: Draw) -> str:
    """A training document: one rule, shown on 4 to 12 different inputs."""
    family = draw.pick(rule_families())
    rule = draw.pick(family.rules)
    inputs = _walk(list(family.inputs), 4 + draw.below(9), draw, repeats=False)
    return lines(RULES_LINE, [(x, rule(x)) for x in inputs])


def recall_document(draw: Draw) -> str:
    """A training document: 2 to 9 arbitrary pairs, each shown once, then asked again in random order."""
    family = draw.pick(recall_families())
    n = draw.pick(RECALL_PAIRS)
    keys = _walk(draw.sample(family.inputs, n), n, draw, repeats=False)
    if len(keys) < 2:
        return recall_document(draw)
    again = _walk(keys, min(4 * n, 16), draw, repeats=True, previous=keys[-1])
    mapping = dict(zip(keys, draw.sample(family.values, len(keys)), strict=True))
    return lines(RECALL_LINE, [(x, mapping[x]) for x in keys + again])


def task_names() -> tuple[str, ...]:
    """The names of all tasks."""
    return (*(family.name for family in rule_families()), *(family.name for family in recall_families()))


def items(task: str, shots: int, n: int, seed: int) -> list[Item]:
    """`n` test items of a task with `shots` demonstrations each.

    The same queries and answers come at every count. Items are balanced: each query is asked once under every rule, or
    once with each of its choices as the answer, so without demonstrations no preference can do better than a guess.
    """
    if not 0 <= shots <= MAX_SHOTS:
        raise ValueError(f"{task} has items with 0 to {MAX_SHOTS} demonstrations, not {shots}")
    for rule_family in rule_families():
        if rule_family.name == task:
            return [_rules_item(rule_family, i, shots, seed) for i in range(n)]
    for recall_family in recall_families():
        if recall_family.name == task:
            return [_recall_item(recall_family, i, shots, seed) for i in range(n)]
    raise ValueError(f"no task named {task!r}; there are {', '.join(task_names())}")


def _stranger(query: str, pool: list[str], draw: Draw) -> str:
    """An input after which the query never comes in training."""
    return draw.pick([x for x in pool if x != query and are_strangers(x, query)])


def _shy_queries(inputs: tuple[str, ...]) -> list[str]:
    """The inputs that can be asked about: shy ones that have a stranger."""
    return [x for x in inputs if is_shy(x) and any(are_strangers(other, x) for other in inputs if other != x)]


def _rules_item(family: Rules, index: int, shots: int, seed: int) -> Item:
    query = Draw("query", family.name, seed, index // len(family.rules)).pick(_shy_queries(family.inputs))
    answer = index % len(family.rules)
    rule = family.rules[answer]
    draw = Draw("demonstrations", family.name, seed, index, shots)
    inputs: list[str] = []
    if shots:
        last = _stranger(query, list(family.inputs), draw)
        others = [x for x in family.inputs if x not in (query, last)]
        inputs = [*draw.sample(others, shots - 1), last]
    return Item(
        family.name,
        RULES_LINE,
        tuple((x, rule(x)) for x in inputs),
        query,
        tuple(r(query) for r in family.rules),
        answer,
    )


def _recall_item(family: Recall, index: int, shots: int, seed: int) -> Item:
    draw = Draw("item", family.name, seed, index // MAX_SHOTS)
    query = draw.pick(_shy_queries(family.inputs))
    values = draw.sample(family.values, MAX_SHOTS)
    answer = index % MAX_SHOTS
    draw = Draw("demonstrations", family.name, seed, index, shots)
    keys = [query] if shots else []
    if shots > 1:
        last = _stranger(query, list(family.inputs), draw)
        others = draw.sample([x for x in family.inputs if x not in (query, last)], shots - 2)
        keys = [*draw.sample([query, *others], shots - 1), last]
    rest = iter(draw.sample([value for i, value in enumerate(values) if i != answer], MAX_SHOTS - 1))
    return Item(
        family.name,
        RECALL_LINE,
        tuple((key, values[answer] if key == query else next(rest)) for key in keys),
        query,
        tuple(values),
        answer,
    )
