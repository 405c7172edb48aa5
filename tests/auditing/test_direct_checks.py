"""Direct checks of an audit: green for the package, red for each fault in what it breaks, and worth what they say."""

import math

import jax
import numpy as np
import pytest

from jaxdp.auditing import broken_step, broken_zeroth_order_step
from jaxdp.auditing.canary_losses import LEAVES, every_route
from jaxdp.auditing.checks import Case, Check
from jaxdp.auditing.clip_check import POLICIES, cancelling_check, ordinary_check, zeroth_order_check
from jaxdp.auditing.noise_check import SIGNIFICANCE, _checks, _Draws, noise_check, zeroth_order_noise_check
from jaxdp.clipping import flat
from jaxdp.gradients import clipped_grad

NORM = 10.0


def rng():
    return np.random.default_rng(0)


def ordinary(fault="none", *ways):
    return ordinary_check(canary_norm=NORM, make_step=broken_step(fault, canary_norm=NORM), rng=rng(), ways=ways)


def failed(check, word):
    return [case for case in check.failed if word in case.name]


# The clip. Programs are compiled as users compile them: which roundings meet is up to the optimizer.


def test_the_canaries_take_every_route():
    trial = every_route(rng(), size=2, canary_norm=NORM)
    example = jax.tree.map(lambda x: x[0], trial.others)
    leaves = clipped_grad(trial.loss, clipping=flat(1.0)).explain(trial.params, example).leaves
    routes = {leaf.path: leaf.route for leaf in leaves}
    assert routes | {"scanned": "dense"} == {name: name for name in LEAVES} | {"scanned": "dense"}


@pytest.mark.unoptimized
def test_every_canary_that_is_clipped_moves_the_sum_by_the_clip_norm():
    """And so a clip that is off would show: no canary is lost on the way, and those that must not count move nothing."""
    check = ordinary("none", "vmap", "two_pass")
    assert check.passed
    assert {case.name.split(", ")[3] for case in check.cases} == {"flat", "per-layer", "automatic"}
    for case in check.cases:
        if "not finite" in case.name or "beyond float32" in case.name:
            assert case.measured == 0
        elif "below" not in case.name:
            assert case.measured > 0.98
    assert set(POLICIES) == {"flat", "per-layer", "automatic", "quantile"}


@pytest.mark.unoptimized
def test_a_clip_that_is_off_in_one_layer_is_seen_in_that_layer():
    check = ordinary("no-clip-in-one-layer", "vmap")
    assert failed(check, "in dense alone")
    assert check.worst.measured > NORM
    assert not failed(check, "in copy alone, every route, batch of 4, flat")


@pytest.mark.unoptimized
def test_a_clip_that_is_off_in_one_method_is_seen_in_that_method():
    check = ordinary("no-clip-in-one-method", "two_pass", "dp_aggregate")
    assert failed(check, "two_pass")
    assert not failed(check, "dp_aggregate")


@pytest.mark.unoptimized
def test_a_sum_of_another_tensor_than_the_norms_is_seen_by_cancelling_canaries_alone():
    make = broken_step("two-tensors", canary_norm=NORM)
    check = cancelling_check(make_step=make, rng=rng(), ways=("vmap",), batches=((64, None),))
    assert failed(check, "input of a dense layer")
    assert failed(check, "in bfloat16")
    assert check.worst.measured > 1e6
    assert ordinary_check(canary_norm=NORM, make_step=make, rng=rng(), ways=("vmap",)).passed


def test_the_package_clips_records_whose_gradient_cancels():
    """In the programs in which a compiler that repeats what a norm and a sum read was caught at it."""
    found = cancelling_check(rng=rng(), ways=("book_keeping", "two_pass"), batches=((4, 2), (64, None)))
    assert found.passed, found.worst


def test_zeroth_order_steps_clip_all_canaries():
    check = zeroth_order_check(2, canary_norm=NORM, rng=rng())
    assert check.passed
    assert check.worst.measured == pytest.approx(1, abs=1e-4)
    broken = broken_zeroth_order_step("no-clip", canary_norm=NORM)
    check = zeroth_order_check(2, canary_norm=NORM, make_step=broken, rng=rng())
    assert failed(check, "ordinary, flat")
    assert check.worst.measured == pytest.approx(NORM, rel=1e-3)


# The noise.


def noise(fault="none"):
    return noise_check(3.0, make_step=broken_step(fault, canary_norm=NORM), rng=rng())


@pytest.mark.unoptimized
def test_noise_is_of_the_claimed_size_and_no_two_draws_are_alike():
    sizes, correlations = noise()
    assert sizes.passed
    assert correlations.passed
    assert [case.name for case in sizes.cases if "count" in case.name] == [
        case.name for case in sizes.cases if case.name.startswith("noise of quantile, vmap, count")
    ]
    assert len(correlations.cases) == 7  # 6 mechanisms, and the series of the counts of one


@pytest.mark.unoptimized
def test_half_the_noise_is_of_another_size():
    sizes, correlations = noise("half-noise")
    assert len(sizes.failed) >= 12  # the count has noise of its own
    assert correlations.passed


@pytest.mark.unoptimized
@pytest.mark.parametrize("fault", ["noise-reused", "noise-reused-every-other-step"])
def test_noise_that_is_reused_is_one_draw_twice(fault):
    _, correlations = noise(fault)
    assert len(correlations.failed) >= 6
    _, correlations = zeroth_order_noise_check(
        3.0, make_step=broken_zeroth_order_step(fault, canary_norm=NORM), rng=rng()
    )
    assert not correlations.passed


@pytest.mark.unoptimized
def test_noise_of_zeroth_order_steps_is_of_the_claimed_size_and_no_two_draws_are_alike():
    for check in zeroth_order_noise_check(3.0, rng=rng()):
        assert check.passed
    sizes, _ = zeroth_order_noise_check(
        3.0, make_step=broken_zeroth_order_step("half-noise", canary_norm=NORM), rng=rng()
    )
    assert not sizes.passed


def synthetic(numbers):
    labels = [f"{row}" for row in range(len(numbers))]
    return _checks([_Draws("numbers", numbers, labels, {"all": numbers})], {})


def numbers_in(power):
    return [float(word) for word in power.replace(",", " ").split() if word.replace(".", "").isdigit()]


def test_the_checks_of_noise_see_what_they_say_nine_times_in_ten():
    """By the law of the smallest faults that they name, and they see little that is half as large."""
    generator, tries = np.random.default_rng(2), 200
    shape = (10, 1000)
    sizes, correlations = synthetic(generator.normal(size=shape))
    std, correlation = numbers_in(sizes.power)[1], numbers_in(correlations.power)[1]
    assert numbers_in(sizes.power)[0] == numbers_in(correlations.power)[0] == 0.9

    def seen(fraction, shared):
        count = np.zeros(2)
        for _ in range(tries):
            draws = generator.normal(size=shape)
            draws[1] = shared * draws[0] + math.sqrt(1 - shared**2) * draws[1]
            count += [not check.passed for check in synthetic(fraction * draws)]
        return count / tries

    least = 0.9 - 3 * math.sqrt(0.09 / tries)
    assert seen(std, 0)[0] >= least
    assert seen(1, correlation)[1] >= least
    assert seen((1 + std) / 2, 0)[0] < 0.5
    assert seen(1, correlation / 2)[1] < 0.5


def test_noise_of_the_claim_is_no_false_alarm_and_none_at_all_is_one():
    generator = np.random.default_rng(3)
    for _ in range(300):
        assert all(check.passed for check in synthetic(generator.normal(size=(20, 100))))
    assert SIGNIFICANCE <= 1e-6
    assert not any(check.passed for check in synthetic(np.zeros((3, 100))))


def test_a_measurement_that_is_no_number_has_not_passed():
    check = Check("law", "units", (Case("a", 0.5, 1.0), Case("b", float("nan"), 1.0)), {}, "")
    assert [case.name for case in check.failed] == ["b"]
    assert not check.passed
