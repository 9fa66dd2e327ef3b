"""What a broken PPO run looks like: short runs of ppo_sr.py on the toy world, each with one planted bug.

    make reproduce && python -m tools.failure_gallery --output_dir results/failures       # ten minutes of one thread

The bugs are patched into the module's functions from here, in a process a run; ppo_sr.py has no flag for them. A bug that
a check of the first step stops runs a second time with these checks patched out, to show what the check spares. Beside
them stand healthy runs of several seeds, so that a symptom can be told from noise (first_symptoms). A run that is there
already is kept.

Writes failures.json (settings; checks, alarms, symptoms, dials and test scores, before and after, of every run) and
failures.png. What they say: docs/FAILURES.md.
"""

import contextlib
import functools
import json
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin

import ppo_sr
from instruments import WINDOW, Alarms
from ppo_sr import token_rewards, update
from reproduce import COMMON_PPO
from engines import make_engine
from utils import InputError, environment, generate, load_policy, pad, response_logprobs, run_cli, stop_ids
from utils import write_json

CHECKS = ("check_sampler", "check_first_ratio")
RUN, FAR = 3, 1.5  # of first_symptoms: among themselves, six healthy runs show one symptom in all


@dataclass
class Args:
    output_dir: str
    """receives a folder a run, failures.json and failures.png"""
    folder: str = "results/full/seed_1"
    """a finished seed of the reproduction, for its world, SFT model and AM"""
    total_steps: int = 25
    """PPO steps of a run"""
    global_batch_size: int = 64
    """prompts a step"""
    healthy_seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """seeds of the runs without a bug, three at least; the bugs run with the first one"""
    bugs: tuple[str, ...] = ()
    """bugs to plant (BUGS; all by default)"""


# --- the bugs: what replaces a function of ppo_sr.py ---------------------------------------------------------------------


def paid_on_pad(scores, logprobs, ref_logprobs, mask, kl_coef):
    rewards = token_rewards(torch.zeros_like(scores), logprobs, ref_logprobs, mask, kl_coef)
    rewards[:, -1] += scores
    return rewards


@torch.no_grad()
def read_at_pad(scorer, tokenizer, texts, batch_size, bf16):
    ids, _ = pad([ids for ids, _ in texts], tokenizer.pad_token_id)
    prompt_lens = torch.tensor([prompt_len for _, prompt_len in texts], device=ids.device)
    return torch.stack(scorer(ids, torch.ones_like(ids, dtype=torch.bool), prompt_lens)).double().cpu().numpy()


def mask_one_early(model, input_ids, attention_mask, prompt_lens, *rest, **options):
    """From x's last token to y's last but one: <eos> is never trained, and every advantage meets the token before."""
    return response_logprobs(model, input_ids, attention_mask[:, 1:], prompt_lens - 1, *rest, **options)


def logits_not_shifted(model, input_ids, attention_mask, prompt_lens, *rest, **options):
    """log pi of y_t read where y_t has been seen and y_t+1 is predicted."""
    model = getattr(model, "module", model)

    def one_late(*inputs, **kwargs):
        return SimpleNamespace(last_hidden_state=model.base_model(*inputs, **kwargs).last_hidden_state.roll(-1, 1))

    late = SimpleNamespace(base_model=one_late, config=model.config, get_output_embeddings=model.get_output_embeddings)
    return response_logprobs(late, input_ids, attention_mask, prompt_lens, *rest, **options)


def wrong_sign_of_kl(scores, logprobs, ref_logprobs, mask, kl_coef):
    return token_rewards(scores, logprobs, ref_logprobs, mask, -kl_coef)


def pad_is_eos(model, tokenizer, prompts, *sampling, **options):
    """The mask ids != pad takes <eos> away: nobody sees it, and the score is read a token early."""
    out, stops = generate(model, tokenizer, prompts, *sampling, **options), stop_ids(model, tokenizer)
    responses = out[0] if options.get("with_logprobs") else out
    kept = [max(1, len(y) - (y[-1] in stops)) for y in responses]
    parts = [[row[:n] for row, n in zip(rows, kept, strict=True)] for rows in (out if responses is not out else [out])]
    return tuple(parts) if responses is not out else parts[0]


def warped(**filters):
    """A sampler with filters of its own."""
    sample = GenerationMixin.generate
    return lambda model, **options: sample(model, **options | filters)


class RandomCritic(ppo_sr.Critic):
    def __init__(self, *of_scorer):
        super().__init__(*of_scorer)
        nn.init.normal_(self.model.score.weight, generator=torch.Generator().manual_seed(0))


def frozen_critic(args, module, learning_rate, **options):
    return make_engine(args, module, 0.0 if isinstance(module, ppo_sr.Critic) else learning_rate, **options)


def dropout_in_updates(args, step, policy_engine, *rest):
    policy = policy_engine.module
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    policy.train()
    dials = update(args, step, policy_engine, *rest)
    policy.eval()
    return dials


def old_is_new():
    """pi_old's log-probs are taken from the model that is being updated: `latest`, of the batch just read."""
    latest = []

    def remember(*inputs, **options):
        out = response_logprobs(*inputs, **options)
        latest[:] = [out[0].detach()]
        return out

    class Old:
        def __getitem__(self, index):
            return latest[0]

    def with_old(args, step, policy_engine, critic_engine, pad_id, rollout, *rest):
        kept, rollout.logprobs = rollout.logprobs, Old()
        dials = update(args, step, policy_engine, critic_engine, pad_id, rollout, *rest)
        rollout.logprobs = kept
        return dials

    return {"ppo_sr.response_logprobs": remember, "ppo_sr.update": with_old}


@dataclass
class Bug:
    title: str
    cause: str  # the line that a codebase with this bug has
    dials: tuple[str, ...]  # of the figure
    plant: Callable[[], dict] = dict  # -> {dotted name: what replaces it}
    flags: dict = field(default_factory=dict)


def both(function, name):
    return lambda: {f"ppo_sr.{name}": function, f"instruments.{name}": function}


SCORE, KL, EV, ENTROPY = "objective/scores", "objective/kl", "val/explained_variance", "objective/entropy"
GOLD, VALUE = "objective/gold", "loss/value_avg"
SURPRISE = "log perplexity / entropy"  # 1 but for noise where the log-probs are those of the sampler
BUGS = {
    "paid_on_pad": Bug("score paid on PAD", "rewards[:, -1] += scores", (EV, VALUE),
        lambda: {"ppo_sr.token_rewards": paid_on_pad}),
    "read_at_pad": Bug("score read at PAD", "score = scorer(ids).logits[:, -1]", (SCORE, GOLD),
        lambda: {"ppo_sr.score_texts": read_at_pad}),
    "mask_one_early": Bug("mask one early", "mask = position >= prompt_len - 1", (SURPRISE, KL),
        both(mask_one_early, "response_logprobs")),
    "logits_not_shifted": Bug("logits not shifted", "logprobs = log_softmax(logits)[ids]", (SURPRISE, KL),
        both(logits_not_shifted, "response_logprobs")),
    "no_whitening": Bug("no whitening", "# advantages = whiten(advantages, mask)", ("loss/policy_avg", KL),
        lambda: {"ppo_sr.whiten": lambda values, mask: values}),
    "sampler_temperature": Bug("sampler at T 0.7", "model.generate(temperature=0.7)", (SURPRISE, GOLD),
        lambda: {"transformers.GenerationMixin.generate": warped(temperature=0.7)}),
    "sampler_top_p": Bug("sampler at top-p 0.9", "model.generate(top_p=0.9)", (SURPRISE, GOLD),
        lambda: {"transformers.GenerationMixin.generate": warped(top_p=0.9)}),
    "wrong_sign_of_kl": Bug("wrong sign of KL", "rewards = kl_coef * (logprobs - ref_logprobs)", (KL, GOLD),
        lambda: {"ppo_sr.token_rewards": wrong_sign_of_kl}),
    "reference_is_policy": Bug("reference is policy", "reference = policy  # no copy", (KL, ENTROPY),
        lambda: {"ppo_sr.load_policy": functools.cache(load_policy), "ppo_sr.frozen": lambda args, load, *where: load(*where)}),
    "random_critic": Bug("critic's head random, large", "nn.init.normal_(critic.score.weight)", (EV, GOLD),
        lambda: {"ppo_sr.Critic": RandomCritic}),
    "frozen_critic": Bug("critic never trained", "AdamW(policy.parameters())  # and not the critic's", (EV, VALUE),
        lambda: {"ppo_sr.make_engine": frozen_critic}),
    "pad_is_eos": Bug("pad = eos", "tokenizer.pad_token = tokenizer.eos_token; mask = ids != pad",
        ("val/no_eos_share", SCORE), both(pad_is_eos, "generate")),
    "dropout_in_updates": Bug("dropout in updates", "policy.train()  # with dropout 0.1", ("val/first_ratio_error", SCORE),
        lambda: {"ppo_sr.update": dropout_in_updates}),
    "old_is_new": Bug("old log-probs recomputed", "old = policy_logprobs(batch).detach()  # in every mini-batch",
        ("policy/approxkl_avg", SCORE), old_is_new),
    "learning_rate_x10": Bug("learning rate x 10", "learning_rate=5e-3", (KL, "policy/clipfrac_avg"),
        flags={"learning_rate": 10 * COMMON_PPO["learning_rate"]}),
}  # fmt: skip


# --- runs --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted(bug, checks=True):
    """ppo_sr.py with this bug (None: with none) inside the block, and without the first step's checks if asked."""
    patches = BUGS[bug].plant() if bug else {}
    patches |= {} if checks else {f"ppo_sr.{name}": lambda *args: None for name in CHECKS}
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        yield


def run(bug, checks, flags):
    """One run of ppo_sr.main, its output in log.txt -> the message that stopped it, or None."""
    torch.set_num_threads(1)
    Path(flags["output_dir"]).mkdir(parents=True, exist_ok=True)
    with open(Path(flags["output_dir"]) / "log.txt", "w", encoding="utf-8") as log, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        stack.enter_context(planted(bug, checks))
        try:
            ppo_sr.main(ppo_sr.Args(**flags | (BUGS[bug].flags if bug else {})))
        except InputError as error:
            return str(error)


def run_once(bug, checks, flags):
    """run() in a process of its own, unless the folder's run with these flags is over -> rows of its metrics, the
    message."""
    folder, done = Path(flags["output_dir"]), {"flags": json.loads(json.dumps(flags))}
    record = folder / "done.json"
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8"))["flags"] != done["flags"]:
        record.unlink(missing_ok=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            write_json(record, done | {"message": pool.submit(run, bug, checks, flags).result()})
    rows = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in rows.read_text("utf-8").splitlines()] if rows.is_file() else []
    return rows, json.loads(record.read_text(encoding="utf-8"))["message"]


def alarms_of(rows):
    """[(step, dial)] of the alarms that ring on these rows of a metrics.jsonl."""
    alarms, rung = Alarms(), []
    for row in rows:
        rung += [(row["step"], line.split(": ")[1].split(" is ")[0]) for line in alarms.ring(row["step"], row)]
    return rung


def series(rows):
    """{dial: (steps,)} of the dials that ppo_sr.py logs at every step, and SURPRISE; a task alone has too few responses."""
    names = [name for name in rows[1] if "/" in name and name.split("/")[0] not in ("eval", "task")]
    dials = {name: np.array([row.get(name, np.nan) for row in rows[1:]]) for name in names}
    return dials | {SURPRISE: np.log(dials["policy/perplexity"]) / dials[ENTROPY]}


def trailing_mean(values):  # (..., steps): at every step the mean of the last WINDOW values, or of all so far
    sums = np.cumsum(values, -1)
    sums[..., WINDOW:] -= sums[..., :-WINDOW].copy()
    return sums / np.minimum(np.arange(1, values.shape[-1] + 1), WINDOW)


def first_symptoms(dials, healthy):
    """[(step, dial)], earliest first: the first of RUN consecutive steps at which a dial's trailing mean lies farther
    outside the range of the healthy runs' than FAR times that range's width at that step; or step 2 of a dial that never
    moves from there on, where it does in every healthy run. Each dial: (steps,)."""
    found = []
    for dial, values in dials.items():
        normal = np.array([h[dial][: len(values)] for h in healthy])  # (runs, steps)
        means, smooth = trailing_mean(values), trailing_mean(normal)
        low, high = smooth.min(0), smooth.max(0)
        far = np.maximum(low - means, means - high) > FAR * (high - low) + 1e-5  # rounding
        starts = [t + 1 for t in range(len(far) - RUN + 1) if far[t : t + RUN].all()]
        if np.ptp(values[1:]) == 0 and np.ptp(normal[:, 1:], 1).min() > 0:
            starts.append(2)
        found += [(min(starts), dial)] if starts else []
    return sorted(found)


def main(args: Args):
    base, out = Path(args.folder), Path(args.output_dir)
    for name in set(args.bugs) - set(BUGS):
        raise InputError(f"--bugs {name}: is none of {', '.join(BUGS)}")
    if len(set(args.healthy_seeds)) < 3 or args.total_steps < RUN:
        raise InputError(f"--healthy_seeds, --total_steps: at least 3 seeds and {RUN} steps tell a symptom from noise")
    if not (base / "sft" / "model").is_dir():
        raise InputError(f"--folder {base}: no sft/model there; run `make reproduce` first")
    flags = COMMON_PPO | {"model_name_or_path": str(base / "sft/model"), "reward_model_path": str(base / "am/model")}
    flags |= {"total_steps": args.total_steps, "global_batch_size": args.global_batch_size, "max_eval_prompts": 200}
    flags |= {"dataset_name": str(base / "world/prompts_train.jsonl"), "eval_steps": args.total_steps}
    flags["eval_dataset_names"] = tuple(str(base / f"world/prompts_test_{kind}.jsonl") for kind in ("main", "forget"))

    def go(name, bug, checks, seed):
        return run_once(bug, checks, flags | {"output_dir": str(out / name), "seed": seed})

    runs = {f"healthy_{seed}": go(f"healthy_{seed}", None, True, seed) for seed in args.healthy_seeds}
    for rows, message in runs.values():
        if message or not rows:
            raise InputError(f"a run without a bug has stopped: {message}")
    stops = {}
    for name in args.bugs or BUGS:
        rows, message = go(name, name, True, args.healthy_seeds[0])
        if message:
            stops[name] = {"step": rows[-1]["step"] + 1 if rows else 0, "message": message}
            rows, message = go(f"{name}_unchecked", name, False, args.healthy_seeds[0])
        runs[name] = rows, message
    healthy = {name: series(rows) for name, (rows, _) in runs.items() if name.startswith("healthy")}
    commits = {json.loads(path.read_text(encoding="utf-8"))["commit"] for path in out.glob("*/config.json")} - {None}
    report = {"settings": flags | {"healthy_seeds": args.healthy_seeds}} | environment()
    report |= {"commit": " ".join(sorted(commits)), "runs": {}}  # of the runs
    for name, (rows, message) in runs.items():
        dials, rung = series(rows), alarms_of(rows)
        others = [h for other, h in healthy.items() if other != name]  # a healthy run against the other ones
        report["runs"][name] = {
            "check": stops.get(name), "stopped": message,
            "alarms": [alarm for alarm in rung if not alarm[1].startswith("task/")],
            "task_alarms": [alarm for alarm in rung if alarm[1].startswith("task/")],
            "symptoms": first_symptoms(dials, others),
            "test": {key: [rows[0][key], rows[-1][key]] for key in rows[0] if key.startswith("eval/")},
            "dials": {dial: [float(f"{v:.4g}") for v in values] for dial, values in dials.items()},
        }  # fmt: skip
        facts = report["runs"][name]
        print(f"{name}: check {(facts['check'] or {}).get('message', '-')}\n  alarms {facts['alarms']}\n  symptoms "
              f"{facts['symptoms']}")  # fmt: skip
    write_report(out / "failures.json", report)
    draw(report["runs"], out / "failures.png")


def write_report(path, report):
    """JSON with every innermost list on one line."""
    write_json(path, report)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", path.read_text("utf-8"))
    path.write_text(text, encoding="utf-8")


# --- the figure ----------------------------------------------------------------------------------------------------------


def draw(runs, path):
    """Two dials a bug: red the run with the bug, gray the range of the healthy ones, dashed where the dial's alarm rings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    names = [name for name in runs if name in BUGS]
    healthy = [r["dials"] for name, r in runs.items() if name not in BUGS]
    rows = -(-len(names) // 3)
    figure = plt.figure(figsize=(13.5, 2.15 * rows), layout="constrained")
    for name, block in zip(names, figure.subfigures(rows, 3, squeeze=False).flat, strict=False):
        bug, facts = BUGS[name], runs[name]
        rung = [f"check at step {facts['check']['step']}"] if facts["check"] else []
        rung += [f"alarm at step {facts['alarms'][0][0]}"] if facts["alarms"] else []
        block.suptitle(f"{bug.title}: {', '.join(rung) or 'nothing rings'}", fontsize=9, fontweight="bold")
        for axis, dial in zip(block.subplots(1, 2), bug.dials, strict=True):
            values, normal = np.array(facts["dials"][dial]), np.array([h[dial] for h in healthy])
            steps = range(1, len(values) + 1)
            axis.fill_between(steps, normal.min(0), normal.max(0), color="gray", alpha=0.4, linewidth=0)
            axis.plot(steps, values, color="C3", lw=1.6)
            axis.set_title(dial, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.set_xlim(1, len(values))
            if dial == EV and values.min() < -3:
                axis.set(ylim=(-3, 1))
                axis.set_title(f"{dial}, cut at -3", fontsize=8)
            if dial == SURPRISE:
                axis.set(yscale="log", ylim=(0.25, 40))
                axis.set_yticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
            for step, alarm in facts["alarms"]:
                if alarm.startswith(dial):
                    axis.axvline(step, color="C0", lw=1.2, ls="--")
    figure.savefig(path, dpi=85)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # half the bytes


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
