import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny import byte_tokenizer
from upweight.data.account import Account, percentiles, require_used
from upweight.data.read import read_rows
from upweight.data.render import make_renderer
from upweight.data.stream import (
    epoch_order,
    grow,
    load_examples,
    load_prompts,
    num_steps,
    overlap,
    plan_epoch,
    planned,
    prompt_key,
    split_account,
    split_by_prompt,
    steps,
)
from upweight.errors import ConfigError, DataError
from upweight.types import Dropped, Example, Preference, Response, ResponseId, RowId, Tree

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = [
    {"prompt": "a?", "chosen": "yes\u2028it is", "rejected": "no"},
    {"prompt": "b?", "chosen": 'so "so"', "rejected": "two\nlines, or more"},
]


def rows_of(*paths):
    return list(read_rows(map(str, paths)))


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_rows(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def refusal(*paths):
    with pytest.raises(DataError) as error:
        rows_of(*paths)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.jsonl.gz", "a.json"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines_give_every_row_with_its_line(tmp_path, name, mark):
    lines = mark + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n"
    data = lines.encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert rows_of(path) == [(RowId(path, 1), ROWS[0]), (RowId(path, 3), ROWS[1])]


def test_keys_of_a_response_that_nothing_reads_are_counted(tmp_path):
    answers = [{"text": "a b", "score": 1, "wieght": 9}, {"text": "c", "score": 0, "gone": None}]
    turn = {"role": "assistant", "content": "a", "thinking": "hm", "score": 2}
    rows = [{"prompt": "p", "responses": [*answers, turn], "id": 1}]
    _, account = load_examples([write_rows(tmp_path / "a.jsonl", rows)])
    assert account.unused_columns == {"id": 1, "responses.wieght": 1}


@pytest.mark.parametrize("value", [ROWS, {"version": 1, "data": ROWS}])
def test_json_is_a_list_of_rows_or_an_object_that_holds_one(tmp_path, value):
    path = write(tmp_path / "a.json", json.dumps(value, indent=1))
    assert rows_of(path) == [(RowId(path, 1), ROWS[0]), (RowId(path, 2), ROWS[1])]


def test_json_may_be_a_single_row(tmp_path):
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}
    path = write(tmp_path / "a.json", json.dumps(row, indent=1))
    assert rows_of(path) == [(RowId(path, 1), row)]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_rows_are_at_the_line_they_begin_on(tmp_path, name, delimiter):
    path = tmp_path / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows([ROWS[1], ROWS[0]])
    assert rows_of(path) == [(RowId(str(path), 2), ROWS[1]), (RowId(str(path), 4), ROWS[0])]


def test_a_csv_cell_may_be_long_and_may_hold_messages_in_json(tmp_path):
    turns = [{"role": "assistant", "content": "hi, " * 50_000}]
    path = tmp_path / "a.csv"
    cells = [["prompt", "chosen", "rejected"], ["p", json.dumps(turns), '[{"role"']]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(cells)
    ((example,), _) = load_examples([str(path)])
    assert [r.content for r in example.responses] == [
        tuple(turns),
        ({"role": "assistant", "content": '[{"role"'},),
    ]


def test_parquet_gives_nested_rows(tmp_path):
    rows = [
        {"prompt": "p", "responses": [{"text": "a", "score": 1.0}, {"text": "b", "score": None}]},
        {"prompt": None, "responses": []},
    ]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert rows_of(path) == [(RowId(path, 1), rows[0]), (RowId(path, 2), rows[1])]


def test_a_parquet_column_that_no_layout_reads_is_counted_whatever_it_holds(tmp_path):
    columns = {
        "at": pa.array([1, 2], pa.timestamp("ns")),
        "chosen": ["a", "b"],
        "day": pa.array([10**8] * 2, pa.date32()),
        "rejected": ["c", "d"],
        "tags": pa.array([[("a", 1), ("a", 2)]] * 2, pa.map_(pa.string(), pa.int64())),
    }
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table(columns), path)
    assert [list(row) for _, row in rows_of(path)] == [list(columns)] * 2
    assert {row["tags"] for _, row in rows_of(path)} == {None}
    with pytest.raises(DataError) as found:
        list(read_rows([path], None))
    said = str(found.value)
    assert said.startswith(f"{path} has a value in the column 'at', among rows 1 to 2, that Python")
    assert said.endswith(
        ". Save the column as text or numbers, or remove it where no reward reads it."
    )
    assert [row["day"] for _, row in read_rows([path], ["chosen"])] == [None, None]
    other = str(tmp_path / "b.parquet")
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": [1, 2]}), other)
    assert [row["answer"] for _, row in rows_of(other)] == [None, None]
    assert [row["answer"] for _, row in read_rows([other], None)] == [1, 2]
    assert [row["answer"] for _, row in read_rows([other], ["answer"])] == [1, 2]
    assert [row for _, row in read_rows([other], [])] == [{"prompt": None, "answer": None}] * 2
    examples, account = load_examples([path])
    assert [e.responses[0].content for e in examples] == ["a", "b"]
    assert account.unused_columns == {"at": 2, "day": 2, "tags": 2}


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([1], pa.timestamp("ns")), "Nanosecond resolution"),
        (pa.array([10**8], pa.date32()), "date value out of range"),
        (pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())), "duplicate key"),
        (pa.StructArray.from_arrays([pa.array(["x"])] * 2, ["t", "t"]), "duplicate field names"),
    ],
)
def test_a_parquet_value_that_python_cannot_hold_is_a_data_error(tmp_path, column, says):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": column}), path)
    found = refusal(path)
    where = "has a value in the column 'prompt', among rows 1 to 1, that Python cannot hold: "
    assert found.startswith(f"{path} {where}") and says in found
    assert found.endswith("Save the column as text or numbers.")


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path):
    path, texts = str(tmp_path / "a.parquet"), pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([texts] * 3, ["prompt", "chosen", "prompt"]), path)
    assert refusal(path) == f"{path} names the column 'prompt' twice. Rename or remove one."


def test_files_are_read_in_the_order_given(tmp_path):
    a, b = write_rows(tmp_path / "a.jsonl", ROWS), write_rows(tmp_path / "b.jsonl", ROWS[:1])
    assert [str(row_id) for row_id, _ in rows_of(b, a)] == [f"{b}:1", f"{a}:1", f"{a}:2"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "", "a.jsonl is empty."),
        ("a.json", "", "a.json is empty."),
        ("a.csv", "", "a.csv is empty."),
        ("a.parquet", "", "a.parquet is empty."),
        ("a.jsonl", " \n\n", "a.jsonl has no rows."),
        ("a.json", "[]", "a.json has no rows."),
        ("a.json", " \n", "a.json has no rows."),
        ("a.csv", "prompt,chosen\n", "a.csv has no rows."),
        ("a.jsonl", '{"a": 1}\n{"a": 1,\n',
         "a.jsonl:2 is not JSON: Expecting property name enclosed in double quotes at column"),
        ("a.jsonl", '{"a": 1}\n{"a" 1}\n',
         """a.jsonl:2 is not JSON: Expecting ':' delimiter at column 6, near '{"a" 1}"""),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2 is no object but a list ([1]). A row is an"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1 is nested too deeply"),
        ("a.jsonl", "1" * 5000, "a.jsonl:1 is not JSON that can be read: Exceeds the limit"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json:2 is not JSON: Expecting ':' delimiter at"),
        ("a.json", '{"a": 1}\n{"a" 2}', "a.json:2 is not JSON: Expecting ':' delimiter at"),
        ("a.json", '[{"a": 1}, 2]', "a.json:2 is no object but a number (2)."),
        ("a.json", '{"a": [], "b": []}', "a.json is an object with 2 lists."),
        ("a.json", "1", "a.json:1 is no object but a number (1)."),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n',
         """a.jsonl:2 has the key 'a' twice in an object ({"a": 2}). Keep one."""),
        ("a.jsonl", '{"a": {"\\ud800": 1, "\\ud800": 2}}', "a.jsonl:1 has the key '\\ud800' twice"),
        ("a.json", '{"a": 1}\n{"a": 1, "a": 2}\n', "a.json:2 has the key 'a' twice"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n',
         "a.jsonl is not UTF-8: byte 0xff at offset 16. Save it as UTF-8."),
        ("a.csv", b"a\n\xe9\n", "a.csv is not UTF-8: byte 0xe9 at offset 2."),
        ("a.csv", 'a,b\n1,"2\n', "a.csv:2 is not CSV: unexpected end of data."),
        ("a.csv", "a,b\n1,2\n1\n", "a.csv:3 has 1 cells, and the header names 2 columns: a, b."),
        ("a.csv", "a,a\n1,2\n", "a.csv:1 names the column 'a' twice."),
        ("a.parquet", "nonsense", "a.parquet is no Parquet file that can be read"),
        ("a.jsonl.gz", "nonsense", "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-9],
         "a.jsonl.gz is not a whole gzip file"),
        ("a.txt", "x", "a.txt is no known kind of data file. Allowed: .jsonl, .ndjson, .json, "
         ".csv, .tsv, .parquet; all but .parquet also with .gz."),
        ("a.jsnl", "x", "Did you mean .json"),
        ("a.parquet.gz", "x", "a.parquet.gz is no known kind of data file"),
        ("a.gz", "x", "a.gz is no known kind of data file"),
        ("a", "x", "a is no known kind of data file"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_where_and_why(tmp_path, name, content, says):
    found = refusal(write(tmp_path / name, content))
    assert says in found
    assert found.startswith(str(tmp_path / name))


def test_a_missing_file_names_the_nearest_and_a_folder_what_it_holds(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    assert refusal(tmp_path / "trian.jsonl").endswith("does not exist. Did you mean train.jsonl?")
    assert refusal(tmp_path).endswith("is a folder. Name its files. It holds: train.jsonl.")
    missing = tmp_path / "none" / "a.jsonl"
    assert refusal(missing).endswith(f"does not exist, nor does the folder {tmp_path / 'none'}.")
    assert "cannot be read: File name too long" in refusal("a" * 300 + ".jsonl")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.binary(max_size=60) | st.text('{}[]",:\n\t\'ab\\u0d\ud800 1e', max_size=60).map(
        lambda t: t.encode("utf-8", "surrogatepass")
    ),
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"]),
)  # fmt: skip
def test_any_bytes_are_rows_or_a_data_error(tmp_path, data, name):
    path = write(tmp_path / name, data)
    try:
        load_examples([path], require_preferences=False)
    except DataError as error:
        str(error).encode()


def test_load_counts_every_row(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "source": "x"},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "source": "y", "id": 1},
        {"prompt": "p", "chosen": "a", "rejected": "\udc00"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    examples, account = load_examples([path])
    assert [e.row.line for e in examples] == [1, 3, 5]
    assert (account.read, account.used) == (5, 3)
    assert account.dropped == {"identical_responses": 1, "bad_unicode": 1}
    assert account.examples["identical_responses"] == [(f"{path}:2", "'a' | 'a'")]
    assert account.duplicates == 1
    assert account.unused_columns == {"source": 2, "id": 1}
    assert load_examples([path], limit=2)[1].read == 2


def test_the_layout_is_each_files_first_rows(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}
    b = write_rows(tmp_path / "b.jsonl", [row])
    assert len(load_examples([a, b])[0]) == 2
    with pytest.raises(DataError, match=r'b.jsonl:1 has no "chosen"'):
        load_examples([a, b], layout="pair")
    with pytest.raises(ConfigError) as error:
        load_examples([a], layout="pairs")
    assert str(error.value) == (
        "data.format is pairs; allowed: auto, pair, responses, messages, completion. Did you mean "
        "pair?"
    )


def test_prompts_are_loaded_from_rows_that_have_no_more(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "\ud800"}, {"prompt": "b", "chosen": "x", "rejected": "y"}]
    examples, account = load_prompts([write_rows(tmp_path / "a.jsonl", rows)])
    assert [e.prompt for e in examples] == ["a", "b"]
    assert (account.read, account.used, account.dropped) == (3, 2, {"bad_unicode": 1})


def test_a_prompt_by_another_name_is_seen_in_parquet_too(tmp_path):
    path = tmp_path / "a.parquet"
    row = {"question": "Which?", "chosen": "Yes. One.", "rejected": "Yes. None."}
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(DataError, match="Is question meant to be prompt"):
        load_examples([str(path)])


def test_preferences_are_required_only_where_asked_for(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns}])
    assert load_examples([path])[1].dropped == {"unlabelled": 1}
    assert len(load_examples([path], require_preferences=False)[0]) == 1


def test_a_row_that_states_no_preference_is_no_row_without_a_label(tmp_path: Path):
    row = {"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 0}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "preferences": []}) + "\n")
    assert load_examples([str(path)])[1].dropped == {"no_preference": 1}
    assert load_examples([str(path)], pairing="all")[1].dropped == {}


def test_pairing_and_gap_are_passed_on(tmp_path):
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0, 1, 2]}
    path = write_rows(tmp_path / "a.jsonl", [row])
    for pairing, num in (("all", 3), ("adjacent", 2), ("extremes", 1)):
        assert len(load_examples([path], pairing=pairing)[0][0].preferences) == num
    assert len(load_examples([path], min_gap=1.0)[0][0].preferences) == 1


def test_stated_preferences_that_a_pairing_passes_over_are_counted(tmp_path):
    stated = {"prompt": "p", "responses": ["a", "b"], "preferences": [[1, 0]]}
    path = write_rows(tmp_path / "a.jsonl", [stated, stated | {"scores": [1, 0]}])
    assert load_examples([path], pairing="all")[1].unused_columns == {"preferences": 1}
    assert load_examples([path])[1].unused_columns == {}


def test_an_account_with_nothing_used_says_what_became_of_the_rows():
    account = Account(read=2)
    account.drop(Dropped(RowId("a.jsonl", 3), "too_long", "many tokens"))
    account.drop(Dropped(RowId("a.jsonl", 4), "too_long", "many tokens"))
    with pytest.raises(DataError) as error:
        require_used(account, "data.path")
    assert str(error.value) == (
        "data.path: none of 2 rows can be used.\n"
        "  2 x too_long: longer than max_length (a.jsonl:3: many tokens)"
    )
    require_used(Account(read=1, used=1), "data.path")


def test_an_account_keeps_five_examples_of_a_reason_and_counts_all():
    account = Account(read=9)
    for line in range(9):
        account.drop(Dropped(RowId("a", line), "boundary", "x"))
    assert account.dropped == {"boundary": 9} and len(account.examples["boundary"]) == 5


def test_an_account_that_does_not_add_up_is_a_bug():
    with pytest.raises(AssertionError):
        Account(read=2, used=1).check()


def test_percentiles_are_values_that_so_many_do_not_exceed():
    assert percentiles(list(range(1, 101))) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert percentiles([7]) == {"p50": 7, "p90": 7, "p99": 7, "max": 7}
    assert percentiles([]) == {}


def test_growing_trees_moves_rows_from_used_to_dropped(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "aaaa", "rejected": "b"},
        {"prompt": "p", "chosen": "a<|im_end|>", "rejected": "b"},
        {"prompt": "p", "responses": ["aa", "b", "", "aa"], "scores": [2, 1, 3, 0]},
    ]
    a = write_rows(tmp_path / "a.jsonl", rows[:2])
    b = write_rows(tmp_path / "b.jsonl", rows[2:])
    renderer = make_renderer(byte_tokenizer(), max_length=23, truncation="response")
    examples, account = load_examples([a, b])
    trees = grow(examples, renderer, account)
    num_prompt = len("<user\np>\n<assistant\n")  # one token a byte or special token
    assert len(trees[0].prompt) == num_prompt
    assert [t.ids[0].row.line for t in trees] == [1, 1]
    found = account.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "read": 3,
        "used": 2,
        "dropped": {"stop_in_response": 1},
        "examples": {"stop_in_response": [[f"{a}:2", "the text holds <|im_end|>: 'a<|im_end|>'"]]},
        "left_out": {"empty_response": 1, "identical_responses": 1},
        "truncated": {"prompt": 0, "response": 1, "chosen": 1, "rejected": 0},
        "appended_stop": 0,
        "unfinished": 0,
        "boundary_repaired": 0,
        "rewritten": 0,
        "special_in_prompt": 0,
        "duplicates": 0,
        "earlier_turns": 0,
        "shared_prompts": 0,
        "unprompted": 0,
        "rated": 0,
        "against": 0,
        "preferences": 2,
        "responses": 4,
        "lengths": {
            "prompt": dict.fromkeys(("p50", "p90", "p99", "max"), num_prompt),
            "chosen": dict.fromkeys(("p50", "p90", "p99", "max"), 3),
            "rejected": dict.fromkeys(("p50", "p90", "p99", "max"), 2),
            "response": {},
        },
        "unused_columns": {},
    }


def example(prompt, line=1):
    return Example(prompt, (Response("a"), Response("b")), (Preference(0, 1),), RowId("f", line))


def examples_of(*prompts):
    return [example(p, line) for line, p in enumerate(prompts, start=1)]


def test_a_split_keeps_all_rows_of_a_prompt_on_one_side():
    examples = examples_of(*(f"p{i % 200}" for i in range(600)))
    train, held = split_by_prompt(examples, 0.25, seed=3)
    assert len(train) + len(held) == 600
    assert not overlap(train, held)
    assert 0.15 < len(held) / 600 < 0.35
    assert split_by_prompt(examples, 0.25, seed=4) != (train, held)


def test_a_prompts_side_does_not_depend_on_order_or_other_rows():
    examples = examples_of(*(f"p{i}" for i in range(100)))
    held = {e.prompt for e in split_by_prompt(examples, 0.3, seed=0)[1]}
    again = {e.prompt for e in split_by_prompt(examples[::-1][:60], 0.3, seed=0)[1]}
    assert again == held & {e.prompt for e in examples[40:]}


def test_each_side_of_a_split_has_a_prompt():
    for fraction in (1e-9, 1 - 1e-9):
        train, held = split_by_prompt(examples_of("a", "b", "a"), fraction, seed=0)
        assert train and held
    assert split_by_prompt(examples_of("a"), 0.0, seed=0)[1] == []
    with pytest.raises(DataError, match="evaluation.fraction is 0.5, and the data have 1 prompt:"):
        split_by_prompt(examples_of("a", "a"), 0.5, seed=0)


def test_white_space_and_the_form_of_a_prompt_do_not_make_it_another():
    turns = ({"role": "user", "content": "why?\n"},)
    assert prompt_key(example(" why?")) == prompt_key(example(turns))
    assert prompt_key(example("why")) != prompt_key(example("why?"))
    assert prompt_key(example(({"role": "system", "content": "why?"},))) != prompt_key(
        example("why?")
    )


def test_overlap_names_both_rows():
    found = overlap(examples_of("a", "b", "a"), examples_of("c", " a", "b"))
    assert found == [(RowId("f", 1), RowId("f", 2)), (RowId("f", 2), RowId("f", 3))]


def test_the_accounts_of_two_sides_add_up_to_the_whole():
    account = Account(read=5, used=4, dropped={"too_long": 1})
    train, held = split_account(account, 1)
    assert (train.read, train.used, held.read, held.used) == (4, 3, 1, 1)


def tree(num_preferences, line=1):
    row = RowId("f", line)
    return Tree(
        (1,), ((2,), (3,)), (Preference(0, 1),) * num_preferences,
        (ResponseId(row, 0), ResponseId(row, 1)), (True, True),
    )  # fmt: skip


def test_an_epochs_order_is_a_fixed_permutation_that_changes_with_epoch_and_seed():
    order = epoch_order(50, seed=0, epoch=0)
    assert sorted(order) == list(range(50))
    assert order == epoch_order(50, seed=0, epoch=0)
    assert order != epoch_order(50, seed=0, epoch=1) != epoch_order(50, seed=1, epoch=0)
    # Mersenne Twister seeded with a text is the same everywhere; a change here breaks resuming.
    assert epoch_order(6, seed=0, epoch=0) == [3, 5, 1, 2, 0, 4]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 7))
def test_an_epoch_has_every_tree_once_in_steps_of_enough_pairs(sizes, pairs_per_step):
    trees = [tree(n) for n in sizes]
    plan = plan_epoch(trees, pairs_per_step, seed=5, epoch=2)
    assert [i for step in plan for i in step] == epoch_order(len(trees), 5, 2)

    def num_pairs(step):
        # A tree without preferences counts its two responses.
        return sum(sizes[i] or 2 for i in step)

    for step in plan[:-1]:
        assert num_pairs(step) >= pairs_per_step > num_pairs(step[:-1])
    assert plan[-1]


def test_any_step_can_be_had_without_those_before_it():
    trees = [tree(1 + i % 3, line=i) for i in range(11)]
    run = steps(trees, 4, seed=1)
    plans = [next(run) for _ in range(20)]
    assert [p.step for p in plans] == list(range(20))
    assert next(steps(trees, 4, seed=1, start=13)) == plans[13]
    plan = planned(trees, 4, seed=1)
    assert [plan(step) for step in (13, 13, 14, 19, 2)] == [plans[i] for i in (13, 13, 14, 19, 2)]
    for before, after in zip(plans, plans[1:], strict=False):
        assert after.epochs_done > before.epochs_done
        assert (after.epoch > before.epoch) == (before.epochs_done == before.epoch + 1)
    assert plans[-1].epoch > 1


def test_epochs_become_steps():
    trees = [tree(1) for _ in range(10)]
    assert num_steps(trees, 4, seed=0, epochs=1) == 3
    assert num_steps(trees, 4, seed=0, epochs=2) == 6
    assert num_steps(trees, 4, seed=0, epochs=0.4) == 1
    assert num_steps(trees, 4, seed=0, epochs=0.5) == 2
    assert num_steps(trees, 4, seed=0, epochs=1.01) == 4
    assert num_steps(trees, 4, seed=0, epochs=1e6) == 3_000_000
    for epochs in (2.3, 3, 3.5, 6.79, 7):
        walked = next(p for p in steps(trees, 4, seed=0) if p.epochs_done >= epochs - 1e-9)
        assert num_steps(trees, 4, seed=0, epochs=epochs) == walked.step + 1


@pytest.mark.parametrize("name", ["truthfulqa_pairs", "longprompt_pairs", "gsm8k_responses"])
def test_real_files_are_read_whole(name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    examples, account = load_examples([str(path)])
    assert account.read == len(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    assert len(examples) == account.used == account.read - sum(account.dropped.values())
    assert set(account.dropped) <= {"no_preference"}
