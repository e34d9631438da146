"""A server that speaks as much of vLLM's API as rollouts need, with a tiny model of transformers behind it.

It samples by its own code: whole texts through the model again for every token, `torch.multinomial` on what comes out.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class VllmLike:
    """What the server does, and what it was asked, in order."""

    def __init__(self, folder: Path) -> None:
        self.takes_weights = self.forgets = True
        self.keeps_old_weights = self.is_another = False
        """What else may be wrong with it."""
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.url = ""
        self._one_at_a_time = threading.Lock()
        self._load(folder)

    def _load(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self._one_at_a_time:
            self.asked.append(path)
            if path == "/v1/models":
                return 200, {"data": [] if self.is_another else [{"id": "models/base"}]}
            if path == "/v1/completions":
                self.requests.append(body)
                return 200, {"choices": [self._complete(**body)]}
            if not self.takes_weights:
                return 404, {"detail": "Not Found"}
            if path == "/reset_prefix_cache?reset_running_requests=true":
                return 200, {"success": self.forgets}
            assert (path, body["method"]) == ("/collective_rpc", "reload_weights")
            if not self.keeps_old_weights:
                self._load(Path(body["kwargs"]["weights_path"]))
            return 200, {"results": [None]}

    @torch.no_grad()
    def _complete(
        self, prompt: list[int], seed: int, temperature: float, max_tokens: int, min_tokens: int,
        stop_token_ids: list[int], **others: Any,
    ) -> dict[str, Any]:  # fmt: skip
        assert others == {"model": "models/base", "ignore_eos": True, "return_token_ids": True, "logprobs": 0}
        draw, tokens, logprobs = torch.Generator().manual_seed(seed), list[int](), list[float]()
        while len(tokens) < max_tokens and (not tokens or tokens[-1] not in stop_token_ids):
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1] / temperature
            if len(tokens) < min_tokens:
                logits[stop_token_ids] = -math.inf
            law = logits.log_softmax(dim=-1)
            tokens.append(int(torch.multinomial(law.exp(), 1, generator=draw)))
            logprobs.append(float(law[tokens[-1]]))
        reason = "stop" if tokens[-1] in stop_token_ids else "length"
        return {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}


@contextmanager
def serving(server: VllmLike) -> Iterator[VllmLike]:
    """Let it answer at `server.url` during the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._respond(None)

        def do_POST(self) -> None:
            self._respond(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null"))

        def _respond(self, body: Any) -> None:
            status, found = server.answer(self.path, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Not to the terminal."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # of http.server's 5, more than a few at once are turned away

    listening = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
