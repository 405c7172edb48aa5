"""A run of `jaxdp finetune` by forward passes: private or not, streamed or resident, with its trajectory as its checkpoint."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxdp import text
from jaxdp.cli import (
    block_job,
    finetune_settings,
    memory_choice,
    meters,
    run_secrets,
    run_trajectory,
    training_loop,
    tuning_job,
    update_check,
    zeroth_order_methods,
)
from jaxdp.cli.link_meter import LinkMeter, seconds_alone
from jaxdp.cli.memory_choice import Choice, Room
from jaxdp.cli.outcome import Outcome
from jaxdp.cli.plan_check import PlanCheck, num_parameters
from jaxdp.cli.run_secrets import ProgressFile, RunSecrets
from jaxdp.cli.training_loop import Progress
from jaxdp.cli.tuning_job import Records, Tuning
from jaxdp.mechanism import Ledger, PrivacyPlan
from jaxdp.sampling import poisson_batches
from jaxdp.zeroth_order import (
    DeferredState,
    Journal,
    Placement,
    Stages,
    State,
    Steps,
    header_of,
    make_step,
    replayed,
    split_block,
)
from jaxdp.zeroth_order.memory import StepMemory, step_memory

if TYPE_CHECKING:
    from jaxdp.cli.finetune import Finetune


def check(config: Finetune) -> None:
    """Refuses what can be refused before anything is read."""
    settings = zeroth_order_methods.resolved(config.privacy.method, config.zeroth_order, tune=config.model.tune)
    settings |= {"method": config.privacy.method, "weight_decay": config.optimizer.weight_decay}
    zeroth_order_methods.make_sgd(settings, finetune_settings.schedule(config, config.privacy.num_steps))
    try:
        Placement(config.zeroth_order.stream).check()
    except RuntimeError as error:
        raise ValueError(f"--stream: {error}") from None


@dataclasses.dataclass
class ZerothOrderRun:
    """A run that fits, ready to begin. From then on `tuning` has no arrays that are also elsewhere."""

    config: Finetune
    tuning: Tuning
    records: Records
    plan: PrivacyPlan
    settings: dict[str, Any]
    choice: Choice
    secrets: RunSecrets
    check: PlanCheck
    stages: Stages | None
    options: dict[str, Any]

    def train(self, folder: Path) -> Outcome:
        """Evaluates, takes the steps that are left, and evaluates again."""
        steps, serial = self._steps(self.choice.placement), self._steps(self._serial)
        params, frozen = block_job.parts_of(self.tuning, self.settings["base_format"])
        key = run_trajectory.direction_key(self.settings["init_seed"])
        state = steps.init(params, direction_key=key, frozen=frozen, **self._noise_key)
        header = header_of(steps, params, key, about=self._about)
        digests = update_check.digests(self.tuning.trainable)
        keep_frozen = self.config.merge or self.tuning.model.lora is None
        del params, frozen
        self.tuning = self.tuning.without_arrays(keep_frozen=keep_frozen)
        run_secrets.write(folder / "secret", self.secrets)  # before the first step: no crash can lead to a second key
        before, meter = self._evaluate(state, "before"), None
        if self.choice.placement.is_streamed:
            alone = seconds_alone(state, self.choice.placement, write_every=self.settings["write_every"])
            meter = LinkMeter(self._link_bytes, alone)
        journal, trajectory = run_trajectory.open_journal(folder, header)
        with journal:
            if trajectory is not None:
                state = replayed(steps, state, trajectory)
                print(f"resumed after step {state.step} of {self.plan.num_steps}")
            step = steps.step if meter is None else meter.timed(serial.step, steps.step)
            state, progress = self._go_on(step, state, journal, folder, meter)
        state = steps.flush(state)
        after = self._evaluate(state, "after")
        trained = block_job.whole(state.params_in_place())
        updates = update_check.compare_digests(digests, trained, step=state.step)
        updates = update_check.with_non_finite(updates, trained)
        for message in updates.warnings():
            tuning_job.warn(message)
        ledger = Ledger().record(self.plan, state.step) if steps.plan is None else state.ledger
        return Outcome(trained, ledger, progress, updates, before, after, self._more(folder, meter))

    def _go_on(
        self, step: Any, state: State | DeferredState, journal: Journal, folder: Path, meter: LinkMeter | None
    ) -> tuple[State | DeferredState, Progress]:
        begin, kept = time.perf_counter(), ProgressFile(folder / "secret", state.step)
        progress = Progress(kept.losses, kept.wall_seconds)

        def save(state: DeferredState, info: Any) -> None:
            journal.append(state.step - 1, info.scalars)
            kept.append(progress.losses[-1], progress.wall_seconds)

        seed = np.random.SeedSequence(self.secrets.sampling_entropy)
        steps: Iterator[tuple[State | DeferredState, Progress]] = training_loop.run_steps(
            step,
            state,
            poisson_batches(self.records.data, self.plan, seed, start_step=state.step),
            self.plan,
            progress,
            save=save,
            folder=folder,
            save_every=1,
            tokens_per_step=self.plan.sampling_prob * self.records.report.num_tokens,
            start=begin - progress.wall_seconds,
            more=lambda: None if meter is None else str(meter),
        )
        try:
            last = collections.deque(steps, maxlen=1)
        finally:
            kept.close()
        if last:
            return last.pop()
        progress.wall_seconds += time.perf_counter() - begin  # killed behind its last step
        return state, progress

    def _steps(self, placement: Placement, *, scores: bool = False) -> Steps:
        model = self.tuning.model
        loss = block_job.score if scores else block_job.loss
        return make_step(
            loss(model, is_choice=self.records.is_choice, head_tokens=self.choice.head_tokens),
            placement=placement,
            stages=self.stages,
            estimator=zeroth_order_methods.make_estimator(self.settings, self.choice.num_at_once),
            **self.options,
        )

    @property
    def _about(self) -> dict[str, Any]:
        has_adapter = self.config.model.adapter is not None
        return run_trajectory.about(
            self.tuning,
            self.settings,
            self.plan,
            self.config.data,
            has_adapter=has_adapter,
            merge=self.config.merge,
        )

    @property
    def _serial(self) -> Placement:
        return dataclasses.replace(self.choice.placement, prefetch=0)

    @property
    def _noise_key(self) -> dict[str, Any]:
        return (
            {"noise_key": self.secrets.noise_key}
            if zeroth_order_methods.METHODS[self.settings["method"]].is_private
            else {}
        )

    @property
    def _link_bytes(self) -> float:
        return self.choice.memory.link_bytes(self.choice.placement, write_every=self.settings["write_every"])

    def _evaluate(self, state: State, when: str) -> dict[str, Any] | None:
        losses = self._steps(self.choice.placement, scores=True).losses
        rows = min(8, self.plan.padded_batch_size)
        return block_job.evaluate(lambda batch: losses(state, batch), self.records, batch_rows=rows, when=when)

    def _more(self, folder: Path, meter: LinkMeter | None) -> dict[str, Any]:
        names = ("estimator", "directions", "num_directions", "perturbation_scale", "low_rank", "refresh_every")
        return {
            **{name: self.settings[name] for name in names},
            "base_format": self.settings["base_format"],
            "is_streamed": self.choice.placement.is_streamed,
            "prefetch": self.choice.placement.prefetch,
            "stages": len(self.choice.memory.parts),
            "head_tokens": self.choice.head_tokens,
            "num_at_once": self.choice.num_at_once,
            "host_bytes": self.check.host_bytes,
            "host_bytes_meter": "resident set before the run, and what the run adds",
            "trajectory": run_trajectory.NAME,
            "trajectory_bytes": run_trajectory.path_in(folder).stat().st_size,
            "link": None if meter is None else meter.to_json(),
        }


def prepare(
    config: Finetune,
    tuning: Tuning,
    records: Records,
    plan: PrivacyPlan,
    settings: dict[str, Any],
    folder: Path | None,
) -> ZerothOrderRun:
    """Chooses how the run uses memory, from its compiled programs, and finds or draws its secrets.

    Raises:
        ValueError: it does not fit, or is not the run in `folder`.
    """
    block_job.check_parts(tuning)
    whole_loss = tuning_job.make_loss(tuning.model, is_choice=records.is_choice, remat=False)
    update_check.refuse_unused(whole_loss, plan.clipping, tuning.trainable, tuning.frozen, records.data)
    data_sha256 = text.fingerprint(records.data)
    found = None if folder is None else run_secrets.read(folder / "secret")
    if found is None:
        if folder is not None and run_trajectory.path_in(folder).exists():
            raise ValueError(
                f"{folder} has a trajectory and no {folder / 'secret'}: it cannot go on with its own noise; start a new run."
            )
    else:
        training_loop.check_same_data(found.data_sha256, data_sha256, folder or Path())

    params, frozen = block_job.shapes_of(tuning, settings["base_format"])
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((plan.padded_batch_size, *leaf.shape[1:]), leaf.dtype), records.data
    )
    options = _step_options(config, settings, plan)
    known: dict[tuple[bool, int], StepMemory] = {}

    @functools.cache
    def stages() -> Stages:
        model = block_job.loss(tuning.model, is_choice=records.is_choice, head_tokens=memory_choice.HEAD_TOKENS[0])
        example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
        return split_block(model, params, example, frozen=frozen)

    def memory_of(is_split: bool, head_tokens: int, num_at_once: int) -> StepMemory:
        model = block_job.loss(tuning.model, is_choice=records.is_choice, head_tokens=head_tokens)
        shapes = {"params": params, "batch": batch, "frozen": frozen, "stages": stages() if is_split else None}
        estimator = zeroth_order_methods.make_estimator(settings, num_at_once)
        like = known.get((is_split, num_at_once))
        known[is_split, num_at_once] = step_memory(model, estimator=estimator, like=like, **shapes, **options)
        return known[is_split, num_at_once]

    can_split = config.zeroth_order.stream and (frozen is None or not jax.tree.leaves(frozen.blocks))
    room = _room(config)
    choice = memory_choice.choose(
        memory_of,
        room,
        is_streamed=config.zeroth_order.stream,
        more_host_bytes=block_job.passing_bytes(tuning, settings["base_format"], merge=config.merge),
        splits=((False, True) if can_split else (False,)) if found is None else (found.is_split,),
        head_tokens=memory_choice.head_tokens_of(settings["max_length"]) if found is None else (found.head_tokens,),
        nums_at_once=zeroth_order_methods.nums_at_once(settings) if found is None else (found.num_at_once,),
        remedies=_remedies(config),
    )
    check = PlanCheck(
        plan,
        choice.device_bytes,
        room.device,
        room.device_meter,
        num_parameters(tuning.trainable),
        num_parameters(tuning.frozen),
        host_bytes=meters.host_memory() + choice.host_bytes + (choice.device_bytes if room.is_shared else 0),
        placement=str(choice),
        unit=tuning_job.unit_noun(config.data),
    )
    print(check, flush=True)
    secrets = found or run_secrets.draw(data_sha256, choice.head_tokens, choice.num_at_once, is_split=choice.is_split)
    split = stages() if choice.is_split else None
    return ZerothOrderRun(config, tuning, records, plan, settings, choice, secrets, check, split, options)


def _step_options(config: Finetune, settings: dict[str, Any], plan: PrivacyPlan) -> dict[str, Any]:
    """Arguments of `make_step` and `step_memory`. The methods without privacy have no plan: they take the mean of a batch."""
    rate = finetune_settings.schedule(config, plan.num_steps)
    return {
        "sgd": zeroth_order_methods.make_sgd(settings, rate),
        "plan": plan if zeroth_order_methods.METHODS[settings["method"]].is_private else None,
        "law": zeroth_order_methods.make_law(settings),
        "rounding": settings["rounding"],
        "write_every": settings["write_every"],
    }


def _room(config: Finetune) -> Room:
    device, device_meter = meters.available_memory() or (None, None)
    host, host_meter = meters.available_host_memory() or (None, None)
    if config.zeroth_order.max_device_memory is not None:
        limit = zeroth_order_methods.num_bytes(config.zeroth_order.max_device_memory)
        if device is None or limit < device:
            device, device_meter = limit, f"--max-device-memory {config.zeroth_order.max_device_memory}"
    return Room(device, device_meter, host, host_meter, jax.default_backend() == "cpu")


def _remedies(config: Finetune) -> list[str]:
    chosen = config.zeroth_order
    return [
        *(["--tune lora"] if config.model.tune == "full" else []),
        *(["--base-format int4"] if config.model.tune == "lora" and chosen.base_format != "int4" else []),
        *(["--dtype bfloat16"] if config.optimizer.dtype == "float32" else []),
        *(["--param-dtype bfloat16"] if config.model.tune == "full" and chosen.param_dtype == "float32" else []),
        "fewer --num-directions",
        "a smaller --expected-batch-size or --max-length",
    ]
