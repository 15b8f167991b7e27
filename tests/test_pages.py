"""The report, in a real browser."""

import importlib

import pytest

import common

evaluate = importlib.import_module("06_evaluate")

HOSTILE = "</script><script>console.error('escaped')</script><img src=x onerror=console.error('escaped')> <!--"
ARMS = ("none", "backward", "guarded", "recon", "judged", "recon-grpo", "e2e-grpo", "shuffled", "longest", "worst")
SCORES = ("likelihood", "masked_likelihood", "contrast", "embedding", "judge")

# By how many pixels tables are wider than the inside of their cards, and the page than the screen.
TOO_WIDE = """(() => {
  document.querySelectorAll("details").forEach(node => node.open = true);
  const page = document.documentElement, found = [["page", page.scrollWidth - page.clientWidth]];
  for (const table of document.querySelectorAll("table")) {
    const card = table.closest(".card"), padding = parseFloat(getComputedStyle(card).paddingLeft);
    found.push([card.id, table.scrollWidth - (card.clientWidth - 2 * padding)]);
  }
  return found.filter(([, over]) => over > 0);
})()"""


def make(schema, **values) -> dict:
    """A row as the stages write it; a key that they do not know fails."""
    assert values.keys() <= schema.model_fields.keys()
    return schema(**values).model_dump()


def make_scored(is_leak: bool) -> dict:
    scores = dict.fromkeys(SCORES, -0.25) | {"judge": None if is_leak else 4.5}
    row = {"trace": f"Sam is tired. {HOSTILE}", "finished": True, "tokens": 30, "leak": 0.5, "paraphrase": 0.7,
           "is_leak": is_leak, "scores": scores, "reconstruction": f"I am tired {HOSTILE}",
           "ratings": {"style": 1.0, "intent": 2.0, "values": 3.0}}
    clean = row | {"is_leak": False, "finished": False}
    return make(common.Scores, id="c1/1", candidates=[row, clean, clean, clean], baseline=scores,
                baseline_reconstruction=HOSTILE, control=clean | {"id": "c9/1"}, calls={})


def make_steps(objective: str, steps: int, looks: int) -> list[dict]:
    """`steps` training steps, a look at held-out pairs before the first `looks` of them."""
    keys = ("likelihood", "contrast", "paraphrase", "is_leak", "malformed", "unfinished", "tokens")
    seen = lambda step: {key: 0.1 * step for key in keys} | {"cosine": -1.0}
    return [make(evaluate.rl_train.Step, objective=objective, step=step, reward=0.1, measured=seen(step), update={},
                 seconds={}, validation=seen(step) if step < looks else None) for step in range(steps)]


def make_data(rl: list[dict] = (), scored: bool = True) -> dict:
    """What stage 6 writes into the report: nine arms, eight examples, hostile texts and long names."""
    people = {f"3126{place}496-e50f-4f91-a197-c5b1bfde803b": 12 for place in range(6)}
    rate = {"n": 100, "win_rate": 0.525, "ci95": [0.431, 0.612]}
    comparisons = [
        make(evaluate.Comparison, **rate, what=what, a=arm, b="backward", wins=40, ties=25, losses=35, p=0.123,
             p_holm=1.0, identical=3, flip_rate=0.123, unparsed=0.01, matched=rate, longer_wins=rate,
             by_person=dict.fromkeys(people, rate))
        for what in ("actions", "reconstructions") for arm in ARMS if arm != "backward"]
    arm = {"n": 100, "versus": "backward", "similarity": 0.345, "distinct": 0.98, "action_words": 12.3,
           "trace_words": 34.5}
    likelihood = {"action_logprob": -3.456, "action_logprob_gain": -0.123, "action_logprob_gain_ci95": [-0.2, -0.1],
                  "unfinished": 0.12}
    examples = [{
        "id": f"chitchat/54ea7100-980e-4025-99d2-9aaae0c3f942/{place}", "user": "31267496-e50f-4f91-a197-c5b1bfde803b",
        "context": f"Alex: {HOSTILE}\nSam: a{'h' * 300}", "action": f"what was really said {HOSTILE}",
        "arms": {arm: {"trace": None if arm == "none" else f"Sam is tired. {HOSTILE}", "action": f"oh no {HOSTILE}",
                       "similarity": 0.5, "outcome": None if arm == "backward" else ("win", "tie", "loss")[place % 3]}
                 for arm in ARMS},
        "scored": make_scored(place == 1) if scored and place < 6 else None} for place in range(8)]
    return {
        "arms": {name: arm | likelihood for name in ARMS}, "reconstructions": dict.fromkeys(ARMS, arm),
        "comparisons": comparisons, "judge": HOSTILE, "versus": "backward", "chosen_by": "masked_likelihood",
        "warnings": [HOSTILE], "data": {"people": people, "pairs": 100, "conversations": 20},
        "config": {"arguments": {"model": "embedded"}, "inputs": {"x" * 200: HOSTILE}}, "examples": examples,
        "rl": list(rl), "costs": [make(common.Cost, stage="03_reconstruct_score", rows=150, seconds=1234.5,
                                       tokens=1234567, requests=1234, api_tokens=1234567)] * 2}


@pytest.fixture(scope="module")
def show(browser, tmp_path_factory):
    """show(data, width) opens the report of that data."""
    page = tmp_path_factory.mktemp("report") / "report.html"

    def show(data, width=1100):
        evaluate.write_page(page, evaluate.TEMPLATE, data)
        browser.open(page, width)
        return browser

    return show


@pytest.mark.parametrize("width", [1100, 400])
def test_no_table_is_wider_than_its_card_and_hostile_text_stays_text(show, width):
    browser = show(make_data(make_steps("recon", 9, 9) + make_steps("e2e", 9, 9)), width)
    assert browser.value("document.querySelectorAll('table').length") == 9
    assert browser.value(TOO_WIDE) == []
    assert browser.value("document.images.length") == 0 and browser.value("document.scripts.length") == 2
    for place in ("warnings", "about", "example", "made"):
        assert HOSTILE in browser.value(f"document.getElementById('{place}').textContent")
    assert browser.value("document.querySelectorAll('table')[0].rows[1].cells[0].checkVisibility()")
    assert not browser.console


@pytest.mark.parametrize("steps, looks, dots, squares", [(2, 2, 0, 0), (3, 2, 5, 0), (2, 3, 0, 0), (4, 3, 5, 5)])
def test_curves_of_fewer_than_three_points_are_not_drawn(show, steps, looks, dots, squares):
    browser = show(make_data(make_steps("recon", steps, looks)))
    count = lambda kind: browser.value(f"document.querySelectorAll('#training .{kind}').length")
    assert (count("dots"), count("squares")) == (dots, squares)
    assert browser.value("document.querySelectorAll('#training circle').length") == dots * steps
    assert ("Too few steps" in browser.value("document.getElementById('training').textContent")) == (not dots)
    assert not browser.console


def test_a_step_that_only_validates_gives_no_dot_and_the_score_that_is_not_measured_no_chart(show):
    rows = make_steps("e2e", 4, 4)
    rows[3] |= {"measured": {}, "reward": 0.0}
    browser = show(make_data(rows))
    assert browser.value("[...document.querySelectorAll('#training strong')].map(node => node.textContent)") == [
        "likelihood", "tokens"]
    assert browser.value("document.querySelectorAll('#training circle').length") == 2 * 3
    assert browser.value("document.querySelectorAll('#training rect').length") == 2 * 4


def test_a_run_without_training_and_scores_shows_neither(show):
    browser = show(make_data(scored=False) | {"reconstructions": {}})
    for part in ("training-part", "scores-part", "reconstructions-part"):
        assert browser.value(f"document.getElementById('{part}').checkVisibility()") is False
    assert not browser.console


def test_examples_are_filtered_by_outcome_and_leak_and_turned_by_key(show):
    browser = show(make_data())

    def choose(select: str, value: str) -> str:
        return browser.value(f"""(() => {{
          const node = document.getElementById("{select}");
          node.value = "{value}";
          node.dispatchEvent(new Event("change"));
          return document.getElementById("place").textContent;
        }})()""")

    assert choose("of-outcome", "") == "1 of 8"
    assert choose("of-outcome", "win") == "1 of 3"                                   # 0, 3 and 6
    browser.press("ArrowRight")
    assert browser.value("document.getElementById('place').textContent") == "2 of 3"
    assert "f942/3" in browser.value("document.getElementById('example').textContent")
    assert choose("of-leak", "none") == "1 of 2"                                     # 6 has no scores
    assert choose("of-outcome", "tie") == "1 of 1"                                   # 4; 1 has a leak, 7 no scores
    assert choose("of-leak", "leak") == "1 of 1"
    assert browser.value("document.querySelectorAll('#example .bad').length") == 2   # of four candidates one is a leak
    assert choose("of-outcome", "loss") == "none like this"
    assert not browser.console
