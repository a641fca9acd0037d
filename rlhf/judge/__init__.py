"""Judges: whatever gives PPO its scores. One Protocol, conversations in, scores out."""

from rlhf.judge.classifier import ClassifierJudge
from rlhf.judge.function import FunctionJudge
from rlhf.judge.heads import RewardModelJudge, head_scores, score_means
from rlhf.judge.protocol import Conversation, Judge, Part, Scores, WeightedSum, judge_models, mean_figures

__all__ = [
    "ClassifierJudge",
    "Conversation",
    "FunctionJudge",
    "Judge",
    "Part",
    "RewardModelJudge",
    "Scores",
    "WeightedSum",
    "head_scores",
    "judge_models",
    "mean_figures",
    "score_means",
]
