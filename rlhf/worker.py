"""The process of one stage: `python -m rlhf.worker STAGE RUN_DIR`, started by rlhf.chain.

It runs the stage with the recipe that the run directory holds, and writes the summary last.
"""

import importlib
import sys
from pathlib import Path

from rlhf.chain import finish_stage
from rlhf.errors import RlhfError
from rlhf.recipe import Recipe, StageName, load_recipe
from rlhf.rundir import RunDir
from rlhf.runtime import Meter, derive_seed, end_with_parent, quiet_libraries, seed_everything


def run_stage(recipe: Recipe, stage: StageName, run: RunDir) -> None:
    """Runs one stage in this process and completes its directory."""
    meter = Meter()
    module = importlib.import_module(f"stages.{stage}")
    with quiet_libraries():
        seed_everything(derive_seed(recipe.seed, stage))
        results = module.run(recipe, run)
    accelerator = results.pop("_accelerator", None)
    if accelerator is None or accelerator.is_main_process:
        finish_stage(run.stage(stage), {**meter.summary(stage, accelerator), **results})
    if accelerator is not None:
        accelerator.end_training()


def main() -> int:
    """Runs the stage that the arguments name; the exit code is that of `rlhf`."""
    end_with_parent()
    stage, run_path = sys.argv[1:]
    run = RunDir(Path(run_path))
    try:
        recipe = load_recipe(str(run.path / "recipe.yaml"))
        run_stage(recipe, stage, run)  # type: ignore[arg-type]  # the parent gives a stage's name
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
