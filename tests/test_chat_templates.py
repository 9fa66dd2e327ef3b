"""One form of a text: whoever reads prompt and answer reads the same tokens, of real models' chat
templates. The form is the template's generation prompt, the answer, and the token that ends a turn.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

import am_train
import evaluate
import ppo_sr
import select_rehearsal
import sft
import utils
from baselines import ppo_any_reward
from tests.chat_templates import (
    ANSWER,
    CHATML,
    MODELS,
    OTHER,
    PROMPT,
    SMOLLM2,
    markdown,
    messages,
    models_for,
    save_policy,
    save_scorer,
    template_of,
    tokenizer_for,
)
from tests.test_data import jsonl
from utils import InputError, encode_pair, load_policy, load_tokenizer, stop_ids

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH, NAMES = 256, list(MODELS)
CHAT = [name for name in NAMES if MODELS[name].template]
SEPARATED = {"template": None, "eos": None, "sep_token": "[SEP]"}  # [SEP] and no <eos>


def prompt_ids(tokenizer, prompt=PROMPT):
    user = messages(prompt, "")[:1]
    if not tokenizer.chat_template:
        return tokenizer(prompt).input_ids
    return tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)


def form(name, answer=ANSWER, **changes):
    """What everybody must read, made without the code under test."""
    tokenizer = tokenizer_for(name, **changes)
    ids = tokenizer(answer, add_special_tokens=False).input_ids
    return [*prompt_ids(tokenizer), *ids, tokenizer.convert_tokens_to_ids(MODELS[name].end)]


def encode(tokenizer, answer=ANSWER):
    return encode_pair(tokenizer, PROMPT, answer, LENGTH, False, "a.jsonl, line 1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (policy, scorer), made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = models_for(name, tmp_path_factory.mktemp("models"))
        return made[name]

    return of


@pytest.fixture
def read(monkeypatch):
    """All texts, as tuples of ids, that go into a model."""
    seen, pad = set(), utils.pad

    def recorded(sequences, *args, **options):
        seen.update(map(tuple, sequences))
        return pad(sequences, *args, **options)

    for module in (utils, sft, am_train, evaluate, ppo_sr, select_rehearsal, ppo_any_reward):
        monkeypatch.setattr(module, "pad", recorded, raising=False)
    return seen


# --- the form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_form(name):
    tokenizer = tokenizer_for(name)
    end = tokenizer.convert_tokens_to_ids(MODELS[name].end)
    assert utils.answer_end(tokenizer) == end
    assert encode(tokenizer) == (form(name), len(prompt_ids(tokenizer)), 0)
    # a <bos> of template and post-processor stands there once; and nothing behind the end
    assert all(a != b for a, b in pairwise(form(name)) if tokenizer.bos_token_id in (a, b))
    assert form(name).count(tokenizer.bos_token_id) <= 3 and form(name)[-1] == end


@pytest.mark.parametrize("name", CHAT)
def test_the_form_is_what_the_template_makes_of_the_whole_conversation(name):
    """Up to the token that ends the turn. Where a template puts something before the content, as
    Qwen 3 does (no thoughts) and Mistral (a space), the generation prompt does not have it: neither
    has a policy's answer, and neither has the form."""
    tokenizer, model = tokenizer_for(name), MODELS[name]
    whole = tokenizer.apply_chat_template(messages(PROMPT, ANSWER), return_dict=False)
    text = tokenizer.apply_chat_template(messages(PROMPT, ANSWER), tokenize=False)
    assert text.endswith(model.before + ANSWER + model.end + model.behind)
    ids, prompt_len, _ = encode(tokenizer)
    before = tokenizer(model.before, add_special_tokens=False).input_ids
    start = [*ids[:prompt_len], *before, *ids[prompt_len:]]
    assert start == whole[: len(start)]
    assert before == [] or name in ("Qwen 3", "Mistral 7B")


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_has_its_end_gets_no_second_one(name):
    tokenizer = tokenizer_for(name)
    assert encode(tokenizer, ANSWER + MODELS[name].end)[0] == form(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_an_answer_stops_a_policy(name, folders):
    """Whether or not its generation config lists it: a policy trained to end so must be able to."""
    policy, tokenizer = load_policy(folders(name)[0]), load_tokenizer(folders(name)[0])
    end = tokenizer.convert_tokens_to_ids(MODELS[name].end)
    for listed in (policy.generation_config.eos_token_id, tokenizer.eos_token_id, None):
        policy.generation_config.eos_token_id = listed
        assert {end, tokenizer.eos_token_id} <= stop_ids(policy, tokenizer)


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
ENDS = {  # template, <eos> -> the end of an answer
    "no template": (None, "<eos>", "<eos>"),
    "no token in the template": (TURNS, "<eos>", "<eos>"),
    "Llama 2: a space before it": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content']"
        " + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<eos>", "<eos>",
    ),
    "the next turn's first token is not it": (
        "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}",
        "<eos>", "<end>",
    ),
    "a template without <eos>": (CHATML.replace("<|im_end|>", "<end>"), None, "<end>"),
    "neither": (None, None, None),
    "neither, with a template": (TURNS, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_the_end_of_an_answer(case):
    template, eos, end = ENDS[case]
    special = {"bos_token": "<bos>", "pad_token": "<start>", "sep_token": "<end>"}
    tokenizer = tokenizer_for("no template", template=template, eos=eos, **special)
    if end is None:
        with pytest.raises(InputError, match=r"^[^\n]+\Z"):
            utils.answer_end(tokenizer)
    else:
        assert utils.answer_end(tokenizer) == tokenizer.convert_tokens_to_ids(end)


# --- who reads it ---------------------------------------------------------------------------------

PAIRS = [{"prompt": PROMPT, "chosen": ANSWER, "rejected": OTHER}] * 2
ANSWERED = [{"prompt": PROMPT, "response": ANSWER, "reference": OTHER}] * 2


def run_sft(policy, data, out, **changes):
    flags = {"dataset_name": data, "output_dir": str(out), "max_length": LENGTH}
    sft.main(sft.Args(model_name_or_path=policy, **flags | changes))
    return f"{out}/model"


def run_am_train(policy, data, out, **changes):
    flags = {"dataset_name": data, "output_dir": str(out), "max_length": LENGTH, "loss": "rm"}
    am_train.main(am_train.Args(model_name_or_path=policy, **flags | changes))
    return f"{out}/model"


def run_judge(scorer, answers, out):
    flags = {"output_dir": str(out), "num_bootstrap": 10, "max_length": LENGTH}
    evaluate.main(evaluate.Winrate(responses=answers, judge=scorer, **flags))
    return rows_of(f"{out}/responses.jsonl")


def ppo_args(policy, scorer, data, out, **changes):
    flags = {"dataset_name": data, "output_dir": str(out), "max_length": LENGTH, "total_steps": 1}
    flags |= {"global_batch_size": 2, "response_length": 64, "reward_model_path": scorer}
    return ppo_sr.Args(model_name_or_path=policy, **flags | changes)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("name", NAMES)
def test_training_and_evaluation_read_the_form(name, folders, read, tmp_path):
    policy, scorer = folders(name)
    right, other = tuple(form(name)), tuple(form(name, OTHER))
    answered = jsonl(tmp_path / "answered.jsonl", *ANSWERED)
    pairs = jsonl(tmp_path / "pairs.jsonl", *PAIRS)
    run_sft(policy, answered, tmp_path / "sft")
    assert read == {right}
    read.clear()
    run_am_train(policy, pairs, tmp_path / "rm", eval_dataset_name=pairs)
    assert read == {right, other}
    read.clear()
    flags = {"output_dir": str(tmp_path / "calibration"), "max_length": LENGTH}
    evaluate.main(evaluate.Calibration(scorers=(scorer,), dataset_name=pairs, **flags))
    assert read == {right, other}
    read.clear()
    run_judge(scorer, answered, tmp_path / "winrate")
    assert {right, other} <= read  # and a probe


def test_selection_reads_the_form(folders, read, tmp_path):
    policy, scorer = folders("Gemma 3")
    flags = {"num_clusters": 1, "embedding_model": policy, "output_dir": str(tmp_path / "out")}
    flags |= {"dataset_name": jsonl(tmp_path / "answered.jsonl", *ANSWERED), "max_length": LENGTH}
    select_rehearsal.main(select_rehearsal.Args(reward_model_path=scorer, **flags))
    assert read == {tuple(form("Gemma 3"))}


@pytest.mark.parametrize("name", NAMES)
def test_ppo_reads_the_form(name, folders, read, tmp_path):
    """Its rehearsal rows, and what its scorer sees of a finished and of a cut answer."""
    policy, scorer = folders(name)
    data = jsonl(tmp_path / "answered.jsonl", *ANSWERED)
    args = ppo_args(policy, scorer, data, tmp_path / "out", rehearsal_dataset_name=data)
    ppo = ppo_sr.PPO(args)
    right, x = form(name), prompt_ids(tokenizer_for(name))
    assert ppo.prompts == [x, x]
    assert [a + b for a, b in ppo.rehearsal] == [right, right] and ppo.rehearsal[0][0] == x
    end, stops = right[-1], stop_ids(ppo.policy, ppo.tokenizer)
    y = right[len(x) : -1]

    def scored(y, of=ppo):
        read.clear()
        scores = of.read_scorer(ppo.rows[:1], [(x, y)])
        return scores.item(), read - {(0,)}

    finished, ids = scored([*y, end])
    assert ids == {tuple(right)}
    assert scored(y)[1] == {tuple(right[:-1])}
    for stop in stops - {end}:  # another stop token is an end as well, and not one of the scorer's
        assert scored([*y, stop]) == (pytest.approx(finished, abs=1e-5), {tuple(right)})
    any_args = ppo_any_reward.Args(**vars(args))
    assert scored([*y, end], ppo_any_reward.AnyReward(any_args)) == (
        pytest.approx(finished, abs=1e-5),
        {tuple(right)},
    )


def compare_with_evaluate(args, scorer, out):
    """PPO's logged scores of its first answers equal evaluate.py's of the same texts."""
    ppo_sr.main(args)
    first = [r for r in rows_of(f"{args.output_dir}/samples.jsonl") if r["step"] == 0]
    rows = [{"prompt": r["prompt"], "response": r["response"], "reference": ""} for r in first]
    assert len({r["response"] for r in rows}) > len(rows) / 2  # else the answers tell nothing
    judged = run_judge(scorer, jsonl(Path(out) / "stored.jsonl", *rows), Path(out) / "judged")
    assert [r["response"] for r in judged] == [r["response"] for r in rows]
    found, expected = [r["score"] for r in first], [r["score"] for r in judged]
    assert found == pytest.approx(expected, abs=1e-4)


QUESTIONS = [{"prompt": f"What is {i} + {i}?"} for i in range(8)]
END_TO_END = ("Gemma 3", "Phi-3", "Llama 3, first release", "Qwen 3", "Mistral 7B", "no template")


@pytest.mark.parametrize("name", END_TO_END)
def test_from_sft_to_the_judge(name, folders, read, tmp_path):
    """SFT, scorer, PPO with rehearsal, judge, one step each, and one form of the text in all."""
    answered = jsonl(tmp_path / "answered.jsonl", *ANSWERED)
    policy = run_sft(folders(name)[0], answered, tmp_path / "sft", learning_rate=1e-4)
    pairs = jsonl(tmp_path / "pairs.jsonl", *PAIRS)
    scorer = run_am_train(policy, pairs, tmp_path / "rm", learning_rate=1e-3)
    read.clear()
    prompts = jsonl(tmp_path / "prompts.jsonl", *QUESTIONS)
    more = {"rehearsal_dataset_name": answered, "rehearsal_batch_size": 2}
    more |= {"eval_dataset_names": (prompts,)}
    args = ppo_args(policy, scorer, prompts, tmp_path / "ppo", **more)
    compare_with_evaluate(args, scorer, tmp_path)
    assert tuple(form(name)) in read  # D_R, in the updates


# --- scorers of another form, tokenizers that are none --------------------------------------------

WITHOUT_SYSTEM = SMOLLM2.replace("You are a helpful AI assistant named SmolLM, ", "")
DIFFERENT = {  # policy, the scorer's template
    "none": ("ChatML on a base model", None),
    "none, <bos> by the post-processor": ("Gemma 3", None),
    "another system message": ("SmolLM2", WITHOUT_SYSTEM),
    "plain ChatML": ("SmolLM2", CHATML),
    "another end": ("Qwen 3", CHATML.replace("<|im_end|>", "<|endoftext|>")),
    "a template, and the policy has none": ("no template", TURNS),
}


def one_line(capsys, *parts):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    missing = [part for part in parts if str(part) not in error]
    assert not missing, f"{missing} in: {error}"


def run_script(monkeypatch, capsys, module, args):
    """run_cli with these Args, as the command line makes them: its exit code."""
    flags = [x for k, v in vars(args).items() if v not in (None, ()) for x in (f"--{k}", str(v))]
    capsys.readouterr()  # the bars of models that were saved before
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *flags])
    try:
        utils.run_cli(module.main, module.Args, "")
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_scorer_with_another_template_is_refused_or_read_in_its_own_form(
    case, folders, tmp_path, monkeypatch, capsys
):
    name, template = DIFFERENT[case]
    policy, scorer = folders(name)[0], str(tmp_path / "scorer")
    save_scorer(scorer, tokenizer_for(name, template=template))
    prompts = jsonl(tmp_path / "prompts.jsonl", *QUESTIONS)
    args = ppo_args(policy, scorer, prompts, tmp_path / "ppo")
    if run_script(monkeypatch, capsys, ppo_sr, args) == 2:
        one_line(capsys, "--reward_model_path", "baselines/ppo_any_reward.py")
        assert not (tmp_path / "ppo").exists()
        return
    args = ppo_args(policy, scorer, prompts, tmp_path / "again", eval_dataset_names=(prompts,))
    compare_with_evaluate(args, scorer, tmp_path)


@pytest.mark.parametrize("case", DIFFERENT)
def test_any_reward_reads_a_scorer_in_its_own_form(case, folders, read, tmp_path):
    name, template = DIFFERENT[case]
    policy, scorer = folders(name)[0], str(tmp_path / "scorer")
    save_scorer(scorer, tokenizer_for(name, template=template))
    data = jsonl(tmp_path / "answered.jsonl", *ANSWERED)
    args = ppo_any_reward.Args(**vars(ppo_args(policy, scorer, data, tmp_path / "out")))
    ppo, right = ppo_any_reward.AnyReward(args), form(name)
    read.clear()
    x = ppo.prompts[0]
    ppo.read_scorer(ppo.rows[:1], [(x, right[len(x) :])])
    assert read == {tuple(encode(load_tokenizer(scorer))[0])} != {tuple(right)}


APPENDS = {"post": "<s> $A </s>", "template": None}  # add_eos_token


def test_a_tokenizer_that_appends_eos_does_not_end_prompts(read, tmp_path):
    """Nor two <eos> behind an answer."""
    name, right = "no template, with <s>", form("no template, with <s>")
    tokenizer = tokenizer_for(name, **APPENDS)
    assert tokenizer(PROMPT).input_ids[-1] == tokenizer.eos_token_id  # so it is
    policy, scorer = models_for(name, tmp_path, **APPENDS)
    loaded = load_tokenizer(policy)
    for answer in (ANSWER, ANSWER + "</s>"):
        assert encode(loaded, answer) == (right, len(right) - 3, 0)
    data = jsonl(tmp_path / "answered.jsonl", *ANSWERED)
    run_sft(policy, data, tmp_path / "sft")
    assert read == {tuple(right)}
    args = ppo_args(policy, scorer, data, tmp_path / "ppo", rehearsal_dataset_name=data)
    ppo = ppo_sr.PPO(args)
    assert ppo.prompts == [right[:-3]] * 2
    assert [a + b for a, b in ppo.rehearsal] == [right] * 2
    prompts = jsonl(tmp_path / "prompts.jsonl", *QUESTIONS)
    args = ppo_args(policy, scorer, prompts, tmp_path / "more", eval_dataset_names=(prompts,))
    compare_with_evaluate(args, scorer, tmp_path)


@pytest.mark.parametrize("script", ["sft", "am_train", "ppo_sr"])
def test_a_causal_lm_that_cannot_end_is_refused(script, tmp_path, monkeypatch, capsys):
    tokenizer = tokenizer_for("no template", **SEPARATED)
    policy, scorer = str(tmp_path / "policy"), str(tmp_path / "scorer")
    save_policy(policy, tokenizer, tokenizer.sep_token_id, None)
    save_scorer(scorer, tokenizer)
    data = jsonl(tmp_path / "data.jsonl", PAIRS[0] | ANSWERED[0])
    how = {"model_name_or_path": policy, "dataset_name": data, "output_dir": str(tmp_path / "out")}
    module, args = {
        "sft": (sft, sft.Args(**how)),
        "am_train": (am_train, am_train.Args(**how)),
        "ppo_sr": (ppo_sr, ppo_args(policy, scorer, data, tmp_path / "out")),
    }[script]
    assert run_script(monkeypatch, capsys, module, args) == 2
    one_line(capsys, policy)
    assert not (tmp_path / "out").exists()


# --- the table of docs/results/chat_templates.md --------------------------------------------------


def test_the_table_of_docs():
    lines = markdown().split("\n")
    assert len(lines) == 2 + len(MODELS)
    for line, (name, model) in zip(lines[2:], MODELS.items(), strict=True):
        _, named, what, behind, _ = re.split(r"(?<!\\)\|", line)
        assert named.strip() == name
        text = what.strip().strip("`").replace("↵", "\n").replace(r"\|", "|")
        assert text.endswith(ANSWER + model.end) and PROMPT in text
        assert bool(behind.strip()) == bool(model.behind)
    page = Path(__file__).parents[1] / "docs/results/chat_templates.md"
    assert markdown() in page.read_text(encoding="utf-8")  # python -m tests.chat_templates makes it anew


def test_templates_are_read():
    assert all(template_of(name) for name in CHAT) and template_of("no template") is None
