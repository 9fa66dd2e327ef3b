"""What a broken PPO run looks like: short runs of ppo_sr.py on the toy world, each with one bug.

    make reproduce && python -m studies.failures --output_dir results/failures       # ten minutes

The bugs are patched into ppo_sr.py from here; it has no flag for them. A bug that stops at the
checks before step 1 runs a second time without them, to show what they spare. Beside them stand
healthy runs of several seeds, so that a symptom can be told from noise (first_symptoms). A run that
is there already is kept.

Writes failures.json (settings; check, alarms, symptoms, dials and test scores, before and after, of
every run) and failures.png. What they say: docs/FAILURES.md.
"""

import shutil
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from transformers import GenerationMixin

import ppo_sr
from miniature.jobs import Job, check_folder, read_json, read_jsonl, run_jobs
from miniature.reproduce import COMMON_PPO, ppo_inputs
from miniature.tables import write_rows
from ppo_sr import token_rewards
from studies.alarms import alarms_of
from tools.watch import WINDOW
from utils import InputError, backend, environment, generate, pad, response_logprobs, run_cli
from utils import stop_ids, write_json

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


@dataclass
class Run:
    """A job: one run of ppo_sr.py with a bug, or without."""

    output_dir: str
    bug: str | None
    flags: dict


# --- the bugs: what replaces a function of ppo_sr.py ----------------------------------------------


def paid_on_pad(scores, logprobs, ref_logprobs, mask, kl_coef):
    rewards = token_rewards(torch.zeros_like(scores), logprobs, ref_logprobs, mask, kl_coef)
    rewards[:, -1] += scores
    return rewards


@torch.no_grad()
def read_at_pad(scorer, tokenizer, texts, batch_size, bf16):
    ids, _ = pad([ids for ids, _ in texts], tokenizer.pad_token_id)
    prompt_lens = torch.tensor([prompt_len for _, prompt_len in texts], device=ids.device)
    scores = scorer(ids, torch.ones_like(ids, dtype=torch.bool), prompt_lens)
    return torch.stack(scores).double().cpu().numpy()


def mask_one_early(model, input_ids, attention_mask, prompt_lens, *rest, **options):
    """From x's last token to y's last but one: <eos> is never trained, and every advantage meets
    the token before."""
    attention_mask, prompt_lens = attention_mask[:, 1:], prompt_lens - 1
    return response_logprobs(model, input_ids, attention_mask, prompt_lens, *rest, **options)


def logits_not_shifted(model, input_ids, attention_mask, prompt_lens, *rest, **options):
    """log pi of y_t read where y_t has been seen and y_t+1 is predicted."""
    model = getattr(model, "module", model)

    def one_late(*inputs, **kwargs):
        hidden = model.base_model(*inputs, **kwargs).last_hidden_state
        return SimpleNamespace(last_hidden_state=hidden.roll(-1, 1))

    parts = dict(config=model.config, get_output_embeddings=model.get_output_embeddings)
    parts["head_is_known"] = True
    late = SimpleNamespace(base_model=one_late, **parts)
    return response_logprobs(late, input_ids, attention_mask, prompt_lens, *rest, **options)


def wrong_sign_of_kl(scores, logprobs, ref_logprobs, mask, kl_coef):
    return token_rewards(scores, logprobs, ref_logprobs, mask, -kl_coef)


def pad_is_eos(model, tokenizer, prompts, *sampling, **options):
    """The mask ids != pad takes <eos> away: nobody sees it, and the score is read a token early."""
    out, stops = (
        generate(model, tokenizer, prompts, *sampling, **options),
        stop_ids(model, tokenizer),
    )
    columns = out if isinstance(out, tuple) else [out]  # responses and, if asked, their log-probs
    kept = [max(1, len(y) - (y[-1] in stops)) for y in columns[0]]
    cut = [[row[:n] for row, n in zip(rows, kept, strict=True)] for rows in columns]
    return tuple(cut) if isinstance(out, tuple) else cut[0]


def warped(**filters):
    """A sampler with filters of its own."""
    sample = GenerationMixin.generate
    return lambda model, **options: sample(model, **options | filters)


class RandomCritic(ppo_sr.Critic):
    def __init__(self, *of_scorer):
        super().__init__(*of_scorer)
        nn.init.normal_(self.model.score.weight, generator=torch.Generator().manual_seed(0))


def frozen_critic(self, model, learning_rate):
    rate = 0.0 if isinstance(model, ppo_sr.Critic) else learning_rate
    return backend.engine(model, rate, max_grad_norm=self.args.max_grad_norm)


def dropout_in_updates():
    policy_logprobs = ppo_sr.policy_logprobs

    def with_dropout(ppo, sequences):
        policy = ppo.policy.module
        for module in policy.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        policy.train()
        found = policy_logprobs(ppo, sequences)
        policy.eval()
        return found

    return {"ppo_sr.policy_logprobs": with_dropout}


def old_is_new():
    """pi_old's log-probs are those of the model that is being updated, of the batch just read."""
    update = ppo_sr.update

    class Old:  # what update() takes off is logprobs[batch][mask]
        def __getitem__(self, index):
            return self

        def __rsub__(self, logprobs):
            return logprobs - logprobs.detach()

    def with_old(ppo, step, rollout, *rest):
        kept, rollout.logprobs = rollout.logprobs, Old()
        metrics = update(ppo, step, rollout, *rest)
        rollout.logprobs = kept
        return metrics

    return {"ppo_sr.PPO.update": with_old}


@dataclass
class Bug:
    title: str
    cause: str  # the line that a codebase with this bug has
    dials: tuple[str, ...]  # of the figure
    plant: dict | Callable[[], dict] = field(default_factory=dict)  # {dotted name: replacement}
    flags: dict = field(default_factory=dict)


SCORE, KL, ENTROPY = "objective/scores", "objective/kl", "objective/entropy"
GOLD, VALUE, EV = "objective/gold", "loss/value_avg", "val/explained_variance"
SURPRISE = "log perplexity / entropy"  # 1 but for noise where the log-probs are the sampler's
SAMPLER = "transformers.GenerationMixin.generate"
BUGS = {
    "paid_on_pad": Bug(
        "score paid on PAD", "rewards[:, -1] += scores", (EV, VALUE),
        {"ppo_sr.token_rewards": paid_on_pad}),
    "read_at_pad": Bug(
        "score read at PAD", "score = scorer(ids).logits[:, -1]", (SCORE, GOLD),
        {"ppo_sr.score_texts": read_at_pad}),
    "mask_one_early": Bug(
        "mask one early", "mask = position >= prompt_len - 1", (SURPRISE, KL),
        {"ppo_sr.response_logprobs": mask_one_early}),
    "logits_not_shifted": Bug(
        "logits not shifted", "logprobs = log_softmax(logits)[ids]", (SURPRISE, KL),
        {"ppo_sr.response_logprobs": logits_not_shifted}),
    "no_whitening": Bug(
        "no whitening", "# advantages = whiten(advantages, mask)", ("loss/policy_avg", KL),
        {"ppo_sr.whiten": lambda values, mask: values}),
    "sampler_temperature": Bug(
        "sampler at T 0.7", "model.generate(temperature=0.7)", (SURPRISE, GOLD),
        {SAMPLER: warped(temperature=0.7)}),
    "sampler_top_p": Bug(
        "sampler at top-p 0.9", "model.generate(top_p=0.9)", (SURPRISE, GOLD),
        {SAMPLER: warped(top_p=0.9)}),
    "wrong_sign_of_kl": Bug(
        "wrong sign of KL", "rewards = kl_coef * (logprobs - ref_logprobs)", (KL, GOLD),
        {"ppo_sr.token_rewards": wrong_sign_of_kl}),
    "reference_is_policy": Bug(
        "reference is policy", "reference = policy  # no copy", (KL, ENTROPY),
        {"utils.Backend.reference": lambda self, policy, path: policy}),
    "random_critic": Bug(
        "critic's head random, large", "nn.init.normal_(critic.score.weight)", (EV, GOLD),
        {"ppo_sr.Critic": RandomCritic}),
    "frozen_critic": Bug(
        "critic never trained", "AdamW(policy.parameters())  # and not the critic's", (EV, VALUE),
        {"ppo_sr.PPO.engine": frozen_critic}),
    "pad_is_eos": Bug(
        "pad = eos", "tokenizer.pad_token = tokenizer.eos_token; mask = ids != pad",
        ("val/no_eos_share", SCORE), {"ppo_sr.generate": pad_is_eos}),
    "dropout_in_updates": Bug(
        "dropout in updates", "policy.train()  # with dropout 0.1",
        ("policy/approxkl_avg", SCORE), dropout_in_updates),
    "old_is_new": Bug(
        "old log-probs recomputed",
        "old = policy_logprobs(batch).detach()  # in every mini-batch",
        ("policy/approxkl_avg", SCORE), old_is_new),
    "learning_rate_x10": Bug(
        "learning rate x 10", "learning_rate=5e-3", (KL, "policy/clipfrac_avg"),
        flags={"learning_rate": 10 * COMMON_PPO["learning_rate"]}),
}  # fmt: skip


# --- runs -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted(bug, checks=True):
    """ppo_sr.py with this bug (None: with none) inside the block, without its checks if asked."""
    patches = BUGS[bug].plant if bug else {}
    patches = dict(patches() if callable(patches) else patches)
    if not checks:
        patches["ppo_sr.check_before_step_1"] = lambda ppo: None
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        yield


def run_planted(run):
    """With its checks, and again without where these stop it -> run.json: {rows of metrics.jsonl,
    check: the message that stopped the first, stopped: the second, or None}."""
    flags = run.flags | (BUGS[run.bug].flags if run.bug else {})
    found = {"rows": [], "check": None}
    for checks in (True, False):
        found["stopped"], folder = None, Path(run.output_dir, "checked" if checks else "unchecked")
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        with planted(run.bug, checks):
            try:
                ppo_sr.main(ppo_sr.Args(**flags | {"output_dir": str(folder)}))
            except InputError as error:
                found["stopped"] = str(error)
        rows = folder / "metrics.jsonl"
        found["rows"] = read_jsonl(rows) if rows.is_file() else []
        if not found["stopped"]:
            break
        if checks:
            step = found["rows"][-1]["step"] + 1 if found["rows"] else 0
            found["check"] = {"step": step, "message": found["stopped"]}
    write_json(Path(run.output_dir) / "run.json", found)


def jobs_of(args):
    out, flags = Path(args.output_dir), COMMON_PPO | ppo_inputs(Path(args.folder), "am")
    flags |= {"total_steps": args.total_steps, "eval_steps": args.total_steps}
    flags |= {"global_batch_size": args.global_batch_size, "max_eval_prompts": 200}
    runs = [(f"healthy_{seed}", None, seed) for seed in args.healthy_seeds]
    runs += [(name, name, args.healthy_seeds[0]) for name in args.bugs or BUGS]
    jobs = []
    for name, bug, seed in runs:
        run = {"output_dir": str(out / name), "bug": bug, "flags": flags | {"seed": seed}}
        jobs.append(Job(out / name, "studies.failures:Run", run))
    return jobs


# --- symptoms -------------------------------------------------------------------------------------


def series(rows):
    """{dial: (steps,)} of the dials that ppo_sr.py logs at every step, and SURPRISE; a task alone
    has too few responses."""
    names = [name for name in rows[1] if "/" in name and name.split("/")[0] not in ("eval", "task")]
    dials = {name: np.array([row.get(name, np.nan) for row in rows[1:]]) for name in names}
    return dials | {SURPRISE: np.log(dials["policy/perplexity"]) / dials[ENTROPY]}


def trailing_mean(values):  # (..., steps): the mean of the last WINDOW values, or of all so far
    sums = np.cumsum(values, -1)
    sums[..., WINDOW:] -= sums[..., :-WINDOW].copy()
    return sums / np.minimum(np.arange(1, values.shape[-1] + 1), WINDOW)


def first_symptoms(dials, healthy):  # {dial: (steps,)}, a list of such
    """[(step, dial)], earliest first: the first of RUN consecutive steps at which a dial's trailing
    mean lies farther outside the range of the healthy runs' than FAR times that range's width at
    that step; or step 2 of a dial that stands still from there on, where no healthy run's does."""
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


def facts_of(run, others):
    """What failures.json says of a run.json; others: the series of the other healthy runs."""
    rows, dials, alarms = run["rows"], series(run["rows"]), alarms_of(run["rows"])
    return {
        "check": run["check"],
        "stopped": run["stopped"],
        "alarms": [alarm for alarm in alarms if not alarm[1].startswith("task/")],
        "task_alarms": [alarm for alarm in alarms if alarm[1].startswith("task/")],
        "symptoms": first_symptoms(dials, others),
        "test": {k: [rows[0][k], rows[-1][k]] for k in rows[0] if k.startswith("eval/")},
        "dials": {dial: [float(f"{v:.4g}") for v in values] for dial, values in dials.items()},
    }


# --- the figure -----------------------------------------------------------------------------------


def draw(runs, path):
    """Two dials a bug. Red: its run; gray: the range of the healthy ones; dashed: its alarms."""
    names = [name for name in runs if name in BUGS]
    healthy = [run["dials"] for name, run in runs.items() if name not in BUGS]
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(13.5, 2.15 * rows), layout="constrained")
    blocks = figure.subfigures(rows, 3, squeeze=False).flat
    for name, block in zip(names, blocks, strict=False):
        bug, facts = BUGS[name], runs[name]
        rung = [f"check at step {facts['check']['step']}"] if facts["check"] else []
        rung += [f"alarm at step {facts['alarms'][0][0]}"] if facts["alarms"] else []
        title = f"{bug.title}: {', '.join(rung) or 'nothing rings'}"
        block.suptitle(title, fontsize=9, fontweight="bold")
        for axis, dial in zip(block.subplots(1, 2), bug.dials, strict=True):
            values, normal = np.array(facts["dials"][dial]), np.array([h[dial] for h in healthy])
            steps = range(1, len(values) + 1)
            band = dict(color="gray", alpha=0.4, linewidth=0)
            axis.fill_between(steps, normal.min(0), normal.max(0), **band)
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
            for step in [step for step, alarm in facts["alarms"] if alarm.startswith(dial)]:
                axis.axvline(step, color="C0", lw=1.2, ls="--")
    figure.savefig(path, dpi=85)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # half the bytes


def main(args: Args):
    if isinstance(args, Run):
        return run_planted(args)
    for name in set(args.bugs) - set(BUGS):
        raise InputError(f"--bugs {name}: is none of {', '.join(BUGS)}")
    if len(set(args.healthy_seeds)) < 3 or args.total_steps < RUN:
        least = f"at least 3 seeds and {RUN} steps tell a symptom from noise"
        raise InputError(f"--healthy_seeds, --total_steps: {least}")
    check_folder(args.folder, "sft", "am")
    jobs, out = jobs_of(args), Path(args.output_dir)
    run_jobs(jobs)
    runs = {job.folder.name: read_json(job.folder / "run.json") for job in jobs}
    sound = {name: run for name, run in runs.items() if name not in BUGS}
    for run in sound.values():
        if run["check"] or not run["rows"]:
            raise InputError(f"a run without a bug has stopped: {run['check']}")
    healthy = {name: series(run["rows"]) for name, run in sound.items()}
    report = {"settings": jobs[0].args["flags"] | {"healthy_seeds": args.healthy_seeds}}
    commits = {read_json(path)["commit"] for path in out.glob("*/*/config.json")} - {None}
    report |= environment() | {"commit": " ".join(sorted(commits)), "runs": {}}  # of the runs
    for name, run in runs.items():
        others = [h for other, h in healthy.items() if other != name]
        facts = report["runs"][name] = facts_of(run, others)
        print(f"{name}: check {(facts['check'] or {}).get('message', '-')}")
        print(f"  alarms {facts['alarms']}\n  symptoms {facts['symptoms']}")
    write_rows(out / "failures.json", report)
    draw(report["runs"], out / "failures.png")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
