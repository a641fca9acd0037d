"""What the stages on TRL's trainers share: their arguments, and progress, metrics and checkpoints in our form.

A trainer writes its own checkpoint into the folder of ours, which is sealed when it is whole; so the trainers' are
flushed, checksummed and renamed like all others. They hold tensors and numbers, and are read with `weights_only`.
Where the model lies in pieces (rlhf.sharding), the trainer's part is ours as well.
"""

import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rlhf.checkpoint import Checkpoint, copy_tree, load_tree, save_pieces, save_tree, set_random_state
from rlhf.errors import StageFailed
from rlhf.job import Job
from rlhf.pieces import is_sharded, learned, load_optimizer, optimizer_state, pieces, put_in
from rlhf.recipe import EarlyStoppingSection
from rlhf.runtime import Bar, MetricsLog, derive_seed, log, uses_bfloat16
from rlhf.saver import Saver
from rlhf.sharding import Held, Moving, WholeModel, sharded_models


def trainer_arguments(
    *,
    output: Path,
    seed: int,
    stage: str,
    precision: str,
    steps: int,
    size: int,
    passes: int,
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    gradient_clipping: float,
) -> dict[str, Any]:
    """The arguments of SFTConfig and RewardConfig that we decide: theirs default to bf16 and checkpointing on CPU too.

    `size` rows a forward pass on each process, `passes` of them a step; cosine to 10 % after a linear warm-up.
    The losses of all processes are divided by the number of all their tokens.
    """
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": max(size, 32),
        "gradient_accumulation_steps": passes,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": min(max(1, round(warmup * steps)), steps - 1),  # the first of them is at a rate of 0
        "weight_decay": weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": gradient_clipping,
        "bf16": uses_bfloat16(precision),
        "use_cpu": not gpu,
        "gradient_checkpointing": False,
        "logging_steps": 1,  # the means over several steps are ours, so that they can go on after a checkpoint
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_nan_inf_filter": False,  # or a loss that is no number is logged as 0
        "report_to": [],
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "seed": derive_seed(seed, stage, "trainer"),
        "train_sampling_strategy": "sequential",  # the rows come in the order in which they are to be read
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": gpu,
    }


@contextmanager
def adapters_as_they_are(model: Any) -> Iterator[None]:
    """Within, a trainer of TRL's that is made for this model leaves what is trained on a quantised base in float32.

    It would round all of it to bfloat16: adapters, rows of tokens and a score head. That is lost at small learning
    rates, and on a CPU slow.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    flag = plain.__dict__.pop("is_loaded_in_4bit", None)
    try:
        yield
    finally:
        if flag is not None:
            plain.is_loaded_in_4bit = flag


# Validation


class Validation(NamedTuple):
    """What is measured on held-out data at the start, after every `every` steps and at the end.

    `measure` is called on every rank at the same step, with the model in eval mode and without gradients; it returns
    what goes into metrics.jsonl, the same on every rank, and draws no random number: how often it is called must not
    change the result. With `stopping`, the weights with the lowest `figures[key]` are kept, among the validations that
    come after every `stopping.every` steps, at the start and at the end.
    """

    measure: Callable[[], dict[str, Any]]
    every: int
    key: str
    stopping: EarlyStoppingSection | None = None


@dataclass
class Progress:
    """What a checkpoint holds beside the trainer's state."""

    window: list[dict[str, float]] = field(default_factory=list)  # figures of the steps since the last line
    first: dict[str, Any] = field(default_factory=dict)  # what was measured at the start
    kept: dict[str, Any] = field(default_factory=dict)  # what was measured of the weights that are kept
    best_step: int = 0  # after which step they were those
    to_beat: float = 0.0  # the last loss that gained enough to put off the end
    without_gain: int = 0  # validations since then
    stopped: bool = False
    seconds_validating: float = 0.0


class Training(NamedTuple):
    """What a training came to."""

    seconds: float  # of all its steps, the validations apart
    steps: int  # that were taken
    first: dict[str, Any]  # what was measured before the first step
    last: dict[str, Any]  # what was measured of the weights that were kept
    best_step: int | None  # after which step they were those; None without early stopping
    stopped_early: bool


class Validator:
    """Measures when it is time to, remembers the best weights, and says when no better ones are to be hoped for."""

    def __init__(
        self, what: str, validation: Validation, steps: int, progress: Progress, model: nn.Module, held: Held
    ) -> None:
        """`model` is the one that is measured."""
        self._what, self._validation, self._steps, self._progress = what, validation, steps, progress
        self._model, self._held, self._learner = model, held, held.learner
        self.key = validation.key
        self._best: dict[str, Tensor] = {}  # copies of what is trained, where early stopping may go back to them

    def due(self, step: int) -> bool:
        """Whether there is something to measure after this step."""
        return step in (0, self._steps) or step % self._validation.every == 0 or self._decides(step)

    def _decides(self, step: int) -> bool:
        stopping = self._validation.stopping
        return stopping is not None and (step in (0, self._steps) or step % stopping.every == 0)

    def measure(self, step: int) -> dict[str, Any]:
        """The figures after this step; `progress.stopped` says whether it is to be the last one."""
        started, training = time.monotonic(), self._model.training
        self._model.eval()
        # not inference_mode: what modules cache in there can't be trained through later
        with torch.no_grad(), self._held.gathered():
            figures = self._validation.measure()
        self._model.train(training)
        if step == 0:
            self._progress.first = figures
        if self._validation.stopping is None:
            self._progress.kept = figures
        elif self._decides(step):
            self._compare(step, figures, self._validation.stopping)
        self._progress.seconds_validating += time.monotonic() - started
        return figures

    def _compare(self, step: int, figures: dict[str, Any], stopping: EarlyStoppingSection) -> None:
        """Keeps the weights if no loss was lower; a loss that gains too little doesn't put off the end."""
        progress, loss = self._progress, float(figures[self.key])
        if step == 0 or loss < progress.kept[self.key]:
            progress.kept, progress.best_step = figures, step
            self._best = copy_tree(pieces(learned(self._learner)))
        if step == 0 or loss < progress.to_beat - stopping.min_gain:
            progress.to_beat, progress.without_gain = loss, 0
            return
        progress.without_gain += 1
        progress.stopped = progress.without_gain >= stopping.patience

    def save(self, folder: Path, *, writes: bool) -> None:
        """Writes the best weights, if early stopping may go back to them; one process `writes`, all their pieces."""
        save_pieces(self._best, folder, "best")
        if self._best and writes:
            save_tree(self._best, folder, "best")

    def load(self, folder: Path, share: tuple[int, int]) -> None:
        """Reads what `save` wrote; `share`: see load_tree."""
        if self._validation.stopping:
            self._best = load_tree(folder, "best", share)

    @torch.no_grad()
    def keep_best(self) -> None:
        """Gives the model the best weights, where early stopping asks for them."""
        if self._validation.stopping is None:
            return
        put_in(learned(self._learner), self._best)
        best = self._progress.kept[self.key]
        log(
            f"{self._what}: the weights of step {self._progress.best_step} are kept, with the lowest "
            f"{self.key.replace('_', ' ')}: {best:.4f}"
            + ("; training never improved on its start" if self._progress.best_step == 0 else "")
        )


# Training


def learning(job: Job, model: Any) -> Held:
    """How the processes hold the model of a trainer, which gets its `learner`."""
    sharded = sharded_models(job.team, job.sharding, job.recipe.precision)
    if sharded is None:
        return WholeModel(model)
    held = sharded.learning(model)
    held.learner._is_accelerate_prepared = True  # or Accelerate would wrap it once more, with DDP
    return held


class PiecesTrainer(Trainer):  # type: ignore[misc]  # transformers' classes have no types
    """What a trainer does otherwise where its model lies in pieces: mixed into those of the stages.

    Such a checkpoint is read by trainers of whole models as well, and by any number of processes; and so is a trainer's
    own.
    """

    held: Held  # what its model is of
    _moving: Moving | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The trainer's, which moves the pieces."""
        found: torch.optim.Optimizer = super().create_optimizer(model)
        if is_sharded(self.model) and self._moving is None:
            self._moving = self.held.moving(self.held.called, {"adamw": found})
        return found

    def _wrap_model(self, model: nn.Module, *more: Any, **others: Any) -> nn.Module:
        return self.held.called if is_sharded(self.model) else super()._wrap_model(model, *more, **others)

    def _share(self) -> tuple[int, int]:
        return (self.args.process_index, self.args.world_size) if is_sharded(self.model) else (0, 1)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # pieces lie where they are to lie
            super()._move_model_to_device(model, device)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self._moving is None:
            return super()._clip_grad_norm(model)
        return torch.tensor(self._moving.clip(self.args.max_grad_norm))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not is_sharded(self.model):
            super()._save_checkpoint(model, trial)
            return
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(exist_ok=True)
        trees = {
            "weights": pieces(learned(self.model)),
            "optimizer": optimizer_state(self.optimizer),
            "scheduler": self.lr_scheduler.state_dict(),
        }
        for name, tree in trees.items():
            save_pieces(tree, folder, name)
            if self.is_world_process_zero():
                save_tree(tree, folder, name)
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        files = [*folder.glob("*model*.safetensors")]
        if _is_ours(folder):
            put_in(learned(self.model), load_tree(folder, "weights", self._share()))
        elif is_sharded(self.model) and files:
            adapted = isinstance(self.model, PeftModel)
            known = get_peft_model_state_dict(self.model) if adapted else dict(self.model.named_parameters())
            for file in files:
                weights = load_file(file)
                put_in({name: known[name] for name in weights}, weights)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (is_sharded(self.model) or _is_ours(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        if _is_ours(folder):
            optimizer, scheduler = (load_tree(folder, name, self._share()) for name in ("optimizer", "scheduler"))
        else:
            files = (folder / OPTIMIZER_NAME, folder / SCHEDULER_NAME)
            optimizer, scheduler = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
        load_optimizer(self.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Of a checkpoint of ours they lie beside it, as those of all stages do."""
        beside = Path(checkpoint).parent if checkpoint and _is_ours(Path(checkpoint)) else None
        if beside is None:
            super()._load_rng_state(checkpoint)
        elif len([*beside.glob("random-*.json")]) == self.args.world_size:
            set_random_state(load_tree(beside, f"random-{self.args.process_index}"))


def _is_ours(checkpoint: Path) -> bool:
    """Whether a PiecesTrainer has written it from pieces."""
    return (checkpoint / "weights.json").is_file()


def run_trainer(
    trainer: PiecesTrainer,
    model: nn.Module,
    held: Held,
    job: Job,
    steps: int,
    figures: dict[str, str],
    log_every: int,
    validation: Validation | None = None,
) -> Training:
    """Trains to the end, from the newest checkpoint on if there is one.

    `model` is what is held; the trainer has its learner. `figures` maps the trainer's names of what is logged to ours.
    Raises Interrupted after a checkpoint.
    """
    saver = Saver(job, metrics := job.metrics())
    found = saver.resume()
    progress = _progress_in(found) if found else Progress()
    validator = Validator(job.stage, validation, steps, progress, model, held) if validation else None
    if found and validator:
        validator.load(found.path, (job.team.rank, job.team.size) if is_sharded(held.learner) else (0, 1))
    loop = TrainerLoop(job.stage, steps, saver, metrics, figures, log_every, validator, progress, found)
    trainer.held = held
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(loop)
    with saver.training(), loop.writing:
        taken = found.step if found and progress.stopped else _train(trainer, found)
        if loop.stopped_at is not None:
            raise saver.interrupted(loop.stopped_at)
        if taken != steps and not progress.stopped:
            raise _not_ours(found, f"the trainer ended at step {taken} of {steps}")
        if validator and validation:
            validator.keep_best()
            before, after = progress.first[validation.key], progress.kept[validation.key]
            early = f", ended early after {taken} of {steps} steps" if taken < steps else ""
            log(f"{job.stage}: {validation.key.replace('_', ' ')} {before:.4f} before, {after:.4f} after{early}")
    held.settle()
    _take_off_wrappers(model)
    seconds = saver.seconds() - progress.seconds_validating
    best_step = progress.best_step if validation and validation.stopping else None
    return Training(seconds, taken, progress.first, progress.kept, best_step, taken < steps)


def _train(trainer: Trainer, found: Checkpoint | None) -> int:
    """Returns the step at which it ended."""
    try:
        trainer.train(resume_from_checkpoint=str(trainer_part(found)) if found else None)
    except pickle.UnpicklingError as error:
        raise _not_ours(found, str(error).splitlines()[0]) from None
    return trainer.state.global_step


def _take_off_wrappers(model: nn.Module) -> None:
    """Gives a model its own forward again: libraries put others before it, for autocasting and for a fused loss."""
    for module in model.modules():
        for name in ("forward", "_original_forward"):
            module.__dict__.pop(name, None)


def _progress_in(found: Checkpoint) -> Progress:
    try:
        return Progress(**json.loads((found.path / "progress.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _not_ours(found, f"progress.json: {error}") from None


def _not_ours(checkpoint: Checkpoint | None, why: str) -> StageFailed:
    where = checkpoint.path if checkpoint else "of the trainer"
    return StageFailed(
        f"the checkpoint {where} is not one of ours ({why}); remove it, and the same command goes on from the one "
        "before"
    )


def trainer_part(checkpoint: Checkpoint) -> Path:
    """The trainer's own folder in one of our checkpoints."""
    return checkpoint.path / f"checkpoint-{checkpoint.step}"


class TrainerLoop(TrainerCallback):
    """A trainer's steps on our progress bar, in metrics.jsonl and in our checkpoints; refuses a loss without value."""

    LAST = ("learning_rate", "gradient_norm")  # logged as they are; the others as means since the last line

    def __init__(
        self,
        what: str,
        steps: int,
        saver: Saver,
        metrics: MetricsLog,
        figures: dict[str, str],
        log_every: int,
        validator: Validator | None,
        progress: Progress,
        found: Checkpoint | None,
    ) -> None:
        self._what, self._steps, self._saver, self._metrics = what, steps, saver, metrics
        self._figures, self._log_every = figures, log_every
        self._validator, self._progress, self._begins = validator, progress, found is None
        self._bar = Bar(what, steps, found.step if found else 0)
        self.writing = ExitStack()  # what is half written when the trainer fails is thrown away
        self._folder: Path | None = None
        self.stopped_at: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the bar, and measures what is there before the first step."""
        self._bar.__enter__()
        if self._begins:
            self._validate(0)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the bar."""
        self._bar.__exit__(None, None, None)

    def _validate(self, step: int) -> None:
        if self._validator and self._validator.due(step):
            figures = self._validator.measure(step)
            self._metrics.log(step=step, **figures)
            if 0 < step < self._steps:  # what was found before and after is told at the end
                key = self._validator.key
                log(f"{self._what}: after step {step}: {key.replace('_', ' ')} {figures[key]:.4f}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seals what the trainer wrote."""
        assert self._folder is not None
        if state.is_world_process_zero:
            (self._folder / "progress.json").write_text(json.dumps(asdict(self._progress)), encoding="utf-8")
        if self._validator:
            self._validator.save(self._folder, writes=state.is_world_process_zero)
        self.writing.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """What comes after a step: its figures, and where it is time to, a validation, a checkpoint, the end."""
        state.log_history.clear()  # ours is in metrics.jsonl; theirs would grow in every checkpoint
        values = {ours: float(logs[theirs]) for theirs, ours in self._figures.items() if logs and theirs in logs}
        if "loss" not in values:  # what the trainer says at its end
            return
        step = state.global_step
        self._take_in(step, values)
        self._validate(step)
        done = self._progress.stopped or step == self._steps
        if done:
            self._write_line(step)
        save, stop = self._saver.decide(step, last=done)
        if save:
            self._folder = self.writing.enter_context(self._saver.writing(step, model))
            args.output_dir = str(self._folder)
            control.should_save = True
        if stop or done:
            control.should_training_stop = True
        if stop:
            self.stopped_at = step

    def _take_in(self, step: int, values: dict[str, float]) -> None:
        """Keeps the figures of one step; writes a line where one is due."""
        if not math.isfinite(values["loss"]):
            raise StageFailed(f"{self._what}: the loss is {values['loss']} at step {step}; try a smaller learning_rate")
        self._progress.window.append(values)
        if step % self._log_every == 0 or step == self._steps:
            self._write_line(step)

    def _write_line(self, step: int) -> None:
        """Logs and shows the means of the steps since the last line, if there are any."""
        window = self._progress.window
        if not window:
            return
        means = {
            name: value if name in self.LAST else sum(values[name] for values in window) / len(window)
            for name, value in window[-1].items()
        }
        window.clear()
        self._metrics.log(step=step, **means)
        self._bar.show(step, **means)
