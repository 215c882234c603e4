from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oracles import tree_of
from upweight.trust.near import copies, edits, near_copies, nearly_same
from upweight.types import Example, Preference, Response, RowId

ids = st.lists(st.integers(0, 2), max_size=9).map(tuple)


def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Levenshtein's, by the whole table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@given(ids, ids, st.integers(0, 9))
def test_edits_are_those_of_the_whole_table_up_to_the_limit(a, b, limit):
    expected = distance(a, b)
    assert edits(a, b, limit) == (expected if expected <= limit else None)


def test_a_short_answer_that_differs_in_one_token_is_another_answer():
    assert not nearly_same((1, 2, 3), (1, 2, 4), 0.05)
    assert nearly_same((*range(20),), (*range(19), 99), 0.05)
    assert not nearly_same((*range(20),), (*range(18), 98, 99), 0.05)


def example(line: int, prompt: object, *texts: str, chosen: int = 0) -> Example:
    responses = tuple(Response(text) for text in texts)
    return Example(prompt, responses, (Preference(chosen, 1 - chosen),), RowId("f", line))


def test_case_white_space_and_what_stands_around_a_text_make_no_other_row():
    said = [
        example(1, "Why is it?", "Because.", "No."),
        example(2, " why  is it", "because", '"No!"'),
        example(3, "Why is it 2?", "Because.", "No."),
        example(4, "Why is it?", "Because.", "No.", chosen=1),
        example(5, "Is a < b?", "Yes.", "No."),
        example(6, "Is a > b?", "Yes.", "No."),
        example(7, ({"role": "user", "content": "Hm"},), "Yes.", "No."),
        example(8, ({"role": "user", "content": "hm."},), "yes", "no"),
    ]
    rows = [RowId("f", line) for line in range(9)]
    assert copies(said) == {rows[2]: rows[1], rows[8]: rows[7]}


def test_the_later_of_two_rows_with_nearly_the_same_answers_is_the_copy():
    long, other = tuple(range(40)), tuple(range(100, 130))
    rows = [
        tree_of((1, 2), [(*long, 7, 8), other], line=1),
        tree_of((1, 2), [long, other], line=2),
        tree_of((1, 3), [long, other], line=3),
        tree_of((1, 2), [other, long], line=4),
    ]
    assert near_copies(rows, 0.05) == {RowId("rows.jsonl", 2): RowId("rows.jsonl", 1)}
    assert near_copies(rows, 0.01) == {}
