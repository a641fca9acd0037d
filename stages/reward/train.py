"""Training a reward model: our Bradley-Terry loss (rlhf.functional.bradley_terry) on TRL's RewardTrainer.

The comparisons of a prompt are read together, as InstructGPT does: a response that is in several pairs of a forward
pass is read once there. With K responses a prompt that is K sequences instead of K (K - 1).
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl import RewardConfig, RewardTrainer

from rlhf.choices import choose, training_attention
from rlhf.functional.bradley_terry import bootstrap_weights, pair_losses, preference_loss
from rlhf.job import Job
from rlhf.model import checkpoint_layers, count_parameters, disable_dropout, last_norm, scale_last_norm
from rlhf.recipe import RewardSection, microbatches
from rlhf.runtime import derive_seed, log
from stages.common import BUCKET
from stages.lora import add_adapters, give_weights, trained_parameters
from stages.reward.normalise import score_layer, score_rows
from stages.reward.reading import Ids, Judge, Pair, evenly
from stages.trl_glue import (
    PiecesTrainer,
    Validation,
    adapters_as_they_are,
    learning,
    run_trainer,
    trainer_arguments,
)

VALIDATION_PAIRS = 256
FIGURES = {
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
}


class Trained(NamedTuple):
    """A model after training; with low-rank adapters still on it, where these were trained."""

    model: PreTrainedModel | PeftModel
    figures: dict[str, Any]


def train_judge(job: Job, settings: RewardSection, judge: Judge, pairs: list[Pair], test: list[Pair]) -> Trained:
    """Trains the judge's model, in place, on the pairs; `test` is only looked at."""
    seed = job.recipe.seed
    model, restore = _ready(job, settings, judge)
    if settings.gradient_checkpointing:
        checkpoint_layers(judge.model, "reward.gradient_checkpointing")
    choices = choose(job.recipe, "reward", judge.model.config._attn_implementation)
    size, passes = microbatches(job.recipe, "reward", job.team.size)
    wanted = max(1, round(settings.epochs * len(pairs)))
    steps = -(-wanted // settings.pairs_per_step)
    more = steps * settings.pairs_per_step - wanted
    log(
        f"reward: {count_parameters(model):,} parameters, {trained_parameters(model):,} of them trained; "
        f"{len(pairs):,} pairs, {settings.epochs} epochs = {steps} steps of {settings.pairs_per_step} pairs "
        f"({job.team.size} processes x {passes} microbatches x {size})"
        + (f"; {more} more pairs, of a further pass, fill the last step" if more else "")
    )
    batches = PairBatches(
        pairs,
        margin_scale=settings.margin_scale,
        heads=settings.heads,
        seed=derive_seed(seed, "reward", "bootstrap"),
        pad_id=judge.tokenizer.pad_token_id,
    )
    validation = Validation(_validation(job, model, test), settings.validate_every, "validation_loss")
    with training_attention(judge.model, choices):
        held = learning(job, model)
        with adapters_as_they_are(held.learner):
            trainer = PairTrainer(
                label_smoothing=settings.label_smoothing,
                centering=settings.centering,
                model=held.learner,
                args=_arguments(job, settings, steps, size, passes),
                train_dataset=batches.dataset(pair_order(pairs, settings.pairs_per_step, steps, seed)),
                data_collator=batches,
                processing_class=judge.tokenizer,
            )
        training = run_trainer(trainer, model, held, job, steps, FIGURES, settings.log_every, validation)
    model.eval()
    disable_dropout(model)
    restore()
    return Trained(
        model,
        {
            **choices.facts(),
            "steps": steps,
            "pairs_train": len(pairs),
            "pairs_per_second": round(steps * settings.pairs_per_step / training.seconds, 1),
            "validation_loss_before": round(training.first["validation_loss"], 6),
            **{name: round(value, 6) for name, value in training.last.items()},
        },
    )


def _ready(job: Job, settings: RewardSection, judge: Judge) -> tuple[PreTrainedModel | PeftModel, Callable[[], None]]:
    """The model as it is trained, and what puts its last norm back afterwards.

    A fresh head reads hidden states of size 1, or it would learn at another speed for every base. Beside adapters the
    base must be in the end what it was, so there the head takes over what the norm was scaled by.
    """
    model: PreTrainedModel = judge.model
    model.config.use_cache = False  # there is nothing to go on from
    norm = last_norm(model) if judge.fresh_head else None
    before = [parameter.detach().clone() for parameter in norm.parameters()] if norm else []
    scale = scale_last_norm(model) if norm else 1.0
    if settings.lora is None:
        return model, lambda: None
    torch.manual_seed(derive_seed(job.recipe.seed, "reward", "adapters"))
    adapted = add_adapters(model, settings.lora, "reward.lora", kind="classifier", tokens=judge.untrained)

    @torch.no_grad()
    def restore() -> None:
        if norm:
            score_layer(adapted).weight.div_(scale)
            for parameter, value in zip(norm.parameters(), before, strict=True):
                parameter.copy_(value)

    return adapted, restore


def on_the_whole_base(job: Job, settings: RewardSection, judge: Judge, learned: dict[str, Tensor]) -> PeftModel:
    """What was learned on a quantised base, on the judge's model, which is whole."""
    assert settings.lora is not None
    torch.manual_seed(derive_seed(job.recipe.seed, "reward", "adapters"))
    adapted = add_adapters(judge.model, settings.lora, "reward.lora", kind="classifier", tokens=judge.untrained)
    give_weights(adapted, learned)
    disable_dropout(adapted)
    return adapted.eval()


def _arguments(job: Job, settings: RewardSection, steps: int, size: int, passes: int) -> RewardConfig:
    return RewardConfig(
        **trainer_arguments(
            output=job.directory.path,
            seed=job.recipe.seed,
            stage="reward",
            precision=job.recipe.precision,
            steps=steps,
            size=size,
            passes=passes,
            learning_rate=settings.learning_rate,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            gradient_clipping=settings.gradient_clipping,
        ),
        max_length=None,
        remove_unused_columns=False,
        disable_dropout=settings.lora is None or settings.lora.dropout == 0,
    )


Group = list[int]  # the places of a prompt's pairs


def pair_order(pairs: Sequence[Pair], pairs_per_step: int, steps: int, seed: int) -> list[int]:
    """Which pair is read at each place of the training: pass after pass over all pairs, as far as the steps go.

    Each pass takes the prompts in a new random order, all pairs of one together; where the steps end within a pass,
    what is read of it is a random part.
    """
    random = np.random.default_rng(derive_seed(seed, "reward", "order"))
    groups: dict[str, Group] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(json.dumps(pair.comparison.prompt), []).append(place)
    members = list(groups.values())
    lengths = [max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    order: list[int] = []
    while (left := steps * pairs_per_step - len(order)) > 0:
        read: list[Group] = []
        for number in random.permutation(len(members)):
            read.append(members[number][: max(0, left)])
            left -= len(read[-1])
        order += _like_lengths_together(read, lengths, pairs_per_step, len(order), random)
    return order


def _like_lengths_together(
    groups: Sequence[Group], lengths: Sequence[int], pairs_per_step: int, start: int, random: np.random.Generator
) -> list[int]:
    """The pairs of a pass that starts at this place of the training, so that little is padded.

    The prompts of every 16 steps are sorted by length and dealt in equal numbers, and these parts put in random order;
    a step that the pass shares with another one is left as it is. Where some prompts have more pairs than others, a
    part is not quite a step, and a step has pairs of several lengths.
    """
    by_step = _by_step(groups, pairs_per_step, start)
    first = int(start % pairs_per_step > 0)
    last = max(first, len(by_step) - int((start + sum(map(len, groups))) % pairs_per_step > 0))
    dealt = by_step[:first]
    for bucket in range(first, last, BUCKET):
        steps = by_step[bucket : min(bucket + BUCKET, last)]
        together = sorted(itertools.chain(*steps), key=lambda group: max(lengths[place] for place in group))
        each = round(len(together) / len(steps))
        by_length = [together[at : at + each] for at in range(0, len(together), each)]
        dealt += [by_length[number] for number in random.permutation(len(by_length))]
    return [place for step in (*dealt, *by_step[last:]) for group in step for place in group]


def _by_step(groups: Sequence[Group], pairs_per_step: int, start: int) -> list[list[Group]]:
    """The groups that begin in one step together, for each step in which one begins; the first begins at `start`."""
    starts = itertools.accumulate(map(len, groups), initial=start)
    numbered = [(place // pairs_per_step, group) for place, group in zip(starts, groups, strict=False) if group]
    return [[group for _, group in step] for _, step in itertools.groupby(numbered, key=lambda one: one[0])]


class PairBatches:
    """Makes rows of pairs into what the trainer's forward pass takes, each response in it once."""

    def __init__(self, pairs: Sequence[Pair], *, margin_scale: float, heads: int, seed: int, pad_id: int) -> None:
        places: dict[bytes, int] = {}
        self._rows: list[Ids] = []
        for row in (ids for pair in pairs for ids in (pair.chosen, pair.rejected)):
            if row.tobytes() not in places:
                places[row.tobytes()] = len(self._rows)
                self._rows.append(row)
        self._chosen = [places[pair.chosen.tobytes()] for pair in pairs]
        self._rejected = [places[pair.rejected.tobytes()] for pair in pairs]
        self._margins = torch.tensor([margin_scale * pair.comparison.margin for pair in pairs], dtype=torch.float32)
        weights = torch.tensor([pair.comparison.weight for pair in pairs], dtype=torch.float64)
        self._weights = bootstrap_weights(weights, heads, seed).float()
        self._pad_id = pad_id

    def dataset(self, order: Sequence[int]) -> Dataset:
        """The pairs in this order, as rows for `__call__`."""
        columns = {"pair": range(len(self._chosen)), "chosen_ids": self._chosen, "rejected_ids": self._rejected}
        return Dataset.from_dict({name: list(values) for name, values in columns.items()}).select(order)

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        """A batch of B pairs with U different responses, L tokens at most, M heads.

        input_ids, attention_mask [U, L], padded on the right; chosen, rejected [B]: which of the U; margins [B];
        weights [B, M].
        """
        used = sorted({place for row in rows for place in (row["chosen_ids"], row["rejected_ids"])})
        at = {place: number for number, place in enumerate(used)}
        ids = torch.full((len(used), max(len(self._rows[place]) for place in used)), self._pad_id)
        mask = torch.zeros_like(ids)
        for number, place in enumerate(used):
            length = len(self._rows[place])
            ids[number, :length] = torch.from_numpy(self._rows[place].astype(np.int64))
            mask[number, :length] = 1
        which = torch.tensor([row["pair"] for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "chosen": torch.tensor([at[row["chosen_ids"]] for row in rows]),
            "rejected": torch.tensor([at[row["rejected_ids"]] for row in rows]),
            "margins": self._margins[which],
            "weights": self._weights[which],
        }


class PairTrainer(PiecesTrainer, RewardTrainer):
    """TRL's trainer with our loss. A batch's mean over its pairs is what every microbatch and process adds alike."""

    def __init__(self, *, label_smoothing: float, centering: float, **options: Any) -> None:
        self._smoothing, self._centering = label_smoothing, centering
        config = options["model"].config
        heads, config.num_labels = config.num_labels, 1  # TRL asks for a single output, of which its own loss takes one
        super().__init__(**options)
        config.num_labels = heads

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See RewardTrainer; `inputs` are a batch of PairBatches."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        chosen, rejected = outputs.logits[inputs["chosen"]], outputs.logits[inputs["rejected"]]
        loss = preference_loss(chosen, rejected, inputs["margins"], inputs["weights"], self._smoothing, self._centering)
        differences = (chosen - rejected).detach().float().mean(1)
        figures = torch.stack([(differences > 0).float().mean(), differences.mean()])
        accuracy, margin = self.accelerator.reduce(figures, reduction="mean").tolist()
        self._metrics["train"]["accuracy"].append(accuracy)
        self._metrics["train"]["margin"].append(margin)
        return (loss, outputs) if return_outputs else loss


def _validation(job: Job, model: Any, test: Sequence[Pair]) -> Callable[[], dict[str, float]]:
    """Measures the loss, without weights and smoothing, and the accuracy on at most so many test pairs, the same ones
    each time, of the ensemble as a whole.
    """
    pairs = evenly(test, VALIDATION_PAIRS)
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]

    def measure() -> dict[str, float]:
        scores = torch.tensor(score_rows(job.team, model, rows), dtype=torch.float64).mean(1, keepdim=True)
        losses = pair_losses(scores[::2], scores[1::2], torch.zeros(len(pairs), dtype=torch.float64), 0.0)
        right = (scores[::2] > scores[1::2]).double()
        return {"validation_loss": float(losses.mean()), "validation_accuracy": float(right.mean())}

    return measure
