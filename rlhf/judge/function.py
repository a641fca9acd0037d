"""A Python function as a judge."""

import math
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from rlhf.errors import StageFailed
from rlhf.judge.protocol import Conversation, Scores, check_usable


class FunctionJudge:
    """Scores by a Python function of the user's, called with a list of `{"prompt": messages, "response": text}`.

    `messages` is a list of `{"role": ..., "content": ...}`; the function returns a number for each conversation, in
    order. It is called once for each update's episodes, in every process with that process's share of them, and for the
    test prompts before and after. It need not give the same scores every time; a run that is killed and goes on then
    ends with other weights than one that wasn't.
    """

    def __init__(self, reference: str, function: Callable[[list[dict[str, Any]]], Any]) -> None:
        """`reference` is what the recipe calls the function; errors name it."""
        self._who, self._function = f"the judge {reference}", function

    def scores(self, conversations: Sequence[Conversation]) -> Scores:
        """See Judge. Raises StageFailed where the function fails, or doesn't give a number for each conversation."""
        asked = [{"prompt": [dict(m) for m in c.prompt], "response": c.response} for c in conversations]
        try:
            answered = list(self._function(asked))
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            raise StageFailed(f"{self._who} raised {self._told(error)}") from None
        if len(answered) != len(conversations):
            raise StageFailed(f"{self._who} gave {len(answered)} scores for {len(conversations)} conversations")
        values = [self._number(answer) for answer in answered]
        check_usable(self._who, values)
        return Scores(values)

    def _number(self, answer: Any) -> float:
        plain = answer.item() if getattr(answer, "ndim", None) == 0 else answer
        if not isinstance(plain, Real):  # not even text that looks like a number
            raise StageFailed(f"{self._who}: a score is {plain!r:.80}, which is no number")
        try:
            return float(plain)
        except OverflowError:
            return math.inf

    def _told(self, error: BaseException) -> str:
        """An error by its own message and the last line of the user's file that it came through."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        code = getattr(self._function, "__code__", None)
        own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
        place = (own or frames)[-1:]
        where = "".join(f" ({frame.filename}, line {frame.lineno})" for frame in place)
        return f"{type(error).__name__}: {error}{where}"
