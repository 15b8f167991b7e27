"""The leak detector on planted traces, the form of a trace, and the sentence encoder."""

import json

import pytest
import torch
from conftest import ROOT, make_pair

import common

PROSE = """Sam is tired after a long week at the workshop and feels that nobody there notices how much of the work
lands on one desk. The message about the trip arrives at a moment when patience is thin, so the first reaction is
irritation rather than joy. Yet Sam likes Alex and remembers how kind the invitation last spring was, when all the
others had forgotten the birthday. A quiet day by the river sounds better than another evening in front of the
television. There is also some worry about money, because the car needs tyres before the winter and the rent went up
again in May. Sam hopes that Alex will understand a cautious answer.""".replace("\n", " ")


@pytest.mark.parametrize("name, least", [("planted", 60), ("planted_fresh", 30)])
def test_planted_leaks_are_caught_and_causes_pass(name, least, encoder):
    """In the set itself no cause or justification may quote, which would make every detector look good."""
    items = list(map(json.loads, (ROOT / "tests" / "data" / f"{name}.jsonl").read_text().splitlines()))
    threes, caught, stopped = lambda text: common.ngrams(common.words_of(text), 3), 0, 0
    for item in items:
        assert not threes(item["action"]) & (threes(item["cause"]) | threes(item["justification"])), item["id"]
        context = common.format_context(make_pair(user="sam", context=item["context"]))
        cause, leak = common.detect_leaks(encoder, [item["cause"], item["leak"]], item["action"], context)
        caught, stopped = caught + leak.is_leak, stopped + cause.is_leak
        assert common.leak_severity(leak) == max(leak.leak, leak.paraphrase) * leak.is_leak
    assert len({item["justification"] for item in items}) == len(items) >= least
    assert caught / len(items) >= 0.95 and stopped / len(items) <= 0.05


@pytest.mark.parametrize("text, well_formed", [
    ("Sam is worried about the exam.", True), ("Sam hopes that Alex comes.", True), ("Sam wants tea at 5:30!", True),
    ("Sam wants Sam to tell Sam about Sam's plans for Sam. Sam wants Sam.", False), ("Sam: worried about rain.", False),
    ("Sam is worried about the exam and", False), ("I am worried about Sam.", False), ("Sam thinks you lie.", False),
    ('Sam feels "so tired".', False), ("Alex is worried.", False), ("Sam has an exam at noon.", False), ("", False)])
def test_a_trace_is_whole_sentences_on_sams_mind_in_the_third_person(text, well_formed):
    assert common.is_well_formed(text) == well_formed


def test_a_long_trace_of_ordinary_prose_passes_and_repetition_anywhere_in_it_does_not():
    """Distinct words are counted in a moving window: over the whole of a long text good prose repeats its words too."""
    text, loop = f"{PROSE} {PROSE}", " Sam wants Alex to tell Alex what Sam wants." * 4
    words = common.words_of(text)
    assert len(words) >= 200 and len(set(words)) < common.DISTINCT_SHARE * len(words) and common.is_well_formed(text)
    for place in (0, text.index("A quiet day"), len(text)):
        assert not common.is_well_formed(f"{text[:place]}{loop} {text[place:]}".strip())


def test_the_encoder_reads_a_long_text_to_its_end_also_beside_a_short_one(encoder):
    """Its window is 256 tokens: a text is the mean over the tokens of all its windows."""
    (model, tokenizer), text = encoder, "the quick brown fox jumps over the dog " * 30 + "volcano eruption lava " * 30
    ids, total = tokenizer.encode(text, add_special_tokens=False), 0
    for at in range(0, len(ids), 254):
        window = torch.tensor([[tokenizer.cls_token_id, *ids[at:at + 254], tokenizer.sep_token_id]])
        total = total + model(window).last_hidden_state[0].sum(0).detach()
    long, short = common.embed(encoder, [text, "hello"])
    torch.testing.assert_close(long, total / total.norm(), atol=1e-4, rtol=0)
    torch.testing.assert_close(short, common.embed(encoder, ["hello"])[0], atol=1e-5, rtol=0)
    assert common.cosines(encoder, ["hello", "hello"], ["hello", ""]) == pytest.approx([1.0, -1.0], abs=1e-5)
