"""InceptionV3 as used for the Fréchet inception distance: the network of TensorFlow's 2015 release,
with the layout and names of pytorch-fid (github.com/mseitzer/pytorch-fid)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

SIZE = 299  # height and width of the images that the network was trained on
FEATURES = 2048
CLASSES = 1008


class BasicConv(nn.Module):
    """A convolution without bias, batch normalization by running statistics, and ReLU."""

    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = [(side, side) for side in self.padding]
        x = nn.Conv(
            self.features, self.size, self.stride, padding, use_bias=False, name="conv"
        )(x)  # fmt: skip
        norm = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")
        return nn.relu(norm(x))


class Mixed(nn.Module):
    """Parallel branches on images [b,h,w,c], concatenated to [b,h',w',sum of the features].

    A branch is a sequence of convolutions, each given as (name, features, size, stride). If an item
    is a tuple of convolutions, they are applied in parallel to the same input. `pool` is the
    operation that starts the last branch: "average" (which excludes the padding, as in TensorFlow)
    or "max", both of stride 1 and followed by a 1x1 convolution, or "downsample", a max pooling of
    stride 2 without a convolution.
    """

    branches: tuple[tuple, ...]
    pool: str
    pool_features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        outputs = []
        for branch in self.branches:
            h = x
            for item in branch:
                if isinstance(item[0], tuple):
                    h = jnp.concatenate([make_conv(spec)(h) for spec in item], -1)
                else:
                    h = make_conv(item)(h)
            outputs.append(h)
        if self.pool == "downsample":
            outputs.append(nn.max_pool(x, (3, 3), (2, 2)))
        else:
            padding = ((1, 1), (1, 1))
            if self.pool == "average":
                h = nn.avg_pool(x, (3, 3), (1, 1), padding, count_include_pad=False)
            else:
                h = nn.max_pool(x, (3, 3), (1, 1), padding)
            outputs.append(BasicConv(self.pool_features, name="branch_pool")(h))
        return jnp.concatenate(outputs, -1)


def make_conv(spec: Sequence) -> BasicConv:
    """Makes the convolution (name, features, size, stride). At stride 1, it keeps the height and
    width."""
    name, features, (rows, columns), stride = spec
    padding = (rows // 2, columns // 2) if stride == 1 else (0, 0)
    return BasicConv(features, (rows, columns), stride, padding, name=name)


ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)


def make_block_35(pool_features: int, name: str) -> Mixed:
    """Makes a block for 35x35 feature maps."""
    return Mixed((
        (("branch1x1", 64, ONE, 1),),
        (("branch5x5_1", 48, ONE, 1), ("branch5x5_2", 64, FIVE, 1)),
        (("branch3x3dbl_1", 64, ONE, 1), ("branch3x3dbl_2", 96, THREE, 1),
         ("branch3x3dbl_3", 96, THREE, 1)),
    ), "average", pool_features, name=name)  # fmt: skip


def make_block_17(c: int, name: str) -> Mixed:
    """Makes a block for 17x17 feature maps, with `c` channels within its branches."""
    row, column = (1, 7), (7, 1)
    return Mixed((
        (("branch1x1", 192, ONE, 1),),
        (("branch7x7_1", c, ONE, 1), ("branch7x7_2", c, row, 1), ("branch7x7_3", 192, column, 1)),
        (("branch7x7dbl_1", c, ONE, 1), ("branch7x7dbl_2", c, column, 1),
         ("branch7x7dbl_3", c, row, 1), ("branch7x7dbl_4", c, column, 1),
         ("branch7x7dbl_5", 192, row, 1)),
    ), "average", 192, name=name)  # fmt: skip


def make_block_8(pool: str, name: str) -> Mixed:
    """Makes a block for 8x8 feature maps."""
    row, column = (1, 3), (3, 1)
    return Mixed((
        (("branch1x1", 320, ONE, 1),),
        (("branch3x3_1", 384, ONE, 1),
         (("branch3x3_2a", 384, row, 1), ("branch3x3_2b", 384, column, 1))),
        (("branch3x3dbl_1", 448, ONE, 1), ("branch3x3dbl_2", 384, THREE, 1),
         (("branch3x3dbl_3a", 384, row, 1), ("branch3x3dbl_3b", 384, column, 1))),
    ), pool, 192, name=name)  # fmt: skip


class InceptionV3(nn.Module):
    """A network that maps images float [b,299,299,3] in [-1, 1] to features [b,2048], averaged over
    all positions, and logits [b,1008] of the ImageNet classes of the 2015 release."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = BasicConv(32, THREE, 2, name="Conv2d_1a_3x3")(x)
        x = BasicConv(32, THREE, name="Conv2d_2a_3x3")(x)
        x = BasicConv(64, THREE, padding=(1, 1), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, THREE, (2, 2))
        x = BasicConv(80, name="Conv2d_3b_1x1")(x)
        x = BasicConv(192, THREE, name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, THREE, (2, 2))
        for pool_features, name in ((32, "Mixed_5b"), (64, "Mixed_5c"), (64, "Mixed_5d")):
            x = make_block_35(pool_features, name)(x)
        x = Mixed((
            (("branch3x3", 384, THREE, 2),),
            (("branch3x3dbl_1", 64, ONE, 1), ("branch3x3dbl_2", 96, THREE, 1),
             ("branch3x3dbl_3", 96, THREE, 2)),
        ), "downsample", name="Mixed_6a")(x)  # fmt: skip
        for c, name in ((128, "Mixed_6b"), (160, "Mixed_6c"), (160, "Mixed_6d"), (192, "Mixed_6e")):
            x = make_block_17(c, name)(x)
        x = Mixed((
            (("branch3x3_1", 192, ONE, 1), ("branch3x3_2", 320, THREE, 2)),
            (("branch7x7x3_1", 192, ONE, 1), ("branch7x7x3_2", 192, (1, 7), 1),
             ("branch7x7x3_3", 192, (7, 1), 1), ("branch7x7x3_4", 192, THREE, 2)),
        ), "downsample", name="Mixed_7a")(x)  # fmt: skip
        x = make_block_8("average", "Mixed_7b")(x)
        x = make_block_8("max", "Mixed_7c")(x)
        features = x.mean((1, 2))
        return features, nn.Dense(CLASSES, name="fc")(features)
