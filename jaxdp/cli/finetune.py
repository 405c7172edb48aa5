"""`jaxdp finetune`: a language model under differential privacy, from a Hugging Face folder and a file to another folder."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optax
import tyro

from jaxdp import _validate, text
from jaxdp.checkpointing import Checkpointer
from jaxdp.cli import options, plan_check, run_folder, training_loop, tuning_job, tuning_outputs, update_check
from jaxdp.cli.finetune_options import DataOptions, ModelOptions, OptimizerOptions, PrivacyOptions
from jaxdp.cli.optimizers import learning_rate_schedule, make_optimizer
from jaxdp.cli.options import Flag, hint
from jaxdp.cli.tuning_job import Records, Tuning
from jaxdp.mechanism import PrivacyPlan
from jaxdp.models.trainable import join
from jaxdp.training import TrainingState, make_dp_step


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Fine-tunes a language model with DP-SGD and writes it back as a Hugging Face folder, with a privacy statement.

      jaxdp finetune --model models/gpt2 --data letters.txt --eval public.txt --target-epsilon 8
      jaxdp finetune --model models/opt-125m --data notes.jsonl --unit-field user_id --tune lora --target-epsilon 3
      jaxdp finetune --model models/gpt2 --data sst2.tsv --text-field sentence --label-field label --verbalizers 0=bad,1=good
      jaxdp finetune --model models/gpt2 --data letters.txt --eval public.txt --target-epsilon 8 --resume

    The output folder gets model/ (or adapter/), README.md, report.json and curve.png.
    """

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    data: tyro.conf.OmitArgPrefixes[DataOptions]
    privacy: tyro.conf.OmitArgPrefixes[PrivacyOptions] = PrivacyOptions()  # noqa: RUF009
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = OptimizerOptions()  # noqa: RUF009
    out: Annotated[Path | None, hint("default: runs/<model>, or runs/<model>-2 and so on")] = None
    """Output folder. Its checkpoints hold the noise key: keep them secret."""
    merge: Flag[bool] = False
    """Also write the model with its adapters merged in."""
    resume: Flag[bool] = False
    """Go on with the run in --out, or with the newest interrupted one of this model; other settings must be the same."""
    checkpoint_every: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 100
    """Steps between checkpoints."""


def run(config: Finetune) -> None:
    """Trains, evaluates and writes `model/` or `adapter/`, `README.md`, `report.json`, `curve.png` and checkpoints.

    Raises:
        ValueError, TypeError, OSError, CheckpointError: bad input, before any step and with nothing overwritten.
    """
    _check(config)
    name = config.model.model.resolve().name or "model"
    folder = run_folder.interrupted_run_folder(config.out, name) if config.resume else None
    tuning, tokenizer = tuning_job.load_tuning(config.model, dtype=config.optimizer.dtype, keep_float32=config.merge)
    settings = resolved(config, tuning)
    if folder is not None:
        run_folder.check_config(folder, settings)
    records = tuning_job.read_records(config.data, tuning.model, tokenizer)
    print(f"{config.data.data.name}: {records.report}", flush=True)
    _say_what_is_odd(config, records, tuning)
    the_plan = make_plan(config, records.report.num_units, stacked=("blocks",) if "blocks" in tuning.trainable else ())
    tx = _optimizer(config, the_plan.num_steps)
    loss_fn = tuning_job.make_loss(tuning.model, is_choice=records.is_choice, remat=config.optimizer.remat)
    update_check.refuse_unused(loss_fn, the_plan.clipping, tuning.trainable, tuning.frozen, records.data)
    init, step = make_dp_step(loss_fn, tx, the_plan, microbatch_size=config.optimizer.microbatch_size)
    check = plan_check.plan_check(
        step, tx, the_plan, tuning.trainable, tuning_job.narrowed(tuning.frozen, tuning.model), records.data
    )
    print(check, flush=True)
    check.refuse_if_too_large(_remedies(config))
    if folder is None:
        folder = run_folder.new_run_folder(config.out, name)
        run_folder.write_config(folder, settings)
    print(f"writing to {folder}", flush=True)

    frozen = tuning_job.on_device(tuning.frozen, tuning.model)
    before = _evaluate("before", tuning, tuning.trainable, frozen, records)
    with Checkpointer(folder / "checkpoints", the_plan) as checkpointer:
        steps = training_loop.train(
            lambda state, batch, is_padding_example: step(state, batch, is_padding_example, frozen),
            init(tuning.trainable),
            records.data,
            the_plan,
            checkpointer,
            fingerprint=text.fingerprint(records.data),
            folder=folder,
            checkpoint_every=config.checkpoint_every,
            tokens_per_step=the_plan.sampling_prob * records.report.num_tokens,
        )
        state, progress, updates = _watched(steps, tuning, frozen)
    after = _evaluate("after", tuning, state.params, frozen, records)
    report = tuning_outputs.report(
        the_plan,
        state.ledger,
        tuning=tuning,
        records=records,
        privacy_unit=tuning_job.privacy_unit(config.data),
        settings=settings,
        check=check,
        updates=updates,
        progress=progress,
        scores=None if before is None or after is None else (before, after),
    )
    tuning_outputs.write(
        folder,
        tuning,
        tuning.released(state.params),
        report,
        losses=progress.losses,
        plan=the_plan,
        merged=config.merge,
    )


def _check(config: Finetune) -> None:
    """Refuses what can be refused before anything is read."""
    _validate.positive_integer("checkpoint_every", config.checkpoint_every)
    _validate.positive_integer("microbatch_size", config.optimizer.microbatch_size)
    tuning_job.check_model_options(config.model)
    if config.merge and config.model.tune not in tuning_job.ADAPTER_TUNING:
        raise ValueError(
            f"--merge needs --tune lora or ffa-lora, and this is --tune {config.model.tune}; leave it out."
        )
    privacy = config.privacy
    if privacy.num_steps is not None and privacy.epochs is not None:
        raise ValueError(f"give one of --num-steps and --epochs, got {privacy.num_steps} and {privacy.epochs:g}.")
    options.privacy_goal(privacy)
    _optimizer(config, privacy.num_steps)
    if not config.resume and config.out is not None:
        run_folder.check_free(config.out)


def make_plan(config: Finetune, num_units: int, *, stacked: tuple[str, ...] = ()) -> PrivacyPlan:
    """The plan that the options describe, for so many privacy units and parameters `stacked` over layers."""
    privacy, batch_size = config.privacy, config.privacy.expected_batch_size
    if batch_size is None and privacy.sampling_prob is None:
        batch_size = 64.0
    num_steps = privacy.num_steps
    if num_steps is None:
        if batch_size is None:
            sampling_prob = _validate.probability("sampling_prob", privacy.sampling_prob)
        else:
            sampling_prob = _validate.positive("expected_batch_size", batch_size) / num_units
        epochs = _validate.positive("epochs", 3.0 if privacy.epochs is None else privacy.epochs)
        num_steps = math.ceil(round(epochs / sampling_prob, 6))  # the inner rounding keeps 3 / 0.01 at 300 steps
    return options.make_plan(
        privacy,
        num_examples=num_units,
        num_steps=num_steps,
        expected_batch_size=batch_size,
        l2_clip_norm=privacy.l2_clip_norm,
        target_delta=num_units**-1.1 if privacy.target_delta is None else privacy.target_delta,
        stacked=stacked,
    )


def _optimizer(config: Finetune, num_steps: int | None) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps`; None if their number is not known yet."""
    chosen, rate = config.optimizer, _learning_rate(config)
    schedule = learning_rate_schedule(
        rate,
        schedule=chosen.schedule,
        warmup_steps=chosen.warmup_steps,
        num_steps=chosen.warmup_steps + 1 if num_steps is None else num_steps,
    )
    is_constant = chosen.schedule == "constant" and not chosen.warmup_steps
    return make_optimizer(
        chosen.optimizer,
        rate if is_constant else schedule,
        weight_decay=chosen.weight_decay,
        options=chosen.optimizer_options,
    )


def _learning_rate(config: Finetune) -> float:
    if config.optimizer.learning_rate is not None:
        return config.optimizer.learning_rate
    return 5e-4 if config.model.tune in ("full", "last-k") else 2e-3


def _remedies(config: Finetune) -> list[str]:
    chosen = config.optimizer
    smaller = f"--microbatch-size {chosen.microbatch_size // 2}"
    return [
        *([smaller] if chosen.microbatch_size > 1 else []),
        *([] if chosen.remat else ["--remat"]),
        *(["--tune lora"] if config.model.tune == "full" else []),
        *(["--dtype bfloat16"] if chosen.dtype == "float32" else []),
        "a smaller --max-length",
    ]


def resolved(config: Finetune, tuning: Tuning) -> dict[str, Any]:
    """Every setting that decides what a step computes, with its default filled in."""
    sections = (config.model, config.data, config.privacy, config.optimizer)
    settings = {name: value for section in sections for name, value in dataclasses.asdict(section).items()}
    for name in ("model", "adapter", "data", "eval"):  # where they lie; what they hold is compared by fingerprints
        del settings[name]
    lora = tuning.model.lora
    settings |= {
        "learning_rate": _learning_rate(config),
        "max_length": tuning_job.max_length(config.data, tuning.model),
        "lora_rank": lora and lora.rank,
        "lora_alpha": lora and lora.alpha,
        "lora_targets": lora and lora.targets,
        "base_sha256": tuning.fingerprint(),
        "numpy": np.__version__,  # NumPy may change its random streams between releases
    }
    return json.loads(json.dumps(settings))  # as it will be read again


def _say_what_is_odd(config: Finetune, records: Records, tuning: Tuning) -> None:
    length, enough = tuning_job.max_length(config.data, tuning.model), -(-records.report.longest // 16) * 16
    if config.data.max_length is None and enough <= 0.75 * length:
        print(
            f"note: sequences are padded to {length} tokens; --max-length {enough} would do, with less time and memory"
        )
    if records.num_shared:
        _warn(
            f"{records.num_shared} of the {records.num_evaluation_records} evaluation records are among the private ones"
        )


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _evaluate(when: str, tuning: Tuning, trainable: Any, frozen: Any, records: Records) -> dict[str, Any] | None:
    found = tuning_job.evaluate(tuning.model, join(trainable, frozen), records)
    if found is not None:
        print(f"{when}: {', '.join(f'{name} {value:.6g}' for name, value in found.items() if value)}", flush=True)
    return found


def _watched(
    steps: Iterator[tuple[TrainingState, training_loop.Progress]], tuning: Tuning, frozen: Any
) -> tuple[TrainingState, training_loop.Progress, update_check.UpdateCheck]:
    """Runs the steps, and compares the parameters after the first ones with those before.

    Every step has a positive learning rate, so one is enough, but for an adapter without noise: while B is zero, so is the
    gradient of A. It has three.
    """
    updates, said = None, set()

    def warn(messages: list[str]) -> None:
        for message in messages:
            if message not in said:
                _warn(message)
            said.add(message)

    last = None
    for last in steps:
        state, _ = last
        if state.step and (updates is None or (updates.unmoved and state.step <= 3)):
            updates = update_check.compare(tuning.trainable, state.params, tuning.frozen, frozen, step=state.step)
            if not updates.unmoved or state.step >= 3:
                warn(updates.warnings())
    assert last is not None  # the state that the steps begin with
    assert updates is not None  # a plan has a step
    updates = update_check.with_non_finite(updates, last[0].params)
    warn(updates.warnings())
    return *last, updates
