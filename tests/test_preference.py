"""What a judge knows about itself, and the loss that it learns by: constants worked by hand, and naive loops."""

import itertools
import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from evaluation import plots, preference
from evaluation.preference import Answer, Outcome
from rlhf.data.words import words_of
from rlhf.functional.bradley_terry import bootstrap_weights, pair_losses, preference_loss
from rlhf.functional.intervals import Estimate, proportion_estimate

# The loss


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor([[value] for value in values], dtype=torch.float64)


def test_the_loss_of_a_pair_by_hand() -> None:
    # d = 2 - 0.5 = 1.5, m = 0.5: -ln sigmoid(1) = ln(1 + e^-1) = 0.31326168751822286; -ln sigmoid(-1) is 1 more
    found = pair_losses(doubles(2.0), doubles(0.5), torch.tensor([0.5], dtype=torch.float64), 0.1)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(0.9 * 0.31326168751822286 + 0.1 * 1.31326168751822286, abs=1e-15)
    nothing = pair_losses(doubles(3.0), doubles(3.0), torch.zeros(1, dtype=torch.float64), 0.0)
    assert nothing.item() == pytest.approx(math.log(2), abs=1e-15)


def test_weights_and_centering_by_hand() -> None:
    # ln 2 with weight 0.5, ln(1 + e^-1) with weight 1.5, over 2 pairs; sums of scores 2 and 3: 0.01 * (4 + 9) / 2
    chosen, rejected = doubles(1.0, 2.0), doubles(1.0, 1.0)
    weights = doubles(0.5, 1.5)
    zeros = torch.zeros(2, dtype=torch.float64)
    expected = (0.5 * math.log(2) + 1.5 * math.log1p(math.exp(-1))) / 2
    assert preference_loss(chosen, rejected, zeros, weights, 0.0, 0.0).item() == pytest.approx(expected, abs=1e-15)
    centred = preference_loss(chosen, rejected, zeros, weights, 0.0, 0.01).item()
    assert centred == pytest.approx(expected + 0.01 * 6.5, abs=1e-15)


def test_the_loss_is_trls_where_nothing_is_added() -> None:
    torch.manual_seed(0)
    chosen, rejected, margins = torch.randn(7, 1), torch.randn(7, 1), torch.rand(7)
    theirs = -torch.nn.functional.logsigmoid(chosen[:, 0] - rejected[:, 0] - margins).mean()
    theirs = theirs + 0.05 * torch.mean((chosen[:, 0] + rejected[:, 0]) ** 2)
    torch.testing.assert_close(preference_loss(chosen, rejected, margins, torch.ones(7, 1), 0.0, 0.05), theirs)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_parts_of_a_batch_add_up_to_the_whole(heads: int) -> None:
    """Two equal halves average to the whole: microbatches and processes change nothing."""
    torch.manual_seed(1)
    chosen, rejected, margins = torch.randn(8, heads), torch.randn(8, heads), torch.rand(8)
    weights = torch.rand(8, heads) * 2
    whole = preference_loss(chosen, rejected, margins, weights, 0.1, 0.02)
    halves = [
        preference_loss(chosen[part], rejected[part], margins[part], weights[part], 0.1, 0.02)
        for part in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


def test_no_label_is_believed_beyond_the_smoothing() -> None:
    """With a share e of wrong labels the loss is lowest where sigmoid(d) = 1 - e."""
    differences = torch.linspace(-5, 8, 1301, dtype=torch.float64).unsqueeze(1)
    losses = pair_losses(differences, torch.zeros_like(differences), torch.zeros(1301, dtype=torch.float64), 0.2)
    assert differences[losses.argmin()].item() == pytest.approx(math.log(0.8 / 0.2), abs=0.01)


def test_huge_scores_give_finite_losses() -> None:
    losses = pair_losses(doubles(-1e4, 1e4), doubles(1e4, -1e4), torch.zeros(2, dtype=torch.float64), 0.0)
    assert losses.flatten().tolist() == [2e4, 0.0]


def test_a_single_head_has_the_weights_and_several_have_bootstraps() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert bootstrap_weights(weights, 1, seed=5).flatten().tolist() == [0.5, 1.0, 1.5]
    ones = torch.ones(4000)
    found = bootstrap_weights(ones, 4, seed=5)
    assert found.mean(0).tolist() == pytest.approx([1.0] * 4)
    assert torch.equal(found, bootstrap_weights(ones, 4, seed=5))
    assert not torch.equal(found, bootstrap_weights(ones, 4, seed=6))
    for column in found.T:  # of a Poisson variable of mean 1: variance 1, and 0 with probability 1/e
        assert column.var().item() == pytest.approx(1.0, abs=0.1)
        assert (column == 0).double().mean().item() == pytest.approx(math.exp(-1), abs=0.03)
    assert abs(torch.corrcoef(found.T)[0, 1].item()) < 0.05


def test_a_head_that_drew_no_pair_learns_nothing() -> None:
    found = torch.cat([bootstrap_weights(torch.ones(1), 8, seed) for seed in range(20)])
    assert torch.isfinite(found).all()
    assert 0.0 in found.flatten().tolist()


# Accuracy


def outcome(
    prompt: str,
    difference: float,
    *,
    source: str = "a",
    tokens: tuple[int, int] = (1, 1),
    texts: tuple[str, str] = ("x", "y"),
    gold: tuple[float, float] | None = None,
) -> Outcome:
    golds = gold or (None, None)
    return Outcome(
        prompt,
        source,
        Answer(texts[0], tokens[0], (difference,), golds[0]),
        Answer(texts[1], tokens[1], (0.0,), golds[1]),
    )


def test_accuracies_by_hand() -> None:
    outcomes = [
        outcome("p", 1.0, source="a", tokens=(3, 2)),
        outcome("q", -1.0, source="a", tokens=(2, 3)),
        outcome("r", 0.0, source="b", tokens=(5, 1)),
        outcome("s", 2.0, source="b", tokens=(4, 4)),
    ]
    found = preference.accuracies(outcomes)
    assert found["pairs_test"] == 4
    assert found["accuracy"] == 0.625  # 1, 0, a coin, 1
    assert found["accuracy_ci95"] == [round(x, 4) for x in proportion_estimate(2.5, 4)[1:]]
    assert found["length_baseline_accuracy"] == 0.625  # 1, 0, 1, a coin
    assert found["accuracy_by_source"]["a"] | {"accuracy_ci95": 0, "length_baseline_accuracy_ci95": 0} == {
        "pairs": 2,
        "accuracy": 0.5,
        "accuracy_ci95": 0,
        "length_baseline_accuracy": 0.5,
        "length_baseline_accuracy_ci95": 0,
    }
    assert (found["pairs_longer_chosen"], found["accuracy_longer_chosen"]) == (2, 0.75)
    assert (found["pairs_shorter_chosen"], found["accuracy_shorter_chosen"]) == (1, 0.0)
    nobody = preference.accuracies([outcome("p", 1.0)])
    assert (nobody["accuracy_shorter_chosen"], nobody["accuracy_shorter_chosen_ci95"]) == (None, None)


def test_an_interval_is_over_prompts() -> None:
    values = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    prompts = ["p", "p", "p", "q", "q", "r"]
    assert preference.share(prompts, values) == proportion_estimate(3, 6)  # no more alike than those of any prompt
    # 2 of 2 and 0 of 1: residuals 2 - 2 * 2/3 and 0 - 2/3, variance 2/1 * (4/9 + 4/9) / 9, so worth 2/9 / (16/81) = 9/8
    assert preference.share(list("aab"), [1.0, 1.0, 0.0]) == pytest.approx(proportion_estimate(0.75, 1.125))
    assert preference.share(list("abcdef"), values) == proportion_estimate(3, 6)


def test_gold_by_hand() -> None:
    outcomes = [
        outcome("p", 1.0, gold=(0.9, 0.1)),  # judge and labeller right
        outcome("q", -1.0, gold=(0.1, 0.9)),  # labeller wrong, judge right
        outcome("r", -1.0, gold=(0.5, 0.45)),  # labeller right; too small to ask the judge
        outcome("s", 1.0, gold=(0.5, 0.5)),  # no difference
        outcome("t", 1.0),
    ]
    found = preference.gold_figures(outcomes, margin=0.2)
    assert (found["gold_accuracy"], found["gold_pairs"]) == (1.0, 2)
    assert found["labellers_agree_with_gold"] == pytest.approx(2 / 3, abs=1e-4)
    assert preference.gold_figures(outcomes[4:], 0.2) == {}
    assert preference.gold_figures(outcomes[3:4], 0.2)["gold_accuracy"] is None


# Calibration


def test_the_temperature_has_the_highest_likelihood() -> None:
    differences = [2.0, -1.0, 0.5, 3.0, -0.2, 1.0]
    found = preference.fit_temperature(differences)

    def loss(temperature: float) -> float:
        return sum(math.log1p(math.exp(-d / temperature)) for d in differences)

    best = min((loss(t / 1000), t / 1000) for t in range(50, 20000))[1]
    assert found == pytest.approx(best, abs=2e-3)


def test_a_temperature_by_hand() -> None:
    # of four choices with difference 1 three are as the score says: sigmoid(1 / T) = 3 / 4, T = 1 / ln 3
    assert preference.fit_temperature([1.0, 1.0, 1.0, -1.0]) == pytest.approx(1 / math.log(3))
    assert preference.fit_temperature([10.0, 10.0, 10.0, -10.0]) == pytest.approx(10 / math.log(3))


def test_a_temperature_is_finite_where_the_likelihood_has_no_end() -> None:
    assert preference.fit_temperature([1.0, 3.0]) == pytest.approx(2 / preference.HARDEST)
    assert preference.fit_temperature([-1.0, -3.0]) == pytest.approx(2 * preference.HARDEST)
    assert preference.fit_temperature([0.0, 0.0]) == 1.0


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_reliability_and_calibration_error_by_hand() -> None:
    # 0.62 twice, right once; 0.98 three times, always right; 0.52, wrong
    logits = [logit(0.62), -logit(0.62), *[logit(0.98)] * 3, -logit(0.52)]
    bins = preference.reliability(logits)
    shown = [(round(b.low, 3), round(b.high, 3), b.pairs, round(b.confidence, 9), b.accuracy) for b in bins]
    assert shown == [(0.5, 0.55, 1, 0.52, 0.0), (0.6, 0.65, 2, 0.62, 0.5), (0.95, 1.0, 3, 0.98, 1.0)]
    assert preference.calibration_error(bins) == pytest.approx((0.52 + 2 * 0.12 + 3 * 0.02) / 6)
    certain = preference.reliability([1e9, -1e9])
    assert [(b.low, b.pairs, b.confidence, b.accuracy) for b in certain] == [(0.95, 2, 1.0, 0.5)]


def test_each_half_of_the_prompts_is_measured_with_the_others_temperature() -> None:
    prompts = ["p", "p", "q", "q", "r", "s"]
    differences = [1.0, -0.5, 2.0, 3.0, -1.0, 4.0]
    found = preference.cross_fitted(prompts, differences)
    temperatures = [d / x for d, x in zip(differences, found, strict=True)]
    for half in itertools.combinations(sorted(set(prompts)), 2):  # the halves are two prompts each, whichever
        mine = [i for i, prompt in enumerate(prompts) if prompt in half]
        theirs = [differences[i] for i, prompt in enumerate(prompts) if prompt not in half]
        fitted = preference.fit_temperature(theirs)
        if all(temperatures[i] == pytest.approx(fitted) for i in mine):
            break
    else:
        raise AssertionError(temperatures)


def test_a_judge_that_is_too_sure_is_mended_by_its_temperature() -> None:
    draw = random.Random(3)
    outcomes = []
    for number in range(4000):
        honest = draw.gauss(0, 1.5)
        right = draw.random() < 1 / (1 + math.exp(-honest))
        outcomes.append(outcome(f"prompt {number}", 5 * (honest if right else -honest)))
    found = preference.calibration(outcomes, trained_temperature=1.0)
    assert found is not None
    assert found.temperature == pytest.approx(5.0, rel=0.1)
    assert found.error < 0.03 < 0.1 < found.error_before
    told = preference.calibration(outcomes, trained_temperature=5.0)
    assert told is not None
    assert told.error_before < 0.03
    assert preference.calibration([outcome("p", 1.0), outcome("p", 2.0)], 1.0) is None


# What meets the eye


def test_a_chinese_sign_is_a_word() -> None:
    assert words_of("Say 你好, world's end!") == ["say", "你", "好", "world", "s", "end"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 7),
        ("characters", 24),
        ("words", 6),
        ("lines", 2),
        ("prompt_words_repeated", 2 / 3),  # "cat" and "the" of "Is the cat"
        ("distinct_words", 5 / 6),
        ("ends_with_punctuation", 1.0),
    ],
)
def test_features_by_hand(name: str, value: float) -> None:
    answer = Answer("The cat sat\nby the mats.", 7)
    assert preference.FEATURES[name]("Is the cat", answer) == pytest.approx(value)


def test_a_feature_is_measured_in_the_direction_that_training_shows() -> None:
    train = [outcome(f"p{i}", 0.0, tokens=(1, 2), texts=("short.", "much longer")) for i in range(3)]
    test = [
        outcome("q", 0.0, tokens=(1, 5), texts=("a.", "bb")),
        outcome("r", 0.0, tokens=(4, 2), texts=("cccc", "dd")),
        outcome("s", 0.0, tokens=(1, 2), texts=("e", "f")),
    ]
    found = preference.surface_features(train, test)
    assert set(found) == set(preference.FEATURES)
    assert (found["tokens"]["preferred"], found["tokens"]["accuracy"]) == ("less", round(2 / 3, 4))
    assert (found["ends_with_punctuation"]["preferred"], found["ends_with_punctuation"]["accuracy"]) == ("more", 0.6667)
    assert found["lines"] == {"preferred": "more", **proportion_estimate(1.5, 3).as_keys("accuracy", 4)}


def naive_ranks(values: list[float]) -> list[float]:
    return [1 + sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def test_correlations_by_hand_and_by_the_library() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    assert preference.spearman(a, b) == pytest.approx(0.8)  # 1 - 6 * (1 + 1 + 1 + 1 + 0) / (5 * 24)
    assert preference.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    draw = random.Random(1)
    x = [float(draw.randrange(6)) for _ in range(60)]
    y = [value + draw.gauss(0, 2) for value in x]
    assert preference.ranks(x) == naive_ranks(x)
    assert preference.pearson(x, y) == pytest.approx(statistics.correlation(x, y))
    assert preference.spearman(x, y) == pytest.approx(statistics.correlation(naive_ranks(x), naive_ranks(y)))
    assert preference.pearson([1.0, 1.0], [1.0, 2.0]) is None


def test_a_response_counts_once_however_often_it_is_compared() -> None:
    outcomes = [outcome("p", 1.0, tokens=(2, 1), texts=("a", "b")) for _ in range(5)]
    outcomes.append(outcome("q", 3.0, tokens=(9, 1), texts=("a", "b")))
    assert len(preference.distinct_answers(outcomes)) == 4
    found = preference.length_correlation(outcomes)
    assert found["score_length_pearson"] == round(statistics.correlation([1, 0, 3, 0], [2, 1, 9, 1]), 4)


# Ensembles


def test_the_agreement_of_heads_by_hand() -> None:
    def of_heads(prompt: str, *differences: float) -> Outcome:
        zeros = (0.0,) * len(differences)
        return Outcome(prompt, "", Answer("x", 1, differences), Answer("y", 1, zeros))

    outcomes = [
        of_heads("p", 1.0, 2.0, 3.0),  # all say right
        of_heads("q", -1.0, -1.0, -4.0),  # all say wrong
        of_heads("r", 2.0, -1.0, 2.0),  # two against one, right in the mean
        of_heads("s", -3.0, 1.0, 1.0),  # two against one, wrong in the mean
    ]
    found = preference.head_agreement(outcomes)
    assert (found["heads"], found["unanimous"]) == (3, 0.5)
    assert found["pairwise_agreement"] == pytest.approx((1 + 1 + 1 / 3 + 1 / 3) / 4, abs=1e-4)
    assert found["accuracy_where_unanimous"] == found["accuracy_where_not_unanimous"] == 0.5
    spreads = [math.sqrt(2 / 3), math.sqrt(2), math.sqrt(2), math.sqrt(32 / 9), 0, 0, 0, 0]
    assert found["spread"] == round(sum(spreads) / 8, 4)


# Pictures


@pytest.mark.filterwarnings("ignore:Glyph")
def test_pictures_are_written_whatever_the_names_are(tmp_path: Path) -> None:
    shares = {"judge, $\\frac$ 你好\n" + "x" * 80: Estimate(0.6, 0.5, 0.7), "longer wins": Estimate(0.5, 0.4, 0.6)}
    plots.plot_shares(tmp_path / "shares.png", shares, "50 % of $them")
    bins = preference.reliability([0.1, 2.0, -3.0])
    plots.plot_reliability(tmp_path / "reliability.png", bins, bins, ("before", "after"))
    plots.plot_scores_by_length(tmp_path / "length.png", [1, 2], [0.0, 1.0], "score")
    plots.plot_differences(tmp_path / "differences.png", [0.0, 0.0], "none")
    assert len(list(tmp_path.glob("*.png"))) == 4
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
