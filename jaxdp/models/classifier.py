"""Two small image classifiers: a perceptron with one hidden layer, and a convolutional network for 28 x 28 images.

Both use tanh, which bounds the gradient and so loses less to clipping than ReLU does (arXiv 2007.14191). Inputs are one
image, without a batch axis, with pixels in [0, 1].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdp._typing import Key, Params


def _dense(key: Key, fan_in: int, fan_out: int) -> Params:
    scale = fan_in**-0.5
    return {"kernel": scale * jax.random.normal(key, (fan_in, fan_out)), "bias": jnp.zeros(fan_out)}


def _head(fan_in: int, num_classes: int) -> Params:
    # Zeros: the first logits are uniform, so that the first gradients are informative and of one size.
    return {"kernel": jnp.zeros((fan_in, num_classes)), "bias": jnp.zeros(num_classes)}


def _apply(layer: Params, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def init_mlp(key: Key, *, num_pixels: int, num_classes: int, num_hidden: int = 128) -> Params:
    return {"hidden": _dense(key, num_pixels, num_hidden), "head": _head(num_hidden, num_classes)}


def mlp_logits(params: Params, image: jax.Array) -> jax.Array:
    """Logits `[num_classes]` of one image of any shape, pixels in [0, 1]."""
    x = 2.0 * image.reshape(-1) - 0.6  # about zero mean and unit spread for pen strokes on an empty ground
    return _apply(params["head"], jnp.tanh(_apply(params["hidden"], x)))


def init_cnn(key: Key, *, num_classes: int) -> Params:
    """Parameters of `cnn_logits`: 30,000 or so, for images of 28 x 28 pixels."""
    keys = jax.random.split(key, 3)
    return {
        "conv1": _dense(keys[0], 5 * 5, 16),
        "conv2": _dense(keys[1], 4 * 4 * 16, 32),
        "hidden": _dense(keys[2], 3 * 3 * 32, 64),
        "head": _head(64, num_classes),
    }


def cnn_logits(params: Params, image: jax.Array) -> jax.Array:
    """Logits `[num_classes]` of one 28 x 28 image, pixels in [0, 1]."""
    x = (image.reshape(28, 28, 1) - 0.13) / 0.31  # mean and spread of handwritten digits
    x = jnp.tanh(_apply(params["conv1"], _patches(x, size=5, stride=2, padding=2)))  # [14, 14, 16]
    x = jnp.tanh(_apply(params["conv2"], _patches(x, size=4, stride=2, padding=1)))  # [7, 7, 32]
    x = x[:6, :6].reshape(3, 2, 3, 2, 32).mean((1, 3))  # [3, 3, 32]
    return _apply(params["head"], jnp.tanh(_apply(params["hidden"], x.reshape(-1))))


def _patches(x: jax.Array, *, size: int, stride: int, padding: int) -> jax.Array:
    """The `size` x `size` neighborhoods of `x` `[H, W, C]`: `[H', W', size * size * C]`.

    A convolution as patches times a matrix. Per-example gradients of `lax.conv` become grouped convolutions under `vmap`,
    which take several times longer on CPU than these batched matrix products.
    """
    x = jnp.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    span = x.shape[0] - size + 1
    shifted = [x[i : i + span : stride, j : j + span : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifted, axis=-1)
