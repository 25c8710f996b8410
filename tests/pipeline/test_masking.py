"""Masked-LM corruption: what is chosen, what becomes of it, and that it depends on seed and sample alone."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.batches import TrainingStream, Windows, evaluation_batches
from pipeline.errors import UserError
from pipeline.masking import Corruption, MaskedLM
from pipeline.shards import TokenDataset

BERT = MaskedLM()
EOS, PAD, MASK = 1, 2, 3


@pytest.fixture
def dataset(make_dataset: Any) -> TokenDataset:
    """200 documents of 0 to 99 tokens, 9,900 + 200 in all; the last window of 64 is padded."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(4, 100, n % 100).tolist() for n in range(200)]
    return TokenDataset.open(make_dataset(documents, per_shard=70), "train")


def test_shares_are_those_of_bert(dataset: TokenDataset) -> None:
    stream = TrainingStream(dataset, seq_len=64, seed=1, masked_lm=BERT)
    batch = stream.load(range(20 * len(Windows(dataset, 64))))
    chosen, ordinary = batch.loss_mask, batch.targets >= 4
    n = int(ordinary.sum())
    assert n == 20 * 9900, "every token comes once an epoch"
    assert not (chosen & ~ordinary).any(), "</s> and padding are never chosen"
    assert torch.equal(batch.tokens[~chosen], batch.targets[~chosen]), "what is not chosen is unchanged"
    count = int(chosen.sum())
    assert abs(count / n - 0.15) < 4 * (0.15 * 0.85 / n) ** 0.5
    masked = batch.tokens[chosen] == MASK
    kept = batch.tokens[chosen] == batch.targets[chosen]
    other = ~masked & ~kept
    random = float(other.sum()) / count * 96 / 95  # one random piece in 96 is the token itself
    assert abs(float(masked.float().mean()) - 0.8) < 4 * (0.8 * 0.2 / count) ** 0.5
    assert abs(random - 0.1) < 4 * (0.1 * 0.9 / count) ** 0.5
    drawn = torch.bincount(batch.tokens[chosen][other], minlength=100)
    assert drawn[:4].sum() == 0, "a random piece is no special one"
    assert drawn[4:].min() > 0.5 * drawn.sum() / 96
    assert drawn[4:].max() < 1.6 * drawn.sum() / 96
    # Positions are chosen by themselves: about as many pairs of neighbours as chance gives.
    pairs = float((chosen[:, 1:] & chosen[:, :-1]).sum()) / float((ordinary[:, 1:] & ordinary[:, :-1]).sum())
    assert abs(pairs - 0.15**2) < 0.004


def test_targets_are_the_tokens_themselves_and_documents_theirs(dataset: TokenDataset) -> None:
    masked = TrainingStream(dataset, seq_len=64, seed=1, masked_lm=BERT)
    plain = TrainingStream(dataset, seq_len=64, seed=1)
    a, b = masked.load(range(40)), plain.load(range(40))
    for row in range(40):
        window = plain.position(row)[1]
        stop = min(window * 64 + 64, dataset.n_tokens)
        size = stop - window * 64
        assert a.targets[row, :size].tolist() == dataset.read(window * 64, stop).tolist()
        numbers = dataset.document_numbers(window * 64, stop)
        assert a.doc_ids[row, :size].tolist() == (numbers - numbers[0]).tolist()
    assert torch.equal(a.targets, b.targets)
    assert torch.equal(a.doc_ids, b.doc_ids)


def test_a_sample_is_corrupted_the_same_way_wherever_it_is_loaded(dataset: TokenDataset) -> None:
    def stream(seed: int = 1) -> TrainingStream:
        return TrainingStream(dataset, seq_len=64, seed=seed, masked_lm=BERT)

    whole = stream().load(range(64))
    alone = [stream().load([sample]) for sample in reversed(range(64))][::-1]
    assert torch.equal(whole.tokens, torch.cat([batch.tokens for batch in alone]))
    assert torch.equal(whole.loss_mask, torch.cat([batch.loss_mask for batch in alone]))
    epoch = len(Windows(dataset, 64))
    places = {stream().position(sample)[1]: sample for sample in range(epoch)}
    again = stream().load([epoch])
    before = stream().load([places[stream().position(epoch)[1]]])
    assert torch.equal(again.targets, before.targets)
    assert not torch.equal(again.loss_mask, before.loss_mask), "another epoch hides other tokens"
    assert not torch.equal(stream(2).load(range(64)).loss_mask, whole.loss_mask)


def test_evaluation_hides_the_same_tokens_at_any_world_size(dataset: TokenDataset) -> None:
    def hidden(world_size: int, batch_size: int) -> list[tuple[list[int], list[bool]]]:
        rows: list[Any] = []
        for rank in range(world_size):
            sizes: dict[str, Any] = {"seq_len": 64, "batch_size": batch_size, "rank": rank, "world_size": world_size}
            for batch in evaluation_batches(dataset, masked_lm=BERT, **sizes):
                if batch:
                    rows += zip(batch.tokens.tolist(), batch.loss_mask.tolist(), strict=True)
        return sorted(rows)

    assert hidden(1, 4) == hidden(3, 1)
    chosen = sum(sum(mask) for _, mask in hidden(1, 4))
    assert 0.12 * 9900 < chosen < 0.18 * 9900


def test_other_shares(dataset: TokenDataset) -> None:
    everything = TrainingStream(dataset, seq_len=64, seed=1, masked_lm=MaskedLM(fraction=1, mask=1, random=0))
    batch = everything.load(range(10))
    assert torch.equal(batch.loss_mask, batch.targets >= 4)
    assert bool((batch.tokens[batch.loss_mask] == MASK).all())
    kept = TrainingStream(dataset, seq_len=64, seed=1, masked_lm=MaskedLM(fraction=0.5, mask=0, random=0))
    batch = kept.load(range(10))
    assert torch.equal(batch.tokens, batch.targets)
    assert 0.4 < batch.loss_mask.float().mean() < 0.6


def test_what_is_refused(dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match=r"mask 0.95 and random 0.1 add up to more than 1"):
        MaskedLM(mask=0.95)
    dataset.mask_id = -1
    with pytest.raises(UserError, match=r"data\.masked_lm: .*tokenizer\.model has no <mask> piece"):
        TrainingStream(dataset, seq_len=64, seed=1, masked_lm=BERT)


def test_what_is_hidden_is_what_it_was(dataset: TokenDataset) -> None:
    """Runs resume under a newer release: these values must never change."""
    targets = np.arange(4, 44)
    tokens, loss_mask = np.zeros(40, np.int64), np.ones(40, np.bool_)
    Corruption(MaskedLM(fraction=0.3), dataset, "training", 7).apply(123, tokens, targets, loss_mask)
    assert np.flatnonzero(loss_mask).tolist() == [1, 2, 3, 7, 9, 15, 18, 21, 22, 23, 24, 25, 30, 31, 32, 36, 38]
    assert tokens[loss_mask].tolist() == [3, 3, 3, 3, 3, 3, 3, 3, 3, 37, 3, 3, 34, 3, 3, 40, 3]
