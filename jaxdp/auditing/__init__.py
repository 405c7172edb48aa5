"""White-box audits: a lower bound on epsilon, at a confidence, from what one run released about its canaries; and direct checks."""

from jaxdp.auditing.bounds import (
    Guesses as Guesses,
    epsilon_lower_bound as epsilon_lower_bound,
    is_rejected as is_rejected,
)
from jaxdp.auditing.checks import Case as Case, Check as Check
from jaxdp.auditing.clip_check import (
    cancelling_check as cancelling_check,
    ordinary_check as ordinary_check,
    zeroth_order_check as zeroth_order_check,
)
from jaxdp.auditing.curves import (
    gaussian_curve as gaussian_curve,
    gaussian_epsilon as gaussian_epsilon,
    pair_curve as pair_curve,
    plan_curve as plan_curve,
)
from jaxdp.auditing.dp_sgd import dp_sgd_run as dp_sgd_run
from jaxdp.auditing.faults import (
    FAULTS as FAULTS,
    Fault as Fault,
    broken as broken,
    broken_step as broken_step,
    broken_zeroth_order_step as broken_zeroth_order_step,
)
from jaxdp.auditing.noise_check import (
    noise_check as noise_check,
    zeroth_order_noise_check as zeroth_order_noise_check,
)
from jaxdp.auditing.one_run import (
    AuditReport as AuditReport,
    Run as Run,
    ScoreReport as ScoreReport,
    audit as audit,
    check_claim as check_claim,
)
from jaxdp.auditing.zeroth_order import zeroth_order_run as zeroth_order_run
