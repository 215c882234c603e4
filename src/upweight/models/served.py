"""Answers that a vLLM server draws from the policy as it is.

The server holds the model that a LoRA run begins with, and is handed the adapter through a folder
that both see, under a new name each time: what it kept of another adapter's prompts is not used.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import uuid
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError

from upweight.errors import ModelError, OutputError
from upweight.models.attention import native_attention
from upweight.models.load import LanguageModel
from upweight.models.sample import Sample, room_for_responses
from upweight.models.weights import quiet_peft
from upweight.web import NoAnswer, post

AT_ONCE = 64
"""Prompts that the server is asked about side by side: it batches them itself."""

SERVE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank RANK"


@dataclass(frozen=True)
class Server:
    """`url` as http://host:port; adapters lie in `folder` while the server draws from them."""

    url: str
    folder: Path
    timeout_seconds: float = 600.0

    def ask(self, path: str, document: object) -> bytes:
        """Raises ModelError where the server does not answer."""
        # The name that vLLM itself reads its key from.
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = self.url.rstrip("/") + path
        try:
            return post(url, document, self.timeout_seconds, headers)
        except NoAnswer as error:
            raise ModelError(f"rollout.server: {url} {error}. It is begun with  {SERVE}") from None


class _Logprobs(BaseModel):
    token_logprobs: list[float]


class _Choice(BaseModel):
    index: int
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice]


def sample_by(
    server: Server,
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    num: int,
    max_new_tokens: int,
    seed: int,
    stop_token_ids: Collection[int],
    max_length: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Sample]]:
    """As `sample` at temperature 1, drawn by the server with the adapter that `lm` has.

    The random numbers are the server's own, seeded prompt by prompt; what else is in its batches
    may still change the last bit of a probability, and an answer with it. That what it draws from
    is the policy is for the caller to see in the log-probs.

    Raises ModelError as `sample` does, for a server that does not answer, and for an answer that is
    none: of another number or length than was asked for, or without its tokens.
    """
    limits = room_for_responses(lm, prompts, max_new_tokens, max_length)
    first = random.Random(seed).randrange(2**62)
    stop = sorted(stop_token_ids)
    with _handed_over(server, lm) as adapter:

        def ask(i: int) -> list[Sample]:
            asked = {
                "model": adapter,
                "prompt": list(prompts[i]),
                "n": num,
                "max_tokens": limits[i],
                # Of several answers each has the next seed.
                "seed": first + i * num,
                "stop_token_ids": stop,
                "ignore_eos": True,
                "logprobs": 0,
                "return_token_ids": True,
                **UNBENT,
            }
            body = server.ask("/v1/completions", asked)
            return read_answers(body, num, limits[i], frozenset(stop), lm.vocab_size)

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            answers = [pool.submit(ask, i) for i in range(len(prompts))]
            for done, answer in enumerate(as_completed(answers), start=1):
                answer.result()
                on_progress(done, len(prompts))
            return [answer.result() for answer in answers]
        finally:
            pool.shutdown(cancel_futures=True)


UNBENT = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""The whole distribution: what is left out is taken from the model's generation config."""


@contextlib.contextmanager
def _handed_over(server: Server, lm: LanguageModel) -> Generator[str]:
    """The name under which the server has the adapter, for as long as the block."""
    server.folder.mkdir(exist_ok=True)
    for left in server.folder.glob("upweight-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    name = f"upweight-{uuid.uuid4().hex}"
    folder = server.folder / name
    try:
        try:
            with native_attention(lm.causal), quiet_peft():
                lm.model.save_pretrained(folder)  # pyright: ignore
            # The server may run as somebody else.
            folder.chmod(0o755)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"the adapter could not be written to {folder}: {error}.") from error
        said = {"lora_name": name, "lora_path": str(folder.resolve())}
        server.ask("/v1/load_lora_adapter", said)
        try:
            yield name
        finally:
            with contextlib.suppress(ModelError):
                server.ask("/v1/unload_lora_adapter", {"lora_name": name})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_answers(
    body: bytes, num: int, limit: int, stop: frozenset[int], vocab_size: int
) -> list[Sample]:
    """The `num` answers of at most `limit` tokens that a completion holds. Raises ModelError where
    it is none."""
    try:
        choices = _Completion.model_validate_json(body).choices
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"rollout.server: what the server answered is no completion with token_ids and their "
            f"logprobs ({where}: {first['msg']}). It has to be a vLLM that knows return_token_ids."
        ) from None
    choices = sorted(choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(num)):
        raise ModelError(
            f"rollout.server: the server gave {len(choices)} answers to a prompt where {num} were "
            "asked for."
        )
    for choice in choices:
        _require_whole(choice, limit, stop, vocab_size)
    return [
        Sample(tuple(c.token_ids), c.token_ids[-1] in stop, tuple(c.logprobs.token_logprobs))
        for c in choices
    ]


def _require_whole(choice: _Choice, limit: int, stop: frozenset[int], vocab_size: int) -> None:
    ids, logps = choice.token_ids, choice.logprobs.token_logprobs
    stops = [at for at, token in enumerate(ids) if token in stop]
    wrong = ""
    if len(ids) != len(logps):
        wrong = f"has {len(ids)} tokens and {len(logps)} log-probs"
    elif not ids or len(ids) > limit:
        wrong = f"has {len(ids)} tokens, where 1 to {limit} were asked for"
    elif not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = f"holds a token that the model does not have ({max(ids)})"
    elif stops and stops[0] < len(ids) - 1:
        wrong = "goes on behind a stop token"
    elif not stops and len(ids) < limit:
        wrong = (
            f"ends after {len(ids)} of {limit} tokens without a stop token (finish_reason "
            f"{choice.finish_reason}): is the server's --max-model-len too small?"
        )
    if wrong:
        raise ModelError(f"rollout.server: an answer of the server {wrong}.")
