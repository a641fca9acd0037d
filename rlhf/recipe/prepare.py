"""How the texts of pretraining are prepared."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rlhf.recipe.base import Section


def _or_off(value: Any) -> Any:
    """What switches a step or a limit off: `off`, false, null."""
    return None if value == "off" or value is False else value


Limit = Annotated[
    Annotated[float, Field(ge=0)] | None,
    BeforeValidator(_or_off, json_schema_input_type=float | Literal["off", False] | None),
]
Count = Annotated[
    Annotated[int, Field(ge=0)] | None,
    BeforeValidator(_or_off, json_schema_input_type=int | Literal["off", False] | None),
]
Off = BeforeValidator(_or_off)
_OffAsEmpty = BeforeValidator(lambda value: {} if _or_off(value) is None else value)


class CleaningSection(Section):
    """What is mended in every text; each change is counted."""

    encoding: bool = Field(True, description="text that was decoded wrongly (Ã© for é) is put right, by ftfy")
    line_ends: bool = Field(True, description="CRLF, CR, form feeds and Unicode's line separators become LF")
    control_characters: bool = Field(
        True,
        description="control characters but tab and LF, terminals' colour codes and byte order marks are removed",
    )
    unicode: bool = Field(True, description="characters are composed: Unicode's normalisation form C")
    white_space: bool = Field(
        True,
        description="blanks of other kinds become spaces, blanks at the ends of lines and blank lines beyond one go",
    )


class FiltersSection(Section):
    """Which documents are removed for what they are; `off` switches a rule off.

    The rules and limits are those of Gopher (Rae et al. 2021, arXiv:2112.11446, A.1.1 and table A1) where not said
    otherwise.
    """

    min_words: Count = Field(5, description="fewer words (the paper: 50, which leaves no poem, question or short fact)")
    max_words: Count = Field(None, description="more words (the paper: 100,000; off, since a book has more)")
    replacement_characters: Limit = Field(
        0.01, description="larger share of characters that were lost (U+FFFD); not the paper's"
    )
    from_words: int = Field(50, ge=0, description="the rules below judge documents of at least so many words")
    min_mean_word_length: Limit = Field(3.0, description="shorter mean word, in characters; not for code or Chinese")
    max_mean_word_length: Limit = Field(10.0, description="longer mean word, in characters; not for code or Chinese")
    hashes: Limit = Field(0.1, description="more hash signs for each word; not for code")
    ellipses: Limit = Field(0.1, description="more ellipses for each word; not for code")
    bullet_lines: Limit = Field(0.9, description="larger share of lines that begin with a bullet")
    ellipsis_lines: Limit = Field(0.3, description="larger share of lines that end with an ellipsis")
    min_alphabetic: Limit = Field(0.8, description="smaller share of words that hold a letter; not for code")
    stop_words: Count = Field(
        None, description="fewer of the words the, be, to, of, and, that, have, with (the paper: 2; off: English alone)"
    )
    duplicate_lines: Limit = Field(0.3, description="larger share of lines that stood there before")
    duplicate_paragraphs: Limit = Field(0.3, description="larger share of paragraphs that stood there before")
    duplicate_line_characters: Limit = Field(0.2, description="larger share of the characters in such lines")
    duplicate_paragraph_characters: Limit = Field(0.2, description="larger share of the characters in such paragraphs")
    top_2gram: Limit = Field(0.2, description="larger share of characters in the commonest 2 words; not for code")
    top_3gram: Limit = Field(0.18, description="larger share of characters in the commonest 3 words; not for code")
    top_4gram: Limit = Field(0.16, description="larger share of characters in the commonest 4 words; not for code")
    duplicate_5grams: Limit = Field(0.15, description="larger share of characters in 5 words that stood there before")
    duplicate_6grams: Limit = Field(0.14, description="the same of 6 words; like all of these not for code")
    duplicate_7grams: Limit = Field(0.13, description="the same of 7 words")
    duplicate_8grams: Limit = Field(0.12, description="the same of 8 words")
    duplicate_9grams: Limit = Field(0.11, description="the same of 9 words")
    duplicate_10grams: Limit = Field(0.1, description="the same of 10 words")


class PersonalDataSection(Section):
    """What is replaced by a placeholder, such as [EMAIL]."""

    email: bool = Field(False, description="e-mail addresses")
    phone: bool = Field(False, description="telephone numbers")
    ip: bool = Field(False, description="public IP addresses")
    card: bool = Field(False, description="numbers of payment cards whose check digit is right")


class NearDuplicatesSection(Section):
    """Documents that are alike but for some words, across all sources, by MinHash."""

    changed_words: float = Field(
        0.05, ge=0.01, le=0.08, description="share of words in which copies differ; 95 % of such copies are found"
    )
    min_words: int = Field(10, ge=1, description="documents with fewer words are compared as a whole only")


class DecontaminationSection(Section):
    """Documents that share words with the items of evaluate.fewshot.tasks are removed and listed."""

    words: int = Field(13, ge=5, le=100, description="length of a run of words that no document may share with an item")


class InContextSection(Section):
    """Documents made of the training files of few-shot tasks: task line, demonstrations, an item with its answer."""

    share: float = Field(gt=0, lt=1, description="of all documents of the corpus, these made ones included")
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=1, description="folders below data.root, or FOLDER/TASK; only TASK.train.jsonl is read"
    )
    shots: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = Field(
        (0, 1, 2, 4, 8), min_length=1, description="numbers of demonstrations, equally often"
    )


class PrepareSection(Section):
    """What is done with the texts before they are tokens; `off` switches a step off."""

    cleaning: Annotated[CleaningSection | None, Off] = Field(default=CleaningSection(), description="what is mended")
    filters: Annotated[FiltersSection | None, Off] = Field(default=FiltersSection(), description="what is removed")
    personal_data: Annotated[PersonalDataSection, _OffAsEmpty] = Field(
        default=PersonalDataSection(), description="what is masked"
    )
    exact_duplicates: bool = Field(True, description="a text that stood there before is removed, whatever its source")
    near_duplicates: Annotated[NearDuplicatesSection | None, Off] = Field(
        default=NearDuplicatesSection(), description="of documents that are much alike one is kept"
    )
    decontamination: Annotated[DecontaminationSection | None, Off] = Field(
        default=DecontaminationSection(), description="documents that hold items of the evaluation are removed"
    )
    incontext: Annotated[InContextSection | None, Off] = Field(
        None, description="documents made of few-shot tasks' training files"
    )
