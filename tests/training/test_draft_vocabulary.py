from __future__ import annotations

import pytest
import torch

from vllm_redrafter.training.documents import Document
from vllm_redrafter.training.draft_vocabulary import choose_draft_vocabulary


def document(token_ids: list[int], is_target: list[int]) -> Document:
    return Document(torch.tensor(token_ids), torch.tensor(is_target, dtype=torch.bool), "test")


# said by the target: 7 three times, 2 twice, 5 once; by others: 1 and 9 once, 4 twice
DOCUMENTS = [document([1, 4, 7, 7, 2], [0, 0, 1, 1, 1]), document([4, 9, 5, 2, 7], [0, 0, 1, 1, 1])]


@pytest.mark.parametrize(
    ("size", "target_ids", "coverage"),
    [
        (1, [7], 3 / 6),
        (2, [2, 7], 5 / 6),
        (3, [2, 5, 7], 1.0),
        # words of others before words of nobody, these by their ids
        (4, [2, 4, 5, 7], 1.0),
        (7, [0, 1, 2, 4, 5, 7, 9], 1.0),
        (10, list(range(10)), 1.0),
    ],
)
def test_the_target_s_most_frequent_words_are_kept(size: int, target_ids: list[int], coverage: float) -> None:
    vocabulary = choose_draft_vocabulary(DOCUMENTS, size, 10)

    assert vocabulary.target_ids.tolist() == target_ids
    assert vocabulary.target_ids.dtype == torch.int64
    assert vocabulary.coverage == pytest.approx(coverage)


def test_of_equally_frequent_words_the_one_seen_more_often_and_then_the_lower_id_wins() -> None:
    documents = [document([8, 6, 3, 6], [1, 1, 1, 0])]

    assert choose_draft_vocabulary(documents, 1, 10).target_ids.tolist() == [6]
    assert choose_draft_vocabulary(documents, 2, 10).target_ids.tolist() == [3, 6]


def test_without_a_size_what_makes_up_98_percent_of_the_text_is_kept_in_a_round_number() -> None:
    # token i is said 280 - i times, the last twenty tokens never: 39,340 in all
    text = [token for token in range(280) for _ in range(280 - token)]
    documents = [document(text, [1] * len(text))]

    vocabulary = choose_draft_vocabulary(documents, None, 300)

    # 98% are the first 241; the 24 tokens beyond 256 are said 300 times
    assert vocabulary.target_ids.tolist() == list(range(256))
    assert vocabulary.coverage == pytest.approx(1 - 300 / 39_340)


def test_without_a_size_there_are_no_more_tokens_than_the_target_has() -> None:
    assert choose_draft_vocabulary(DOCUMENTS, None, 10).target_ids.tolist() == list(range(10))


@pytest.mark.parametrize("size", [0, 11])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"draft_vocab_size is {size}, but it must be from 1 to 10"):
        choose_draft_vocabulary(DOCUMENTS, size, 10)


def test_data_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="the data holds token 9, but the target has 9: use the target's own tok"):
        choose_draft_vocabulary(DOCUMENTS, 2, 9)


def test_data_without_a_token_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="none of 1 documents has a token to learn"):
        choose_draft_vocabulary([document([1, 2], [0, 0])], 2, 9)
