"""Which of four docstrings belongs to a function: the questions, and where they are from."""

from __future__ import annotations

import pytest

from lit_ft.data.docstrings import Docstrings
from lit_ft.evaluation.tasks import docstring_choice
from lit_ft.evaluation.tasks.docstring_choice import CHOICES, QUESTIONS, questions


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return questions()["test"].to_list()


def test_each_question_has_its_own_docstring_among_four(rows):
    held_out = {
        row.fields["prompt"]: row.fields["completion"]
        for row in Docstrings("function").rows()
        if row.held_out
    }
    assert 100 < len(rows) <= QUESTIONS
    assert all(len(set(row["choices"])) == CHOICES for row in rows)
    # The data drops a docstring that occurs in another module, too.
    known = [row for row in rows if row["prompt"] in held_out]
    assert len(known) > 0.9 * len(rows)
    assert all(row["choices"][row["answer"]] == held_out[row["prompt"]] for row in known)


def test_no_docstring_is_of_a_module_to_train_on(rows):
    learnt = {row.fields["completion"] for row in Docstrings().rows() if not row.held_out}
    assert learnt.isdisjoint(choice for row in rows for choice in row["choices"])


def test_the_answers_stand_at_all_places(rows):
    places = [row["answer"] for row in rows]
    assert all(places.count(place) > len(rows) / 8 for place in range(CHOICES))


def test_the_length_of_a_docstring_does_not_give_the_answer_away(rows):
    """Always to take the shortest, or the longest, is no better than to guess."""
    for extreme in (min, max):
        taken = [row["choices"].index(extreme(row["choices"], key=len)) for row in rows]
        right = sum(one == row["answer"] for one, row in zip(taken, rows, strict=True))
        assert right < 0.4 * len(rows)


def test_the_questions_are_always_the_same(rows):
    assert questions(version=1)["test"].to_list() == rows


def test_a_library_with_too_few_docstrings_is_named(monkeypatch):
    monkeypatch.setattr(docstring_choice, "read_pairs", lambda *_: [])
    with pytest.raises(ValueError, match="needs 4 short docstrings .* has 0"):
        questions()
