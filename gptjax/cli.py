"""The command line: one table of commands, each a few lines over the package."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.config import Config, ConfigError, UserError, flatten, to_dict

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # after SIGTERM or Ctrl-C: saved, run the same command to go on (EX_TEMPFAIL)
DEFAULT_RECIPE = "configs/shakespeare.py"

WORKDIR = "a run's folder, or a pretrained model's (a Hugging Face folder)"
RECIPE = "a recipe; default: the run's own config, or configs/base.py's settings"

OVERRIDES = """\
Any knob of the config can be set by its path: --config.optim.peak_lr=6e-4
--config.model.windows="(None,256)" --config.optim.clip=None. `config` lists them all;
configs/base.py explains each.
"""
EXITS = """\
Exit status: 0 done, 2 a mistake that the message explains (--debug shows where), 75 stopped by
SIGTERM or Ctrl-C after saving: the same command goes on.
"""


class Command(NamedTuple):
    run: Callable[[argparse.Namespace, list[str]], None]  # takes what --config.* left
    add_arguments: Callable[[argparse.ArgumentParser], None]
    summary: str
    details: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else " ".join(words[:1])
    if name not in COMMANDS:
        return _overview(name)
    command, program = COMMANDS[name], f"{Path(sys.argv[0]).name} {name}"
    parser = argparse.ArgumentParser(
        program,
        description=f"{command.summary}\n\n{command.details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments, rest = parser.parse_known_args(words[len(name.split()) :])
    try:
        command.run(arguments, rest)
    except BaseException as error:
        status, message = _explain(error)
        if status is None or arguments.debug:
            raise
        print(f"gptjax: {message}" if message else "", file=sys.stderr, end="\n" * bool(message))
        return status
    return 0


def _overview(name: str) -> int:
    """Help without a command; an unknown one is an error."""
    wanted = name in ("", "-h", "--help", "help")
    lines = [f"  {n:<12}{c.summary}" for n, c in COMMANDS.items()]
    text = "\n".join(
        [
            "gptjax: a JAX/Flax GPT research codebase.",
            "",
            f"usage: {Path(sys.argv[0]).name} COMMAND [--help] ...",
            "",
            *lines,
            "",
            f"{OVERRIDES}{EXITS}",
        ]
    )
    if wanted:
        print(text)
        return 0 if name else EXIT_USER_ERROR
    print(f"gptjax: no command {name!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
    return EXIT_USER_ERROR


def _explain(error: BaseException) -> tuple[int | None, str]:
    """Exit status and one line for what a user can mend; None for what is ours to mend."""
    from gptjax.loop import Stopped

    match error:
        case Stopped():
            return EXIT_STOPPED, ""
        case UserError():
            return EXIT_USER_ERROR, str(error)
        case KeyboardInterrupt():
            return 130, "interrupted"
        case OSError():
            return EXIT_USER_ERROR, f"{error.filename or 'a file'}: {error.strerror or error}"
    if "RESOURCE_EXHAUSTED" in str(error):
        return EXIT_USER_ERROR, (
            "out of memory on a device: lower data.batch_size or raise train.accumulation, set "
            "model.remat or optim.loss_vocab_chunk, or split over more devices by mesh.fsdp"
        )
    return None, ""


def _prepare_jax(distributed: str | None) -> None:
    """Compiled programs are kept between runs; several processes find each other."""
    import jax

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("GPTJAX_CACHE") or Path.home() / ".cache" / "gptjax")
        jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed == "auto":
        jax.distributed.initialize()
    elif distributed:
        try:
            address, processes, index = distributed.split(",")
            jax.distributed.initialize(address, int(processes), int(index))
        except ValueError as error:
            raise UserError(
                f"--distributed={distributed} is neither 'auto' nor HOST:PORT,PROCESSES,INDEX"
            ) from error


def _config(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    """The config of --config, or of the model in --workdir."""
    from gptjax import trained

    return trained.config_of(arguments.workdir, arguments.config, overrides)


def _add_run(parser: argparse.ArgumentParser) -> None:
    """What every command has that works on a model."""
    parser.add_argument("--workdir", type=Path, required=True, help=WORKDIR)
    parser.add_argument("--config", metavar="FILE[:ARG]", help=RECIPE)
    _add_distributed(parser)


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,N,I",
        help="this is process I of N, which meet at HOST:PORT; without a value the cluster "
        "(Slurm, TPU pod, Kubernetes, MPI) tells. Run the same command on every host",
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", default=DEFAULT_RECIPE, help="a recipe (%(default)s)"
    )
    parser.add_argument(
        "--workdir", type=Path, help="the run's folder; default: runs/ and the recipe's name"
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="DIR",
        help="fine-tune this pretrained model: its parameters, architecture and tokenizer",
    )
    _add_distributed(parser)


def train(arguments: argparse.Namespace, overrides: list[str]) -> None:
    _prepare_jax(arguments.distributed)
    import jax

    from gptjax import configure, loop, speak, trained
    from gptjax.sharding import make_mesh

    config, begin = configure.from_file(arguments.config, overrides), None
    if arguments.start is not None:
        config, begin = trained.start_from(config, arguments.start, overrides)
    workdir = arguments.workdir or Path("runs") / Path(arguments.config.partition(":")[0]).stem
    with jax.set_mesh(make_mesh(config.mesh)):
        speak.check(config, loop.load_tokenizer(config))
        params = loop.train(config, workdir, begin)
        if params is None:
            print(f"Its numbers are in {workdir}; `generate --workdir={workdir}` lets it speak.")
        else:
            speak.generate(loop.settle(config), params, loop.load_tokenizer(config))


def evaluate(arguments: argparse.Namespace, overrides: list[str]) -> None:
    if (arguments.workdir is None) == (arguments.compare is None):
        raise UserError("eval takes either --workdir=DIR or --compare DIR DIR")
    if arguments.compare and arguments.config:
        raise UserError("--compare evaluates each run by its own config: leave --config out")
    if arguments.html is not None and not arguments.html.absolute().parent.is_dir():
        raise UserError(
            f"--html={arguments.html}: no folder {arguments.html.parent}, make it first"
        )
    from gptjax import trained

    workdirs = arguments.compare or [arguments.workdir]
    configs = [trained.config_of(w, arguments.config, overrides) for w in workdirs]
    _prepare_jax(arguments.distributed)
    import jax

    from gptjax.audit import compare, report, run, table, texts

    sets = texts.parse_sets(arguments.set)
    how = texts.Reading(arguments.text_key, arguments.domain_key, arguments.detokenizer)
    if not sets and how != texts.Reading():
        raise UserError(
            "--text_key, --domain_key and --detokenizer tell how the files of --set are read"
        )
    audits = [
        run.audit(config, workdir, sets, how)
        for config, workdir in zip(configs, workdirs, strict=True)
    ]
    page: Callable[..., str]
    if arguments.compare:
        record = compare.compare(*audits)
        page, show = report.comparison_page, table.show_comparison
    else:
        record = run.record(*audits)
        page, show = report.page, table.show
    if jax.process_index() != 0:
        return
    if arguments.html is not None:
        report.write(arguments.html, page(record, *audits))
    if arguments.json:
        print(json.dumps(record, allow_nan=False))
    else:
        show(record)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=Path, help=WORKDIR)
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="two models' folders instead"
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help=RECIPE)
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="texts to score: .txt .raw .jsonl .parquet, a token store, or "
        "hub:DATASET[,CONFIG],SPLIT; default: the held-out text of data.sources",
    )
    parser.add_argument(
        "--text_key", default="text", help="jsonl key or parquet column (%(default)s)"
    )
    parser.add_argument(
        "--domain_key", help="jsonl key or parquet column to tell the documents' loss apart by"
    )
    parser.add_argument(
        "--detokenizer",
        default="none",
        help="none, or wikitext: what makes prose of a pre-tokenised corpus (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also a self-contained page")
    _add_distributed(parser)


def tasks(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = _config(arguments, overrides)
    from gptjax.tasks import TASKS, run, show

    files = {name: getattr(arguments, name) for name in TASKS}
    files = {name: file for name, file in files.items() if file is not None}
    if not files and not arguments.harness:
        raise UserError(f"tasks takes at least one of --{', --'.join(TASKS)}, --harness")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit={arguments.limit} is no positive number")
    _prepare_jax(arguments.distributed)
    import jax

    record = run(config, arguments.workdir, files, arguments.limit) if files else {}
    if arguments.harness:
        from gptjax.interop import harness

        where = arguments.limit, arguments.harness_path
        found = harness.evaluate(config, arguments.workdir, arguments.harness, *where)
        record["harness"] = harness.figures(found)
    if jax.process_index() != 0:
        return
    if arguments.json:
        print(json.dumps(record, allow_nan=False))
        return
    if files:
        show(record)
    if arguments.harness:
        print(harness.make_table(found))


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--lambada", type=Path, metavar="FILE", help='jsonl of {"text"}: guess its last word'
    )
    parser.add_argument(
        "--choices",
        type=Path,
        metavar="FILE",
        help='jsonl of {"query", "choices", "gold"}: tell the right choice, by its index',
    )
    parser.add_argument(
        "--harness", nargs="+", metavar="TASK", help="tasks of EleutherAI's lm-evaluation-harness"
    )
    parser.add_argument(
        "--harness_path", type=Path, metavar="DIR", help="where more of its tasks are described"
    )
    parser.add_argument("--limit", type=int, help="only so many lines or documents of each task")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def generate(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = _config(arguments, overrides)
    _prepare_jax(arguments.distributed)
    import jax

    from gptjax import loop, speak, trained
    from gptjax.sharding import make_mesh

    if arguments.prompt is not None:
        sample = dataclasses.replace(config.sample, prompt=arguments.prompt)
        config = dataclasses.replace(config, sample=sample)
    if arguments.seed is not None:
        config = dataclasses.replace(config, seed=arguments.seed)
    with jax.set_mesh(make_mesh(config.mesh)):
        _, params = trained.restore(config, arguments.workdir)
        speak.generate(loop.settle(config), params, loop.load_tokenizer(config))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--prompt", help="the text to go on from; default: sample.prompt")
    parser.add_argument("--seed", type=int, help="of the sampling; default: the run's seed")


def ask(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = _config(arguments, overrides)
    _prepare_jax(arguments.distributed)
    import jax

    from gptjax import loop, speak, trained
    from gptjax.sharding import make_mesh

    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    with jax.set_mesh(make_mesh(config.mesh)):
        _, params = trained.restore(config, arguments.workdir)
        settled, tokenizer = loop.settle(config), loop.load_tokenizer(config)
        for question in arguments.questions:
            print(f"> {question}")
            dialogue = [*system, {"role": "user", "content": question}]
            speak.answer(settled, params, tokenizer, dialogue)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--system", help="what stands before the dialogue; default: the template's")


def _add_ask(parser: argparse.ArgumentParser) -> None:
    _add_chat(parser)
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help="each is asked afresh")


def chat(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = _config(arguments, overrides)
    _prepare_jax(arguments.distributed)
    import jax

    from gptjax import loop, speak, trained
    from gptjax.sharding import make_mesh

    with jax.set_mesh(make_mesh(config.mesh)):
        _, params = trained.restore(config, arguments.workdir)
        speak.chat(loop.settle(config), params, loop.load_tokenizer(config), arguments.system)


def import_(arguments: argparse.Namespace, overrides: list[str]) -> None:
    _no_more(overrides)
    _prepare_jax(None)
    from gptjax.accounting import parameters
    from gptjax.interop import pretrained

    model = pretrained.import_(arguments.source, arguments.out)
    count = parameters(model)["total"]
    print(
        f"{arguments.out}: {count:,} parameters, {model.layers} layers of width {model.width}, "
        f"context {model.context}, vocabulary {model.vocab_size:,}"
    )


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a Hugging Face folder or a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")


def export(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = _config(arguments, overrides)
    _prepare_jax(None)
    import jax

    from gptjax import loop, trained
    from gptjax.interop import hf
    from gptjax.sharding import make_mesh

    with jax.set_mesh(make_mesh(config.mesh)):
        step, params = trained.restore(config, arguments.workdir)
        tokenizer = loop.load_tokenizer(config)
        hf.export(arguments.out, config.model, params, tokenizer.name, arguments.dtype)
    print(f"{arguments.out}: step {step} of {arguments.workdir}, as {arguments.dtype}")


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the tensors (%(default)s, which keeps every bit)",
    )


def data(arguments: argparse.Namespace, overrides: list[str]) -> None:
    _no_more(overrides)
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


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help=".txt .raw .jsonl .parquet"
    )
    parser.add_argument("--out", type=Path, required=True, help="the store to make")
    parser.add_argument(
        "--tokenizer", default="gpt2", help="bytes, or a tiktoken encoding (%(default)s)"
    )
    parser.add_argument(
        "--val_fraction", type=float, default=0.1, help="held out at the end (%(default)s)"
    )
    parser.add_argument(
        "--text_key", default="text", help="jsonl key or parquet column (%(default)s)"
    )


def show(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax import configure, tokenizer
    from gptjax.data import Batches, describe

    config = configure.from_file(arguments.config, overrides)
    found = tokenizer.load(config.data.tokenizer)
    batches = Batches(config.data, config.model.context, config.seed, arguments.split, found)
    all_rows = config.data.batch_size
    rows = all_rows if arguments.rows is None else min(arguments.rows, all_rows)
    if arguments.step < 0:
        raise ConfigError(f"--step must not be negative, got {arguments.step}")
    if rows < 1:
        raise ConfigError(f"--rows must be above 0, got {rows}")
    for row, text in enumerate(describe(batches.rows(arguments.step, 0, rows), found)):
        print(f"--- step {arguments.step}, row {row} of {all_rows}\n{text}")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", default=DEFAULT_RECIPE, help="a recipe (%(default)s)"
    )
    parser.add_argument("--step", type=int, default=0, help="0-based step of the run (%(default)s)")
    parser.add_argument("--rows", type=int, help="only the first so many rows")
    parser.add_argument("--split", default="train", help="train or val (%(default)s)")


def config(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax import accounting, configure, loop

    found = configure.from_file(arguments.config, overrides)
    loop.check(found)
    if arguments.diff is not None:
        other = configure.from_file(arguments.diff)
        for knob, (a, b) in configure.difference(found, other).items():
            print(f"{knob}: {a!r} -> {b!r}")
        return
    if arguments.json:
        print(json.dumps(to_dict(found), indent=1))
        return
    for knob, value in flatten(dataclasses.asdict(found)).items():
        print(f"{knob} = {value!r}")
    parts = accounting.parameters(found.model)
    tokens = found.train.steps * found.data.batch_size * found.model.context
    flops = accounting.train_flops_per_token(found.model, causal=True)
    print("# parameters: " + ", ".join(f"{name} {count:,}" for name, count in parts.items()))
    print(
        f"# training: {tokens:.4g} tokens of {flops:.4g} FLOPs (causal), {tokens * flops:.4g} in all"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", default=DEFAULT_RECIPE, help="a recipe (%(default)s)"
    )
    parser.add_argument(
        "--diff", metavar="FILE[:ARG]", help="print only how this other one differs"
    )
    parser.add_argument(
        "--json", action="store_true", help="as JSON, as a run's config.json holds it"
    )


def _no_more(overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"unexpected argument {overrides[0]!r}; see --help")


COMMANDS: dict[str, Command] = {
    "train": Command(
        train,
        _add_train,
        "Train a model, or go on where a run stopped.",
        f"""\
Trains to train.steps, evaluates the held-out text and prints a sample. The run's folder holds
the config, environment, metrics (JSON lines and TensorBoard) and checkpoints; started again the
run resumes from its latest checkpoint, on any number of devices.

  train --config=configs/gpt2.py:124m --config.optim.peak_lr=6e-4 --workdir=runs/mine

{OVERRIDES}
{EXITS}""",
    ),
    "eval": Command(
        evaluate,
        _add_evaluate,
        "Perplexity of a run's latest checkpoint, or of two, with intervals.",
        f"""\
Prints nats per token, token and word perplexity and bits per byte, each with a 95% interval from
a bootstrap over documents, and the convention, counts and fingerprints that they rest on. The
convention is config.eval: context, stride, prefix, documents.

  eval --workdir=runs/mine --config.eval.stride=64
  eval --workdir=runs/mine --set wiki=wiki.test.raw web=web.jsonl --html=report.html
  eval --compare runs/mine runs/other --set wiki=wiki.test.raw

{OVERRIDES}""",
    ),
    "tasks": Command(
        tasks,
        _add_tasks,
        "LAMBADA's last words and multiple choice, with intervals.",
        f"""\
Prints accuracy, and the perplexity of LAMBADA's last words, each with a 95% interval, beside the
convention and counts. They are the figures that lm-evaluation-harness calls acc, perplexity and
acc_bytes. Its own tasks (the extra `harness`) are fetched from a hub, unless --harness_path
describes local ones.

  tasks --workdir=runs/mine --lambada=lambada_test.jsonl --choices=hellaswag.jsonl
  tasks --workdir=runs/mine --harness arc_easy wikitext --limit=200

{OVERRIDES}""",
    ),
    "generate": Command(
        generate,
        _add_generate,
        "Continue a text, streaming to the terminal.",
        f"""\
Samples from a run's latest checkpoint, seeded; sample.* sets temperature (0 is greedy), top_k,
top_p, repetition_penalty, max_new_tokens, batch_size and stop.

  generate --workdir=runs/mine --prompt="KING." --config.sample.temperature=0.7

{OVERRIDES}""",
    ),
    "ask": Command(
        ask,
        _add_ask,
        "Put questions to a model that was taught to hold a dialogue.",
        f"""\
Each question is a dialogue of its own, in the model's own chat template.

  ask --workdir=models/smollm2 --config.sample.temperature=0 "What is the capital of France?"

{OVERRIDES}""",
    ),
    "chat": Command(
        chat,
        _add_chat,
        "Hold a dialogue of several turns.",
        f"""\
Reads a line from standard input for each turn; an empty one or its end (Ctrl-D) ends the
dialogue. When the context is full the oldest turns are forgotten, and that is said.

  chat --workdir=models/smollm2 --config.sample.temperature=0.7

{OVERRIDES}""",
    ),
    "import": Command(
        import_,
        _add_import,
        "Bring in a pretrained model: a Hugging Face folder or a GGUF file.",
        """\
Reads config.json, safetensors and tokenizer of the GPT-2 and Llama families, or a .gguf file
(dequantised; needs the extra `gguf`), checks every tensor, and writes a Hugging Face folder that
eval, generate, ask, chat, tasks and `train --from` take. Pickle files are refused: loading one runs
its code.

  import SmolLM2-135M-Instruct.Q4_1.gguf --out=models/smollm2
""",
    ),
    "export": Command(
        export,
        _add_export,
        "Write a model as a Hugging Face folder, which `transformers` loads.",
        f"""\
  export --workdir=runs/mine --out=models/mine

{OVERRIDES}""",
    ),
    "data": Command(
        data,
        _add_data,
        "Make a token store of text, jsonl or parquet files.",
        """\
Tokenises once into OUT/train and OUT/val: memory-mapped shards with a sha256 manifest. In a text
file the literal <|endoftext|> separates documents; a jsonl line or parquet row is a document.
Use the store by --config.data.sources="('OUT',)". `data show` prints batches.

  data books/*.txt --out=data/books --tokenizer=gpt2
""",
    ),
    "data show": Command(
        show,
        _add_show,
        "Print the exact text of a batch.",
        f"""\
A batch is a pure function of (seed, step). In double brackets stands what is read but not
scored; a double bar begins another document.

  data show --config=configs/shakespeare.py --step=100 --rows=2

{OVERRIDES}""",
    ),
    "config": Command(
        config,
        _add_config,
        "Print a resolved config, or how two differ.",
        f"""\
Every knob, with the parameters and FLOPs that follow from them.

  config --config=configs/gpt2.py:124m --diff=configs/modern.py

{OVERRIDES}""",
    ),
}
