"""Live curves: what goes into metrics.jsonl goes to TensorBoard, W&B or another of Accelerate's trackers as well.

Every stage is a run of its own, called like the stage, in one project, called like the recipe. No tracker can end a
stage: one that fails is named once, and the stage goes on without it. Imports nothing heavy before one starts.
"""

import importlib.util
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import MissingInput
from rlhf.recipe import Recipe
from rlhf.runtime import log

NOT_SHOWN = ("step", "update", "time")  # they are where a value stands; every tracker has a clock of its own
GO_ON = ("tensorboard", "dvclive")  # they go on in their folder; of the others, each start is a new run


def check_trackers(names: Iterable[str]) -> None:
    """Raises MissingInput where a tracker's package, which has the tracker's name, is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder is no package: W&B leaves one called wandb
            raise MissingInput(f"track: {name} needs the package {name}, which is not installed: pip install {name}")


def flat_settings(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """The resolved recipe as trackers take it: `ppo.kl.coefficient: 0.05`; lists are JSON texts."""
    found: dict[str, bool | int | float | str] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            else:
                found[prefix + key] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value

    add("", recipe.model_dump(mode="json", by_alias=True, exclude_none=True))
    return found


class Trackers:
    """The trackers that a recipe asks for, for one stage; without any, every method does nothing."""

    def __init__(self, recipe: Recipe, stage: str, folder: Path) -> None:
        """`folder`: where those that write files keep them, for all stages of the run."""
        self._recipe, self._stage, self._folder = recipe, stage, folder
        self._names: list[str] = list(dict.fromkeys(recipe.track))
        self._running: dict[str, Any] = {}

    def start(self, first_step: int) -> None:
        """Starts all, or starts them anew: what comes next is of this step or later. The random states stay."""
        self.close()
        if not self._names:
            return
        from rlhf.checkpoint import random_state, set_random_state

        before = random_state()
        for name in tuple(self._names):
            with self._harmless(name):
                self._running[name] = self._started(name, first_step)
        set_random_state(before)

    def log(self, values: dict[str, Any]) -> None:
        """Passes on the numbers of one line of metrics.jsonl, at its step or update."""
        step = values.get("step", values.get("update"))
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k not in NOT_SHOWN}
        for name, tracker in tuple(self._running.items()):
            with self._harmless(name):
                tracker.log(numbers, step=step)

    def close(self) -> None:
        """Lets all finish what they have to write."""
        running, self._running = self._running, {}
        for name, tracker in running.items():
            with self._harmless(name):
                tracker.finish()

    def _started(self, name: str, first_step: int) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._folder.mkdir(exist_ok=True)
        tracker = LOGGER_TYPE_TO_CLASS[name](**self._arguments(first_step)[name])
        tracker.start()
        if name == "comet_ml":  # its class takes the project's name alone
            tracker.tracker.set_name(self._stage)
        if first_step == 0 or name not in GO_ON:
            tracker.store_init_configuration(flat_settings(self._recipe))
        return tracker

    def _arguments(self, first_step: int) -> dict[str, dict[str, Any]]:
        """How each class is told the project, the run, the folder and, where it can, the first step."""
        project, stage, folder = self._recipe.name, self._stage, str(self._folder)
        return {
            "aim": {"run_name": stage, "logging_dir": folder, "experiment": project},
            "clearml": {"run_name": project, "task_name": stage},
            "comet_ml": {"run_name": project},
            "dvclive": {"dir": f"{folder}/dvclive/{stage}", "resume": first_step > 0},
            "mlflow": {"experiment_name": project, "run_name": stage},
            "swanlab": {"run_name": project, "experiment_name": stage},
            "tensorboard": {"run_name": stage, "logging_dir": folder, "purge_step": first_step},
            "trackio": {"run_name": project, "name": stage},
            "wandb": {"run_name": project, "name": stage, "dir": folder},
        }

    @contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        """Within, a tracker's fault is said, and is the last thing that is heard of it."""
        try:
            yield
        except Exception as error:
            self._running.pop(name, None)
            self._names.remove(name)
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            log(f"{self._stage}: the tracker {name} failed, the stage goes on without it ({why})")
