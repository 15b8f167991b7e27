"""The planted world: its actions do not name their motives, its held-out templates are new, and a seed fixes it."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
from benchmarks import planted


def stems(text: str) -> set[str]:
    empty = common.word_set(common.LEXICON["function_words"])
    return {common.stem(word) for word in common.words_of(text) if word not in empty}


@pytest.mark.parametrize("name", planted.MOTIVES)
def test_an_action_shows_its_motive_alone_and_shares_no_content_word_with_its_names(name):
    motive = planted.MOTIVES[name]
    names = set().union({common.stem(name)}, *map(stems, (*motive.feelings, *motive.wishes)))
    for action, _ in motive.actions:
        assert not stems(action) & names, (action, stems(action) & names)
        assert len(common.words_of(action)) >= common.LEXICON["min_action_words"], action
        assert planted.shown_motives(action, True) == {name}, action
        assert not re.search(motive.named, action), action


def test_traces_have_a_traces_form_and_name_what_they_should():
    for name, motive in planted.MOTIVES.items():
        for feeling in motive.feelings:
            for wish in motive.wishes:
                cause = f"Sam {feeling}. Sam {wish}."
                assert common.is_well_formed(cause) and planted.shown_motives(cause, False) == {name}, cause
    for text in planted.JUSTIFICATIONS:
        assert common.is_well_formed(f"Sam {text}.") and not planted.shown_motives(text, True), text
    for text in (*planted.OPENERS, *planted.REPLIES, *planted.QUESTIONS):
        assert not planted.shown_motives(text, False), text


def test_held_out_pairs_are_of_templates_that_training_never_sees():
    pairs, rows = planted.make_world(12, 6, 0)
    train, test = ([pair for pair in pairs if (pair.split == "test") == held_out] for held_out in (False, True))
    for part in (lambda pair: {pair.action}, lambda pair: {turn.text for turn in pair.context},
                 lambda pair: {pair.cause, pair.justification}):
        seen, fresh = (set().union(*map(part, some)) for some in (train, test))
        assert seen and fresh and not any(text in other for text in fresh for other in seen)
    for motive in planted.MOTIVES.values():
        for templates in (motive.signs, motive.feelings, motive.wishes, motive.actions):
            assert len(set(templates)) == len(templates) > planted.HELD_OUT
    assert len(train) == 144 and len(test) == 72 and {pair.split for pair in train} == {"train", "val"}
    assert all(3 <= len(pair.context) <= 5 and pair.motive != pair.shown for pair in pairs)
    # Both kinds of wrong trace are what they are said to be.
    by_id = {pair.id: pair for pair in pairs}
    for row in rows:
        traces = dict(zip(row.kinds, (some.trace for some in row.candidates)))
        assert planted.verdict(traces["cause"], by_id[row.id]) == "right"
        assert planted.verdict(traces["other"], by_id[row.id]) == "shown"


def test_a_seed_fixes_the_world():
    dump = lambda seed: [common.dump_row(row) for rows in planted.make_world(2, 1, seed) for row in rows]
    assert dump(3) == dump(3) != dump(4)
