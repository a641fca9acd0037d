"""A document that a model has learned by heart is found; one that it hasn't read is not."""

import copy

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.memorisation import Document, DocumentSample, recall, summarise
from evaluation.scoring import Request, Scorer
from rlhf.tokenizer import begin_id, encode_texts

LEARNED = "The green clock in the old tower strikes nine when the river sings to seven silver swans at dawn."
UNSEEN = "A purple train carries nine quiet bakers over the hill while the seventh lamp burns until noon."


@pytest.fixture(scope="module")
def reciter(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model that has read one document, often."""
    model = copy.deepcopy(tiny_llama).float().train()
    ids = torch.tensor([[begin_id(tokenizer), *encode_texts(tokenizer, [LEARNED])[0]]])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert float(loss.detach()) < 0.05
    return model.eval()


def test_what_was_read_often_is_recalled(reciter: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [Document(LEARNED, 50), Document(UNSEEN, 1), Document("Too short.", 1)]
    ways = {"prompt_tokens": 8, "continuation_tokens": 32}
    learned, unseen, short = recall(Scorer(reciter), tokenizer, documents, **ways)
    assert learned and learned.verbatim and learned.tokens >= 8
    assert unseen and not unseen.verbatim
    assert short is None
    (control,) = recall(Scorer(reciter), tokenizer, [Document(UNSEEN, 0)], **ways)
    figures = summarise([learned, unseen, short], [control])
    assert figures["too_short"] == 1
    assert figures["training"]["verbatim"] == 0.5
    assert figures["held_out"]["verbatim"] == 0.0
    assert figures["by_copies"]["10-49" if learned.document.copies < 50 else "50+"]["verbatim"] == 1.0
    assert figures["by_copies"]["1"]["verbatim"] == 0.0
    assert figures["memorised"] == [{"text": LEARNED, "copies": 50, "tokens": learned.tokens}]


@torch.no_grad()
def test_matches_are_what_greedy_decoding_writes(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Token by token, from several beginnings; of each, the continuation is also altered at one place."""
    scorer, requests, expected = Scorer(tiny_model, budget=40), [], []
    for number, ids in enumerate(encode_texts(tokenizer, [LEARNED, UNSEEN, "One two three.", "你好 world"])):
        context = [begin_id(tokenizer), *ids[: 3 + number]]
        greedy: list[int] = []
        for _ in range(9):
            greedy.append(int(tiny_model(input_ids=torch.tensor([context + greedy])).logits[0, -1].argmax()))
        wrong = min(number * 3, 9)
        altered = [token if place < wrong else (token + 1) % 7 for place, token in enumerate(greedy)]
        altered = altered if altered[wrong : wrong + 1] != greedy[wrong : wrong + 1] else greedy
        requests += [Request(context, greedy), Request(context, altered)]
        expected += [9, next((p for p in range(9) if altered[p] != greedy[p]), 9)]
    assert scorer.matches(requests) == expected


def test_the_sample_counts_copies_and_does_not_depend_on_the_order() -> None:
    texts = [f"document {number}" for number in range(200)] + ["again"] * 50 + ["twice"] * 2
    samples = []
    for order in (texts, texts[::-1]):
        sample = DocumentSample(repeated=1, random=20, seed=3)
        sample.read(order[:100])
        sample.read(order[100:])
        samples.append(sample.documents())
    assert samples[0] == samples[1]
    assert samples[0][0] == Document("again", 50)
    others = samples[0][1:]
    assert 19 <= len(others) <= 20
    assert {document.copies for document in others} <= {1, 2}
    assert len({document.text for document in samples[0]}) == len(samples[0])
