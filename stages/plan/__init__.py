"""What a recipe will do and need, told before anything is trained: batches, memory, work, disk.

machine    what it is planned for
base       what all plans have in common; the models that stages start from
passes     what stages do with a model, gone through without numbers (rlhf.footprint)
pretrain, sft, reward, ppo, evaluate    a stage each
"""

from collections.abc import Callable

from rlhf.recipe import StageName
from stages.plan import evaluate, ppo, pretrain, reward, sft
from stages.plan.base import Context, Memory, StagePlan, read_first, read_if_there
from stages.plan.machine import GIB, Machine, Work

__all__ = ["GIB", "Context", "Machine", "Memory", "StagePlan", "Work", "plan_stage"]

PLANS: dict[StageName, Callable[[Context], StagePlan]] = {
    "pretrain": pretrain.plan,
    "sft": sft.plan,
    "reward": reward.plan,
    "ppo": ppo.plan,
    "evaluate": evaluate.plan,
}


def plan_stage(context: Context, stage: StageName) -> StagePlan:
    """The plan of one stage. Raises UserError for what the user must mend."""
    if stage == "tokenizer":
        settings = context.recipe.tokenizer
        assert settings is not None
        found = StagePlan("tokenizer", [f"a vocabulary of {settings.vocab_size:,} tokens"])
        read_if_there(
            found,
            settings.train,
            "the texts",
            lambda: read_first(context, "tokenizer", settings.train, "texts", "train"),
        )
        return found
    return PLANS[stage](context)
