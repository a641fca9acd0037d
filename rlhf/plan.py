"""`rlhf plan` and `rlhf run --dry-run`: what a recipe will do and need, told before anything is trained.

Everything is checked that can be: the recipe, its files, their rows (the first thousands), models, tokenizers, chat
templates; the first of what each stage reads is shown as the model sees it. Then arithmetic: batches, memory by role,
work, time on named hardware, disk; and where something doesn't fit, what to change.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from rlhf.chain import State, check_gate, check_inputs, state_of
from rlhf.choices import loading_attention
from rlhf.errors import RecipeError, UserError
from rlhf.launch_file import LaunchConfig, find_launch_file, read_launch_file
from rlhf.quantisation import quantised_adapters
from rlhf.recipe import LoraSection, Recipe, StageName, microbatches, upstream
from rlhf.rundir import RunDir
from rlhf.runtime import quiet_libraries, uses_bfloat16, visible
from rlhf.zero import NO_MUON
from stages.plan import GIB, Context, Machine, StagePlan, plan_stage
from stages.plan.machine import TRAINING_SHARE, Gpu

FILLED = 0.92  # of a GPU's memory, at most: the rest is the driver's, and lost between its allocator's blocks
SHOWN_LINES = 12


def machine_of(
    recipe: Recipe, gpus: int | None, gpu_memory: float | None, processes: int | None, launch: str = ""
) -> Machine:
    """What is planned for: what the options say, or else the recipe's `hardware`, or else what is here.

    `launch`: a launch file or the name of one. Raises UserError where the options don't say enough, or contradict.
    """
    path = find_launch_file(launch) if launch else None
    config = read_launch_file(path) if path else None
    _check_options(gpus, gpu_memory, processes, path, config)
    on_cpus = gpus == 0 or (config is not None and config.use_cpu)
    hardware = recipe.hardware
    if hardware and not on_cpus and gpus is None and gpu_memory is None and processes is None:
        gpus, gpu_memory = (config.num_processes if config else None) or hardware.gpus, hardware.gpu_memory
        if hardware.launch and not config:
            config = read_launch_file(find_launch_file(hardware.launch))
    here = [] if on_cpus or gpu_memory is not None else _gpus_here()
    if not here and not on_cpus and gpu_memory is None and (gpus or path):
        asks = "--gpus" if gpus else f"{path} starts processes on GPUs, and torch finds none here"
        raise UserError(f"{asks}: say with --gpu-memory how many GiB each of them has")
    count = gpus or processes or (config.num_processes if config else None) or (len(here) if config else 1)
    if not count:
        raise UserError(f"{path}: num_processes: missing; say it there, or with --processes N")
    memory = round(gpu_memory * GIB) if gpu_memory else min(here, default=0)
    sharded = config is not None and config.distributed_type != "MULTI_GPU" and count > 1
    zero = sharded and config is not None and config.distributed_type == "DEEPSPEED"
    if zero and recipe.pretrain and "pretrain" in recipe.stages and recipe.pretrain.optimizer == "muon":
        raise UserError(NO_MUON)
    if recipe.precision == "bfloat16" and not memory:
        uses_bfloat16(recipe.precision)  # refuses it where this machine is many times slower with it
    bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and memory > 0)
    return Machine(count, memory, sharded, bfloat16, loading_attention(recipe))


def _check_options(
    gpus: int | None,
    gpu_memory: float | None,
    processes: int | None,
    path: Path | None,
    config: LaunchConfig | None,
) -> None:
    """Raises UserError where two of them can't both be true."""
    if gpus == 0 and gpu_memory is not None:
        raise UserError("--gpus 0 means this machine's CPU, and --gpu-memory is that of a GPU; leave one of them out")
    if gpus and processes and gpus != processes:
        raise UserError(f"--gpus {gpus} and --processes {processes} disagree: there is a process on each GPU")
    if config is None:
        return
    if config.use_cpu and (gpus or gpu_memory is not None):
        raise UserError(f"{path} starts processes on CPUs; leave it out, or --gpus and --gpu-memory")
    if gpus == 0 and not config.use_cpu:
        raise UserError(f"--gpus 0 means this machine's CPU, and {path} starts processes on GPUs")
    asked = config.num_processes
    for option, said in (("--gpus", gpus), ("--processes", processes)):
        if asked and said and asked != said:
            raise UserError(f"{option} {said} and {path} (num_processes: {asked}) disagree; leave one of them out")


def _gpus_here() -> list[int]:
    """Bytes of each GPU of this machine."""
    import torch

    return [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]


class Alternative(NamedTuple):
    """A change of the recipe, as an override says it."""

    override: str
    recipe: Recipe


def run_plan(
    recipe: Recipe,
    wanted: tuple[StageName, ...],
    runs_dir: Path,
    machine: Machine,
    *,
    as_json: bool,
    fresh: bool = False,
) -> None:
    """Checks and tells. Raises UserError for what the user must mend, StageFailed where a judge isn't good enough.

    `fresh`: what is done is run again.
    """
    with redirect_stdout(sys.stderr if as_json else sys.stdout):  # what stages say on the way is no JSON
        plans, context = _plans(recipe, wanted, runs_dir, machine, as_json=as_json, fresh=fresh)
    if as_json:
        print(json.dumps(_as_json(context, plans), indent=2, ensure_ascii=False))
    else:
        _print(_in_all(context, plans))


def _plans(
    recipe: Recipe, wanted: tuple[StageName, ...], runs_dir: Path, machine: Machine, *, as_json: bool, fresh: bool
) -> tuple[list[StagePlan], Context]:
    check_inputs(recipe, wanted, machine.processes)
    if machine.sharded:
        _check_pieces(recipe, wanted)
    run = RunDir.of(recipe, runs_dir)
    states = _states(recipe, wanted, run, fresh=fresh)
    redone = frozenset(stage for stage, state in states.items() if state.name == "stale")
    context, console = Context(recipe, run, machine, redone), Console(stderr=True)
    if not as_json:
        _print(f"plan: {recipe.name} for {machine}")
    plans = []
    for number, stage in enumerate(wanted, 1):
        if console.is_terminal:
            console.print(f"[dim]planning {stage} ({number} of {len(wanted)})[/dim]", end="\r")
        with quiet_libraries():
            found = plan_stage(context, stage)
            found.advice += _advice(context, found)
        plans.append(found)
        for name in (stage, *upstream(recipe, stage)):
            if states[name].name == "done":
                check_gate(recipe, name, run)
        if not as_json:
            _print(f"\n[{number}/{len(wanted)}] {stage}: {_told(recipe, stage, wanted, states, run)}")
            for line in _lines(context, found):
                _print(f"  {line}")
    return plans, context


def _check_pieces(recipe: Recipe, wanted: tuple[StageName, ...]) -> None:
    """Raises UserError for what no stage does where models lie in pieces."""
    for stage in wanted:
        if quantised_adapters(recipe, stage):
            raise UserError(f"{stage}.lora.quantised: a base in 4 bits can't lie in pieces: leave that out, or FSDP")
        if stage == "pretrain" and recipe.pretrain and recipe.pretrain.compile is True:
            raise UserError("pretrain.compile: not where models are sharded (FSDP)")


def _states(recipe: Recipe, wanted: tuple[StageName, ...], run: RunDir, *, fresh: bool) -> dict[StageName, State]:
    """Where each of the recipe's stages stands; what stands on one that isn't done will be made anew with it."""
    found: dict[StageName, State] = {}
    for stage in recipe.stages:
        state = state_of(recipe, stage, run)
        before = [name for name in upstream(recipe, stage) if found[name].name in ("stale", "interrupted", "missing")]
        if fresh and stage in wanted and state.name != "missing":
            state = State("stale", "--fresh")
        elif before and state.name in ("done", "interrupted"):
            state = State("stale", f"{before[0]}, which it stands on, isn't done")
        found[stage] = state
    return found


def _told(
    recipe: Recipe, stage: StageName, wanted: tuple[StageName, ...], states: dict[StageName, State], run: RunDir
) -> str:
    """What a run would do with a stage."""
    state, holder = states[stage], run.holder()
    before = [name for name in upstream(recipe, stage) if name not in wanted and states[name].name != "done"]
    if before:
        return f"can't run yet: the stage {before[0]}, which it stands on, is {states[before[0]].name}"
    if holder is not None and state.name != "done":
        return f"would be refused now: another rlhf run (pid {holder}) is at work in {run.path}"
    return {
        "done": "done, would be skipped",
        "interrupted": "would go on where it was interrupted",
        "stale": f"would be redone, since {state.why} (the old one is moved aside)",
    }.get(state.name, "would run")


def _print(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(visible(text), markup=False, emoji=False)


# What is told


def _lines(context: Context, plan: StagePlan) -> Iterator[str]:
    if plan.parameters:
        trained = "" if plan.trained in (0, plan.parameters) else f", {plan.trained:,} trained"
        yield f"model     {plan.parameters:,} parameters{trained}"
    for line in plan.lines:
        yield f"batches   {line}"
    memory = plan.memory
    if memory:
        yield f"memory    {_gib(memory.total)} of a process at most, in {memory.phase}, above what the libraries take:"
        for role, size in sorted(memory.roles.items(), key=lambda item: -item[1]):
            yield f"          {_gib(size):>10}  {role}"
    if plan.tokens:
        yield f"work      {plan.tokens:.3g} tokens, {plan.work.flops:.2e} floating-point operations"
        yield f"time      {_times(context, [plan])}"
    if plan.disk:
        yield f"disk      {_gib(plan.disk)}, checkpoints and model"
    if plan.shown:
        shown = plan.shown.splitlines()
        yield "reads     " + "\n            ".join(
            [*shown[:SHOWN_LINES], *(["..."] if len(shown) > SHOWN_LINES else [])]
        )
    for what in plan.unchecked:
        yield f"unchecked {what}"
    for advice in plan.advice:
        yield f"too large {advice}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.0f} MiB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"


def _times(context: Context, plans: list[StagePlan]) -> str:
    machine = context.machine
    if not machine.on_gpus:
        hours = sum(plan.work.hours_here(_flops_here()) for plan in plans)
        rate = f"{_flops_here() / 1e9:,.0f} GFLOP/s, measured now"
        return f"about {_hours(hours)} here ({rate}, of which training is taken to reach {TRAINING_SHARE:.0%})"

    if not machine.kinds():
        return f"not known: no GPU with {machine.gpu_memory / GIB:.0f} GiB is known by name"

    def told(gpu: Gpu) -> str:
        return f"{machine.processes} x {gpu.name} {_hours(sum(p.work.hours(gpu, machine.processes) for p in plans))}"

    return f"{'; '.join(map(told, machine.kinds()))} (at {TRAINING_SHARE:.0%} of their rated speed, an assumption)"


_MEASURED: list[float] = []


def _flops_here() -> float:
    """Floating-point operations a second of a matrix product on all threads, measured once."""
    import torch

    from stages.pretrain.speed import peak_flops

    if not _MEASURED:
        _MEASURED.append(peak_flops(torch.device("cpu"), torch.float32))
    return _MEASURED[0]


def _in_all(context: Context, plans: list[StagePlan]) -> str:
    disk = sum(plan.disk for plan in plans)
    there = next(folder for folder in (context.run.path, *context.run.path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    lines = [f"\nin all: {_times(context, plans)}; disk {_gib(disk)} ({_gib(free)} free)"]
    if disk > free:
        lines.append("the disk has no room for it: checkpoints.keep=1, or another --runs-dir")
    large = [*(plan.stage for plan in plans if plan.advice), *(["the disk"] if disk > free else [])]
    lines.append(f"does not fit: {', '.join(large)}; see above" if large else "everything fits")
    unchecked = [plan.stage for plan in plans if plan.unchecked]
    if unchecked:
        lines.append(f"not all could be checked of: {', '.join(unchecked)}")
    return "\n".join(lines)


def _as_json(context: Context, plans: list[StagePlan]) -> dict[str, Any]:
    machine = context.machine
    return {
        "recipe": context.recipe.name,
        "processes": machine.processes,
        "gpu_memory_gib": round(machine.gpu_memory / GIB, 2),
        "sharded": machine.sharded,
        "stages": {plan.stage: _stage_as_json(context, plan) for plan in plans},
    }


def _stage_as_json(context: Context, plan: StagePlan) -> dict[str, Any]:
    machine, memory = context.machine, plan.memory
    times = {gpu.name: plan.work.hours(gpu, machine.processes) for gpu in machine.kinds()} if machine.on_gpus else {}
    return {
        "parameters": plan.parameters,
        "parameters_trained": plan.trained,
        "batches": plan.lines,
        "memory_mib": round(memory.total / 2**20, 1) if memory else None,
        "memory_mib_by_role": {role: round(size / 2**20, 1) for role, size in memory.roles.items()} if memory else {},
        "memory_phase": memory.phase if memory else None,
        "fits": not plan.advice if memory or not plan.parameters else None,
        "tokens": plan.tokens,
        "flops": plan.work.flops,
        "hours": times or {"here": plan.work.hours_here(_flops_here())},
        "disk_mib": round(plan.disk / 2**20, 1),
        "unchecked": plan.unchecked,
        "advice": plan.advice,
    }


# What to change


def _advice(context: Context, plan: StagePlan) -> list[str]:
    """What of the recipe to change where a stage needs more than a process may take; nothing where it fits."""
    if plan.memory is None or _fits(context, plan):
        return []
    room = context.machine.room
    wanted = f"{_gib(plan.memory.total)} are needed, and {_gib(room)} are there"
    tried = []
    for alternative in _alternatives(context.recipe, plan.stage, context.machine):
        try:
            other = plan_stage(context._replace(recipe=alternative.recipe), plan.stage)
        except RecipeError:  # no alternative for this model
            continue
        if other.memory is None:
            continue
        if _fits(context, other):
            return [f"{wanted}: with {alternative.override} it fits, in {_gib(other.memory.total)}"]
        tried.append(f"{alternative.override}: {_gib(other.memory.total)}")
    more = "a launch file that shards (--launch-config fsdp2) and more GPUs, or a smaller model"
    return [f"{wanted}; {'; '.join(tried)} don't suffice: {more}" if tried else f"{wanted}: {more}"]


def _fits(context: Context, plan: StagePlan) -> bool:
    assert plan.memory is not None
    machine = context.machine
    return plan.memory.total <= machine.room * (FILLED if machine.on_gpus else 1.0)


def _alternatives(recipe: Recipe, stage: StageName, machine: Machine) -> Iterator[Alternative]:
    """Changes that need less memory, those that change no result first; each holds with those before it."""
    section: Any = getattr(recipe, stage)
    said: list[str] = []

    def changed(override: str, **values: Any) -> Alternative:
        nonlocal section
        section = section.model_copy(update=values)
        said.append(f"{stage}.{override}")
        return Alternative(" ".join(said), recipe.model_copy(update={stage: section}))

    if getattr(section, "from_", None):
        return
    if stage in ("pretrain", "sft", "reward"):
        size, _ = microbatches(recipe, stage, machine.processes)
        smaller = sorted({n for n in range(1, size) if size % n == 0}, reverse=True)
        for rows in dict.fromkeys(smaller[:1] + smaller[-1:]):
            said.clear()
            yield changed(f"microbatch_size={rows}", microbatch_size=rows)
    if stage == "ppo":
        yield changed("microbatch_size=1", microbatch_size=1)
    if stage != "evaluate" and not section.gradient_checkpointing:
        yield changed("gradient_checkpointing=true", gradient_checkpointing=True)
    if stage == "pretrain" and not machine.on_gpus and section.spikes.action == "roll_back":
        yield changed("spikes.action=stop", spikes=section.spikes.model_copy(update={"action": "stop"}))
    if stage in ("sft", "reward") and section.lora is None:
        yield changed("lora={}", lora=LoraSection())
    if stage == "ppo":
        yield changed("rollout_batch_size=16", rollout_batch_size=16)
        for layout in {"full": ("shared", "adapters"), "shared": ("adapters",)}.get(section.layout, ()):
            said[:] = [override for override in said if not override.startswith("ppo.layout")]
            yield changed(f"layout={layout}", layout=layout)
