"""A model served: it is opened, its programs are compiled, and requests are answered."""

from __future__ import annotations

import os
import time
from pathlib import Path

import jax

from gptjax import speak, trained
from gptjax.config import Config, UserError
from gptjax.progress import say
from gptjax.serve import api, app, engine
from gptjax.tokenizer import Tokenizer

TOKEN = "GPTJAX_SERVE_TOKEN"
NAMES = ["127.0.0.1", "localhost"]


def serve(
    model: trained.Trained,
    *,
    host: str,
    port: int,
    slots: int,
    token_file: Path | None,
    drain: float,
) -> int:
    """Serves a model until SIGTERM or Ctrl-C; the exit status.

    Args:
        slots: texts that are written at once.
        token_file: its text is what requests must bring; None: the variable `TOKEN`, if it is set.
        drain: seconds in which what was begun may end after the signal.

    Raises:
        UserError: on an address that others reach without a token; on several devices.
    """
    token = _token(token_file)
    if token is None and not app.is_loopback(host):
        raise UserError(
            f"--host={host} lets others in: put a token into a file and name it by --token_file, "
            f"or set {TOKEN}"
        )
    if not 1 <= slots <= 1024 or not 0 <= drain <= 86400:
        raise UserError("--slots must lie in 1 to 1024, --drain in 0 to 86400 seconds")
    if (count := len(jax.devices())) > 1:
        raise UserError(
            f"serve runs on one device, and {count} are here: show it one, by "
            "CUDA_VISIBLE_DEVICES=0 or its like"
        )

    def check(config: Config, tokenizer: Tokenizer) -> None:
        engine.check(config.model)

    with speak.opened(model, check) as speaker:
        config, weights, tokenizer = speaker
        del speaker
    texts = engine.Engine(config.model, weights, vocab_size=tokenizer.vocab_size, slots=slots)
    del weights
    began = time.monotonic()
    texts.warm_up()
    say(f"compiled in {time.monotonic() - began:.0f} s")
    say(f"rows computed at once: {', '.join(map(str, texts.sizes))}")
    if not texts.sure:
        say("here a row's last bits depend on its place, and so may an answer on what is beside it")
    name = str(model.folder).rstrip("/").rpartition("/")[2]
    served = api.Served(name, tokenizer, config.model.context, int(time.time()))
    hosts = NAMES if host in NAMES else None
    texts.start()
    try:
        return app.run(app.App(served, texts, token, hosts), host, port, drain)
    finally:
        texts.close()


def _token(file: Path | None) -> str | None:
    """What requests must bring.

    Raises:
        UserError: if that is nothing, or cannot stand in a header.
    """
    if file is None:
        token, where = os.environ.get(TOKEN), TOKEN
    else:
        token, where = file.read_text(encoding="utf-8").strip(), str(file)
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):  # fmt: skip
        raise UserError(f"{where} must hold a token: printable ASCII characters without blanks")
    return token
