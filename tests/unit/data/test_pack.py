"""Packing and loading: nothing is lost, nothing is seen across documents, and any step can be asked for."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.data.loader import IGNORE_INDEX, Batch, MixedBatchSource, gather_rows, rows_per_part
from sprat.data.pack import PackedDataset, document_ids, pack
from sprat.errors import DataError

SEQUENCES = st.lists(st.lists(st.integers(0, 5), max_size=30), min_size=1, max_size=40).filter(
    lambda rows: any(len(row) > 1 for row in rows)
)


def whole(packed: PackedDataset) -> Batch:
    return gather_rows(packed, np.arange(packed.num_rows))


@given(SEQUENCES, st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_every_next_token_is_learned_exactly_once(sequences: list[list[int]], seq_len: int) -> None:
    # ids are made unique, so that a pair names its place
    start, unique = 0, []
    for row in sequences:
        unique.append(list(range(start, start + len(row))))
        start += len(row)
    packed = pack([(row, None) for row in unique], seq_len)
    batch = whole(packed)
    taught = batch.targets_BT != IGNORE_INDEX
    pairs = Counter(zip(batch.tokens_BT[taught].tolist(), batch.targets_BT[taught].tolist(), strict=True))
    assert pairs == Counter((row[i], row[i + 1]) for row in unique for i in range(len(row) - 1))
    assert packed.num_targets == sum(pairs.values())


@given(SEQUENCES, st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_every_token_of_a_row_knows_its_document(sequences: list[list[int]], seq_len: int) -> None:
    """Ids are made unique, so that a token names its document; long ones are cut, short ones left out."""
    first = np.cumsum([0, *map(len, sequences)])
    packed = pack([(list(range(a, b)), None) for a, b in pairwise(first.tolist())], seq_len)
    documents = document_ids([len(row) for row in sequences], seq_len)
    wanted = np.searchsorted(first, packed.tokens, side="right") - 1
    assert np.array_equal(documents, np.where(packed.segments > 0, wanted, -1))
    for row, segments in zip(documents, packed.segments, strict=True):
        assert all(len(set(row[segments == each])) == 1 for each in set(segments))


@given(SEQUENCES, st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_only_masked_tokens_are_targets(sequences: list[list[int]], seq_len: int) -> None:
    masked = [(row, [token % 2 for token in row]) for row in sequences]
    batch = whole(pack(masked, seq_len))
    targets = batch.targets_BT[batch.targets_BT != IGNORE_INDEX]
    assert bool((targets % 2 == 1).all())
    assert len(targets) == sum(sum(mask[1:]) for _, mask in masked)


def test_segments_number_the_sequences_of_a_row_and_zero_is_empty() -> None:
    packed = pack([([1, 2, 3], None), ([4, 5], None), ([6, 7, 8, 9], None)], seq_len=5)
    assert packed.tokens.tolist() == [[6, 7, 8, 9, 4, 5], [1, 2, 3, 0, 0, 0]]
    assert packed.segments.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    batch = whole(packed)
    assert batch.targets_BT.tolist() == [[7, 8, 9, -100, 5], [2, 3, -100, -100, -100]]
    assert batch.segments_BT.dtype == batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64


def test_short_sequences_fill_the_rows_and_fast() -> None:
    random = np.random.default_rng(0)
    sequences = [([1] * int(length), None) for length in random.integers(2, 60, 50_000)]
    start = time.process_time()
    packed = pack(sequences, 128)
    assert time.process_time() - start < 10
    assert packed.fill_fraction > 0.98


@pytest.mark.parametrize("sequences", [[], [([1], None)]])
def test_nothing_to_pack_is_said(sequences: list[tuple[list[int], None]]) -> None:
    with pytest.raises(DataError, match="nothing to pack"):
        pack(sequences, 8)
    with pytest.raises(DataError, match="mask"):
        pack([([1, 2], [1])], 8)


def test_a_saved_dataset_is_the_same_and_a_torn_one_is_refused(tmp_path: Path) -> None:
    packed = pack([(list(range(50)), None), ([1, 2], [0, 1])], 16)
    packed.save(tmp_path)
    again = PackedDataset.load(tmp_path)
    assert again.digest == packed.digest
    assert np.array_equal(again.loss_mask, packed.loss_mask)
    file = tmp_path / "packed.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(DataError, match="torn"):
        PackedDataset.load(tmp_path)
    file.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(DataError, match="digest"):
        PackedDataset.load(tmp_path)
    with pytest.raises(DataError, match="no packed dataset"):
        PackedDataset.load(tmp_path / "nowhere")


def numbered(rows: int, first: int, seq_len: int = 4) -> PackedDataset:
    """A dataset whose row r holds only the token first + r."""
    return pack([([first + row] * (seq_len + 1), None) for row in range(rows)], seq_len)


def test_every_batch_has_the_same_mixture() -> None:
    source = MixedBatchSource([(numbered(10, 0), 0.75), (numbered(6, 100), 0.25)], rows=8, seed=0)
    assert source.part_rows == [6, 2]
    for step in range(10):
        first = source.batch(step).tokens_BT[:, 0]
        assert int((first >= 100).sum()) == 2


def test_each_pass_shows_every_row_once_in_a_new_order() -> None:
    source = MixedBatchSource([(numbered(12, 0), 1.0)], rows=5, seed=3)
    seen = torch.cat([source.batch(step).tokens_BT[:, 0] for step in range(12)]).tolist()
    passes = [sorted(source._index(0, 12, epoch * 12, 12).tolist()) for epoch in range(5)]
    assert passes == [list(range(12))] * 5
    assert Counter(seen) == Counter(list(range(12)) * 5)
    orders = {tuple(source._index(0, 12, epoch * 12, 12).tolist()) for epoch in range(5)}
    assert len(orders) == 5


def test_a_resumed_run_gets_the_batches_it_would_have_had() -> None:
    parts = [(numbered(7, 0), 0.6), (numbered(9, 100), 0.4)]
    steady = MixedBatchSource(parts, rows=6, seed=1)
    expected = [steady.batch(step).tokens_BT for step in range(20)]
    resumed = MixedBatchSource(parts, rows=6, seed=1)
    for step in (19, 3, 11, 0):
        assert torch.equal(resumed.batch(step).tokens_BT, expected[step])
    assert resumed.digest == steady.digest
    other = MixedBatchSource(parts, rows=6, seed=2)
    assert other.digest != steady.digest
    assert any(not torch.equal(other.batch(step).tokens_BT, expected[step]) for step in range(20))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("parts", [[(7, 1.0)], [(7, 0.6), (9, 0.4)]])
def test_the_rows_of_all_ranks_are_the_batch_of_one_process(parts: list[tuple[int, float]], world: int) -> None:
    """Also where they cannot be shared out evenly; each rank asks a source of its own, of its own steps first."""
    mix = [(numbered(rows, 100 * number), weight) for number, (rows, weight) in enumerate(parts)]
    whole_source = MixedBatchSource(mix, rows=6, seed=1)
    ranks = [MixedBatchSource(mix, rows=6, seed=1) for _ in range(world)]
    shares = [[ranks[rank].batch(step, rank, world) for step in (5, 2, 0)] for rank in range(world)]
    for number, step in enumerate((5, 2, 0)):
        batch = whole_source.batch(step)
        for name in ("tokens_BT", "targets_BT", "segments_BT"):
            union = torch.cat([getattr(share[number], name) for share in shares])
            assert torch.equal(union, getattr(batch, name))
    sizes = [len(share[0]) for share in shares]
    assert sum(sizes) == 6 and max(sizes) - min(sizes) <= 1
    with pytest.raises(DataError, match="6 rows cannot be shared out over 7 processes"):
        whole_source.batch(0, 0, 7)


def drawn(source: MixedBatchSource, steps: int = 3) -> list[list[int]]:
    """For each step which rows of the parts it holds, in ascending order."""
    return [sorted(source.batch(step).tokens_BT[:, 0].tolist()) for step in range(steps)]


def test_another_seed_draws_other_rows_and_not_only_in_another_order() -> None:
    one, other = (drawn(MixedBatchSource([(numbered(40, 0), 1.0)], rows=6, seed=seed)) for seed in (1, 2))
    assert one != other


def test_parts_of_one_size_are_shuffled_each_in_its_own_way() -> None:
    source = MixedBatchSource([(numbered(40, 0), 0.5), (numbered(40, 100), 0.5)], rows=12, seed=0)
    assert source.part_rows == [6, 6]
    for rows in drawn(source):
        assert rows[:6] != [row - 100 for row in rows[6:]]


def test_rows_of_the_parts_stand_mixed_in_a_batch() -> None:
    source = MixedBatchSource([(numbered(40, 0), 0.5), (numbered(40, 100), 0.5)], rows=12, seed=0)
    second = [(source.batch(step).tokens_BT[:, 0] >= 100).tolist() for step in range(3)]
    assert all(rows != sorted(rows) for rows in second), "a micro-batch would hold one part alone"
    assert second[0] != second[1]


def test_shares_go_to_the_largest_remainders() -> None:
    assert rows_per_part([0.6, 0.3, 0.1], 10) == [6, 3, 1]
    assert rows_per_part([1.0, 1.0, 6.0], 9) == [1, 1, 7], "1.125, 1.125 and 6.75 rows"
    assert rows_per_part([0.24, 0.76], 10) == [2, 8], "2.4 and 7.6 rows: the second has the larger remainder"


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=8), st.integers(8, 64))
@settings(max_examples=200, deadline=None)
def test_shares_fill_the_batch_and_forget_no_part(weights: list[float], rows: int) -> None:
    found = rows_per_part(weights, rows)
    assert sum(found) == rows
    assert min(found) >= 1


def test_parts_that_cannot_be_mixed_are_refused() -> None:
    with pytest.raises(DataError, match="no data"):
        MixedBatchSource([(numbered(3, 0), 0.0)], rows=4, seed=0)
    with pytest.raises(DataError, match="seq_len"):
        MixedBatchSource([(numbered(3, 0), 1.0), (numbered(3, 0, seq_len=5), 1.0)], rows=4, seed=0)
    with pytest.raises(DataError, match="3 parts"):
        MixedBatchSource([(numbered(3, 0), 1.0)] * 3, rows=2, seed=0)


def test_a_micro_batch_is_a_slice() -> None:
    batch = gather_rows(numbered(4, 0), [0, 1, 2, 3])
    assert batch[1:3].tokens_BT[:, 0].tolist() == [1, 2]
    assert batch.to("cpu").targets_BT.shape == (4, 4)


@pytest.mark.parametrize(("rank", "world"), [(-1, 3), (3, 3), (0, 0), (0, -1)])
def test_a_rank_outside_its_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="no rank"):
        MixedBatchSource([(numbered(8, 0), 1.0)], rows=4, seed=0).batch(0, rank, world)


def test_one_row_is_a_slice_too() -> None:
    batch = MixedBatchSource([(numbered(8, 0), 1.0)], rows=4, seed=0).batch(0)
    with pytest.raises(TypeError, match="sliced"):
        batch[0]  # type: ignore[index]
