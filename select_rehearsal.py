"""Selective rehearsal, step one (§3.2 of arXiv 2309.10202): find the representative, high-quality
examples D_R that PPO should not forget.

    sample    y ~ pi_init(. | x) for every PPO prompt x
    score     a(x, y) with the advantage model
    embed     x with a sentence encoder (paper: SimCSE), never y
    cluster   KMeans or a Gaussian mixture into c clusters
    keep      the top-k pairs of each cluster by a(x, y)    -> D_R of Eq. 9, in ppo_sr.py

    python select_rehearsal.py --model_name_or_path runs/sft/model \\
        --reward_model_path runs/am/model --dataset_name prompts.jsonl --output_dir runs/select

Rows with a `response` (a stopped run's, too) need no policy. `python -m tools.cluster_report` shows
each cluster, and D_R beside a random control.

The paper leaves open k, c, the batch mix and the criteria's form (docs/CHOICES.md, C6). PPO
keeps D_R's prompts.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata

from utils import DEVICE, Count, InputError, Length, Natural, Positive, backend, check_fits, decode
from utils import encode_prompts, encode_rows, forward_batches, generate, in_one_line, load_function
from utils import load_policy, load_rows, load_scorer, load_tokenizer, response_logprobs, run_cli
from utils import score_texts, seeded, stop_ids, write_jsonl

Criterion = Literal["advantage", "entropy", "length", "combined", "random", "low_advantage"]


@dataclass
class Args:
    reward_model_path: str
    """the scorer that ranks the pairs, of am_train.py"""
    dataset_name: str
    """PPO prompts: `prompt`, maybe `task`; `response` if there is no --model_name_or_path"""
    output_dir: str
    """receives responses.jsonl (scored), rehearsal.jsonl (D_R) and clusters.npz"""
    model_name_or_path: str | None = None
    """the initial policy, which answers (paper §3.2); without it, the rows' responses"""
    embedding_model: str = "princeton-nlp/sup-simcse-roberta-base"
    """sentence encoder, or a causal LM: hub id or folder (paper §3.2, footnote 4)"""
    pooling: Literal["auto", "pooler", "cls", "mean"] = "auto"
    """auto: the folder's own modules, else pooler for SimCSE's sup-*, else mean"""
    clustering: Literal["kmeans", "gaussian_mixture"] = "kmeans"
    """§3.2 names both, and uses KMeans"""
    num_clusters: Count = 24
    """c of §3.2 (not stated; our choice C6)"""
    top_k: Count = 10
    """pairs kept of each cluster (C6)"""
    criterion: Criterion = "advantage"
    """keep the highest scores (paper §3.2), or the lowest entropy of pi_init, the fewest tokens,
    the best mean rank by score and entropy (our choice C6); controls: random, low scores"""
    gold_reward: str | None = None
    """module:function(prompts, responses), kept in the rows, never used to choose"""
    response_length: Count = 64
    """tokens of a response"""
    temperature: Positive = 1.0
    """of sampling (C8)"""
    max_length: Length = 512
    """of prompt and response"""
    truncate_prompts: bool = False
    """cut texts that are longer"""
    per_device_eval_batch_size: Count = 32
    """texts in a pass"""
    seed: Natural = 1
    """of sampling, clustering and the random control"""
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
    """Keys of which `select` keeps the highest; measures {score, length, entropy}; all (pairs,).

    combined, future work in §3.2, is minus the mean of a pair's two ranks in its cluster, by score
    and by entropy: ranks, since the two have no common unit.
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

    def mean_entropy(*batch):
        _, mask, entropy = response_logprobs(policy, *batch, entropy=True)
        return (entropy.sum(1) / mask.sum(1),)  # (batch, response_len) -> (batch,)

    found = forward_batches(mean_entropy, pairs, tokenizer.pad_token_id, batch_size, bf16)
    return found[0].double().cpu().numpy()


def cluster(embeddings, method, num_clusters, seed):  # (pairs, dim)
    """Cluster index of every embedding: (pairs,) int."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    if method == "kmeans":
        return KMeans(num_clusters, n_init=4, random_state=seed % 2**32).fit_predict(embeddings)
    # diagonal: a full one needs more prompts than dimensions
    options = {"covariance_type": "diag", "reg_covar": 1e-5, "random_state": seed % 2**32}
    return GaussianMixture(num_clusters, **options).fit_predict(embeddings)


# --- embeddings ---


def load_encoder(path, pooling):
    """A SentenceTransformer, pooling as in its training: SimCSE's sup-* read the first token
    through a pooler; one with random weights is refused."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    problem = f"--embedding_model {path}: cannot be loaded; the SFT policy's folder would do"
    with in_one_line(problem):
        if not (Path(path).exists() or try_to_load_from_cache(path, "config.json")):
            HfApi().model_info(path, timeout=10)  # from_pretrained would ask for a minute
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        from transformers import AutoModel

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
            raise ValueError("no pooler weights; pass --pooling cls or mean")
        modality = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
        output = {"module_output_name": "sentence_embedding", "modality_config": modality}
        return SentenceTransformer(modules=[Transformer(path, **output)], device=DEVICE.type)


def prompt_text(prompt):
    """The text to embed (messages: contents alone)."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def embed(encoder, texts, batch_size):
    """(pairs, dim) float32, of length 1 (ours)."""
    if encoder.tokenizer.pad_token is None:
        encoder.tokenizer.pad_token = encoder.tokenizer.eos_token
    unique = list(dict.fromkeys(texts))
    options = {"normalize_embeddings": True, "show_progress_bar": len(unique) > 9999}
    vectors = encoder.encode(unique, batch_size=batch_size, **options)
    of = dict(zip(unique, vectors, strict=True))
    return np.stack([of[text] for text in texts])


def main(args: Args):
    # --- set up ---
    folder, size = Path(args.output_dir), args.per_device_eval_batch_size
    if (folder / "responses.jsonl").exists():
        raise InputError(f"--output_dir {folder}: holds a selection; remove it, or take another")
    gold_reward = load_function(args.gold_reward, "--gold_reward") if args.gold_reward else None
    by_entropy = args.criterion in ("entropy", "combined")
    if by_entropy and not args.model_name_or_path:
        raise InputError(f"--criterion {args.criterion}: needs --model_name_or_path")
    given = {} if args.model_name_or_path else {"response": "response"}
    own = {"ended", "score", "length", "cluster", "entropy", gold_reward and "gold"}
    rows = load_rows(args.dataset_name, {"prompt": "prompt"} | given, written=own)
    rows = [{"file_line": n, "ended": True} | row for n, row in enumerate(rows, 1)]
    rows = [row for row in rows if not given or row["ended"]]  # ended
    if len(rows) < args.num_clusters:
        raise InputError(f"--num_clusters {args.num_clusters}: {len(rows)} prompts; lower it")
    tokenizer = load_tokenizer(args.reward_model_path, dedicated_pad=True)
    scorer = load_scorer(args.reward_model_path, tokenizer, frozen=True)
    if args.model_name_or_path:
        policy = load_policy(args.model_name_or_path, frozen=True)
        policy_tokenizer = load_tokenizer(args.model_name_or_path)
        length = args.max_length, args.response_length, args.truncate_prompts
        prompts = encode_prompts(policy_tokenizer, rows, *length, args.dataset_name)
        check_fits(policy, policy_tokenizer, max(map(len, prompts)) + args.response_length)
    encoder = load_encoder(args.embedding_model, args.pooling)

    # --- sample y from the initial policy ---
    measures = {}  # each (pairs,)
    if args.model_name_or_path:
        how = args.response_length, args.temperature, size, args.bf16
        stops = stop_ids(policy, policy_tokenizer)
        within = f"ended within --response_length {args.response_length}"
        # 32 prompts first: if none of them ends, stop before the rest
        few, every = range(0, len(rows), -(-len(rows) // 32)), range(len(rows))
        for numbers, wanted in {few: 1, every: args.num_clusters}.items():
            with seeded(args.seed):
                ids = generate(policy, policy_tokenizer, [prompts[n] for n in numbers], *how)
            texts = decode(policy_tokenizer, ids, stops)
            found = zip(numbers, texts, (y[-1] in stops for y in ids), strict=True)
            sampled = [rows[n] | {"response": text, "ended": end} for n, text, end in found]
            write_jsonl(folder / "responses.jsonl", sampled)  # nothing sampled is lost
            ended = [n for n, row in enumerate(sampled) if row["ended"]]
            print(f"{len(ended)} of {len(ids)} responses {within}")
            if len(ended) < wanted:
                raise InputError(f"--response_length: too few responses {within}; raise it")
        rows = [sampled[n] for n in ended]  # a cut one has no end to rehearse
        if by_entropy:
            pairs = [(prompts[n], ids[n]) for n in ended]
            measures["entropy"] = mean_entropies(policy, policy_tokenizer, pairs, size, args.bf16)
    if gold_reward:
        gold = gold_reward([r["prompt"] for r in rows], [r["response"] for r in rows])
        measures["gold"] = np.array(gold)

    # --- score with a(x, y) ---
    cut = replace(args, truncate_prompts=args.truncate_prompts or not given)
    encode = cut, args.dataset_name, scorer.is_encoder
    texts = [text for [text] in encode_rows(tokenizer, rows, ["response"], *encode)]
    check_fits(scorer.model, tokenizer, max(len(ids) for ids, _ in texts))
    r, e = score_texts(scorer, tokenizer, texts, size, args.bf16)
    backend.last_pass()
    measures["score"] = r - e  # [Eq. 8] with K = 0
    measures["length"] = np.array([len(ids) - prompt_len for ids, prompt_len in texts])
    rows = [row | {k: v[i].item() for k, v in measures.items()} for i, row in enumerate(rows)]
    write_jsonl(folder / "responses.jsonl", rows)  # large/select_at_scale.py goes on from here

    # --- embed x, cluster, keep the top k ---
    embeddings = embed(encoder, [prompt_text(row["prompt"]) for row in rows], size)
    clusters = cluster(embeddings, args.clustering, args.num_clusters, args.seed)

    def keep(criterion, seed):
        keys = criterion_keys(criterion, clusters, measures, np.random.default_rng(seed))
        return select(keys, clusters, args.top_k)

    kept, control = keep(args.criterion, args.seed), keep("random", args.seed + 1)

    # --- write ---
    shuffled = np.random.default_rng(args.seed).permutation(kept).tolist()  # "we shuffle" (§3.2)
    kept_rows = [rows[i] | {"cluster": int(clusters[i])} for i in shuffled]
    write_jsonl(folder / "rehearsal.jsonl", kept_rows)
    found = dict(embeddings=embeddings, clusters=clusters, kept=kept, control=control)
    np.savez(folder / "clusters.npz", criterion=args.criterion, **found)
    print(f"{len(kept)} of {len(rows)} pairs kept from {len({*clusters})} clusters: {folder}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
