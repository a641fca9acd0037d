"""What the stages' plans have in common: what is planned, what comes out, and the models that stages start from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rlhf.data.rows import Kind
from rlhf.errors import DataError, MissingInput, RlhfError
from rlhf.footprint import WORKING, Footprint, Moment
from rlhf.model import LARGE, causal_lm_config, check_embeddings, count_parameters
from rlhf.recipe import JudgeSection, Recipe, Source, StageName, known_base, upstream
from rlhf.rundir import RunDir
from rlhf.sharding import layers_of
from rlhf.tinyworld.words import Split
from rlhf.tokenizer import load_tokenizer, token_info
from stages.common import named_model, open_data, report_faults
from stages.plan.machine import Machine, Work
from stages.sft import prepared

T = TypeVar("T")

ROWS_READ = 5000  # of each source, to know how long rows are
TEXTS_FROM_HUB = 20  # which are long, and stand there one by one

ADAM = 2  # moments of each trained number


@dataclass
class StagePlan:
    """What a stage will do and need."""

    stage: StageName
    lines: list[str] = field(default_factory=list)  # the arithmetic, in words
    parameters: int = 0
    trained: int = 0
    tokens: float = 0.0  # that are read or drawn
    work: Work = field(default_factory=lambda: Work(0.0))
    memory: "Memory | None" = None  # of one process
    disk: float = 0.0  # bytes
    shown: str = ""  # the first of what it reads, as the model sees it
    unchecked: list[str] = field(default_factory=list)  # and why
    advice: list[str] = field(default_factory=list)  # what to change where it doesn't fit


class Memory(NamedTuple):
    """Bytes of one process above what the libraries take, when they are most."""

    phase: str
    roles: dict[str, int]

    @property
    def total(self) -> int:
        """All roles together."""
        return sum(self.roles.values())


HOLES = "holes between them (the C library's)"
TRAINING_HOLES, SPARED_HOLES, READING_HOLES = 0.22, 0.05, 0.45  # of all that was not read from a file
BUCKETS = "gradients on their way (DDP)"
LIBRARIES, FIRST_USE = "the libraries' own", 160 * 2**20


def memory_of(
    footprint: Footprint,
    machine: Machine,
    learner: nn.Module | None = None,
    trained: int = 0,
    *,
    spares: bool = False,
) -> Memory:
    """What a footprint means on a machine.

    `learner` is the model that learns, and `trained` how many numbers it learns; `spares`: whether it is to take little
    memory, if it is large (rlhf.model.spare_memory).
    Several processes with whole models hold each gradient twice, the second time in DDP's buckets.
    On a CPU more comes on top, as was measured (scripts/bench_plan): what is freed leaves holes that the next tensor
    doesn't fit, a fifth of what is not read from files while a model learns, more where one only reads, less where it
    is given back; and kernels, packed factors and what else is made at first use.
    """
    moments = footprint.moments
    if machine.sharded:
        assert learner is not None
        moments = [_in_pieces(moment, machine, learner) for moment in moments]
    peak = max(moments, key=lambda moment: moment.total)
    roles = {name: size for name, size in peak.roles.items() if size}
    if machine.processes > 1 and not machine.sharded and trained:
        roles[BUCKETS] = 4 * trained
    if not machine.on_gpus:
        made = sum(size for name, size in roles.items() if not name.endswith("weights"))
        share = READING_HOLES if learner is None else TRAINING_HOLES
        if spares and learner is not None and count_parameters(learner) >= LARGE:
            share = SPARED_HOLES
        roles |= {HOLES: round(share * made), LIBRARIES: FIRST_USE}
    return Memory(peak.phase, roles)


GATHERED = "weights gathered from their pieces"


def _in_pieces(moment: Moment, machine: Machine, learner: nn.Module) -> Moment:
    """The moment with FSDP2 (rlhf.sharding): each process holds its piece of what belongs to the weights, in float32.

    In a step what stands outside the layers is gathered, and two layers, the second of which is fetched in advance;
    elsewhere one model after the other.
    """
    size = next(iter(learner.parameters())).element_size()  # of a gathered weight
    roles = {
        role: bytes_ if role == WORKING else bytes_ * 4 // size // machine.processes
        for role, bytes_ in moment.roles.items()
    }
    if "step" in moment.phase:
        layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(learner)]
        outside = sum(p.numel() for p in learner.parameters()) - sum(layers)
        gathered = size * (outside + 2 * max(layers, default=0))
    else:
        gathered = max((bytes_ for role, bytes_ in moment.roles.items() if role.endswith("weights")), default=0)
    return Moment(moment.phase, {**roles, GATHERED: gathered})


@contextmanager
def counting(found: StagePlan) -> Iterator[None]:
    """Within, a stage is gone through; where that fails for a reason that isn't the user's, memory is not known.

    A model of code of its own may ask for numbers, which there are none of here.
    """
    try:
        yield
    except RlhfError:
        raise
    except Exception as error:  # whatever a model and torch raise
        why = (str(error).splitlines() or [""])[0][:200]
        found.unchecked.append(
            f"memory: this model can't be gone through without numbers ({type(error).__name__}: {why})"
        )


class Beginning(NamedTuple):
    """The model that a stage starts from, as far as it is known before anything has run."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None  # None: not there yet
    name: str

    @property
    def context(self) -> int:
        """Tokens that it can read."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", None) or 2**31)

    def grown(self) -> "Beginning":
        """With an embedding for every token that its tokenizer has been given, as stages make it."""
        text = self.config.get_text_config()
        if self.tokenizer is not None:
            text.vocab_size = max(text.vocab_size, len(self.tokenizer))
        return self


class JudgePlan(NamedTuple):
    """A judge's model."""

    title: str
    config: PreTrainedConfig
    heads: int


class Context(NamedTuple):
    """A recipe on a machine."""

    recipe: Recipe
    run: RunDir
    machine: Machine
    redone: frozenset[StageName] = frozenset()  # stages that are there, and will be made anew

    def beginning(self, stage: StageName) -> Beginning:
        """What the stage starts from: the model of a stage before it, where that is there, or else what it will be."""
        for name in ("sft", "pretrain"):
            if name in upstream(self.recipe, stage) and self._there(name):
                return self.named(str(self.run.stage(name).model))
        found = self.named(self.recipe.base) if self.recipe.base is not None else self._new()
        if "sft" in upstream(self.recipe, stage) and self.recipe.sft and found.tokenizer is not None:
            prepared(self.recipe, self.recipe.sft, found.name, found.tokenizer)
        return found.grown()

    def _there(self, stage: StageName) -> bool:
        """Whether a stage's model is there, to be stood on."""
        made = self.run.stage(stage)
        return stage not in self.redone and made.summary() is not None and made.model.is_dir()

    def named(self, name: str) -> Beginning:
        """A model by its directory or hub id. Raises MissingInput where nothing is known of it."""
        start = named_model(self.recipe, name)
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=start.remote_code)
        except Exception as error:  # whatever the libraries raise for what isn't there, or isn't a configuration
            known = None if Path(name).is_dir() else known_base(name)
            if known is None:
                why = (str(error).splitlines() or [""])[0]
                raise MissingInput(f"no configuration could be loaded from {name}: {why[:300]}") from None
            config = AutoConfig.for_model(**known)
        if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")) and not any(Path(name).glob("*.bin")):
            raise MissingInput(f"{name} holds a model's configuration and no weights (*.safetensors)")
        try:
            tokenizer = start.tokenizer()
        except RlhfError:
            if Path(name).is_dir():
                raise
            return Beginning(config, None, name)
        check_embeddings(config.get_text_config().vocab_size, tokenizer, name)
        return Beginning(config, tokenizer, name)

    def judges(self, sections: Iterable[JudgeSection], beginning: Beginning) -> list[JudgePlan]:
        """The models of judges; that of the reward stage as it will be, on what `beginning` says."""
        found, reward = [], self.recipe.reward
        for section in sections:
            if section.model is None:
                continue
            ours = section.model == "reward"
            name = section.model if not ours else (reward.from_ or reward.start if reward else None)
            config = self.named(name).config if name else beginning.config
            heads = reward.heads if ours and reward and not reward.from_ else None
            found.append(JudgePlan(section.title, config, heads or (config.num_labels if name else 1)))
        return found

    def _new(self) -> Beginning:
        """The model that pretrain will make."""
        m, recipe = self.recipe.model, self.recipe
        tokenizer = load_tokenizer(self.run.stage("tokenizer").model) if self._there("tokenizer") else None
        assert recipe.tokenizer is not None
        special: dict[str, Any] = token_info(tokenizer) if tokenizer else {"pad_token_id": 0}
        config = causal_lm_config(
            m.architecture,
            vocab_size=len(tokenizer) if tokenizer else recipe.tokenizer.vocab_size,
            **m.model_dump(exclude={"depth", "architecture", "initialisation"}),
            special=special,
        )
        return Beginning(config, tokenizer, "random weights")


def read_if_there(found: StagePlan, sources: Sequence[Source], what: str, read: Callable[[], T]) -> T | None:
    """What `read` gives; None, and a word in the plan, where some of it is on the hub and can't be had.

    A fault of files, a folder in the hub's shape among them, and of a row is the user's, and raised.
    """
    try:
        return read()
    except RlhfError as error:
        if isinstance(error, DataError) or not any(is_far(source) for source in sources):
            raise
        found.unchecked.append(f"{what}: {error}")
        return None


def read_first(
    context: Context,
    stage: StageName,
    sources: Sequence[Source],
    kind: Kind,
    split: Split,
    then: Callable[[Any], Any] | None = None,
    rows: int = ROWS_READ,
) -> list[Any]:
    """The first rows of the sources, as `open_data` gives them; says what was skipped."""
    if not sources:
        return []
    few = {"texts": TEXTS_FROM_HUB}.get(kind)
    opened = open_data(context.recipe, stage, first_rows(sources, rows, few), kind, split, then)
    found = list(opened)
    report_faults(opened)
    return found


def is_far(source: Source) -> bool:
    """Whether it is read over the network; a name that can only be a path's isn't."""
    return source.hub is not None and not Path(source.hub).is_dir() and not source.hub.startswith((".", "/", "~"))


def first_rows(sources: Iterable[Source], rows: int = ROWS_READ, from_hub: int | None = None) -> tuple[Source, ...]:
    """The sources, of which only the first rows are read; those that are on the hub are streamed, not downloaded.

    `from_hub`: how many rows of these, where that is another number.
    """
    found = []
    for source in sources:
        far = is_far(source)
        most = from_hub if far and from_hub else rows
        change: dict[str, Any] = {"rows": min(source.rows or most, most)}
        if far:
            change |= {"streaming": True, "split": source.split.partition("[")[0]}  # a stream has no slices
        found.append(source.model_copy(update=change))
    return tuple(found)
