"""Commands that make and show data."""

from __future__ import annotations

import argparse
import json
from typing import Any

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
    _print_stores(summary)


def _print_stores(summary: dict[str, Any]) -> None:
    for split, counts in summary.items():
        print(
            f"{counts['path']}: {counts['tokens']:,} tokens, {counts['documents']:,} documents, "
            f"{counts['bytes']:,} bytes, fingerprint {counts['fingerprint'][:12]} ({split})"
        )


def _add_files(parser: argparse.ArgumentParser, kinds: str, out: str) -> None:
    parser.add_argument(
        "files",
        type=local,
        nargs="+",
        metavar="FILE",
        help=f"{kinds}, or hub:DATASET[@REVISION][,CONFIG],SPLIT",
    )
    parser.add_argument("--out", type=local, required=True, help=out)


def _add_texts(parser: argparse.ArgumentParser, out: str) -> None:
    _add_files(parser, ".txt .raw .jsonl .parquet", out)
    parser.add_argument(
        "--text_key", default="text", help="jsonl key or parquet column (%(default)s)"
    )


def _add_val_fraction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--val_fraction", type=float, default=0.1, help="held out at the end (%(default)s)"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    _add_texts(parser, "the store to make")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        help="bytes, a tiktoken encoding, or a tokenizer folder (%(default)s)",
    )
    _add_val_fraction(parser)


def data_dialogues(arguments: argparse.Namespace, overrides: list[str]) -> None:
    no_more(overrides)
    from gptjax.dialogues import prepare_dialogues

    a = arguments
    _print_stores(prepare_dialogues(a.files, a.out, a.tokenizer, a.val_fraction))


def data_pairs(arguments: argparse.Namespace, overrides: list[str]) -> None:
    no_more(overrides)
    from gptjax.dialogues import prepare_pairs

    a = arguments
    _print_stores(prepare_pairs(a.files, a.out, a.tokenizer, a.val_fraction))


def data_prompts(arguments: argparse.Namespace, overrides: list[str]) -> None:
    no_more(overrides)
    from gptjax.dialogues import prepare_prompts

    a = arguments
    _print_stores(prepare_prompts(a.files, a.out, a.tokenizer, a.val_fraction))


def _add_dialogues(parser: argparse.ArgumentParser) -> None:
    _add_files(parser, ".jsonl .parquet", "the store to make")
    parser.add_argument(
        "--tokenizer", required=True, help="a model, by path or name, and its chat template"
    )
    _add_val_fraction(parser)


def data_vocabulary(arguments: argparse.Namespace, overrides: list[str]) -> None:
    no_more(overrides)
    from gptjax.data.vocabulary import train_vocabulary

    made = train_vocabulary(arguments.files, arguments.out, arguments.size, arguments.text_key)
    print(f"{made.name}: {made.vocab_size:,} tokens, fingerprint {made.fingerprint[:12]}")


def _add_vocabulary(parser: argparse.ArgumentParser) -> None:
    _add_texts(parser, "the tokenizer folder to make")
    parser.add_argument(
        "--size", type=int, required=True, help="tokens: 256 bytes, merges and end-of-text"
    )


def data_show(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from rich.console import Console

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
    styles = {}
    if Console().is_terminal and not Console().no_color:  # else read text stands in brackets
        styles = {"scored": "\x1b[32m{}\x1b[0m".format, "read": "\x1b[2m{}\x1b[0m".format}
    texts = describe(batches.rows(arguments.step, 0, rows), vocabulary, **styles)
    origins = batches.origins(arguments.step)[:rows]
    kept = batches.prompts(arguments.step) if config.data.packing == "prompts" else []
    for row, (text, origin) in enumerate(zip(texts, origins, strict=True)):
        print(f"--- step {arguments.step}, row {row} of {all_rows}: {origin}\n{text}")
        for _, source in kept[row : row + 1]:
            print(json.dumps(source, ensure_ascii=False))


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
    "data dialogues": Command(
        data_dialogues,
        _add_dialogues,
        "Make a token store of dialogues, in which the assistant's tokens are scored.",
        """\
A row has `messages`, each with a role (system, user, assistant, tool) and a content, or a `prompt`
and a `completion`, texts or messages. The model's own chat template renders it. Scored are the
assistant's tokens and the one that ends its turn (of a completion alone, where there is one). A row
in which they cannot be told apart is refused; one without any is left out, and counted. Teach a
model by them, and look at what is scored, with packing=whole:

  data dialogues talks.jsonl --out=data/talks --tokenizer=models/smollm2
  train --config=configs/sft.py --from=models/smollm2 --config.data.sources="('data/talks',)" ...
  data show --config.data.sources="('data/talks',)" --config.data.tokenizer=models/smollm2 ...
""",
    ),
    "data pairs": Command(
        data_pairs,
        _add_dialogues,
        "Make a token store of preferences: pairs of a chosen and a rejected answer.",
        """\
A row has a `prompt`, a `chosen` and a `rejected`, each a text or messages, which the model's own
chat template renders; with a tokenizer that has none, texts as they are. Scored are the answers and
the token that ends each. Teach a model by them with packing=pairs:

  data pairs pairs.jsonl --out=data/pairs --tokenizer=models/smollm2
  train --config=configs/dpo.py --from=models/smollm2 --config.data.sources="('data/pairs',)" ...
""",
    ),
    "data prompts": Command(
        data_prompts,
        _add_dialogues,
        "Make a token store of prompts that a model is to answer, with their rows.",
        """\
A row has a `prompt`, a text or messages, which the model's own chat template renders up to where an
answer begins; with a tokenizer that has none, a text as it is. The whole row is kept beside it
(rows.jsonl): the reward that a model learns by is a function of the row and the answer. With
packing=prompts:

  data prompts questions.jsonl --out=data/questions --tokenizer=models/smollm2
  train --config=configs/grpo.py --from=models/smollm2 --config.train.reward=mine.py:reward \\
      --config.data.sources="('data/questions',)" ...
""",
    ),
    "data show": Command(
        data_show,
        _add_show,
        "Print the exact text of a batch.",
        f"""\
A batch is a pure function of (seed, step): step 100 of a run reads batch 99. Before each row stands
where it comes from: the source, its row there, and its documents, counted from 0. What is scored is
green and what is read alone is dim; without colours it stands in double brackets. A double bar
begins another document. Below a prompt stands its row.

  data show --config=configs/shakespeare.py --step=100 --rows=2
  data show --workdir=runs/mine --step=99

{OVERRIDES}""",
    ),
}
