"""Models as pure functions of a parameter pytree. They know nothing of privacy."""

from jaxdp.models.causal_lm import CausalLM as CausalLM, causal_lm as causal_lm
from jaxdp.models.classifier import (
    cnn_logits as cnn_logits,
    init_cnn as init_cnn,
    init_mlp as init_mlp,
    mlp_logits as mlp_logits,
)
from jaxdp.models.generation import generate as generate
from jaxdp.models.greedy import greedy_tokens as greedy_tokens
from jaxdp.models.lora import add_adapters as add_adapters, merge as merge
from jaxdp.models.lora_spec import Lora as Lora
from jaxdp.models.peft import load_adapter as load_adapter, save_adapter as save_adapter
from jaxdp.models.saving import save_model as save_model
from jaxdp.models.tokenizer import (
    Tokenizer as Tokenizer,
    check_matches as check_matches,
    load_tokenizer as load_tokenizer,
)
from jaxdp.models.trainable import CHOICES as CHOICES, join as join, parts as parts, split as split
from jaxdp.models.weights import Pretrained as Pretrained, load_model as load_model, open_model as open_model
