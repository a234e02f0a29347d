"""Relative biases by code against tables indexed by bucket, the way the model was released."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from unival.kernels.attention.reference import dense_bias
from unival.kernels.attention.relative import RelativeBias, RelativeLayout
from unival.model.configuration import UnivalConfig
from unival.model.decoder import Decoder
from unival.model.encoder import Encoder, MediaFeatures, RelativeTables
from unival.model.positions import (
    audio_positions,
    audio_side,
    code_positions,
    grid_buckets,
    grid_cells,
    image_positions,
    num_grid_buckets,
    text_buckets,
    video_positions,
)

GRID = 42  # image_bucket_size
BUCKETS, LONGEST = 256, 1024  # token_bucket_size, max_text_positions
HEADS = 2
CPU = torch.device("cpu")

GRIDS = {
    # rows, columns, start slot
    "no grid": (0, 0, False),
    "one cell": (1, 1, False),
    "one row": (1, 5, False),
    "more columns than rows": (6, 7, False),
    "the whole grid": (42, 42, False),
    # With the place before the first image code.
    "slot and one cell": (1, 1, True),
    "slot and one row": (1, 5, True),
    "slot and more columns than rows": (6, 7, True),
    "slot and the whole grid": (42, 42, True),
}
# 1: no offset but 0; 2: the first with one; 17: every offset has a bucket of its own; 300: some
# share one; 1024: the largest offset there is.
TEXTS = [1, 2, 17, 300, 1024]


def ids_of(rows: int, columns: int, slot: bool) -> Tensor:
    """Grid position ids of all cells; the start slot, id 0, between them where there is one."""
    ids = image_positions(rows, columns, GRID, CPU)
    if not slot:
        return ids
    middle = len(ids) // 2
    return torch.cat([ids[:middle], torch.zeros(1, dtype=torch.int64), ids[middle:]])


def text_bucket(position: Tensor) -> Tensor:
    """Bucket of every pair of text positions: [..., S, S]."""
    offset = position.unsqueeze(-1) - position.unsqueeze(-2)
    return text_buckets(BUCKETS, LONGEST)[offset + LONGEST - 1]


def grid_rows(layout: RelativeLayout) -> Tensor:
    """Bucket of each grid entry of a layout, from two cells that lie so far apart."""
    row, column = layout.grid_offsets(CPU)
    query = GRID * row.clamp(min=0) + column.clamp(min=0) + 1
    key = GRID * (-row).clamp(min=0) + (-column).clamp(min=0) + 1
    return grid_buckets(query[:, None], key[:, None], GRID).flatten()


def table_of(layout: RelativeLayout, text_rows: Tensor, image_rows: Tensor) -> Tensor:
    """The layout's table from one bias a bucket: text_rows [511, H], image_rows [6892, H]."""
    text = text_buckets(BUCKETS, LONGEST)[layout.text_offsets(CPU) + LONGEST - 1]
    return layout.table(
        text_rows[text],
        image_rows[grid_rows(layout)] if layout.rows else None,
        image_rows[-3:] if layout.start_slot else None,
    )


def join(layout: RelativeLayout, ids: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B or 1, S] of grid position ids [..., N] before text positions."""
    ids = ids if ids.ndim == 2 else ids[None]
    slot = ids == 0 if layout.start_slot else None
    grid = layout.grid_codes(*grid_cells(ids, GRID), slot)
    words = layout.text_codes(text)
    query, key = (
        torch.cat([cell, word.expand(len(ids), -1)], dim=1)
        for cell, word in zip(grid, words, strict=True)
    )
    return query, key


def assert_biases(dense: Tensor, ids: Tensor, text: Tensor, rows: tuple[Tensor, Tensor]) -> None:
    """dense [B, H, N + T, N + T] against one bias a bucket, and no bias between grid and text."""
    text_rows, image_rows = rows
    ids = ids if ids.ndim == 2 else ids[None]
    cells = ids.shape[1]
    grid = image_rows[grid_buckets(ids, ids, GRID)].movedim(-1, 1)
    words = text_rows[text_bucket(text)].movedim(-1, 0)
    assert dense.shape == (len(ids), HEADS, cells + len(text), cells + len(text))
    assert torch.equal(dense[:, :, :cells, :cells], grid)
    assert torch.equal(dense[:, :, cells:, cells:], words.expand(len(ids), *words.shape))
    assert not dense[:, :, :cells, cells:].any() and not dense[:, :, cells:, :cells].any()


def random_rows() -> tuple[Tensor, Tensor]:
    """One bias a bucket and head, none of them 0."""
    return torch.rand(2 * BUCKETS - 1, HEADS) + 1, torch.rand(num_grid_buckets(GRID), HEADS) + 1


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", GRIDS)
def test_every_pair_has_the_bias_of_its_bucket(name: str, text: int) -> None:
    rows, columns, slot = GRIDS[name]
    layout = RelativeLayout(text, rows, columns, slot)
    biases = random_rows()
    position, ids = torch.arange(text), ids_of(rows, columns, slot)
    dense = dense_bias(RelativeBias(table_of(layout, *biases), *join(layout, ids, position)))
    assert_biases(dense, ids, position, biases)


@pytest.mark.parametrize("slot", [False, True])
def test_random_grids_and_texts_have_the_bias_of_their_buckets(slot: bool) -> None:
    for _ in range(20):
        rows, columns = torch.randint(1, GRID // 2, (2,)).tolist()
        text = int(torch.randint(1, 200, ()))
        layout = RelativeLayout(text, rows, columns, slot)
        biases = random_rows()
        position, ids = torch.randperm(text), ids_of(rows, columns, slot)
        ids = ids[torch.randperm(len(ids))]
        dense = dense_bias(RelativeBias(table_of(layout, *biases), *join(layout, ids, position)))
        assert_biases(dense, ids, position, biases)


def some(ids: Tensor, *shape: int) -> Tensor:
    """A random choice of grid positions, with repetition."""
    return ids[torch.randint(len(ids), shape)]


def random_patches() -> Tensor:
    ids = image_positions(6, 7, GRID, CPU)
    return torch.stack([ids[torch.randperm(42)[:20]] for _ in range(3)])


MEDIA = {
    # A random subset in random order for every sample (sample_patch_num).
    "random patches": (random_patches, (6, 7)),
    # Frames repeat their cells: a clip's tokens meet at offset 0.
    "clip": (lambda: video_positions(3, 2, 4, GRID, CPU), (2, 4)),
    # A random subset of a clip: some cells twice, some not at all.
    "patches of a clip": (lambda: some(video_positions(4, 3, 3, GRID, CPU), 2, 11), (3, 3)),
    # Audio: the last row of the square is not full.
    "sound": (lambda: audio_positions(13, GRID, CPU), (audio_side(13), audio_side(13))),
}


@pytest.mark.parametrize("name", MEDIA)
def test_tokens_of_every_medium_have_the_bias_of_their_buckets(name: str) -> None:
    make, extent = MEDIA[name]
    layout, ids, biases = RelativeLayout(9, *extent), make(), random_rows()
    codes = join(layout, ids, torch.arange(9))
    dense = dense_bias(RelativeBias(table_of(layout, *biases), *codes))
    assert_biases(dense, ids, torch.arange(9), biases)


SMALL = dict(
    vocab_size=50, d_model=16, ffn_dim=16, num_heads=HEADS, encoder_layers=2, decoder_layers=2,
    image_layers=None, video_layers=None, code_image_size=40,
)  # fmt: skip


def layer_rows(tables: RelativeTables, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's parameters: one bias a bucket of text and of the grid."""
    return tables.text[layer].weight, tables.image[layer].weight


@pytest.mark.parametrize("slot", [False, True])
def test_the_models_tables_hold_the_biases_of_their_buckets(slot: bool) -> None:
    tables = RelativeTables(UnivalConfig(**SMALL), 2)
    layout = RelativeLayout(300, 5, 42, slot)
    ids, position = ids_of(5, 42, slot), torch.arange(300)
    found = tables.tables(layout)
    assert len(found) == 2
    for layer, table in enumerate(found):
        assert table.is_contiguous()
        dense = dense_bias(RelativeBias(table, *join(layout, ids, position)))
        assert_biases(dense, ids, position, layer_rows(tables, layer))


@pytest.mark.parametrize("name", MEDIA)
def test_the_encoder_puts_biases_between_tokens_of_a_kind(name: str) -> None:
    make, extent = MEDIA[name]
    ids, encoder = make(), Encoder(UnivalConfig(**SMALL))
    media = MediaFeatures(torch.empty(0), ids, extent)
    for given, tokens in ((media, ids), (None, ids.new_empty(0))):
        found = encoder.relative_biases(20, given)
        assert len(found) == 2
        for layer, bias in enumerate(found):
            rows = layer_rows(encoder.relative, layer)
            assert_biases(dense_bias(bias), tokens, torch.arange(20), rows)


@pytest.mark.parametrize(
    ("past", "total"),
    [
        (0, 9),  # inside the image of 5 x 5 codes
        (8, 9),  # one query, as generation asks
        (0, 26),  # the whole image
        (5, 40),  # behind the image every place is id 1024, which lies outside it
    ],
)
def test_the_decoder_gives_rows_of_codes_the_grids_bias(past: int, total: int) -> None:
    decoder = Decoder(UnivalConfig(**SMALL))
    code_mask = torch.tensor([True, False])
    ids = code_positions(total, 40, GRID, CPU)
    for layer, bias in enumerate(decoder.relative_biases(past, total, code_mask, CPU)):
        text_rows, image_rows = layer_rows(decoder.relative, layer)
        codes, words = dense_bias(bias)
        assert torch.equal(codes, image_rows[grid_buckets(ids, ids, GRID)[past:]].movedim(-1, 0))
        text = text_bucket(torch.arange(total))[past:]
        assert torch.equal(words, text_rows[text].movedim(-1, 0))
    for layer, bias in enumerate(decoder.relative_biases(past, total, None, CPU)):
        text = text_bucket(torch.arange(total))[past:]
        rows = layer_rows(decoder.relative, layer)[0]
        assert torch.equal(dense_bias(bias)[0], rows[text].movedim(-1, 0))


def kinds(layout: RelativeLayout) -> tuple[list[tuple], Tensor, Tensor]:
    """Every token that a layout can show, and their query and key codes."""
    tokens: list[tuple] = [("text", i) for i in range(layout.text)]
    query, key = layout.text_codes(torch.arange(layout.text))
    if layout.rows:
        cells = list(itertools.product(range(layout.rows), range(layout.columns)))
        tokens += [("grid", cell) for cell in cells]
        tokens += [("slot", 0)] if layout.start_slot else []
        padded = torch.tensor(cells + [(0, 0)] * layout.start_slot)
        slot = torch.arange(len(padded)) == len(cells) if layout.start_slot else None
        codes = layout.grid_codes(padded[:, 0], padded[:, 1], slot)
        query, key = (torch.cat(pair) for pair in zip((query, key), codes, strict=True))
    return tokens, query, key


def relation(query: tuple, key: tuple) -> tuple | None:
    """What decides the bias of a pair; None where there is no bias."""
    (one, x), (two, y) = query, key
    if (one == "text") != (two == "text"):
        return None
    if one == two == "text":
        return "text", x - y
    if one == two == "grid":
        return "grid", x[0] - y[0], x[1] - y[1]
    return one, two


LAYOUTS = [
    (text, rows, columns, slot)
    for text in range(5)
    for rows in range(4)
    for columns in range(5)
    for slot in (False, True)
    if (rows == 0) == (columns == 0) and (rows or not slot)
]


def test_no_two_relations_share_an_entry_of_the_table() -> None:
    """Exhaustive for small extents. Without a slot every entry is used: no table is too large."""
    assert len(LAYOUTS) == 125
    for extents in LAYOUTS:
        layout = RelativeLayout(*extents)
        tokens, query, key = kinds(layout)
        owners: dict[int, tuple] = {}
        for (i, one), (j, two) in itertools.product(enumerate(tokens), repeat=2):
            entry, meaning = int(query[i] - key[j]), relation(one, two)
            if meaning is None:
                assert not 0 <= entry < layout.size, (extents, one, two)
                continue
            assert 0 <= entry < layout.size, (extents, one, two)
            assert owners.setdefault(entry, meaning) == meaning, (extents, one, two)
        if not layout.start_slot:
            assert owners.keys() == set(range(layout.size)), extents


def test_codes_of_the_largest_layout_stay_far_inside_32_bits() -> None:
    """Kernels take the differences in int32."""
    layout = RelativeLayout(LONGEST, GRID, GRID, start_slot=True)
    _, query, key = kinds(layout)
    assert query.dtype == key.dtype == torch.int32
    far = query.long()[:, None] - key.long()[None, :]
    assert far.abs().max() < 2**20
    assert layout.size < 3 * 83 * 83


def test_the_tables_gradient_counts_the_pairs_of_an_offset() -> None:
    """A gradient of ones in float64: exact, cells that occur twice and empty offsets included."""
    layout = RelativeLayout(6, 3, 4)
    ids = video_positions(2, 3, 4, GRID, CPU)[torch.tensor([[0, 3, 12, 23], [5, 5, 7, 1]])]
    query, key = join(layout, ids, torch.arange(6))
    table = torch.zeros(HEADS, layout.size, dtype=torch.float64, requires_grad=True)
    dense_bias(RelativeBias(table, query, key)).backward(
        torch.ones(2, HEADS, 10, 10, dtype=torch.float64)
    )
    cells = torch.stack(grid_cells(ids, GRID), dim=-1)
    counts: Counter = Counter()
    for sample in cells.tolist():
        for one, two in itertools.product(sample, repeat=2):
            counts["grid", one[0] - two[0], one[1] - two[1]] += 1
        counts.update(("text", i - j) for i, j in itertools.product(range(6), repeat=2))
    offsets = list(zip(*(x.tolist() for x in layout.grid_offsets(CPU)), strict=True))
    expected = [counts["grid", row, column] for row, column in offsets]
    expected += [counts["text", offset] for offset in layout.text_offsets(CPU).tolist()]
    assert table.grad.tolist() == [expected] * HEADS
    assert table.grad.sum() == HEADS * 2 * (4 * 4 + 6 * 6)


@pytest.mark.parametrize("slot", [False, True])
def test_the_parameters_gradient_counts_the_pairs_of_a_bucket(slot: bool) -> None:
    """Offsets that share a bucket are summed, and so are the slot's pairs with all cells."""
    tables = RelativeTables(UnivalConfig(**SMALL), 1).double()
    layout = RelativeLayout(400, 5, 6, slot)
    ids, position = ids_of(5, 6, slot), torch.arange(400)
    (table,) = tables.tables(layout)
    dense_bias(RelativeBias(table, *join(layout, ids, position))).sum().backward()
    for parameter, buckets in zip(
        layer_rows(tables, 0), (text_bucket(position), grid_buckets(ids, ids, GRID)), strict=True
    ):
        counts = torch.bincount(buckets.flatten(), minlength=len(parameter))
        assert torch.equal(parameter.grad, counts[:, None].expand(-1, HEADS).double())


def test_the_slots_own_cell_does_not_matter() -> None:
    layout = RelativeLayout(3, 2, 2, start_slot=True)
    slot = torch.tensor([True, False])
    first, second = (
        layout.grid_codes(torch.tensor([row, 1]), torch.tensor([row, 0]), slot) for row in (-1, 70)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("extents", "message"),
    [
        ((-1, 0, 0), "text=-1, rows=0, columns=0: extents are at least 0, and rows and columns"),
        ((3, -2, -2), "text=3, rows=-2, columns=-2: extents are at least 0"),
        ((3, 2, 0), "text=3, rows=2, columns=0: .* both 0 or both positive"),
        ((3, 0, 2), "text=3, rows=0, columns=2: .* both 0 or both positive"),
        ((3, 0, 0, True), "start_slot needs a grid: rows and columns of at least 1"),
    ],
)
def test_extents_that_make_no_table_are_refused(extents: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelativeLayout(*extents)


@pytest.mark.parametrize(("row", "column"), [(2, 0), (-1, 0), (0, 3), (0, -1)])
@pytest.mark.parametrize("slot", [False, True])
def test_cells_outside_the_grid_are_refused(row: int, column: int, slot: bool) -> None:
    """Without the check their codes would be those of other offsets."""
    layout = RelativeLayout(4, 2, 3, start_slot=slot)
    at_slot = torch.tensor([False, True]) if slot else None
    with pytest.raises(ValueError, match=r"row, column: coordinates outside .* grid of 2 x 3"):
        layout.grid_codes(torch.tensor([row, 0]), torch.tensor([column, 0]), at_slot)


@pytest.mark.parametrize("position", [-1, 4])
def test_positions_outside_the_text_are_refused(position: int) -> None:
    with pytest.raises(ValueError, match="position: outside the table's text of 4 positions"):
        RelativeLayout(4, 2, 3).text_codes(torch.tensor([0, position]))


def test_a_slot_needs_a_layout_with_one() -> None:
    cell = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="slot: this layout has no start slot"):
        RelativeLayout(4, 2, 3).grid_codes(cell, cell, torch.tensor([True, False]))
