"""A run as a file of kilobytes: exported without its noise, and replayed to the released model bit for bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxdp.cli import main, run_secrets
from jaxdp.models.weights import load_model
from jaxdp.zeroth_order import Journal, directions, read_trajectory

pytestmark = pytest.mark.unoptimized
SETTINGS = [
    "--expected-batch-size", "8", "--max-length", "24", "--learning-rate", "1e-3", "--num-steps", "5", "--method", "dpzero",
    "--noise-multiplier", "1", "--l2-clip-norm", "5", "--accountant", "rdp", "--tune", "lora", "--lora-rank", "2",
    "--lora-targets", "blocks/attention/*",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(llama, texts, tmp_path_factory):
    """A private run of adapters, and its exported trajectory."""
    out = tmp_path_factory.mktemp("runs") / "run"
    data = ["--model", llama, "--data", texts / "private.txt", "--record", "line"]
    main([str(part) for part in ["finetune", *data, *SETTINGS, "--out", out]])
    main(["export-trajectory", str(out)])
    return out


def refused(capsys, *args) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    return error


def test_replay_gives_the_released_adapter_bit_for_bit(finished, llama, tmp_path, capsys):
    main(["replay", str(finished / "released.jaxdpzo"), "--base", str(llama), "--out", str(tmp_path / "again")])
    said = capsys.readouterr().out
    assert "5 steps of dpzero replayed; epsilon " in said
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / "adapter" / name).read_bytes() == (finished / "adapter" / name).read_bytes()


def test_the_exported_file_has_the_plan_and_not_the_noise_key(finished):
    """Nor anything else that a run must keep to itself (S8, S15)."""
    content = (finished / "released.jaxdpzo").read_bytes()
    assert len(content) < 8192
    trajectory = read_trajectory(finished / "released.jaxdpzo")
    report = json.loads((finished / "report.json").read_text())
    assert trajectory.header.privacy is not None
    assert trajectory.header.privacy["noise_multiplier"] == report["noise_multiplier"]
    assert trajectory.header.about["statement"] == report["statement"]
    kept = run_secrets.read(finished / "secret")
    assert kept is not None
    words = np.asarray(jax.random.key_data(kept.noise_key))
    secret = [word.tobytes() for word in words] + [str(int(word)).encode() for word in words]
    secret += [str(kept.sampling_entropy).encode(), kept.data_sha256.encode()]
    for needle in secret:
        assert needle not in content
    # The directions' key is public and has nothing to do with it.
    assert tuple(trajectory.header.direction_words) != tuple(int(word) for word in words)


def test_the_directions_do_not_determine_the_noise(finished):
    """The published references draw the noise from the directions' stream: whoever has the trajectory subtracts it."""
    trajectory = read_trajectory(finished / "released.jaxdpzo")
    root = np.asarray(trajectory.header.direction_words, np.uint32)
    kept = run_secrets.read(finished / "secret")
    assert kept is not None
    noise_words = np.asarray(jax.random.key_data(kept.noise_key))
    for step in range(5):
        for block in range(3):
            reached = directions._key(jax.numpy.asarray(root), *(np.uint32(i) for i in (step, 0, block)))
            assert not np.array_equal(np.asarray(reached), noise_words)


def test_another_base_is_refused(finished, llama, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    loaded = load_model(llama)
    weights = jax.tree.map(lambda leaf: leaf * np.float32(1.001), loaded.params)
    from jaxdp.models.saving import save_model
    from jaxdp.models.weights import Pretrained

    save_model(other, Pretrained(loaded.model, weights, loaded.hf_config, loaded.folder))
    trajectory = finished / "released.jaxdpzo"
    error = refused(capsys, "replay", trajectory, "--base", other, "--out", tmp_path / "again")
    assert "is not the model that the run began with, tiny-llama" in error
    assert not (tmp_path / "again").exists()


def test_bad_input_is_refused_and_nothing_overwritten(finished, llama, tmp_path, capsys):
    trajectory = finished / "released.jaxdpzo"
    assert "nothing was overwritten" in refused(capsys, "export-trajectory", finished)
    assert "has no trajectory.jaxdpzo" in refused(capsys, "export-trajectory", tmp_path)
    replay = ("replay", trajectory, "--base", llama, "--out")
    assert "no adapter folder, and --adapter is" in refused(
        capsys, *replay, tmp_path / "a", "--adapter", finished / "adapter"
    )
    assert "leave it out" in refused(capsys, *replay, tmp_path / "a", "--merge")
    assert "nothing was overwritten" in refused(capsys, *replay, finished)
    damaged = tmp_path / "damaged.jaxdpzo"
    content = bytearray(trajectory.read_bytes())
    content[-30] ^= 1  # inside the last record but one
    damaged.write_bytes(content)
    assert "is damaged" in refused(capsys, "replay", damaged, "--base", llama, "--out", tmp_path / "a")
    damaged.write_bytes(b"something else")
    assert "is not a jaxdp trajectory" in refused(capsys, "replay", damaged, "--base", llama, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    older = tmp_path / "older"
    older.mkdir()
    header = read_trajectory(trajectory).header
    assert header.privacy is not None
    plan = {name: value for name, value in header.privacy.items() if name != "noise"}
    Journal.create(older / "trajectory.jaxdpzo", dataclasses.replace(header, privacy=plan)).close()
    assert "lacks noise; it was written by another version" in refused(capsys, "export-trajectory", older)
    assert not (older / "released.jaxdpzo").exists()
