"""Commands that make and show data."""

from __future__ import annotations

import argparse

from gptjax.commands.command import (
    DEFAULT_RECIPE,
    OVERRIDES,
    Command,
    no_more,
)
from gptjax.config import ConfigError
from gptjax.storage import expand, local


def data(arguments: argparse.Namespace, overrides: list[str]) -> None:
    no_more(overrides)
    from gptjax.data import prepare

    summary = prepare(
        arguments.files,
        arguments.out,
        arguments.tokenizer,
        arguments.val_fraction,
        arguments.text_key,
    )
    for split, counts in summary.items():
        print(
            f"{counts['path']}: {counts['tokens']:,} tokens, {counts['documents']:,} documents, "
            f"{counts['bytes']:,} bytes, fingerprint {counts['fingerprint'][:12]} ({split})"
        )


def _add_files(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        "files",
        type=local,
        nargs="+",
        metavar="FILE",
        help=".txt .raw .jsonl .parquet, or hub:DATASET[@REVISION][,CONFIG],SPLIT",
    )
    parser.add_argument("--out", type=local, required=True, help=out)
    parser.add_argument(
        "--text_key", default="text", help="jsonl key or parquet column (%(default)s)"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    _add_files(parser, "the store to make")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        help="bytes, a tiktoken encoding, or a tokenizer folder (%(default)s)",
    )
    parser.add_argument(
        "--val_fraction", type=float, default=0.1, help="held out at the end (%(default)s)"
    )


def data_vocabulary(arguments: argparse.Namespace, overrides: list[str]) -> None:
    no_more(overrides)
    from gptjax.data.vocabulary import train_vocabulary

    made = train_vocabulary(arguments.files, arguments.out, arguments.size, arguments.text_key)
    print(f"{made.name}: {made.vocab_size:,} tokens, fingerprint {made.fingerprint[:12]}")


def _add_vocabulary(parser: argparse.ArgumentParser) -> None:
    _add_files(parser, "the tokenizer folder to make")
    parser.add_argument(
        "--size", type=int, required=True, help="tokens: 256 bytes, merges and end-of-text"
    )


def data_show(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax import configure, tokenizer
    from gptjax.data import Batches, describe

    if arguments.workdir is not None and arguments.config is not None:
        raise ConfigError("--workdir shows what a run reads: leave --config out")
    if arguments.workdir is not None:
        config = configure.of_run(arguments.workdir, overrides)
    else:
        config = configure.from_file(arguments.config or DEFAULT_RECIPE, overrides)
    vocabulary = tokenizer.load(config.data.tokenizer)
    batches = Batches(config.data, config.model.context, config.seed, arguments.split, vocabulary)
    all_rows = config.data.batch_size
    rows = all_rows if arguments.rows is None else min(arguments.rows, all_rows)
    if not 0 <= arguments.step < 2**31:
        raise ConfigError(f"--step must lie in [0, 2^31), got {arguments.step}")
    if rows < 1:
        raise ConfigError(f"--rows must be above 0, got {rows}")
    texts = describe(batches.rows(arguments.step, 0, rows), vocabulary)
    origins = batches.origins(arguments.step)[:rows]
    for row, (text, origin) in enumerate(zip(texts, origins, strict=True)):
        print(f"--- step {arguments.step}, row {row} of {all_rows}: {origin}\n{text}")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE[:ARG]", help=f"a recipe ({DEFAULT_RECIPE})")
    parser.add_argument("--workdir", type=expand, help="a run's folder instead of a recipe")
    parser.add_argument("--step", type=int, default=0, help="0-based step of the run (%(default)s)")
    parser.add_argument("--rows", type=int, help="only the first so many rows")
    parser.add_argument("--split", default="train", help="train or val (%(default)s)")


COMMANDS: dict[str, Command] = {
    "data": Command(
        data,
        _add_data,
        "Make a token store of text, jsonl or parquet files.",
        """\
Tokenises once into OUT/train and OUT/val: memory-mapped shards with a sha256 manifest. In a text
file the literal <|endoftext|> separates documents; a jsonl line or parquet row is a document.
Use the store by --config.data.sources="('OUT',)". `data show` prints batches, `data vocabulary`
makes a tokenizer folder. hub: streams a data set of the Hugging Face hub (the extra `hub`).

  data books/*.txt --out=data/books --tokenizer=gpt2
  data hub:Salesforce/wikitext,wikitext-2-raw-v1,train --out=data/wikitext
""",
    ),
    "data vocabulary": Command(
        data_vocabulary,
        _add_vocabulary,
        "Train a vocabulary on text, jsonl or parquet files.",
        """\
Byte-level BPE: 256 bytes, the merges of the most frequent pairs, and <|endoftext|>. OUT is a
tokenizer folder as of Hugging Face, its content a part of each run's fingerprints. All text of the
files is used: leave out what is to be held out. Both knobs change with the vocabulary:

  data vocabulary books/*.txt --size=2048 --out=vocabularies/books
  data books/*.txt --out=data/books --tokenizer=vocabularies/books
  train --config.data.tokenizer=vocabularies/books --config.model.vocab_size=2048 ...
""",
    ),
    "data show": Command(
        data_show,
        _add_show,
        "Print the exact text of a batch.",
        f"""\
A batch is a pure function of (seed, step): step 100 of a run reads batch 99. Before each row stands
where it comes from: the source, its row there, and its documents, counted from 0. In double
brackets stands what is read but not scored; a double bar begins another document.

  data show --config=configs/shakespeare.py --step=100 --rows=2
  data show --workdir=runs/mine --step=99

{OVERRIDES}""",
    ),
}
