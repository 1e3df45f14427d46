"""Order, mixtures and packings, on stores small enough to be written out by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import ConfigError, UserError
from gptjax.data import PACKING, Batches, Store, describe
from gptjax.data import store as store_module
from gptjax.data.batches import Batch
from gptjax.data.order import key, mix_sources, permute
from gptjax.data.store import StoreWriter
from gptjax.tokenizer import load
from tests import tiny

BYTES = load("bytes")
E = BYTES.eot


def make(folder: Path, *documents: str, split: str = "train") -> Path:
    """A store of the given documents under the byte tokenizer, which it was made of."""
    writer = StoreWriter(folder / split, BYTES)
    for document in documents:
        writer.write(np.array(BYTES.encode(document)), True)
    writer.keep_rows({"prompt": document} for document in documents)
    writer.close()
    return folder


def batches(
    *folders: Path, packing: str = "stream", T: int = 4, rows: int = 4, seed: int = 0, weights=None
) -> Batches:
    names = tuple(map(str, folders))
    return Batches(
        tiny.data(
            sources=names, weights=weights, tokenizer="bytes", packing=packing, batch_size=rows
        ),
        T,
        seed,
        "train",
        BYTES,
    )


# ---- order


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_permute_is_a_permutation_of_every_size(size: int, seed: int):
    image = permute(np.arange(size), size, key(seed))
    assert sorted(image.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 65, 256, 257])
def test_permute_at_the_edges_of_its_domains(size: int):
    assert sorted(permute(np.arange(size), size, key(1)).tolist()) == list(range(size))


def test_permute_answers_far_places_of_huge_ranges_at_once():
    size = 10**13 + 7
    places = np.array([0, size // 2, size - 1])
    image = permute(places, size, key(3))
    assert len(set(image.tolist())) == 3 and (image >= 0).all() and (image < size).all()


def test_orders_of_a_small_range_are_equally_likely():
    # 6 orders of 3, expected 1000 each: 5 standard deviations of a binomial are 145.
    keys = key(np.arange(6000))
    orders = np.stack([permute(np.full(6000, i), 3, keys) for i in range(3)], axis=1)
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 6 and all(abs(n - 1000) < 145 for n in counts.values())


def test_neighbours_are_not_neighbours_after_the_shuffle():
    image = permute(np.arange(10_000), 10_000, key(0))
    # Of a uniform order, the neighbours' correlation is 0 with standard deviation 0.01.
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05
    assert (np.diff(image) == 1).sum() < 10  # expected 1


def test_keys_differ_in_every_part():
    parts = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    assert len({int(key(*p)[0]) for p in parts}) == len(parts)


# ---- mixtures


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 2**33),
)
@settings(max_examples=60, deadline=None)
def test_mixture_counts_its_draws_and_keeps_its_shares(weights, seed, start):
    rows = np.arange(400)
    source, draw = mix_sources(rows, weights, seed)
    for i, weight in enumerate(weights):
        assert draw[source == i].tolist() == list(range((source == i).sum()))
        # The quota holds after every number of rows, to within one row for each nesting.
        ideal = (rows + 1) * weight / sum(weights)
        assert np.abs(np.cumsum(source == i) - ideal).max() <= len(weights)
    # Far away too each row is the next draw of its source, known without a history.
    source, draw = mix_sources(start + rows, weights, seed)
    for i in set(source.tolist()):
        assert (np.diff(draw[source == i]) == 1).all()


def test_mixture_is_exact_in_the_long_run():
    far = np.array([10**9])
    for weights in ([0.7, 0.3], [1, 1, 2], [0.999, 0.001]):
        # Draws given by row 1e9: shares are rounded to 2^-24, which may move 1e9 rows by 60.
        rows = far + np.arange(4096)
        source, draw = mix_sources(rows, weights, 5)
        for i, weight in enumerate(weights):
            given = draw[source == i][0]
            assert abs(given - 1e9 * weight / sum(weights)) < 1100


def test_weights_decide_how_often_a_source_is_read(tmp_path):
    first = make(tmp_path / "a", "a" * 40)
    second = make(tmp_path / "b", "b" * 40)
    mixed = batches(first, second, rows=8, weights=(3.0, 1.0))
    for step in range(5):
        tokens = mixed.rows(step, 0, 8).tokens
        assert (tokens[:, 1] == ord("a")).sum() == 6


def test_without_weights_every_target_is_scored_equally_often(tmp_path):
    sources = [make(tmp_path / c, c * n) for c, n in (("a", 80), ("b", 40), ("c", 20))]
    mixed = batches(*sources, rows=1)
    assert [len(s) for s in mixed.sources] == [20, 10, 5]
    rows = [mixed.rows(step, 0, 1) for step in range(35)]
    scored = np.concatenate([r.targets[r.weights > 0] for r in rows])
    # 81 tokens of "a" and its end-of-text have 80 targets, and so on.
    assert Counter(scored.tolist()) == {ord("a"): 79, ord("b"): 39, ord("c"): 19, E: 3}


# ---- packings, literally


def epoch(data: Batches) -> Batch[list]:
    """All rows of the only source in the order of the store."""
    rows = data.sources[0].rows(np.arange(len(data.sources[0])))
    return jax.tree.map(lambda array: np.nan_to_num(array).tolist(), rows)


def ids(text: str) -> list[int]:
    """Bytes, with "." for end-of-text."""
    return [E if c == "." else ord(c) for c in text]


def test_stream(tmp_path):
    # abc.defg.h. has 11 tokens, 10 targets, 3 windows of which the last overlaps by 2.
    got = epoch(batches(make(tmp_path / "s", "abc", "defg", "h")))
    assert got.tokens == [ids("abc."), ids("defg"), ids("fg.h")]
    assert got.targets == [ids("bc.d"), ids("efg."), ids("g.h.")]
    assert got.weights == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert got.segments == [[0] * 4] * 3
    assert got.positions == [[0, 1, 2, 3]] * 3


def test_masked(tmp_path):
    got = epoch(batches(make(tmp_path / "s", "abc", "defg", "h"), packing="masked"))
    assert got.tokens == [ids("abc."), ids("defg"), ids("fg.h")]
    assert got.targets == [ids("bc.d"), ids("efg."), ids("g.h.")]
    assert got.weights == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert got.segments == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert got.positions == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 1]]


def test_masked_window_that_begins_with_end_of_text(tmp_path):
    got = epoch(batches(make(tmp_path / "s", "abcd", "ef"), packing="masked"))
    # abcd.ef. : the second window is clipped to begin one token early, at "d".
    assert got.tokens == [ids("abcd"), ids("d.ef")]
    got = epoch(batches(make(tmp_path / "t", "abcd", "efg"), packing="masked"))
    assert got.tokens[1] == ids(".efg")
    assert got.segments[1] == [0, 0, 0, 0] and got.positions[1] == [0, 1, 2, 3]


def test_document(tmp_path):
    got = epoch(batches(make(tmp_path / "s", "ab", "cdefgh", "xyz"), packing="document"))
    assert got.tokens == [ids(".ab."), ids(".cde"), ids("fgh."), ids(".xyz")]
    assert got.targets == [ids("ab.."), ids("cdef"), ids("gh.."), ids("xyz.")]
    assert got.weights == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert got.segments == [[0, 0, 0, -1], [0] * 4, [0, 0, 0, -1], [0] * 4]
    assert got.positions == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3]]


def test_whole(tmp_path, capsys):
    got = epoch(batches(make(tmp_path / "s", "ab", "c", "defgh", "xyz"), packing="whole"))
    assert got.tokens == [ids("abc."), ids("xyz.")]
    assert got.targets == [ids("b..."), ids("yz..")]
    assert got.weights == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert got.segments == [[0, 0, 1, -1], [0, 0, 0, -1]]
    assert got.positions == [[0, 1, 0, 0], [0, 1, 2, 0]]
    assert (
        "1 of 4 documents are left out: they have more than model.context=4"
        in capsys.readouterr().err
    )


documents = st.lists(st.text("abcdefg", min_size=1, max_size=12), min_size=1, max_size=8)


@pytest.mark.parametrize("packing", PACKING)
@given(texts=documents, T=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_an_epoch_scores_every_target_once(packing, texts, T, seed, tmp_path_factory):
    path = make(tmp_path_factory.mktemp("store") / "s", *texts)
    everything = ids("".join(text + "." for text in texts))
    if packing == "pairs":
        pairs = list(zip(texts[::2], texts[1::2], strict=False))
        path = make(
            tmp_path_factory.mktemp("store") / "s", *(text for pair in pairs for text in pair)
        )
        texts = [text for pair in pairs if sum(map(len, pair)) <= T for text in pair]
    if packing in ("whole", "pairs"):  # each begins as a prompt does, and none is cut
        fit = [text for text in texts if len(text) <= T]
        if not fit:
            return
        everything = ids("".join(text[1:] + "." for text in fit))
    elif packing == "prompts":  # which are read alone
        if min(map(len, texts)) >= T:
            return
        everything = []
    elif packing != "document":
        if len(everything) < T + 1:
            return
        everything = everything[1:]  # nothing stands before the first token
    data = batches(path, packing=packing, T=T, rows=1, seed=seed)
    size = len(data.sources[0])
    for first in (0, size, 7 * size):
        scored: list[int] = []
        for step in range(first, first + size):
            row = data.rows(step, 0, 1)
            scored += row.targets[row.weights > 0].tolist()
            assert set(np.unique(row.weights)) <= {0.0, 1.0}
        assert Counter(scored) == Counter(everything)


@pytest.mark.parametrize("packing", ["masked", "document", "whole"])
@given(texts=documents, T=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_no_segment_holds_two_documents(packing, texts, T, tmp_path_factory):
    path = make(tmp_path_factory.mktemp("store") / "s", *texts)
    if sum(len(text) + 1 for text in texts) < T + 1 or min(map(len, texts)) > T:
        return
    rows = batches(path, packing=packing, T=T).sources[0]
    got = rows.rows(np.arange(len(rows)))
    for tokens, targets, segments, positions in zip(
        got.tokens, got.targets, got.segments, got.positions, strict=True
    ):
        for segment in set(segments.tolist()) - {-1}:
            inside = segments == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            # Read as a start token then text, a segment is a stretch of one single document.
            text = BYTES.decode(t for t in [tokens[inside][0], *targets[inside]] if t != E)
            assert any(text in document for document in texts)
            assert (targets[inside][:-1] != E).all() and (tokens[inside][1:] != E).all()


# ---- purity


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_any_split_of_the_rows_gives_the_same_batch(tmp_path, packing, processes):
    sources = (
        make(tmp_path / "a", "ab", "ij", "k" * 30, "abcdefgh"),
        make(tmp_path / "b", "yz", "x", "x" * 50, "w"),
    )
    step = 11  # beyond the first epoch of both
    whole = batches(*sources, packing=packing, rows=6).rows(step, 0, 6)
    share = 6 // processes
    parts = [
        # A loader of its own for each process, and its rows asked for in any order.
        batches(*sources, packing=packing, rows=6).rows(step, p * share, (p + 1) * share)
        for p in reversed(range(processes))
    ][::-1]
    joined = jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_no_history_is_kept_and_seeking_is_free(tmp_path):
    data = batches(make(tmp_path / "s", "abcdefghij" * 20))
    first = data.rows(3, 0, 4)
    data.rows(10**9, 0, 4)
    for array, before in zip(data.rows(3, 0, 4), first, strict=True):
        assert np.array_equal(array, before)


def test_seed_and_epoch_change_the_order(tmp_path):
    path = make(tmp_path / "s", "".join(chr(97 + i % 26) + chr(65 + i % 25) for i in range(200)))

    def order(seed: int, epoch: int) -> list:
        data = batches(path, seed=seed, rows=100)
        assert len(data.sources[0]) == 100
        return data.rows(epoch, 0, 100).tokens.tolist()

    orders = [order(0, 0), order(1, 0), order(0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] and orders[0] != orders[2]


ORIGINS = {
    # abc.defg.h. in windows of 4 and the target behind them: abc.d, defg., fg.h.
    "stream": [(0, 1), (1, 1), (1, 2)],
    "masked": [(0, 1), (1, 1), (1, 2)],
    "document": [(0, 0), (1, 1), (1, 1), (2, 2)],
    "whole": [(0, 0), (1, 1), (2, 2)],
}


@pytest.mark.parametrize("packing", ORIGINS)
def test_a_row_tells_where_it_comes_from(tmp_path, packing):
    """And what stands there is the row, of each source of a mixture."""
    got = batches(
        make(tmp_path / "s", "abc", "defg", "h"), packing=packing, rows=len(ORIGINS[packing])
    )
    found = {o.row: (o.first, o.last) for o in got.origins(1)}
    assert [found[row] for row in range(len(found))] == ORIGINS[packing]
    mixed = batches(
        *(make(tmp_path / name, "abc", "defg", "h" * 9) for name in "ab"), packing=packing, rows=8
    )
    for step in (0, 7):
        batch = mixed.rows(step, 0, 8)
        for row, origin in enumerate(mixed.origins(step)):
            source = mixed.sources[mixed.names.index(origin.source)]
            alone = source.rows(np.array([origin.row]))
            jax.tree.map(
                lambda a, b, r=row: np.testing.assert_array_equal(a[0], b[r]), alone, batch
            )
            texts = ["abc.", "defg.", "hhhhhhhhh."][origin.first : origin.last + 1]
            read = np.append(batch.tokens[row, 0], batch.targets[row][batch.weights[row] > 0])
            assert set(read.tolist()) <= set(ids("".join(texts) + "."))
    assert str(mixed.origins(0)[0]).startswith("row ")


@pytest.mark.parametrize("packing", PACKING)
def test_shapes_and_dtypes(tmp_path, packing):
    batch = batches(make(tmp_path / "s", "ab", "ij"), packing=packing).rows(0, 1, 4)
    assert (batch.reference is not None) == (packing == "pairs")
    assert (batch.sampled is not None) == (packing == "prompts") == (batch.advantages is not None)
    for name, array in batch._asdict().items():
        if array is not None:
            assert array.shape == (3, 4)
            whole = name in ("tokens", "targets", "segments", "positions")
            assert array.dtype == (np.int32 if whole else np.float32)


@pytest.mark.parametrize("packing", PACKING)
def test_rows_across_shards_are_those_of_one_shard(tmp_path, packing, monkeypatch):
    texts = ["abcdefgh", "ij", "klmnopqrstu", "v", "wxy", "z"]
    whole = batches(make(tmp_path / "one", *texts), packing=packing)
    monkeypatch.setattr(store_module, "SHARD_TOKENS", 3)
    cut = batches(make(tmp_path / "many", *texts), packing=packing)
    assert len(list((tmp_path / "many" / "train").glob("tokens-*.bin"))) == 11
    assert epoch(whole) == epoch(cut)


# ---- describe, fingerprint, errors


def test_describe_shows_boundaries_and_what_is_not_scored(tmp_path):
    path = make(tmp_path / "s", "abc", "defg", "h")
    masked = batches(path, packing="masked").sources[0]
    assert describe(masked.rows(np.arange(3)), BYTES) == [
        "⟦a⟧bc<|endoftext|>‖d",
        "⟦d⟧efg<|endoftext|>",
        "⟦f⟧⟦g<|endoftext|>⟧‖h<|endoftext|>",
    ]
    document = batches(path, packing="document").sources[0]
    assert describe(document.rows(np.array([0, 3])), BYTES) == [
        "⟦<|endoftext|>⟧abc<|endoftext|>",
        "⟦<|endoftext|>⟧h<|endoftext|>⟦padding x 2⟧",
    ]


def test_fingerprint_follows_the_tokens(tmp_path):
    one, same, other = (
        make(tmp_path / n, t) for n, t in zip("abc", ("hello", "hello", "hallo"), strict=True)
    )
    prints = [next(iter(batches(p).fingerprint.values())) for p in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0] == Store.open(one / "train", None).fingerprint


@pytest.mark.parametrize("packing", ["stream", "masked"])
def test_store_shorter_than_a_row_is_refused(tmp_path, packing):
    path = make(tmp_path / "s", "abc")  # 4 tokens with end-of-text
    assert len(batches(path, packing=packing, T=3).sources[0]) == 1
    with pytest.raises(UserError, match=r"holds 4 tokens, less than .* context \+ 1 = 5"):
        batches(path, packing=packing, T=4)


def test_unknown_packing_lists_the_choices(tmp_path):
    with pytest.raises(ConfigError, match="data.packing='docs'.*stream, masked, document"):
        batches(make(tmp_path / "s", "abcdefg"), packing="docs")


# ---- weights of tokens


def weighted(folder: Path, *documents: tuple[str, list[float], float]) -> Path:
    writer = StoreWriter(folder / "train", BYTES, weighted=True)
    for text, weights, end in documents:
        writer.write(np.array(BYTES.encode(text)), True, np.array(weights), end)
    writer.close()
    return folder


@pytest.mark.parametrize("shard", [3, 1 << 20])
def test_a_target_weighs_what_the_store_says(tmp_path, shard, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_TOKENS", shard)
    path = weighted(
        tmp_path / "s", ("abc", [0, 0, 2], 1), ("defg", [0.5, 0, 0, 1], 0), ("h", [3], 0)
    )
    opened = store_module.Store.open(path / "train", BYTES)
    assert opened.weights(0, 11).tolist() == [0, 0, 2, 1, 0.5, 0, 0, 1, 0, 3, 0]
    assert opened.weights(2, 5).tolist() == [2, 1, 0.5]
    with pytest.raises(IndexError):
        opened.weights(0, 12)
    # abc.defg.h. : each target with its own weight, and none of the overlap of the last window.
    for packing in ("stream", "masked"):
        got = epoch(batches(path, packing=packing))
        assert got.weights == [[0, 2, 1, 0.5], [0, 0, 1, 0], [0, 0, 3, 0]]
    got = epoch(batches(path, packing="document"))
    assert got.weights == [[0, 0, 2, 1], [0.5, 0, 0, 1], [0, 0, 0, 0], [3, 0, 0, 0]]


def test_weights_are_part_of_what_a_store_is(tmp_path):
    one = weighted(tmp_path / "one", ("abcd", [1, 1, 1, 1], 1))
    other = weighted(tmp_path / "other", ("abcd", [1, 1, 1, 0], 1))
    plain = make(tmp_path / "plain", "abcd")
    opened = [store_module.Store.open(path / "train", BYTES) for path in (one, other, plain)]
    assert len({store.fingerprint for store in opened}) == 3
    assert epoch(batches(plain)).weights == epoch(batches(one)).weights
    file = one / "train" / "weights-00000.bin"
    altered = bytearray(file.read_bytes())
    altered[3] ^= 1
    file.write_bytes(altered)
    with pytest.raises(UserError, match=r"weights-00000.bin was altered"):
        store_module.Store.open(one / "train", BYTES)
    file.unlink()
    with pytest.raises(UserError, match=r"weights-00000.bin holds 0 bytes where 20 were written"):
        store_module.Store.open(one / "train", BYTES)


@pytest.mark.parametrize(
    "held, weights, end, message",
    [
        (True, None, 1, "a weighted store takes one weight for each token"),
        (True, [1, 1], 1, "a weighted store takes one weight for each token"),
        (False, [1, 1, 1], 1, "another takes none"),
        (True, [1, -1, 1], 1, "finite and at least 0"),
        (True, [1, 1, 1], float("nan"), "finite and at least 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(tmp_path, held, weights, end, message):
    writer = StoreWriter(tmp_path / "s", BYTES, weighted=held)
    given = None if weights is None else np.array(weights)
    with pytest.raises(ValueError, match=message):
        writer.write(np.array([1, 2, 3]), True, given, end)
