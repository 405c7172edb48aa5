"""Where clipping, noise, sampling and accounting meet: the plan, the release of one step, and the ledger."""

from jaxdp.mechanism.checks import (
    check_batch as check_batch,
    check_gradient_plan as check_gradient_plan,
    check_plan as check_plan,
)
from jaxdp.mechanism.ledger import Ledger as Ledger
from jaxdp.mechanism.planning import plan as plan
from jaxdp.mechanism.privacy_plan import PrivacyPlan as PrivacyPlan, check_delta as check_delta
from jaxdp.mechanism.privatize import Release as Release, privatize as privatize
