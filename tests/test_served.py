"""Answers that a vLLM server draws. The server here is one of ours that answers as vLLM does, with
the adapter that it was handed; what a real one answers is in LOG.md."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addresses import serving
from runs import furnish_rewarded, online, records, train
from upweight.errors import ModelError, OutputError
from upweight.models.adapter import add_lora
from upweight.models.load import LanguageModel, load
from upweight.models.sample import sample
from upweight.models.served import Server, Wanted, read_answers, sample_by
from upweight.models.weights import load_weights

LORA = ("--lora.rank", "4", "--learning-rate", "3e-2")
Answer = Callable[[str, Any], tuple[int, bytes]]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish_rewarded(tmp_path, monkeypatch)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Vllm:
    """What `vllm serve model --enable-lora` answers; `asked` is all that it was asked. It draws
    from the first adapters that it `heeds`, and then from what it serves."""

    def __init__(self, *, heeds: int = 99, processed: bool = True) -> None:
        self.heeds, self.processed = heeds, processed
        self.models: dict[str, LanguageModel] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.turn = threading.Lock()

    def __call__(self, path: str, said: dict[str, Any]) -> tuple[int, bytes]:
        with self.turn:
            self.asked.append((path, said))
            match path:
                case "/v1/load_lora_adapter":
                    assert said["lora_name"] not in self.models, "vLLM refuses a name it knows"
                    self.heeds -= 1
                    folder = said["lora_path"] if self.heeds >= 0 else "model"
                    modes = {file.stat().st_mode & 0o777 for file in Path(folder).iterdir()}
                    assert folder == "model" or modes == {0o644}, "somebody else may read it"
                    self.models[said["lora_name"]] = _float32(folder)
                    return 200, b"Success: it was added."
                case "/v1/unload_lora_adapter":
                    del self.models[said["lora_name"]]
                    return 200, b"Success: it was removed."
                case "/v1/completions":
                    return 200, answer(said["model"], self.choices(said))
                case _:
                    return 404, b"no such place"

    def choices(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        drawn = sample(
            self.models[said["model"]],
            [said["prompt"]],
            num=said["n"],
            max_new_tokens=said["max_tokens"],
            temperature=0 if said["top_k"] == 1 and self.processed else 1,
            seed=len(self.asked),
            stop_token_ids=said.get("stop_token_ids", [2]),
        )
        found = [
            choice(i, s.tokens, s.logps, "stop" if s.stopped else "length", said["prompt"])
            for i, s in enumerate(drawn[0])
        ]
        return found[::-1]  # by their index alone is it known which is which


def _float32(folder: str) -> LanguageModel:
    # An adapter's folder has no tokenizer.
    return load("model", dtype="float32", weights=load_weights(folder, folder, False))


def answer(model: str, choices: Any) -> bytes:
    return json.dumps({"model": model, "choices": choices}).encode()


PROMPT = (65, 66)


def choice(
    index: int, tokens: Any, logps: Any, ended: str = "stop", prompt: Any = PROMPT
) -> dict[str, Any]:
    said = {"token_logprobs": list(logps), "tokens": ["?"] * len(logps)}
    return {
        "index": index, "text": "?", "prompt_token_ids": list(prompt), "token_ids": list(tokens),
        "logprobs": said, "finish_reason": ended,
    }  # fmt: skip


def answers(*choices: dict[str, Any]) -> Answer:
    """A server that takes any adapter and gives these choices for every prompt."""
    return lambda path, said: (200, answer(said.get("model", ""), choices))


@pytest.mark.parametrize("objective", ["grpo", "ppo", "online_dpo"])
def test_a_run_learns_from_answers_that_a_server_draws_from_its_adapter(
    objective: str, capsys: pytest.CaptureFixture[str]
):
    server = Vllm()
    passes = ("--passes", "1", "--responses", "3")
    with serving(server) as url:
        assert online("run", objective, *LORA, *passes, "--server", url) == 0
    assert f"rollout.server: {url} draws from the adapter" in capsys.readouterr().err
    asked = [said for path, said in server.asked if path == "/v1/completions" and said["n"] == 3]
    assert len(asked) == 4 * 4, "four rounds of four prompts"
    assert len({said["model"] for said in asked}) == 4, "an adapter for each round"
    for said in asked:
        del said["model"], said["prompt"]
        assert said == {
            "n": 3, "max_tokens": 8, "stop_token_ids": [2], "ignore_eos": True, "logprobs": 0,
            "return_token_ids": True, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "watermarking": False,
        }  # fmt: skip
    assert server.models == {} and list(Path("run/rollouts").glob("upweight-*")) == []
    assert len(records("run", "train")) == 4


@pytest.mark.parametrize(("adapters", "steps"), [(0, 0), (2, 1), (4, 2)])
def test_a_server_that_does_not_draw_from_the_adapter_is_refused(
    adapters: int, steps: int, capsys: pytest.CaptureFixture[str]
):
    """At once, although the run's own first adapter is the identity; or from a later round on."""
    with serving(Vllm(heeds=adapters)) as url:
        assert online("run", "grpo", *LORA, "--responses", "3", "--server", url) == 2
    said = capsys.readouterr().err
    assert f"what draws at {url} is not the policy" in said and "same model, in compute" in said
    if steps:
        assert len(records("run", "train")) == steps
    else:
        assert not Path("run").exists()


def test_a_server_that_says_other_log_probs_than_it_draws_with_is_refused(
    capsys: pytest.CaptureFixture[str],
):
    with serving(Vllm(processed=False)) as url:
        assert online("run", "grpo", *LORA, "--responses", "3", "--server", url) == 2
    assert "--logprobs-mode processed_logprobs" in capsys.readouterr().err


def test_a_start_that_no_server_can_hold_is_refused(capsys: pytest.CaptureFixture[str]):
    assert train("first", "--steps", "1", "--lora.rank", "2", "--samples", "0") == 0
    more = ("--model", "first/model", "--server", "http://127.0.0.1:1", "--responses", "2")
    assert online("run", "grpo", *LORA, *more) == 2
    assert "no server can hold first/model" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named_with_how_it_is_begun(
    capsys: pytest.CaptureFixture[str],
):
    with serving(Vllm()) as url:
        pass
    assert online("run", "grpo", *LORA, "--responses", "2", "--server", url) == 2
    said = capsys.readouterr().err
    assert f"{url}/v1/load_lora_adapter cannot be reached" in said and "vllm serve MODEL" in said
    assert "Traceback" not in said


def test_a_server_that_takes_no_adapters_is_quoted():
    said = "answered 404 .*Not Found.*ALLOW_RUNTIME_LORA"
    with (
        serving(lambda path, _: (404, b'{"detail":"Not Found"}')) as url,
        pytest.raises(ModelError, match=said),
    ):
        asked(url)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([choice(0, [65], [-1.0], prompt=[65]), choice(1, [65], [-1.0])], "to another prompt"),
        ([choice(0, [65], [-1.0])], "gave 1 answers to a prompt where 2 were asked for"),
        ([choice(0, [65, 66], [-1.0])] * 2, r"gave 2 answers to a prompt where 2"),
        ([choice(0, [65] * 9, [-1.0] * 9), choice(1, [65], [-1.0])], "has 9 tokens, where 1 to 8"),
        ([choice(0, [], []), choice(1, [65], [-1.0])], "has 0 tokens"),
        ([choice(0, [65, 66], [-1.0]), choice(1, [65], [-1.0])], "2 tokens and 1 log-probs"),
        ([choice(0, [9999], [-1.0]), choice(1, [65], [-1.0])], r"does not have \(9999\)"),
        ([choice(0, [2, 65], [-1, -1]), choice(1, [65], [-1.0])], "goes on behind a stop token"),
        ([choice(0, [65], [-1.0], "length")] * 1 + [choice(1, [2], [-1])], "after 1 of 8 tokens"),
        ([{"index": 0, "text": "as plain OpenAI answers"}], "token_ids: .*return_token_ids"),
    ],
)
def test_an_answer_that_is_none_is_refused(choices: list[dict[str, Any]], said: str):
    with serving(answers(*choices)) as url, pytest.raises(ModelError, match=said):
        asked(url)


def asked(url: str, lm: LanguageModel | None = None) -> object:
    server, lm = Server(url, Path("rollouts")), lm or adapted()
    return sample_by(server, lm, [PROMPT], num=2, max_new_tokens=8, stop_token_ids=[2])


def adapted() -> LanguageModel:
    lm = _float32("model")
    return add_lora(lm, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)


def test_what_a_killed_run_left_is_cleared_away():
    Path("rollouts/upweight-dead").mkdir(parents=True)
    Path("rollouts/round-000001.parquet").write_bytes(b"")
    whole = [choice(i, [65, 2], [-1.0, -1.0]) for i in range(2)]
    with serving(answers(*whole)) as url:
        asked(url)
    assert [file.name for file in Path("rollouts").iterdir()] == ["round-000001.parquet"]


def test_a_disk_without_room_for_the_adapter_is_named():
    def full(folder: Path, **_: object) -> None:
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    lm = adapted()
    lm.model.save_pretrained = full  # pyright: ignore
    with pytest.raises(OutputError, match="adapter could not be written to .*No space left"):
        asked("http://127.0.0.1:1", lm)
    assert not Path("rollouts").exists()


def test_a_key_of_the_server_is_sent(monkeypatch: pytest.MonkeyPatch):
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(
        "upweight.models.served.post",
        lambda url, document, timeout, headers: seen.append(headers) or b"{}",
    )
    server = Server("http://here:8000/", Path("rollouts"))
    server.ask("/v1/x", {})
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server.ask("/v1/x", {})
    assert seen == [{}, {"Authorization": "Bearer secret"}]
    monkeypatch.setenv("VLLM_API_KEY", "sécret")
    with pytest.raises(ModelError, match="VLLM_API_KEY holds") as caught:
        server.ask("/v1/x", {})
    assert "cret" not in str(caught.value)


def test_another_model_than_was_asked_for_is_refused():
    whole = [choice(i, [65, 2], [-1.0, -1.0]) for i in range(2)]
    with (
        serving(lambda path, _: (200, answer("base", whole))) as url,
        pytest.raises(ModelError, match="answered with 'base' and not with the adapter"),
    ):
        asked(url)


def test_a_redirect_is_not_followed():
    with (
        serving(lambda path, _: (302, b"/elsewhere")) as url,
        pytest.raises(ModelError, match="answered 302"),
    ):
        asked(url)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("choices", "index", "token_ids", "prompt_token_ids", "logprobs"),
                    *("token_logprobs", "model"),
                ]
            ),
            inner,
        )
    ),
)


WANTED = Wanted("a", PROMPT, 1, 8, frozenset([2]), 260)


@given(
    document=JSON
    | st.fixed_dictionaries({"model": st.just("a"), "choices": st.lists(JSON, max_size=2)})
)
def test_any_answer_is_whole_or_a_model_error(document: Any):
    try:
        found = read_answers(json.dumps(document).encode(), WANTED)
    except ModelError:
        return
    assert len(found) == 1 and len(found[0].tokens) == len(found[0].logps) <= 8


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--server", "http://here:1"), "--server needs lora"),
        (("--lora", "null", "--server", "http://here:1"), "--server needs lora"),
        ((*LORA, "--lora.quantize", "nf4", "--server", "http://here:1"), "beside lora.quantize"),
        ((*LORA, "--server", "http://here:1/v1"), "is written without /v1"),
        ((*LORA, "--server", "http://here:port"), "names no host"),
        ((*LORA, "--server", "here:1"), "names no host; write http://host:port"),
        ((*LORA, "--server", "http://"), "names no host"),
    ],
)
def test_an_address_that_is_none_or_has_nothing_to_hand_over_is_refused(
    more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
):
    assert online("run", "grpo", "--responses", "2", *more) == 2
    assert said in capsys.readouterr().err
