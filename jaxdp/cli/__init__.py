"""The command line: `jaxdp` and `python -m jaxdp`. Flags to one run; no logic of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_EXAMPLES = """Differentially private training in JAX.

Examples:
  jaxdp train                                        handwritten digits at epsilon 3, under a minute on a CPU
  jaxdp train --dataset mnist --data-dir data/mnist  MNIST from its IDX files
  jaxdp train --no-privacy                           the same run without clipping and noise, to compare
  jaxdp train --resume                               go on with the newest interrupted run
  jaxdp finetune --model DIR --data FILE             a language model on private text, at epsilon 3
  jaxdp finetune --model DIR --data FILE --tune lora --eval FILE --target-epsilon 8
  jaxdp finetune --model DIR --data FILE --method dp-aggzo --stream
                                                     by forward passes, with blocks that wait in host memory
  jaxdp export-trajectory RUN                        such a run as a file of kilobytes, without its noise key
  jaxdp replay --base DIR --out DIR FILE             its model again, bit for bit
  jaxdp generate --model DIR --prompt "Once upon"    a look at what a model writes
  jaxdp account --num-examples 60000 --expected-batch-size 256 --num-steps 1000 --delta 1e-5 --target-epsilon 3
  jaxdp audit                                        attacks runs of this installation, to see whether their epsilon holds
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one subcommand. Exits 2 with `error: ...` on bad input, 130 when interrupted."""
    import tyro

    from jaxdp.checkpointing import CheckpointError
    from jaxdp.cli import account, audit, export_trajectory, finetune, generate, replay, train

    commands = {
        "train": (train.Train, train.run),
        "finetune": (finetune.Finetune, finetune.run),
        "export-trajectory": (export_trajectory.ExportTrajectory, export_trajectory.run),
        "replay": (replay.Replay, replay.run),
        "generate": (generate.Generate, generate.run),
        "account": (account.Account, account.run),
        "audit": (audit.Audit, audit.run),
    }
    options = {name: of for name, (of, _) in commands.items()}
    config = tyro.extras.subcommand_cli_from_dict(options, prog="jaxdp", description=_EXAMPLES, args=args)
    try:
        dict(commands.values())[type(config)](config)
    except (ValueError, TypeError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        raise SystemExit(130) from None
