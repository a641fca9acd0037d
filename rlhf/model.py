"""Models: built from a transformers config, loaded from and saved to plain Hugging Face directories."""

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from rlhf.errors import MissingInput, RecipeError, UserError
from rlhf.functional.masked import widened
from rlhf.pieces import shape_of
from rlhf.quantisation import settle
from rlhf.rundir import sync_folder, write_atomically
from rlhf.tokenizer import token_info

FRESH_HEADS = ("score", "classifier")  # what transformers' classifiers call their heads
LOCAL_QUERY_GAIN = 0.1  # with queries this small, a local layer's attention is nearly uniform at the start


def causal_lm_config(
    architecture: str,
    *,
    vocab_size: int,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int | None,
    mlp_width: int | None,
    context: int,
    rope_theta: float,
    initializer_range: float,
    sliding_window: int | None,
    sliding_layers: tuple[int, ...],
    tie_embeddings: bool,
    special: dict[str, Any],
) -> PreTrainedConfig:
    """The transformers config of a decoder-only model. `special` holds the ids of the special tokens."""
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_inner=mlp_width,
            n_positions=context,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own approximation, "gelu_new", as one kernel
            initializer_range=initializer_range,
            tie_word_embeddings=tie_embeddings,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": mlp_width or round(width * 8 / 3 / 32) * 32 or 32,
        "max_position_embeddings": context,
        "rope_theta": rope_theta,
        "initializer_range": initializer_range,
        "tie_word_embeddings": tie_embeddings,
        **special,
    }
    if architecture == "qwen3":
        local = {
            "use_sliding_window": True,
            "sliding_window": sliding_window,
            "layer_types": ["sliding_attention" if i in sliding_layers else "full_attention" for i in range(layers)],
        }
        return Qwen3Config(head_dim=width // heads, **common, **(local if sliding_layers else {}))
    return LlamaConfig(**common)


def build_causal_lm(
    config: PreTrainedConfig, initialisation: str = "normal", attention: str | None = None
) -> PreTrainedModel:
    """A model with random weights, `normal` (transformers' own) or `wide`; seed torch first.

    `attention`: the implementation; None: transformers' choice.
    """
    how = {"attn_implementation": attention} if attention else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how)
    if initialisation == "wide":
        initialise_widely(model)
    return model


@torch.no_grad()
def initialise_widely(model: PreTrainedModel) -> None:
    """Random weights with which a tiny model learns to look things up in its context in minutes instead of hours.

    Tokens start far apart (embeddings of variance 1), signals keep their size (matrices of variance 1/fan_in, LeCun et
    al. 1998), logits start near 1 (a small gain of the last norm), and a local layer starts as the average of its
    window (small queries; Yang et al. 2022, arXiv:2203.03466, section D.2, start them at zero).
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=module.weight.shape[0] ** -0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    if not model.config.tie_word_embeddings:
        nn.init.normal_(head.weight, std=1.0)
    body = model.base_model
    last_norm(model).weight.fill_(model.config.hidden_size**-0.5)
    kinds = getattr(model.config, "layer_types", None) or []
    for kind, layer in zip(kinds, getattr(body, "layers", []), strict=False):
        if kind == "sliding_attention":
            layer.self_attn.q_norm.weight.fill_(LOCAL_QUERY_GAIN)


def last_norm(model: PreTrainedModel) -> nn.Module:
    """The norm in front of the output head."""
    body = model.base_model
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        if hasattr(body, name):
            found: nn.Module = getattr(body, name)
            return found
    raise UserError(f"{type(model).__name__}: its last norm has an unknown name")


@torch.no_grad()
def last_gain(model: PreTrainedModel) -> torch.Tensor:
    """What the last norm multiplies each channel by, [width]: measured, since a norm's weight needn't be its gain.

    Gemma's is an offset (the gain is 1 + weight), and some norms have none. What comes out for a large signal, less
    what comes out for its opposite, is free of the norm's bias and its epsilon.
    """
    norm, width = last_norm(model), model.config.get_text_config().hidden_size
    like = next(iter(norm.parameters()), model.get_input_embeddings().weight)
    sign = torch.ones(1, width, dtype=like.dtype, device=like.device)
    sign[:, ::2] = -1
    gain: torch.Tensor = ((norm(100 * sign) - norm(-100 * sign)) * sign / 2)[0]
    return gain


@torch.no_grad()
def scale_last_norm(model: PreTrainedModel) -> float:
    """Gives the last norm a gain of 1 (root mean square), so that a fresh head reads hidden states of size 1.

    What a base's output head was used to may be ten times smaller; a score head would then learn ten times slower.
    Returns the gain that it had: the hidden states are so many times smaller now. It is 1.0 for a norm that is left
    alone, since its gain is nothing or doesn't follow its weight.
    """
    norm, gain = last_norm(model), last_gain(model)
    size = float(gain.square().mean().sqrt())
    weight, before = getattr(norm, "weight", None), [parameter.clone() for parameter in norm.parameters()]
    if weight is None or not size > 0:
        return 1.0
    weight.add_(gain / size - gain)  # the weight is the gain, or the gain less a constant
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(size)
    if torch.allclose(last_gain(model), gain / size, rtol=1e-2, atol=1e-3):
        return size
    for parameter, value in zip(norm.parameters(), before, strict=True):
        parameter.copy_(value)
    return 1.0


def load_causal_lm(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    remote_code: bool = False,
    attention: str | None = None,
    quantised: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """A causal LM from a directory or hub id, without dropout. Raises MissingInput where none can be loaded.

    Code that lies beside it is run with `remote_code` only. `attention`: the implementation; None: transformers'
    choice. With `quantised` it is on the device already, and frozen.
    """
    kinds = _load_config(directory, remote_code).architectures or []
    if any("SequenceClassification" in kind for kind in kinds):
        raise UserError(f"{directory} is a reward model or another classifier ({', '.join(kinds)}), not a causal LM")
    return _load(AutoModelForCausalLM, directory, dtype, remote_code, attention, quantised)


def load_scorer(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    fresh_head: bool = False,
    heads: int = 1,
    remote_code: bool = False,
    attention: str | None = None,
    quantised: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """A sequence classifier whose outputs are scores, one or one of each head of an ensemble, without dropout.

    With `fresh_head` a score head of `heads` outputs is made at random (seed torch first) where there is none of that
    size; without, its absence is an error. An ensemble's configuration says `score_heads`: that tells it from a
    classifier of as many classes. The rest is as for `load_causal_lm`.
    """
    config = _load_config(directory, remote_code)
    if fresh_head:
        fresh: dict[str, Any] = {"num_labels": heads, "ignore_mismatched_sizes": True}
        how = (directory, dtype, remote_code, attention, quantised)
        model = _load(AutoModelForSequenceClassification, *how, FRESH_HEADS, **fresh)
        model.config.score_heads = heads
        return model
    _check_classifier(directory, config)
    if config.num_labels != score_heads(config):
        raise UserError(
            f"{directory} has {config.num_labels} outputs; a reward model has one, or as many as its configuration "
            "says in `score_heads`"
        )
    return _load(AutoModelForSequenceClassification, directory, dtype, remote_code, attention, quantised)


def load_classifier(
    directory: str | Path,
    dtype: torch.dtype | str = torch.float32,
    *,
    remote_code: bool = False,
    attention: str | None = None,
) -> PreTrainedModel:
    """Any sequence classifier, however many outputs it has, without dropout. `dtype` "auto" is that of its files."""
    _check_classifier(directory, _load_config(directory, remote_code))
    return _load(AutoModelForSequenceClassification, directory, dtype, remote_code, attention)


def score_heads(config: PreTrainedConfig) -> int:
    """How many outputs of a classifier are scores of the same thing: its heads, 1 where it is no ensemble of ours."""
    return int(getattr(config, "score_heads", None) or 1)


def _check_classifier(directory: str | Path, config: PreTrainedConfig) -> None:
    if not any("SequenceClassification" in name for name in config.architectures or []):
        raise UserError(f"{directory} is no reward model: its architecture is {config.architectures}")


def _load_config(directory: str | Path, remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(directory), trust_remote_code=remote_code)
    except Exception as error:  # whatever a file that is wrong in its own way raises in the libraries
        raise _not_loaded(directory, error) from None


def _load(
    loader: Any,
    directory: str | Path,
    dtype: torch.dtype | str,
    remote_code: bool,
    attention: str | None,
    quantised: BitsAndBytesConfig | None = None,
    fresh: tuple[str, ...] = (),
    **options: Any,
) -> PreTrainedModel:
    """The model, every weight of which must be there, but those whose names begin with one of `fresh`."""
    _load_config(directory, remote_code)
    if attention:
        options["attn_implementation"] = attention
    if quantised:
        options["quantization_config"] = quantised
    try:
        model: PreTrainedModel
        model, found = loader.from_pretrained(
            str(directory), dtype=dtype, trust_remote_code=remote_code, output_loading_info=True, **options
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as error:  # truncated, foreign or unreadable weights: safetensors, torch and others raise their own
        raise _not_loaded(directory, error) from None
    absent = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    missing = sorted(name for name in absent if not name.startswith(fresh))
    if missing:
        raise MissingInput(
            f"{directory}: {len(missing)} weights are missing from its files ({', '.join(missing[:3])}, ...), so the "
            "model would be partly random"
        )
    disable_dropout(model)
    if quantised:
        settle(model)
    return model


def _not_loaded(directory: str | Path, error: Exception) -> MissingInput:
    if "trust_remote_code" in str(error):
        return MissingInput(
            f"{directory} brings Python code of its own, which is run only where the recipe says so: "
            f"trust_remote_code: ['{directory}']"
        )
    why = (str(error).splitlines() or [""])[0]
    return MissingInput(f"no model could be loaded from {directory}: {type(error).__name__}: {why[:300]}")


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to zero: with it, the same tokens have other log-probabilities in training and in rollout.

    Many models hold a rate as a number of their own, whatever it is called (`attention_dropout`, `attn_pdrop`,
    `layerdrop`), or reads it in its configuration; a mixture of experts may shake its router (`jitter_noise`).
    """
    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if isinstance(module, PreTrainedModel)}
    for holder in (*modules, *configs.values()):
        if isinstance(holder, nn.Dropout):
            holder.p = 0.0
        for name, value in vars(holder).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(holder, name, 0.0)


LARGE, LARGE_TENSOR = 30_000_000, 2**18  # parameters; bytes
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # glibc's malloc.h


def spare_memory(model: nn.Module) -> None:
    """Has glibc give tensors' memory back as soon as they are freed, where training a large model is to take little.

    Otherwise it keeps all (rlhf.launch), which is faster: by a fifth where all of 94 million parameters are trained.
    But what a freed tensor leaves is a hole that the next one of its size doesn't fit (posix_memalign wants more than
    was freed); with gradient checkpointing the same training took 2.1 GB in place of 1.3.
    """
    if count_parameters(model) < LARGE:
        return
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE_TENSOR)
        library.mallopt(M_MMAP_MAX, 2**16)


Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]


def checkpoint_layers(model: PreTrainedModel, key: str, contexts: Contexts | None = None) -> None:
    """Has a model in training mode hold each layer's input only, and compute the layer again for the backward pass.

    Chen et al. 2016, arXiv:1604.06174. `contexts` gives what the layer's first and second computation run in. Raises
    RecipeError, naming the key, for a model that can't.
    """
    if not model.supports_gradient_checkpointing:
        raise RecipeError(f"{key}: {type(model).__name__} can't compute its layers twice; leave it out")
    spare_memory(model)
    how = {"context_fn": contexts} if contexts else {}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **how})


@torch.no_grad()
def resize_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Sequence[int] = ()) -> None:
    """Gives the model a row for every token. The rows of the `added` ids start at the mean of those before them.

    So a new token is at first as likely as the others are on the average, and no other becomes much less likely
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models"). Some models have rows in reserve,
    which hold nothing of use; they start there too. Seed torch first.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    reserve = [token for token in added if token < rows]
    if reserve:
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[reserve] = table.weight[: min(added)].mean(0)


def use_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the tokenizer's BOS, EOS and pad into the model's configuration and its generation configuration."""
    for key, value in token_info(tokenizer).items():
        setattr(model.config, key, value)
        if getattr(model, "generation_config", None) is not None:
            setattr(model.generation_config, key, value)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the tokenizer's EOS and what the model's generation configuration adds.

    An id for which the model has no row can't be drawn, and is left out.
    """
    configured = model.generation_config.eos_token_id if getattr(model, "generation_config", None) else None
    more = configured if isinstance(configured, list) else [configured]
    rows = model.get_input_embeddings().num_embeddings
    return sorted({int(token) for token in (tokenizer.eos_token_id, *more) if token is not None and token < rows})


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Raises UserError where the tokenizer has tokens that the model has no embedding for."""
    check_embeddings(model.get_input_embeddings().num_embeddings, tokenizer, directory)


def check_embeddings(rows: int, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """The same, of a model with so many embeddings."""
    if len(tokenizer) > rows:
        raise UserError(f"{directory}: its tokenizer has {len(tokenizer):,} tokens, its model {rows:,} embeddings")


@torch.inference_mode()
def check_causal(model: PreTrainedModel, directory: str | Path) -> None:
    """Raises UserError where what is said of a token depends on those behind it, as a masked LM's logits do."""
    one, other = (
        model(input_ids=torch.tensor([[1, 2, 3, last]], device=model.device), use_cache=False).logits[0, :3].float()
        for last in (0, 4)
    )
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.1
    if not torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise UserError(f"{directory} reads what stands behind a token as well, so it is no causal LM")


_planned: ContextVar[int | None] = ContextVar("bytes of the accelerator that is planned for", default=None)


@contextmanager
def planning_for(memory: int) -> Iterator[None]:
    """Within, what is sized by a GPU's memory is sized as on one of so many bytes; 0: as on a CPU."""
    token = _planned.set(memory)
    try:
        yield
    finally:
        _planned.reset(token)


def accelerator_bytes(device: torch.device, share: float) -> int:
    """A share of a GPU's memory; 0 for any other device."""
    planned = _planned.get()
    if planned is not None:
        return int(planned * share)
    return int(torch.cuda.get_device_properties(device).total_memory * share) if device.type == "cuda" else 0


def tokens_fitting(model: PreTrainedModel, memory: int, *, checkpointing: bool = False) -> int:
    """How many tokens have about so many bytes of activations in a training pass, as float32, logits apart.

    With gradient checkpointing a layer keeps its input, and one layer at a time the rest.
    """
    config = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = 12 * width + 4 * inner
    return max(1, memory // (4 * (layers * width + layer if checkpointing else layers * layer)))


def count_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once; of a quantised layer those that it stands for."""
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in model.parameters())
    return sum(state.shape.numel() if state else parameter.numel() for parameter, state in states)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in two groups: matrices, which decay, and vectors (norms, biases), which do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if len(shape_of(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(shape_of(p)) < 2], "weight_decay": 0.0},
    ]


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, card: str) -> None:
    """Writes a plain Hugging Face directory, whole or not at all: weights, config, tokenizer, template, card."""
    if hasattr(model, "generation_config") and model.can_generate():
        model.generation_config = GenerationConfig(
            **token_info(tokenizer), do_sample=True, temperature=1.0, top_p=1.0, top_k=0
        )
    model.config.use_cache = True  # trainers switch it off

    def write(folder: Path) -> None:
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)

    write_folder(directory, write, card)


def write_folder(directory: Path, write: Callable[[Path], None], card: str) -> None:
    """A directory that holds what `write` puts into it, and the card; it is there whole or not at all."""
    temporary = directory.with_name(f".{directory.name}.tmp{os.getpid()}")
    for left in directory.parent.glob(f".{directory.name}.tmp*"):  # of a run that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    write_atomically(temporary / "README.md", card)
    umask = os.umask(0)
    os.umask(umask)
    for path in _files(temporary):
        path.chmod(0o666 & ~umask)  # safetensors makes files that nobody else can read
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if directory.exists():  # left by a run that was killed before its stage was complete
        shutil.rmtree(directory)
    temporary.replace(directory)
    sync_folder(directory.parent)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.iterdir() if path.is_file())


ADAPTER_LOADS = (
    "loads with `peft` onto the base that it was trained on. Where the tokenizer here has more tokens than the base, "
    "`base.resize_token_embeddings(len(tokenizer))` comes first; their rows are in the adapter"
)


def model_card(title: str, what: str, facts: dict[str, Any], loads: str = "loads with plain `transformers`") -> str:
    """The README.md of a model directory: what it is, how it is loaded, and its figures."""
    rows = "\n".join(f"| {key} | {json.dumps(value, ensure_ascii=False)} |" for key, value in facts.items())
    return (
        f"---\nlibrary_name: transformers\ntags: [rlhf]\n---\n\n# {title}\n\n{what}\n\n"
        f"Made by the package `rlhf`; {loads}.\n\n| | |\n| --- | --- |\n{rows}\n"
    )


class Critic(nn.Module):
    """A value for every position: a transformer's backbone with a linear head of one output."""

    def __init__(self, backbone: PreTrainedModel, head: nn.Linear, mean: float) -> None:
        super().__init__()
        self.backbone, self.head, self.mean = backbone, head, mean

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Values [B, L], at least float32, from ids [B, L] with any padding on the right."""
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        values: torch.Tensor = widened(self.head(hidden).squeeze(-1)) - self.mean
        return values


def critic_from_scorer(scorer: PreTrainedModel, mean: float) -> Critic:
    """A critic that starts as the reward model: its values begin in the units of the score.

    From an ensemble it starts as the mean of the heads; `mean` is then that of the heads' means.
    """
    head: nn.Linear = scorer.score
    if head.out_features == 1:
        return Critic(scorer.base_model, head, mean)
    together = nn.Linear(head.in_features, 1, bias=head.bias is not None)
    with torch.no_grad():
        for whole, parts in zip(together.parameters(), head.parameters(), strict=True):
            whole.copy_(parts.mean(0, keepdim=True))
    return Critic(scorer.base_model, together, mean)


def critic_from_policy(policy: PreTrainedModel) -> Critic:
    """A critic that starts from the policy's backbone, its values at zero."""
    head = nn.Linear(policy.config.hidden_size, 1, bias=False)
    nn.init.zeros_(head.weight)
    return Critic(policy.base_model, head, 0.0)
