"""Answers that a vLLM server draws from the policy as it is.

The server holds the model that a LoRA run begins with, and is handed the adapter through a folder
that both see, under a new name each time: what it kept of another adapter's prompts is not used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError

from upweight.errors import ModelError, OutputError
from upweight.models.attention import native_attention
from upweight.models.load import LanguageModel
from upweight.models.sample import Sample, room_for_responses
from upweight.models.weights import quiet_peft
from upweight.web import NoAnswer, post, shown

AT_ONCE = 256
"""Answers that are asked for side by side, which the server batches itself: of more, some would
wait for others as long as a request may take."""

SERVE = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --dtype DTYPE --enable-lora "
    "--max-lora-rank RANK --logprobs-mode processed_logprobs"
)

LOAD = "/v1/load_lora_adapter"


@dataclass(frozen=True)
class Server:
    """`url` as http://host:port; adapters lie in `folder` while the server draws from them."""

    url: str
    folder: Path
    timeout_seconds: float = 3600.0

    def ask(self, path: str, document: object) -> bytes:
        """Raises ModelError where the server does not answer."""
        # The name that vLLM itself reads its key from.
        key = os.environ.get("VLLM_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ModelError("VLLM_API_KEY holds characters that no header can. Set it anew.")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = self.url.rstrip("/") + path
        try:
            return post(url, document, self.timeout_seconds, headers)
        except NoAnswer as error:
            begin = f" The server is begun with  {SERVE}" if path == LOAD else ""
            raise ModelError(f"rollout.server: {url} {error}.{begin}") from None


class _Logprobs(BaseModel):
    token_logprobs: list[float]


class _Choice(BaseModel):
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str | None = None


class _Completion(BaseModel):
    model: str
    choices: list[_Choice]


def sample_by(
    server: Server,
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    num: int,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    max_length: int | None = None,
) -> list[list[Sample]]:
    """As `sample` at temperature 1, drawn by the server with the adapter that `lm` has.

    The random numbers are the server's own (vLLM 0.32 fails on a CPU where requests bring seeds),
    so that no two drawings are the same. That it draws from the policy is for the caller to see in
    the log-probs, which have to be those that it drew with: `require_processed`.

    Raises ModelError as `sample` does, for a server that does not answer, and for an answer that is
    none: of another prompt, number or length than was asked for, or without its tokens.
    """
    limits = room_for_responses(lm, prompts, max_new_tokens, max_length)
    stop = sorted(stop_token_ids)
    with handed_over(server, lm) as adapter:

        def ask(i: int) -> list[Sample]:
            asked = {
                **as_asked(adapter, prompts[i]),
                "n": num,
                "max_tokens": limits[i],
                "stop_token_ids": stop,
            }
            body = server.ask("/v1/completions", asked)
            wanted = Wanted(
                adapter, tuple(prompts[i]), num, limits[i], frozenset(stop), lm.vocab_size
            )
            return read_answers(body, wanted)

        pool = ThreadPoolExecutor(max(1, AT_ONCE // num))
        try:
            answers = [pool.submit(ask, i) for i in range(len(prompts))]
            for answer in as_completed(answers):
                answer.result()
            return [answer.result() for answer in answers]
        finally:
            pool.shutdown(cancel_futures=True)


def as_asked(adapter: str, prompt: Sequence[int]) -> dict[str, Any]:
    return {
        "model": adapter,
        "prompt": list(prompt),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        **UNBENT,
    }


def require_processed(server: Server, adapter: str, prompt: Sequence[int]) -> None:
    """Raises ModelError where the server says the model's log-probs and not those that it draws
    with, which would hide whatever bends them: of the likeliest token alone, drawn with top-k 1,
    the one is below 0 and the other is 0."""
    asked = {**as_asked(adapter, prompt), "n": 1, "max_tokens": 1, "top_k": 1}
    (choice,) = _parsed(server.ask("/v1/completions", asked)).choices
    if any(logp < -1e-6 for logp in choice.logprobs.token_logprobs):
        raise ModelError(
            f"rollout.server: {server.url} says the model's own log-probs and not those that it "
            "draws with. Begin it with --logprobs-mode processed_logprobs."
        )


UNBENT = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "watermarking": False,
}
"""The whole distribution: what is left out is taken from the model's generation config."""


@contextlib.contextmanager
def handed_over(server: Server, lm: LanguageModel) -> Generator[str]:
    """The name under which the server has the adapter, for as long as the block."""
    if not lm.has_adapter:
        raise ModelError("rollout.server: there is no adapter to hand over; train with lora.")
    name = f"upweight-{uuid.uuid4().hex}"
    folder = server.folder / name
    try:
        _write(lm, folder)
        server.ask(LOAD, {"lora_name": name, "lora_path": str(folder.resolve())})
        yield name
    finally:
        with contextlib.suppress(ModelError):
            server.ask("/v1/unload_lora_adapter", {"lora_name": name})
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # There are rounds in it.
            folder.parent.rmdir()


def _write(lm: LanguageModel, folder: Path) -> None:
    try:
        folder.parent.mkdir(exist_ok=True)
        for left in folder.parent.glob("upweight-*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with native_attention(lm.causal), quiet_peft():
            # Embeddings are not trained, and to look for others would ask the hub.
            lm.model.save_pretrained(folder, save_embedding_layers=False)  # pyright: ignore
        # The server may run as somebody else.
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"the adapter could not be written to {folder}: {error}.") from error


@dataclass(frozen=True)
class Wanted:
    """What was asked for: `num` answers of at most `limit` tokens, each up to a token of `stop`."""

    adapter: str
    prompt: tuple[int, ...]
    num: int
    limit: int
    stop: frozenset[int]
    vocab_size: int


def read_answers(body: bytes, wanted: Wanted) -> list[Sample]:
    """The answers that a completion holds. Raises ModelError where they are not what was asked."""
    found = _parsed(body)
    choices = sorted(found.choices, key=lambda choice: choice.index)
    if found.model != wanted.adapter:
        raise ModelError(
            f"rollout.server: the server answered with {shown(found.model)} and not with the "
            "adapter that it was handed."
        )
    if [choice.index for choice in choices] != list(range(wanted.num)):
        raise ModelError(
            f"rollout.server: the server gave {len(choices)} answers to a prompt where "
            f"{wanted.num} were asked for."
        )
    for choice in choices:
        _require_whole(choice, wanted)
    return [
        Sample(tuple(c.token_ids), c.token_ids[-1] in wanted.stop, tuple(c.logprobs.token_logprobs))
        for c in choices
    ]


def _parsed(body: bytes) -> _Completion:
    try:
        return _Completion.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"rollout.server: what the server answered is no completion with token_ids and their "
            f"logprobs ({where}: {first['msg']}). It has to be a vLLM that knows return_token_ids."
        ) from None


def _require_whole(choice: _Choice, wanted: Wanted) -> None:
    ids, logps, limit = choice.token_ids, choice.logprobs.token_logprobs, wanted.limit
    stops = [at for at, token in enumerate(ids) if token in wanted.stop]
    wrong = ""
    if tuple(choice.prompt_token_ids) != wanted.prompt:
        wrong = "is to another prompt than was sent"
    elif len(ids) != len(logps):
        wrong = f"has {len(ids)} tokens and {len(logps)} log-probs"
    elif not ids or len(ids) > limit:
        wrong = f"has {len(ids)} tokens, where 1 to {limit} were asked for"
    elif not 0 <= min(ids) <= max(ids) < wanted.vocab_size:
        wrong = f"holds a token that the model does not have ({max(ids)})"
    elif stops and stops[0] < len(ids) - 1:
        wrong = "goes on behind a stop token"
    elif not stops and len(ids) < limit:
        wrong = (
            f"ends after {len(ids)} of {limit} tokens without a stop token (finish_reason "
            f"{choice.finish_reason}): look at what the server caps, such as --max-model-len"
        )
    if wrong:
        raise ModelError(f"rollout.server: an answer of the server {wrong}.")
