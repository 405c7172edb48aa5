"""`jaxdp finetune`: a language model under differential privacy, from a Hugging Face folder and a file to another folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxdp import _validate
from jaxdp.cli import (
    finetune_settings,
    gradient_run,
    options,
    run_folder,
    tuning_job,
    tuning_outputs,
    zeroth_order_methods,
    zeroth_order_run,
)
from jaxdp.cli.finetune_options import (
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    PrivacyOptions,
    ZerothOrderOptions,
)
from jaxdp.cli.options import Flag, hint
from jaxdp.cli.tuning_job import Records, Tuning


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Fine-tunes a language model privately and writes it back as a Hugging Face folder, with a privacy statement.

      jaxdp finetune --model models/gpt2 --data letters.txt --eval public.txt --target-epsilon 8
      jaxdp finetune --model models/opt-125m --data notes.jsonl --unit-field user_id --tune lora --target-epsilon 3
      jaxdp finetune --model models/gpt2 --data sst2.tsv --text-field sentence --label-field label --verbalizers 0=bad,1=good
      jaxdp finetune --model models/gpt2 --data letters.txt --eval public.txt --target-epsilon 8 --resume
      jaxdp finetune --model models/opt-13b --data notes.jsonl --method dp-aggzo --target-epsilon 6 --tune lora --stream
      jaxdp finetune --model models/opt-13b --data notes.jsonl --method mezo --no-privacy --stream --max-device-memory 8GB

    In the output folder, model/ (or adapter/) is what may be published, with its card, README.md. Beside it are report.json and
    curve.png, which are private; with a zeroth-order method also trajectory.jaxdpzo, for `jaxdp export-trajectory`.
    """

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    data: tyro.conf.OmitArgPrefixes[DataOptions]
    privacy: tyro.conf.OmitArgPrefixes[PrivacyOptions] = PrivacyOptions()  # noqa: RUF009
    """The guarantee."""
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = OptimizerOptions()  # noqa: RUF009
    """What is done with the noisy mean, and in which precision."""
    zeroth_order: tyro.conf.OmitArgPrefixes[ZerothOrderOptions] = ZerothOrderOptions()  # noqa: RUF009
    """Forward passes alone: mezo, lozo, fzoo, dpzero and dp-aggzo."""
    out: Annotated[Path | None, hint("default: runs/<model>, or runs/<model>-2 and so on")] = None
    """Output folder. Its checkpoints, or its folder secret, hold the noise key: keep them to yourself."""
    merge: Flag[bool] = False
    """Also write the model with its adapters merged in."""
    resume: Flag[bool] = False
    """Go on with the run in --out, or with the newest interrupted one of this model; other settings must be the same."""
    checkpoint_every: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 100
    """Steps between checkpoints. Zeroth-order methods write every step, in a few bytes."""


def run(config: Finetune) -> None:
    """Trains, evaluates and writes `model/` or `adapter/` with `README.md`, and the private `report.json` and `curve.png`.

    Raises:
        ValueError, TypeError, OSError, CheckpointError: bad input, before any step and with nothing overwritten.
    """
    _check(config)
    name = config.model.model.resolve().name or "model"
    folder = run_folder.interrupted_run_folder(config.out, name) if config.resume else None
    tuning, tokenizer = tuning_job.load_tuning(
        config.model,
        dtype=config.optimizer.dtype,
        param_dtype=config.zeroth_order.param_dtype,
        keep_float32=config.merge,
        in_memory=not zeroth_order_methods.is_zeroth_order(config.privacy.method),
    )
    settings = finetune_settings.resolved(config, tuning)
    if folder is not None:
        run_folder.check_config(folder, settings)
    records = tuning_job.read_records(config.data, tuning.model, tokenizer)
    print(f"{config.data.data.name}: {records.report}", flush=True)
    _say_what_is_odd(config, records, tuning)
    stacked = ("blocks",) if "blocks" in tuning.trainable else ()
    the_plan = finetune_settings.make_plan(config, records.report.num_units, stacked=stacked)
    if zeroth_order_methods.is_zeroth_order(config.privacy.method):
        the_run = zeroth_order_run.prepare(config, tuning, records, the_plan, settings, folder)
    else:
        the_run = gradient_run.prepare(config, tuning, records, the_plan)
    if folder is None:
        folder = run_folder.new_run_folder(config.out, name)
        run_folder.write_config(folder, settings)
    print(f"writing to {folder}", flush=True)

    del tuning  # the run has it, and may drop what it has copied
    outcome = the_run.train(folder)
    report = tuning_outputs.report(
        the_plan,
        outcome,
        tuning=the_run.tuning,
        records=records,
        privacy_unit=tuning_job.privacy_unit(config.data),
        settings=settings,
        check=the_run.check,
    )
    tuning_outputs.write(
        folder,
        the_run.tuning.released(outcome.trainable),
        report,
        losses=outcome.progress.losses,
        plan=the_plan,
        merged=config.merge,
        unit=tuning_job.unit_noun(config.data),
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
    zeroth_order_methods.check(privacy, config.optimizer, config.zeroth_order, tune=config.model.tune)
    options.privacy_goal(privacy)
    if zeroth_order_methods.is_zeroth_order(privacy.method):
        zeroth_order_run.check(config)
    else:
        gradient_run.make_optimizer_of(config, privacy.num_steps)
    if not config.resume and config.out is not None:
        run_folder.check_free(config.out)


def _say_what_is_odd(config: Finetune, records: Records, tuning: Tuning) -> None:
    length, enough = tuning_job.max_length(config.data, tuning.model), -(-records.report.longest // 16) * 16
    if config.data.max_length is None and enough <= 0.75 * length:
        print(
            f"note: sequences are padded to {length} tokens; --max-length {enough} would do, with less time and memory"
        )
    if records.num_shared:
        tuning_job.warn(
            f"{records.num_shared} of the {records.num_evaluation_records} evaluation records are among the private ones"
        )
