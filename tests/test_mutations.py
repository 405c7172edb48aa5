"""Break a copy of the code on purpose: the tests that guard the broken law must fail.

Each mutation replaces one piece of text of one file and names the tests that must go red. `pytest -m mutation` runs them.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Mutation:
    file: str
    old: str
    new: str
    tests: str  # a file of tests, and after a space an expression for -k


GRADIENTS = "tests/gradients/test_clipped_grad.py"
NORMS, ZOO = "tests/gradients/test_norms.py", "tests/gradients/test_zoo.py"
CANCELLING = "tests/gradients/test_cancelling.py"
PRIVATIZE = "tests/mechanism/test_privatize.py"
COUPLINGS = "tests/gradients/test_couplings.py"
MUTATIONS = {
    "noise_removed": Mutation(
        "jaxdp/mechanism/privatize.py", "if plan.noise_multiplier > 0:", "if False:", f"{PRIVATIZE} released_mean or independent"
    ),
    "noise_halved": Mutation(
        "jaxdp/noise.py", "scale = stddevs[", "scale = 0.5 * stddevs[", f"{PRIVATIZE} released_mean or audit"
    ),
    "noise_in_bfloat16": Mutation(
        "jaxdp/noise.py",
        "draw = standard_normal(own_key, leaf.shape, leaf.dtype)",
        "draw = jax.random.normal(own_key, leaf.shape, jnp.bfloat16).astype(leaf.dtype)",
        f"{PRIVATIZE} float32",
    ),
    "laplace_noise_halved": Mutation(
        "jaxdp/noise.py", "leaf + scale.astype", "leaf + 0.5 * scale.astype", f"{PRIVATIZE} laplace and once"
    ),
    "pure_truncation_free": Mutation(
        "jaxdp/accounting/laplace.py",
        "    if release.truncates:",
        "    if False:",
        "tests/test_laplace_accounting.py truncation_can_show",
    ),
    "two_directions_with_laplace": Mutation(
        "jaxdp/zeroth_order/aggregation.py",
        'plan.noise == "laplace" and num_directions != 1',
        "False",
        "tests/zeroth_order/test_private.py refused_for_more",
    ),
    "wrong_divisor": Mutation(
        "jaxdp/mechanism/privatize.py", "leaf / plan.expected_batch_size", "leaf / plan.padded_batch_size", f"{PRIVATIZE} constant"
    ),
    "clip_skipped": Mutation(
        "jaxdp/clipping/policies.py",
        "return jnp.where(norms <= target, jnp.ones_like(norms), target / jnp.maximum(norms, tiny))",
        "return jnp.ones_like(norms + target)",
        f"{GRADIENTS} sensitivity or closed_form",
    ),
    "rounding_guard_removed": Mutation(
        "jaxdp/clipping/policies.py", "1.0 - 2.0**-20", "1.0 + 2.0**-20", f"{GRADIENTS} stored_contribution"
    ),
    "key_reused_for_every_step": Mutation(
        "jaxdp/mechanism/privatize.py",
        "noise_keys.step_key(key, step)",
        "noise_keys.step_key(key, 0)",
        f"{PRIVATIZE} steps_keys",
    ),
    "key_reused_for_every_leaf": Mutation(
        "jaxdp/noise.py", "standard_normal(own_key,", "standard_normal(key,", "tests/test_noise.py independent"
    ),
    "key_not_secret": Mutation(
        "jaxdp/noise.py", "secrets.token_bytes(8)", "bytes(8)", "tests/test_noise.py secret"
    ),
    "mask_ignored": Mutation(
        "jaxdp/gradients/methods.py",
        "return ~self.is_padding & jnp.isfinite(loss)",
        "return jnp.isfinite(loss)",
        f"{GRADIENTS} padding",
    ),
    "padded_row_summed": Mutation(
        "jaxdp/clipping/aggregation.py",
        "keep = counts[:, None] & jnp.isfinite(norms)",
        "keep = jnp.isfinite(norms)",
        f"{GRADIENTS} padding",
    ),
    "non_finite_example_multiplied_by_zero": Mutation(
        "jaxdp/clipping/aggregation.py",
        "values = zero_rows(values, keep.reshape(-1))",
        "values = values * 1.0",
        f"{GRADIENTS} non_finite and vmap",
    ),
    "norm_in_the_leaf_dtype": Mutation(
        "jaxdp/clipping/aggregation.py",
        "wide = rows.astype(accumulator(rows.dtype))",
        "wide = rows",
        f"{GRADIENTS} float16",
    ),
    "replace_one_not_doubled": Mutation(
        "jaxdp/gradients/clipped_grad.py", "(2.0 if relation", "(1.0 if relation", f"{GRADIENTS} sensitivity"
    ),
    "group_noise_of_each_group_alone": Mutation(
        "jaxdp/noise.py", "noise_multiplier * np.sqrt(len(sizes)).item() * clip_norms", "noise_multiplier * clip_norms",
        "tests/test_noise.py allocation",
    ),
    "count_not_paid_for": Mutation(
        "jaxdp/mechanism/privacy_plan.py",
        "return (self.noise_multiplier**-2 - (2 * self.count_stddev) ** -2) ** -0.5",
        "return self.noise_multiplier",
        f"{PRIVATIZE} paid_for",
    ),
    "count_not_noised": Mutation(
        "jaxdp/mechanism/privatize.py", "plan.count_stddev * noise", "0.0 * noise", f"{PRIVATIZE} its_std"
    ),
    "noise_with_short_tails": Mutation(
        "jaxdp/noise.py",
        "return counter_normal.standard_normal(words, shape)",
        "return jnp.clip(counter_normal.standard_normal(words, shape), -4.5, 4.5)",
        "tests/test_noise.py tails",
    ),
    "padding_counted_as_clipped": Mutation(
        "jaxdp/clipping/aggregation.py",
        "jnp.where(keep, unclipped - 0.5, 0.0)",
        "jnp.where(keep, unclipped - 0.5, -0.5)",
        f"{PRIVATIZE} one_half",
    ),
    "truncation_keeps_the_first": Mutation(
        "jaxdp/sampling.py",
        "rng.choice(plan.num_examples, size, replace=False, shuffle=False)",
        "np.sort(rng.permutation(np.flatnonzero(rng.random(plan.num_examples) < plan.sampling_prob)))[:size]",
        "tests/test_sampling.py uniformly",
    ),
    "fixed_batch_size": Mutation(
        "jaxdp/sampling.py",
        "int(rng.binomial(plan.num_examples, plan.sampling_prob))",
        "round(plan.num_examples * plan.sampling_prob)",
        "tests/test_sampling.py binomial",
    ),
    "resumed_sampler_starts_over": Mutation(
        "jaxdp/sampling.py",
        "for step in range(start_step, plan.num_steps):",
        "for step in range(plan.num_steps - start_step):",
        "tests/test_checkpointing.py uninterrupted",
    ),
    "truncation_free_of_charge": Mutation(
        "jaxdp/accounting/releases.py", "if not self.truncates:", "if True:", "tests/test_accounting.py truncation_is_charged"
    ),
    "one_step_charged_for_all": Mutation(
        "jaxdp/accounting/accountants.py",
        ".self_compose(event.count)",
        ".self_compose(1)",
        "tests/test_accounting.py one_step_composed",
    ),
    "calibration_just_misses_its_goal": Mutation(
        "jaxdp/accounting/calibration.py",
        "    while excess(math.log(sigma)) > 0:",
        "    sigma *= 0.9999\n    while False:",
        "tests/test_accounting.py calibration",
    ),
    "budget_not_checked": Mutation(
        "jaxdp/mechanism/ledger.py", "if spent >= plan.num_steps:", "if False:", "tests/test_training.py refused"
    ),
    "past_steps_forgotten": Mutation(
        "jaxdp/mechanism/ledger.py",
        "return Ledger((*entries, ",
        "return Ledger((*entries[:0], ",
        "tests/mechanism/test_ledger.py changed_plan",
    ),
    "recurrent_weight_counted_once": Mutation(
        "jaxdp/gradients/uses.py",
        "loop = Loop(place.path, scan.length, is_stacked=False)",
        "loop = Loop(place.path, scan.length, is_stacked=True)",
        f"{ZOO} recurrent",
    ),
    "overlapping_slices_called_disjoint": Mutation(
        "jaxdp/gradients/views.py",
        "if a.box is None or b.box is None or a.in_shape != b.in_shape:\n            return False",
        "if a.box is None or b.box is None or a.in_shape != b.in_shape:\n            return False\n        return True",
        f"{ZOO} overlap",
    ),
    "cross_terms_dropped": Mutation(
        "jaxdp/gradients/norms.py", "parts += [2.0 * _inner", "parts += [0.0 * _inner", f"{NORMS} one_matrix"
    ),
    "gram_rounding_not_charged": Mutation(
        "jaxdp/gradients/norms.py",
        "return _square_by_grams(payloads), _gram_chain(payloads)",
        "return _square_by_grams(payloads), 0",
        f"{NORMS} rounding_may_hide",
    ),
    "gram_terms_in_one_chain": Mutation(
        "jaxdp/gradients/norms.py",
        "terms = lax.optimization_barrier(jnp.sum(terms, axis=-1))",
        "terms = jnp.sum(terms, axis=-1)",
        f"{NORMS} axis_by_axis",
    ),
    "sum_rounding_not_charged": Mutation(
        "jaxdp/gradients/norms.py",
        "charge = (tokens + 2) * roundoff + max(",
        "charge = 0.0 * roundoff + max(",
        f"{NORMS} charged_for_its_rounding",
    ),
    "formed_gradient_not_charged": Mutation(
        "jaxdp/gradients/norms.py", "charge += chain * roundoff", "charge += 0.0", f"{NORMS} charged_for_its_rounding"
    ),
    "stored_operand_not_charged": Mutation(
        "jaxdp/gradients/norms.py", "{jnp.dtype(jnp.bfloat16): 2.0**-8}", "{jnp.dtype(jnp.bfloat16): 0.0}", f"{NORMS} adds_more"
    ),
    "underflow_not_charged": Mutation(
        "jaxdp/gradients/norms.py",
        "charge * total + add(lost))",
        "charge * total + 0.0 * add(lost))",
        f"{NORMS} adds_more",
    ),
    "factors_of_a_bad_example_multiplied": Mutation(
        "jaxdp/gradients/norms.py",
        "return jnp.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim)), x, jnp.zeros_like(x))",
        "return x",
        f"{NORMS} never_multiplied",
    ),
    "convolutions_share_a_kernel_gradient": Mutation(
        "jaxdp/gradients/methods.py",
        'one_by_one = is_apart or jaxprs.contains(traced.body, "conv_general_dilated")',
        "one_by_one = False",
        f"{ZOO} convolution_grouped and vmap",
    ),
    "layers_noised_alike": Mutation(
        "jaxdp/noise.py",
        "scale = stddevs[jnp.asarray(group)].astype(leaf.dtype)",
        "scale = stddevs[jnp.asarray(group)].astype(leaf.dtype)[..., :1]",
        "tests/test_noise.py layers",
    ),
    "update_past_the_plan": Mutation(
        "jaxdp/transforms.py",
        "exhausted = state.step >= plan.num_steps",
        "exhausted = state.step < 0",
        "tests/test_transforms.py past_the_plan",
    ),
    # Statements: what is claimed of whom, and what the claim means.
    "neighbor_with_one_more_is_never_truncated": Mutation(
        "jaxdp/accounting/releases.py",
        "return self.padded_batch_size <= self.num_examples and not is_full",
        "return self.padded_batch_size < self.num_examples and not is_full",
        "tests/test_accounting.py may_overflow",
    ),
    "default_batch_has_no_room_for_a_neighbor": Mutation(
        "jaxdp/accounting/padding.py",
        "smallest_padded_batch_size(num_examples + 1, sampling_prob, min(",
        "smallest_padded_batch_size(num_examples, sampling_prob, min(",
        "tests/test_accounting.py may_overflow",
    ),
    "neighbor_with_one_less_forgotten": Mutation(
        "jaxdp/accounting/accountants.py",
        "return max(found, _epsilon_pld(releases, delta, relation, is_removed=True))",
        "return found",
        "tests/test_accounting.py record_less",
    ),
    "pure_truncation_of_a_neighbor_free": Mutation(
        "jaxdp/accounting/laplace.py",
        "others = release.most_records(relation) - 1",
        "others = release.num_examples - 1",
        "tests/test_laplace_accounting.py one_more",
    ),
    "large_epsilon_not_judged": Mutation(
        "jaxdp/accounting/judgment.py", "_EPSILON = 20.0", "_EPSILON = 2000.0", "tests/mechanism/test_plan.py is_weak"
    ),
    "large_delta_not_judged": Mutation(
        "jaxdp/accounting/judgment.py", "if delta > _LARGEST_DELTA:", "if False:", "tests/mechanism/test_plan.py is_weak"
    ),
    "relation_names_records_for_units": Mutation(
        "jaxdp/mechanism/privacy_plan.py",
        "[self.neighboring_relation].format(unit or 'record')",
        "[self.neighboring_relation].format('record')",
        "tests/mechanism/test_plan.py speaks_of_the_unit",
    ),
    "units_called_records": Mutation(
        "jaxdp/cli/tuning_job.py",
        'return None if options.unit_field is None else "privacy unit"',
        "return None",
        "tests/cli/test_statements.py speaks_of_units",
    ),
    "weak_guarantee_not_said": Mutation(
        "jaxdp/cli/cost.py",
        'print(f"weak guarantee: {sentence}", flush=True)',
        "pass",
        "tests/cli/test_statements.py weak",
    ),
    "losses_for_everyone_to_read": Mutation(
        "jaxdp/cli/run_folder.py",
        'write_json(folder / "report.json", report, mode=PRIVATE)',
        'write_json(folder / "report.json", report)',
        "tests/cli/test_statements.py owners",
    ),
    "private_file_made_for_everyone": Mutation(
        "jaxdp/_files.py", "os.O_CREAT | os.O_EXCL, mode)", "os.O_CREAT | os.O_EXCL, 0o666)", "tests/test_files.py never_anothers"
    ),
    "card_around_what_is_private": Mutation(
        "jaxdp/cli/tuning_outputs.py", "for name in written:", 'for name in [*written, "."]:', "tests/cli/test_statements.py owners"
    ),
    # The keys of the noise.
    "digest_ignored": Mutation(
        "jaxdp/mechanism/privatize.py",
        "noise_keys.bound_key(streams[name], digest)",
        "noise_keys.bound_key(streams[name], digest * jnp.uint32(0))",
        "tests/test_transforms.py two_gradients",
    ),
    "digest_blind_to_position": Mutation(
        "jaxdp/noise_keys.py",
        "return sum((i * m for i, m in zip(indices, multipliers, strict=True)), start)",
        "return start",
        "tests/test_noise_keys.py permutations",
    ),
    "digest_is_a_linear_sum": Mutation(
        "jaxdp/noise_keys.py",
        "x = words + place(a, [b * jnp.uint32(stride) for stride in strides])",
        "return jnp.full(2, jnp.sum(words * (place(a, [b] * len(strides)) | jnp.uint32(1)), dtype=jnp.uint32)); x = words",
        "tests/test_noise_keys.py signs",
    ),
    "run_not_folded": Mutation(
        "jaxdp/transforms.py",
        "noise_keys.Domain.AGGREGATE, run)",
        "noise_keys.Domain.AGGREGATE, 0 * run)",
        "tests/test_noise_keys.py no_key_that_draws",
    ),
    "domain_of_steps_is_that_of_runs": Mutation(
        "jaxdp/noise_keys.py", "STEP = _TAG + 16", "STEP = _TAG + 2", "tests/test_noise_keys.py distinct"
    ),
    "noise_of_a_step_follows_the_batch_alone": Mutation(
        "jaxdp/training.py", "bound_to = (params, batch) if", "bound_to = (batch,) if", "tests/test_training.py other_parameters"
    ),
    "noise_does_not_follow_the_mask": Mutation(
        "jaxdp/training.py", "else (params, batch, mask)", "else (params, batch)", "tests/test_training.py mask_is_a_draw"
    ),
    "noise_does_not_follow_the_noise_multiplier": Mutation(
        "jaxdp/mechanism/privatize.py",
        "repr((plan.noise, plan.noise_multiplier,",
        "repr((plan.noise,",
        "tests/test_training.py another_noise",
    ),
    "init_is_traced": Mutation(
        "jaxdp/transforms.py",
        'noise_keys.refuse_tracers("init of dp_aggregate", params)',
        "pass",
        "tests/test_transforms.py init_is_refused",
    ),
    "noise_key_from_the_direction_key": Mutation(
        "jaxdp/zeroth_order/key_relations.py",
        "    if high == 0:",
        "    if False:",
        "tests/zeroth_order/test_private.py follows_from",
    ),
    "batch_rule_of_a_loss_asked": Mutation(
        "jaxdp/gradients/jaxprs.py", 'if name == "custom_vmap_call":', "if False:", f"{COUPLINGS} not_asked and book_keeping"
    ),
    "callback_sees_the_batch": Mutation(
        "jaxdp/gradients/jaxprs.py",
        'if "vmap_method" in eqn.params:',
        "if False:",
        f"{COUPLINGS} not_asked and per_layer",
    ),
    "rules_of_derivatives_not_read": Mutation(
        "jaxdp/gradients/jaxprs.py",
        "if is_custom and derivative is not None:",
        "if False:",
        f"{COUPLINGS} not_asked and book_keeping",
    ),
    "coupled_equations_mapped": Mutation(
        "jaxdp/gradients/rewrite.py",
        "is_apart = id(eqn) in scope.assignment.apart",
        "is_apart = False",
        f"{COUPLINGS} not_asked and per_layer",
    ),
    "coupled_gradients_mapped": Mutation(
        "jaxdp/gradients/methods.py",
        "is_apart = bool(apart := traced.couplings.apart)",
        "is_apart = bool(apart := frozenset())",
        f"{COUPLINGS} calls_back_for_one and broadcast",
    ),
    "collectives_allowed": Mutation(
        "jaxdp/gradients/couplings.py", "if couplings.collectives:", "if False:", f"{COUPLINGS} outer_axis and psum"
    ),
    "state_between_records_allowed": Mutation(
        "jaxdp/gradients/couplings.py", "if couplings.stateful:", "if False:", f"{COUPLINGS} state_from"
    ),
    "coupled_probes_mapped": Mutation(
        "jaxdp/gradients/couplings.py", "if couplings.apart:", "if False:", f"{COUPLINGS} zeroth_order and two"
    ),
    "gradients_summed_over_devices": Mutation(
        "jaxdp/_replicas.py", "if there == here:", "if True:", f"{COUPLINGS} axes_of_records"
    ),
    "noise_on_each_device": Mutation(
        "jaxdp/_replicas.py", "if not varying and not unseen:", "if True:", f"{COUPLINGS} noise_is_not"
    ),
    "processes_not_compared": Mutation(
        "jaxdp/_replicas.py",
        "if np.any(everywhere != everywhere[:1]):",
        "if False:",
        "tests/test_many_processes.py shared or one_draw",
    ),
    "a_noise_key_for_each_process": Mutation(
        "jaxdp/_replicas.py", "if noise_key is None:", "if False:", "tests/test_many_processes.py draws_no_key and resident"
    ),
    "a_sample_for_each_process": Mutation(
        "jaxdp/sampling.py", "_replicas.check_sampling(", "str(", "tests/test_many_processes.py one_draw"
    ),
    # One buffer for a norm and a sum (S4e).
    "wall_removed": Mutation(
        "jaxdp/_materialize.py",
        "_materialize_all([leaves[k] for k in chosen])",
        "[leaves[k] for k in chosen]",
        f"{CANCELLING} no_more_than_the_bound or before_an_optimizer",
    ),
    "wall_removed_from_operands": Mutation(
        "jaxdp/gradients/rewrite.py", "materialize_one(x))", "x)", f"{CANCELLING} buffers and mlp_of_one_token"
    ),
    "wall_removed_from_cotangents": Mutation(
        "jaxdp/gradients/sites.py",
        "g, dx = materialize(g), None",
        "dx = None",
        f"{CANCELLING} buffers and mlp_of_one_token",
    ),
    "joint_gradient_computed_twice": Mutation(
        "jaxdp/gradients/finishing.py",
        "whole = materialize(lax.map(gradient, payloads) if has_axis else gradient(payloads))",
        "whole = lax.map(gradient, payloads) if has_axis else gradient(payloads)",
        f"{CANCELLING} buffers and one_weight_in_two_layers",
    ),
    "second_pass_not_clipped_again": Mutation(
        "jaxdp/gradients/methods.py",
        'jnp.sqrt(jnp.where(now > rows["square"], rows["square"] / now, 1.0))',
        "jnp.ones_like(now)",
        f"{CANCELLING} second_pass",
    ),
    "audit_of_sums_alone": Mutation(
        "jaxdp/auditing/dp_sgd.py",
        '"differences": _least_noise(canaries, blank, signs, plan.noise_multiplier),',
        '"differences": (signs[:, None] * canaries).sum(axis=0),',
        "tests/test_auditing.py cancels_in_differences and dp_sgd_report",
    ),
    "audit_of_zeroth_order_sums_alone": Mutation(
        "jaxdp/auditing/zeroth_order.py",
        "return array - (means / counts)[alike]",
        "return array",
        "tests/test_auditing.py cancels_in_differences and zeroth_order_report",
    ),
    "audit_without_a_union_bound": Mutation(
        "jaxdp/auditing/one_run.py",
        "return [0.8 * significance] + [0.2 * significance / others] * others if others else [significance]",
        "return [significance] * num_kinds",
        "tests/test_auditing.py all_kinds_of_scores",
    ),
    "audit_of_noise_each_draw_alone": Mutation(
        "jaxdp/auditing/noise_check.py",
        "np.triu(np.ones_like(deviates, bool), 1)",
        "np.zeros_like(deviates, bool)",
        "tests/auditing/test_direct_checks.py one_draw_twice or nine_times_in_ten",
    ),
    "audit_of_canaries_that_are_not_there": Mutation(
        "jaxdp/auditing/clip_check.py",
        "release(trial.batch(canary), False)",
        "release(trial.batch(canary), True)",
        "tests/auditing/test_direct_checks.py moves_the_sum",
    ),
    "audit_that_promises_what_it_sees_half_the_time": Mutation(
        "jaxdp/auditing/power.py", "_SEEN = 95", "_SEEN = 50", "tests/auditing/test_power.py nine_times_in_ten"
    ),
    "keys_of_device_generators_mapped": Mutation(
        "jaxdp/gradients/jaxprs.py",
        'if name == "rng_bit_generator" or any(_is_key_of_a_device_generator(var) for var in (*eqn.invars, *eqn.outvars)):',
        "if False:",
        f"{COUPLINGS} draws_what_it_draws_alone",
    ),
    "noise_does_not_follow_the_program": Mutation(
        "jaxdp/training.py", "bound_to=bound_to, facts=program)", "bound_to=bound_to)", "tests/test_training.py another_program"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def run_pytest():
    """Runs pytest in a folder, in a process of its own; returns its exit code and what it said."""
    command = [sys.executable, str(ROOT / "tests" / "forks.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None

        def run(folder, *args):
            job = {"folder": str(folder), "args": args, "output": str(folder / "output.txt")}
            print(json.dumps(job), file=forks.stdin, flush=True)
            return int(forks.stdout.readline()), (folder / "output.txt").read_text()

        yield run
        forks.stdin.close()


@pytest.mark.mutation
@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_suite_goes_red_when_the_code_is_broken(name, tmp_path, run_pytest):
    mutation = MUTATIONS[name]
    for part in ("jaxdp", "pallas_kernels", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part)  # with its bytecode: all files but one are as they were
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / mutation.file
    text = target.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.old!r} must stand once in {mutation.file}"
    target.write_text(text.replace(mutation.old, mutation.new))

    tests, expression = mutation.tests.split(" ", 1)
    # Alone and without doctests: not with the options of pyproject.toml.
    options = ("-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-q", "-x")
    code, output = run_pytest(tmp_path, *options, tests, "-k", expression)
    assert code == 1, f"the mutant survived:\n{output[-3000:]}"
    # Red for the right reason: a law that does not hold, not a mutant that does not run.
    assert re.search(
        r"^E\s+(AssertionError|assert|Failed: DID NOT RAISE|.*Mismatched elements)", output, re.MULTILINE
    ), output[-3000:]
