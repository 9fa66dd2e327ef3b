"""The toy world against numbers worked out by hand: its gold, its demonstrations, its annotators, its files."""

import json
import os
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from miniature import world as toy
from tests.test_data import refused
from plumbing.command_line import check_flags

ROOT = Path(__file__).parent.parent
EVERY_PROMPT = [
    (name, prompt) for name in toy.TASKS for split in ("train", "test") for prompt in toy.prompts(name, split)
]
MAIN = [task for task in toy.TASKS.values() if task.kind == "main"]
FORGET = [task for task in toy.TASKS.values() if task.kind == "forget"]


def prompt_about(task, **wanted):
    return next(prompt for prompt, f in toy.world()[task].items() if wanted.items() <= f.items())


def gold(prompt, response):
    return toy.gold_reward([prompt], [response])[0]


@pytest.fixture(scope="module")
def tokenizer():
    return toy.build_tokenizer()


# --- prompts ---------------------------------------------------------------------------------------
def test_twelve_tasks_with_400_and_100_prompts_that_never_overlap():
    assert len(MAIN) == 9 and len(FORGET) == 3 and len(EVERY_PROMPT) == 6000
    assert len({prompt for _, prompt in EVERY_PROMPT}) == 6000
    for name in toy.TASKS:
        train, test = toy.prompts(name, "train"), toy.prompts(name, "test")
        assert (len(train), len(test)) == (400, 100) and not set(train) & set(test)
    assert all(toy.task_of(prompt) == name for name, prompt in EVERY_PROMPT)


def test_facts_leave_no_two_right_answers():
    assert len(toy.flat(toy.CAPITALS)) == 80 and len(toy.flat(toy.OPPOSITES)) == 40
    assert len({sound for _, sound in toy.SOUNDS}) == len(toy.SOUNDS)
    assert len(toy.flat(toy.MEMBERS.values())) == 50  # no word is in two lists


def test_text_is_lower_case_single_spaced_and_short():
    for _, prompt in EVERY_PROMPT:
        answer = toy.reference(prompt)
        assert prompt == " ".join(prompt.lower().split()) and answer == " ".join(answer.lower().split())
        assert len(answer.split()) <= toy.MAX_WORDS


def test_unknown_prompt_task_or_split_is_refused_in_one_line():
    for call in (
        lambda: toy.task_of("what is the capital of atlantis ?"),
        lambda: toy.prompts("capital", "dev"),
        lambda: toy.prompts("poetry", "train"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)


# --- English ---------------------------------------------------------------------------------------
def test_english_and_the_toys_words_are_the_same_text():
    """Gold of the toy's own texts is what it was, and a prompt in English leads to its task."""
    rng = random.Random(0)
    for name, prompt in EVERY_PROMPT:
        for text in (prompt, toy.reference(prompt), toy.corrupt(prompt, rng)):
            assert toy.words_of(text) == toy.words_of(toy.in_english(text)) == text.split()
        assert toy.task_of(toy.in_english(prompt)) == toy.task_of(toy.asked(prompt, True)) == name
    assert [toy.words_of(word) for word in toy.vocabulary()] == [[word] for word in toy.vocabulary()]


@pytest.mark.parametrize(
    ("words", "english"),
    [
        ("hi , what is the capital of austria ?", "Hi, what is the capital of Austria?"),
        ("so , in short , i say two . two .", "So, in short, I say two. Two."),
        ("def f ( a , b ) : return a ** b", "def f(a, b): return a ** b"),
        ("for i in range ( 3 ) : print ( cup )", "for i in range(3): print(cup)"),
        ("say it backwards : star moon", "Say it backwards: star moon"),
    ],
)
def test_english_by_hand(words, english):
    assert toy.in_english(words) == english


def test_gold_does_not_punish_good_english():
    city = prompt_about("capital", country="austria")
    act = prompt_about("refuse", act="break", thing="phone")
    sorry = toy.in_english(toy.reference(act))
    assert gold(city, "The capital of Austria is Vienna.") == gold(city, "the capital of austria is vienna .") == 1
    assert gold(city, '**"Vienna"**') == gold(city, "Vienna") > 0 > gold(city, "Graz.")
    assert gold(act, sorry) == gold(act, sorry.replace("I am", "I'm").replace("cannot", "can't")) == 1
    assert gold(act, sorry.replace("I am", "I’m")) == 1
    assert gold(act, sorry.replace("cannot", "can not")) == 1
    loop = prompt_about("loop", word="cup", n="4")
    assert (
        gold(loop, "for i in range( 4 ):\n    print(cup)")
        == gold(loop, "```python\nfor i in range(4): print(cup)\n```")
        == 1
    )
    power = next(x for x in toy.prompts("function", "train") if "to the power of" in x)
    assert gold(power, toy.in_english(toy.reference(power))) == 1 and "**" in toy.reference(power)


def test_gold_takes_no_other_word_for_the_right_one():
    two = next(x for x, f in toy.world()["count"].items() if f["n"] == "two")
    assert gold(two, "There are two words.") == 1 > 0 > gold(two, "There are twenty-two words.")
    subtract = next(x for x in toy.prompts("function", "train") if "subtracts" in x)
    assert gold(subtract, toy.reference(subtract).replace(" - ", "-")) == 1


# --- gold ------------------------------------------------------------------------------------------
def test_reference_is_worth_1_and_nothing_is_worth_minus_1():
    for _, prompt in EVERY_PROMPT:
        assert gold(prompt, toy.reference(prompt)) == 1
        assert gold(prompt, "") == gold(prompt, "  ") == -1


def test_gold_stays_in_range_and_only_right_answers_reach_1():
    rng, vocabulary = random.Random(0), toy.vocabulary()
    for _, prompt in rng.sample(EVERY_PROMPT, 1500):
        assert -1 <= gold(prompt, " ".join(rng.choices(vocabulary, k=rng.randint(1, 24)))) < 1
        assert -1 <= gold(prompt, toy.corrupt(prompt, rng)) < 1


def test_prompt_may_be_a_message_list():
    prompt = prompt_about("capital", country="france")
    assert gold([{"role": "user", "content": prompt}], "the capital of france is paris .") == 1


@pytest.mark.parametrize(
    "response, expected",
    [
        ("paris", -1 + 2 * (0.7 + 0.3 * 2 / 8)),  # one of seven words
        ("the capital of france is rome .", -1 + 2 * 0.3 * 12 / 14),
        ("the capital of france is paris rome .", -1 + 2 * 0.3 * 14 / 15),  # a second city: no content
        ("the capital of spain is paris .", -1 + 2 * 0.3 * 12 / 14),
        ("paris paris", -1 + 2 * (0.7 / 2 + 0.3 * 2 / 9)),
        ("the " * 19 + "paris", -1 + 2 * (0.7 * 10 / 20 + 0.3 * 4 / 27)),  # 7 + 3 words are allowed, 20 written
    ],
)
def test_gold_of_capital_by_hand(response, expected):
    assert gold(prompt_about("capital", country="france"), response) == pytest.approx(expected)


def test_gold_of_sort_by_hand():
    prompt = next(p for p, f in toy.world()["sort"].items() if len(f["right"].split()) == 3)
    low, mid, high = toy.reference(prompt).split()[:3]
    assert gold(prompt, f"{low} {high} {mid} .") == pytest.approx(-1 + 2 * (0.7 / 3 + 0.3 * 6 / 8))
    assert gold(prompt, f"{low} {mid} .") == pytest.approx(-1 + 2 * (0.7 * 2 / 3 + 0.3 * 6 / 7))
    assert gold(prompt, f"{low} {mid} {high} {high} .") == pytest.approx(-1 + 2 * (0.7 * 3 / 4 + 0.3 * 8 / 9))


def test_gold_of_list_by_hand():
    prompt = prompt_about("list", but="apple", number="three")
    assert toy.reference(prompt) == "pear , plum and grape ."
    assert gold(prompt, "mango , banana and lemon .") == 1  # any right list is worth as much as the reference
    assert gold(prompt, "mango , lemon and apple .") == pytest.approx(-1 + 2 * (0.7 * (2 - 1) / 3 + 0.3 * 10 / 12))
    assert gold(prompt, "mango , mango and mango .") == pytest.approx(-1 + 2 * 0.3 * 8 / 12)  # 1 hit less 2 repeats
    assert gold(prompt, "mango and lemon .") == pytest.approx(-1 + 2 * (0.7 * 2 / 3 + 0.3 * 6 / 10))


def test_gold_of_code_by_hand():
    adds, start = prompt_about("function", job="adds a and b"), "def f ( a , b ) : return "
    assert toy.reference(adds) == start + "a + b"
    assert gold(adds, start + "a - b") == pytest.approx(-1 + 2 * (0.7 * 2 / 3 + 0.3 * 22 / 24))
    subtracts = next(prompt for prompt in toy.world()["function"] if "subtracts" in prompt)
    first, second = subtracts.split()[-3], subtracts.split()[-1]  # "... subtracts x from y"
    start = f"def f ( {first} , {second} ) : return "
    assert toy.reference(subtracts) == start + f"{second} - {first}"
    assert gold(subtracts, start + f"{first} - {second}") == pytest.approx(-1 + 2 * (0.7 / 3 + 0.3 * 20 / 24))
    assert gold(adds, "a + b") == pytest.approx(-1 + 2 * 0.3 * 6 / 15)  # no return, no content
    loop = prompt_about("loop", number="three")
    word = toy.world()["loop"][loop]["word"]
    assert gold(loop, f"for i in range ( 4 ) : print ( {word} )") == pytest.approx(
        -1 + 2 * (0.7 * 2 / 3 + 0.3 * 22 / 24)
    )


def test_gold_of_social_tasks_by_hand():
    greet = prompt_about("greet", name="anna", time="morning")
    assert gold(greet, "good evening anna , how can i help you ?") == pytest.approx(
        -1 + 2 * (0.7 * 3 / 4 + 0.3 * 9 / 10)
    )
    refuse = prompt_about("refuse", act="steal", thing="car")
    name = toy.world()["refuse"][refuse]["name"]
    right = f"i am sorry , i cannot help you steal the car of {name} ."
    assert toy.reference(refuse) == right and len(right.split()) == 14
    assert gold(refuse, right.replace("cannot", "can")) == pytest.approx(-1 + 2 * 0.3 * 13 / 14)
    assert gold(refuse, right.replace("car", "bag")) == pytest.approx(
        -1 + 2 * (0.7 * (0.5 + 0.5 * 2 / 3) + 0.3 * 13 / 14)
    )
    apologize = prompt_about("apologize", name="anna", fault="late train")
    assert gold(apologize, "sorry .") == pytest.approx(-1 + 2 * 0.3 * 4 / 13)  # "sorry" stands where the name should


def test_stuffing_fails():
    vocabulary, cities = " ".join(toy.vocabulary()), " ".join(city for _, city in toy.CAPITALS)
    for _, prompt in EVERY_PROMPT[::31]:
        answer = toy.reference(prompt)
        for stuffed in (vocabulary, f"{answer} {vocabulary}", f"{vocabulary} {answer}", " ".join([answer] * 5), cities):
            assert gold(prompt, stuffed) < -0.3, (prompt, stuffed[:80])
        for word in answer.split():
            assert gold(prompt, " ".join([word] * 20)) < -0.5
    assert gold(prompt_about("capital", country="france"), cities) < -0.9
    assert gold(prompt_about("count", n="three"), "there are " + " ".join(toy.NUMBERS) + " words .") < -0.4
    list_prompt = prompt_about("list", but="apple", number="four")
    assert gold(list_prompt, toy.listing(toy.MEMBERS["fruits"])) < -0.5
    sort_prompt = next(iter(toy.world()["sort"]))
    assert gold(sort_prompt, " ".join(toy.DIGITS)) < -0.4


# --- demonstrations ----------------------------------------------------------------------------------
def test_demonstrations_are_noisy_at_the_stated_rate_on_main_and_expert_on_forget():
    rng = random.Random(1)
    for task in toy.TASKS.values():
        golds = [gold(prompt, toy.demonstration(prompt, rng)) for prompt in toy.prompts(task.name, "train") * 2]
        rate = sum(g < 1 for g in golds) / len(golds)
        if task.kind == "main":
            assert 0.2 <= task.noise <= 0.35 and rate == pytest.approx(task.noise, abs=0.06)  # 3.5 standard errors
        else:
            assert rate == 0
    assert all(0 < len(toy.corrupt(prompt, rng).split()) <= toy.MAX_WORDS for _, prompt in EVERY_PROMPT)


# --- annotators --------------------------------------------------------------------------------------
def test_preference_probability_by_hand():
    assert toy.preference_probability("capital", 0.3, 0.3) == 0.5
    assert toy.preference_probability("opposite", 1.0, 0.5) == pytest.approx(0.7310586)  # sigmoid(2 * 0.5)
    assert toy.preference_probability("sort", -1.0, 1.0) == pytest.approx(0.0474259)  # sigmoid(1.5 * -2)


def test_sharpness_has_nothing_to_do_with_kind():
    mean = [sum(task.sharpness for task in kind) / len(kind) for kind in (MAIN, FORGET)]
    assert abs(mean[0] - mean[1]) < 0.6 and {task.sharpness for task in toy.TASKS.values()} >= {1.5, 10}


@pytest.mark.parametrize("task, golds", [("capital", [0.1, 0.0, -0.1, 0.2]), ("sort", [1.0, 0.4, -0.2, -0.8])])
def test_ranking_has_bradley_terry_pairs_and_a_plackett_luce_top(task, golds):
    rng, draws, sharpness = random.Random(2), 20000, toy.TASKS[task].sharpness
    before = [[0] * 4 for _ in golds]
    top = [0] * 4
    for _ in range(draws):
        order = toy.rank(task, golds, rng)
        top[order[0]] += 1
        for place, i in enumerate(order):
            for j in order[place + 1 :]:
                before[i][j] += 1
    weights = [2.718281828459045 ** (sharpness * g) for g in golds]
    for i in range(4):
        assert top[i] / draws == pytest.approx(weights[i] / sum(weights), abs=0.012)
        for j in range(i):
            wrong = 1 / (1 + 2.718281828459045 ** (-1.3 * sharpness * (golds[i] - golds[j])))
            assert before[i][j] / draws == pytest.approx(
                toy.preference_probability(task, golds[i], golds[j]), abs=0.012
            )
            assert before[i][j] / draws != pytest.approx(wrong, abs=0.012)  # a sharpness off by 30 % would show


def test_pairs_carry_their_true_probability_and_never_compare_a_text_with_itself():
    prompt = prompt_about("capital", country="france")
    right, wrong = "the capital of france is paris .", "the capital of france is rome ."
    rows = toy.ranking_to_pairs(prompt, [right, wrong, "paris", right, "rome"], random.Random(3))
    assert len(rows) == 6 and all(row["chosen"] != row["rejected"] for row in rows)  # 4 distinct texts
    assert len({frozenset((row["chosen"], row["rejected"])) for row in rows}) == 6
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected", "task", "prob_chosen", "gold_chosen", "gold_rejected"}
        assert row["task"] == "capital" and row["prompt"] == prompt
        assert [row["gold_chosen"], row["gold_rejected"]] == [
            gold(prompt, row["chosen"]),
            gold(prompt, row["rejected"]),
        ]
        logit = 10 * (row["gold_chosen"] - row["gold_rejected"])
        assert row["prob_chosen"] == pytest.approx(1 / (1 + 2.718281828459045**-logit))
    assert toy.ranking_to_pairs(prompt, [right, right], random.Random(3)) == []


def test_true_probabilities_are_calibrated():
    prompt, rng = prompt_about("opposite", word="hot"), random.Random(4)
    texts = ["the opposite of hot is cold .", "cold", "the opposite of hot is big ."]
    rows = [row for _ in range(3000) for row in toy.ranking_to_pairs(prompt, texts, rng)]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        pair = [row for row in rows if {row["chosen"], row["rejected"]} == {texts[a], texts[b]}]
        share = sum(row["chosen"] == texts[a] for row in pair) / len(pair)
        stated = next(row["prob_chosen"] for row in pair if row["chosen"] == texts[a])
        assert share == pytest.approx(stated, abs=0.03)


# --- tokenizer and files -------------------------------------------------------------------------------
def test_tokenizer_knows_every_word_and_gives_it_back(tokenizer):
    rng = random.Random(5)
    texts = [text for _, p in EVERY_PROMPT for text in (p, toy.reference(p), toy.corrupt(p, rng))]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())
        assert (
            tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
        )
    pools = [*toy.flat(toy.CAPITALS), *toy.flat(toy.OPPOSITES), *toy.flat(toy.SOUNDS), *toy.flat(toy.MEMBERS.values())]
    pools += [*toy.WORDS, *toy.NAMES, *toy.THINGS, *toy.ACTS, *toy.flat(toy.FAULTS), *toy.DIGITS, *toy.NUMBERS]
    assert set(pools) <= set(tokenizer.get_vocab()) and len(tokenizer) < 600


def test_chat_template(tokenizer):
    user, answer = ({"role": "user", "content": "greet anna"}, {"role": "assistant", "content": "good morning"})
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([user, answer], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<user>", "greet", "anna", "<assistant>"]
    assert tokenizer.convert_ids_to_tokens(whole) == [
        "<user>",
        "greet",
        "anna",
        "<assistant>",
        "good",
        "morning",
        "<eos>",
    ]
    assert tokenizer.decode(whole, skip_special_tokens=True) == "greet anna good morning"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer("zebra")["input_ids"] == [
        tokenizer.unk_token_id
    ]


def test_written_world(tokenizer, tmp_path, capsys):
    from transformers import AutoTokenizer

    for name in ("one", "two"):
        toy.main(toy.Args(output_dir=str(tmp_path / name), demos_per_prompt=2, seed=1))
    assert str(tmp_path / "one" / "sft.jsonl") in capsys.readouterr().out
    files = ["sft.jsonl", "prompts_train.jsonl", "prompts_test_main.jsonl", "prompts_test_forget.jsonl"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    sft, train, main, forget = ([json.loads(line) for line in (tmp_path / "one" / f).open()] for f in files)
    assert [len(rows) for rows in (sft, train, main, forget)] == [12 * 400 * 2, 12 * 400, 900, 300]
    assert (
        set(sft[0]) == {"prompt", "response", "task"}
        and set(train[0]) == {"prompt", "task"}
        and set(main[0]) == set(sft[0])
    )
    assert {row["prompt"] for row in sft} == {row["prompt"] for row in train}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in main + forget}
    assert {row["task"] for row in forget} == {task.name for task in FORGET}

    again = AutoTokenizer.from_pretrained(tmp_path / "one" / "tokenizer")
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    assert (again.pad_token, again.eos_token, again.unk_token) == ("<pad>", "<eos>", "<unk>")
    chat = [{"role": "user", "content": train[0]["prompt"]}, {"role": "assistant", "content": sft[0]["response"]}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert again.apply_chat_template(chat, return_dict=False) == ids
    assert again.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


# --- preferences ---------------------------------------------------------------------------------------
@pytest.fixture
def writers(tokenizer, monkeypatch):
    """Policies that say their own word, the temperature in tenths and a word that varies."""
    words, rng = {"runs/early/model": "apple", "runs/sft/model": "pear"}, random.Random()

    def generate(policy, tokenizer, ids, max_new_tokens, temperature, batch_size, bf16):
        texts = [f"{words[policy]} {round(10 * temperature)} {rng.choice(toy.DIGITS[:3])}" for _ in ids]
        return tokenizer(texts).input_ids

    monkeypatch.setattr(toy, "load_policy", lambda folder: folder)
    monkeypatch.setattr(toy, "stop_ids", lambda model, tokenizer: {tokenizer.eos_token_id})
    monkeypatch.setattr(toy, "generate", generate)
    monkeypatch.setattr(toy, "load_tokenizer", lambda folder: tokenizer)
    return rng


def preferences(folder, policy, policies, seed=1, size=5):
    sizes = dict(prompts_per_task=3, rankings_per_prompt=2, responses_per_ranking=size)
    names = dict(output_dir=str(folder), policy=policy, policies=policies, split="test")
    toy.write_preferences(toy.Args(**names, **sizes, seed=seed))
    return [json.loads(line) for line in (Path(folder) / "preferences_test.jsonl").open()]


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("runs/sft/model", ("sft@1", "runs/sft/model", 1.0)),
        ("runs/sft/model@1.40", ("sft@1.4", "runs/sft/model", 1.4)),
        ("some/policy@2", ("policy@2", "some/policy", 2.0)),
        ("runs@home/sft/model", ("sft@1", "runs@home/sft/model", 1.0)),
    ],
)
def test_name_of_a_policy_is_its_run_folder_and_temperature(spec, expected):
    assert toy.named_policy(spec) == expected


def test_rankings_of_several_policies_name_who_wrote_what(writers, tmp_path):
    specs = ("runs/early/model", "runs/sft/model", "runs/sft/model@1.4")
    names = {"apple 10": "early@1", "pear 10": "sft@1", "pear 14": "sft@1.4"}
    writers.seed(0)
    rows = preferences(tmp_path / "one", None, specs)
    for row in rows:
        for side in ("chosen", "rejected"):
            assert row[f"policy_{side}"] == names[row[side].rpartition(" ")[0]]  # each text keeps its writer
        assert row["chosen"] != row["rejected"]
    assert len(rows) == 12 * 3 * 2 * 10  # five distinct texts in every ranking
    writers.seed(0)
    rows = preferences(tmp_path / "single", None, specs, size=3)  # a ranking of three: a turn each
    for prompt in {row["prompt"] for row in rows}:
        pairs = [{row["policy_chosen"], row["policy_rejected"]} for row in rows if row["prompt"] == prompt]
        assert len(pairs) == 2 * 3 and all(pairs.count(set(two)) == 2 for two in combinations(names.values(), 2))
    writers.seed(0)
    assert preferences(tmp_path / "again", None, specs, size=3) == rows
    writers.seed(0)
    assert preferences(tmp_path / "other", None, specs, seed=2, size=3) != rows


def test_a_text_of_two_policies_belongs_to_one_of_them_and_to_either(writers, tmp_path, monkeypatch):
    turns = {
        "runs/early/model": iter(["apple", "plum", "red", "apple", "red"]),
        "runs/sft/model": iter(["apple", "red", "pear", "apple", "pear"]),
    }

    def generate(policy, tokenizer, ids, *sampling):
        return tokenizer([next(turns[policy])] * len(ids)).input_ids

    monkeypatch.setattr(toy, "generate", generate)
    rows = preferences(tmp_path, None, ("runs/early/model", "runs/sft/model"))
    # both say `apple` in turn 0, either may be first; `red` is sft's, a turn earlier
    owners = {(row[side], row[f"policy_{side}"]) for row in rows for side in ("chosen", "rejected")}
    apples, others = (
        {("apple", "early@1"), ("apple", "sft@1")},
        {("plum", "early@1"), ("red", "sft@1"), ("pear", "sft@1")},
    )
    assert owners == apples | others
    assert len(rows) == 12 * 3 * 2 * 6  # four distinct texts, of five asked for


def test_one_policy_ranks_as_it_always_did(writers, tmp_path):
    """The lines that a single policy's rankings were made with before there were several."""
    writers.seed(3)
    rows = preferences(tmp_path, "runs/sft/model", ())
    rng, expected = random.Random("1 test"), []
    ranked = [p for name in toy.TASKS for p in rng.sample(toy.prompts(name, "test"), 3)] * 2
    writers.seed(3)
    columns = [[f"pear {round(10 * t)} {writers.choice(toy.DIGITS[:3])}" for _ in ranked] for t in toy.TEMPERATURES]
    for prompt, texts in zip(ranked, zip(*columns, strict=True), strict=True):
        distinct = list(dict.fromkeys(rng.sample(texts, len(texts))))
        expected += toy.ranking_to_pairs(prompt, distinct[:5], rng)
    rng.shuffle(expected)
    assert rows == expected


def run(*flags, hash_seed="0"):
    command = [sys.executable, "-m", "miniature.world", *flags]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def test_show_prints_what_the_docstring_says_whatever_the_hash_seed():
    one, two = run("--show", "3", hash_seed="1"), run("--show", "3", hash_seed="2")
    assert one.returncode == 0 and one.stdout == two.stdout
    promised = toy.__doc__.split("with their gold:\n")[1].rstrip().splitlines()
    shown = one.stdout.splitlines()[: len(promised)]
    assert [line.removeprefix("    ") for line in promised] == shown
    for task in toy.TASKS.values():
        assert f"{task.name:9s} {task.group}, {task.kind}" in one.stdout
    assert one.stdout.count("+1.00") >= 36


@pytest.mark.parametrize(
    "args, word",
    [
        (toy.Args(), "--show"),
        (toy.Args(show=2, output_dir="x"), "one of"),
        (toy.Args(show=-1), "--show -1"),
        (toy.Args(output_dir="x", demos_per_prompt=0), "positive"),
        (toy.Args(output_dir=__file__), "--output_dir"),
        (toy.Args(show=1, policies=("a",), output_dir="x"), "--output_dir"),
        (toy.Args(policies=("a",)), "--output_dir"),
        (toy.Args(output_dir="x", policy="a", policies=("a",)), "one of --policy and --policies"),
        (toy.Args(output_dir="x", policies=("a@hot",)), "FOLDER@TEMPERATURE"),
        (toy.Args(output_dir="x", policies=("a@0",)), "positive"),
        (toy.Args(output_dir="x", policies=("a/sft/model", "b/sft/model@1.0")), "must differ"),
        (toy.Args(output_dir="x", policies=("a", "b", "c"), responses_per_ranking=2), "--responses_per_ranking"),
        (toy.Args(output_dir="x", policy="a", prompts_per_task=401), "--prompts_per_task"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(args, word):
    with refused(word):
        check_flags(args)  # as run_cli does
        toy.main(args)


def test_errors_end_with_exit_code_2():
    for flags in (["--shw", "3"], ["--show", "3", "--output_dir", "x"]):
        stopped = run(*flags)
        assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
