"""PPO with selective rehearsal (arXiv 2309.10202) in one file, to read first.

    for each step:
        1 sample      y ~ pi(. | x) for a batch of prompts x
        2 score       r(x, y) by the scorer; log-probs under pi and pi_init; values V
        3 advantages  token rewards [Eq. 2], GAE, whitening
        4 losses      clipped policy loss, clipped value loss
        5 learn       + rehearsal_coef x NLL of good old answers [Eq. 9]

    python -m miniature.world --output_dir data/toy
    python sft.py --tokenizer_name_or_path data/toy/tokenizer --dataset_name data/toy/sft.jsonl \\
        --output_dir runs/sft --learning_rate 3e-3 --num_train_epochs 3
    python -m miniature.world --output_dir data/toy --policy runs/sft/model
    python am_train.py --model_name_or_path runs/sft/model --learning_rate 5e-4 \\
        --dataset_name data/toy/preferences_train.jsonl --output_dir runs/am
    python nano.py  # a minute
"""

import argparse
import copy
import inspect
import json
import random

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DISCOUNT, LAMBDA = 1.0, 0.95  # gamma and lambda of GAE
CLIP = 0.2  # eps: gains end where a ratio is this far from 1, or V this far from old V


def load_pairs(path, tokenizer):
    """Rows {prompt, response} of a .jsonl file -> [(prompt ids, response ids)]."""
    pairs = []
    for row in map(json.loads, open(path)):
        x = tokenizer(row["prompt"]).input_ids
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": row["prompt"]}]
            x = tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids
        y = tokenizer(row.get("response", ""), add_special_tokens=False).input_ids
        # <eos> is part of a response: when to stop is learned, too
        pairs.append((x, [*y, tokenizer.eos_token_id]))
    return pairs


def pad(pairs):
    """[(x, y)] -> tokens (batch, length), in_response (batch, length - 1).

    tokens        <bos>  name   the  capital |  it    is   rome  <eos> <pad>
    index           0      1     2      3       4     5     6     7     8
    in_response     no     no    no    yes     yes   yes   yes    no

    In every other matrix column t is about token t + 1, which the policy chose after it
    had read tokens 0 to t.
    """
    tokens = [torch.tensor(x + y) for x, y in pairs]
    in_response = [torch.tensor([False] * (len(x) - 1) + [True] * len(y)) for x, y in pairs]
    # on the right, by any id (1): a causal model never looks ahead
    pad_rows = torch.nn.utils.rnn.pad_sequence
    return pad_rows(tokens, True, 1).to(DEVICE), pad_rows(in_response, True).to(DEVICE)


def token_logprobs(policy, tokens):
    """log pi(token t + 1 | tokens up to t):  (batch, length) -> (batch, length - 1)."""
    logprobs = policy(tokens[:, :-1]).logits.log_softmax(-1)  # (batch, length - 1, vocabulary)
    return logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def token_values(scorer, tokens):
    """The score head at every token: V, and at the last one r. (batch, length) -> same."""
    return scorer.score(scorer.base_model(tokens).last_hidden_state).squeeze(-1)


@torch.no_grad()
def sample(policy, prompts, response_length, eos):
    """y ~ pi(. | x), token by token, up to <eos> or response_length -> [(x, y)].

    All rows walk in step: a longer prompt keeps its tokens, what follows <eos> is cut.
    So nothing is padded on the left, and no mask is needed.
    """
    tokens, in_response = pad([(x, [eos] * response_length) for x in prompts])  # to be filled
    cache, read = None, 0  # keys and values of the columns before `read`
    for column in range(min(map(len, prompts)), tokens.shape[1]):
        output = policy(tokens[:, read:column], past_key_values=cache, use_cache=True)
        cache, read = output.past_key_values, column
        # no top-k, no top-p: the update takes the log-probs of this very distribution
        drawn = output.logits[:, -1].softmax(-1).multinomial(1).squeeze(-1)  # (batch,)
        tokens[:, column] = torch.where(in_response[:, column - 1], drawn, tokens[:, column])
    pairs = []
    for x, row in zip(prompts, tokens.tolist(), strict=True):
        y = row[len(x) : len(x) + response_length]
        pairs.append((x, y[: y.index(eos) + 1] if eos in y else y))
    return pairs


# --- the equations: each matrix is (batch, length - 1)


def token_rewards(scores, logprobs, ref_logprobs, last, kl_coef):
    """[Eq. 2]  r(x, y) - beta log( pi(y | x) / pi_init(y | x) )

    The log is a sum over the tokens of y. Each token pays its own part, the last gets r.
    """
    rewards = -kl_coef * (logprobs - ref_logprobs)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def generalized_advantages(rewards, values):
    """GAE: fading sum of surprises. Needs rewards, V 0 off y.

    delta_t = reward_t + discount V_{t+1} - V_t
    A_t     = delta_t + discount lambda A_{t+1}
    R_t     = A_t + V_t, what the critic should have said
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = 0.0  # after the last token there is nothing
    for t in reversed(range(rewards.shape[1])):  # backwards: A_t needs A_{t+1}
        delta = rewards[:, t] + DISCOUNT * next_value - values[:, t]
        advantages[:, t] = delta + DISCOUNT * LAMBDA * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def clipped_policy_loss(logprobs, old_logprobs, advantages, in_response):
    """PPO:  max( -ratio A, -clip(ratio, 1 - eps, 1 + eps) A ),  ratio = pi / pi_old

    The max of the two is the pessimist: beyond the clip a change for the better gains
    nothing (gradient 0), one for the worse counts in full (so it can be undone).
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return torch.max(-ratio * advantages, -clipped * advantages)[in_response].mean()


def clipped_value_loss(values, old_values, returns, in_response):
    """1/2 max( (V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2 )

    The pessimist again: beyond eps, a value that came closer to R gains no more, and one
    that went away pays in full.
    """
    clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
    return torch.max((values - returns) ** 2, (clipped - returns) ** 2)[in_response].mean() / 2


def main(  # each argument is a flag
    policy_path="runs/sft/model",
    scorer_path="runs/am/model",  # same tokenizer; no e head
    prompts_path="data/toy/prompts_train.jsonl",
    rehearsal_path="data/toy/sft.jsonl",  # D_R of Eq. 9; select_rehearsal.py's is better
    output_path="runs/nano",
    steps=30,  # batches of fresh responses (paper: 100)
    batch_size=64,  # prompts a step (paper: 256)
    epochs=2,  # passes over a batch
    learning_rate=2e-4,  # of policy and critic (paper: 5e-7)
    kl_coef=0.05,  # beta of Eq. 2
    rehearsal_coef=0.01,  # gamma of Eq. 9 (paper: 0.01)
    response_length=24,  # tokens, at most
    seed=1,  # of draws
):
    random.seed(seed)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    prompts = [x for x, _ in load_pairs(prompts_path, tokenizer)]
    old_answers = load_pairs(rehearsal_path, tokenizer)
    if len(prompts) < batch_size:
        raise SystemExit(f"{prompts_path}: fewer rows than --batch_size")
    # models load in eval mode: with dropout the first ratio would not be 1
    policy = AutoModelForCausalLM.from_pretrained(policy_path).float().to(DEVICE)
    scorer = AutoModelForSequenceClassification.from_pretrained(scorer_path).float().to(DEVICE)
    # pi_init stays where pi starts; V starts as the scorer, and learns
    reference, critic = copy.deepcopy(policy), copy.deepcopy(scorer)
    both = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(both, learning_rate, betas=(0.9, 0.95), weight_decay=0)

    history = []
    for step in range(1, steps + 1):
        # --- 1 sample: PPO learns from what this policy does
        xs = random.sample(prompts, batch_size)
        pairs = sample(policy, xs, response_length, tokenizer.eos_token_id)
        tokens, in_response = pad(pairs)
        last = in_response.cumsum(1).argmax(1)  # (batch,): column of the last token

        # --- 2 score: log-probs and V are 0 outside the response
        with torch.no_grad():
            old_logprobs = token_logprobs(policy, tokens) * in_response
            ref_logprobs = token_logprobs(reference, tokens) * in_response
            # V is read one token early, before the token is seen; r after the last one
            old_values = token_values(critic, tokens)[:, :-1] * in_response
            scores = token_values(scorer, tokens)[torch.arange(len(xs)), last + 1]  # (batch,)

        # --- 3 advantages
        rewards = token_rewards(scores, old_logprobs, ref_logprobs, last, kl_coef)
        advantages, returns = generalized_advantages(rewards, old_values)
        # whitening (mean 0, std 1): doubling r now acts as halving beta
        kept = advantages[in_response]  # (tokens,)
        advantages = (advantages - kept.mean()) / (kept.std() + 1e-8)

        for _ in range(epochs):
            # --- 4 losses: in the first pass each ratio is 1, later the clip is needed
            logprobs = token_logprobs(policy, tokens)
            values = token_values(critic, tokens)[:, :-1]
            policy_loss = clipped_policy_loss(logprobs, old_logprobs, advantages, in_response)
            value_loss = clipped_value_loss(values, old_values, returns, in_response)

            # --- 5 learn: + mean -log pi (Eq. 9: sum of pi)
            old_tokens, in_answer = pad(random.choices(old_answers, k=batch_size))
            rehearsal_nll = -token_logprobs(policy, old_tokens)[in_answer].mean()
            loss = policy_loss + rehearsal_coef * rehearsal_nll  # [Eq. 9]
            (loss + value_loss).backward()  # two models: each learns from its own

            for model in (policy, critic):  # one odd batch must not throw the weights far
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        # a score that rises while KL runs away is no success
        kl, length = (old_logprobs - ref_logprobs).sum(1), in_response.sum(1).float()  # (batch,)
        metrics = {"score": scores, "kl": kl, "length": length, "rehearsal_nll": rehearsal_nll}
        history.append({name: value.mean().item() for name, value in metrics.items()})
        print(step, *(f"  {name} {value:.3f}" for name, value in history[-1].items()))

    for x, y in pairs[:5]:
        print(tokenizer.decode(x), "->", tokenizer.decode(y))
    policy.save_pretrained(output_path)
    tokenizer.save_pretrained(output_path)
    return history, policy, critic


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, flag in inspect.signature(main).parameters.items():
        parser.add_argument(f"--{name}", type=type(flag.default), default=flag.default)
    main(**vars(parser.parse_args()))
