"""One process of one stage, started by rlhf.launch (arguments: STAGE RUN_DIR), or by a launcher.

It runs the stage with the recipe that the run directory holds; rank 0 writes the summary last.
"""

import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

from rlhf.chain import Plan, check_inputs, check_upstream, finish_stage, prepare, take_back
from rlhf.errors import Interrupted, RlhfError, StageFailed, UserError
from rlhf.job import Job
from rlhf.launch import SHARED, threads_of
from rlhf.quantisation import leave_out, leave_out_unless_needed
from rlhf.recipe import Recipe, StageName, dump_recipe, load_recipe
from rlhf.rundir import RunDir, no_room, write_atomically
from rlhf.runtime import (
    Interrupts,
    Meter,
    Sharding,
    derive_seed,
    end_with_parent,
    print_anything,
    quiet_libraries,
    refuse_sharding,
    seed_everything,
    take_over_sharding,
    visible,
)
from rlhf.team import (
    DISK_FULL,
    LOST_CONTACT,
    PeerWatch,
    Team,
    announce,
    join_team,
    lost_contact,
    rank_in_environment,
    rank_log,
)


def main() -> int:
    """Runs the stage that the arguments name, in a process that `rlhf run` has started."""
    stage, run_path = sys.argv[1:]
    run = RunDir(Path(run_path))
    rank, _ = rank_in_environment()
    folder = run.stage(stage).path / "ranks"
    try:
        interrupts = _begin_process(rank, folder)
        sharding = take_over_sharding()
        refuse_sharding()
        recipe = load_recipe(str(run.path / "recipe.yaml"))
        announce(folder, rank)
        team = join_team()
    except RlhfError as error:
        return _say(error)
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except OSError as error:
        return _no_room(run, stage, rank) if disk_full(error) else _say(StageFailed(f"{error.filename}: {error}"))
    return run_rank(recipe, stage, run, team, interrupts, sharding)  # type: ignore[arg-type]  # the parent gives a stage's name


def run_under_launcher(
    recipe: Recipe, stage: StageName, runs_dir: Path, *, fresh: bool, command: str, again: Callable[[str], str]
) -> int:
    """Runs one stage in a process that a launcher has started, beside others that do the same; the exit code.

    Rank 0 decides, for all, whether the stage is to be run, and holds the lock of the run's directory.
    """
    import torch

    end_with_parent()
    rank, _ = rank_in_environment()
    run = RunDir.of(recipe, runs_dir)
    interrupts = _begin_process(rank, None)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads_of(recipe, local))  # launchers set one thread
    team = join_team()
    with ExitStack() as held:
        plans: list[Plan | None] = []  # rank 0's
        try:
            sharding = take_over_sharding()
        except UserError as error:
            return _say(error)

        def decide() -> str:
            try:
                refuse_sharding()
                check_inputs(recipe, (stage,), team.size)
                check_upstream(recipe, stage, run, again)
                run.create()
                held.enter_context(run.lock())
                run.write_recipe(recipe)
                plans.append(prepare(recipe, stage, run, fresh=fresh, command=command))
                return "run" if plans[0] else ""
            except RlhfError as error:
                return f"error {error.exit_code}: {error}"

        decision = team.from_main(decide)
        if decision.startswith("error "):
            code, _, why = decision.removeprefix("error ").partition(": ")
            if team.is_main:
                print(visible(f"error: {why}"), file=sys.stderr)
            return int(code)
        if not decision:
            return 0
        folder = run.stage(stage).path / "ranks"
        folder.mkdir(exist_ok=True)
        _redirect(rank, folder)
        announce(folder, rank)
        team.check_same("the recipe", dump_recipe(recipe))
        ended = run_rank(recipe, stage, run, team, interrupts, sharding)
        if plans and plans[0] and ended == UserError.exit_code:
            take_back(plans[0])
        if team.is_main:
            run.write_summary()
        return ended


def run_rank(
    recipe: Recipe, stage: StageName, run: RunDir, team: Team, interrupts: Interrupts, sharding: Sharding | None
) -> int:
    """Runs one stage as one of its ranks, and completes its directory; the exit code."""
    meter = Meter()
    watch = None
    if team.size > 1:
        watch = PeerWatch(run.stage(stage).path / "ranks", team)
        watch.start()
    failure = run.stage(stage).failure_file
    try:
        if team.is_main:
            failure.unlink(missing_ok=True)
        alone = stage not in SHARED
        if not alone or team.is_main:
            job = Job(recipe, run, stage, meter=meter, interrupts=interrupts)
            if not alone:
                job = replace(job, team=team, watch=watch, sharding=sharding)
            with closing(job.trackers):
                _run_stage(job)
        team.wait()
        if watch:
            watch.end()
        return 0
    except RlhfError as error:
        if isinstance(error, StageFailed) and team.is_main:
            with suppress(OSError):
                write_atomically(failure, f"{error}\n")
        return _say(error)
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except Exception as error:
        lost = watch.lost() if watch and lost_contact(error) else None
        if lost:
            print(f"error: {lost}; rank {team.rank} ends too", file=sys.stderr)
            return LOST_CONTACT
        if disk_full(error):
            return _no_room(run, stage, team.rank)
        print(visible(traceback.format_exc()), file=sys.stderr)
        return 1


def _run_stage(job: Job) -> None:
    leave_out_unless_needed(job.recipe, job.stage)
    if not (job.sharding and job.sharding.zero):
        leave_out("deepspeed")  # Accelerate would import it wherever it finds it: 2 seconds, and some words
    module = importlib.import_module(f"stages.{job.stage}")
    job.meter.begin_work()
    with quiet_libraries():
        seed_everything(derive_seed(job.recipe.seed, job.stage))
        results = module.run(job)
    spent = job.team.gather(job.meter.summary(job.stage, job.team.size))
    if job.team.is_main:
        together = {
            "cpu_seconds": round(sum(one["cpu_seconds"] for one in spent), 2),
            "peak_memory_mib": max(one["peak_memory_mib"] for one in spent),
        }
        finish_stage(job.directory, {**spent[0], **together, **results})


def _no_room(run: RunDir, stage: str, rank: int) -> int:
    """Says that the disk is full; a rank whose log can't be written leaves that to its parent."""
    return DISK_FULL if rank else _say(StageFailed(no_room(run.stage(stage).path)))


def disk_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that the disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(seen) for sign in ("No space left", "file write failed", "os error 28")):
            return True
        if re.fullmatch(r"\d+ requested and \d+ written", str(seen)):  # as NumPy says it
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _begin_process(rank: int, folder: Path | None) -> Interrupts:
    print_anything()
    if folder:
        _redirect(rank, folder)
    interrupts = Interrupts()
    interrupts.install()
    return interrupts


def _redirect(rank: int, folder: Path) -> None:
    """Rank 0 speaks to the user; what the others say goes into files."""
    if rank == 0:
        return
    file = os.open(rank_log(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)


def _say(error: RlhfError) -> int:
    print(visible(str(error) if isinstance(error, Interrupted) else f"error: {error}"), file=sys.stderr)
    return error.exit_code


def leave(code: int) -> None:
    """Ends the process. With other ranks about, their threads could keep it from ending as usual."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
