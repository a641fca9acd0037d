"""What a recipe will do and need, told before anything is trained: batches, memory, work, disk.

machine    what it is planned for
base       what all plans have in common; the models that stages start from
passes     what stages do with a model, gone through without numbers (rlhf.footprint)
pretrain, sft, reward, ppo, evaluate    a stage each
"""

from collections.abc import Callable

from rlhf.recipe import StageName
from stages.plan import evaluate, ppo, pretrain, reward, sft
from stages.plan.base import Context, Memory, StagePlan
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
        assert context.recipe.tokenizer is not None
        return StagePlan("tokenizer", [f"a vocabulary of {context.recipe.tokenizer.vocab_size:,} tokens"])
    return PLANS[stage](context)
