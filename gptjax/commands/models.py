"""Commands that let a model speak, bring it in and take it out."""

from __future__ import annotations

import argparse
import dataclasses
import functools

from gptjax.commands.command import (
    OVERRIDES,
    RECIPE,
    WORKDIR,
    Command,
    add_run,
    check_model,
    model_of,
    no_more,
    prepare_jax,
)
from gptjax.config import check_seed
from gptjax.storage import expand, local


def _check_generate(arguments: argparse.Namespace, overrides: list[str]) -> None:
    if arguments.seed is not None:
        check_seed(arguments.seed)
    check_model(arguments, overrides)


def generate(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(arguments.distributed)
    trained_model = model_of(arguments, overrides)
    from gptjax import speak

    config = trained_model.config
    if arguments.prompt is not None:
        sample = dataclasses.replace(config.sample, prompt=arguments.prompt)
        config = dataclasses.replace(config, sample=sample)
    if arguments.seed is not None:
        config = dataclasses.replace(config, seed=arguments.seed)
    with speak.opened(trained_model._replace(config=config), speak.check_sample) as speaker:
        speak.generate(*speaker)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--prompt", help="the text to go on from; default: sample.prompt")
    parser.add_argument("--seed", type=int, help="of the sampling; default: the run's seed")


def ask(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(arguments.distributed)
    trained_model = model_of(arguments, overrides)
    from gptjax import speak

    system = speak.system_turn(arguments.system)
    dialogues = [[*system, {"role": "user", "content": q}] for q in arguments.questions]
    check = functools.partial(speak.check_dialogues, dialogues=dialogues)
    with speak.opened(trained_model, check) as speaker:
        for question, dialogue in zip(arguments.questions, dialogues, strict=True):
            speak.print_text(f"> {question}")
            speak.answer(*speaker, dialogue)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--system", help="what stands before the dialogue; default: the template's")


def _add_ask(parser: argparse.ArgumentParser) -> None:
    _add_chat(parser)
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help="each is asked afresh")


def chat(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(arguments.distributed)
    trained_model = model_of(arguments, overrides)
    from gptjax import speak

    check = functools.partial(speak.check_chat, system=arguments.system)
    with speak.opened(trained_model, check) as speaker:
        speak.chat(*speaker, arguments.system)


def import_(arguments: argparse.Namespace, overrides: list[str]) -> None:
    no_more(overrides)
    prepare_jax(None)
    from gptjax.accounting import parameters
    from gptjax.interop import pretrained

    model = pretrained.import_(arguments.source, arguments.out, arguments.quantised)
    count = parameters(model)["total"]
    print(
        f"{arguments.out}: {count:,} parameters, {model.layers} layers of width {model.width}, "
        f"context {model.context}, vocabulary {model.vocab_size:,}"
    )


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=expand, help="hf:ORG/NAME, a Hugging Face folder or a .gguf file"
    )
    parser.add_argument("--out", type=local, required=True, help="the folder to make")
    parser.add_argument(
        "--quantised",
        action="store_true",
        help="keep a .gguf file as it is: on one CPU text is generated from its blocks of 4 and 8 bits",
    )


def export(arguments: argparse.Namespace, overrides: list[str]) -> None:
    prepare_jax(None)
    trained_model = model_of(arguments, overrides)
    from gptjax import trained
    from gptjax.interop import hf, peft
    from gptjax.trainable import has_adapters

    how = f"as {arguments.dtype}"
    with trained.opened(trained_model) as model:
        config, params, name = model.config, model.params, model.tokenizer.name
        if arguments.adapter:
            base, dropout = trained.base_of(trained_model), config.train.lora_dropout
            peft.export(arguments.out, config.model, params, base, dropout, arguments.dtype)
            how += f", adapters of {base}"
        else:
            if has_adapters(params):
                params, moved = peft.merge(config.model, params)
                how += f", adapters merged, which moves logits by {moved:.1e} of their size"
            hf.export(arguments.out, config.model, params, name, arguments.dtype)
    print(f"{arguments.out}: step {model.step} of {arguments.workdir}, {how}")


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--out", type=local, required=True, help="the folder to make")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the tensors (%(default)s, which keeps every bit)",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="only the adapters, as peft opens them, of a run with train.trainable=lora or qlora",
    )


def serve(arguments: argparse.Namespace, overrides: list[str]) -> int:
    prepare_jax(None)
    trained_model = model_of(arguments, overrides)
    from gptjax.serve import serve

    return serve.serve(
        trained_model,
        host=arguments.host,
        port=arguments.port,
        slots=arguments.slots,
        token_file=arguments.token_file,
        drain=arguments.drain,
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", type=expand, required=True, help=WORKDIR)
    add("--config", metavar="FILE[:ARG]", help=RECIPE)
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="(%(default)s); 0 takes a free one")
    add("--slots", type=int, default=8, metavar="N", help="texts written at once (%(default)s)")
    add("--token_file", type=local, metavar="FILE", help="holds the token that requests must bring")
    add("--drain", type=float, default=30, metavar="S", help="seconds to finish in (%(default)s)")


COMMANDS: dict[str, Command] = {
    "generate": Command(
        generate,
        _add_generate,
        "Continue a text, streaming to the terminal.",
        f"""\
Samples from a run's latest checkpoint, seeded; sample.* sets temperature (0 is greedy), top_k,
top_p, repetition_penalty, max_new_tokens, batch_size and stop.

  generate --workdir=runs/mine --prompt="KING." --config.sample.temperature=0.7

{OVERRIDES}""",
        _check_generate,
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
    "serve": Command(
        serve,
        _add_serve,
        "Let other programs ask a model, by OpenAI's API.",
        f"""\
Answers /v1/completions and /v1/chat/completions as OpenAI's clients ask them, many at once, on one
device (the extra `serve`). The page at / talks to the model. Until this machine alone can reach it,
as at 127.0.0.1, every request must bring a token, which is read from --token_file or the variable
GPTJAX_SERVE_TOKEN. SIGTERM finishes what was begun, for --drain seconds at most.

  serve --workdir=models/smollm2 --config.model.context=1024

{OVERRIDES}""",
    ),
    "import": Command(
        import_,
        _add_import,
        "Bring in a pretrained model, by name, from a Hugging Face folder or a GGUF file.",
        """\
Reads config.json, safetensors and tokenizer of the GPT-2 and Llama families, or a .gguf file
(dequantised; needs the extra `gguf`), checks every tensor, and writes a Hugging Face folder that
eval, generate, ask, chat, tasks and `train --from` take. Pickle files are refused: loading one runs
its code.

With --quantised the folder holds the .gguf file itself. On one CPU generate, ask, chat and serve
then multiply by its blocks of Q8_0, Q4_0 and Q4_1 as they are, which rounds nothing; all else, and
model.products=int8, dequantises when the model is loaded.

  import SmolLM2-135M-Instruct.Q4_1.gguf --out=models/smollm2
  import hf:HuggingFaceTB/SmolLM2-135M-Instruct --out=models/smollm2

By name a model comes from the Hugging Face hub (the extra `hub`), into the hub's own cache; each of
these commands takes the name itself as well. hf:ORG/NAME@REVISION is a branch, a tag or a commit.
""",
    ),
    "export": Command(
        export,
        _add_export,
        "Write a model as a Hugging Face folder, which `transformers` loads.",
        f"""\
  export --workdir=runs/mine --out=models/mine
  export --workdir=runs/tuned --out=adapters/tuned --adapter

Adapters that were trained are merged into their matrices, unless --adapter writes them alone.

{OVERRIDES}""",
    ),
}
