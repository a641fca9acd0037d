"""`rlhf chat`: a conversation in the terminal."""

import io
import sys
from pathlib import Path

import torch

from rlhf.errors import StageFailed, UserError
from rlhf.model import check_vocabulary, end_ids, load_causal_lm
from rlhf.runtime import derive_seed, device, print_anything, quiet_libraries, visible
from rlhf.tokenizer import Messages, encode_prompt, load_tokenizer

COLDEST = 1e-3  # below, the likeliest token is taken: dividing by so little overflows


def chat_loop(directory: Path, *, system: str, max_tokens: int, temperature: float, seed: int) -> None:
    """Reads questions from the terminal, prints answers as they are drawn. Model output can't move the cursor."""
    with quiet_libraries():
        tokenizer = load_tokenizer(directory)
        if not tokenizer.chat_template:
            raise UserError(f"{directory} has no chat template: it is a base model, made before the stage sft")
        model = load_causal_lm(directory).to(device()).eval()
    context = int(getattr(model.config, "max_position_embeddings", 2**31))
    messages: Messages = [{"role": "system", "content": system}] if system else []
    generator = torch.Generator().manual_seed(derive_seed(seed, "chat"))
    ends = set(end_ids(model, tokenizer))
    check_vocabulary(model, tokenizer, directory)
    print_anything()
    typed = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if typed:
        print("An empty line or Ctrl-D ends the conversation.")
    while True:
        try:
            question = input("> " if typed else "")
        except EOFError:
            return
        if not question.strip():
            if typed:
                return
            continue
        messages.append({"role": "user", "content": question.encode("utf-8", "replace").decode()})
        ids = encode_prompt(tokenizer, messages)
        room = min(max_tokens, context - len(ids))
        if room < 1:
            print(f"(the conversation fills the model's context of {context} tokens; it begins anew)")
            messages = messages[:1] if system else []
            continue
        answer = _answer(model, ids, ends, room, temperature, generator)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        print(visible(text), flush=True)
        messages.append({"role": "assistant", "content": text})


@torch.inference_mode()
def _answer(
    model: torch.nn.Module,
    ids: list[int],
    ends: set[int],
    max_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[int]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    inputs, answer = torch.tensor([ids]), []
    for _ in range(max_tokens):
        logits = model(input_ids=inputs.to(model.device), past_key_values=cache, use_cache=True).logits[0, -1].float()
        if not logits.isfinite().all():
            raise StageFailed("the model's logits are not numbers: its weights are broken")
        if temperature < COLDEST:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator))
        if token in ends:
            break
        answer.append(token)
        inputs = torch.tensor([[token]])
    return answer
