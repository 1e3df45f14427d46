"""transformers' `generate` behind a small app, for served.py: FOLDER PORT.

One text at a time, as `generate` writes; who comes meanwhile waits.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

FOLDER, PORT = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
turn = threading.Lock()


class Queue(BaseStreamer):
    """The tokens of a text as they are drawn."""

    def __init__(self) -> None:
        import queue

        self.tokens: Any = queue.Queue()
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self.tokens.put(int(value[0]))
        self._prompt = False

    def end(self) -> None:
        self.tokens.put(None)


def events(asked: dict[str, Any]) -> Iterator[str]:
    read = tokenizer.apply_chat_template(
        asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def event(choices: list[Any], **more: Any) -> str:
        return f"data: {json.dumps({'model': FOLDER, 'choices': choices, **more})}\n\n"

    with turn, torch.inference_mode():
        streamer, ids, told = Queue(), [], ""
        options = {**read, "max_new_tokens": asked["max_tokens"], "do_sample": False}
        work = threading.Thread(target=model.generate, kwargs=options | {"streamer": streamer})
        work.start()
        while (token := streamer.tokens.get()) is not None:
            ids.append(token)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            new, told = text[len(told) :], text
            yield event([{"index": 0, "delta": {"content": new}, "finish_reason": None}])
        work.join()
    yield event([], usage={"completion_tokens": len(ids)})
    yield "data: [DONE]\n\n"


async def complete(request: Request) -> Response:
    # An iterator that is not asynchronous runs in a thread.
    return StreamingResponse(events(await request.json()), media_type="text/event-stream")


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": FOLDER, "object": "model"}]})


app = Starlette(
    routes=[
        Route("/v1/models", models),
        Route("/v1/chat/completions", complete, methods=["POST"]),
    ]
)
uvicorn.run(app, port=PORT, log_level="error")
