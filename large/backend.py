"""The object that takes the place of utils.backend, and the end of a run of many processes.

Every process holds all prompts, responses and numbers of a batch, which are small, and does its
part of the forward and backward passes, which are not. So whitening, moving averages, means and
shuffles are the lines of one process, on the same numbers.
"""

import contextlib
import datetime
import functools
import itertools
import os
import shutil
import sys
import time
import traceback
import warnings

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from large.adapters import AdaptersOff, add_adapters, adapted, gathered, whole_weights
from large.engines import DeepSpeedEngine, FrozenEngine, LargeEngine, float32_buffers
from large.engines import sharded_loading
from large.flags import check, checkpoints, zero_stage
from plumbing.errors import first_line
from utils import DEVICE, Backend, InputError, backend, pretrained, progress, seeded

PATIENCE = datetime.timedelta(minutes=30)  # one alone may call a judge, or write the weights


class LargeBackend(Backend):
    args = config = None  # config: the DeepSpeed file with our entries, if --deepspeed names one
    rank, processes = 0, 1
    counts, dealt = True, 0  # see deal()

    @property
    def writes(self):
        return self.rank == 0

    @property
    def length_ratio(self):
        """Processes make the same calls: no cuts that depend on the texts."""
        return Backend.length_ratio if self.processes == 1 else 0.0

    # --- who does what, and how the results come together -----------------------------------------

    def part(self, batches):
        """The batches of this process, and how many of them count.

        The same rows in the same order are cut anew, so that all processes have equally many
        batches of about equal length, and the exchanges within passes meet. Where rows are too few,
        a process without one repeats the first, which does not count.
        """
        if self.processes == 1 or not batches:
            return batches, len(batches)
        rows = [row for batch in batches for row in batch]
        largest = max(map(len, batches))
        count = self.processes * -(-len(rows) // (largest * self.processes))
        size, longer = divmod(len(rows), count)
        ends = [k * size + min(k, longer) for k in range(count + 1)]
        mine = [rows[a:b] for a, b in itertools.pairwise(ends)][self.rank :: self.processes]
        return [batch or rows[:1] for batch in mine], sum(map(bool, mine))

    def everyone(self, value):
        """[value of process 0, value of process 1, ...], of anything but tensors on a GPU."""
        values = [value] * self.processes
        if self.processes > 1:
            dist.all_gather_object(values, value)
        return values

    def results(self, function, batches, count):
        if self.processes == 1:
            return super().results(function, batches, count)
        mine, real = self.part(batches)
        bar = progress(mine, "batches", delay=5)
        results = [dict(zip(batch, function(batch), strict=True)) for batch in bar][:real]
        # cloned: a row of a batch would travel with the batch
        results = tree_map_only(torch.Tensor, lambda t: t.cpu().clone(), results)
        found = {}
        for of_batch in itertools.chain(*self.everyone(results)):
            found |= of_batch
        found = tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), found)
        return [found.get(i) for i in range(count)]

    def deal(self, batches):
        mine, self.dealt = self.part(batches)
        for number, batch in enumerate(mine):
            self.counts = number < self.dealt  # for DeepSpeedEngine.backward
            yield batch
        self.counts = True

    def add_up(self, parts):
        if self.processes == 1:
            return super().add_up(parts)
        whole = sum(parts[: self.dealt], torch.zeros_like(parts[0])).detach().cpu().double()
        dist.all_reduce(whole)
        return whole.to(parts[0])

    def once(self, function):
        """The first one's value is everyone's. It may be random, which must leave no one ahead."""
        if self.processes == 1:
            return function()
        box = [None]
        with torch.random.fork_rng([torch.cuda.current_device()] if DEVICE.type == "cuda" else []):
            if self.rank == 0:
                box = [function()]
        dist.broadcast_object_list(box)
        return box[0]

    @contextlib.contextmanager
    def sampler(self, model):
        """Random numbers of this process's own. All go on with the same ones."""
        with contextlib.ExitStack() as stack:
            if self.processes > 1:
                stack.enter_context(seeded(int(torch.randint(2**40, ())) + self.rank))
            sampler = getattr(model, "sampler", functools.partial(super().sampler, model))
            yield stack.enter_context(sampler())

    # --- models -----------------------------------------------------------------------------------

    def engine(self, module, *options, **more):
        model = module if hasattr(module, "config") else getattr(module, "model", module)
        asked = self.args.gradient_checkpointing
        weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        if asked and not model.supports_gradient_checkpointing:
            raise InputError(f"--gradient_checkpointing True: {type(model).__name__} has none")
        if checkpoints(asked, weights) and model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.args.lora_rank:
            with seeded(self.args.seed):
                add_adapters(module, model, self.args.lora_rank)
        kind = LargeEngine if self.config is None else DeepSpeedEngine
        return kind(module, *options, **more)

    def load(self, auto_class, path, wrap, frozen, **options):
        """As DeepSpeed takes it: in bfloat16 if it trains so, and in shards under ZeRO-3. What is
        only read is in shards if --shard_frozen_models says so, in scripts without it by ZeRO-3."""
        if self.config is None:
            return super().load(auto_class, path, wrap, frozen, **options)
        dtype = torch.bfloat16 if self.config["bf16"]["enabled"] else torch.float32
        sharded = zero_stage(self.config) == 3
        if frozen:
            sharded = getattr(self.args, "shard_frozen_models", sharded)
        with sharded_loading(self.config) if sharded else contextlib.nullcontext():
            module = wrap(*pretrained(auto_class, path, dtype=dtype, **options))
        if sharded:
            module = module.to(DEVICE)
        if not frozen:
            return module
        module.requires_grad_(False)
        if sharded:
            return FrozenEngine(module)
        with float32_buffers(module):
            return module.to(DEVICE, dtype)

    def reference(self, policy, path):
        return AdaptersOff(policy) if self.args.lora_rank else super().reference(policy, path)

    def whole(self, parameters):
        return gathered(parameters, writer=0)

    def weights(self, module):
        as_they_are = self.config is None and not adapted(module)
        return module.state_dict() if as_they_are else whole_weights(module)

    def saved(self, folder, step):
        for shards in folder.glob("step-*") if self.writes else ():
            if not shards.name.startswith(f"step-{step}-"):
                shutil.rmtree(shards)

    def last_pass(self):
        """The first process goes on as if alone, the others end, and models in shards with them."""
        self.config = None
        if self.processes > 1:
            self.everyone(None)  # none ends while another needs it
            dist.destroy_process_group()
            if self.rank:
                os._exit(0)
            self.processes = 1


# --- a run --------------------------------------------------------------------------------------


def become(args, config, rank=0, processes=1):
    """Make utils.backend, of which every script has a name, a LargeBackend."""
    backend.__class__ = LargeBackend
    vars(backend).update(args=args, config=config, rank=rank, processes=processes)


def join(args):
    """Meet the processes that torchrun started, or with --deepspeed alone be the only one."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    config, cuda = check(args, processes), torch.cuda.is_available()
    become(args, config)
    if processes == 1 and config is None:
        return
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's, of torch
    rendezvous = {}
    if "MASTER_PORT" not in os.environ:  # not by torchrun
        os.environ["MASTER_PORT"] = "0"
        rendezvous = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    kind = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(kind, timeout=PATIENCE, **rendezvous)
    become(args, config, dist.get_rank(), dist.get_world_size())


def runner(main):
    """main(args) in all processes: one of them prints, and an error is said once."""
    stderr = sys.stderr
    if int(os.environ.get("RANK", 0)):  # progress bars, too
        sys.stdout = sys.stderr = open(os.devnull, "w")

    def run(args):
        try:
            join(args)
            main(args)
            finish(0)
        except InputError as error:
            if not begun():
                raise  # run_cli prints it
            # what is the same everywhere the first one has said by then, and torchrun ends the rest
            time.sleep(2 * (backend.rank > 0))
            print(f"error: {error}", file=stderr)
            finish(2)
        except RuntimeError as error:
            if backend.processes == 1:
                raise
            traceback.print_exc(file=stderr)
            lost = f"rank {backend.rank}: {first_line(error)}; if another rank was lost, start"
            remedy = "the same command again, with --resume True where the run writes checkpoints"
            print(f"error: {lost} {remedy}", file=stderr)
            finish(1)
        except BaseException:
            sys.stderr = stderr  # for the traceback
            raise

    return run


def begun():
    return dist.is_initialized() or "deepspeed" in sys.modules


def finish(code):
    """Under DeepSpeed the interpreter's own end aborts now and then, after all is written."""
    if begun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
