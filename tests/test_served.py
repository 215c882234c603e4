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
from runs import furnish_rewarded, online, records
from upweight.errors import ModelError, OutputError
from upweight.models.load import LanguageModel, load
from upweight.models.sample import sample
from upweight.models.served import Server, read_answers, sample_by
from upweight.models.weights import load_weights

LORA = ("--lora.rank", "4", "--learning-rate", "3e-2")
Answer = Callable[[str, Any], tuple[int, bytes]]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish_rewarded(tmp_path, monkeypatch)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Vllm:
    """What `vllm serve model --enable-lora` answers; `asked` is all that it was asked."""

    def __init__(self, *, deaf: bool = False) -> None:
        self.deaf = deaf
        self.models: dict[str, LanguageModel] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.turn = threading.Lock()

    def __call__(self, path: str, said: dict[str, Any]) -> tuple[int, bytes]:
        with self.turn:
            self.asked.append((path, said))
            match path:
                case "/v1/load_lora_adapter":
                    assert said["lora_name"] not in self.models, "vLLM refuses a name it knows"
                    folder = "model" if self.deaf else said["lora_path"]
                    self.models[said["lora_name"]] = _float32(folder)
                    return 200, b"Success: it was added."
                case "/v1/unload_lora_adapter":
                    del self.models[said["lora_name"]]
                    return 200, b"Success: it was removed."
                case "/v1/completions":
                    return 200, json.dumps({"choices": self.choices(said)}).encode()
                case _:
                    return 404, b"no such place"

    def choices(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        drawn = sample(
            self.models[said["model"]],
            [said["prompt"]],
            num=said["n"],
            max_new_tokens=said["max_tokens"],
            seed=said["seed"] % 2**32,
            stop_token_ids=said["stop_token_ids"],
        )
        found = [
            choice(i, s.tokens, s.logps, "stop" if s.stopped else "length")
            for i, s in enumerate(drawn[0])
        ]
        return found[::-1]  # by their index alone is it known which is which


def _float32(folder: str) -> LanguageModel:
    # An adapter's folder has no tokenizer.
    return load("model", dtype="float32", weights=load_weights(folder, folder, False))


def choice(index: int, tokens: Any, logps: Any, ended: str = "stop") -> dict[str, Any]:
    said = {"token_logprobs": list(logps), "tokens": ["?"] * len(logps)}
    return {
        "index": index, "text": "?", "token_ids": list(tokens), "logprobs": said,
        "finish_reason": ended,
    }  # fmt: skip


def answers(*choices: dict[str, Any]) -> Answer:
    """A server that takes any adapter and gives these choices for every prompt."""
    return lambda path, _: (200, json.dumps({"choices": choices}).encode())


@pytest.mark.parametrize("objective", ["grpo", "ppo", "online_dpo"])
def test_a_run_learns_from_answers_that_a_server_draws_from_its_adapter(objective: str):
    server = Vllm()
    passes = ("--passes", "1", "--responses", "3")
    with serving(server) as url:
        assert online("run", objective, *LORA, *passes, "--server", url) == 0
    asked = [said for path, said in server.asked if path == "/v1/completions"]
    assert len(asked) == 4 * 4, "four rounds of four prompts"
    assert len({said["seed"] for said in asked}) == len(asked)
    assert len({said["model"] for said in asked}) == 4, "an adapter for each round"
    assert all(said["n"] == 3 and said["temperature"] == 1 for said in asked)
    assert server.models == {} and list(Path("run/rollouts").glob("upweight-*")) == []
    assert len(records("run", "train")) == 4


def test_a_server_that_does_not_draw_from_the_adapter_is_refused(
    capsys: pytest.CaptureFixture[str],
):
    with serving(Vllm(deaf=True)) as url:
        assert online("run", "grpo", *LORA, "--responses", "3", "--server", url) == 2
    said = capsys.readouterr().err
    # The first adapter is the identity; the second round is the first to differ.
    assert f"what draws at {url} is not the policy" in said and "same model, in compute" in said
    assert len(records("run", "train")) == 1


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
    server, lm = Server(url, Path("rollouts")), lm or _float32("model")
    return sample_by(server, lm, [[65, 66]], num=2, max_new_tokens=8, seed=0, stop_token_ids=[2])


def test_what_a_killed_run_left_is_cleared_away():
    Path("rollouts/upweight-dead").mkdir(parents=True)
    Path("rollouts/round-000001.parquet").write_bytes(b"")
    whole = [choice(i, [65, 2], [-1.0, -1.0]) for i in range(2)]
    with serving(answers(*whole)) as url:
        asked(url)
    assert [file.name for file in Path("rollouts").iterdir()] == ["round-000001.parquet"]


def test_a_disk_without_room_for_the_adapter_is_named():
    def full(folder: Path) -> None:
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    lm = _float32("model")
    lm.model.save_pretrained = full  # pyright: ignore
    with pytest.raises(OutputError, match="adapter could not be written to .*No space left"):
        asked("http://127.0.0.1:1", lm)
    assert list(Path("rollouts").iterdir()) == []


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "index", "token_ids", "logprobs", "token_logprobs"]), inner
        )
    ),
)


@given(document=JSON | st.fixed_dictionaries({"choices": st.lists(JSON, max_size=2)}))
def test_any_answer_is_whole_or_a_model_error(document: Any):
    try:
        found = read_answers(json.dumps(document).encode(), 1, 8, frozenset([2]), 260)
    except ModelError:
        return
    assert len(found) == 1 and len(found[0].tokens) == len(found[0].logps) <= 8


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--server", "http://here:1"), "--server needs lora"),
        ((*LORA, "--server", "here:1"), "names no host; write http://host:port"),
        ((*LORA, "--server", "http://"), "names no host"),
    ],
)
def test_an_address_that_is_none_or_has_nothing_to_hand_over_is_refused(
    more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
):
    assert online("run", "grpo", "--responses", "2", *more) == 2
    assert said in capsys.readouterr().err
