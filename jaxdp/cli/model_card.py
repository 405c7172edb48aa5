"""The README.md of a released model: what was trained how, and what is guaranteed to whom."""

from __future__ import annotations

from typing import Any

from jaxdp.accounting import composed_by, format_epsilon

_LIMITS = """\
- The statement is about the fine-tuning data alone. What the base model learned before is not covered, nor is anything that
  it remembers.
- It is about this one release. Another model trained on the same data, metrics of the training set, or settings chosen by
  looking at results on it, cost more privacy than is stated here.
- Records of one person in several privacy units are protected one by one, not together.
- A small epsilon bounds what the model can tell about any one unit. It is no promise that the text it writes is true,
  harmless or free of what many units have in common."""

_MULTIPLIER_IN_WORDS = {"gaussian": "standard deviation", "laplace": "scale"}


def model_card(report: dict[str, Any]) -> str:
    """Markdown with the front matter of a Hugging Face card, from entries of `report.json` that may be published."""
    lines = ["---", f"base_model: {_quoted(report['base_model'])}"]
    lines += ["tags:", "- differential-privacy" if report["private"] else "- jaxdp", "---", ""]
    how = "with differential privacy" if report["private"] else "without privacy"
    lines += [f"# {report['base_model']}, fine-tuned {how}", ""]
    lines += ["## Privacy", "", _headline(report), "", report["statement"], ""]
    lines += [f"**Privacy unit.** {report['privacy_unit']}", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _facts(report)), ""]
    lines += ["## Evaluation", "", *_evaluation(report["evaluation"]), ""]
    lines += ["## Training", "", *(f"- {line}" for line in _training(report)), ""]
    lines += ["## Limits", "", _LIMITS, ""]
    return "\n".join(lines)


def _headline(report: dict[str, Any]) -> str:
    if report["epsilon"] is None:
        return "**This model is not differentially private.** Publish it only if its training data may be published."
    epsilon = format_epsilon(report["epsilon"])
    if report["delta"] == 0:
        return f"**{epsilon}-differentially private, purely (delta = 0)**, for each privacy unit below."
    return f"**({epsilon}, {report['delta']:.3g})-differentially private** for each privacy unit below."


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("epsilon", "infinite" if report["epsilon"] is None else format_epsilon(report["epsilon"])),
        ("delta", f"{report['delta']:.3g}"),
        ("neighboring relation", report["neighboring_relation"]),
        ("accountant", composed_by(report["accountant"], report["delta"])),
        ("sampler", f"{report['sampler']}, probability {report['sampling_prob']:.6g}"),
        ("noise", report["noise"].capitalize()),
        (
            "noise multiplier",
            f"{report['noise_multiplier']:.6g} ({_MULTIPLIER_IN_WORDS[report['noise']]} over clip norm)",
        ),
        ("clipping", report["clipping"]),
        ("steps", str(report["num_steps"])),
        ("privacy units", str(report["num_examples"])),
    ]


def _evaluation(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["None: no evaluation records were given."]
    metrics = [name for name in evaluation["before"] if name in ("perplexity", "accuracy")]
    values = {name: [evaluation[when][name] for when in ("before", "after")] for name in metrics}
    rows = [
        f"| {name} | {' | '.join('not finite' if value is None else f'{value:.4g}' for value in pair)} |"
        for name, pair in values.items()
    ]
    return [f"| {evaluation['num_records']} records | before | after |", "|---|---|---|", *rows, "", evaluation["note"]]


def _training(report: dict[str, Any]) -> list[str]:
    settings, trainable = report["settings"], report["num_trainable_parameters"]
    lines = [
        f"{report['tuning']}: {trainable:,} of {report['num_parameters']:,} parameters trained",
        *_directions(report),
        f"optimizer {settings['optimizer']}, learning rate {settings['learning_rate']:g}, {settings['schedule']} schedule, "
        f"computed in {settings['dtype']}",
        f"jaxdp {report['versions']['jaxdp']}, jax {report['versions']['jax']} on {report['device']}",
    ]
    return lines + [f"**warning**: {warning}" for warning in report["updates"]["warnings"]]


def _directions(report: dict[str, Any]) -> list[str]:
    """What a zeroth-order method looked at, if it is one."""
    if "num_directions" not in report:
        return []
    scale = f", perturbation scale {report['perturbation_scale']:g}" if report["perturbation_scale"] is not None else ""
    return [
        f"method {report['method']}: forward passes alone, {report['estimator']} estimates along {report['num_directions']} "
        f"{report['directions']} direction{'s' * (report['num_directions'] > 1)} a step{scale}",
        f"the run is also a trajectory of {report['trajectory_bytes']:,} bytes: `jaxdp export-trajectory`, `jaxdp replay`",
    ]


def _quoted(text: str) -> str:
    """A YAML string, whatever it holds."""
    return "'" + text.replace("'", "''").replace("\n", " ") + "'"
