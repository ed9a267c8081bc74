import jax

from taming_jax.interop.compvis import build_discriminator_layout
from taming_jax.models.discriminator import Discriminator
from tests import golden


def test_the_discriminator_reproduces_the_official_one():
    recorded = golden.load("compvis_discriminator")
    model, x = Discriminator(filters=16, layers=3), golden.to_nhwc(recorded["x"])
    ours = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    state_dict = golden.drop_counts(golden.select_prefix(recorded, "sd/"))
    variables = golden.convert_state_dict(build_discriminator_layout, ours, state_dict)
    state_dict |= golden.drop_counts(golden.select_prefix(recorded, "after/"))
    after = golden.convert_state_dict(build_discriminator_layout, ours, state_dict)["batch_stats"]

    logits, updated = model.apply(variables, x, mutable=["batch_stats"])
    golden.assert_close(logits, golden.to_nhwc(recorded["logits_train"]), "training logits")
    golden.assert_trees_close(updated["batch_stats"], after, "running statistics")
    logits = model.apply(variables | {"batch_stats": after}, x, train=False)
    golden.assert_close(logits, golden.to_nhwc(recorded["logits_eval"]), "evaluation logits")
