"""White-box audits in one run: a lower bound on epsilon, at a confidence, from what a run released about its canaries."""

from jaxdp.auditing.bounds import (
    Guesses as Guesses,
    epsilon_lower_bound as epsilon_lower_bound,
    is_rejected as is_rejected,
)
from jaxdp.auditing.curves import (
    gaussian_curve as gaussian_curve,
    gaussian_epsilon as gaussian_epsilon,
    pair_curve as pair_curve,
    plan_curve as plan_curve,
)
from jaxdp.auditing.dp_sgd import dp_sgd_run as dp_sgd_run
from jaxdp.auditing.faults import FAULTS as FAULTS, Fault as Fault, broken as broken
from jaxdp.auditing.one_run import AuditReport as AuditReport, Run as Run, audit as audit, check_claim as check_claim
from jaxdp.auditing.zeroth_order import zeroth_order_run as zeroth_order_run
