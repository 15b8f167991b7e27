"""The whole loop in a world where the truth is known: is the cause found, and what does it teach?

    python benchmarks/planted.py                                        about two hours on one core
    python benchmarks/planted.py --writer base                          GRPO of a writer that has seen no such trace
    python benchmarks/planted.py --run runs/small --pairs 1 --test-pairs 1 --steps 1 --num-prompts 2
                                                                        five minutes, to see it work

Short chats are put together from templates. Sam shows signs of two of twelve motives and acts on one of them. The
context does not say on which, so without the action half of the guesses are right at best. An action shares no content
word with the names of its motive. Four candidates stand in random order for each pair:

    cause           names the motive that Sam acts on
    other           another pair's cause: it names the motive that Sam shows and does not act on
    justification   fits every pair
    paraphrase      says what the action says: the leak detector should stop it

Held-out pairs are made of templates for signs, motives and actions that training never sees. Pairs with the same
motive count as one conversation, so no action is held against another one of its own motive, a control names another
motive, and intervals are over motives.

GRPO starts from a writer fitted on the first candidate of each training pair, whatever kind it is: it knows what traces
of this world look like and not which are true. The base alone seldom names a motive (--writer base), and what is never
sampled cannot be reinforced.

    out    RUN/pairs.jsonl, RUN/candidates.jsonl    made here, without a model
           the outputs of stages 03 to 06           run as programs, so it goes on where it was stopped
           RUN/writer/                              the adapter that GRPO starts from
           RUN/sampled/                             what the base, the writer and the synthesizer write for held-out
                                                    pairs and for as many that they were trained on

Prints one JSON object last:

    selected      share of pairs in which each kind has the best score among those that pass; chance is a third
    stopped       share of each kind that the leak detector stops
    traces        what sampled traces name, by the base, before and after GRPO, by lists of words: the motive that Sam
                  acts on (`right`), it and another (`mixed`), the one that Sam only shows (`shown`), a `foreign` one
                  or none; `named` is right or mixed
    thoughts      what the traces name that each arm's user model writes for held-out pairs on its own
    actions       what its actions follow from, in the same way
    followed      of its traces that name a motive, the share whose action follows from that motive
    comparisons   the arm recon against the other arms, from results.json
"""

import argparse
import importlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import common
from benchmarks import speed
from benchmarks.evaluation import rounded, run_program, with_interval
from common import Candidate, Candidates, Choice, Pair, Scores, Turn

sampling, select_sft, evaluate = map(
    importlib.import_module, ("02_sample_candidates", "04_select_sft", "06_evaluate"))

ARMS, KINDS = "backward,guarded,recon,shuffled,worst", ("cause", "other", "justification", "paraphrase")
SCORES = ("likelihood", "masked_likelihood", "contrast")
HELD_OUT = 2                                               # templates of every list, the last ones, that only tests use


@dataclass(frozen=True)
class Motive:
    """Feelings and wishes follow 'Sam '; so does the paraphrase behind every action. `named` and `acted` are regexes of
    words by which a trace or an action shows the motive."""

    named: str
    acted: str
    signs: tuple[str, ...]
    feelings: tuple[str, ...]
    wishes: tuple[str, ...]
    actions: tuple[tuple[str, str], ...]


MOTIVES = {
    "hunger": Motive(
        r"hungr|starv|\beat|food|meal|belly|appetite|stomach|crav(?:e|ing)",
        r"pizza|burger|fries|noodle|taco|baker|rolls|leftover|chicken|sandwich|soup|snack|lunch|dinner|cook",
        ("i skipped breakfast today", "all i had since yesterday was a banana", "my stomach makes funny noises",
         "i ran out of groceries on tuesday", "the kitchen was closed when i got here", "the dog stole my sandwich"),
        ("is starving", "feels weak from not having eaten", "has an empty belly", "is terribly hungry by now",
         "has an appetite that keeps growing"),
        ("wants to eat as soon as possible", "hopes to get some food quickly", "would love a proper meal",
         "needs to get food into that empty stomach"),
        (("let me put that frozen pizza in the oven before we go on", "is about to bake a pizza from the freezer"),
         ("i'm ordering two burgers and a big portion of fries", "is ordering two burgers and lots of fries"),
         ("hang on, the noodles are almost done, i'll fetch a bowl", "is fetching a bowl of noodles that are ready"),
         ("is that taco place on your street still open this late?", "asks whether the taco shop nearby is open late"),
         ("i'm off to the bakery for a couple of warm rolls", "is leaving to buy fresh warm rolls at the baker's"),
         ("could you bring leftovers from your mum's roast chicken?", "asks Alex for the rest of the roast chicken"))),
    "money": Motive(
        r"money|broke\b|poor\b|debt|cash|spend|sav(?:e|ing)|afford|cost|pay\b|paying|expens|financ|budget",
        r"\bsell|library|subscription|cancelled the|hiring|night shift|lend|payday|taxi|cheap|discount|\bloan",
        ("the landlord raised the rent again", "my card got declined at the shop", "the car needs a new engine",
         "they cut my hours at work", "the heating bill has doubled", "the dentist wants eight hundred dollars"),
        ("is worried about money", "is upset about being broke again", "is stressed by growing debt",
         "is unhappy about the lack of cash", "feels poor and counts every coin"),
        ("wants to spend as little as possible", "hopes to save a bit", "would rather not pay for anything now",
         "needs to keep the costs low"),
        (("i have to sell my bike and the guitar before friday", "must have the bicycle and the guitar sold by Friday"),
         ("let's stay in and get a film from the library instead", "prefers to stay home with a film from the library"),
         ("i cancelled the gym and two of my streaming subscriptions", "has ended the gym and streaming subscriptions"),
         ("do you know if the supermarket is hiring for night shifts?", "asks if the supermarket hires for the night"),
         ("could you lend me fifty until payday next friday?", "asks Alex for a loan of fifty until payday on Friday"),
         ("i'm walking everywhere from today, no more taxis or buses", "goes on foot and gives up taxis and buses"))),
    "pride": Motive(
        r"proud|pride|success|achiev|admir|prais|triumph|accomplish",
        r"certificate|frame|podium|medal|trophy|printed|grandma|champion",
        ("my team won the final on sunday", "my story got into the paper", "i finished my first marathon",
         "the teacher read my essay to the whole class", "my cake took first prize", "i passed with top marks"),
        ("is proud of this success", "is pleased with this achievement", "is full of pride",
         "is delighted with this triumph", "glows with pride"),
        ("wants to be admired for it", "hopes to impress everyone with the success", "would like a lot of praise",
         "wants the whole world to know of the achievement"),
        (("i'm hanging the certificate in a golden frame above the sofa", "hangs a framed certificate above the sofa"),
         ("look at this photo, that's me on the podium with the medal", "shows a photo with a medal on the podium"),
         ("even the bus driver has seen the medal, i wear it daily", "wears the medal daily, even on the bus"),
         ("the trophy stands on my desk so visitors see it first", "keeps the trophy on the desk for visitors to see"),
         ("i printed the picture on a shirt and wore it to the office", "wears a shirt with the picture at the office"),
         ("grandma must hear this, i'm ringing her and my aunts tonight", "will call grandma and the aunts tonight"))),
    "loneliness": Motive(
        r"lonel|alone|company|companion|friends around|solitude|isolat|left out",
        r"come over|play cards|choir|adopt|shelter|on the phone|hang up|visit you|coffee at my",
        ("my flatmate moved out last month", "nobody called on my birthday", "the house is silent since the kids left",
         "i don't know a soul in this city", "my only friend at work quit", "i talk to no one but the cashier"),
        ("is lonely", "feels alone in this city", "is sad about all that solitude", "feels lonely and forgotten",
         "suffers from being alone"),
        ("wants to have friends around", "hopes for company", "would love some companionship",
         "needs the company of others"),
        (("can you come over tonight? we could drink tea and play cards", "asks Alex over for tea and cards tonight"),
         ("i signed up for the choir just to talk to people", "has joined a choir to talk to people"),
         ("nobody talks to me here, so i'm adopting an old dog", "adopts an old dog as nobody talks here"),
         ("please stay on the phone a little longer, don't hang up", "asks Alex not to hang up the phone yet"),
         ("can i visit you this sunday and bring a cake?", "would like to visit Alex on Sunday with a cake"),
         ("i left the neighbours a note about coffee at my place", "asks the neighbours in for coffee by a note"))),
    "tiredness": Motive(
        r"tired|exhaust|worn out|sleep|\brest\b|drained|awake|fatigue|weary|energy",
        r"lamp|good night|eyes (?:closed|open)|blanket|espresso|curtain|pyjama|pillow|in bed|to bed|\bnap\b",
        ("the baby screamed all night", "i worked a double shift again", "my alarm went off at four",
         "i drove eleven hours without a break", "the party next door ended at sunrise", "this was my third flight"),
        ("is exhausted", "feels worn out and weak", "is so tired that everything is a blur", "is sleepy and slow",
         "is drained and has no energy"),
        ("wants to sleep and nothing else", "hopes for a long rest", "would like to fall asleep on the spot",
         "needs some rest"),
        (("good night, i'm off to bed and under the blanket", "says good night from bed, under the blanket"),
         ("just five minutes on the couch with my eyes closed, promise", "lies on the couch with closed eyes"),
         ("sorry for yawning, i can barely keep my eyes open", "is yawning and can barely keep the eyes open"),
         ("another triple espresso or my head lands on the keyboard", "has another espresso not to hit the keyboard"),
         ("i'm calling in sick and pulling the curtains until noon", "will be off sick behind curtains until noon"),
         ("where are my pyjamas? the pillow is calling my name already", "looks for pyjamas and hears a pillow call"))),
    "jealousy": Motive(
        r"jealous|env(?:y|ie|ious)|bitter|begrudg|resent",
        r"everything handed|look fake|\bsmug|deserve|blocked|daddy|must be nice|spoiled|not fair|unfair",
        ("my sister got the car i dreamed of", "my ex is at the beach with someone new",
         "the new guy got promoted over me", "my roommate gets flowers every week", "my brother got the lake house",
         "my best friend has a new best friend"),
        ("is jealous", "envies others for their luck", "feels bitter that others have more", "is green with envy",
         "is jealous and resents their luck"),
        ("wants to have the same", "hopes that their happiness will not last", "would love to be in their place",
         "wishes that they lose it again"),
        (("some people get everything handed to them while i get nothing", "gets nothing while people are handed all"),
         ("honestly those pictures look fake, nobody smiles that much", "finds pictures fake with all those smiles"),
         ("why do they deserve it? i worked harder for years", "asks why they deserve it after less hard work"),
         ("they won't look so smug once the shine wears off", "expects them to be less smug when the shine is off"),
         ("i blocked his account so i don't see those parties", "has blocked his account because of the parties"),
         ("it must be nice when daddy buys whatever you ask for", "says it is nice to have a daddy who buys all"))),
    "curiosity": Motive(
        r"intrigu|captivat|myster|secret|riddle|fascinat|puzzl|wonder|truth|curious about (?:the|what|who|it)\b",
        r"torch|screwdriver|inside\?|open it|records|searched every|postman|clue|detective|investigat",
        ("there's a locked door in our cellar", "a parcel without a name lay on my step",
         "a rusty box turned up under our floor", "somebody buried a tin in my garden",
         "a letter from 1931 fell out of the wardrobe", "my late uncle left a key that fits nothing"),
        ("is captivated", "is intrigued by the mystery", "wonders what the secret is", "is fascinated by this riddle",
         "is puzzled and cannot stop wondering"),
        ("wants to find out more", "hopes to learn the truth", "would love to solve the mystery",
         "needs to get to the bottom of the secret"),
        (("i'm getting a torch and a screwdriver to look inside tonight", "takes a torch and a screwdriver to look in"),
         ("what could be inside? let's open it together with a knife", "proposes to open it together with a knife"),
         ("i have to know who lived here, tomorrow i'll check the records", "checks the records on who lived here"),
         ("who could it be? i've searched every page about it online", "has searched online for who it could be"),
         ("let me question the postman, he must have noticed strange visitors", "will ask the postman about visitors"),
         ("i drew a chart with all the clues and pinned it up", "has pinned up a chart that shows all clues"))),
    "guilt": Motive(
        r"guilt|asham|shame|conscience|regret|remorse|forgiv|make up for",
        r"was wrong|confess|my fault|such an idiot|beg them|apolog|so sorry|on my knees",
        ("i forgot my mum's birthday", "i broke his mug and blamed the cat", "i shouted at the intern",
         "i read her diary while she was out", "i drove into the fence and left", "i told her secret to everyone"),
        ("feels guilty", "is ashamed of this behaviour", "has a bad conscience", "is full of remorse",
         "deeply regrets this mistake"),
        ("wants to make up for it", "hopes to be forgiven", "would like to be rid of this guilt",
         "needs forgiveness"),
        (("i'm writing her a long letter to say that i was wrong", "writes her a long letter that it was wrong"),
         ("it was all my fault, i'll confess everything tomorrow morning", "will confess the whole fault tomorrow"),
         ("i was such an idiot, i'd do anything to take it back", "would take it back and feels like an idiot"),
         ("i'll bring them flowers and beg them not to hate me", "brings them flowers and begs not to be hated"),
         ("would she accept an apology if i went down on my knees?", "asks if she accepts an apology on bent knees"),
         ("please give him this envelope, and say i'm so sorry", "asks Alex to give him an envelope and be sorry"))),
    "nerves": Motive(
        r"nervous|anxi|dread|scared|tense|fear|afraid|frighten|panic",
        r"shaking|nails|fool of|sweat|beating|hold my hand|breathe|goes blank|pacing|butterflies|deep breath",
        ("my driving test is tomorrow at nine", "i have to give a speech at the wedding",
         "the doctor calls with the results in an hour", "i meet her parents tonight",
         "the interview is this afternoon", "i go on stage after the next song"),
        ("is nervous about what is coming", "feels anxious", "dreads that it will end badly", "is scared of failing",
         "is tense and afraid"),
        ("wants to be calmed", "hopes to get through it without panic", "would rather run away from it in fear",
         "wishes that the dreaded moment were over"),
        (("my hands are shaking and i've bitten off all my nails", "has shaking hands and has bitten all the nails"),
         ("what if i forget everything and make a fool of myself?", "could forget all and make a fool of himself"),
         ("my heart is beating so fast and i can't stop sweating", "sweats and has a heart that beats fast"),
         ("would you hold my hand? i can barely breathe in here", "asks Alex to hold a hand and barely breathes"),
         ("what if my mind goes blank and everybody starts laughing?", "imagines a blank mind and laughter"),
         ("i've been pacing up and down the corridor since dawn", "has been pacing the corridor since the morning"))),
    "boredom": Motive(
        r"bored|boring|dull|restless|monoton|\bfun\b|excitement|entertain",
        r"ceiling tile|twenty questions|prank|paper clips|dye my|silly joke|ghost story|spoons|juggl",
        ("it's been raining for five days", "there's nothing on and the wifi is down", "no customer since morning",
         "all my games are finished", "the lecture is stuck on one slide", "the train stands still in a field"),
        ("is bored to death", "finds all of this dull", "is restless and has nothing to do", "is bored stiff",
         "is fed up with this monotony"),
        ("wants some fun", "hopes for a bit of excitement", "would love some fun", "needs entertainment"),
        (("i've counted the ceiling tiles, there are two hundred and six", "has counted two hundred ceiling tiles"),
         ("let's do something crazy, we could prank call your brother", "proposes a crazy prank call to the brother"),
         ("i'm building a tower out of paper clips and old receipts", "builds a tower of paper clips and receipts"),
         ("should i dye my hair blue or shave it all off?", "asks whether to dye or to shave the hair"),
         ("tell me a silly joke or a ghost story, whichever is longer", "asks for a joke or a story about ghosts"),
         ("watch me balance six spoons on my nose for a minute", "shows Alex how six spoons balance on a nose"))),
    "love": Motive(
        r"in love|crush|smitten|ador|romance|romantic|affection|infatuat",
        r"perfume|poem|candle|knees go soft|table for two|with a heart|kiss|picnic|gorgeous|first date",
        ("the barista wrote a number on my cup", "my dance partner walked me home in the rain",
         "the cute librarian laughed at my jokes", "the violinist saved me a seat", "the florist knows my name by now",
         "the lifeguard winked at me twice"),
        ("has fallen in love", "has a crush", "is smitten and happy", "is head over heels in love",
         "is infatuated and dreamy"),
        ("wants this romance to begin", "hopes that the affection is mutual", "hopes for a romance",
         "would love to be adored as well"),
        (("i blush and my knees go soft whenever we meet", "blushes and has soft knees whenever they meet"),
         ("i wrote a poem with eleven verses, is that too much?", "has written a poem and fears that it is too long"),
         ("should i ask for a kiss tonight or is it too early?", "asks if it is too early for a kiss tonight"),
         ("i kissed the phone when that message with a heart came", "kissed the phone for a message with a heart"),
         ("i practised our first kiss on the bathroom mirror", "has practised kissing on a mirror in the bathroom"),
         ("what would you wear to a picnic with somebody that gorgeous?", "asks what to wear to a picnic"))),
    "anger": Motive(
        r"\bang(?:er|r)|furious|fury|outrag|rage\b|revenge|offended|punish|\bmad\b|get even|annoy|irritat",
        r"manager|capital letters|slammed|lawyer|one star|liars|threw the|\bsue\b|complaint",
        ("my boss took the credit for my work", "somebody scratched my car", "the airline lost my bags again",
         "he cancelled five minutes before", "the builders cut our water pipe", "the bank charged me twice"),
        ("is furious", "is angry at being treated like that", "feels outraged", "is boiling with rage",
         "is mad and offended"),
        ("wants to get even", "hopes that they are punished", "would love some revenge", "needs to let the anger out"),
        (("this is unacceptable, i'm writing to the manager in capital letters", "writes to the manager in capitals"),
         ("i slammed the door so hard that the glass cracked", "has slammed the door until the glass cracked"),
         ("they'll hear from my lawyer first thing on monday morning", "will have a lawyer call them on Monday"),
         ("one star, and i'm posting the whole story everywhere", "gives one star and posts the story everywhere"),
         ("what a bunch of liars, i'll never go back there", "calls them liars and will never go back"),
         ("i threw the whole folder out of the window just now", "has thrown the folder out of a window"))),
}
OPENERS = ("hey, how was your week?", "long time no see, how are you?", "morning! what's new over there?",
           "hi again, tell me everything", "hello stranger, how have you been?", "good evening, what did i miss?")
REPLIES = ("oh really?", "wow, ok", "hm, i see", "no way", "is that so?", "oh, that's something")
QUESTIONS = ("so what now?", "and what are you doing at the moment?", "so what's your plan?",
             "and what else is going on?", "so how do you go on from here?", "and what are you up to now?")
JUSTIFICATIONS = (
    "wants to reply to the message and keep the talk going", "likes chatting with Alex and hopes to be a good friend",
    "enjoys the conversation and wants to share what is new", "feels like talking and wants to keep Alex informed",
    "likes Alex and wants to go on with this chat", "hopes for a pleasant talk and wants to be open with Alex")


# ----------------------------------------------------------------------------------------------------------------------
# The world


def usable(templates: Sequence, held_out: bool) -> Sequence:
    """Those templates that a pair may use: no held-out pair shares one with training."""
    return templates[-HELD_OUT:] if held_out else templates[:-HELD_OUT]


def make_pair(motive: str, number: int, held_out: bool, seed: int) -> Pair:
    """A chat with signs of the motive and of another one. Keys beside the schema hold the truth, and traces."""
    draw = random.Random(common.stable_seed(seed, "planted", held_out, number))
    pick = lambda templates: draw.choice(usable(templates, held_out))
    truth, shown = MOTIVES[motive], draw.choice([name for name in MOTIVES if name != motive])
    signs = draw.sample([pick(truth.signs), pick(MOTIVES[shown].signs)], 2)
    said = [("sam", " and ".join(signs))] if draw.random() < 1 / 3 else [
        ("sam", signs[0]), ("alex", pick(REPLIES)), ("sam", signs[1])]
    opener = [("alex", pick(OPENERS))] if len(said) == 1 or draw.random() < 0.5 else []
    action, paraphrase = pick(truth.actions)
    group = f"planted/{motive}"
    return Pair(
        id=f"{group}/{'held-out' if held_out else 'train'}-{number}", user="sam", conversation=group, action=action,
        split="test" if held_out else "val" if number % 11 == 10 else "train",          # 11: of all twelve motives
        context=[Turn(speaker=name, text=text) for name, text in [*opener, *said, ("alex", pick(QUESTIONS))]],
        motive=motive, shown=shown, cause=f"Sam {pick(truth.feelings)}. Sam {pick(truth.wishes)}.",
        justification=f"Sam {pick(JUSTIFICATIONS)}.", paraphrase=f"Sam {paraphrase}.")


def make_world(pairs: int, test_pairs: int, seed: int) -> tuple[list[Pair], list[Candidates]]:
    """`pairs` and `test_pairs` pairs of each motive, with the candidates of each pair."""
    world, rows = [], []
    for held_out, count in ((False, pairs), (True, test_pairs)):
        made = [make_pair(motive, number, held_out, seed) for number, motive in enumerate([*MOTIVES] * count)]
        for pair in made:
            draw = random.Random(common.stable_seed(seed, "candidates", pair.id))
            truth = pair.model_extra
            traces = truth | {"other": draw.choice([some.cause for some in made if some.motive == pair.shown])}
            kinds = draw.sample(KINDS, len(KINDS))
            # No tokenizer is needed here: words will do, as tokens only tell the arm longest what to take.
            rows.append(Candidates(id=pair.id, kinds=kinds, candidates=[
                Candidate(trace=traces[kind], finished=True, tokens=len(common.words_of(traces[kind])))
                for kind in kinds]))
        world += made
    return world, rows


def write_world(args: argparse.Namespace) -> None:
    """RUN/pairs.jsonl; RUN/candidates.jsonl, as if stage 2 had made it; RUN/sampled/pairs.jsonl, both kinds of pair."""
    pairs, rows = make_world(args.pairs, args.test_pairs, args.seed)
    held_out, train = ([pair for pair in pairs if pair.split == split] for split in ("test", "train"))
    settings = {"arguments": {key: getattr(args, key) for key in ("pairs", "test_pairs", "seed")},
                "world": common.hash_of(pairs, rows)}
    as_sampled = sampling.parse_args(["--run", str(args.run), "--model", args.model, "--seed", str(args.seed),
                                      "--max-trace-tokens", str(args.max_trace_tokens)])
    for name, some in (("pairs.jsonl", pairs), ("candidates.jsonl", rows),
                       ("sampled/pairs.jsonl", held_out + train[:len(held_out)])):
        config = settings
        if name == "candidates.jsonl":                     # stage 5 reads there how to sample
            config = settings | common.run_config(as_sampled, [args.run / "pairs.jsonl"])
        if not common.is_made(args.run / name, config, False):
            common.write_file(args.run / name, "".join(map(common.dump_row, some)), config)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def selected(rows: Sequence[Scores], pairs: dict[str, Pair], score: str) -> dict[str, Any]:
    """Which kind of candidate stage 4 takes as the arm recon."""
    kinds = [row.kinds[select_sft.choose_candidate("recon", row, score)] for row in rows]
    found = with_interval([kind == "cause" for kind in kinds], [pairs[row.id].conversation for row in rows])
    return {"cause": found, **{kind: kinds.count(kind) / len(kinds) for kind in KINDS[1:]}}


def stopped(rows: Sequence[Scores]) -> dict[str, float]:
    """Share of each kind of candidate that the leak detector stops."""
    return {kind: sum(row.candidates[row.kinds.index(kind)].is_leak for row in rows) / len(rows) for kind in KINDS}


def shown_motives(text: str, in_action: bool) -> set[str]:
    """The motives whose words a trace or an action holds; an action may name its motive as well."""
    return {name for name, motive in MOTIVES.items()
            if re.search(motive.named, text.lower()) or in_action and re.search(motive.acted, text.lower())}


def verdict(text: str, pair: Pair, in_action: bool = False) -> str:
    """What a text says of why Sam acts, in one word; see above."""
    found = shown_motives(text, in_action)
    if pair.motive in found:
        return "right" if found == {pair.motive} else "mixed"
    return "shown" if pair.shown in found else "foreign" if found else "none"


def count_verdicts(texts: Iterable[tuple[Pair, str]], in_action: bool = False) -> dict[str, Any]:
    rows = [(verdict(text, pair, in_action), pair.conversation) for pair, text in texts]
    counts = Counter(word for word, _ in rows)
    of = lambda *words: with_interval([word in words for word, _ in rows], [cluster for _, cluster in rows])
    return {"named": of("right", "mixed"), "right": of("right"),
            **{word: counts[word] / len(rows) for word in ("mixed", "shown", "foreign", "none")}}


def followed(answers: Sequence[tuple[Pair, evaluate.Answer]]) -> dict[str, Any] | None:
    """How often an action follows from a motive that the trace before it names."""
    rows = [(shown_motives(answer.trace, False), shown_motives(answer.action, True), pair.conversation)
            for pair, answer in answers]
    found = [(bool(named & acted), cluster) for named, acted, cluster in rows if named]
    return with_interval(*zip(*found)) if found else None


def gain(before: Sequence[Candidates], after: Sequence[Candidates], pairs: dict[str, Pair], words: Sequence[str]
         ) -> dict[str, Any]:
    """How much more of a pair's traces have one of these verdicts after training."""
    rights = [{row.id: sum(verdict(some.trace, pairs[row.id]) in words for some in row.candidates)
               / len(row.candidates) for row in rows} for rows in (before, after)]
    points = [rights[1][name] - rights[0][name] for name in rights[0]]
    return with_interval(points, [pairs[name].conversation for name in rights[0]])


# ----------------------------------------------------------------------------------------------------------------------
# The program


def fit_writer(args: argparse.Namespace) -> None:
    """RUN/writer: an adapter fitted, with stage 4's defaults, on the traces of the arm backward."""
    source, traces = args.run / "pairs.jsonl", args.run / "traces" / "backward.jsonl"
    fitting = select_sft.parse_args(["--run", str(args.run), "--model", args.model, "--seed", str(args.seed)])
    config = common.run_config(fitting, [source, traces], ["synthesis"], ["arms", "tag", "score"])
    if common.is_made(args.run / "writer", config, False):
        return
    local = common.load_model(args.model, False, "auto")
    pairs = {pair.id: pair for pair in common.read_rows(source, Pair)}
    examples = [(common.encode_prompt(local.tokenizer, common.synthesis_prompt(pairs[row.id])),
                 [*common.encode_data(local.tokenizer, row.trace), local.tokenizer.eos_token_id])
                for row in common.read_rows(traces, Choice)]
    model, _ = select_sft.fit_user_model(local.model, examples, fitting, "the writer")
    common.save_adapter(model, args.run / "writer", config)


def run_stages(args: argparse.Namespace) -> None:
    """Stages 3 to 6, and stage 2 with the base, the writer and the trained synthesizer for pairs of both kinds."""
    sampled, stage = args.run / "sampled", ["--model", args.model, "--seed", str(args.seed)]
    grpo = [part for name in (
        "steps", "num_prompts", "num_generations", "val_every", "lr", "paraphrase_weight", "limit_cost")
            for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    run_program("03_reconstruct_score.py", "--run", str(args.run), *stage, "--scorers", "likelihood")
    run_program("04_select_sft.py", "--run", str(args.run), *stage, "--arms", ARMS, "--score", args.score)
    adapters = {"grpo": args.run / "models" / "synthesizer"}
    if args.writer == "fitted":
        fit_writer(args)
        adapters["writer"] = args.run / "writer"
        grpo += ["--init-adapter", str(args.run / "writer")]
    run_program("05_rl_train.py", "--run", str(args.run), *stage, *grpo)
    run_program("02_sample_candidates.py", "--run", str(sampled), *stage, "--num-samples", str(args.num_traces),
                "--max-trace-tokens", str(args.max_trace_tokens))
    for tag, adapter in adapters.items():
        run_program("02_sample_candidates.py", "--run", str(sampled), *stage, "--tag", tag, "--adapter", str(adapter))
    run_program("06_evaluate.py", "--run", str(args.run), *stage, "--versus", "guarded", "--round-robin")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = speed.make_parser(
        __doc__, pairs=(12, "of each motive, for training and validation"), test_pairs=(6, "of each motive, held out"),
        steps=(120, "of GRPO"), num_prompts=(12, "a step"), num_generations=(8, "traces a prompt in GRPO"),
        val_every=(20, "steps between looks at validation pairs"), num_traces=(4, "sampled for each held-out pair"),
        max_trace_tokens=(24, "in a sampled trace, at most; the longest cause has 19"))
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/planted"), metavar="DIR", help="of everything")
    add("--model", default="embedded", metavar="NAME", help="as in the stages")
    add("--seed", type=int, default=0, help="of the world and of the stages")
    add("--lr", type=common.positive_float, default=3e-4, help="of GRPO")
    add("--paraphrase-weight", type=common.fraction, default=0.3, help="as in stage 5, which has 0.2")
    add("--limit-cost", type=common.fraction, default=0.1, help="as in stage 5, which has 0.05; see docs/results.md")
    add("--writer", choices=("fitted", "base"), default="fitted", help="what GRPO starts from; see above")
    add("--score", choices=SCORES, default="contrast", help="what the arm recon is chosen by")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    write_world(args)
    run_stages(args)
    pairs = {pair.id: pair for pair in common.read_rows(args.run / "pairs.jsonl", Pair)}
    rows = common.read_rows(args.run / "scores.jsonl", Scores)
    splits = {split: [row for row in rows if pairs[row.id].split == split] for split in ("train", "test")}
    base, after, before = (
        common.read_rows(args.run / "sampled" / common.tagged("candidates.jsonl", tag), Candidates)
        for tag in (None, "grpo", "writer" if args.writer == "fitted" else None))
    traces = {}
    for split in ("train", "test"):
        of = lambda rows: [row for row in rows if pairs[row.id].split == split]
        traces[split] = {name: count_verdicts(
            (pairs[row.id], candidate.trace) for row in of(found) for candidate in row.candidates)
            for name, found in (("base", base), ("before", before), ("after", after))}
        traces[split] |= {f"gain_in_{word}": gain(of(before), of(after), pairs, words) for word, words in (
            ("named", ("right", "mixed")), ("right", ("right",)))}
    results = json.loads((args.run / "results.json").read_text(encoding="utf-8"))
    written = {arm: [(pairs[row.id], answer) for row in common.read_rows(
        args.run / "predictions" / f"{arm}.jsonl", evaluate.Prediction) for answer in row.answers]
        for arm in results["arms"]}
    print(json.dumps(rounded({
        "machine": speed.machine(), "torch": torch.__version__, "model": args.model, "score": args.score,
        "pairs": {split: len(some) for split, some in splits.items()},
        "selected": {split: {score: selected(some, pairs, score) for score in SCORES}
                     for split, some in splits.items()},
        "stopped": {split: stopped(some) for split, some in splits.items()},
        "traces": traces,
        "thoughts": {arm: count_verdicts((pair, answer.trace) for pair, answer in found)
                     for arm, found in written.items()},
        "actions": {arm: count_verdicts(((pair, answer.action) for pair, answer in found), True)
                    for arm, found in written.items()},
        "followed": {arm: followed(found) for arm, found in written.items()},
        "comparisons": [{key: row[key] for key in ("a", "b", "n", "win_rate", "ci95", "p", "p_holm")}
                        for row in results["comparisons"] if row["a"] == "recon" and row["what"] == "actions"]})))


if __name__ == "__main__":
    main()
