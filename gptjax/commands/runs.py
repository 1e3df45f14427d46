"""Commands that train and measure a run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from gptjax.commands.command import (
    DEFAULT_RECIPE,
    EXIT_FAILED,
    EXITS,
    OVERRIDES,
    RECIPE,
    WORKDIR,
    Command,
    add_distributed,
    add_run,
    check_model,
    check_outputs,
    model_of,
    no_more,
    prepare_jax,
)
from gptjax.config import UserError, flatten, to_dict
from gptjax.signals import again_on_sigterm
from gptjax.storage import Place, expand, for_files, local, patient


def _check_train(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax import configure, profile, setup

    profile.parse_steps(arguments.profile)
    recipe = arguments.config or DEFAULT_RECIPE
    _workdir(arguments, recipe)
    if arguments.branch is not None:
        configure.check(overrides)
        return
    config = configure.from_file(recipe, overrides)
    if arguments.start is None:  # else its names are of that model
        setup.check_names(config, folders=False)


@again_on_sigterm()
@patient()
def train(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(arguments.distributed)
    import jax

    from gptjax import (
        alive,
        branch,
        configure,
        decode,
        doctor,
        loop,
        places,
        profile,
        setup,
        speak,
        trained,
    )
    from gptjax.sharding import make_mesh

    if arguments.verify:
        places.forget()
    steps, recipe = profile.parse_steps(arguments.profile), arguments.config or DEFAULT_RECIPE
    workdir, begin = _workdir(arguments, recipe), None
    if arguments.branch is not None:
        config = configure.override(branch.of_run(arguments.branch, workdir), overrides)
    else:
        config = branch.resolve(configure.from_file(recipe, overrides))
    if arguments.start is not None:
        config, begin = trained.start_from(config, arguments.start, overrides)
    doctor.check(config, workdir)
    hang_seconds = config.train.hang_seconds
    with alive.watched(hang_seconds), jax.set_mesh(make_mesh(config.mesh)):
        speak.check_sample(config, setup.load_tokenizer(config))
        try:
            params = loop.train(config, workdir, begin, profile=steps)
        except loop.Diverged as error:
            if jax.process_index() == 0:
                error.write(workdir)
            raise
        if params is None:
            print(f"Its numbers are in {workdir}; `generate --workdir={workdir}` lets it speak.")
        else:
            config = setup.settle(config)
            weights = decode.cast(config.model, params)
            speak.generate(config, weights, setup.load_tokenizer(config))


def _workdir(arguments: argparse.Namespace, recipe: str) -> Place:
    from gptjax import configure

    branch = getattr(arguments, "branch", None)
    if branch == "":
        raise UserError("--branch takes RUN@STEP, or RUN alone for its latest checkpoint")
    if branch is not None and (arguments.workdir is None or arguments.config or arguments.start):
        raise UserError(
            "--branch takes the run's own config, its parameters and a folder: give --workdir "
            "and knobs, such as --config.train.steps=2000, and neither --config=FILE nor --from"
        )
    return arguments.workdir or Path("runs") / configure.find(recipe)[0].stem


def _add_workdir(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(default_folder=lambda a, recipe: ("--workdir", _workdir(a, recipe)))
    parser.add_argument(
        "--workdir", type=for_files, help="the run's folder; default: runs/ and the recipe's name"
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE[:ARG]", help=f"a recipe ({DEFAULT_RECIPE})")
    _add_workdir(parser)
    parser.add_argument(
        "--branch",
        metavar="RUN@STEP",
        help="begin with the state of another run and its config, at one of its checkpoints; "
        "RUN alone is the latest",
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=expand,
        metavar="DIR",
        help="fine-tune this pretrained model, a folder or hf:ORG/NAME[@REVISION]: its parameters, "
        "architecture and tokenizer",
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace these steps, both included, and print their time by part of the model",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every byte of the data, also of files that are as they were at an earlier start",
    )
    add_distributed(parser)


def examine(arguments: argparse.Namespace, overrides: list[str]) -> int:
    prepare_jax(arguments.distributed)
    import jax

    from gptjax import configure, doctor

    config = configure.from_file(arguments.config, overrides)
    workdir = _workdir(arguments, arguments.config)
    report = doctor.examine(config, workdir)
    if jax.process_index() == 0:
        if arguments.json:
            from gptjax.records import strict_json

            record = {
                "processes": [
                    {"host": host} | values
                    for host, values in zip(report.hosts, report.seen, strict=True)
                ],
                "faults": [fault._asdict() for fault in report.faults],
            }
            print(strict_json(record))
        else:
            doctor.show(report)
    return EXIT_FAILED if report.faults else 0


def _add_examine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", default=DEFAULT_RECIPE, help="a recipe (%(default)s)"
    )
    _add_workdir(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_distributed(parser)


def _check_evaluate(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax import configure
    from gptjax.evaluation import texts

    if (arguments.workdir is None) == (arguments.compare is None):
        raise UserError("eval takes either --workdir=DIR or --compare DIR DIR")
    if arguments.compare and arguments.config:
        raise UserError("--compare evaluates each run by its own config: leave --config out")
    if arguments.b_with and not arguments.compare:
        raise UserError("--b_with sets knobs of B: give two folders by --compare")
    texts.parse_sets(arguments.set)
    configure.check([f"--config.{knob}" for knob in arguments.b_with])
    check_model(arguments, overrides)


def evaluate(arguments: argparse.Namespace, overrides: list[str]) -> None:
    _check_evaluate(arguments, overrides)
    check_outputs(arguments)
    prepare_jax(arguments.distributed)
    import jax

    from gptjax import trained
    from gptjax.evaluation import audit, compare, pages, summary, texts
    from gptjax.report.page import write

    workdirs = arguments.compare or [arguments.workdir]
    of_b = [f"--config.{knob}" for knob in arguments.b_with]
    models = [
        trained.find(w, arguments.config, [*overrides, *more])
        for w, more in zip(workdirs, ([], of_b), strict=False)
    ]
    sets = texts.parse_sets(arguments.set)
    how = texts.Reading(arguments.text_key, arguments.domain_key, arguments.detokenizer)
    if not sets and how != texts.Reading():
        raise UserError(
            "--text_key, --domain_key and --detokenizer tell how the files of --set are read"
        )
    audits = [audit.audit(model, sets, how) for model in models]
    page: Callable[..., str]
    if arguments.compare:
        record = compare.compare(*audits)
        page, show = pages.comparison_page, summary.show_comparison
    else:
        record = audit.record(*audits)
        page, show = pages.page, summary.show
    if jax.process_index() != 0:
        return
    if arguments.html is not None:
        write(arguments.html, page(record, *audits))
    if arguments.json:
        from gptjax.records import strict_json

        print(strict_json(record))
    else:
        show(record)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=expand, help=WORKDIR)
    parser.add_argument(
        "--compare", type=expand, nargs=2, metavar=("A", "B"), help="two models instead"
    )
    parser.add_argument(
        "--b_with",
        nargs="+",
        action="extend",
        default=[],
        metavar="KNOB=VALUE",
        help="knobs of B alone, such as model.products=int8; A and B may then be one folder",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help=RECIPE)
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="texts to score: .txt .raw .jsonl .parquet, a token store, or "
        "hub:DATASET[@REVISION][,CONFIG],SPLIT; default: the held-out text of data.sources",
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
    parser.add_argument("--html", type=local, metavar="FILE", help="also a self-contained page")
    add_distributed(parser)


def _check_tasks(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax.evaluation.tasks import TASKS

    if not arguments.harness and all(getattr(arguments, name) is None for name in TASKS):
        raise UserError(f"tasks takes at least one of --{', --'.join(TASKS)}, --harness")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit={arguments.limit} is no positive number")
    check_model(arguments, overrides)


def tasks(arguments: argparse.Namespace, overrides: list[str]) -> None:
    _check_tasks(arguments, overrides)
    prepare_jax(arguments.distributed)
    import jax

    from gptjax import trained
    from gptjax.evaluation.tasks import TASKS, read_files, show
    from gptjax.evaluation.tasks import evaluate as evaluate_tasks

    model = model_of(arguments, overrides)
    files = {name: getattr(arguments, name) for name in TASKS}
    files = {name: file for name, file in files.items() if file is not None}
    lines = read_files(files, arguments.limit)
    if arguments.harness:
        from gptjax.evaluation import harness

        manager = harness.manager_of(arguments.harness, arguments.harness_path)
    with trained.opened(model) as opened:
        record = evaluate_tasks(model, opened, files, lines) if files else {}
        if arguments.harness:
            names, limit = arguments.harness, arguments.limit
            harness_results = harness.evaluate(opened, names, manager, limit)
            record["harness"] = harness.figures(harness_results)
    if jax.process_index() != 0:
        return
    if arguments.json:
        from gptjax.records import strict_json

        print(strict_json(record))
        return
    if files:
        show(record)
    if arguments.harness:
        print(harness.make_table(harness_results))


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--lambada", type=local, metavar="FILE", help='jsonl of {"text"}: guess its last word'
    )
    parser.add_argument(
        "--choices",
        type=local,
        metavar="FILE",
        help='jsonl of {"query", "choices", "gold"}: tell the right choice, by its index',
    )
    parser.add_argument(
        "--harness", nargs="+", metavar="TASK", help="tasks of EleutherAI's lm-evaluation-harness"
    )
    parser.add_argument(
        "--harness_path", type=local, metavar="DIR", help="where more of its tasks are described"
    )
    parser.add_argument("--limit", type=int, help="only so many lines or documents of each task")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def config(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(None)
    import jax

    from gptjax import accounting, configure, setup, sharding
    from gptjax.layers import attention

    run_config = configure.from_file(arguments.config, overrides)
    setup.check_names(run_config)
    if arguments.diff is not None:
        other_config = configure.from_file(arguments.diff)
        for knob, (a, b) in configure.difference(run_config, other_config).items():
            print(f"{knob}: {a!r} -> {b!r}")
        return
    if arguments.json:
        print(json.dumps(to_dict(run_config), indent=1))
        return
    for knob, value in flatten(dataclasses.asdict(run_config)).items():
        print(f"{knob} = {value!r}")
    tokens = run_config.train.steps * run_config.data.batch_size * run_config.model.context
    try:
        flops = accounting.train_flops_per_token(run_config, causal=True)
        costs = f" of {flops:.4g} FLOPs (causal), {tokens * flops:.4g} in all"
    except accounting.Uncountable:
        costs = ""
    print(f"# training: {tokens:.4g} tokens{costs}")
    shape = sharding.mesh_shape(run_config.mesh, jax.device_count())
    settled = attention.resolve(run_config.model, jax.default_backend())
    for line in accounting.costs(dataclasses.replace(run_config, model=settled), shape):
        print(f"# {line}")


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


def replay(arguments: argparse.Namespace, overrides: list[str]) -> int:
    no_more(overrides)
    prepare_jax(None)
    from gptjax import replay, trained

    begin = None if arguments.start is None else trained.start_of(arguments.start)
    record = replay.replay_run(arguments.workdir, begin)
    if arguments.json:
        from gptjax.records import strict_json

        print(strict_json(record))
    else:
        replay.show(record)
    return 0 if record["same"] else EXIT_FAILED


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workdir", type=expand, metavar="RUN_DIR", help="the run's folder, which is only read"
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=expand,
        metavar="DIR",
        help="the pretrained model that the run was begun from, where it was",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def status(arguments: argparse.Namespace, overrides: list[str]) -> None:
    no_more(overrides)
    from gptjax import status
    from gptjax.records import strict_json
    from gptjax.report import formats, terminal

    runs = status.statuses(arguments.folder)
    if arguments.json:
        print(strict_json([dataclasses.asdict(run) for run in runs]))
    elif runs:
        terminal.new_console().print(formats.terminal(status.table(runs)))
    else:
        print(f"{arguments.folder} holds no run")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=expand,
        nargs="?",
        default=Path("runs"),
        metavar="FOLDER",
        help="a run, a folder of runs, or a study's store (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON array, an object a run")


COMMANDS: dict[str, Command] = {
    "train": Command(
        train,
        _add_train,
        "Train a model, or go on where a run stopped.",
        f"""\
Trains to train.steps, evaluates the held-out text and prints a sample. The run's folder holds
the config, environment, metrics (JSON lines and TensorBoard) and checkpoints; started again the
run resumes from its latest checkpoint, on any number of devices. With a larger train.steps it
goes on beyond its end where that leaves its learning rates so far as they were (constant, wsd
before its decay), or once optim.schedule_steps says where they ended.

With --branch a new run begins with parameters, optimiser and step count of another, and with its
config, changed by what is given: a decay from each of several checkpoints of a constant rate, more
steps, another mixture. Its log begins behind that step. Join the curves by the step count: the
trunk's metrics.jsonl up to STEP, then the branch's. Give the same command again to go on.

  train --config=configs/gpt2.py:124m --config.optim.peak_lr=6e-4 --workdir=runs/mine
  train --branch=runs/mine@400 --workdir=runs/decayed --config.optim.schedule_steps=500
  train --profile=10:13 --workdir=runs/mine

{OVERRIDES}
{EXITS}""",
        _check_train,
    ),
    "doctor": Command(
        examine,
        _add_examine,
        "What each process of a job sees, and which host differs or is slow.",
        f"""\
Compares devices, versions, code, config, the run's folder (is it the same one everywhere, can it
be written, is there space), clocks, the rate of a matrix product and of a sum over all devices.
What differs is named, and so is a process below half of the median rate; the exit status is
then 1. `train` does this by itself before its first step where there are several processes; a
difference ends it, while a slow process, a clock and a disk that fills are told in a line.

  doctor --config=configs/gpt2.py:124m --workdir=/shared/runs/mine --distributed

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
convention is config.eval: context, stride, prefix, documents, max_tokens.

  eval --workdir=runs/mine --config.eval.stride=64
  eval --workdir=runs/mine --set wiki=wiki.test.raw web=web.jsonl --html=report.html
  eval --compare runs/mine runs/other --set wiki=wiki.test.raw
  eval --compare models/smollm2 models/smollm2 --b_with model.products=int8 --set wiki=wiki.test.raw

{OVERRIDES}""",
        _check_evaluate,
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
        _check_tasks,
    ),
    "status": Command(
        status,
        _add_status,
        "What the runs in a folder are doing: state, step, loss, rate, time left.",
        f"""\
One row for each run of a folder, or for the run that it is: running, queued (by a job of Slurm's
that waits), waiting (for its first step), stopped, killed (steps are lost that its log
has), diverged, failed, damaged or finished; where, and since when none of its files has changed.
Only reads, uses no device, and may be called while runs train. squeue, where there is one, is asked
for the jobs that `--on=slurm` submitted. The time left counts training alone, not evaluation and
saving. Runs of a study are told apart by their seed and by the knobs that most of them have
otherwise.

  status runs
  status runs/cells --json

{EXITS}""",
    ),
    "replay": Command(
        replay,
        _add_replay,
        "The run again, and proof that it is the same.",
        f"""\
Checks config, tokenizer and every byte of the data against what the run recorded; then trains it
again, in a temporary folder, and compares each number of its log. Bit for bit where versions,
code and devices are those of the run; elsewhere within a bound, saying what differs.

  replay runs/mine

{EXITS}""",
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
