"""Selective rehearsal, step one (§3.2): find the representative, high-quality examples D_R that PPO should not forget.

    sample    y ~ pi_init(. | x) for every PPO prompt x              "no additional information is introduced" (§3.2)
    score     a(x, y) with the advantage model
    embed     x with a sentence encoder (paper: SimCSE), never y
    cluster   KMeans or a Gaussian mixture into c clusters
    keep      the top-k pairs of each cluster by a(x, y)             -> rehearsal.jsonl, D_R of Eq. 9

    python select_rehearsal.py --model_name_or_path runs/sft/model --reward_model_path runs/am/model \\
        --dataset_name prompts.jsonl --output_dir runs/select

D_R "could come from other important data sources representing specific skills" (§3.2): rows that have a `response` need
no policy. These are the best demonstrations of every skill in an SFT set:

    python select_rehearsal.py --dataset_name demonstrations.jsonl --reward_model_path runs/am/model --output_dir runs/sft_dr

--criterion: what §3.2 names beside the score, entropy ("low entropy indicates high confidence") and length ("higher length
may indicate redundancy"), score and entropy combined (its future work), and two controls, random and low_advantage. The
report (clusters.json, clusters.png; tools/cluster_report.py) shows each cluster, and D_R beside a random control.

What differs from the paper, or is left open there (numbers: docs/CHOICES.md):
  C6  k, c, the batch mix and the form of the other criteria are not stated. D_R's prompts stay in the PPO set.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata

from data import encode_pair, encode_prompts, load_rows, load_tokenizer, render
from tools.cluster_report import cluster_report, draw
from engines import DeepSpeedArgs, frozen, leave_to_rank_0
from utils import InputError, Scorer, check_positions, device, environment, forward_batches, generate, load_function
from utils import load_policy, response_logprobs, run_cli, score_texts, stop_ids, write_json, write_jsonl


@dataclass
class Args(DeepSpeedArgs):
    reward_model_path: str
    """the advantage model (or reward model) that ranks the pairs, written by am_train.py"""
    dataset_name: str
    """PPO prompts: `prompt`, optional `task`, and `response` where --model_name_or_path is not given"""
    output_dir: str
    """receives responses.jsonl (scored), rehearsal.jsonl, clusters.json and clusters.png"""
    model_name_or_path: str | None = None
    """the initial policy that answers the prompts (paper §3.2); without it the rows' own `response` is taken"""
    embedding_model: str = "princeton-nlp/sup-simcse-roberta-base"
    """sentence encoder: hub id or any local folder, a causal LM's too (paper §3.2, footnote 4)"""
    pooling: Literal["auto", "pooler", "cls", "mean"] = "auto"
    """auto: the folder's own sentence-transformers modules, else pooler for SimCSE's sup-* checkpoints, else mean"""
    clustering: Literal["kmeans", "gaussian_mixture"] = "kmeans"
    """how prompts are grouped (paper §3.2 names both, and uses KMeans)"""
    num_clusters: int = 24
    """c of §3.2 (not stated in the paper, which finds that it matters little; our choice C6)"""
    top_k: int = 10
    """pairs kept in each cluster (not stated in the paper; our choice C6)"""
    criterion: Literal["advantage", "entropy", "length", "combined", "random", "low_advantage"] = "advantage"
    """keep the highest scores (paper §3.2), the lowest mean entropy of the initial policy, the fewest tokens, the best mean
    rank by score and entropy (the paper's future work; forms: our choice C6); controls: random pairs, the lowest scores"""
    gold_reward: str | None = None
    """module:function(prompts, responses) -> scores, reported and never used to choose"""
    response_length: int = 64
    """tokens that a response may have"""
    temperature: float = 1.0
    """sampling temperature of the initial policy (not stated in the paper; our choice C8)"""
    max_length: int = 512
    """tokens of prompt and response together"""
    truncate_prompts: bool = False
    """shorten a prompt that leaves no room for the response instead of refusing it"""
    per_device_eval_batch_size: int = 256
    """texts per forward pass"""
    seed: int = 1
    """seed of sampling, clustering and the random control"""
    bf16: bool = False
    """matrix products in bfloat16"""


# --- the selection: pure functions ------------------------------------------------------------------------------------


def select(keys, clusters, top_k):  # (pairs,), (pairs,) int
    """§3.2: indices of the `top_k` highest keys of each cluster, fewer where it is smaller; ties in the rows' order."""
    members = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    return [int(i) for m in members for i in m[np.argsort(-keys[m], kind="stable")[:top_k]]]


def criterion_keys(criterion, clusters, measures, rng):  # (pairs,) int, {score, length, entropy: (pairs,)}
    """What `select` keeps the highest of, (pairs,): the criteria of §3.2 that need no people, and two controls.

    combined, "combining advantage score with entropy score": minus the mean of a pair's two ranks in its cluster, 1 for
    the highest score and for the lowest entropy, equal ones sharing theirs; ranks, since the two have no common unit.
    """
    if criterion == "random":
        return rng.permutation(len(clusters))
    if criterion in ("advantage", "low_advantage"):
        return measures["score"] if criterion == "advantage" else -measures["score"]
    if criterion in ("entropy", "length"):
        return -measures[criterion]
    ranks = np.zeros((2, len(clusters)))
    for c in np.unique(clusters):
        m = clusters == c
        ranks[:, m] = rankdata(-measures["score"][m]), rankdata(measures["entropy"][m])
    return -ranks.mean(0)


@torch.no_grad()
def mean_entropies(policy, tokenizer, pairs, batch_size, bf16):  # pairs: (prompt ids, response ids)
    """Entropy of pi_init(. | x, y_<t), at temperature 1, in nats: the mean over the tokens of y with <eos>, (pairs,)."""

    def mean_entropy(ids, attention, prompt_lens):
        _, mask, entropy = response_logprobs(policy, ids, attention, prompt_lens, with_entropy=True)
        return (entropy.sum(1) / mask.sum(1),)  # (batch, response_len) -> (batch,)

    return forward_batches(mean_entropy, pairs, tokenizer.pad_token_id, batch_size, bf16)[0].double().cpu().numpy()


def cluster(embeddings, method, num_clusters, seed):  # (pairs, dim)
    """Cluster index of every embedding: (pairs,) int."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    if method == "kmeans":
        return KMeans(num_clusters, n_init=4, random_state=seed).fit_predict(embeddings)
    # diagonal covariances: full ones would need more prompts than embedding dimensions in every cluster
    mixture = GaussianMixture(num_clusters, covariance_type="diag", reg_covar=1e-5, random_state=seed)
    return mixture.fit_predict(embeddings)


# --- embeddings -------------------------------------------------------------------------------------------------------


def load_encoder(path, pooling):
    """A SentenceTransformer with the pooling that its checkpoint was trained for.

    SimCSE's sup-* checkpoints read the first token through the pooler (dense + tanh), and a folder without modules.json
    would silently get mean pooling: so pooling is always passed, and a pooler that the checkpoint lacks is refused.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    try:
        if pooling == "auto" and (Path(path) / "modules.json").is_file():
            return SentenceTransformer(path, device=device().type)
        if pooling == "auto":
            pooling = "pooler" if "sup-simcse" in path and "unsup" not in path else "mean"
        if pooling != "pooler":
            body = Transformer(path)
            modules = [body, Pooling(body.get_embedding_dimension(), pooling)]
            return SentenceTransformer(modules=modules, device=device().type)
        # the one way in which a missing pooler would show: transformers would start a random one
        from transformers import AutoModel

        model, info = AutoModel.from_pretrained(path, output_loading_info=True)
        if not hasattr(model, "pooler") or any("pooler" in key for key in info["missing_keys"]):
            raise InputError(f"--embedding_model {path}: has no pooler weights; pass --pooling cls or mean")
        modality = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
        body = Transformer(path, module_output_name="sentence_embedding", modality_config=modality)
        return SentenceTransformer(modules=[body], device=device().type)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise InputError(f"--embedding_model {path}: cannot be loaded; SFT's folder would do ({said})") from None


def embed(encoder, texts, batch_size):
    """Unit-length embeddings of the prompts, (pairs, dim) float32; equal texts are embedded once."""
    if encoder.tokenizer.pad_token is None:
        encoder.tokenizer.pad_token = encoder.tokenizer.eos_token
    unique = list(dict.fromkeys(texts))
    vectors = encoder.encode(unique, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
    of = dict(zip(unique, vectors, strict=True))
    return np.stack([of[text] for text in texts])


def main(args: Args):
    # --- set up -----------------------------------------------------------------------------------------------------
    gold_reward = load_function(args.gold_reward, "--gold_reward") if args.gold_reward else None
    by_entropy = args.criterion in ("entropy", "combined")
    if by_entropy and not args.model_name_or_path:
        raise InputError(f"--criterion {args.criterion}: needs --model_name_or_path, the policy whose entropy it reads")
    given = {} if args.model_name_or_path else {"response": "response"}
    rows = load_rows(args.dataset_name, {"prompt": "prompt"} | given)
    if len(rows) < args.num_clusters:
        raise InputError(f"--num_clusters {args.num_clusters}: lower it, {args.dataset_name} has {len(rows)} prompts")
    tokenizer = load_tokenizer(args.reward_model_path, dedicated_pad=True)
    scorer = frozen(args, Scorer.from_pretrained, args.reward_model_path, tokenizer)
    if args.model_name_or_path:
        policy = frozen(args, load_policy, args.model_name_or_path)
        policy_tokenizer = load_tokenizer(args.model_name_or_path)
        length = (args.max_length, args.response_length, args.truncate_prompts)
        prompts = encode_prompts(policy_tokenizer, rows, *length, args.dataset_name)
        check_positions(policy, max(map(len, prompts)) + args.response_length)
    encoder = load_encoder(args.embedding_model, args.pooling)

    # --- sample y from the initial policy ---------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    measures = {}  # each (pairs,)
    if args.model_name_or_path:
        size = args.per_device_eval_batch_size
        ids = generate(policy, policy_tokenizer, prompts, args.response_length, args.temperature, size, args.bf16)
        responses = policy_tokenizer.batch_decode(ids, skip_special_tokens=True)
        stops = stop_ids(policy, policy_tokenizer)  # a response that was cut has no end to rehearse
        ended = [n for n, y in enumerate(ids) if y[-1] in stops]
        rows = [{"file_line": n + 1} | rows[n] | {"response": responses[n]} for n in ended]
        print(f"{len(rows)} of {len(ids)} responses ended within --response_length {args.response_length}")
        if len(rows) < args.num_clusters:
            raise InputError(f"--response_length {args.response_length}: too few responses ended; raise it")
        write_jsonl(Path(args.output_dir) / "responses.jsonl", rows)  # another --num_clusters need not sample again
        if by_entropy:
            ended = [(x, y) for x, y in zip(prompts, ids, strict=True) if y[-1] in stops]
            measures["entropy"] = mean_entropies(policy, policy_tokenizer, ended, size, args.bf16)

    # --- score with a(x, y) -----------------------------------------------------------------------------------------
    texts = []
    for i, row in enumerate(rows, 1):
        length, where = (args.max_length, args.truncate_prompts), f"{args.dataset_name}, line {row.get('file_line', i)}"
        texts.append(encode_pair(tokenizer, row["prompt"], row["response"], *length, where, scorer.is_encoder))
    if cut := sum(dropped > 0 for *_, dropped in texts):
        print(f"{cut} of {len(texts)} texts shortened to --max_length {args.max_length} for the scorer")
    check_positions(scorer.model, max(len(ids) for ids, *_ in texts))
    r, e = score_texts(scorer, tokenizer, [text[:2] for text in texts], args.per_device_eval_batch_size, args.bf16)
    leave_to_rank_0()
    measures |= {"score": r - e, "length": np.array([len(ids) - n for ids, n, _ in texts])}  # [Eq. 8] with K = 0
    rows = [row | {k: v[i].item() for k, v in measures.items()} for i, row in enumerate(rows)]
    write_jsonl(Path(args.output_dir) / "responses.jsonl", rows)  # what tools/select_at_scale.py reads

    # --- embed x, cluster, keep the top k ---------------------------------------------------------------------------
    texts = [row["prompt"] if isinstance(row["prompt"], str) else render(tokenizer, row["prompt"]) for row in rows]
    embeddings = embed(encoder, texts, args.per_device_eval_batch_size)
    clusters = cluster(embeddings, args.clustering, args.num_clusters, args.seed)
    rng, other = np.random.default_rng(args.seed), np.random.default_rng(args.seed + 1)
    kept = select(criterion_keys(args.criterion, clusters, measures, rng), clusters, args.top_k)
    control = select(criterion_keys("random", clusters, measures, other), clusters, args.top_k)

    # --- write ------------------------------------------------------------------------------------------------------
    folder = Path(args.output_dir)
    if gold_reward:
        measures["gold"] = np.array(gold_reward([r["prompt"] for r in rows], [r["response"] for r in rows]))
    shuffled = np.random.default_rng(args.seed).permutation(kept).tolist()  # "we shuffle them together" (§3.2)
    write_jsonl(folder / "rehearsal.jsonl", [rows[i] | {"cluster": int(clusters[i])} for i in shuffled])
    report = cluster_report(rows, measures, clusters, embeddings, kept, control)
    write_json(folder / "clusters.json", {"criterion": args.criterion} | report | environment())
    draw(embeddings, clusters, kept, folder / "clusters.png")
    print(f"{len(kept)} of {len(rows)} pairs kept from {args.num_clusters} clusters, written to {folder}")
    for name in ("selected", "random_control"):
        numbers = {k: v for k, v in report[name].items() if k != "share_of_tasks"}
        print(f"{name}: " + "  ".join(f"{k} {v:.3f}" for k, v in numbers.items()))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
