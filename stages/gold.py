"""The gold reward, where the built-in world knows the truth of a prompt."""

from collections.abc import Sequence

from rlhf.tinyworld.dialogues import questions
from rlhf.tinyworld.oracle import best_response, gold_reward
from rlhf.tokenizer import Messages


def gold_rewards(prompts: Sequence[Messages], responses: Sequence[str]) -> list[float | None]:
    """The gold reward of each response; None where the prompt is none of the built-in world's."""
    asked = map(_question, prompts)
    return [gold_reward(text, response) if text else None for text, response in zip(asked, responses, strict=True)]


def best_gold(prompts: Sequence[Messages]) -> list[float]:
    """The gold reward of the best response to each prompt of the built-in world."""
    return [gold_reward(text, best_response(text)) for text in map(_question, prompts) if text]


def _question(prompt: Messages) -> str:
    """What is asked, where the built-in world knows the answer; else nothing."""
    text = prompt[-1]["content"] if len(prompt) == 1 else ""
    return text if text in questions() else ""
