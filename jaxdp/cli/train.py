"""`jaxdp train`: an image classifier under differential privacy, from data to report."""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxdp import _validate
from jaxdp._files import write_whole
from jaxdp.checkpointing import Checkpointer
from jaxdp.cli import cost, meters, options, run_folder, training_loop
from jaxdp.cli.curve import EpsilonCurve, curve_png
from jaxdp.datasets import ImageDataset, load_digits, load_mnist
from jaxdp.mechanism import PrivacyPlan
from jaxdp.models import cnn_logits, init_cnn, init_mlp, mlp_logits
from jaxdp.training import TrainingState, make_dp_step


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Settings that were found good on a data set that is public anyway; with your own data, tuning costs privacy (S15)."""

    model: Literal["mlp", "cnn"]
    expected_batch_size: float
    num_steps: int
    l2_clip_norm: float
    learning_rate: float
    baseline_learning_rate: float
    microbatch_size: int | None


DEFAULTS = {
    "digits": Defaults("mlp", 512, 200, 0.5, 2.0, 0.5, None),
    "mnist": Defaults("cnn", 1024, 1200, 1.0, 2.0, 0.5, 64),
}


def _default_of(name: str, without_privacy: str | None = None) -> Any:
    def value(values: Defaults) -> str:
        text = str(getattr(values, name) or "all")
        return f"{text} ({getattr(values, without_privacy)} without privacy)" if without_privacy else text

    return options.hint(
        "default: " + ", ".join(f"{value(values)} for {dataset}" for dataset, values in DEFAULTS.items())
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains an image classifier with DP-SGD and reports its accuracy beside the epsilon it cost.

    With no options: scikit-learn's bundled handwritten digits at epsilon 3 and delta 1e-5, under a minute on two cores.

      jaxdp train
      jaxdp train --target-epsilon 1 --clipping automatic
      jaxdp train --dataset mnist --data-dir data/mnist --out runs/mnist-eps3
      jaxdp train --resume --out runs/mnist-eps3
    """

    dataset: Literal["digits", "mnist"] = "digits"
    """digits comes with scikit-learn; mnist reads its four IDX files from --data-dir."""
    data_dir: Annotated[Path | None, options.hint("default: none")] = None
    """Folder of the MNIST files, gzipped or not."""
    model: Annotated[Literal["mlp", "cnn"] | None, _default_of("model")] = None
    """mlp has one hidden layer; cnn takes 28 x 28 images."""

    target_epsilon: Annotated[float | None, options.hint("default: 3, unless --noise-multiplier is given")] = None
    """The privacy goal."""
    target_delta: float = 1e-5
    """The delta of the goal; well below 1 / number of examples."""
    noise_multiplier: Annotated[float | None, options.hint("default: calibrated to the goal")] = None
    """Noise std over clip norm, instead of a goal."""
    expected_batch_size: Annotated[float | None, _default_of("expected_batch_size")] = None
    """Mean size of the Poisson batches."""
    sampling_prob: Annotated[float | None, options.hint("default: from --expected-batch-size")] = None
    """Probability of each example to enter a batch, instead of its mean size."""
    num_steps: Annotated[int | None, _default_of("num_steps")] = None
    """Number of steps."""
    clipping: options.ClippingName = "flat"
    """How each per-example gradient is bounded."""
    l2_clip_norm: Annotated[float | None, _default_of("l2_clip_norm")] = None
    """Clip norm; the first one under quantile."""
    noise_allocation: Literal["global", "equal_budget", "least_energy"] = "global"
    """How per-layer clipping divides its noise."""
    neighboring_relation: options.RelationName = "add-or-remove-one"
    """Which data sets the guarantee makes hard to tell apart."""
    padded_batch_size: Annotated[int | None, options.hint("default: chosen so that truncation costs nothing")] = None
    """Rows of a padded batch; larger draws are truncated, and charged for."""
    accountant: Literal["pld", "rdp"] = "pld"
    """pld is tight; rdp is what older papers report."""
    no_privacy: options.Flag[bool] = False
    """The baseline: the same run without clipping and noise."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of the noisy mean gradient."""
    learning_rate: Annotated[float | None, _default_of("learning_rate", "baseline_learning_rate")] = None
    """Learning rate of the optimizer."""
    momentum: float = 0.0
    """Momentum of sgd."""
    init_seed: int = 0
    """Seed of the initial parameters, which are public. Noise and sampling take theirs from the operating system."""

    microbatch_size: Annotated[int | None, _default_of("microbatch_size")] = None
    """Examples differentiated at once: bounds memory, changes nothing else."""
    out: Annotated[Path | None, options.hint("default: runs/<dataset>, or runs/<dataset>-2 and so on")] = None
    """Output folder. Its checkpoints hold the noise key: keep them secret."""
    resume: options.Flag[bool] = False
    """Go on with the run in --out, or with the newest interrupted one of this data set; other settings must be the same."""
    checkpoint_every: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 100
    """Steps between checkpoints."""


def run(config: Train) -> None:
    """Trains, evaluates and writes `model.npz` to the run's folder, and the private `report.json`, `curve.png` and checkpoints.

    Raises:
        ValueError, TypeError, OSError, CheckpointError: bad input, before any step and with nothing overwritten.
    """
    _validate.positive_integer("checkpoint_every", config.checkpoint_every)
    _validate.nonnegative_integer("init_seed", config.init_seed)
    _optimizer(config)  # complains before anything is written, as the model does
    _model(config)
    dataset = _load(config)
    the_plan = make_plan(config, len(dataset.train_labels))
    settings = {**resolved(config), "numpy": np.__version__}  # NumPy may change its random streams between releases
    if config.resume:
        folder = run_folder.interrupted_run_folder(config.out, config.dataset)
        run_folder.check_config(folder, settings)
    else:
        folder = run_folder.new_run_folder(config.out, config.dataset)
        run_folder.write_config(folder, settings)
    print(f"{len(dataset.train_labels)} training examples of {dataset.name}; writing to {folder}", flush=True)
    if not config.no_privacy:  # before the run, which may be long
        cost.say_weak_points(cost.weak_points(the_plan.epsilon(), the_plan, unit=None))
    with Checkpointer(folder / "checkpoints", the_plan) as checkpointer:
        state, progress = _train(config, dataset, the_plan, checkpointer, folder)
    accuracy = _test_accuracy(_model(config)[1], state.params, dataset)
    report = _report(config, the_plan, state, dataset, accuracy, progress)
    curve = EpsilonCurve(the_plan)
    title = f"{dataset.name}: test accuracy {accuracy:.3f}"
    write_whole(folder / "model.npz", _npz(state.params))
    figure = curve_png(progress.losses, curve, title=title, private=not config.no_privacy)
    run_folder.write_report(folder, report, figure)
    print(f"test_accuracy {accuracy:.4f}")
    if report["epsilon"] is None:
        print("epsilon infinite: this run is not private")
    else:
        numbers = {"relation": report["neighboring_relation"], "accountant": report["accountant"]}
        print(f"epsilon {cost.cost_in_words(report['epsilon'], report['delta'], **numbers, unit=None)}")
    cost.say_weak_points(report["weak_points"])
    print(
        f"released model: {folder / 'model.npz'}   private, with losses of the training set: {folder / 'report.json'}, "
        f"{folder / 'curve.png'}"
    )


def _train(
    config: Train, dataset: ImageDataset, the_plan: PrivacyPlan, checkpointer: Checkpointer, folder: Path
) -> tuple[TrainingState, training_loop.Progress]:
    init_params, logits = _model(config)
    scale = 1.0 / dataset.max_pixel

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        image, label = example
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, image.astype(jnp.float32) * scale), label)

    init, step = make_dp_step(
        loss_fn, _optimizer(config), the_plan, microbatch_size=resolved(config)["microbatch_size"]
    )
    steps = training_loop.train(
        step,
        init(init_params(jax.random.key(config.init_seed), dataset)),
        (dataset.train_images, dataset.train_labels),
        the_plan,
        checkpointer,
        fingerprint=dataset.fingerprint(),
        folder=folder,
        checkpoint_every=config.checkpoint_every,
    )
    return collections.deque(steps, maxlen=1).pop()


def make_plan(config: Train, num_examples: int) -> PrivacyPlan:
    """The plan that the options describe."""
    settings = resolved(config)
    return options.make_plan(
        config,
        num_examples=num_examples,
        num_steps=settings["num_steps"],
        expected_batch_size=settings["expected_batch_size"],
        l2_clip_norm=settings["l2_clip_norm"],
        target_delta=config.target_delta,
    )


def resolved(config: Train) -> dict[str, Any]:
    """Every setting that decides what a step computes, with its default filled in."""
    settings = dataclasses.asdict(config)
    for name in ("out", "resume", "checkpoint_every", "data_dir"):
        del settings[name]
    defaults = dataclasses.asdict(DEFAULTS[config.dataset])
    baseline_learning_rate = defaults.pop("baseline_learning_rate")
    if config.no_privacy:
        defaults["learning_rate"] = baseline_learning_rate
    if config.sampling_prob is not None:
        del defaults["expected_batch_size"]
    return settings | {name: value for name, value in defaults.items() if settings[name] is None}


def _optimizer(config: Train) -> optax.GradientTransformation:
    learning_rate = _validate.positive("learning_rate", resolved(config)["learning_rate"])
    if config.optimizer == "adam":
        return optax.adam(learning_rate)
    return optax.sgd(learning_rate, momentum=_validate.nonnegative("momentum", config.momentum) or None)


def _load(config: Train) -> ImageDataset:
    if config.dataset == "digits":
        return load_digits()
    if config.data_dir is None:
        raise ValueError("--dataset mnist needs --data-dir, the folder that holds its four IDX files.")
    return load_mnist(config.data_dir)


def _model(config: Train) -> tuple[Any, Any]:
    if resolved(config)["model"] == "cnn":
        if config.dataset != "mnist":
            raise ValueError("--model cnn takes 28 x 28 images; use --model mlp for digits.")
        return lambda key, dataset: init_cnn(key, num_classes=dataset.num_classes), cnn_logits

    def init(key: jax.Array, dataset: ImageDataset) -> Any:
        num_pixels = math.prod(dataset.train_images.shape[1:])
        return init_mlp(key, num_pixels=num_pixels, num_classes=dataset.num_classes)

    return init, mlp_logits


def _test_accuracy(logits: Any, params: Any, dataset: ImageDataset) -> float:
    @jax.jit
    def predict(params: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(jax.vmap(logits, (None, 0))(params, images.astype(jnp.float32) / dataset.max_pixel), -1)

    chunks = np.array_split(np.arange(len(dataset.test_labels)), -(-len(dataset.test_labels) // 1000))
    predicted = np.concatenate([np.asarray(predict(params, dataset.test_images[chunk])) for chunk in chunks])
    return float(np.mean(predicted == dataset.test_labels))


def _report(
    config: Train,
    the_plan: PrivacyPlan,
    state: TrainingState,
    dataset: ImageDataset,
    accuracy: float,
    progress: training_loop.Progress,
) -> dict[str, Any]:
    spent = the_plan.epsilon_so_far(state.ledger)
    peak_host_bytes, meter = meters.peak_host_memory()
    return {
        "private": not config.no_privacy,
        "epsilon": None if math.isinf(spent) else spent,
        "delta": config.target_delta,
        "neighboring_relation": the_plan.neighboring_relation.name,
        "accountant": the_plan.accountant,
        "sampler": "truncated Poisson",
        "noise_multiplier": the_plan.noise_multiplier,
        "clipping": str(the_plan.clipping),
        "sampling_prob": the_plan.sampling_prob,
        "padded_batch_size": the_plan.padded_batch_size,
        "num_steps": state.step,
        "num_examples": the_plan.num_examples,
        "expected_batch_size": the_plan.expected_batch_size,
        "statement": the_plan.describe(),
        "weak_points": cost.weak_points(spent, the_plan, unit=None),
        "dataset": dataset.name,
        "settings": resolved(config),
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "test_accuracy": accuracy,
        "num_test_examples": len(dataset.test_labels),
        "final_training_loss_not_private": progress.losses[-1] if math.isfinite(progress.losses[-1]) else None,
        "wall_seconds": progress.wall_seconds,
        "peak_host_bytes": peak_host_bytes,
        "peak_host_bytes_meter": meter,
        "device": jax.devices()[0].device_kind,
        "versions": meters.versions(),
        "command": " ".join(["jaxdp", *sys.argv[1:]]),
    }


def _npz(params: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(leaf) for name, leaf in _validate.named_leaves(params)})  # type: ignore[arg-type]
    return buffer.getvalue()
