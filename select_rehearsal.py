"""Selective rehearsal, step one (§3.2 of "Stabilizing RLHF through Advantage Model and Selective
Rehearsal"): find the representative, high-quality examples D_R that PPO should not forget.

    sample    y ~ pi_init(. | x) for every PPO prompt x
    score     a(x, y) with the advantage model
    embed     x with a sentence encoder (paper: SimCSE), never y
    cluster   KMeans or a Gaussian mixture into c clusters
    keep      the top-k pairs of each cluster by a(x, y)    -> rehearsal.jsonl, D_R of Eq. 9

    python select_rehearsal.py --model_name_or_path runs/sft/model \
        --reward_model_path runs/am/model --dataset_name prompts.jsonl --output_dir runs/select

D_R "could come from other important data sources representing specific skills" (§3.2). Rows that
have a `response` need no policy. This keeps the best demonstrations of an SFT set:

    python select_rehearsal.py --dataset_name demonstrations.jsonl \
        --reward_model_path runs/am/model --output_dir runs/sft_dr

`python -m tools.cluster_report runs/select` shows each cluster, and D_R beside a random control.

What the paper leaves open (docs/CHOICES.md):
  C6  k, c, the batch mix and the criteria's form are not stated. D_R's prompts stay in the PPO set.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata

from utils import DEVICE, InputError, backend, check_positions, encode_prompts, encode_rows
from utils import first_line, forward_batches, generate, load_function, load_policy, load_rows
from utils import load_scorer, load_tokenizer, render, response_logprobs, run_cli, score_texts
from utils import stop_ids, write_jsonl


Criterion = Literal["advantage", "entropy", "length", "combined", "random", "low_advantage"]


@dataclass
class Args:
    reward_model_path: str
    """the advantage model (or reward model) that ranks the pairs, written by am_train.py"""
    dataset_name: str
    """PPO prompts: `prompt`, optional `task`, and `response` without --model_name_or_path"""
    output_dir: str
    """receives responses.jsonl (scored), rehearsal.jsonl (D_R) and clusters.npz"""
    model_name_or_path: str | None = None
    """the initial policy that answers the prompts (paper §3.2); without it, the rows' responses"""
    embedding_model: str = "princeton-nlp/sup-simcse-roberta-base"
    """sentence encoder, or a causal LM: hub id or folder (paper §3.2, footnote 4)"""
    pooling: Literal["auto", "pooler", "cls", "mean"] = "auto"
    """auto: the folder's own modules, else pooler for SimCSE's sup-*, else mean"""
    clustering: Literal["kmeans", "gaussian_mixture"] = "kmeans"
    """how prompts are grouped (§3.2 names both, and uses KMeans)"""
    num_clusters: int = 24
    """c of §3.2 (not stated; it matters little by Fig. 6; our choice C6)"""
    top_k: int = 10
    """pairs kept of each cluster (our choice C6)"""
    criterion: Criterion = "advantage"
    """keep the highest scores (paper §3.2), or the lowest entropy of pi_init, the fewest tokens,
    the best mean rank by score and entropy (our choice C6); controls: random, low scores"""
    gold_reward: str | None = None
    """module:function(prompts, responses) -> scores, kept in the rows and never used to choose"""
    response_length: int = 64
    """tokens that a response may have"""
    temperature: float = 1.0
    """of sampling (not stated; our choice C8)"""
    max_length: int = 512
    """tokens of prompt and response together"""
    truncate_prompts: bool = False
    """shorten a prompt that leaves no room for the response"""
    per_device_eval_batch_size: int = 256
    """texts per forward pass"""
    seed: int = 1
    """seed of sampling, clustering and the random control"""
    bf16: bool = False
    """matrix products in bfloat16"""


# --- the selection: pure functions ---


def select(keys, clusters, top_k):  # (pairs,), (pairs,) int
    """§3.2: indices of the `top_k` highest keys of each cluster; ties in the rows' order."""
    kept = []
    for c in np.unique(clusters):
        members = np.flatnonzero(clusters == c)
        best = np.argsort(-keys[members], kind="stable")[:top_k]
        kept += members[best].tolist()
    return kept


def criterion_keys(criterion, clusters, measures, rng):  # (pairs,) int
    """What `select` keeps the highest of, (pairs,); measures {score, length, entropy: (pairs,)}.

    "Low entropy indicates high confidence", "higher length may indicate redundancy" (§3.2).
    combined, its future work, is minus the mean of a pair's two ranks in its cluster, 1 for the
    highest score and for the lowest entropy: ranks, since the two have no common unit.
    """
    if criterion == "random":
        return rng.permutation(len(clusters))
    if criterion == "advantage":
        return measures["score"]
    if criterion != "combined":
        return -measures["score" if criterion == "low_advantage" else criterion]
    ranks = np.zeros((2, len(clusters)))
    for c in np.unique(clusters):
        m = clusters == c
        ranks[:, m] = rankdata(-measures["score"][m]), rankdata(measures["entropy"][m])
    return -ranks.mean(0)


@torch.no_grad()
def mean_entropies(policy, tokenizer, pairs, batch_size, bf16):  # [(prompt ids, response ids)]
    """Entropy of pi_init(. | x, y_<t) in nats, mean over the tokens of y: (pairs,)."""

    def mean_entropy(ids, attention, prompt_lens):
        _, mask, entropy = response_logprobs(policy, ids, attention, prompt_lens, entropy=True)
        return (entropy.sum(1) / mask.sum(1),)  # (batch, response_len) -> (batch,)

    found = forward_batches(mean_entropy, pairs, tokenizer.pad_token_id, batch_size, bf16)
    return found[0].double().cpu().numpy()


def cluster(embeddings, method, num_clusters, seed):  # (pairs, dim)
    """Cluster index of every embedding: (pairs,) int."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    if method == "kmeans":
        return KMeans(num_clusters, n_init=4, random_state=seed).fit_predict(embeddings)
    # diagonal: a full one needs more prompts than dimensions
    options = {"covariance_type": "diag", "reg_covar": 1e-5, "random_state": seed}
    return GaussianMixture(num_clusters, **options).fit_predict(embeddings)


# --- embeddings ---


def load_encoder(path, pooling):
    """A SentenceTransformer with the pooling that its checkpoint was trained for.

    SimCSE's sup-* checkpoints read the first token through the pooler. A folder without
    modules.json would silently get mean pooling, and a missing pooler a random one.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoModel

    try:
        if pooling == "auto" and (Path(path) / "modules.json").is_file():
            return SentenceTransformer(path, device=DEVICE.type)
        if pooling == "auto":
            pooling = "pooler" if "sup-simcse" in path and "unsup" not in path else "mean"
        if pooling != "pooler":
            body = Transformer(path)
            modules = [body, Pooling(body.get_embedding_dimension(), pooling)]
            return SentenceTransformer(modules=modules, device=DEVICE.type)
        model, info = AutoModel.from_pretrained(path, output_loading_info=True)
        if not hasattr(model, "pooler") or any("pooler" in key for key in info["missing_keys"]):
            problem = "has no pooler weights; pass --pooling cls or mean"
            raise InputError(f"--embedding_model {path}: {problem}")
        modality = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
        output = {"module_output_name": "sentence_embedding", "modality_config": modality}
        return SentenceTransformer(modules=[Transformer(path, **output)], device=DEVICE.type)
    except (OSError, ValueError) as error:
        problem = f"cannot be loaded; the SFT policy's folder would do ({first_line(error)})"
        raise InputError(f"--embedding_model {path}: {problem}") from None


def embed(encoder, texts, batch_size):
    """Unit-length embeddings, (pairs, dim) float32; equal texts are embedded once."""
    if encoder.tokenizer.pad_token is None:
        encoder.tokenizer.pad_token = encoder.tokenizer.eos_token
    unique = list(dict.fromkeys(texts))
    options = {"normalize_embeddings": True, "show_progress_bar": False}
    vectors = encoder.encode(unique, batch_size=batch_size, **options)
    of = dict(zip(unique, vectors, strict=True))
    return np.stack([of[text] for text in texts])


def main(args: Args):
    # --- set up ---
    folder, size = Path(args.output_dir), args.per_device_eval_batch_size
    gold_reward = load_function(args.gold_reward, "--gold_reward") if args.gold_reward else None
    by_entropy = args.criterion in ("entropy", "combined")
    if by_entropy and not args.model_name_or_path:
        problem = "needs --model_name_or_path, whose entropy it reads"
        raise InputError(f"--criterion {args.criterion}: {problem}")
    given = {} if args.model_name_or_path else {"response": "response"}
    rows = load_rows(args.dataset_name, {"prompt": "prompt"} | given)
    if len(rows) < args.num_clusters:
        problem = f"lower it, {args.dataset_name} has {len(rows)} prompts"
        raise InputError(f"--num_clusters {args.num_clusters}: {problem}")
    tokenizer = load_tokenizer(args.reward_model_path, dedicated_pad=True)
    scorer = load_scorer(args.reward_model_path, tokenizer, frozen=True)
    if args.model_name_or_path:
        policy = load_policy(args.model_name_or_path, frozen=True)
        policy_tokenizer = load_tokenizer(args.model_name_or_path)
        length = args.max_length, args.response_length, args.truncate_prompts
        prompts = encode_prompts(policy_tokenizer, rows, *length, args.dataset_name)
        check_positions(policy, max(map(len, prompts)) + args.response_length)
    encoder = load_encoder(args.embedding_model, args.pooling)

    # --- sample y from the initial policy ---
    torch.manual_seed(args.seed)
    measures = {}  # each (pairs,)
    if args.model_name_or_path:
        how = args.response_length, args.temperature, size, args.bf16
        ids = generate(policy, policy_tokenizer, prompts, *how)
        responses = policy_tokenizer.batch_decode(ids, skip_special_tokens=True)
        stops = stop_ids(policy, policy_tokenizer)
        ended = [n for n, y in enumerate(ids) if y[-1] in stops]  # a cut one has no end to rehearse
        rows = [{"file_line": n + 1} | rows[n] | {"response": responses[n]} for n in ended]
        within = f"ended within --response_length {args.response_length}"
        print(f"{len(rows)} of {len(ids)} responses {within}")
        if len(rows) < args.num_clusters:
            raise InputError(f"--response_length: too few responses {within}; raise it")
        write_jsonl(folder / "responses.jsonl", rows)  # nothing sampled is lost
        if by_entropy:
            pairs = [(prompts[n], ids[n]) for n in ended]
            measures["entropy"] = mean_entropies(policy, policy_tokenizer, pairs, size, args.bf16)

    # --- score with a(x, y) ---
    encode = args, args.dataset_name, scorer.is_encoder
    texts = encode_rows(tokenizer, rows, "response", *encode)
    check_positions(scorer.model, max(len(ids) for ids, _ in texts))
    r, e = score_texts(scorer, tokenizer, texts, size, args.bf16)
    backend.last_pass()
    measures["score"] = r - e  # [Eq. 8] with K = 0
    measures["length"] = np.array([len(ids) - prompt_len for ids, prompt_len in texts])
    if gold_reward:
        gold = gold_reward([r["prompt"] for r in rows], [r["response"] for r in rows])
        measures["gold"] = np.array(gold)
    rows = [row | {k: v[i].item() for k, v in measures.items()} for i, row in enumerate(rows)]
    write_jsonl(folder / "responses.jsonl", rows)  # large/select_at_scale.py goes on from here

    # --- embed x, cluster, keep the top k ---
    texts = [row["prompt"] for row in rows]
    texts = [text if isinstance(text, str) else render(tokenizer, text) for text in texts]
    embeddings = embed(encoder, texts, size)
    clusters = cluster(embeddings, args.clustering, args.num_clusters, args.seed)
    rng, other = np.random.default_rng(args.seed), np.random.default_rng(args.seed + 1)
    kept = select(criterion_keys(args.criterion, clusters, measures, rng), clusters, args.top_k)
    control = select(criterion_keys("random", clusters, measures, other), clusters, args.top_k)

    # --- write ---
    shuffled = np.random.default_rng(args.seed).permutation(kept).tolist()  # "we shuffle" (§3.2)
    kept_rows = [rows[i] | {"cluster": int(clusters[i])} for i in shuffled]
    write_jsonl(folder / "rehearsal.jsonl", kept_rows)
    found = {"embeddings": embeddings, "clusters": clusters, "kept": kept, "control": control}
    np.savez(folder / "clusters.npz", criterion=args.criterion, **found)
    print(f"{len(kept)} of {len(rows)} pairs kept from {args.num_clusters} clusters: {folder}")
    for name, of in ("D_R", kept), ("a random control", control):
        print(f"{name}:", *(f" {k} {v[of].mean():.3f}" for k, v in measures.items()))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
