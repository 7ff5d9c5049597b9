"""A small OpenAI-compatible server: GET /v1/models, POST /v1/completions. One request is answered at a time.

`labs serve` starts it; it ends when its standard input does. What a request asks for and this does
not do is refused by name, never left out in silence. The form of requests and answers is that of OpenAI's reference of the
completions route; return_token_ids (ids in, ids out) and ignore_eos are vLLM's additions to it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from labsupport.checkpoint.serving.engines import Cyllama, Engine, Node, Sampling, Transformers

LARGEST_BODY = 2**22  # bytes
TIMEOUT = 60  # seconds that a client may take to send its request
# Parameters that are taken where they ask for nothing: these values, or null.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "stream": (False,), "logprobs": (), "stop": ([],), "suffix": (),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "stream_options": (),
}  # fmt: skip
HEEDED = ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "ignore_eos", "return_token_ids", "user")


class BadRequest(ValueError):
    """A request that is refused. status: of HTTP. parameter: what is wrong."""

    def __init__(self, message: str, parameter: str | None = None, status: int = 400):
        super().__init__(message)
        self.parameter, self.status = parameter, status


@dataclass(frozen=True)
class Asked:
    """prompts: tokens of each. ids: whether the tokens of the answers are wanted, too."""

    prompts: list[list[int]]
    sampling: Sampling
    ids: bool


def asked(body: Any, engine: Engine, name: str) -> Asked:
    """What a request of the completions route asks for. Raises BadRequest naming the parameter, what it got and what it wants."""
    if not isinstance(body, dict):
        raise BadRequest(f"the body is a {type(body).__name__}, wanted an object")
    for parameter, value in body.items():
        if parameter not in HEEDED and value is not None and value not in WITHOUT_EFFECT.get(parameter, ()):
            raise BadRequest(f"{parameter} is {value!r}, which this server does not do: leave it out", parameter)
    if body.get("model", name) != name:
        raise BadRequest(f"model is {body['model']!r}, this server has {name!r}", "model", 404)
    limit = _number(body, "max_tokens", int, 16, 1, engine.context)
    sampling = Sampling(
        limit,
        temperature=_number(body, "temperature", float, 1.0, 0, 2),
        top_p=_number(body, "top_p", float, 1.0, 0, 1),
        seed=_number(body, "seed", int, None, 0, 2**32 - 1),
        ignore_end=_flag(body, "ignore_eos"),
    )
    prompts = [_tokens(prompt, engine) for prompt in _prompts(body.get("prompt"))]
    for ids in prompts:
        if len(ids) + limit > engine.context:
            what = f"the prompt has {len(ids)} tokens and max_tokens is {limit}"
            raise BadRequest(f"{what}: together more than the context of {engine.context} tokens", "max_tokens")
    return Asked(prompts, sampling, _flag(body, "return_token_ids"))


def _number(body: dict[str, Any], name: str, kind: type, default: Any, least: float, most: float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not right or not least <= value <= most:  # NaN is not between them
        raise BadRequest(f"{name} is {value!r}, wanted {'a whole' if kind is int else 'a'} number from {least} to {most}", name)
    return kind(value)


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise BadRequest(f"{name} is {value!r}, wanted true or false", name)
    return bool(value)


def _prompts(prompt: Any) -> list[Any]:
    """One text or one list of tokens, or a list of such."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return prompt
    return [prompt]


def _tokens(prompt: Any, engine: Engine) -> list[int]:
    if isinstance(prompt, str):
        if not engine.has_tokenizer:
            raise BadRequest("the model has no tokenizer: send the prompt as a list of tokens", "prompt")
        ids = engine.encode(prompt)
    elif isinstance(prompt, list) and all(type(token) is int and 0 <= token < engine.vocabulary for token in prompt):
        ids = prompt
    else:
        raise BadRequest(f"prompt is neither a text nor a list of tokens from 0 to {engine.vocabulary - 1}", "prompt")
    if not ids:
        raise BadRequest("prompt has no token, wanted at least one", "prompt")
    return ids


def completion(asked: Asked, engine: Engine, name: str) -> dict[str, Any]:
    """The answer to a request, as OpenAI forms it."""
    choices, made = [], 0
    for index, ids in enumerate(asked.prompts):
        new, ended = engine.generate(ids, asked.sampling)
        made += len(new)
        choice = {"index": index, "text": engine.decode(new), "logprobs": None, "finish_reason": "stop" if ended else "length"}
        choices.append(choice | ({"prompt_token_ids": ids, "token_ids": new} if asked.ids else {}))
    read = sum(map(len, asked.prompts))
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
        "choices": choices,
        "usage": {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made},
    }


class Server(ThreadingHTTPServer):
    """An engine at an address. Raises OSError where the port is taken."""

    daemon_threads = True

    def __init__(self, host: str, port: int, engine: Engine, name: str):
        self.address_family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.engine, self.name = engine, name
        self.turn, self.started = threading.Lock(), int(time.time())
        super().__init__((str(address[0]), int(address[1])), Handler)


class Handler(BaseHTTPRequestHandler):
    """Every answer is JSON, also where something is wrong."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            about = {"id": self.server.name, "object": "model", "created": self.server.started, "owned_by": "labs"}
            self._answer(200, {"object": "list", "data": [about | {"max_model_len": self.server.engine.context}]})
        else:
            self._refuse(BadRequest(f"there is no GET {self.path}, wanted /v1/models", status=404))

    def do_POST(self) -> None:
        try:
            body = self._body()
            if self.path != "/v1/completions":
                raise BadRequest(f"there is no POST {self.path}, wanted /v1/completions", status=404)
            with self.server.turn:  # one model, one answer at a time
                answer = completion(asked(body, self.server.engine, self.server.name), self.server.engine, self.server.name)
        except BadRequest as error:
            self._refuse(error)
        except Exception as error:  # the server goes on; the client and the log are told
            traceback.print_exc()
            self._refuse(BadRequest(f"the engine failed: {type(error).__name__}: {error}", status=500))
        else:
            self._answer(200, answer)

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            self.close_connection = True  # what follows is not read
            raise BadRequest(f"Content-Length is {length!r}, wanted a number of at most {LARGEST_BODY} bytes", status=413)
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error

    def _refuse(self, error: BadRequest) -> None:
        kind = "server_error" if error.status == 500 else "invalid_request_error"
        self._answer(error.status, {"error": {"message": str(error), "type": kind, "param": error.parameter, "code": None}})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _end_with_the_launcher() -> None:
    """Standard input closes when the launcher is gone, however that came about: nobody would stop this server then."""
    sys.stdin.read()
    os._exit(0)


def _engine(options: argparse.Namespace) -> Engine:
    if options.engine == "node":
        return Node(options.path, options.node, options.package)
    return Cyllama(options.path) if options.engine == "cyllama" else Transformers(options.path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=("transformers", "cyllama", "node"))
    parser.add_argument("path", type=Path)
    for option in ("--name", "--host", "--node", "--package"):
        parser.add_argument(option)
    parser.add_argument("--port", type=int)
    options = parser.parse_args(arguments)
    try:
        server = Server(options.host, options.port, _engine(options), options.name)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    # What a shell starts in the background ignores SIGINT, and so would its children; this is how the launcher stops a server.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
