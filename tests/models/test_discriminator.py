import jax
import numpy as np

from taming_jax.convert.compvis import discriminator_variables
from taming_jax.models.discriminator import Discriminator
from tests import golden


def test_reproduces_the_official_discriminator():
    recorded = golden.load("compvis_discriminator")
    variables = discriminator_variables(golden.under(recorded, "sd/"))
    after = discriminator_variables(golden.under(recorded, "after/"))["batch_stats"]
    model, x = Discriminator(filters=16, layers=3), golden.nhwc(recorded["x"])
    ours = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, variables)

    logits, changed = model.apply(variables, x, mutable=["batch_stats"])
    golden.assert_close(logits, golden.nhwc(recorded["logits_train"]), "training logits")
    golden.assert_trees_close(changed["batch_stats"], after, "running statistics")
    logits = model.apply(variables | {"batch_stats": after}, x, train=False)
    golden.assert_close(logits, golden.nhwc(recorded["logits_eval"]), "evaluation logits")
