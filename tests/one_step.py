"""Takes one step of a run from its newest checkpoint, on any devices of any processes.

python tests/one_step.py WORKDIR STAGE OUT --devices N [the flags of several processes]

Process 0 writes a pickle of NumPy trees to OUT: `metrics`, `gradients` (from Adam's moments),
`extra` (statistics and averages after the step), `seen` (the images or codes that were read), and
`step`."""

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
import tyro

from taming_jax.cli.arguments import parse
from taming_jax.config.load import load_config
from taming_jax.data.batches import gather_batch
from taming_jax.errors import report
from taming_jax.parallel import distributed
from taming_jax.parallel.devices import Devices, copy_buffers
from taming_jax.parallel.distributed import Processes
from taming_jax.training.checkpoints import Store
from taming_jax.training.prior import PriorStage
from taming_jax.training.vqgan import VQGANStage

STAGES = {"vqgan": VQGANStage, "prior": PriorStage}


def get_moments(state):
    """Returns Adam's first moments m of the trained networks. One step changes them by the gradient
    g: m' = b m + (1 - b) g."""
    return {
        name: optax.tree_utils.tree_get(net.opt_state, "mu")
        for name, net in state.nets.items()
        if net.opt_state != ()
    }


def take_step(args):
    config = load_config(str(Path(args.workdir) / "config.json"), {"workdir": args.workdir})
    devices = Devices(args.devices)
    stage = STAGES[args.stage](config, devices)
    store = Store(Path(args.workdir), stage.name, stage.best_metric, stage.dataset)
    template = stage.init(jax.random.key(config.seed))
    restored = distributed.run_on_primary(lambda: store.restore(template, config, (), ()))
    before = jax.tree.map(np.array, get_moments(restored))
    step, feed = int(restored.step), stage.build_feeds()[0]
    batch = feed.batch(step)
    state = copy_buffers(devices.replicate(restored))
    seen = devices.gather(
        devices.compile(lambda _, arrays: gather_batch(arrays)[0])(state, batch.arrays)
    )
    state, metrics = stage.train_step(state, batch)
    after, metrics = devices.fetch(state), devices.fetch(metrics).unpack()[0]
    feed.close()
    beta = getattr(config, args.stage).betas[0]
    results = {
        "step": step,
        "metrics": metrics,
        "gradients": jax.tree.map(
            lambda m, new: (new - beta * m) / (1 - beta), before, get_moments(after)
        ),
        "extra": {name: net.extra for name, net in after.nets.items()},
        "seen": seen,
    }
    if distributed.is_primary():
        Path(args.out).write_bytes(pickle.dumps(jax.tree.map(np.asarray, results)))


@dataclass(frozen=True, kw_only=True)
class OneStep(Processes):
    workdir: tyro.conf.Positional[str]
    stage: tyro.conf.Positional[str]
    out: tyro.conf.Positional[str]
    devices: int | None = None


def main():
    args = parse(OneStep, __doc__)
    distributed.join(args)
    take_step(args)


if __name__ == "__main__":
    sys.exit(report(main))
