"""Text files to a vocabulary of their own: byte-pair encoding over bytes, as GPT-2's.

Sennrich et al. 2016: the most frequent pair of neighbours becomes a token, again and again. As in
Radford et al. 2019 the text is cut into words first, each with the blank before it, no pair reaches
across a cut, and the first tokens are the 256 bytes, so that every text has ids.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from gptjax.config import UserError
from gptjax.data.prepare import Parts, open_parts
from gptjax.storage import new_folder
from gptjax.tokenizer import END_OF_TEXT, TOKENIZER_FILE, Tokenizer, load

SMALLEST = 257  # the bytes and end-of-text
LARGEST = 1 << 24  # the library takes memory for all tokens at once

# A cut between words, which a word never crosses: some 64K characters, up to one before a blank.
_PIECE = re.compile(r".{65536,}?\S(?=[ \n])", re.DOTALL)


def train_vocabulary(files: list[Path], out: Path, size: int, text_key: str = "text") -> Tokenizer:
    """Trains a byte-level BPE on files, into a folder that `tokenizer.load` and `transformers` read.

    The same text and size give the same bytes: of pairs that are equally frequent the one whose
    ids are lower goes first. Ids are those of the bytes in GPT-2's order, then of merges in their
    order, then `size - 1` of end-of-text.

    Args:
        files: as for `prepare`; all of their text is used, so leave out what is to be held out.
        out: folder to make.
        size: tokens in all, in [SMALLEST, LARGEST].
        text_key: the jsonl key or parquet column that holds the text.

    Raises:
        UserError: on another size, or one for which the text has too few pairs; on a missing,
            empty, non-UTF-8 or malformed file, naming the place; or if `out` exists.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if not SMALLEST <= size <= LARGEST:
        raise UserError(
            f"--size={size} must lie in [{SMALLEST}, {LARGEST}]: 256 bytes, {END_OF_TEXT}, and merges"
        )
    if not files:
        raise UserError("no files to read: name at least one")
    readers = [open_parts(Path(file), text_key) for file in files]
    with new_folder(Path(out)) as aside:
        counts = [sum(1 for _ in _pieces(read())) for read in readers]
        for file, count in zip(files, counts, strict=True):
            if not count:
                raise UserError(f"{file} holds no text: leave it out")
        aside.mkdir(parents=True)
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),  # elsewhere its bars would leave empty lines
        )
        pieces = chain.from_iterable(_pieces(read()) for read in readers)
        bpe.train_from_iterator(pieces, trainer, length=sum(counts))
        bpe.add_special_tokens([END_OF_TEXT])
        if bpe.get_vocab_size() < size:
            raise UserError(
                f"the text has pairs for {bpe.get_vocab_size()} tokens only: give more text, or a "
                f"--size of at most {bpe.get_vocab_size()}"
            )
        (aside / TOKENIZER_FILE).write_text(bpe.to_str(pretty=True), encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        }
        (aside / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=1), encoding="utf-8"
        )
    load.cache_clear()  # it may have read another one there before
    return load(str(out))


def _pieces(parts: Parts) -> Iterator[str]:
    """The text in pieces that have the same words, each of one document."""
    pending = ""
    for text, ends in parts:
        pending += text
        at = 0
        while piece := _PIECE.match(pending, at):
            yield piece[0]
            at = piece.end()
        pending = pending[at:]
        if ends and pending:
            yield pending
            pending = ""
