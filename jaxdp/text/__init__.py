"""Records of text from files, their tokens as arrays of one shape, and losses over them."""

from jaxdp.text.block_scores import (
    ChoiceSums as ChoiceSums,
    TokenSums as TokenSums,
    choice_score_blocks as choice_score_blocks,
    evaluate_choices_sums as evaluate_choices_sums,
    evaluate_language_model_sums as evaluate_language_model_sums,
    language_model_score_blocks as language_model_score_blocks,
)
from jaxdp.text.blocks import choice_blocks as choice_blocks, language_model_blocks as language_model_blocks
from jaxdp.text.choices import encode_choices as encode_choices
from jaxdp.text.completions import encode_completions as encode_completions
from jaxdp.text.encoding import (
    EncodingReport as EncodingReport,
    Tokenizer as Tokenizer,
    encode_texts as encode_texts,
    fingerprint as fingerprint,
)
from jaxdp.text.evaluation import (
    ChoiceScore as ChoiceScore,
    LanguageModelScore as LanguageModelScore,
    evaluate_choices as evaluate_choices,
    evaluate_language_model as evaluate_language_model,
)
from jaxdp.text.losses import (
    choice_loss as choice_loss,
    choice_scores as choice_scores,
    language_model_loss as language_model_loss,
    token_log_likelihoods as token_log_likelihoods,
)
from jaxdp.text.objectives import (
    choice_error as choice_error,
    choice_error_blocks as choice_error_blocks,
    exact_match_blocks as exact_match_blocks,
    exact_match_error as exact_match_error,
    token_error as token_error,
)
from jaxdp.text.records import Fields as Fields, Record as Record, read_records as read_records
