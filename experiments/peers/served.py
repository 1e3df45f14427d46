"""gptjax's server beside others, on one machine, in turns.

    python experiments/peers/served.py --folder=models/smollm2 --gguf=SmolLM2.gguf --out=runs/serve

Each server runs in a process of its own, and the sides take turns (A B A B ...). It is asked by 1, 8
and 32 clients at once, each of which sends one chat after another and reads the answer as a stream.
Every question is another one, so that nobody answers from a cache of prompts. OUT gets results.md and
results.json, anew after each turn. Nothing is judged.

What is measured, with each number of clients:

  tokens/s         of all answers together, from the first question to the last answer; as the server
                   counts them.
  first token, s   from a question to the first text of its answer: the median, and what nine of ten
                   stay below.

The sides:

  gptjax           `launch.py serve`, float32, and with model.products=int8.
  transformers     its `generate`, float32, behind a small app of the same kind (plain_server.py), which
                   writes one text at a time.
  llama.cpp        its own server (xllamacpp), on the .gguf file with the file's quantisation.

What is not installed is left out and named: pip install -e ".[serve,peers,test]".
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from run import check_paths, describe_machine, guarded, order

from gptjax.config import UserError
from gptjax.storage import replace_file

HERE = Path(__file__).parent
QUESTIONS = HERE.parents[1] / "gptjax" / "data" / "assets" / "shakespeare.txt"
WORDS = 60  # of a question
SLOTS, CONTEXT = 32, 512
STARTS_IN = 600.0  # seconds, in which a server has to answer

# llama.cpp's server listens by itself.
LLAMACPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = sys.argv[1], {slots}, {slots} * {context}
params.hostnames, params.port, params.verbosity = ["127.0.0.1"], int(sys.argv[2]), -1
params.cache_prompt = False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
while True:
    time.sleep(3600)
"""


class Asked(NamedTuple):
    """What one question cost: seconds to its first text, and its tokens."""

    first: float
    tokens: int


def sides(arguments: argparse.Namespace) -> dict[str, Callable[[int], list[str]]]:
    """The command of each server, for a port."""
    folder, python = arguments.folder, sys.executable
    launch = [python, str(HERE.parents[1] / "launch.py"), "serve", f"--workdir={folder}"]
    launch += [f"--slots={SLOTS}", f"--config.model.context={CONTEXT}"]
    ours: dict[str, Callable[[int], list[str]]] = {
        "gptjax": lambda port: [*launch, f"--port={port}"],
        "gptjax, int8": lambda port: [*launch, f"--port={port}", "--config.model.products=int8"],
        "transformers": lambda port: [
            python, str(HERE / "plain_server.py"), str(folder), str(port)
        ],
    }  # fmt: skip
    if arguments.gguf:
        code = LLAMACPP.format(slots=SLOTS, context=CONTEXT)
        ours["llama.cpp"] = lambda port: [python, "-c", code, str(arguments.gguf), str(port)]
    return {name: ours[name] for name in ours if name in arguments.sides or not arguments.sides}


@contextlib.contextmanager
def server(command: list[str], port: int) -> Iterator[str]:
    """Its address, once it answers; it ends with the context."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (its last line may be asked for)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
    )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + STARTS_IN
    try:
        while True:
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                lines = log.read().strip().splitlines() or ["it does not answer"]
                raise UserError(lines[-1])
            try:
                if httpx.get(f"{url}/v1/models", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def ask(client: httpx.AsyncClient, url: str, model: str, text: str, tokens: int) -> Asked:
    body = {
        "model": model, "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0,
    }  # fmt: skip
    began, first, count = time.monotonic(), None, 0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise UserError((await answer.aread()).decode(errors="replace")[:200])
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
            if first is None and any(c.get("delta", {}).get("content") for c in event["choices"]):
                first = time.monotonic() - began
    return Asked(time.monotonic() - began if first is None else first, count)


async def load(url: str, questions: Iterator[str], clients: int, each: int, tokens: int) -> Any:
    """What `clients` at once see, of which each asks so many questions."""
    async with httpx.AsyncClient(
        timeout=None, limits=httpx.Limits(max_keepalive_connections=0)
    ) as client:
        model = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
        await ask(client, url, model, next(questions), 4)  # the first is not like the others

        async def talk() -> list[Asked]:
            return [await ask(client, url, model, next(questions), tokens) for _ in range(each)]

        began = time.monotonic()
        asked = [one for talks in await asyncio.gather(*(talk() for _ in range(clients))) for one in talks]  # fmt: skip
        seconds = time.monotonic() - began
    firsts = sorted(one.first for one in asked)
    return {
        "tokens/s": sum(one.tokens for one in asked) / seconds,
        "first token, s": statistics.median(firsts),
        "first token of nine in ten, s": firsts[min(len(firsts) - 1, int(0.9 * len(firsts)))],
        "tokens": sum(one.tokens for one in asked),
    }


def questions_of(text: str) -> Iterator[str]:
    words = text.split()
    for start in range(0, len(words) - WORDS, WORDS):
        yield "Go on: " + " ".join(words[start : start + WORDS])


def table(record: dict[str, Any]) -> str:
    """The Markdown of a record of `main`."""
    machine, runs = record["machine"], record["runs"]
    loads = [run["load"] for run in runs] or [0.0]
    lines = [
        f"Measured on {machine['date']} on {machine['processor']}, {machine['cores']} cores, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f". Rounds: {record['rounds']}; answers of {record['tokens']} tokens at most. Medians over "
        "rounds, with the least and the most. Load average before a turn: "
        f"{min(loads):.1f} to {max(loads):.1f}.",
        "",
        "| clients | side | tokens/s | first token, s | of nine in ten |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    done = [run for run in runs if "failed" not in run]
    for clients, side in dict.fromkeys((run["clients"], run["side"]) for run in sorted(done, key=lambda r: r["clients"])):  # fmt: skip
        mine = [r for r in done if (r["clients"], r["side"]) == (clients, side)]
        cells = []
        for what in ("tokens/s", "first token, s", "first token of nine in ten, s"):
            values = [run[what] for run in mine]
            middle, least, most = (f(values) for f in (statistics.median, min, max))
            cells.append(f"{middle:.2f} ({least:.2f} to {most:.2f})")
        lines.append(f"| {clients} | {side} | {' | '.join(cells)} |")
    lines += [f"\nfailed: {run['side']}: {run['failed']}" for run in runs if "failed" in run]
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace, out: Path) -> int:
    runs: list[dict[str, Any]] = []
    record = {"machine": describe_machine(), "rounds": arguments.rounds, "tokens": arguments.tokens}
    record["runs"] = runs
    questions, gone = questions_of(QUESTIONS.read_text()), set()
    commands = sides(arguments)
    for number, _, side in order(list(commands), arguments.rounds, [""]):
        if side in gone:
            continue
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        about = {"side": side, "round": number, "load": os.getloadavg()[0]}
        try:
            with server(commands[side](port), port) as url:
                for clients in arguments.clients:
                    seen = asyncio.run(load(url, questions, clients, arguments.each, arguments.tokens))  # fmt: skip
                    runs.append(about | {"clients": clients} | seen)
                    print(runs[-1], flush=True)
        except (UserError, httpx.HTTPError) as error:
            runs.append(about | {"clients": 0, "failed": str(error) or repr(error)})
            print(runs[-1], flush=True)
            gone.add(side)
        replace_file(out / "results.json", (json.dumps(record, indent=1) + "\n").encode())
        replace_file(out / "results.md", table(record).encode())
    print(f"\n{table(record)}\nwritten: {out}/results.md, results.json")
    return int(bool(gone))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda words: [int(word) for word in words.split(",")]  # noqa: E731
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="the model as a Hugging Face folder")
    add("--gguf", type=Path, help="the model as llama.cpp reads it")
    add("--out", type=Path, required=True, help="folder for the results, new or without any")
    add("--clients", type=numbers, default=[1, 8, 32], help="at once, default 1,8,32")
    add("--each", type=int, default=2, help="questions of a client, default %(default)s")
    add("--tokens", type=int, default=64, help="of an answer, default %(default)s")
    add("--rounds", type=int, default=3, help="turns of each side, default %(default)s")
    add("--sides", default="", help="some of the sides alone, with ; between")
    arguments = parser.parse_args(words)
    arguments.sides = [side for side in arguments.sides.split(";") if side]

    def check_and_run() -> int:
        check_paths(arguments.out, None, arguments.folder, arguments.gguf)
        return run(arguments, arguments.out)

    return guarded("served", arguments.out, check_and_run)


if __name__ == "__main__":
    sys.exit(main())
