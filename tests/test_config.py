"""What is said is what runs: every key arrives, or is refused with its place and its neighbours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs import (
    NEEDED,
    OTHER,
    context_of,
    error_in,
    error_of,
    needed_beside,
    reloaded,
    run_of,
    written,
)
from upweight.config import (
    Data,
    Lora,
    Loss,
    Resolved,
    Run,
    dump,
    flags,
    leaf_values,
    load_run,
    values_from_flags,
)
from upweight.config.keys import keys
from upweight.config.sections import SECTIONS
from upweight.config.written import parse, parse_value, settle, write
from upweight.errors import ConfigError


def test_every_key_has_another_value_in_this_file() -> None:
    assert set(OTHER) == set(keys())


def test_sections_are_the_sections_of_run() -> None:
    fields = [name for name in Run.model_fields if name in SECTIONS]
    assert fields == list(SECTIONS)
    for name, section in SECTIONS.items():
        assert isinstance(getattr(Run(model="m", data=Data(path=["d"])), name), section | None)


def test_no_short_name_is_also_the_name_of_something_else() -> None:
    top = {key.name for key in keys().values() if not key.section} | set(SECTIONS)
    assert not top & {key.name for key in keys().values() if key.full != key.name}


@pytest.mark.parametrize("key", keys().values(), ids=lambda key: key.full)
def test_every_key_is_described_in_one_sentence(key: Any) -> None:
    assert key.description.endswith(".")
    assert ". " not in key.description
    assert key.description[0].isupper()


@pytest.mark.parametrize("key", OTHER)
def test_no_accepted_key_is_lost(key: str) -> None:
    context = context_of(key)
    before = load_run(None, values=NEEDED | context)
    by_value = load_run(None, values=needed_beside(key) | context | {key: OTHER[key]})
    by_override = load_run(None, [f"{key}={write(OTHER[key])}"], NEEDED | context)
    assert by_value.run == by_override.run
    assert by_value.run != before.run
    strip = [line.partition("  # ")[0] for line in dump(before).splitlines()]
    assert [line.partition("  # ")[0] for line in dump(by_value).splitlines()] != strip
    if key not in ("lora", "data.path"):
        assert leaf_values(by_value.run)[key] == OTHER[key]
        assert by_value.origins[key] == "python"
        assert by_override.origins[key] == "override"


@pytest.mark.parametrize("key", OTHER)
def test_every_key_works_under_every_flag_name(key: str) -> None:
    flag = next(flag for flag in flags() if flag.key == key)
    context = needed_beside(key) | context_of(key)
    expected = load_run(None, values=context | {key: OTHER[key]}).run
    words = OTHER[key] if isinstance(OTHER[key], list) else [OTHER[key]]
    texts = [word if isinstance(word, str) else write(word) for word in words]
    if key == "lora.targets":
        texts = ["[q_proj]"]
    for name in flag.names:
        typed = name.removeprefix("--")
        given_flags = values_from_flags({typed: texts if flag.many else texts[0], "x": None})
        assert load_run(None, values=context | given_flags, origin_of_values="flag").run == expected


def test_defaults_are_those_of_an_empty_run() -> None:
    run = run_of()
    assert run == Run(model="tiny", data=Data(path=["a.jsonl"]))
    assert (run.loss.beta, run.optimizer.learning_rate, run.lora) == (0.1, None, None)
    assert all(
        origin == "default" or key in ("model", "data.path")
        for key, origin in load_run(None, values=NEEDED).origins.items()
    )


def test_a_run_is_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        run_of().seed = 3
    with pytest.raises(ValidationError):
        Loss(beta=True)


def test_short_names_nested_names_and_full_names_mean_the_same() -> None:
    expected = run_of("loss.beta=0.2")
    assert run_of("beta=0.2") == run_of("loss={beta: 0.2}") == expected
    assert run_of(beta=0.2) == run_of(loss={"beta": 0.2}) == run_of(loss=Loss(beta=0.2)) == expected
    assert load_run(None, values=NEEDED | {"loss.beta": 0.2}).run == expected


def test_nested_values_are_merged_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nloss: {beta: 0.3, label_smoothing: 0.2}\n")
    loss = load_run(file, values={"loss": {"beta": 0.5}}).run.loss
    assert loss == Loss(beta=0.5, label_smoothing=0.2)


def test_data_may_be_one_file_several_or_a_section() -> None:
    assert run_of("data=b.jsonl").data.path == ["b.jsonl"]
    assert run_of("data=[b.jsonl, c.jsonl]").data.path == ["b.jsonl", "c.jsonl"]
    assert run_of(data=("b.jsonl", Path("c.jsonl"))).data.path == ["b.jsonl", "c.jsonl"]
    assert run_of(data={"path": "b.jsonl", "limit": 3}).data == Data(path=["b.jsonl"], limit=3)
    assert run_of("sets={easy: e.jsonl}").evaluation.sets == {"easy": ["e.jsonl"]}


def test_later_wins_and_origins_say_who_did(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nbeta: 0.2\nseed: 1\nlimit: 5\n")
    resolved = load_run(file, ["seed=3", "seed=4"], {"seed": 2, "limit": 6})
    assert (resolved.run.loss.beta, resolved.run.seed, resolved.run.data.limit) == (0.2, 4, 6)
    assert resolved.origins["loss.beta"] == f"file {file}"
    assert resolved.origins["seed"] == "override"
    assert resolved.origins["data.limit"] == "python"
    assert resolved.origins["epochs"] == "default"


def test_lora_is_switched_by_its_name_or_by_any_of_its_keys() -> None:
    assert run_of("lora=true").lora == run_of(lora={}).lora == Lora()
    assert run_of("lora=false").lora is run_of("lora=null").lora is run_of(lora=None).lora is None
    assert run_of("lora.rank=8").lora == run_of(rank=8).lora == Lora(rank=8, alpha=16.0)
    assert run_of("rank=8", "alpha=3").lora == Lora(rank=8, alpha=3.0)
    assert run_of(lora=Lora(rank=4)).lora == Lora(rank=4, alpha=8.0)


def test_a_later_layer_switches_lora_off_and_on(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nlora: {rank: 8, dropout: 0.5}\n")
    assert load_run(file, ["lora=false"]).run.lora is None
    assert load_run(file, ["lora=true"]).run.lora == Lora(rank=8, dropout=0.5)
    file = written(tmp_path, "model: m\ndata: d\nlora: null\n")
    assert load_run(file, ["rank=8"]).run.lora == Lora(rank=8)


def test_a_later_layer_chooses_between_steps_and_epochs(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nepochs: 3\n")
    run = load_run(file, ["steps=10"]).run
    assert (run.steps, run.epochs) == (10, 1.0)
    file = written(tmp_path, "model: m\ndata: d\nsteps: 10\n")
    run = load_run(file, ["epochs=3"]).run
    assert (run.steps, run.epochs) == (None, 3.0)
    assert run_of("epochs=3", "steps=null").epochs == 3.0


def test_contradictions_in_one_breath_are_refused(tmp_path: Path) -> None:
    assert error_in(tmp_path, "steps: 3\nepochs: 2\n") == (
        "run.yaml:4: epochs=2 and steps=3 in line 3 contradict each other. Keep one of them."
    )
    assert error_of("epochs=2", steps=3) == (
        "epochs=2 and steps=3 contradict each other. Keep one of them."
    )
    assert error_in(tmp_path, "lora: false\nrank: 8\n") == (
        "run.yaml:4: rank=8 and lora=false in line 3 contradict each other. Keep one of them."
    )
    assert "lora=false and lora.rank=3 contradict" in error_of("lora.rank=3", "lora=false")


def test_one_key_under_two_names_in_one_place_is_refused(tmp_path: Path) -> None:
    assert error_in(tmp_path, "beta: 0.1\nloss:\n  beta: 0.2\n") == (
        "run.yaml:5: loss.beta sets loss.beta, and so does beta in line 3. Keep one of them."
    )
    assert error_of(beta=0.1, loss={"beta": 0.1}) == (
        "loss.beta sets loss.beta, and so does beta. Keep one of them."
    )


@pytest.mark.parametrize("text", ["5e-7", "5E-7", "0.5e-6", "5.e-7", ".5e-6", "+5e-7"])
def test_scientific_numbers_are_numbers_everywhere(text: str, tmp_path: Path) -> None:
    expected = float(text)
    file = written(tmp_path, f"model: m\ndata: d\noptimizer:\n  learning_rate: {text}\n")
    assert load_run(file).run.optimizer.learning_rate == expected
    assert run_of(f"learning_rate={text}").optimizer.learning_rate == expected
    from_flag = values_from_flags({"learning_rate": text})
    assert run_of(**from_flag).optimizer.learning_rate == expected


@pytest.mark.parametrize("name", ["1e-5", "007", "2024", "2024-01-31", "12:30", "no", "0x1F", ".5"])
def test_names_that_look_like_something_else_stay_text(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"model: {name}\ndata: [{name}]\nsets: {{{name}: {name}}}\n")
    run = load_run(file).run
    assert (run.model, run.data.path) == (name, [name])
    assert run.evaluation.sets == {name: [name]}
    assert run_of(f"out={name}").out == name


@pytest.mark.parametrize(
    "name", ["*.jsonl", "a #1.jsonl", "a: b", "&x", "!y", "%z", "@q", "- w", "`v"]
)
def test_nothing_is_special_in_an_unquoted_override(name: str) -> None:
    assert run_of(f"out={name}").out == name


def test_quotes_and_brackets_are_yaml_in_an_override() -> None:
    assert run_of('out="a\\tb"').out == "a\tb"
    assert run_of(
        "template_options={a: [1, 1e-5, no, null, true], b: '1'}"
    ).data.template_options == {
        "a": [1, 1e-5, "no", None, True],
        "b": "1",
    }


def test_sections_whose_keys_are_commented_out_say_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, "model: tiny\ndata: a.jsonl\nloss:\n#  beta: 3\n")
    assert load_run(file).run == run_of()


def test_with_value_sets_one_leaf_and_its_origin() -> None:
    first = load_run(None, ["lora=true", "steps=9"], NEEDED)
    later = first.with_value("learning_rate", 1e-5, "resolved")
    assert later.run.optimizer.learning_rate == 1e-5
    assert later.origins == dict(first.origins) | {"optimizer.learning_rate": "resolved"}
    assert later.run.model_copy(update={"optimizer": first.run.optimizer}) == first.run
    assert later.with_value("lora.rank", 4, "resolved").run.lora == Lora(rank=4)
    assert later.with_value("epochs", 2, "resolved").run.steps is None
    with pytest.raises(ConfigError, match="^keep must be a whole number >= 1, found 0.$"):
        first.with_value("keep", 0, "resolved")


def test_dump_gives_every_leaf_with_its_origin() -> None:
    resolved = load_run(None, ["beta=0.2"], NEEDED)
    text = dump(resolved)
    assert "\nloss:\n  beta: 0.2  # override\n  label_smoothing: 0.0  # default\n" in text
    assert text.count("  # ") == len(resolved.origins)
    assert "\nlora: null  # default\n" in text
    assert max(map(len, text.splitlines())) < 80
    beside = dump(resolved, {"compute.device": "here cpu", "stop tokens": "end\nof text"})
    assert "  device: auto  # default; here cpu\n" in beside
    assert beside.endswith("\n\n# stop tokens: end?of text\n")
    odd = Resolved(resolved.run, dict(resolved.origins) | {"seed": "file a\nb"})
    assert "seed: 0  # file a?b\n" in dump(odd)


printed = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.text(printed, min_size=1, max_size=12) | st.sampled_from(
    ["1e-5", "no", "null", "~", "#", "2024"]
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
counts = st.integers(min_value=1)
random_values = st.fixed_dictionaries(
    {"model": texts, "data.path": st.lists(texts, min_size=1, max_size=3)},
    optional={
        "out": st.none() | texts,
        "steps": st.none() | counts,
        "track": st.lists(st.sampled_from(["wandb", "mlflow"]), max_size=2),
        "resume": st.booleans(),
        "template_options": st.dictionaries(texts, json_values, max_size=3),
        "sets": st.dictionaries(
            texts.filter(lambda name: name != "train"),
            st.lists(texts, min_size=1, max_size=2),
            max_size=2,
        ),
        "date": st.none() | st.dates().map(str),
        "beta": positive,
        "learning_rate": st.none() | positive,
        "warmup": st.floats(min_value=0, max_value=1, exclude_max=True),
        "pairs_per_step": counts,
        "rank": counts.filter(lambda rank: rank < 2**40),
        "alpha": positive,
        "targets": st.just("all-linear") | st.lists(texts, min_size=1, max_size=3),
    },
)


@settings(deadline=None, max_examples=40)
@given(values=random_values)
def test_a_dumped_run_loads_back_to_the_same_run(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    resolved = load_run(None, values=values)
    text = dump(resolved)
    assert reloaded(text, tmp_path_factory.getbasetemp()) == resolved.run
    # The same text means the same to a plain YAML 1.1 reader.
    plain = resolved.run.model_dump()
    if resolved.run.steps is not None:
        del plain["epochs"]
    assert yaml.safe_load(text) == plain


@settings(deadline=None)
@given(value=json_values)
def test_written_values_are_read_back_as_they_were(value: Any) -> None:
    text = write(value)
    assert "\n" not in text
    assert settle(parse(text, "text").value, False) == value


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_is_a_value_or_a_config_error(text: str) -> None:
    for read in (parse, parse_value):
        try:
            read(text, "text")
        except ConfigError as error:
            assert str(error).startswith("text")


@settings(deadline=None)
@given(text=st.text(alphabet="ab:- [{]},\n#'\"&*!?|>", max_size=40))
def test_any_file_is_a_run_or_a_config_error(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ConfigError):
        load_run(written(tmp_path_factory.getbasetemp(), text))


def test_config_imports_no_torch() -> None:
    code = "import sys, upweight.config as c; c.flags(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
