"""A run of `jaxdp finetune` by clipped gradients: DP-SGD, or the same without clipping and noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optax

from jaxdp import text
from jaxdp.checkpointing import Checkpointer
from jaxdp.cli import finetune_settings, plan_check, training_loop, tuning_job, update_check
from jaxdp.cli.optimizers import make_optimizer
from jaxdp.cli.outcome import Outcome
from jaxdp.cli.plan_check import PlanCheck
from jaxdp.cli.tuning_job import Records, Tuning
from jaxdp.mechanism import PrivacyPlan
from jaxdp.models.trainable import join
from jaxdp.training import TrainingState, make_dp_step

if TYPE_CHECKING:
    from jaxdp.cli.finetune import Finetune


def make_optimizer_of(config: Finetune, num_steps: int | None) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps`; None if their number is not known yet."""
    chosen = config.optimizer
    return make_optimizer(
        chosen.optimizer or "adam",
        finetune_settings.schedule(config, num_steps),
        weight_decay=chosen.weight_decay,
        options=chosen.optimizer_options,
    )


@dataclasses.dataclass(frozen=True)
class GradientRun:
    """A run that fits, ready to begin."""

    config: Finetune
    tuning: Tuning
    records: Records
    plan: PrivacyPlan
    check: PlanCheck
    functions: tuple[Any, Any]

    def train(self, folder: Path) -> Outcome:
        """Evaluates, takes the steps that are left, and evaluates again."""
        config, tuning, records, (init, step) = self.config, self.tuning, self.records, self.functions
        frozen = tuning_job.on_device(tuning.frozen, tuning.model)
        before = tuning_job.evaluate(tuning.model, join(tuning.trainable, frozen), records, when="before")
        with Checkpointer(folder / "checkpoints", self.plan) as checkpointer:
            steps = training_loop.train(
                lambda state, batch, is_padding_example: step(state, batch, is_padding_example, frozen),
                init(tuning.trainable),
                records.data,
                self.plan,
                checkpointer,
                fingerprint=text.fingerprint(records.data),
                folder=folder,
                checkpoint_every=config.checkpoint_every,
                tokens_per_step=self.plan.sampling_prob * records.report.num_tokens,
            )
            state, progress, updates = _watched(steps, tuning, frozen)
        after = tuning_job.evaluate(tuning.model, join(state.params, frozen), records, when="after")
        return Outcome(state.params, state.ledger, progress, updates, before, after)


def prepare(config: Finetune, tuning: Tuning, records: Records, plan: PrivacyPlan) -> GradientRun:
    """Compiles the step and reads off what it needs.

    Raises:
        ValueError: it does not fit, or does not train what it should.
    """
    tx = make_optimizer_of(config, plan.num_steps)
    loss_fn = tuning_job.make_loss(tuning.model, is_choice=records.is_choice, remat=config.optimizer.remat)
    update_check.refuse_unused(loss_fn, plan.clipping, tuning.trainable, tuning.frozen, records.data)
    init, step = make_dp_step(loss_fn, tx, plan, microbatch_size=config.optimizer.microbatch_size)
    frozen = tuning_job.narrowed(tuning.frozen, tuning.model)
    unit = tuning_job.unit_noun(config.data)
    check = plan_check.plan_check(step, tx, plan, tuning.trainable, frozen, records.data, unit=unit)
    print(check, flush=True)
    check.refuse_if_too_large(_remedies(config))
    return GradientRun(config, tuning, records, plan, check, (init, step))


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
                tuning_job.warn(message)
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
