"""The gold reward, where the built-in world knows the truth of every prompt."""

from collections.abc import Sequence

from rlhf.tinyworld.dialogues import questions
from rlhf.tinyworld.oracle import best_response, gold_reward
from rlhf.tokenizer import Messages


def gold_rewards(prompts: Sequence[Messages], responses: Sequence[str]) -> list[float]:
    """The gold reward of each response; nothing where a prompt is none of the built-in world's."""
    asked = _questions(prompts)
    return [gold_reward(text, response) for text, response in zip(asked, responses, strict=True)] if asked else []


def best_gold(prompts: Sequence[Messages]) -> list[float]:
    """The gold reward of the best response to each prompt; nothing where it isn't known."""
    return [gold_reward(text, best_response(text)) for text in _questions(prompts)]


def _questions(prompts: Sequence[Messages]) -> list[str]:
    asked = [prompt[-1]["content"] if len(prompt) == 1 else "" for prompt in prompts]
    return asked if all(text in questions() for text in asked) else []
