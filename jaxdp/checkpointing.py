"""Checkpoints of a private run, through orbax: atomic, exact, and bound to their plan."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxdp import _validate
from jaxdp.mechanism import Ledger, PrivacyPlan, check_plan

State = TypeVar("State")

_FORMAT = 2  # 1: noise that was not bound to its batch; going on from it would release forgotten steps again


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable, or belongs to another run; nothing was loaded and nothing overwritten."""


class Checkpointer:
    """Saves and restores the state of a run in one folder.

    A checkpoint is written beside its final name and renamed when complete, so a half-written one is never loaded.
    Restoring gives the saved arrays bit for bit, the noise key and the ledger included: the continued run repeats the steps
    that a crash forgot exactly, if it sees the same batches. So store the entropy of the sampler's `SeedSequence` in `extra`, and
    resume with `poisson_batches(source, plan, SeedSequence(entropy), start_step=state.step)`.

    What must still not be done: with other batches the forgotten steps draw other noise (S8, `jaxdp.noise_keys`) and are released a
    second time, and so they are where one checkpoint is continued twice in two ways. If anything of the lost run was published,
    count them twice. And do not leave `start_step` out: steps that share a draw are not what the plan accounts for.

    **The folder is secret**: it holds the noise key, and is made readable by its owner only. Publish `state.params`.

    Args:
        directory: The folder; it is made if missing.
        plan: The plan of the run. A checkpoint of another plan is refused.
        max_to_keep: Older checkpoints than the newest `max_to_keep` are deleted.
    """

    def __init__(self, directory: str | os.PathLike[str], plan: PrivacyPlan, *, max_to_keep: int = 2):
        import orbax.checkpoint as ocp  # slow to import, and only needed here

        self._ocp = ocp
        self._plan = check_plan(plan)
        self._directory = Path(directory).absolute()
        try:
            _make_private(self._directory)
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints to {self._directory}: {error}; give checkpoints a folder of their own."
            ) from error
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=False),
        )

        # Checkpoints of an earlier run: they must be continued, and not mixed with those of another noise key.
        self._unread = self._manager.latest_step() is not None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: Any, *, extra: dict[str, Any] | None = None) -> None:
        """Writes `state`, a dataclass with a `ledger` such as `TrainingState`, as the checkpoint of its step.

        A step that is there already is left as it is: one key, one plan and one step have one state.

        Args:
            state: All its leaves but the ledger's are arrays.
            extra: JSON-able values to keep with it.
        """
        ledger: Ledger = state.ledger
        if self._unread:
            raise CheckpointError(
                f"{self._directory} holds checkpoints of an earlier run, the newest of step {self.latest_step()}; restore it first "
                "to go on with that run, or choose another folder."
            )
        if ledger.num_steps in self._manager.all_steps():
            return
        metadata = {
            "format": _FORMAT,
            "arrays": _shapes(_as_dict(state)),
            "plan": plan_to_json(self._plan),
            "ledger": ledger.to_json(),
            "extra": extra or {},
        }
        self._manager.save(
            ledger.num_steps,
            args=self._ocp.args.Composite(
                arrays=self._ocp.args.StandardSave(_as_dict(state)),
                metadata=self._ocp.args.JsonSave(metadata),
            ),
            force=True,
        )
        self._manager.wait_until_finished()

    def restore(self, template: State, *, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """Reads a checkpoint into the structure of `template`, as `init(params)` makes it.

        Args:
            template: Gives the structure, shapes and dtypes; its values are not used.
            step: Which checkpoint; None for the newest.

        Returns:
            The state, and what was saved as `extra`.

        Raises:
            CheckpointError: there is none, it cannot be read, or its plan or array shapes differ.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"no complete checkpoint in {self._directory}; start a new run without resuming.")
        try:
            metadata = self._manager.restore(
                step, args=self._ocp.args.Composite(metadata=self._ocp.args.JsonRestore())
            )["metadata"]
        except Exception as error:
            raise CheckpointError(f"cannot read checkpoint {step} in {self._directory}: {error}") from error
        self._check_metadata(metadata, _shapes(_as_dict(template)), step)
        try:
            arrays = self._manager.restore(
                step,
                args=self._ocp.args.Composite(arrays=self._ocp.args.StandardRestore(_abstract(_as_dict(template)))),
            )["arrays"]
        except Exception as error:
            raise CheckpointError(f"cannot read checkpoint {step} in {self._directory}: {error}") from error
        state = dataclasses.replace(template, **arrays, ledger=Ledger.from_json(metadata["ledger"]))  # type: ignore[type-var]
        self._unread = False
        return state, metadata["extra"]

    def _check_metadata(self, metadata: Any, shapes: dict[str, str], step: int) -> None:
        if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} has another format; restore it with the jaxdp that wrote it."
            )
        if listing := _validate.differences(metadata["plan"], plan_to_json(self._plan)):
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} belongs to another plan ({listing}). Resume with the plan that wrote "
                "it, or start a new run in another folder."
            )
        if listing := _validate.differences(metadata["arrays"], shapes):
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} does not fit the model or optimizer of this run ({listing}). Restore it "
                "into the state that init(params) makes with the same model and optimizer."
            )


def plan_to_json(plan: PrivacyPlan) -> dict[str, Any]:
    """The numbers of a plan that decide what a step computes and how it is charged, as JSON-able values.

    Not the number of steps and the goal: `plan.replace(num_steps=...)` goes on with the same mechanism.
    """
    left_out = ("num_steps", "target_epsilon", "target_delta")
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name not in left_out}
    values["clipping"] = repr(plan.clipping)
    values["neighboring_relation"] = plan.neighboring_relation.name
    return json.loads(json.dumps(values))


def _make_private(directory: Path) -> None:
    """Makes the folder, or takes one that holds nothing but checkpoints, readable by its owner only."""
    if directory.is_dir():
        strangers = [path.name for path in directory.iterdir() if not path.name.split(".")[0].isdigit()]
        if strangers:
            raise OSError(f"it holds other files ({', '.join(sorted(strangers)[:3])}), and checkpoints are secret")
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)


def _as_dict(state: Any) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "ledger"}


def _shapes(tree: Any) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _validate.named_leaves(tree)}


def _abstract(tree: Any) -> Any:
    import orbax.checkpoint as ocp

    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
