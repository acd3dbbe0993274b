"""What checkpoints of every family may say that changes nothing of what a trained model computes.

A setting or tensor that is neither used by a family nor named here or by the family is never passed over in silence.
"""

from __future__ import annotations

import re

# Kept by transformers' configs, now or in earlier versions.
_KEPT = """
architectures model_type auto_map transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class use_cache
output_attentions output_hidden_states output_router_logits return_dict torchscript use_bfloat16
attn_implementation _attn_implementation _attn_implementation_autoset experts_implementation is_decoder
is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder chunk_size_feed_forward
pretraining_tp id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
initializer_range attention_dropout hidden_dropout router_aux_loss_coef router_jitter_noise max_length
min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens moebed_upcycled
"""
HARMLESS_SETTINGS = frozenset(re.findall(r"\S+", _KEPT))
# Each says that the weights are no numbers as they stand.
QUANTISED_SETTINGS = ("quantization_config", "quantization", "compression_config")
# Tables of the rotary embedding, which older versions of transformers stored.
HARMLESS_TENSORS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
