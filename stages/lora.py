"""Low-rank adapters in place of the whole weights (Hu et al. 2021, arXiv:2106.09685), through PEFT.

Adapters are added to a loaded model, trained, saved as a plain PEFT directory, and merged: what is left is the plain
transformers model, which loads without PEFT.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rlhf.errors import RecipeError, UserError
from rlhf.model import spare_memory, write_folder
from rlhf.recipe import LoraSection

ALL_LINEAR = "all-linear"
SCORE_HEAD = "score"  # of a sequence classifier: trained whole


def add_adapters(
    model: PreTrainedModel,
    settings: LoraSection,
    key: str,
    *,
    kind: Literal["causal_lm", "classifier"] = "causal_lm",
    tokens: Sequence[int] = (),
) -> PeftModel:
    """The model with adapters, which are all that is trained; they change nothing until then. Seed torch first.

    The score head of a classifier is trained whole. `tokens` are ids whose embeddings, and rows of the output head, are
    trained as well: what a model has never seen it can't learn through adapters alone. `key` is where the recipe has
    `settings`; it is named in errors.
    """
    spare_memory(model)
    names = target_names(model, settings.targets, key)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
        task_type="CAUSAL_LM" if kind == "causal_lm" else "SEQ_CLS",
        modules_to_save=[SCORE_HEAD] if kind == "classifier" else None,
        trainable_token_indices=_token_tables(model, tokens, key) if tokens else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    adapted = get_peft_model(model, config)
    for known in adapted.peft_config.values():
        known.base_model_name_or_path = ""  # or PEFT looks for the base's own vocabulary at every checkpoint
    head = model.get_output_embeddings()
    if tokens and head is not None and not hasattr(head, "bias"):
        head.bias = None  # what PEFT wraps has none to be seen, and TRL's loss asks for it
    return adapted


def target_names(model: PreTrainedModel, targets: Sequence[str], key: str) -> list[str]:
    """The last parts of the names of the modules that get an adapter; never the output head.

    Raises RecipeError, which lists the names that there are, where a name is no linear layer's.
    """
    known = _linear_names(model)
    if ALL_LINEAR in targets:
        targets = [*known, *(name for name in targets if name != ALL_LINEAR)]
    for name in targets:
        if name not in known:
            raise RecipeError(
                f"{key}.targets: {type(model).__name__} has no linear layer {name!r} that an adapter can stand beside; "
                f"there are {', '.join(known)} ({ALL_LINEAR}: all of them)"
            )
    return sorted(set(targets))


def _linear_names(model: PreTrainedModel) -> list[str]:
    heads = {model.get_output_embeddings(), getattr(model, SCORE_HEAD, None)}
    found = {
        name.rpartition(".")[2]: None  # in the order of the model
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in heads
    }
    return list(found)


def _token_tables(model: PreTrainedModel, tokens: Sequence[int], key: str) -> dict[str, list[int]]:
    """Which rows of which tables are trained: of the embedding, and of the output head where it is a table of its own.

    PEFT trains the rows of a head that shares the embedding's table with those of the embedding.
    """
    tables: list[Any] = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "bias", None) is not None:
        raise UserError(
            f"{key}: {type(model).__name__}'s output head has a bias, beside which PEFT can't train single tokens; "
            "train all weights, or start from a base whose chat template's tokens are trained"
        )
    if head is not None and head.weight is not tables[0].weight:
        tables.append(head)
    rows = sorted(set(tokens))
    return {name: rows for name, module in model.named_modules() if any(module is table for table in tables)}


def add_adapter(model: PreTrainedModel, config: LoraConfig, name: str) -> None:
    """Puts one more adapter into a model that stays a plain transformers model; seed torch first."""
    spare_memory(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
        inject_adapter_in_model(config, model, name)


@contextmanager
def using_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within, the adapter of this name works in every layer that has one, and no other; None: no adapter at all.

    Nothing is frozen or thawed, as PEFT's own switch would: what is trained was decided when the optimiser was made.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter = layer._active_adapter if name is None else [name]
        layer._disable_adapters = name is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


class SameAdapter:
    """The contexts of a layer that is computed twice, see rlhf.model.checkpoint_layers: the second time comes with the
    adapter of the first, though `using_adapter` is left by then.

    A class and no closure, so that a copy of the model has a copy of this.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What the first and what the second computation runs in."""
        layer = next(module for module in self._model.modules() if isinstance(module, BaseTunerLayer))
        (name,) = [None] if layer._disable_adapters else layer._active_adapter
        return nullcontext(), using_adapter(self._model, name)


def learned_weights(model: PeftModel) -> dict[str, Tensor]:
    """Copies of what was trained, on the CPU: adapters, rows of tokens, the score head of a classifier."""
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weight.detach().to("cpu", copy=True) for name, weight in found.items()}


def give_weights(model: PeftModel, learned: dict[str, Tensor]) -> None:
    """Gives a model with the same adapters on it what `learned_weights` gave.

    So adapters that were trained on a quantised base come to stand on the whole one.
    """
    unknown = set_peft_model_state_dict(model, learned).unexpected_keys
    if unknown or learned.keys() != learned_weights(model).keys():
        raise UserError(f"{type(model).__name__}: not the adapters that were trained ({', '.join(unknown[:3])})")


def trained_on(settings: LoraSection | None) -> str:
    """What a model card says of a base that was quantised."""
    if settings is None or settings.quantised is None:
        return ""
    return f" The adapters were trained on a base held in 4 bits ({settings.quantised}); merged, they stand on its own."


def trained_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def merged(model: PeftModel) -> PreTrainedModel:
    """The plain transformers model with the adapters added to its weights; all of its weights can be trained again."""
    plain: PreTrainedModel = model.merge_and_unload()
    plain.requires_grad_(True)
    return plain


def merged_in_place(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The plain model that the adapter of this name makes of a model in which adapters were put; the others go."""
    for where, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = False
            module.merge(adapter_names=[name])
            parent, _, own = where.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
    return model.requires_grad_(True)


def with_named_adapter(base: PreTrainedModel, other: PreTrainedModel, name: str) -> PreTrainedModel:
    """The base with the adapter of this name put into it that another model has, one of the same layers."""
    weights = {
        where: weight.detach().cpu() for where, weight in get_peft_model_state_dict(other, adapter_name=name).items()
    }
    config = copy.copy(other.peft_config[name])
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in base.modules())  # a quantised layer has none
    add_adapter(base, config, name)
    set_peft_model_state_dict(base, weights, adapter_name=name)
    return base


def save_named_adapter(
    model: PreTrainedModel, name: str, base: str, tokenizer: PreTrainedTokenizerBase, directory: Path, card: str
) -> None:
    """Writes one of the adapters that were put into a model as `save_adapter` does; `base` names what it stands on."""
    config = copy.copy(model.peft_config[name])
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, TaskType.CAUSAL_LM, True
    weights = get_peft_model_state_dict(model, adapter_name=name)

    def write(folder: Path) -> None:
        config.save_pretrained(str(folder))
        named = {f"base_model.model.{where}": weight.cpu().contiguous() for where, weight in weights.items()}
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)

    write_folder(directory, write, card)


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path, card: str) -> None:
    """Writes a plain PEFT directory, whole or not at all: the adapters with their configuration, tokenizer and card.

    Where the tokenizer has more tokens than the base, the base's embeddings must be resized before it is loaded; the
    rows of the new tokens are in the adapter.
    """
    for known in model.peft_config.values():
        known.base_model_name_or_path = model.get_base_model().name_or_path

    def write(folder: Path) -> None:
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)

    write_folder(directory, write, card)
